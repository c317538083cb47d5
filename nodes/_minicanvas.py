"""Registers MiniCanvas' architectures with the host, so that stock loaders and samplers run their checkpoints."""

from __future__ import annotations

from comfy import clip_model, sd1_clip, supported_models, supported_models_base

from ..cul_core.minicanvas.family import FAMILY_OF
from ..cul_core.models.family import Family


class MiniText(clip_model.CLIPTextModel):
    """The host's CLIP text model with MiniCanvas' own vocabulary size, which the host does not read from a
    config."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        self.text_model.embeddings = clip_model.CLIPEmbeddings(
            config_dict["hidden_size"],
            vocab_size=config_dict["vocab_size"],
            num_positions=config_dict["max_position_embeddings"],
            dtype=dtype,
            device=device,
            operations=operations,
        )


def _architecture(family: Family) -> type:
    """The host's model class of one world, which reads everything from the family's configuration."""
    text, tokenizer_folder = family.config("text_encoder"), str(family.tokenizer_folder)

    class MiniClip(sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None, **_):
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=text,
                model_class=MiniText,
                return_projected_pooled=False,
                special_tokens={
                    "start": text["bos_token_id"],
                    "end": text["eos_token_id"],
                    "pad": text["pad_token_id"],
                },
                model_options=model_options or {},
            )

    class MiniClipModel(sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None, **_):
            super().__init__(
                device=device, dtype=dtype, model_options=model_options or {}, clip_model=MiniClip
            )

    class MiniTokens(sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None, **_):
            super().__init__(
                tokenizer_path=tokenizer_folder,
                embedding_directory=embedding_directory,
                embedding_size=text["hidden_size"],
                tokenizer_data=tokenizer_data or {},
            )

    class MiniTokenizer(sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None, **_):
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data or {},
                tokenizer=MiniTokens,
            )

    class MiniCanvas(supported_models.SD15):
        unet_config = {
            **supported_models.SD15.unet_config,
            "context_dim": family.signature[1],
            "model_channels": family.signature[0],
        }
        unet_extra_config = {
            "num_heads": family.config("unet")["attention_head_dim"],
            "num_head_channels": -1,
        }

        def clip_target(self, state_dict=None):
            return supported_models_base.ClipTarget(MiniTokenizer, MiniClipModel)

    return MiniCanvas


def register() -> None:
    """Once per process. May raise on a host that has changed underneath."""
    known = [getattr(model, "unet_config", None) for model in supported_models.models]
    for family in FAMILY_OF.values():
        architecture = _architecture(family)
        if architecture.unet_config not in known:
            supported_models.models.append(architecture)
