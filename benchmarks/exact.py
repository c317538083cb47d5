"""Time and memory of the closed-form solve of `exact` on random weights, beside UCE's public code.

    python benchmarks/exact.py [--family sd1 sdxl] [--concepts 1 12 100 1000] [--uce CHECKOUT] [--out FILE]

The weights that read text have the shapes of Stable Diffusion 1.5 or XL. Nothing is encoded: the second
moment of kept text and the rows of every concept are random, of the sizes and in the form that `TextRows`
gives. Every row of the table is a process of its own. `solve` forgets n concepts from nothing; `next` adds
one more with what that solve has kept. CPU seconds are the user time of all threads, so that other work on
the machine counts little in them. Memory is the growth of the process's peak beside weights and rows.

CHECKOUT is a clone of github.com/rohitgandikota/unified-concept-editing. Its function `UCE` gets the same
weights, the first row of each concept and one anchor for all, as its command does for artists, and no
concept to preserve. It writes its weights to a file, which is counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from save import peak_bytes, reset_peak
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/core")]

FAMILIES = ("sd1", "sdxl")
SIDES = {"exact": "exact", "uce": "UCE's public code"}
UCE_SCRIPT = Path("trainscripts/uce_sd_erase.py")
_COMPONENTS, _ROWS = 64, 32  # sizes of the `Pairs` of a style with a name of two tokens
_ROW_NORM = 28.0  # of CLIP's text rows
_POOLED_WIDTH = 1280


def weights_of(family: str) -> dict[str, Tensor]:
    """Checkpoint key -> random matrix of every weight that reads text."""
    from sd_layout import unet_shapes, xl_shapes

    from cul_core.models.family import FAMILIES
    from cul_core.models.weight_roles import keys_with_role

    shapes, generator = {"sd1": unet_shapes, "sdxl": xl_shapes}[family](), torch.Generator().manual_seed(0)
    keys = keys_with_role(FAMILIES[family], "text_inputs", shapes)
    return {key: torch.randn(shapes[key], generator=generator) / shapes[key][1] ** 0.5 for key in keys}


def random_rows(widths: dict[str, int]) -> Any:
    """A `TextRows` of random text: rows are B z with normal z, where the moment is B B^T.

    The moment's eigenvalues fall like a power law, and most of a concept's difference from its anchor lies in
    one direction.

    Args:
        widths: what is read (`text`, `pooled`) -> width of its rows.
    """
    from cul_core.models.sampling import generator_for
    from cul_core.parts.text_rows import ENDS, TEXT, Pairs, TextRows

    def factor(source: str) -> Tensor:
        width = widths[source]
        drawn = torch.randn(width, width, dtype=torch.float64, generator=generator_for(0, source))
        return torch.linalg.qr(drawn).Q * torch.arange(1, width + 1).double() ** -0.75

    factors = {source: factor(source) for source in widths}
    moments = {source: of @ of.T / of.square().sum() for source, of in factors.items()}

    class RandomRows(TextRows):
        def moment(self, source, *others):
            return moments[source]

        def _sum_of_squares(self, group, prompts, source):
            return moments[source]

        def _made_up(self, is_style, count):
            z = torch.randn(count, widths[TEXT], dtype=torch.float64, generator=generator_for(0, "made up"))
            return dict.fromkeys(map(str, range(count))), {TEXT: moments[TEXT], ENDS: z @ factors[TEXT].T}

        def words(self, source, prompts):
            return list(_ROW_NORM * factors[source].T[: len(prompts), None] * len(prompts[0]))

        def _paired(self, source, concept, captions, count):
            generator, own = generator_for(0, source, concept.target), factors[source]

            def draw(count: int) -> Tensor:
                z = torch.randn(count, len(own), dtype=torch.float64, generator=generator)
                return torch.nn.functional.normalize(z @ own.T, dim=1)

            falling = torch.arange(1, _COMPONENTS + 1).double()[:, None] ** -1.5
            targets = _ROW_NORM * draw(_ROWS)
            return Pairs(falling * draw(_COMPONENTS), targets, targets - _ROW_NORM * draw(1) - draw(_ROWS))

    network = SimpleNamespace(words=lambda: ["word"], tokens=str.split, content=str.split)
    return RandomRows(network)


def requests_of(count: int) -> list[Any]:
    """As many requests, each of one style, with the captions of the family and twelve styles to keep."""
    from cul_core.concepts.captions import anchor_prompts
    from cul_core.concepts.concept import Concept
    from cul_core.methods.exact import ExactConfig
    from cul_core.models.family import FAMILIES
    from cul_core.parts.step_context import SolvedRequest

    keep = tuple(Concept(f"kept {number}") for number in range(12))
    names = [Concept(f"style {number}") for number in range(count)]
    captions = anchor_prompts(FAMILIES["sd1"], names[:1])
    return [SolvedRequest((name,), keep, captions, ExactConfig()) for name in names]


def context_of(family: str, weights: dict[str, Tensor]) -> Any:
    """What `Exact.solve` reads of a `StepContext`, with random text rows."""
    from cul_core.base.last_result import LastResult
    from cul_core.models.family import FAMILIES
    from cul_core.models.weight_roles import keys_with_role
    from cul_core.parts.step_context import made_anew
    from cul_core.parts.text_rows import POOLED, TEXT

    readers = keys_with_role(FAMILIES[family], "text_readers", weights)
    widths = {TEXT: weights[readers[0]].shape[1]} | ({POOLED: _POOLED_WIDTH} if family == "sdxl" else {})
    results = LastResult()
    results.of(("text rows", "random"), lambda: random_rows(widths))
    network = SimpleNamespace(
        family=FAMILIES[family],
        tokens=lambda name: tuple(name.split()),
        encode=lambda prompts: SimpleNamespace(pooled=torch.zeros(1, _POOLED_WIDTH)),
    )
    return SimpleNamespace(
        network=network,
        pretrained=weights,
        text_readers=frozenset(readers),
        last_result=results,
        source="random",
        check=lambda: None,
        say=lambda text: None,
        text_sums=made_anew,
    )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads) of a piece of work."""
    user, begun = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_utime - user


def measure_exact(family: str, count: int) -> dict:
    """Figures of n concepts from nothing and of one more; `said` instead where they are refused."""
    from cul_core.base.errors import ConceptError
    from cul_core.methods.closed_form import Problem
    from cul_core.methods.exact import Exact, ExactConfig

    context, requests = context_of(family, weights_of(family)), requests_of(count + 1)
    rows = context.last_result.of(("text rows", "random"), lambda: None)
    for source in ("text", "pooled") if family == "sdxl" else ("text",):
        _ = Problem(rows, source, requests, {}, Exact.mixes_captions).pairs
    warm_up()
    before = reset_peak()
    try:
        solve = timed(lambda: Exact(ExactConfig()).solve(context, requests[:-1]))
        peak = peak_bytes()
        following = timed(lambda: Exact(ExactConfig()).solve(context, requests))
    except ConceptError as error:
        return {"said": str(error)}
    return {"solve": solve, "next": following, "extra_bytes": peak - before}


def measure_uce(family: str, count: int, checkout: Path) -> dict:
    """Figures of n concepts by the function `UCE` of the checkout."""
    from cul_core.parts.text_rows import TEXT

    weights = {key: value for key, value in weights_of(family).items() if "attn2" in key}
    rows = random_rows({TEXT: next(iter(weights.values())).shape[1]})
    first = {
        request.concepts[0].target: rows.pairs(TEXT, request.concepts[0], (), 24)
        for request in requests_of(count)
    }
    vectors = {name: pair.targets[0].float() for name, pair in first.items()}
    vectors["art"] = next(iter(first.values())).goals[0].float()
    spec = importlib.util.spec_from_file_location("uce_sd_erase", checkout / UCE_SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.device, script.torch_dtype = "cpu", torch.float32  # its command sets these two
    modules = []
    for key, weight in weights.items():
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight = nn.Parameter(weight, requires_grad=False)
        modules.append((key.removesuffix(".weight"), module))
    pipe = SimpleNamespace(
        unet=SimpleNamespace(named_modules=lambda: modules),
        # the last token of a prompt is the one before its end: row 1 of start, name and end
        encode_prompt=lambda prompt, **_: (vectors[prompt].expand(1, 3, -1),),
        tokenizer=lambda prompt, **_: {"attention_mask": torch.ones(1, 3, dtype=torch.long)},
    )
    pipe.tokenizer.model_max_length = 77
    warm_up()
    before, names = reset_peak(), [name for name in vectors if name != "art"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        solve = timed(
            lambda: script.UCE(pipe, names, ["art"] * len(names), [], 1.0, 1.0, 0.5, folder, "edited")
        )
    return {"solve": solve, "extra_bytes": peak_bytes() - before}


def warm_up() -> None:
    """Start the threads and kernels of the linear algebra."""
    square = torch.eye(300, dtype=torch.float64)
    torch.linalg.svd(torch.linalg.cholesky(square @ square))
    torch.linalg.qr(square)


def rows_of(arguments: argparse.Namespace) -> list[dict]:
    """One row for each family, number of concepts and side, each measured in a process of its own."""
    rows = []
    for family in arguments.family:
        for count in arguments.concepts:
            for side in SIDES:
                row = {"family": family, "concepts": count, "side": side}
                if side == "uce" and arguments.uce is None:
                    rows.append(row | {"said": "No checkout of UCE's public code is given (--uce)."})
                    continue
                rows.append(row | measured(arguments, family, count, side))
                sys.stderr.write(line_of(rows[-1]) + "\n")
    return rows


def measured(arguments: argparse.Namespace, family: str, count: int, side: str) -> dict:
    command = [sys.executable, __file__, "--measure", side, "--family", family, "--concepts", str(count)]
    command += ["--threads", str(arguments.threads)]
    if side == "uce":
        command += ["--uce", str(arguments.uce)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"said": f"It takes longer than {arguments.limit_s:g} s."}
    if done.returncode:
        return {"said": f"It ended with {done.returncode} ({done.stderr.strip().splitlines()[-1]})."}
    return json.loads(done.stdout)


def line_of(row: dict) -> str:
    label = f"{row['family']:<5} {row['concepts']:>5} {SIDES[row['side']]:<18}"
    figures = [*row.get("solve", (None, None)), *row.get("next", (None, None))]
    memory = row["extra_bytes"] / 1e6 if "extra_bytes" in row else None
    cells = [f"{'-' if value is None else f'{value:.2f}':>10}" for value in figures]
    return label + "".join(cells) + f"{'-' if memory is None else f'{memory:.0f}':>10}"


def table(rows: list[dict]) -> str:
    """The figures as aligned text, and beneath them what stands for figures that are missing."""
    titles = ("solve, s", "CPU s", "next, s", "CPU s", "MB")
    head = f"{'':<5} {'n':>5} {'':<18}" + "".join(f"{title:>10}" for title in titles)
    said = [
        f"- {row['family']}, {row['concepts']}, {SIDES[row['side']]}: {row['said']}"
        for row in rows
        if "said" in row
    ]
    return "\n".join([head, *map(line_of, rows), *said])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--concepts", nargs="+", type=int, default=[1, 12, 100, 1000])
    parser.add_argument("--uce", type=Path, metavar="CHECKOUT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=900.0, help="longest time of one row's process")
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if min(given.concepts) < 1:
        sys.stderr.write(f"error: --concepts is {min(given.concepts)}; give numbers from 1.\n")
        return 1
    if given.uce is not None and not (given.uce / UCE_SCRIPT).is_file():
        sys.stderr.write(f"error: {str(given.uce)!r} has no {UCE_SCRIPT}; give a clone of UCE's code.\n")
        return 1
    if given.measure:
        torch.set_num_threads(given.threads)
        family, count = given.family[0], given.concepts[0]
        figures = (
            measure_exact(family, count)
            if given.measure == "exact"
            else measure_uce(family, count, given.uce)
        )
        sys.stdout.write(json.dumps(figures))
        return 0
    rows = rows_of(given)
    if given.out is not None:
        given.out.write_text(json.dumps({"threads": given.threads, "rows": rows}, indent=1) + "\n")
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
