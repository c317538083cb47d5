"""Fixtures: MiniCanvas' architecture and small larger ones with random weights (for mechanics), and the
shipped one (for what it does)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hosts import HOW, find_hosts
from mini_checkpoint import write_random_checkpoint
from sd_layout import shrunken, tiny_shapes, write_random

from cul_core.concepts.concept import Concept
from cul_core.methods.conabl import ConAblConfig
from cul_core.minicanvas import models
from cul_core.minicanvas.family import MINI
from cul_core.models.family import FAMILIES
from cul_core.models.load_diffusers import NetworkCache, load_tokenizer
from cul_core.output.checkpoint import open_model
from cul_core.parts.training_config import TrainingConfig
from cul_core.requests.request import Request
from cul_core.store.anchors import AnchorStore

ANCHOR_PROMPTS = ("A star image.", "a house", "an image of a cat", "a picture of a boat")


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "random.safetensors")


@pytest.fixture(scope="session")
def networks():
    """Two caches, so that tests of the random and of the shipped model do not reload each other's."""
    return {"random": NetworkCache(), "shipped": NetworkCache()}


@pytest.fixture(autouse=True)
def networks_are_left_as_found(networks):
    """A test that leaves a gradient or a hook on a network that all share fails itself, not another one."""
    yield
    for unet in [cache._slot[1].unet for cache in networks.values() if cache._slot]:
        for weight in unet.parameters():
            assert not weight.requires_grad and weight.grad is None
            assert not weight._post_accumulate_grad_hooks and not weight._backward_hooks
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.fixture(scope="session")
def anchors():
    return AnchorStore()


@pytest.fixture(scope="session")
def random_model(random_checkpoint):
    return open_model(random_checkpoint)


@pytest.fixture(scope="session")
def random_network(random_model, networks):
    return networks["random"].get(random_model.source)


@pytest.fixture(scope="session")
def shipped_model():
    return open_model(models.CHECKPOINT_PATH)


@pytest.fixture(scope="session")
def shipped_network(shipped_model, networks):
    return networks["shipped"].get(shipped_model.source)


@pytest.fixture(scope="session")
def clip_tokenizer():
    """The folder of CLIP's tokenizer in a ComfyUI checkout."""
    for place in find_hosts():
        if (place / "comfy/sd1_tokenizer/vocab.json").is_file():
            return place / "comfy/sd1_tokenizer"
    pytest.skip(HOW)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory):
    """Small checkpoints of the larger families, by name, in their own layout."""
    folder = tmp_path_factory.mktemp("tiny")
    return {name: write_random(folder / f"{name}.safetensors", tiny_shapes(name)) for name in ("sd2", "sdxl")}


@pytest.fixture(scope="session")
def tiny_networks():
    return {name: NetworkCache() for name in ("sd2", "sdxl")}


@pytest.fixture
def known_tiny(monkeypatch):
    """Small models of the larger families are recognized, and speak MiniCanvas' words."""
    words = {
        name: MINI.config("text_encoder")[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")
    }
    monkeypatch.setattr("cul_core.models.load_diffusers.load_tokenizer", lambda *_: load_tokenizer(MINI))
    for name in ("sd2", "sdxl"):
        monkeypatch.setitem(FAMILIES, name, shrunken(FAMILIES[name], words))


@pytest.fixture(params=["sd2", "sdxl"])
def tiny_model(request, tiny_checkpoints, known_tiny):
    return open_model(tiny_checkpoints[request.param])


@pytest.fixture
def tiny_network(tiny_model, tiny_networks):
    return tiny_networks[tiny_model.family.name].get(tiny_model.source)


@pytest.fixture
def make_request():
    """A small request; keyword arguments replace its parts, training settings by their own names."""

    def make(
        target="Candy_Stripes", *, method=None, regularizers=(), retain=("Navy_Stripes", "Lava"), **settings
    ):
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
