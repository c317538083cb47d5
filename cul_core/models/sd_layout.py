"""Names and shapes of the tensors of Stable Diffusion's layout, from the constructor arguments of its parts.

They are those of the original code (CompVis, Stability AI) and of OpenCLIP and transformers, written from its
structure, so that a file's header can be compared with its family before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _conv(name: str, inputs: int, outputs: int, side: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnet(name: str, inputs: int, outputs: int, time: int) -> Shapes:
    shapes = _norm(f"{name}.in_layers.0", inputs) | _conv(f"{name}.in_layers.2", inputs, outputs, 3)
    shapes |= _linear(f"{name}.emb_layers.1", time, outputs)
    shapes |= _norm(f"{name}.out_layers.0", outputs) | _conv(f"{name}.out_layers.3", outputs, outputs, 3)
    return shapes | (_conv(f"{name}.skip_connection", inputs, outputs, 1) if inputs != outputs else {})


def _transformer(name: str, width: int, depth: int, config: Mapping[str, Any]) -> Shapes:
    shapes = _norm(f"{name}.norm", width)
    for part in ("proj_in", "proj_out"):
        is_linear = config.get("use_linear_projection", False)
        shapes |= (
            _linear(f"{name}.{part}", width, width) if is_linear else _conv(f"{name}.{part}", width, width, 1)
        )
    for block in (f"{name}.transformer_blocks.{number}" for number in range(depth)):
        for part, rows in (("attn1", width), ("attn2", config["cross_attention_dim"])):
            shapes |= _linear(f"{block}.{part}.to_q", width, width, bias=False)
            shapes |= _linear(f"{block}.{part}.to_k", rows, width, bias=False)
            shapes |= _linear(f"{block}.{part}.to_v", rows, width, bias=False)
            shapes |= _linear(f"{block}.{part}.to_out.0", width, width)
        shapes |= _linear(f"{block}.ff.net.0.proj", width, 8 * width)
        shapes |= _linear(f"{block}.ff.net.2", 4 * width, width)
        for number in (1, 2, 3):
            shapes |= _norm(f"{block}.norm{number}", width)
    return shapes


def unet_shapes(config: Mapping[str, Any]) -> Shapes:
    """Key without prefix -> shape of a UNet's tensors.

    Args:
        config: constructor arguments of diffusers' UNet2DConditionModel.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    time = 4 * widths[0]
    shapes = _linear("time_embed.0", widths[0], time) | _linear("time_embed.2", time, time)
    if pooled := config.get("projection_class_embeddings_input_dim"):
        shapes |= _linear("label_emb.0.0", pooled, time) | _linear("label_emb.0.2", time, time)
    shapes |= _conv("input_blocks.0.0", config["in_channels"], widths[0], 3)
    now, skips, place = widths[0], [widths[0]], 1
    for level, (width, kind) in enumerate(zip(widths, config["down_block_types"], strict=True)):
        for _ in range(layers):
            shapes |= _resnet(f"input_blocks.{place}.0", now, width, time)
            if "CrossAttn" in kind:
                shapes |= _transformer(f"input_blocks.{place}.1", width, depths[level], config)
            now, place = width, place + 1
            skips.append(now)
        if level < len(widths) - 1:
            shapes |= _conv(f"input_blocks.{place}.0.op", now, now, 3)
            place += 1
            skips.append(now)
    shapes |= _resnet("middle_block.0", now, now, time) | _resnet("middle_block.2", now, now, time)
    shapes |= _transformer("middle_block.1", now, depths[-1], config)
    place = 0
    for level, kind in zip(reversed(range(len(widths))), config["up_block_types"], strict=True):
        for layer in range(layers + 1):
            shapes |= _resnet(f"output_blocks.{place}.0", now + skips.pop(), widths[level], time)
            now, has_attention = widths[level], "CrossAttn" in kind
            if has_attention:
                shapes |= _transformer(f"output_blocks.{place}.1", now, depths[level], config)
            if level and layer == layers:
                shapes |= _conv(f"output_blocks.{place}.{1 + has_attention}.conv", now, now, 3)
            place += 1
    return shapes | _norm("out.0", now) | _conv("out.2", now, config["out_channels"], 3)


def clip_shapes(config: Mapping[str, Any]) -> Shapes:
    """Key without prefix and `text_model.` -> shape of CLIP's text encoder, as transformers names it.

    Args:
        config: constructor arguments of transformers' CLIPTextConfig.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for layer in (f"encoder.layers.{number}" for number in range(config["num_hidden_layers"])):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", width, width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
        shapes |= _linear(f"{layer}.mlp.fc1", width, inner) | _linear(f"{layer}.mlp.fc2", inner, width)
    return shapes | _norm("final_layer_norm", width)


def open_clip_shapes(config: Mapping[str, Any]) -> Shapes:
    """Key without prefix -> shape of the same text encoder as OpenCLIP names it, without its projection."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "token_embedding.weight": (config["vocab_size"], width),
        "positional_embedding": (config["max_position_embeddings"], width),
    }
    for layer in (f"transformer.resblocks.{number}" for number in range(config["num_hidden_layers"])):
        shapes |= {
            f"{layer}.attn.in_proj_weight": (3 * width, width),
            f"{layer}.attn.in_proj_bias": (3 * width,),
        }
        shapes |= _linear(f"{layer}.attn.out_proj", width, width)
        shapes |= _norm(f"{layer}.ln_1", width) | _norm(f"{layer}.ln_2", width)
        shapes |= _linear(f"{layer}.mlp.c_fc", width, inner) | _linear(f"{layer}.mlp.c_proj", inner, width)
    return shapes | _norm("ln_final", width)


def autoencoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Key without prefix -> shape of the autoencoder; its attention may also have matrices for convolutions.

    Args:
        config: constructor arguments of diffusers' AutoencoderKL.
    """
    widths, layers, latent = (
        config["block_out_channels"],
        config["layers_per_block"],
        config["latent_channels"],
    )
    shapes = _conv("quant_conv", 2 * latent, 2 * latent, 1) | _conv("post_quant_conv", latent, latent, 1)

    def resnet(name: str, inputs: int, outputs: int) -> Shapes:
        found = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", inputs, outputs, 3)
        found |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs, 3)
        return found | (_conv(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})

    levels = list(enumerate(widths))
    for part, side, order, count in (
        ("encoder", "down", levels, layers),
        ("decoder", "up", levels[::-1], layers + 1),
    ):
        now, last = order[0][1], order[-1][0]
        inputs, outputs = (
            (config["in_channels"], 2 * latent) if side == "down" else (latent, config["out_channels"])
        )
        shapes |= _conv(f"{part}.conv_in", inputs, now, 3)
        for level, width in order:
            for block in range(count):
                shapes |= resnet(f"{part}.{side}.{level}.block.{block}", now, width)
                now = width
            if level != last:
                shapes |= _conv(f"{part}.{side}.{level}.{side}sample.conv", now, now, 3)
        for block in (1, 2):
            shapes |= resnet(f"{part}.mid.block_{block}", widths[-1], widths[-1])
        shapes |= _norm(f"{part}.mid.attn_1.norm", widths[-1])
        for letter in ("q", "k", "v", "proj_out"):
            shapes |= _conv(f"{part}.mid.attn_1.{letter}", widths[-1], widths[-1], 1)
        shapes |= _norm(f"{part}.norm_out", now) | _conv(f"{part}.conv_out", now, outputs, 3)
    return shapes
