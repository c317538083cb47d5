"""Registers MiniCanvas' architecture with the host, so that stock loaders and samplers run its checkpoint."""

from __future__ import annotations

from comfy import clip_model, sd1_clip, supported_models, supported_models_base

from ..cul_core.minicanvas.family import MINI


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


class MiniClip(sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None, **_):
        config = MINI.config("text_encoder")
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=config,
            model_class=MiniText,
            return_projected_pooled=False,
            special_tokens={
                "start": config["bos_token_id"],
                "end": config["eos_token_id"],
                "pad": config["pad_token_id"],
            },
            model_options=model_options or {},
        )


class MiniClipModel(sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None, **_):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=MiniClip)


class MiniTokens(sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None, **_):
        super().__init__(
            tokenizer_path=str(MINI.tokenizer_folder),
            embedding_directory=embedding_directory,
            embedding_size=MINI.config("text_encoder")["hidden_size"],
            tokenizer_data=tokenizer_data or {},
        )


class MiniTokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None, **_):
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=MiniTokens
        )


class MiniCanvas(supported_models.SD15):
    unet_config = {
        **supported_models.SD15.unet_config,
        "context_dim": MINI.signature[1],
        "model_channels": MINI.signature[0],
    }
    unet_extra_config = {"num_heads": MINI.config("unet")["attention_head_dim"], "num_head_channels": -1}

    def clip_target(self, state_dict=None):
        return supported_models_base.ClipTarget(MiniTokenizer, MiniClipModel)


def register() -> None:
    """Once per process. May raise on a host that has changed underneath."""
    if not any(
        getattr(model, "unet_config", None) == MiniCanvas.unet_config for model in supported_models.models
    ):
        supported_models.models.append(MiniCanvas)
