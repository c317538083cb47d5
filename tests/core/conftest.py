"""Fixtures: MiniCanvas' architecture and a small SDXL with random weights (for mechanics), and the shipped one (for what it does)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dataclasses import fields

import pytest
import torch
from sd_layout import tiny_xl_shapes, write_random

from cul_core.anchors import AnchorStore
from cul_core.checkpoint import open_model
from cul_core.concepts import Concept
from cul_core.config import TrainingConfig
from cul_core.families import FAMILIES, MINI, SDXL, Family
from cul_core.loading import BundleCache
from cul_core.methods.conabl import ConAblConfig
from cul_core.minicanvas import models
from cul_core.minicanvas.pack import checkpoint_tensors, write_weights
from cul_core.training import Request

ANCHOR_PROMPTS = ("A star image.", "a house", "an image of a cat", "a picture of a boat")


def write_random_checkpoint(path, dtype=torch.float16, seed=0):
    """A checkpoint of MiniCanvas' shape with random weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**MINI.config("unet"))
    text = CLIPTextModel(CLIPTextConfig(**MINI.config("text_encoder")))
    write_weights(path, checkpoint_tensors(unet, text.state_dict(), models.NarrowAutoencoder().widened(), dtype), {})
    return path


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "random.safetensors")


@pytest.fixture(scope="session")
def bundles():
    """Two caches, so that tests of the random and of the shipped model do not reload each other's."""
    return {"random": BundleCache(), "shipped": BundleCache()}


@pytest.fixture(scope="session")
def anchors():
    return AnchorStore()


@pytest.fixture(scope="session")
def random_model(random_checkpoint):
    return open_model(random_checkpoint)


@pytest.fixture(scope="session")
def random_bundle(random_model, bundles):
    return bundles["random"].get(random_model.source)


@pytest.fixture(scope="session")
def shipped_model():
    return open_model(models.CHECKPOINT_PATH)


@pytest.fixture(scope="session")
def shipped_bundle(shipped_model, bundles):
    return bundles["shipped"].get(shipped_model.source)


class TinyXL(Family):
    """Stable Diffusion XL's architecture with small numbers and MiniCanvas' tokenizer."""

    tokenizer_folder = MINI.tokenizer_folder

    def config(self, part):
        if part == "unet":
            return SDXL.config(part) | {
                "sample_size": 8, "layers_per_block": 1, "block_out_channels": [32, 64], "transformer_layers_per_block": [1, 2],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "cross_attention_dim": 48, "attention_head_dim": [2, 4], "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 32 + 6 * 8,
            }  # fmt: skip
        width = {"text_encoder": 16, "text_encoder_2": 32}[part]
        words = {name: MINI.config("text_encoder")[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
        return SDXL.config(part) | words | {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2,
                                            "num_attention_heads": 2, "projection_dim": width}  # fmt: skip


TINY_XL = TinyXL(**{field.name: getattr(SDXL, field.name) for field in fields(Family)}
                 | {"signature": (32, 48), "latent_shape": (4, 8, 8), "recipe": None})  # fmt: skip


@pytest.fixture(scope="session")
def xl_checkpoint(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("xl") / "xl.safetensors", tiny_xl_shapes())


@pytest.fixture(scope="session")
def xl_bundles():
    return BundleCache()


@pytest.fixture
def xl_model(xl_checkpoint, monkeypatch):
    monkeypatch.setitem(FAMILIES, "tiny", TINY_XL)
    return open_model(xl_checkpoint)


@pytest.fixture
def xl_bundle(xl_model, xl_bundles):
    return xl_bundles.get(xl_model.source)


@pytest.fixture
def make_request():
    """A small request; keyword arguments replace its parts, training settings by their own names."""

    def make(target="Candy_Stripes", *, method=None, regularizers=(), retain=("Navy_Stripes", "Lava"), **settings):
        training = TrainingConfig(**({"iterations": 3, "batch_size": 2} | settings))
        return Request(
            concepts=(Concept(target),),
            method=method or ConAblConfig(),
            regularizers=tuple(regularizers),
            training=training,
            retain=tuple(map(Concept, retain)),
            anchor_prompts=ANCHOR_PROMPTS,
            anchor_count=8,
        )

    return make
