"""Run by the host's own Python: prints, as JSON, how flow transformers of small random weights are predicted,
differentiated, trained, edited and saved.

The networks and, where a small file is recognized, their loaders are those of the host; the text is made up.
"""

import asyncio
import dataclasses
import functools
import importlib
import importlib.util
import json
import logging
import math
import re
import sys
import types
from pathlib import Path

host, pack, folder = map(Path, sys.argv[1:4])
wanted = sys.argv[4].split(",")
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, str(host))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import utils.extra_config  # noqa: E402, F401, I001  (before a dependency claims the name `utils`)
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy import supported_models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "pack", pack / "__init__.py", submodule_search_locations=[str(pack)]
)
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
asyncio.run(module.comfy_entrypoint())
(
    hosted,
    native,
    kinds,
    models,
    sources,
    recognize,
    sampling,
    concepts,
    resolving,
    stepping,
    conabl,
    esd,
    compute,
    lora,
    checkpoint,
) = (
    importlib.import_module(f"pack.{name}")
    for name in (
        "nodes._host_network",
        "nodes._host",
        "nodes._types",
        "cul_core.history.unlearn_model",
        "cul_core.models.source",
        "cul_core.models.recognize",
        "cul_core.models.sampling",
        "cul_core.concepts.concept",
        "cul_core.requests.resolve",
        "cul_core.training.step",
        "cul_core.methods.conabl",
        "cul_core.methods.esd",
        "cul_core.training.compute",
        "cul_core.output.lora",
        "cul_core.output.checkpoint",
    )
)
logging.disable(logging.INFO)

ROWS, POOLED = 96, 64
FLUX = {
    "image_model": "flux",
    "guidance_embed": True,
    "axes_dim": [16, 56, 56],
    "num_heads": 1,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "patch_size": 2,
    "context_in_dim": ROWS,
    "vec_in_dim": POOLED,
    "depth": 2,
    "depth_single_blocks": 2,
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "n_heads": 2,
    "n_kv_heads": 1,
    "cap_feat_dim": ROWS,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.0,
    "axes_dims": [16, 16, 16],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
}
# the host's class, its configuration, and whether its loader recognizes a file of this width
BUILT = {
    "sd3": (
        "SD3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": ROWS, "out_features": 128},
            },
            "num_patches": 256,
            "pos_embed_max_size": 16,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
        },
        True,
    ),
    "flux": ("Flux", FLUX, True),
    "flux-schnell": ("FluxSchnell", FLUX | {"guidance_embed": False}, True),
    "flux2": (
        "Flux2",
        FLUX
        | {
            "image_model": "flux2",
            "axes_dim": [32, 32, 32, 32],
            "mlp_ratio": 3.0,
            "theta": 2000,
            "in_channels": 128,
            "out_channels": 128,
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "txt_ids_dims": [3],
            "patch_size": 1,
            "vec_in_dim": None,
        },
        True,
    ),
    "chroma": (
        "Chroma",
        {key: value for key, value in FLUX.items() if key != "guidance_embed"}
        | {
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 128,
            "hidden_dim": 96,
            "n_layers": 2,
            "vec_in_dim": None,
        },
        False,
    ),
    "lumina2": ("Lumina2", LUMINA, False),
    "z-image": (
        "ZImage",
        LUMINA
        | {
            "dim": 256,
            "axes_dims": [32, 48, 48],
            "n_kv_heads": 2,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        False,
    ),
    "qwen-image": (
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "num_attention_heads": 1,
            "joint_attention_dim": ROWS,
            "pooled_projection_dim": POOLED,
        },
        False,
    ),
    "anima": (
        "Anima",
        {
            "image_model": "anima",
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 64,
            "concat_padding_mask": True,
            "crossattn_emb_channels": ROWS,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop",
            "min_fps": 1,
            "max_fps": 30,
            "extra_h_extrapolation_ratio": 1.0,
            "extra_w_extrapolation_ratio": 1.0,
            "extra_t_extrapolation_ratio": 1.0,
            "num_blocks": 2,
            "num_heads": 1,
            "use_adaln_lora": True,
            "adaln_lora_dim": 32,
            "rope_h_extrapolation_ratio": 4.0,
            "rope_w_extrapolation_ratio": 4.0,
            "rope_t_extrapolation_ratio": 1.0,
            "extra_per_block_abs_pos_emb": False,
            "rope_enable_fps_modulation": False,
        },
        False,
    ),
    "hidream": (
        "HiDream",
        {
            "image_model": "hidream",
            "attention_head_dim": 128,
            "axes_dims_rope": [64, 32, 32],
            "caption_channels": [ROWS, ROWS],
            "max_resolution": [128, 128],
            "in_channels": 16,
            "llama_layers": [0, 1],
            "num_attention_heads": 1,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "num_layers": 1,
            "num_single_layers": 1,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": POOLED,
        },
        False,
    ),
}
WORDS = [f"{first}{second}</w>" for first in ("ba", "lo", "mi") for second in ("ker", "nto", "sal", "vin")]
PROMPTS = ["", "A cat in the style of Van Gogh", "a house"]


class Text:
    """A CLIP whose rows depend on the words; with `is_padded` all prompts have equally many."""

    # the vocabulary from which closed forms make names up
    tokenizer = types.SimpleNamespace(own=types.SimpleNamespace(inv_vocab=dict(enumerate(WORDS))))

    def __init__(self, family, width, is_padded):
        self._family, self._width, self._length = family, width, 16 if is_padded else 0

    def tokenize(self, text):
        ids = [1, *(3 + sum(word.encode()) % 1000 for word in re.findall(r"\w+", text)), 2]
        ids += [2] * (self._length - len(ids))
        if self._family == "qwen-image":  # whose template begins with what is left out of the rows
            ids = [8, 9, *ids]
        others = {"l": [[(7, 1.0)] * 5]} if self._family == "flux" else {}  # of the pooled row alone
        return others | {"words": [[(number, 1.0) for number in ids]]}

    def encode_from_tokens(self, tokens, return_dict=False):
        ids = [number for number, _ in tokens["words"][0] if number not in (8, 9)]
        rows = [torch.randn(self._width, generator=torch.Generator().manual_seed(number)) for number in ids]
        values = {"cond": torch.stack(rows).cumsum(0)[None] / 2, "pooled_output": None}
        values["pooled_output"] = values["cond"].mean(1)[:, :POOLED]
        if self._family in ("lumina2", "z-image", "qwen-image", "flux2"):
            values["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        if self._family == "anima":
            values |= {"t5xxl_ids": torch.tensor(ids), "t5xxl_weights": torch.ones(len(ids))}
        if self._family == "hidream":
            values["conditioning_llama3"] = torch.stack([values["cond"], values["cond"] / 2], 1)
        return values


def fill(network):
    """Random weights with finite outputs, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    weights = dict(network.named_parameters())
    if "pos_embed" in network._buffers:  # loaded from the file too
        weights["pos_embed"] = network.pos_embed
    for name, weight in weights.items():
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=generator) / math.prod(weight.shape[1:]) ** 0.5
        else:
            weight.data = torch.full(weight.shape, float(not name.endswith("bias")))


def built(kind, config):
    """A MODEL on the CPU; settings that an older host does not know are left out."""
    device, settings = torch.device("cpu"), dict(config)
    while True:
        model_config = kind(dict(settings))
        model_config.set_inference_dtype(torch.float32, None)
        try:
            model = model_config.get_model({}, "")
            return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise
            del settings[unknown[1]]


def loaded_from(path, kind, config, is_recognized):
    if is_recognized:
        try:
            return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
        except RuntimeError as error:
            if "size mismatch" not in str(error):  # an older host knows the network at its full width alone
                raise
    patcher = built(kind, config)
    patcher.model.diffusion_model.load_state_dict(load_file(path))
    return patcher


def distance(mine, theirs):
    return (mine - theirs).abs().max().item() / theirs.abs().max().item()


def gradient_error(network, latents, times, text):
    """Relative error of directional derivatives, by autograd, against central differences.

    One direction is random, which shows what has no gradient; rounding moves its differences by a percent, so
    it counts a tenth. The other is the gradient's, by random factors, along which much changes.
    """
    generator = torch.Generator().manual_seed(2)
    exact = network.exact(list(network.weights("all")))
    probe = torch.randn(latents.shape, generator=generator)

    def value(direction, step):
        moved = {key: weight + step * direction[key] for key, weight in exact.items()}
        with network.with_weights(moved), torch.no_grad():
            return (network.predict(latents, times, text) * probe).double().sum().item()

    gradient = {}
    with network.with_weights({key: weight.clone() for key, weight in exact.items()}):
        parameters = network.weights("all")
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        (network.predict(latents, times, text) * probe).sum().backward()
        for key, parameter in parameters.items():
            gradient[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.requires_grad_(False)
            parameter.grad = None

    def error(direction):
        found = sum((gradient[key] * direction[key]).double().sum().item() for key in exact)
        # a wide step is off by curvature, a narrow one by rounding
        truths = [
            (value(direction, step) - value(direction, -step)) / (2 * step)
            for step in (4e-3, 1e-3, 2.5e-4, 6e-5)
        ]
        return min(abs(found - truth) / abs(truth) for truth in truths)

    anywhere = {key: torch.randn(weight.shape, generator=generator) for key, weight in exact.items()}
    steepest = {
        key: slope
        / slope.std(correction=0).clamp(min=1e-12)
        * (0.5 + torch.rand(slope.shape, generator=generator))
        for key, slope in gradient.items()
    }
    sizes = {key: weight.std(correction=0).clamp(min=0.02) for key, weight in exact.items()}
    by_random, by_gradient = (
        error({key: size * direction[key] for key, size in sizes.items()})
        for direction in (anywhere, steepest)
    )
    return max(by_random / 10, by_gradient)


@torch.no_grad()
def reader_error(network, latents, times, text):
    """How far `rows_read` is from what one of the text readers gets."""
    got = []
    (layer, *_) = network.text_readers()[-1:]
    handle = layer.register_forward_pre_hook(lambda layer, inputs: got.append(inputs[0].clone()))
    network.predict(latents[:1], times[:1], text[1])
    handle.remove()
    rows = text[1].text[:, text[1].mask[0]] if text.mask is not None else text[1].text
    return distance(network.rows_read(rows)[0], got[0].reshape(-1, rows.shape[-1])[-rows.shape[1] :])


def trained(loaded, networks, method):
    request = resolving.resolve(
        "plain",
        loaded.value.family,
        [concepts.Concept("Van Gogh", "style")],
        overrides=resolving.Overrides(
            method=method,
            regularizers=(),
            training={
                "iterations": 3,
                "batch_size": 2,
                "anchor_count": 2,
                "anchor_steps": 2,
                "learning_rate": 1e-2,
            },
        ),
    )
    return stepping.run_step(loaded.value, request, networks=networks, compute=compute.Compute("float32"))[0]


@torch.no_grad()
def solved(loaded, networks, latents, times):
    """(number of matrices that `exact` moves, its largest residue, change of other text by the concept's)."""
    concept = concepts.Concept("Van Gogh", "style")
    request = resolving.resolve("exact", loaded.value.family, [concept])
    edited, report = stepping.run_step(
        loaded.value, request, networks=networks, compute=compute.Compute("float32")
    )
    network = networks.get(loaded.value.source)
    prompts = concept.prompt, "An image of a cat"
    texts = [network.encode([prompt] * len(latents)) for prompt in prompts]
    before = [network.predict(latents, times, text) for text in texts]
    with network.with_weights(models.weights_of(edited, network.exact(list(edited.edits)))):
        of_concept, of_other = (
            (network.predict(latents, times, text) - prediction).norm().item()
            for text, prediction in zip(texts, before, strict=True)
        )
    return len(edited.edits), report.figures["largest_residue"], of_other / of_concept


def compare(name):
    kind, config, is_recognized = BUILT[name]
    kind = getattr(supported_models, kind)
    first = built(kind, config).model.diffusion_model
    fill(first)
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in first.state_dict().items()}, path)
    with torch.inference_mode():  # as the host's nodes load
        model = loaded_from(path, kind, config, is_recognized)
    family = recognize.family_of(native.shapes_of(model), "MODEL")
    assert family.name == name == recognize.detect_family(path).name, family.name
    process = native.process_of(model)
    figures = {"shift": abs(process.shift - family.process.shift)}
    channels = family.latent_shape[0]
    family = dataclasses.replace(family, latent_shape=(channels, 8, 8), image_size_px=64)
    is_padded = name in ("sd3", "flux", "flux-schnell", "hidream")
    text = Text(name, ROWS, is_padded)
    others = Text(name, ROWS, is_padded), Text(name, ROWS, not is_padded)  # the same again, and another one
    assert [native.text_identity(text) == native.text_identity(other) for other in others] == [True, False]
    value = models.UnlearnModel(sources.source_of(path), family)
    loaded = kinds.LoadedModel(value, model, text, None)
    networks = hosted.HostNetworks(loaded)
    network = networks.get(value.source)
    roles = {role: len(network.weights(role)) for role in family.roles}
    traced = hosted.HostNetwork(hosted.unknown_family(model, text), value.source, model, text, None)
    found = {role: set(traced.weights(role)) for role in ("text_readers", "reads_text")}
    traced.close()
    table = {role: set(network.weights(role)) for role in found}
    assert found["text_readers"] <= table["reads_text"] <= found["reads_text"]
    assert found["text_readers"] & table["text_readers"]
    prompts = network.encode(PROMPTS)
    assert [network.content(prompt) for prompt in PROMPTS] == [slice(1, 1), slice(1, 9), slice(1, 3)]
    generator = torch.Generator().manual_seed(0)
    latents, times = torch.randn(3, *family.latent_shape, generator=generator), torch.tensor([0.2, 0.6, 0.9])
    with torch.no_grad():
        together = network.predict(latents, times, prompts)
        alone = torch.cat(
            [
                network.predict(latents[i : i + 1], times[i], network.encode(PROMPTS[i : i + 1]))
                for i in range(3)
            ]
        )
    figures["rows"] = reader_error(network, latents, times, prompts)
    figures["one by one"] = distance(together, alone)
    figures["gradient"] = gradient_error(network, latents, times, prompts)
    network.set_checkpointing(True)
    figures["gradient, checkpointing"] = gradient_error(network, latents, times, prompts)
    network.set_checkpointing(False)

    solver = family.process.trajectory(3)
    noise = latents[:1]
    ours = sampling.run_solver(network.predict, noise, solver, prompts[1], prompts[0], 3.5)
    with torch.inference_mode():
        conditions = []
        for prompt in (PROMPTS[1], ""):
            made = text.encode_from_tokens(text.tokenize(prompt))
            conditions.append([[made.pop("cond"), made]])
        start = noise[:, :, None] if family.has_frames else noise
        sigmas = torch.cat([family.process.trajectory(3).times, torch.zeros(1)])
        theirs = comfy.sample.sample(
            model,
            start,
            3,
            3.5,
            "euler",
            "simple",
            *conditions,
            torch.zeros_like(start),
            sigmas=sigmas,
            seed=0,
        )
    theirs = model.model.process_latent_in(theirs.clone())
    figures["sampling"] = distance(ours, theirs[:, :, 0] if family.has_frames else theirs)

    edited = trained(loaded, networks, conabl.ConAblConfig())
    other = trained(loaded, networks, esd.ESDConfig(trajectories=1, trajectory_steps=2))
    moved = {method: len(model.edits) for method, model in (("conabl", edited), ("esd", other))}
    sizes = [delta.norm().item() for model in (edited, other) for delta in model.edits.values()]
    assert min(sizes) > 0 and all(map(math.isfinite, sizes))
    with torch.no_grad(), network.with_weights(models.weights_of(edited, network.exact(list(edited.edits)))):
        truth = network.predict(latents, times, prompts)
    figures["the edit"] = distance(truth, together)
    closed_form = solved(loaded, networks, latents, times)
    networks.free()

    def predicted(patched):
        again = hosted.HostNetwork(family, value.source, patched, text, None)
        with torch.no_grad():
            result = again.predict(latents, times, prompts)
        again.close()
        return distance(result, truth)

    figures["as a patch"] = predicted(native.native(loaded.with_value(edited))[0])
    saved = checkpoint.save_checkpoint(edited, folder / f"{name}-edited.safetensors")
    figures["as a file"] = predicted(loaded_from(saved, kind, config, is_recognized))
    files = {
        "as a difference": lora.save_difference(edited, folder / f"{name}-d.safetensors"),
        "as a LoRA": lora.save_lora(edited, folder / f"{name}-l.safetensors", rank=4096).path,
    }
    for how, file in files.items():
        figures[how] = predicted(comfy.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0.0)[0])
    return figures, roles, moved, closed_form


if hasattr(supported_models, "Anima"):  # the size of its adapter is no setting
    from comfy.ldm.anima import model as anima

    small = {"source_dim": ROWS, "target_dim": ROWS, "model_dim": ROWS, "num_layers": 2, "num_heads": 2}
    anima.LLMAdapter = functools.partial(anima.LLMAdapter, **small)
present = [name for name in wanted if hasattr(supported_models, BUILT[name][0])]
sys.stdout.write(f"RESULT {json.dumps({name: compare(name) for name in present})}\n")
