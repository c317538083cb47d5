"""The net under a change of structure: what every preset does in a few iterations, and the key of every step.

    python tests/core/golden.py

writes `golden.json` anew, which only a commit that means to change results may do.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from cul_core.concepts.captions import anchor_prompts
from cul_core.concepts.concept import Concept
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.mergers import MERGERS
from cul_core.mergers.merge import merge
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.family import FAMILIES
from cul_core.models.load_diffusers import NetworkCache
from cul_core.models.sampling import SamplerConfig
from cul_core.models.source import FileSource
from cul_core.output.checkpoint import open_model
from cul_core.requests.presets import PRESETS
from cul_core.store.anchors import AnchorStore
from cul_core.store.steps import step_key
from cul_core.training.step import run_step

PATH = Path(__file__).with_name("golden.json")
TARGETS = ("Candy_Stripes", "Neon_Cyan")
RETAIN = tuple(map(Concept, ("Navy_Stripes", "Lava")))
ITERATIONS = 3
SHORT = {
    "selft": {"states": 4},
    "distillation": {"trajectories": 2, "trajectory_steps": 3, "refresh_every": 2},
    "projection": {"decoys": 24},
    "esd": {"trajectories": 2, "trajectory_steps": 3},
    "sculpmem": {"warm_up": 1, "interval": 1},
    "exact": {"made_up": 60},
    "null_space": {"made_up": 60},
}
"""Settings by registered name that make a part quick, where it uses them at all; everything else is the
preset's."""


def environment() -> dict[str, str]:
    """What the last bits of a result depend on beside the code."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"cpu": cpu, "capability": torch.backends.cpu.get_cpu_capability(), **packages}


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def _short(config):
    values = {
        name: value for name, value in SHORT.get(config.registry_name, {}).items() if getattr(config, name)
    }
    return replace(config, **values)


def short_request(name: str, family, number: int):
    """The `number`-th request of a chain by a preset, in a few iterations."""
    chosen = PRESETS[name].for_family(family)
    chosen = replace(
        chosen,
        method=_short(chosen.method),
        regularizers=tuple(map(_short, chosen.regularizers)),
        training=replace(chosen.training, iterations=ITERATIONS, batch_size=4),
        anchor_count=4,
        anchor_sampler=SamplerConfig(steps=2),
    )
    return request_of(chosen, family, number)


def request_of(chosen, family, number: int = 0):
    concepts = (Concept(TARGETS[number]),)
    return chosen.request(
        concepts, retain=RETAIN, anchor_prompts=anchor_prompts(family, concepts), seed=7 + number
    )


def weights_hash(model: UnlearnModel) -> str:
    """Hash of the edits by checkpoint key."""
    digest = hashlib.sha256()
    for key, delta in sorted(model.edits.items()):
        digest.update(key.encode())
        digest.update(delta.contiguous().numpy().tobytes())
    return digest.hexdigest()


def step_keys() -> dict[str, str]:
    """Family and preset -> key of that step on an untouched model."""
    keys = {}
    for family in (family for family in FAMILIES.values() if family.text_encoders):  # not the guessed recipes
        model = UnlearnModel(FileSource(Path("model.safetensors"), 0, "0" * 64), family)
        for name, entry in PRESETS.items():
            keys[f"{family.name} {name}"] = step_key(model, request_of(entry.for_family(family), family))
    return keys


class Golden:
    """Runs what is recorded, on one thread; models and anchors are shared."""

    def __init__(self):
        self.model, self.networks, self.anchors = open_model(CHECKPOINT_PATH), NetworkCache(), AnchorStore()

    def chain(self, name: str) -> dict:
        """Two requests by a preset: hashes of the weights, losses, norms of the edits."""
        model, hashes, losses = self.model, [], []
        for number in range(len(TARGETS)):
            model, report = run_step(
                model, short_request(name, model.family, number), store=self.anchors, networks=self.networks
            )
            hashes.append(weights_hash(model))
            losses.append(list(report.losses))
        return {
            "hashes": hashes,
            "losses": losses,
            "norm": sum(delta.square().sum().item() for delta in model.edits.values()) ** 0.5,
        }

    @cached_property
    def _independent(self) -> list[UnlearnModel]:
        requests = [short_request("trained", self.model.family, number) for number in range(len(TARGETS))]
        options = {"store": self.anchors, "networks": self.networks}
        return [run_step(self.model, request, **options)[0] for request in requests]

    def merged(self, name: str) -> dict:
        """Two independent requests, merged by one of the mergers with its defaults."""
        model = merge(self._independent, MERGERS.get(name).config())
        return {
            "hashes": [weights_hash(model)],
            "losses": [],
            "norm": sum(delta.square().sum().item() for delta in model.edits.values()) ** 0.5,
        }


def main() -> None:
    torch.set_num_threads(1)
    golden = Golden()
    values = {
        "environment": environment(),
        "step_keys": step_keys(),
        "presets": {name: golden.chain(name) for name in PRESETS},
        "mergers": {entry.name: golden.merged(entry.name) for entry in MERGERS},
    }
    PATH.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
