"""Makes the help pages, and the list of places of saved values, from the schemas that the host serves.

Run it after a node, a setting of a registered part or a preset has changed:
`python tests/nodes/help_pages.py`. It rewrites all pages in `nodes/web/docs/` but for their notes, which are
written by hand between a page's description and its tables, and `widgets.json`, by which a test tells that
saved graphs stay valid.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hosts import NEWEST, PACK, Host

DOCS, WIDGETS = PACK / "nodes/web/docs", Path(__file__).parent / "widgets.json"
_TABLES = "\n## Inputs\n"


def inputs_of(node: dict) -> dict[str, dict]:
    """Details of a node's inputs by name, the required ones first."""
    return {
        name: spec[1] | {"optional": part == "optional"}
        for part in ("required", "optional")
        for name, spec in node["input"].get(part, {}).items()
    }


def page_of(name: str, node: dict, notes: str) -> str:
    """A whole help page.

    Args:
        name: the node's id.
        node: its schema.
        notes: what is written by hand.
    """
    lines = [_head(name, node) + notes + _TABLES, "| input | what it is |", "|---|---|"]
    for key, details in inputs_of(node).items():
        default = details.get("default")
        given = f" Default: {default!r}." if default not in (None, "") else ""
        optional = " (optional)" if details["optional"] else ""
        lines.append(f"| `{key}`{optional} | {' '.join(details['tooltip'].split())}{given} |")
    lines += ["\n## Outputs\n", "| output | what it is |", "|---|---|"]
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return "\n".join([*lines, *(f"| `{key}` | {tip} |" for key, tip in outputs)]) + "\n"


def _head(name: str, node: dict) -> str:
    title = node["display_name"]
    return f"# {title}\n\n![{title}](pictures/{name}.jpg)\n\n{node['description']}\n"


def notes_of(page: str) -> str:
    """The part of a page that is written by hand: from its second paragraph to its tables."""
    text = page.partition(_TABLES)[0].split("\n\n", 3)
    return f"\n{text[3].rstrip()}\n" if len(text) > 3 else ""


def places_of(schemas: dict) -> dict:
    """Names of the inputs and types of the outputs of every node, in their order."""
    return {name: {"inputs": [*inputs_of(node)], "outputs": node["output"]} for name, node in schemas.items()}


def schemas_of(host: Host) -> dict[str, dict]:
    """Schemas of the pack's nodes by id."""
    return {name: node for name, node in host.get("/object_info").items() if name.startswith("CUL_")}


def write(schemas: dict) -> None:
    """Rewrite every page and `widgets.json`."""
    for name, node in schemas.items():
        path = DOCS / f"{name}.md"
        notes = notes_of(path.read_text(encoding="utf-8")) if path.is_file() else ""
        path.write_text(page_of(name, node, notes), encoding="utf-8", newline="\n")
    WIDGETS.write_text(json.dumps(places_of(schemas), indent=1) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        host = Host(NEWEST, Path(folder))
        try:
            write(schemas_of(host))
        finally:
            host.stop()


if __name__ == "__main__":
    main()
