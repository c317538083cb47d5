"""Run by the host's own Python: prints, as JSON, how `HostNetwork` and `DiffusersNetwork` compute the same
files: MiniCanvas, and small models of random weights with the layout of Stable Diffusion 2.x and XL."""

import asyncio
import importlib
import importlib.util
import json
import logging
import sys
import time
from pathlib import Path

host, pack, folder = map(Path, sys.argv[1:4])
sys.argv = ["main.py", "--cpu", "--fp32-text-enc", "--fp32-unet"]
sys.path[:0] = [str(host), str(pack / "tests/core")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import utils.extra_config  # noqa: E402, F401, I001  (before a dependency claims the name `utils`)
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy import supported_models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sd_layout import shrunken, tiny_shapes, write_random  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "pack", pack / "__init__.py", submodule_search_locations=[str(pack)]
)
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
asyncio.run(module.comfy_entrypoint())
(hosted, loading, checkpoint, types, concepts, resolving, stepping, family, conabl, compute, mini) = (
    importlib.import_module(f"pack.{name}")
    for name in (
        "nodes._host_network",
        "cul_core.models.load_diffusers",
        "cul_core.output.checkpoint",
        "nodes._types",
        "cul_core.concepts.concept",
        "cul_core.requests.resolve",
        "cul_core.training.step",
        "cul_core.models.family",
        "cul_core.methods.conabl",
        "cul_core.training.compute",
        "cul_core.minicanvas.models",
    )
)
FAMILIES = family.FAMILIES
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 3}
SMALL = {"unet_extra_config": {"num_heads": -1, "num_head_channels": 16}}
OF_HOST = {
    "sd2": (
        supported_models.SD20,
        {"context_dim": 64, "adm_in_channels": None},
        {"clip_h_model_config": TEXT},
    ),
    "sdxl": (
        supported_models.SDXL,
        {"context_dim": 128, "adm_in_channels": 64 + 6 * 256},
        {f"clip_{letter}_model_config": TEXT for letter in "lg"},
    ),
}
PROMPTS = ["", "A cat image in Candy Stripes style.", "two words! " * 6]


def distance(mine, theirs):
    return (mine - theirs).abs().max().item() / theirs.abs().max().item()


def edited(loaded, networks):
    """(edits of three iterations, seconds of an iteration)."""
    request = resolving.resolve(
        "plain",
        loaded.value.family,
        [concepts.Concept("Candy Stripes", "style")],
        overrides=resolving.Overrides(
            method=conabl.ConAblConfig(),
            training={"iterations": 3, "batch_size": 2, "anchor_count": 2, "anchor_steps": 2},
        ),
    )
    times = []
    watch = stepping.Callbacks(on_progress=lambda progress: times.append(time.monotonic()))
    model, _ = stepping.run_step(
        loaded.value, request, networks=networks, callbacks=watch, compute=compute.Compute("float32")
    )
    return model.edits, (times[-1] - times[0]) / 2


def compare(path, options):
    with torch.inference_mode():  # as the host's nodes load
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=options is None, te_model_options=options or {}
        )
    loaded = types.LoadedModel(checkpoint.open_model(path), model, clip, vae)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    cache, networks = loading.NetworkCache(host / "comfy/sd1_tokenizer"), hosted.HostNetworks(loaded)
    theirs, ours = cache.get(loaded.value.source), networks.get(loaded.value.source)
    (text, mine), generator = (network.encode(PROMPTS) for network in (theirs, ours)), torch.Generator()
    figures = {"text": distance(mine.text, text.text)}
    if text.pooled is not None:
        figures["pooled"] = distance(mine.pooled, text.pooled)
    assert [ours.content(prompt) for prompt in PROMPTS] == [theirs.content(prompt) for prompt in PROMPTS]
    assert (ours.words(), ours.shared_rows) == (theirs.words(), theirs.shared_rows)
    for role in loaded.value.family.roles:
        shapes = [
            {key: weight.shape for key, weight in network.weights(role).items()} for network in (theirs, ours)
        ]
        assert shapes[0] == shapes[1], role

    latents = torch.randn(3, *loaded.value.family.latent_shape, generator=generator.manual_seed(0))
    timesteps = torch.tensor([30, 400, 900])
    exact = ours.exact(list(ours.weights("all")))
    moved = {
        key: weight
        + torch.randn(weight.shape, generator=generator) * weight.std(correction=0).clamp(min=0.1) / 8
        for key, weight in exact.items()
    }
    results = []
    for network in (theirs, ours):
        predicted = network.predict(latents, timesteps, text)
        with network.with_weights({key: weight.clone() for key, weight in moved.items()}):
            parameters = network.weights("all")
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            again = network.predict(latents, timesteps, text)
            again.square().mean().backward()
            gradients = {key: parameter.grad for key, parameter in parameters.items()}
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        results.append((predicted, again, gradients))
    figures["prediction"], figures["after an edit"] = (
        distance(one, other) for one, other in zip(results[1][:2], results[0][:2], strict=True)
    )
    figures["the edit"] = distance(results[1][1], results[1][0])
    whole = torch.stack([gradient.norm() for gradient in results[0][2].values()]).norm()
    figures["gradient"] = max(
        ((results[1][2][key] - gradient).norm() / whole).item() for key, gradient in results[0][2].items()
    )
    rows = ours.token_rows(PROMPTS)
    free = [row.clone().requires_grad_(True) for row in rows]
    from_rows = ours.encode_rows(PROMPTS, free)
    figures["from rows"] = distance(from_rows.text.detach(), mine.text)
    from_rows.text[:, 1].sum().backward()
    assert all(row.grad.abs().max() > 0 for row in free)
    ours.set_checkpointing(True)
    with torch.enable_grad(), ours.with_weights({key: weight.clone() for key, weight in moved.items()}):
        parameters = ours.weights("text_readers")
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        ours.predict(latents, timesteps, text).square().mean().backward()
        figures["checkpointing"] = max(
            ((parameter.grad - results[1][2][key]).norm() / whole).item()
            for key, parameter in parameters.items()
        )
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    ours.set_checkpointing(False)
    (first, slow), (second, fast) = (edited(loaded, made) for made in (cache, networks))
    assert first.keys() == second.keys()
    size = torch.stack([delta.norm() for delta in first.values()]).norm()
    figures["three iterations"] = max(
        ((second[key] - delta).norm() / size).item() for key, delta in first.items()
    )
    networks.free()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    return figures, {"diffusers": slow, "host": fast}


for name, (kind, numbers, _) in OF_HOST.items():
    usual = {key: value for key, value in kind.unet_config.items() if key != "transformer_depth"}
    small = type(f"Small{name}", (kind,), {**SMALL, "unet_config": usual | numbers | {"model_channels": 32}})
    supported_models.models.append(small)
    FAMILIES[name] = shrunken(FAMILIES[name])
    write_random(folder / f"{name}.safetensors", tiny_shapes(name, words=49408))
save_file(
    load_file(folder / "sdxl.safetensors") | dict.fromkeys(("v_pred", "ztsnr"), torch.empty(0)),
    folder / "v.safetensors",
)
logging.disable(logging.INFO)
found = {
    "mini": compare(mini.CHECKPOINT_PATH, None),
    **{name: compare(folder / f"{name}.safetensors", options) for name, (_, _, options) in OF_HOST.items()},
    "sdxl, velocity": compare(folder / "v.safetensors", OF_HOST["sdxl"][2]),
}
sys.stdout.write(f"RESULT {json.dumps(found)}\n")
