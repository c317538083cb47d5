"""Training settings of one step."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.config import Config, setting


@dataclass(frozen=True)
class TrainingConfig(Config):
    """Training settings of one step; nothing multiplies `learning_rate` by the batch size."""

    iterations: int = setting(60, "Optimizer updates of this step.", minimum=0, maximum=1_000_000)
    batch_size: int = setting(8, "Anchor latents per update.", minimum=1, maximum=10_000)
    learning_rate: float = setting(4e-4, "AdamW's learning rate.", minimum=0.0, maximum=1.0)
    schedule: str = setting(
        "constant",
        "Learning-rate schedule. constant: as in the reference. linear: down to zero, which ends the step "
        "without the optimizer's jitter.",
        choices=("constant", "linear"),
    )
    weight_decay: float = setting(
        0.0, "AdamW's decay toward zero; the references' 0.01 shrinks even masked entries.", minimum=0.0
    )
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", minimum=0.0)
    group: str = setting(
        "kv",
        "Weights to train; text, text-kv and text-stream are of flow transformers.",
        choices=("kv", "attn2", "attn", "non-attn2", "full", "text", "text-kv", "text-stream"),
    )
    seed: int = setting(0, "Seed of everything random.", minimum=0, maximum=2**64 - 1)
    evaluate_every: int = setting(
        0,
        "Updates between measurements of what is forgotten and what is left; the best weights are the "
        "result. 0 measures nothing, and the last are.",
        minimum=0,
        added_later=True,
    )
    patience: int = setting(
        1000,
        "Training stops when the measured UA has not risen for so many updates.",
        minimum=1,
        added_later=True,
    )
    stop_at_ua: float = setting(
        99.0,
        "Training stops when the measured UA, in percent, is this or more.",
        minimum=0.0,
        maximum=100.0,
        added_later=True,
    )
