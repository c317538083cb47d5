"""A network of another kind than diffusers': a flow model whose prediction is linear in its text rows."""

from __future__ import annotations

import re
from contextlib import contextmanager

import torch
from torch import nn

from cul_core.models.family import Family
from cul_core.models.flow_process import FlowProcess
from cul_core.models.network import Network
from cul_core.models.sampling import generator_for
from cul_core.models.text_conditioning import Conditioning
from cul_core.models.weight_roles import keys_with_role

WORDS = ("cat", "house", "lava", "denim", "moon", "cup", "style", "image")
ROWS, WIDTH = 12, 16

TOY = Family(
    "toy",
    "Toy",
    signature=(2, WIDTH),
    latent_shape=(2, 3, 3),
    latent_scale=1.0,
    image_size_px=3,
    sampling_batch=2,
    prefix="toy.",
    roles=dict.fromkeys(("text_readers", "text_inputs"), r"\.(key|value)\.weight$") | {"all": ""},
    recognize=lambda family, shapes, file_name: "toy.mix.weight" in shapes,
    process=FlowProcess(shift=3.0),
    is_small=True,
)


class Toy(Network):
    """f(z, t, E) = mix(z) + (1 + t) mean over rows of key(E) + value(E); it knows no token that all prompts
    share."""

    family, device, dtype = TOY, torch.device("cpu"), torch.float32

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            readers = {name: nn.Linear(WIDTH, 2, bias=False) for name in ("key", "value")}
            self.layers = nn.ModuleDict(readers | {"mix": nn.Conv2d(2, 2, 1)}).requires_grad_(False)

    def weights(self, role):
        named = {f"toy.{name}": weight for name, weight in self.layers.named_parameters()}
        return {key: named[key] for key in keys_with_role(self.family, role, named)}

    def exact(self, keys):
        return {key: self.weights("all")[key].data for key in keys}

    @contextmanager
    def with_weights(self, weights):
        own = self.weights("all")
        kept = {key: own[key].data for key in weights}
        try:
            for key, weight in weights.items():
                own[key].data = weight
            yield
        finally:
            for key, weight in kept.items():
                own[key].data = weight

    def encode(self, prompts, grad=False):
        return self.encode_rows(prompts, self.token_rows(prompts))

    def token_rows(self, prompts):
        def row(word):
            return torch.randn(WIDTH, generator=generator_for(0, word))

        texts = [[*self._words(prompt), *["<end>"] * ROWS][:ROWS] for prompt in prompts]
        return (torch.stack([torch.stack([row(word) for word in text]) for text in texts]),)

    def encode_rows(self, prompts, rows):
        return Conditioning(rows[0].cumsum(1) / 3)  # a row knows those before it

    def _words(self, prompt):
        return re.findall(r"\w+", prompt.lower())[: ROWS - 1]

    def content(self, prompt):
        return slice(0, len(self._words(prompt)))

    def tokens(self, prompt):
        return tuple(map(hash, self._words(prompt)))

    def words(self, least_letters=3):
        return [word for word in WORDS if len(word) >= least_letters]

    def predict(self, latents, times, conditioning):
        read = self.layers["key"](conditioning.text) + self.layers["value"](conditioning.text)
        times = times.expand(len(latents)).view(-1, 1, 1, 1)
        return self.layers["mix"](latents) + (1 + times) * read.mean(1)[:, :, None, None]

    def text_readers(self):
        return [self.layers["key"], self.layers["value"]]
