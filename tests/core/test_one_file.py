"""A method, a regularizer, a merger, an audit and a model family are one file each, and one line that imports
it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sd_layout import unet_shapes, write_hollow

from cul_core.models.family import FAMILIES

ROOT = Path(__file__).parents[2]

NEW = {
    "methods/silence.py": '''
"""Silence: the text readers no longer answer to the direction of the target."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..base.config import Config, setting
from ..parts.prompt_vectors import target_vector
from ..parts.step_context import StepContext
from .base import METHODS, Method


@dataclass(frozen=True)
class SilenceConfig(Config):
    strength: float = setting(0.5, "Share of the answer that is taken away.", minimum=0.0, maximum=1.0)


@METHODS.register(
    "silence", config=SilenceConfig, display_name="Silence", description="Answers less.", paper="None"
)
class Silence(Method):
    """W - strength W t t^T / |t|^2, t the mean row of the target's name, for one target after another."""

    needs = ("text_readers",)
    is_closed_form = True

    def edit(self, context: StepContext) -> dict[str, Tensor]:
        weights = dict(context.start)
        for concept in context.concepts:
            row = target_vector(context.network, concept).float().to(context.network.device)
            for key in context.text_readers & weights.keys():
                answer = weights[key] @ row / row.square().sum()
                weights[key] = weights[key] - self.config.strength * answer[:, None] * row
        return weights
''',
    "regularizers/elastic.py": '''
"""Elastic: the weights are pulled back to where the step began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base.config import Config, setting
from ..parts.step_context import StepContext
from .base import REGULARIZERS, Regularizer


@dataclass(frozen=True)
class ElasticConfig(Config):
    strength: float = setting(1e3, "Weight of the penalty.", minimum=0.0)


@REGULARIZERS.register(
    "elastic", config=ElasticConfig, display_name="Elastic", description="Pulls back.", paper="None"
)
class Elastic(Regularizer):
    """strength sum (w - w_start)^2 / 2."""

    def prepare(self, context: StepContext) -> None:
        self._start, self._called = context.start, 0

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        self._called += 1
        moved = [(weight - self._start[key]).square().sum() for key, weight in weights.items()]
        return self.config.strength * sum(moved) / 2

    def report(self) -> dict[str, float]:
        return {"elastic_penalties": float(self._called)}
''',
    "mergers/largest.py": '''
"""Largest: of every value the change of the model that changed it most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.config import Config
from .base import MERGERS, Deltas, Merger, names_in


@dataclass(frozen=True)
class LargestConfig(Config):
    """The largest has no settings."""


@MERGERS.register(
    "largest", config=LargestConfig, display_name="Largest", description="The largest change.", paper="None"
)
class Largest(Merger):
    def merge(self, deltas: Deltas) -> Iterator[tuple[str, Tensor]]:
        for name in names_in(deltas):
            stacked = torch.stack([delta[name].float() for delta in deltas if name in delta])
            yield name, stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
''',
    "audits/distance.py": '''
"""The audit by distance: how far the weights are from the pretrained ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..base.config import setting
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from .base import AUDITS, Audit, AuditConfig, AuditReport, Figure


@dataclass(frozen=True)
class DistanceConfig(AuditConfig):
    order: int = setting(2, "Which norm.", minimum=1, maximum=2)


@AUDITS.register(
    "distance", config=DistanceConfig, display_name="Distance", description="Norm of the edits.", paper="None"
)
class Distance(Audit):
    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> AuditReport:
        order, total = self.config.order, 0.0
        for done, delta in enumerate(model.edits.values(), 1):
            total += delta.abs().pow(order).sum().item()
            on_progress(done, len(model.edits))
        distance = total ** (1 / order)
        return AuditReport({"distance": Figure(distance)}, f"The weights moved by {distance:.3g}.", "")
''',
    "models/families/wide.py": '''
"""A family of another width."""

from ..family import Family, TextEncoder, register
from .unet_layout import ROLES, TEXT_PREFIX, UNET_PREFIX, recognize

WIDE = register(
    Family(
        "wide",
        "Wide Diffusion",
        signature=(96, 512),
        latent_shape=(4, 32, 32),
        latent_scale=0.2,
        image_size_px=256,
        sampling_batch=2,
        prefix=UNET_PREFIX,
        roles=ROLES,
        recognize=recognize,
        text_encoders=(TextEncoder(TEXT_PREFIX),),
    )
)
''',
}

USE = """
import contextlib, io, json, sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
import cul_core
from cul_core import minicanvas
from cul_core.audits import AUDITS
from cul_core.cli import main
from cul_core.concepts.concept import Concept
from cul_core.mergers import MERGERS
from cul_core.mergers.merge import merge
from cul_core.methods import METHODS
from cul_core.methods.esd import ESDConfig
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.load_diffusers import NetworkCache
from cul_core.models.recognize import detect_family
from cul_core.models.weight_roles import keys_with_role
from cul_core.files.safetensors_format import read_header
from cul_core.output.checkpoint import open_model, save_checkpoint
from cul_core.parts.prompt_vectors import target_vector
from cul_core.regularizers import REGULARIZERS
from cul_core.requests.request import Request
from cul_core.requests.resolve import Overrides, resolve
from cul_core.training.step import run_step

found = {"package": str(Path(cul_core.__file__).parent)}
for registry in (METHODS, REGULARIZERS, MERGERS, AUDITS):
    found[f"{registry.kind}s"] = [entry.name for entry in registry]

model, networks, target = open_model(CHECKPOINT_PATH), NetworkCache(), Concept("Lava")
settings = {"iterations": 2, "batch_size": 1}

silence = METHODS.get("silence").config()
overrides = Overrides(method=silence, regularizers=(), training=settings, seed=1)
request = resolve("plain", model.family, [target], overrides=overrides)
assert Request.from_json(request.to_json()) == request
silenced, report = run_step(model, request, networks=networks)
row = target_vector(networks.get(model.source), target).float()
weights = dict(model.source.read(sorted(silenced.edits)))
found["silenced"] = [
    ((weight.float() + silenced.edits[key]) @ row).norm().item() / (weight.float() @ row).norm().item()
    for key, weight in weights.items()
]

esd, elastic = ESDConfig(trajectories=1, trajectory_steps=2), REGULARIZERS.get("elastic").config
moved, figures = {}, {}
for name, used in (("free", ()), ("held", (elastic(strength=1e6),))):
    overrides = Overrides(method=esd, regularizers=used, training=settings | {"max_grad_norm": 0.0})
    request = resolve("esd", model.family, [target], overrides=overrides)
    moved[name], report = run_step(model, request, networks=networks)
    figures = dict(report.figures)
found["moved"] = {name: edited.content_hash for name, edited in moved.items()}
found["figures"] = figures

merged = merge([silenced, moved["free"]], MERGERS.get("largest").config())
found["merged"] = all(
    torch.equal(
        merged.edits[key].abs(),
        torch.stack(
            [each.edits[key].abs() for each in (silenced, moved["free"]) if key in each.edits]
        ).amax(0),
    )
    for key in merged.edits
)

path, out = save_checkpoint(silenced, folder / "silenced.safetensors"), io.StringIO()
for command in (["audit", "--help"], ["audit", "distance", "--help"], ["merge", "--help"]):
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(command)
found["help"] = out.getvalue()
with contextlib.redirect_stdout(io.StringIO()) as said:
    places = ["--pretrained", str(CHECKPOINT_PATH), "--json", str(folder / "a.json")]
    found["code"] = main(["audit", "distance", str(path), *places])
found["said"], found["audit"] = said.getvalue(), json.loads((folder / "a.json").read_text())
found["distance"] = sum(delta.square().sum().item() for delta in silenced.edits.values()) ** 0.5

hollow = folder / "wide.safetensors"
family = detect_family(hollow)
found["family"] = family.name
found["readers"] = len(keys_with_role(family, "text_readers", read_header(hollow)[0]))
found["request"] = resolve("recommended", family, [target]).to_json()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a copy of the package with five more files says of them."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "cul_core", folder / "cul_core", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in NEW.items():
        path = folder / "cul_core" / name
        path.write_text(text.lstrip(), encoding="utf-8")
        with (path.parent / "__init__.py").open("a", encoding="utf-8") as room:
            room.write(f"from . import {path.stem} as {path.stem}\n")
    write_hollow(folder / "wide.safetensors", unet_shapes(512, width=96))
    done = subprocess.run(
        [sys.executable, "-c", USE, str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["package"] == str(folder / "cul_core")
    return found


def test_each_is_in_its_registry(found):
    assert "silence" in found["methods"] and "elastic" in found["regularizers"]
    assert "largest" in found["way of mergings"] and "distance" in found["audits"]


def test_a_method_runs_a_step(found):
    """The text readers answer to the target by half."""
    assert len(found["silenced"]) == 14
    assert found["silenced"] == pytest.approx([0.5] * 14, abs=1e-3)


def test_a_regularizer_acts_in_a_step(found):
    assert found["figures"]["elastic_penalties"] == 2
    assert found["moved"]["free"] != found["moved"]["held"]


def test_a_merger_merges_models(found):
    assert found["merged"] is True


def test_the_command_line_lists_and_runs_an_audit(found):
    assert "distance" in found["help"] and "Norm of the edits." in found["help"]
    assert "--order" in found["help"]
    assert found["code"] == 0 and "The weights moved by" in found["said"]
    assert found["audit"]["figures"]["distance"]["value"] == pytest.approx(found["distance"], rel=0.01)


def test_the_command_line_lists_a_merger(found):
    assert "ties, uniform, largest" in " ".join(found["help"].split())


def test_a_family_is_recognized_and_has_requests(found):
    assert found["family"] == "wide" and found["readers"] == 32
    assert found["request"]["concepts"][0]["target"] == "Lava"


# --- the source

TREES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for room in ("cul_core", "nodes")
    for path in sorted((ROOT / room).rglob("*.py"))
}


def iterated(tree):
    """Names of what a module iterates: in loops, comprehensions and `map`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension):
            found.add(ast.unparse(node.iter))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "map":
            found |= set(map(ast.unparse, node.args[1:]))
    return found


@pytest.mark.parametrize(
    ("module", "registries"),
    (
        ("nodes/registered.py", {"METHODS", "REGULARIZERS"}),
        ("cul_core/audits/ladder.py", {"AUDITS"}),
        ("nodes/merge.py", {"MERGERS"}),
        ("cul_core/cli/audit.py", {"AUDITS"}),
        ("cul_core/cli/merge.py", {"MERGERS"}),
    ),
)
def test_nodes_and_commands_come_from_the_registries(module, registries):
    """The nodes need a host to be imported, so this reads their source."""
    assert registries <= iterated(TREES[Path(module)])


def is_family(node):
    """Whether an expression is a family or its name: `model.family`, `family.name`, `SD1`, "sd1"."""
    if isinstance(node, ast.Constant):
        return node.value in FAMILIES
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(is_family, node.elts))
    text = ast.unparse(node)
    last = text.removesuffix(".name").removesuffix(".display_name").rpartition(".")[2]
    return last.lower() in ("family", "family_name") or last in map(str.upper, FAMILIES)


def questions_of_identity(tree):
    """(line, expression) of what asks which family something is."""
    for node in ast.walk(tree):
        sides = []
        if isinstance(node, ast.Compare):
            others = [side for side in (node.left, *node.comparators) if ast.unparse(side) != "None"]
            sides = others if len(others) > len(node.comparators) else []
        elif isinstance(node, ast.Match):
            sides = [node.subject]
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in ("isinstance", "issubclass"):
                sides = node.args
            elif function.endswith((".startswith", ".endswith")):
                sides = [node.func.value]
        if any(map(is_family, sides)):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize(
    "question",
    (
        "family == SD1",
        "SDXL is family",
        "model.family != other",
        "family.name == 'x'",
        "'sd1' == name",
        "network.family.name in ('sd1', 'sd2')",
        "name in {'sdxl'}",
        "isinstance(family, Wide)",
        "isinstance(self, Family)",
        "family.name.startswith('sd')",
        "context.network.family.display_name == 'MiniCanvas'",
    ),
)
def test_a_question_of_identity_is_seen(question):
    assert list(questions_of_identity(ast.parse(question)))


@pytest.mark.parametrize(
    "fine",
    (
        "family is None",
        "family.recipe is None",
        "family.is_small",
        "prompt == 'mini golf'",
        "family(path) == 1",
    ),
)
def test_a_question_of_what_a_family_has_is_none_of_identity(fine):
    assert not list(questions_of_identity(ast.parse(fine)))


def test_nothing_asks_which_family_a_model_is_of():
    """But the families themselves, and MiniCanvas' own room."""
    asked = [
        f"{path}:{line} {text}"
        for path, tree in TREES.items()
        if not path.is_relative_to("cul_core/models/families")
        and not path.is_relative_to("cul_core/minicanvas")
        for line, text in questions_of_identity(tree)
    ]
    assert asked == []
