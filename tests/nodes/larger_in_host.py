"""Run by the host's own Python: prints, as JSON, how host and pack compute small models with the layout of
Stable Diffusion 2.x and XL.

The host is told of their numbers alone; everything else is its own code for these families.
"""

import importlib
import importlib.util
import json
import sys
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

sys.path.append(str(pack))
family, loading, lora, models, source, snapshots = (
    importlib.import_module(f"cul_core.{name}")
    for name in (
        "models.family",
        "models.load_diffusers",
        "output.lora",
        "history.unlearn_model",
        "models.source",
        "store.model_snapshots",
    )
)
FAMILIES = family.FAMILIES
spec = importlib.util.spec_from_file_location(
    "pack", pack / "__init__.py", submodule_search_locations=[str(pack)]
)
sys.modules["pack"] = importlib.util.module_from_spec(spec)
hosted = importlib.import_module("pack.nodes._host")

TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 3}
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
PROMPTS = ["", "A cat in the style of Van Gogh", "two words! " * 20]


class Small:
    """Mixed into the host's class for a family."""

    unet_extra_config = {"num_heads": -1, "num_head_channels": 16}


def distance(mine, theirs):
    return (mine - theirs).abs().max().item() / theirs.abs().max().item()


@torch.no_grad()
def compare(path, name):
    """Relative distances of text, pooled text, and of the picture that is seen in a noisy one, before and
    after an edit."""
    network = loading.load_network(path, tokenizer_folder=host / "comfy/sd1_tokenizer")
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, te_model_options=OF_HOST[name][2]
    )
    tokens = [clip.tokenize(prompt) for prompt in PROMPTS]
    rows, pooled = (
        torch.cat(parts)
        for parts in zip(*(clip.encode_from_tokens(one, return_pooled=True) for one in tokens), strict=True)
    )
    mine = network.encode(PROMPTS)
    figures = {"text": distance(mine.text, rows)}
    y = {}
    if name == "sdxl":
        figures["pooled"] = distance(mine.pooled, pooled)
        y = {
            "y": torch.cat(
                [model.model.encode_adm(pooled_output=one[None], width=1024, height=1024) for one in pooled]
            )
        }

    process, timesteps = network.process, torch.tensor([30, 400, 900])
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = model.model.model_sampling.sigma(timesteps.float())

    def pictures(patched, network=network):
        ours = process.clean(network.predict(latents, timesteps, mine), latents, timesteps)
        patched.patch_model()
        scale = (sigmas**2 + 1).sqrt().view(-1, 1, 1, 1)
        theirs = patched.model.apply_model(latents * scale, sigmas, c_crossattn=rows, **y)
        patched.unpatch_model()
        return distance(ours, theirs)

    figures |= {"predicts": process.predicts, "picture": pictures(model)}
    generator = torch.Generator().manual_seed(1)
    readers = network.weights("text_readers")
    edits = {key: torch.randn(weight.shape, generator=generator) / 8 for key, weight in readers.items()}
    edited = models.UnlearnModel(source.source_of(path), network.family, edits)
    for key, delta in edits.items():
        readers[key].data += delta
    files = {
        "difference": lora.save_difference(edited, folder / "d.safetensors"),
        "lora": lora.save_lora(edited, folder / "l.safetensors", rank=64).path,
    }
    figures["without the edit"] = pictures(model)
    for kind, file in files.items():
        patched, _ = comfy.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0.0)
        figures[kind] = pictures(patched)
        if kind == "difference":
            hosted.require_weights_only(patched, clip)
            snapshot = snapshots.snapshot_model(folder / "kept", hosted.weights_of(patched, clip, None))
            kept = loading.load_network(snapshot.path, tokenizer_folder=host / "comfy/sd1_tokenizer")
            figures["kept"], figures["kept text"] = (
                pictures(patched, kept),
                distance(kept.encode(PROMPTS).text, rows),
            )
            assert kept.family == network.family
            assert hosted.process_of(patched).predicts == process.predicts
    return figures


for name, (kind, numbers, _) in OF_HOST.items():
    usual = {key: value for key, value in kind.unet_config.items() if key != "transformer_depth"}
    small = type(f"Small{name}", (Small, kind), {"unet_config": usual | numbers | {"model_channels": 32}})
    supported_models.models.append(small)
    FAMILIES[name] = shrunken(FAMILIES[name])
    write_random(folder / f"{name}.safetensors", tiny_shapes(name, words=49408))

figures = {name: compare(folder / f"{name}.safetensors", name) for name in OF_HOST}
save_file(
    load_file(folder / "sdxl.safetensors") | dict.fromkeys(("v_pred", "ztsnr"), torch.empty(0)),
    folder / "v.safetensors",
)
figures["sdxl, velocity"] = compare(folder / "v.safetensors", "sdxl")
sys.stdout.write(f"RESULT {json.dumps(figures)}\n")
