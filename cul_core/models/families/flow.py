"""Flow-matching transformers: families that ComfyUI loads, as data.

Layers that read raw text rows, and the other roles, were found by tracing what each layer's input depends on.
Shifts are those of ComfyUI. They cannot be loaded by `load_diffusers`; a host's network runs them.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..family import Family, Recipe, Shapes, register
from ..flow_process import FlowProcess
from .unet_layout import UNET_PREFIX

_NUMBER = r"\.\d+\."
ATTENTION = r"(attn|attention)"

# Nobody has published values for these methods on flow transformers: guesses, not tuned by us.
UNKNOWN = Recipe(
    iterations=300,
    batch_size=1,
    learning_rate=1e-4,
    anchor_count=50,
    anchor_steps=20,
    anchor_guidance=4.0,
    is_guess=True,
)
_DISTILLED = replace(UNKNOWN, anchor_guidance=1.0)
_FEW_STEPS = replace(_DISTILLED, anchor_steps=4)


def _flow(
    name: str,
    display_name: str,
    marks: tuple[str, ...],
    shift: float,
    *,
    readers: str,
    pooled: str = "",
    pooled_input: str = "",
    text_kv: str,
    text_stream: str,
    recipe: Recipe = UNKNOWN,
    latent_shape: tuple[int, int, int] = (16, 128, 128),
    text_norm: str = "",
    has_frames: bool = False,
) -> Family:
    """Register a family that is recognized by its weights `marks`, unless one before it is.

    Args:
        name: see `Family`, as other arguments of the same name.
        display_name: see `Family`.
        marks: weights, by name within the network.
        shift: see `FlowProcess`.
        readers: regular expression of the layers whose inputs are text rows, maybe behind a norm.
        pooled: that of the layers that read the pooled vector or the text alone.
        pooled_input: that of the layer whose input is the pooled vector itself.
        text_kv: that of the layers that make keys and values of the text stream.
        text_stream: that of all layers of the text stream.
        recipe: see `Family`.
        latent_shape: see `Family`.
        text_norm: see `Family`.
        has_frames: see `Family`.
    """

    def recognize(family: Family, shapes: Shapes, file_name: str) -> bool:
        return all(f"{UNET_PREFIX}{mark}" in shapes for mark in marks)

    return register(
        Family(
            name,
            display_name,
            signature=(0, 0),
            latent_shape=latent_shape,
            latent_scale=1.0,
            image_size_px=1024,
            sampling_batch=1,
            prefix=UNET_PREFIX,
            roles={
                "text_readers": rf"({readers})\.weight$",
                "text_inputs": rf"({'|'.join(filter(None, (readers, pooled_input)))})\.weight$",
                "reads_text": rf"({'|'.join(filter(None, (readers, pooled)))})\.weight$",
                "text_kv": rf"({text_kv})\.weight$",
                "text_stream": rf"({text_stream}).*\.weight$",
                "attention": rf"{ATTENTION}.*\.weight$",
                "all": "",
            },
            recognize=recognize,
            process=FlowProcess(shift),
            recipe=recipe,
            text_norm=text_norm,
            has_frames=has_frames,
        )
    )


_DOUBLE = rf"\.double_blocks{_NUMBER}"
_FLUX_TEXT = {
    "readers": r"\.txt_in",
    "text_kv": rf"{_DOUBLE}txt_attn\.qkv",
    "text_stream": rf"{_DOUBLE}txt_(attn|mlp)",
}

SD3 = _flow(
    "sd3",
    "Stable Diffusion 3",
    ("joint_blocks.0.context_block.attn.qkv.weight", "context_embedder.weight"),
    3.0,
    readers=r"\.context_embedder",
    pooled=r"\.y_embedder\.mlp\.[02]",
    pooled_input=r"\.y_embedder\.mlp\.0",
    text_kv=rf"\.joint_blocks{_NUMBER}context_block\.attn\.qkv",
    text_stream=rf"\.joint_blocks{_NUMBER}context_block\.(attn|mlp)",
)
FLUX2 = _flow(
    "flux2",
    "Flux.2",
    ("double_stream_modulation_img.lin.weight",),
    math.exp(2.02),
    recipe=_DISTILLED,
    latent_shape=(128, 64, 64),
    **_FLUX_TEXT,
)
CHROMA = _flow(
    "chroma",
    "Chroma",
    ("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"),
    math.exp(1.15),
    **_FLUX_TEXT,
)
FLUX_DEV = _flow(
    "flux",
    "Flux.1 dev",
    ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "guidance_in.in_layer.weight"),
    math.exp(1.15),
    pooled=r"\.vector_in\.(in|out)_layer",
    pooled_input=r"\.vector_in\.in_layer",
    recipe=_DISTILLED,
    **_FLUX_TEXT,
)
FLUX_SCHNELL = _flow(
    "flux-schnell",
    "Flux.1 schnell",
    ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
    1.0,
    pooled=r"\.vector_in\.(in|out)_layer",
    pooled_input=r"\.vector_in\.in_layer",
    recipe=_FEW_STEPS,
    **_FLUX_TEXT,
)
_LUMINA = {
    "readers": r"\.cap_embedder\.1",
    "pooled": rf"\.context_refiner{_NUMBER}(attention\.(qkv|out)|feed_forward\.w[123])",
    "text_kv": rf"\.context_refiner{_NUMBER}attention\.qkv",
    "text_stream": rf"\.context_refiner{_NUMBER}",
    "text_norm": "cap_embedder.0",
}
Z_IMAGE = _flow(
    "z-image",
    "Z-Image",
    ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight", "cap_pad_token"),
    3.0,
    recipe=_FEW_STEPS,
    **_LUMINA,
)
LUMINA2 = _flow(
    "lumina2",
    "Lumina 2",
    ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"),
    6.0,
    **_LUMINA,
)
QWEN_IMAGE = _flow(
    "qwen-image",
    "Qwen-Image",
    ("txt_norm.weight", "transformer_blocks.0.attn.add_k_proj.weight"),
    math.exp(1.15),
    readers=r"\.txt_in",
    text_norm="txt_norm",
    text_kv=rf"\.transformer_blocks{_NUMBER}attn\.add_[kv]_proj",
    text_stream=rf"\.transformer_blocks{_NUMBER}(attn\.add_[qkv]_proj|attn\.to_add_out|txt_mlp)",
    has_frames=True,
)
ANIMA = _flow(
    "anima",
    "Anima",
    ("llm_adapter.blocks.0.cross_attn.k_proj.weight", "blocks.0.cross_attn.k_proj.weight"),
    3.0,
    readers=rf"\.llm_adapter\.blocks{_NUMBER}cross_attn\.[kv]_proj",
    pooled=rf"diffusion_model\.blocks{_NUMBER}cross_attn\.[kv]_proj",
    text_kv=rf"diffusion_model\.blocks{_NUMBER}cross_attn\.[kv]_proj",
    text_stream=r"\.llm_adapter\.",
    has_frames=True,
)
HIDREAM = _flow(
    "hidream",
    "HiDream",
    ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.attn1.to_q.weight"),
    1.0,
    readers=r"\.caption_projection\.\d+\.linear",
    pooled=r"\.p_embedder\.pooled_embedder\.linear_[12]",
    pooled_input=r"\.p_embedder\.pooled_embedder\.linear_1",
    text_kv=rf"\.double_stream_blocks{_NUMBER}block\.attn1\.to_[kv]_t",
    text_stream=rf"\.double_stream_blocks{_NUMBER}block\.(attn1\.to_\w+_t|ff_t)",
)
