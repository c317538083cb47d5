"""Graphs in the host's API format, built by calls, and the way from a workflow file (as the page saves it) to
that format."""

from __future__ import annotations

import itertools

_numbers = itertools.count()
SAMPLING = {
    "sampling_seed": 1,
    "steps": 8,
    "cfg": 4.0,
    "sampler_name": "dpmpp_2m",
    "scheduler": "karras",
    "negative": "",
}
FORGOTTEN, KEPT = "A cat image in Candy Stripes style.", "A cat image in Navy Stripes style."
CUL, MODEL, CLIP, VAE, REPORT, PLOT = range(6)


class Graph(dict):
    """`add` returns the id of a new node; `(id, slot)` as an input value is a link."""

    def add(self, kind: str, /, **inputs) -> str:
        node = str(len(self) + 1)
        linked = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
        self[node] = {"class_type": kind, "inputs": linked}
        return node

    def load(self, checkpoint: str = "minicanvas.safetensors") -> str:
        return self.add("CUL_LoadModel", checkpoint=checkpoint)

    def concept(self, target: str = "Candy Stripes", **inputs) -> str:
        return self.add(
            "CUL_Concept",
            **({"target": target, "kind": "style", "anchor": "", "keep": "Navy Stripes, Pop Dots"} | inputs),
        )

    def training(self, **inputs) -> str:
        settings = {
            "iterations": 3,
            "batch_size": 4,
            "learning_rate": 6e-4,
            "schedule": "linear",
            "group": "kv",
            "anchor_count": 8,
            "anchor_steps": 4,
        }
        return self.add("CUL_TrainingSettings", **(settings | inputs))

    def step(
        self, model: str, target: str = "Candy Stripes", *, training: str | None = None, **inputs
    ) -> str:
        """An Unlearn Step behind `model`, of three iterations from eight anchors unless `training` says
        otherwise; the preset plain, as preparing a projection takes far longer than that."""
        concept = self.concept(target)
        training = training or self.training()
        values = {
            "model": (model, CUL),
            "concepts": (concept, 0),
            "training": (training, 0),
            "preset": "plain",
            "train_seed": 1,
            "preview_every": 0,
        }
        return self.add("CUL_UnlearnStep", **(values | inputs))

    def merge(self, *models: str, **inputs) -> str:
        """Merge Unlearned Models behind two to six nodes that make one."""
        linked = {f"model_{number}": (model, CUL) for number, model in enumerate(models, 1)}
        return self.add(
            "CUL_Merge",
            **linked,
            **({"how": "ties", "strength": 1.25, "keep_fraction": 0.8, "trim": "tensor"} | inputs),
        )

    def sample(self, model: tuple, clip: tuple, vae: tuple, prompt: str = FORGOTTEN, seed: int = 5) -> str:
        """Stock nodes from MODEL to a saved picture; the id of the save node, which no host takes from its
        cache."""
        wanted, refused = (
            self.add("CLIPTextEncode", clip=clip, text=prompt),
            self.add("CLIPTextEncode", clip=clip, text=""),
        )
        empty = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        latent = self.add(
            "KSampler",
            model=model,
            positive=(wanted, 0),
            negative=(refused, 0),
            latent_image=(empty, 0),
            seed=seed,
            steps=8,
            cfg=4.0,
            sampler_name="dpmpp_2m",
            scheduler="karras",
            denoise=1.0,
        )
        picture = self.add("VAEDecode", samples=(latent, 0), vae=vae)
        return self.add("SaveImage", images=(picture, 0), filename_prefix=f"sampled-{next(_numbers)}")

    def sample_from(self, node: str, prompt: str = FORGOTTEN) -> str:
        """`sample` with the MODEL, CLIP and VAE outputs of one of our nodes."""
        return self.sample((node, MODEL), (node, CLIP), (node, VAE), prompt)


def api_of(workflow: dict, schemas: dict) -> dict:
    """The API graph of a workflow file: links by name, widget values by position, as the page does it. Muted
    nodes are left out."""
    links = {link[0]: link for link in workflow["links"]}
    nodes = {
        node["id"]: node for node in workflow["nodes"] if node["type"] in schemas and node.get("mode", 0) == 0
    }
    graph = {}
    for number, node in nodes.items():
        schema, linked = (
            schemas[node["type"]],
            {entry["name"]: entry.get("link") for entry in node.get("inputs", [])},
        )
        values, inputs = list(node.get("widgets_values", [])), {}
        declared = {
            name: spec
            for part in ("required", "optional")
            for name, spec in schema["input"].get(part, {}).items()
        }
        for name, spec in declared.items():
            kind, details = spec[0], (spec[1] if len(spec) > 1 else {})
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                if not values and name in schema["input"].get("optional", {}):
                    continue  # it came after the file was saved, and keeps its default
                inputs[name] = values.pop(0)
                if kind == "INT" and (
                    details.get("control_after_generate") or name in ("seed", "noise_seed")
                ):
                    values.pop(0)
            if linked.get(name) is not None:
                _, origin, slot, *_ = links[linked[name]]
                inputs[name] = [str(origin), slot]
        assert not values, f"{node['type']} {number} has widget values left over: {values}"
        graph[str(number)] = {"class_type": node["type"], "inputs": inputs}
    return graph
