"""Unlearn From MODEL in the real host: what comes in is what goes out, what is kept is what came in, and what
is refused."""

import shutil

import numpy as np
import pytest
import torch
from graphs import CLIP, CUL, MODEL, VAE, Graph
from safetensors.torch import save_file
from test_unlearning import pixels, sampled_by_stock_nodes, steps_trained

from cul_core.history.step_record import read_history
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.load_diffusers import load_network

MODULES = {
    "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v": (128, 128),
    "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v": (128, 192),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (768, 192),
}


@pytest.fixture(scope="module")
def lora(host):
    """Name of a random LoRA for MiniCanvas' denoiser and text encoder."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module, (outputs, inputs) in MODULES.items():
        tensors[f"{module}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator) * 0.2
        tensors[f"{module}.lora_down.weight"] = torch.randn(4, inputs, generator=generator) * 0.2
    save_file(tensors, host.folder / "models/loras/random.safetensors")
    return "random.safetensors"


def behind_lora(lora, **more):
    """(graph, id of the LoRA loader, id of Unlearn From MODEL) behind the stock loader."""
    graph = Graph()
    stock = graph.add("CheckpointLoaderSimple", ckpt_name="minicanvas.safetensors")
    patched = graph.add(
        "LoraLoader", model=(stock, 0), clip=(stock, 1), lora_name=lora, strength_model=1.0, strength_clip=0.7
    )
    return (
        graph,
        patched,
        graph.add("CUL_FromModel", model=(patched, 0), clip=(patched, 1), vae=(stock, 2), **more),
    )


@pytest.fixture(scope="module")
def others(host):
    """Kept weights of other tests."""
    return set(kept(host))


def kept(host):
    return sorted((host.folder / "models/unlearning_chains/sources").glob("*.safetensors"))


def test_what_comes_in_is_drawn_kept_trained_and_saved_with_its_loras(host, lora, others):
    graph, patched, begun = behind_lora(lora)
    step = graph.step(begun, training=graph.training(iterations=10))
    native = graph.sample((patched, 0), (patched, 1), (begun, VAE))
    before, after = graph.sample_from(begun), graph.sample_from(step)
    graph.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix="checkpoints/from-model")
    entry = host.run(graph)
    assert np.array_equal(pixels(host, entry, before), pixels(host, entry, native))
    # the LoRA shows
    assert (
        np.abs(pixels(host, entry, before) - sampled_by_stock_nodes(host, "minicanvas.safetensors")).max()
        > 60
    )

    (source,) = set(kept(host)) - others
    shutil.copy(source, host.folder / "models/checkpoints/kept.safetensors")
    # in the host's precision
    assert np.abs(sampled_by_stock_nodes(host, "kept.safetensors") - pixels(host, entry, before)).max() <= 2
    ours, pretrained = load_network(source), load_network(CHECKPOINT_PATH)
    for mine, theirs, count in (
        (ours.unet, pretrained.unet, 2),
        (ours.text_encoders[0], pretrained.text_encoders[0], 1),
    ):
        theirs = theirs.state_dict()
        assert (
            sum(not torch.equal(tensor, theirs[name]) for name, tensor in mine.state_dict().items()) == count
        )

    (saved,) = host.saved("checkpoints/from-model_*")
    assert np.abs(sampled_by_stock_nodes(host, saved.name) - pixels(host, entry, after)).max() <= 2
    history, made_from = read_history(saved)
    assert [record.targets for record in history] == [("Candy Stripes",)] and made_from[
        "sha256"
    ] == source.stem
    again = Graph()
    last = again.step(again.load(saved.name), "Dusk Dots")
    again.add("CUL_SaveCheckpoint", model=(last, CUL), filename_prefix="checkpoints/further")
    host.run(again)
    # drift stays measured from the kept file
    assert read_history(host.saved("checkpoints/further_*")[0])[1]["sha256"] == source.stem


def test_the_same_model_is_kept_once_and_may_be_deleted(host, lora, others):
    graph, _, begun = behind_lora(lora)
    graph.add("CUL_DriftMap", model=(graph.step(begun), CUL))
    host.run(graph)
    (source,) = set(kept(host)) - others
    number, trained = source.stat().st_ino, steps_trained(host)
    for _ in range(20):  # a busy host may take its time to drop its results
        host.forget()
        if begun in host.executed(host.run(graph)):
            break
    else:
        pytest.fail("the host takes all results from its cache")
    assert set(kept(host)) == {source, *others} and source.stat().st_ino == number
    source.unlink()
    host.run(graph)  # nothing was taken from the cache that stands on the file
    assert set(kept(host)) == {source, *others} and steps_trained(host) == trained
    assert {path.name for path in source.parent.iterdir()} == {"locks", *(path.name for path in kept(host))}


@pytest.mark.parametrize(
    ("kind", "inputs", "said"),
    [
        ("CLIPSetLastLayer", {"stop_at_clip_layer": -2}, "CLIP Set Last Layer"),
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}, "model_sampling"),
        ("FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}, "(patches)"),
        ("RescaleCFG", {"multiplier": 0.7}, "sampler_cfg_function"),
    ],
)
def test_what_is_no_weight_is_refused_and_works_behind_the_node(host, lora, kind, inputs, said):
    graph, patched, begun = behind_lora(lora)
    name, slot = ("clip", CLIP) if kind.startswith("CLIP") else ("model", MODEL)
    behind = Graph(graph)
    changed = behind.add(kind, **{name: (begun, slot)}, **inputs)
    clip, model = ((changed, 0), (begun, MODEL)) if name == "clip" else ((begun, CLIP), (changed, 0))
    behind.sample(model, clip, (begun, VAE))
    host.run(behind)
    changed = graph.add(kind, **{name: (patched, slot - MODEL)}, **inputs)
    graph[begun]["inputs"][name] = [changed, 0]
    graph.add("CUL_DriftMap", model=(begun, CUL))
    message = host.error_of(host.wait(host.queue(graph)))["exception_message"]
    assert said in message and "connect this node in front of the nodes that add it" in message


def test_a_model_without_what_training_needs_is_refused(host, lora):
    graph, _, begun = behind_lora(lora)
    del graph[begun]["inputs"]["vae"]
    graph.add("CUL_DriftMap", model=(begun, CUL))
    assert (
        "connect the one that came with the MODEL"
        in host.error_of(host.wait(host.queue(graph)))["exception_message"]
    )
