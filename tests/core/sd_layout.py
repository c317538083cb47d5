"""Stable Diffusion checkpoints without a download: the tensors of the original code by key and shape, written
from its structure.

Nothing here looks at diffusers, so that its key converter is checked against an independent list.
"""

import math
import struct
from dataclasses import fields
from json import dumps

import torch

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."
SD2_TEXT = "cond_stage_model.model."
XL_TEXT, XL_TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def _conv(name, inputs, outputs, side):
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def unet_shapes(
    context=768,
    in_channels=4,
    width=320,
    multiples=(1, 2, 4, 4),
    blocks=2,
    depths=(1, 1, 1, 0),
    linear=False,
    pooled=0,
):
    """Key -> shape of the denoiser: `depths` transformer blocks per attention at each resolution, the deepest
    number in the middle.

    Convolutions or, if `linear`, matrices around them; `pooled` inputs beside the text rows.
    """
    time, shapes, around = (
        4 * width,
        {},
        _linear if linear else lambda name, inputs, outputs: _conv(name, inputs, outputs, 1),
    )

    def resnet(name, inputs, outputs):
        shapes.update(_norm(f"{name}.in_layers.0", inputs) | _conv(f"{name}.in_layers.2", inputs, outputs, 3))
        shapes.update(_linear(f"{name}.emb_layers.1", time, outputs))
        shapes.update(
            _norm(f"{name}.out_layers.0", outputs) | _conv(f"{name}.out_layers.3", outputs, outputs, 3)
        )
        if inputs != outputs:
            shapes.update(_conv(f"{name}.skip_connection", inputs, outputs, 1))

    def attention(name, d, depth):
        shapes.update(
            _norm(f"{name}.norm", d) | around(f"{name}.proj_in", d, d) | around(f"{name}.proj_out", d, d)
        )
        for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
            for part, source in (("attn1", d), ("attn2", context)):
                shapes.update(
                    _linear(f"{block}.{part}.to_q", d, d, bias=False)
                    | _linear(f"{block}.{part}.to_out.0", d, d)
                )
                for letter in "kv":
                    shapes.update(_linear(f"{block}.{part}.to_{letter}", source, d, bias=False))
            shapes.update(
                _linear(f"{block}.ff.net.0.proj", d, 8 * d) | _linear(f"{block}.ff.net.2", 4 * d, d)
            )
            for number in (1, 2, 3):
                shapes.update(_norm(f"{block}.norm{number}", d))

    shapes.update(_linear(f"{UNET}time_embed.0", width, time) | _linear(f"{UNET}time_embed.2", time, time))
    if pooled:
        shapes.update(
            _linear(f"{UNET}label_emb.0.0", pooled, time) | _linear(f"{UNET}label_emb.0.2", time, time)
        )
    shapes.update(_conv(f"{UNET}input_blocks.0.0", in_channels, width, 3))
    lowest, skips, now, place = len(multiples) - 1, [width], width, 1
    for level, multiple in enumerate(multiples):
        for _ in range(blocks):
            resnet(f"{UNET}input_blocks.{place}.0", now, width * multiple)
            now = width * multiple
            if depths[level]:
                attention(f"{UNET}input_blocks.{place}.1", now, depths[level])
            skips.append(now)
            place += 1
        if level < lowest:
            shapes.update(_conv(f"{UNET}input_blocks.{place}.0.op", now, now, 3))
            skips.append(now)
            place += 1
    resnet(f"{UNET}middle_block.0", now, now)
    attention(f"{UNET}middle_block.1", now, max(depths))
    resnet(f"{UNET}middle_block.2", now, now)
    place = 0
    for level, multiple in reversed([*enumerate(multiples)]):
        for number in range(blocks + 1):
            resnet(f"{UNET}output_blocks.{place}.0", now + skips.pop(), width * multiple)
            now = width * multiple
            if depths[level]:
                attention(f"{UNET}output_blocks.{place}.1", now, depths[level])
            if level and number == blocks:
                shapes.update(
                    _conv(f"{UNET}output_blocks.{place}.{1 + bool(depths[level])}.conv", now, now, 3)
                )
            place += 1
    return shapes | _norm(f"{UNET}out.0", now) | _conv(f"{UNET}out.2", now, 4, 3)


def text_shapes(level="text_model.", width=768, layers=12, prefix=TEXT, words=49408):
    """Key -> shape of CLIP's text encoder; the oldest files lack the `text_model.` level, and all have the
    ids of positions."""
    prefix += level
    shapes = {
        f"{prefix}embeddings.position_ids": (1, 77),
        f"{prefix}embeddings.token_embedding.weight": (words, width),
        f"{prefix}embeddings.position_embedding.weight": (77, width),
    }
    for layer in range(layers):
        name = f"{prefix}encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{name}.self_attn.{part}", width, width)
        shapes |= _norm(f"{name}.layer_norm1", width) | _norm(f"{name}.layer_norm2", width)
        shapes |= _linear(f"{name}.mlp.fc1", width, 4 * width) | _linear(f"{name}.mlp.fc2", 4 * width, width)
    return shapes | _norm(f"{prefix}final_layer_norm", width)


def open_clip_shapes(prefix, width, layers, words=49408):
    """Key -> shape of OpenCLIP's text encoder."""
    shapes = {
        f"{prefix}positional_embedding": (77, width),
        f"{prefix}text_projection": (width, width),
        f"{prefix}logit_scale": (),
        f"{prefix}token_embedding.weight": (words, width),
    }
    for layer in range(layers):
        name = f"{prefix}transformer.resblocks.{layer}"
        shapes |= {
            f"{name}.attn.in_proj_weight": (3 * width, width),
            f"{name}.attn.in_proj_bias": (3 * width,),
        }
        shapes |= (
            _linear(f"{name}.attn.out_proj", width, width)
            | _norm(f"{name}.ln_1", width)
            | _norm(f"{name}.ln_2", width)
        )
        shapes |= _linear(f"{name}.mlp.c_fc", width, 4 * width) | _linear(
            f"{name}.mlp.c_proj", 4 * width, width
        )
    return shapes | _norm(f"{prefix}ln_final", width)


def autoencoder_shapes(width=128, multiples=(1, 2, 4, 4), blocks=2, latent=4):
    """Key -> shape of the autoencoder."""
    shapes, deepest = {}, width * multiples[-1]

    def resnet(name, inputs, outputs):
        shapes.update(_norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", inputs, outputs, 3))
        shapes.update(_norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs, 3))
        if inputs != outputs:
            shapes.update(_conv(f"{name}.nin_shortcut", inputs, outputs, 1))

    for part, first, last in (("encoder", 3, 2 * latent), ("decoder", latent, 3)):
        name = VAE + part
        is_decoder = part == "decoder"
        now = deepest if is_decoder else width
        shapes.update(_conv(f"{name}.conv_in", first, now, 3))
        levels = [*enumerate(multiples)]
        for level, multiple in reversed(levels) if is_decoder else levels:
            side = "up" if is_decoder else "down"
            for block in range(blocks + is_decoder):
                resnet(f"{name}.{side}.{level}.block.{block}", now, width * multiple)
                now = width * multiple
            if level != (0 if is_decoder else len(multiples) - 1):
                shapes.update(_conv(f"{name}.{side}.{level}.{side}sample.conv", now, now, 3))
        resnet(f"{name}.mid.block_1", deepest, deepest)
        resnet(f"{name}.mid.block_2", deepest, deepest)
        shapes.update(_norm(f"{name}.mid.attn_1.norm", deepest))
        for letter in ("q", "k", "v", "proj_out"):
            shapes.update(_conv(f"{name}.mid.attn_1.{letter}", deepest, deepest, 1))
        shapes.update(_norm(f"{name}.norm_out", now) | _conv(f"{name}.conv_out", now, last, 3))
    return (
        shapes
        | _conv(f"{VAE}quant_conv", 2 * latent, 2 * latent, 1)
        | _conv(f"{VAE}post_quant_conv", latent, latent, 1)
    )


def checkpoint_shapes(level="text_model."):
    """Key -> shape of every tensor that a full checkpoint of Stable Diffusion 1.x has."""
    return unet_shapes() | text_shapes(level) | autoencoder_shapes()


def sd2_shapes():
    """Key -> shape of every tensor that a full checkpoint of Stable Diffusion 2.x has."""
    return unet_shapes(1024, linear=True) | open_clip_shapes(SD2_TEXT, 1024, 24) | autoencoder_shapes()


def xl_shapes():
    """Key -> shape of every tensor that a full checkpoint of Stable Diffusion XL has."""
    unet = unet_shapes(2048, multiples=(1, 2, 4), depths=(0, 2, 10), linear=True, pooled=1280 + 6 * 256)
    return unet | text_shapes(prefix=XL_TEXT) | open_clip_shapes(XL_TEXT_2, 1280, 32) | autoencoder_shapes()


def tiny_shapes(name, words=968):
    """The layout of `sd2` or `sdxl` around a small denoiser and small text encoders, with what fine-tuned
    files have beside it."""
    small = {"width": 32, "multiples": (1, 2), "blocks": 1, "linear": True}
    extra = {"model_ema.decay": (), "model_ema.diffusion_modelout0weight": (32,), "betas": (1000,)}
    if name == "sd2":
        return extra | unet_shapes(64, depths=(1, 0), **small) | open_clip_shapes(SD2_TEXT, 64, 3, words)
    unet = unet_shapes(128, depths=(0, 2), pooled=64 + 6 * 256, **small)
    return (
        extra
        | unet
        | text_shapes(width=64, layers=3, prefix=XL_TEXT, words=words)
        | open_clip_shapes(XL_TEXT_2, 64, 3, words)
    )


def shrunken(family, words=None):
    """`family` as `tiny_shapes` has it; `words` are other values of `vocab_size`, `bos_token_id` and
    `eos_token_id`."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "projection_dim": 64,
    }
    context = 64 * len(family.text_encoders)
    unet = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": [32, 64],
        "cross_attention_dim": context,
        "attention_head_dim": [2, 4],
    }
    if family.name == "sd2":
        text["num_hidden_layers"] = 2  # the file's last one is not used
        unet |= {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }
    else:
        unet |= {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2],
            "projection_class_embeddings_input_dim": 64 + 6 * 256,
        }

    def config(self, part):
        return family.config(part) | {"unet": unet, "vae": {}}.get(part, text | (words or {}))

    changes = {"signature": (32, context), "latent_shape": (4, 8, 8), "recipe": None}
    values = {field.name: getattr(family, field.name) for field in fields(family)}
    return type("Shrunken", (type(family),), {"config": config})(**values | changes)


def _header(shapes):
    """(first bytes of a safetensors file of fp16 tensors, 64-bit integers for ids, size of the data that
    follows)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        dtype, size = ("I64", 8) if key.endswith("position_ids") else ("F16", 2)
        begin, end = end, end + size * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def write_hollow(path, shapes):
    """A checkpoint whose tensors are all zero and take next to no space on the disk: for what reads names and
    shapes alone."""
    head, size = _header(shapes)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return path


def write_random(path, shapes, seed=0):
    """A checkpoint with finite outputs: normal(0, 1/sqrt(inputs)) matrices, unit norms, no biases; one tensor
    in memory at a time."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(_header(shapes)[0])
        for key, shape in shapes.items():
            if key.endswith("position_ids"):
                tensor = torch.arange(shape[1])
            elif len(shape) > 1:
                tensor = (torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5).half()
            else:
                tensor = torch.full(shape, float(key.endswith(".weight")), dtype=torch.float16)
            file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return path
