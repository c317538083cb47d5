"""Models with random weights: checkpoints of the larger families, and a diffusers folder of SD 1.x."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cul_core.models.families.sd1 import SD1
from cul_core.models.load_diffusers import load_autoencoder, load_network

_LAYOUT = Path(__file__).resolve().parents[1] / "tests" / "core"


def write_checkpoint(path: Path, family: str = "sd1") -> Path:
    """Path of the new fp16 checkpoint of `sd1` (2.1 GB), `sd2` or `sdxl`, in the tests' layout."""
    sys.path.append(str(_LAYOUT))
    from sd_layout import checkpoint_shapes, sd2_shapes, write_random, xl_shapes

    shapes = {"sd1": checkpoint_shapes, "sd2": sd2_shapes, "sdxl": xl_shapes}[family]
    return write_random(path.with_suffix(".part"), shapes()).rename(path)


def write_folder(checkpoint: Path, tokenizer: Path, folder: Path) -> Path:
    """The new folder with the same Stable Diffusion 1.x weights in the layout of diffusers, 2.1 GB.

    It has no safety checker.
    """
    making = folder.with_suffix(".part")
    shutil.rmtree(making, ignore_errors=True)
    network = load_network(checkpoint, torch.float16, tokenizer)
    network.unet.save_pretrained(making / "unet")
    load_autoencoder(checkpoint, SD1.config("vae")).half().save_pretrained(making / "vae")
    level = "text_model."
    text = {
        level + name.removeprefix(level): value.half().contiguous()
        for name, value in network.text_encoders[0].state_dict().items()
        if not name.endswith("position_ids")
    }
    (making / "text_encoder").mkdir()
    save_file(text, making / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    (making / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer / name, making / "tokenizer" / name)
    end = "<|endoftext|>"
    _write_json(
        making / "text_encoder" / "config.json",
        SD1.config("text_encoder") | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    )
    _write_json(
        making / "tokenizer" / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        },
    )
    (making / "scheduler").mkdir()
    _write_json(
        making / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "PNDMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    )
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "PNDMScheduler"}
    _write_json(
        making / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            **{name: ["diffusers", kind] for name, kind in parts.items()},
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
    )
    making.rename(folder)
    return folder


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
