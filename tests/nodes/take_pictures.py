"""Makes every picture of the documentation from real runs.

Run it by hand after nodes or workflows have changed: `python tests/nodes/take_pictures.py`. It writes
`nodes/web/docs/pictures/`, the thumbnails in `workflows/` and the screens in `docs/`. With ids of nodes and
names of workflows, such as `CUL_DriftMap "Forget a style"`, it writes the pictures of these alone. It needs
the newest host that the tests find, and Chromium. The text of the help pages is that of `help_pages.py`.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from browser import Page, open_page
from graphs import CUL, SAMPLING, Graph
from help_pages import DOCS, inputs_of, schemas_of
from hosts import NEWEST, PACK, Host
from PIL import Image

WORKFLOWS, SCREENS = PACK / "workflows", PACK / "docs"


def gallery(schemas: dict, saved: str) -> Graph:
    """One graph with every node of the pack."""
    graph = Graph()
    loaded, training = graph.load(), graph.training(iterations=40, anchor_count=0, anchor_steps=0)
    concept = graph.concept(keep="Navy Stripes\nPop Dots")
    chained, methods = (), {}
    defaults = {
        name: {
            key: details["default"]
            for key, details in inputs_of(node).items()
            if "default" in details and not details["optional"]
        }
        for name, node in schemas.items()
    }
    for name, values in defaults.items():
        if name.startswith("CUL_Regularizer_"):
            chained = (graph.add(name, **values, **({"regularizers": chained} if chained else {})), 0)
        elif name.startswith("CUL_Method_"):
            methods[name] = graph.add(name, **values)
    step = graph.add(
        "CUL_UnlearnStep",
        model=(loaded, CUL),
        concepts=(concept, 0),
        preset="trained",
        train_seed=0,
        preview_every=20,
        training=(training, 0),
        method=(methods["CUL_Method_conabl"], 0),
    )
    listed = {
        "model": (loaded, CUL),
        "requests": "Candy Stripes\nNeon Cyan",
        "kind": "style",
        "anchor": "",
        "keep": "Navy Stripes\nPop Dots",
        "train_seed": 0,
        "preview_every": 20,
    }
    solved = graph.add("CUL_UnlearnSequence", **listed, preset="exact")
    taken = graph.add("CUL_TakeBack", model=(solved, CUL), names="Neon Cyan")
    sequence = graph.add("CUL_UnlearnSequence", **listed, preset="trained", regularizers=chained)
    for made in (graph.merge(step, sequence), taken):
        graph.add("CUL_DriftMap", model=(made, CUL))
    stock = graph.add("CheckpointLoaderSimple", ckpt_name="minicanvas.safetensors")
    native = graph.add("CUL_FromModel", model=(stock, 0), clip=(stock, 1), vae=(stock, 2))
    graph.add("CUL_DriftMap", model=(native, CUL))
    names = {"forget": "Candy Stripes\nNeon Cyan", "keep": "Navy Stripes\nPop Dots"}
    sockets = {"model": (stock, 0), "clip": (stock, 1), "vae": (stock, 2)}
    forgot = graph.add("CUL_Forget", **sockets, **names, how="fast", strength=1.0)
    graph.add("CUL_DriftMap", model=(forgot, 0))
    prompts = "A cat image in Candy Stripes style.\nA house image in Navy Stripes style.\nA tree image."
    graph.add(
        "CUL_Compare",
        before=(loaded, CUL),
        after=(step, CUL),
        prompts=prompts,
        row_labels="before, after",
        **SAMPLING,
    )
    first = graph.add("CUL_Evaluate", model=(loaded, CUL), pictures=1, sampling_seed=0)
    graph.add("CUL_Evaluate", model=(sequence, CUL), pictures=1, sampling_seed=0, earlier=(first, 2))
    graph.add("CUL_DriftMap", model=(step, CUL))
    graph.add("CUL_DoesItHold", model=(solved, CUL), **defaults["CUL_DoesItHold"])
    graph.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix="checkpoints/forgot-candy-stripes")
    graph.add(
        "CUL_SaveLora",
        model=(step, CUL),
        filename_prefix="loras/forgot-candy-stripes",
        format="lora",
        rank=16,
    )
    graph.add("CUL_History", file=saved)
    graph.add("CUL_Store", clear="nothing")
    return graph


def needed(graph: Graph, names: Collection[str]) -> Graph:
    """The part of a graph that the last node of each of these types needs, and the Drift Maps behind them."""
    last = {values["class_type"]: node for node, values in graph.items()}
    origins = {
        node: {value[0] for value in values["inputs"].values() if isinstance(value, list)}
        for node, values in graph.items()
    }
    found, named = set(), {last[name] for name in names}
    maps = [node for node, values in graph.items() if values["class_type"] == "CUL_DriftMap"]
    open_ends = [*named, *(node for node in maps if origins[node] & named)]
    while open_ends:
        if (node := open_ends.pop()) not in found:
            found.add(node)
            open_ends += origins[node]
    return Graph({node: values for node, values in graph.items() if node in found})


def picture_of_nodes(page: Page, schemas: dict, host: Host, names: Collection[str]) -> None:
    """Run a graph of the named nodes and of what they need, and take a picture of each."""
    if "CUL_History" in names:
        earlier = Graph()
        step = earlier.step(earlier.load())
        earlier.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix="checkpoints/earlier")
        host.run(earlier)
        page.tab.reload()
        page = Page(page.tab, host)
    graph = needed(gallery(schemas, "earlier_00001_.safetensors"), names)
    page.tab.evaluate("(graph) => app.loadApiJson(graph, 'gallery')", graph)
    page.tab.wait_for_timeout(1500)
    page.tab.evaluate("""() => {
        let y = 0;
        for (const node of app.graph._nodes) {
            const tall = {
                CUL_UnlearnStep: 560, CUL_UnlearnSequence: 800, CUL_Compare: 720, CUL_Evaluate: 520,
                CUL_DriftMap: 460, CUL_DoesItHold: 620, CUL_Forget: 760, CUL_TakeBack: 330,
                CUL_LoadModel: 190, CUL_FromModel: 190, CUL_Merge: 380,
                CUL_SaveCheckpoint: 130, CUL_SaveLora: 210, CUL_History: 200, CUL_Store: 220,
            }[node.type] || node.computeSize()[1];
            node.setSize([node.type === "CUL_Evaluate" ? 620 : 380, tall]);
            node.pos = [0, y];
            y += tall + 120;
        }
    }""")
    entry = page.queue(600)
    if entry["status"]["status_str"] != "success":
        raise SystemExit(str(host.error_of(entry)))
    (DOCS / "pictures").mkdir(exist_ok=True)
    for name in names:
        page.tab.evaluate(
            """(type) => {
            const nodes = app.graph._nodes.filter((node) => node.type === type);
            const node = nodes[nodes.length - 1], view = app.canvas.ds;
            view.scale = 1;
            view.offset[0] = 200 - node.pos[0];
            view.offset[1] = 120 - node.pos[1];
            app.graph._nodes.splice(app.graph._nodes.indexOf(node), 1);
            app.graph._nodes.unshift(node);
            app.canvas.setDirty(true, true);
        }""",
            name,
        )
        page.tab.wait_for_timeout(700)
        save(
            Image.open(io.BytesIO(page.tab.screenshot(clip=page.rectangle(name)))),
            DOCS / "pictures" / f"{name}.jpg",
            460,
        )


def save(picture: Image.Image, path: Path, largest: int) -> None:
    picture = picture.convert("RGB")
    picture.thumbnail((largest, largest * 2), Image.Resampling.LANCZOS)
    picture.save(path, quality=85, optimize=True)


def picture_of_workflow(page: Page, name: str, host: Host) -> None:
    page.open(page.template(name))
    if "SD 1.5" not in name:  # nobody's checkpoint is at hand; the graph is shown as it opens
        entry = page.queue(600)
        if entry["status"]["status_str"] != "success":
            raise SystemExit(f"{name}: {host.error_of(entry)}")
    x0, y0, x1, y1, scale, dx, dy = page.fit()
    screen = Image.open(io.BytesIO(page.tab.screenshot()))
    save(screen, SCREENS / f"{name.lower().replace(' ', '-').replace(',', '')}.jpg", 1500)
    left, top = page.tab.evaluate(
        "() => { const r = app.canvas.canvas.getBoundingClientRect(); return [r.x, r.y]; }"
    )
    corners = [
        left + (x0 + dx) * scale - 8,
        top + (y0 + dy) * scale,
        left + (x1 + dx) * scale + 8,
        top + (y1 + dy) * scale + 8,
    ]
    save(screen.crop([max(round(edge), 0) for edge in corners]), WORKFLOWS / f"{name}.jpg", 700)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        host = Host(NEWEST, Path(folder))
        try:
            schemas, workflows = schemas_of(host), sorted(path.stem for path in WORKFLOWS.glob("*.json"))
            asked = sys.argv[1:] or [*schemas, *workflows]
            if nodes := [name for name in asked if name in schemas]:
                with open_page(host, 1500, 1100) as page:
                    picture_of_nodes(page, schemas, host, nodes)
            if shown := [name for name in asked if name in workflows]:
                with open_page(host, 1800, 1150) as page:
                    for name in shown:
                        picture_of_workflow(page, name, host)
        finally:
            host.stop()


if __name__ == "__main__":
    main()
