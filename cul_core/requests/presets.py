"""Presets: named combinations of method, regularizers and training settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..base.config import Config
from ..base.errors import ConfigError, brief_repr
from ..concepts.concept import Concept
from ..methods import METHODS
from ..methods.conabl import ConAblConfig
from ..methods.esd import ESDConfig
from ..methods.exact import ExactConfig
from ..methods.null_space import NullSpaceConfig
from ..methods.sculpmem import SculpMemConfig
from ..methods.trce_text import TRCETextConfig
from ..methods.uce import UCEConfig
from ..models.family import Family
from ..models.sampling import SamplerConfig
from ..parts.training_config import TrainingConfig
from ..regularizers.distillation import DistillationConfig
from ..regularizers.projection import ProjectionConfig
from ..regularizers.selft import SelFTConfig
from ..regularizers.weight_anchor import L1SPConfig, L2SPConfig
from .request import Request


@dataclass(frozen=True)
class Preset:
    """How to run one step. The values are MiniCanvas'; `for_family` gives those of another family.

    Args:
        description: when to use it. A claim that holds on MiniCanvas only, such as one about batch size,
            learning rate or time, names MiniCanvas in its sentence.
        method: config of a registered method.
        regularizers: configs of registered regularizers.
        training: how to train.
        anchor_count: number of anchor images.
        anchor_sampler: how anchor images are sampled.
        regularizers_of: family name -> regularizers that replace `regularizers` on that family.
        training_of: family name -> training settings that replace the family's recipe.
        method_of: family name -> method that replaces `method` on that family.
    """

    description: str
    method: Config
    regularizers: tuple[Config, ...]
    training: TrainingConfig
    anchor_count: int = 100
    anchor_sampler: SamplerConfig = SamplerConfig()
    regularizers_of: Mapping[str, tuple[Config, ...]] = field(default_factory=dict)
    training_of: Mapping[str, TrainingConfig] = field(default_factory=dict)
    method_of: Mapping[str, Config] = field(default_factory=dict)

    def for_family(self, family: Family) -> Preset:
        """This preset with the family's own values.

        The family's recipe replaces iterations, batch size, learning rate and the sampling of anchors; a
        family without a recipe keeps the preset's, and so does a closed-form method, which trains nothing.
        The values of Stable Diffusion 1.x are the papers'. We have not tuned them, nor measured a preset
        there.
        """
        recipe = family.recipe
        if recipe is None or METHODS.of(self.method).cls.is_closed_form:
            return self
        usual = replace(
            self.training,
            iterations=recipe.iterations,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
        )
        return replace(
            self,
            regularizers=self.regularizers_of.get(family.name, self.regularizers),
            anchor_count=recipe.anchor_count,
            anchor_sampler=SamplerConfig(steps=recipe.anchor_steps, guidance_scale=recipe.anchor_guidance),
            training=self.training_of.get(family.name, usual),
            method=self.method_of.get(family.name, self.method),
        )

    def with_settings(self, values: Mapping[str, Any]) -> Preset:
        """This preset with some values replaced, by name.

        Args:
            values: settings of `TrainingConfig`, and `anchor_count`, `anchor_steps` and `anchor_guidance`.

        Raises:
            ConfigError: an unknown setting, or a value out of range.
        """
        values, sampler = dict(values), self.anchor_sampler
        count = values.pop("anchor_count", self.anchor_count)
        steps = values.pop("anchor_steps", sampler.steps)
        guidance = values.pop("anchor_guidance", sampler.guidance_scale)
        return replace(
            self,
            training=TrainingConfig.from_json(self.training.to_json() | values),
            anchor_count=count,
            anchor_sampler=replace(sampler, steps=steps, guidance_scale=guidance),
        )

    def request(
        self,
        concepts: Sequence[Concept],
        *,
        retain: Sequence[Concept],
        anchor_prompts: Sequence[str],
        seed: int,
        anchor_seed: int = 0,
    ) -> Request:
        """The request to forget `concepts` in this way."""
        return Request(
            concepts=tuple(concepts),
            method=self.method,
            regularizers=self.regularizers,
            training=replace(self.training, seed=seed),
            retain=tuple(retain),
            anchor_prompts=tuple(anchor_prompts),
            anchor_count=self.anchor_count,
            anchor_sampler=self.anchor_sampler,
            anchor_seed=anchor_seed,
        )


_LARGE = ("sd1", "sd2", "sdxl")
_ESD_PAPER = TrainingConfig(
    iterations=200, batch_size=1, learning_rate=5e-5, max_grad_norm=0.0, group="attn2"
)
_STEEP = TrainingConfig(learning_rate=6e-4, schedule="linear")
_DAMPED = ProjectionConfig(decoys=300, damping=3e-5)
_EXACT = {"method": ExactConfig(), "regularizers": (), "training": TrainingConfig(iterations=0)}

PRESETS = {
    "plain": Preset(
        "Concept Ablation as its authors' code does it, without a regularizer: the baseline, which "
        "collapses over many requests.",
        ConAblConfig(**ConAblConfig.REFERENCE),
        (),
        TrainingConfig(),
    ),
    "recommended": Preset(
        "One closed-form solve over all requests so far, without training: the order does not matter, and "
        "each request can be taken back. On MiniCanvas, after twelve styles one after another, 100 % of "
        "them are gone, in name and description; all listed styles, 97 % of the others and 99 % of objects "
        "stay. Forgetting objects was not measured.",
        **_EXACT,
    ),
    "trained": Preset(
        "Concept Ablation towards the pretrained model's anchors, with projection of the update in damped "
        "coordinates, which keeps what is listed. On MiniCanvas, after twelve styles one after another, 99 "
        "% of them are gone, and 99 % of the listed styles, 90 % of the others and 93 % of objects stay.",
        ConAblConfig(teacher="pretrained"),
        (_DAMPED,),
        _STEEP,
    ),
    "projection": Preset(
        "The paper's gradient projection as its authors' code does it.",
        ConAblConfig(**ConAblConfig.REFERENCE),
        (ProjectionConfig(**ProjectionConfig.REFERENCE),),
        TrainingConfig(),
    ),
    "l1sp": Preset(
        "The paper's L1-SP, as a term of the loss.",
        ConAblConfig(**ConAblConfig.REFERENCE),
        (L1SPConfig(strength=5.0, anchor="start", form="penalty"),),
        TrainingConfig(),
        regularizers_of=dict.fromkeys(_LARGE, (L1SPConfig(strength=50.0, anchor="start", form="penalty"),)),
    ),
    "l2sp": Preset(
        "The paper's L2-SP, as a term of the loss.",
        ConAblConfig(**ConAblConfig.REFERENCE),
        (L2SPConfig(strength=300.0, anchor="start", form="penalty"),),
        TrainingConfig(),
        regularizers_of=dict.fromkeys(
            _LARGE, (L2SPConfig(strength=25000.0, anchor="start", form="penalty"),)
        ),
    ),
    "esd": Preset(
        "Erased Stable Diffusion, without a regularizer: steers away from the target instead of towards an "
        "anchor, and needs no anchor images.",
        ESDConfig(),
        (),
        TrainingConfig(batch_size=4, learning_rate=1.2e-3, schedule="linear"),
        training_of=dict.fromkeys(_LARGE, _ESD_PAPER),
    ),
    "selft": Preset(
        "The paper's SelFT as its authors' code does it: only the weights that matter most for the target "
        "are trained.",
        ConAblConfig(**ConAblConfig.REFERENCE),
        (SelFTConfig(kept_fraction=0.2, **SelFTConfig.REFERENCE),),
        TrainingConfig(),
        regularizers_of=dict.fromkeys(_LARGE, (SelFTConfig(kept_fraction=0.05, **SelFTConfig.REFERENCE),)),
    ),
    "projection_selft": Preset(
        "The paper's hybrid for styles as its authors' code does it: gradients are masked, then projected.",
        ConAblConfig(**ConAblConfig.REFERENCE),
        (
            SelFTConfig(kept_fraction=0.30, **SelFTConfig.REFERENCE),
            ProjectionConfig(**ProjectionConfig.REFERENCE),
        ),
        TrainingConfig(),
    ),
    "projection_l1sp": Preset(
        "The paper's hybrid for objects as its authors' code does it: projection and a far weaker L1-SP.",
        ConAblConfig(**ConAblConfig.REFERENCE),
        (
            ProjectionConfig(**ProjectionConfig.REFERENCE),
            L1SPConfig(strength=0.075, anchor="start", form="penalty"),
        ),
        TrainingConfig(),
        regularizers_of=dict.fromkeys(
            _LARGE,
            (
                ProjectionConfig(**ProjectionConfig.REFERENCE),
                L1SPConfig(strength=0.75, anchor="start", form="penalty"),
            ),
        ),
    ),
    "plain_ours": Preset(
        "Concept Ablation towards the pretrained model's anchors, without a regularizer. On MiniCanvas its "
        "learning rate is a third of that of trained, so the first requests of a chain forget little.",
        ConAblConfig(teacher="pretrained"),
        (),
        replace(_STEEP, learning_rate=2e-4),
    ),
    "l1sp_ours": Preset(
        "L1-SP as a proximal step towards the pretrained weights, so that the whole chain's drift is "
        "bounded.",
        ConAblConfig(teacher="pretrained"),
        (L1SPConfig(strength=1e4),),
        _STEEP,
    ),
    "l2sp_ours": Preset(
        "L2-SP as a proximal step towards the pretrained weights, so that the whole chain's drift is "
        "bounded.",
        ConAblConfig(teacher="pretrained"),
        (L2SPConfig(strength=5e5),),
        _STEEP,
    ),
    "selft_ours": Preset(
        "SelFT whose mask acts on the optimizer's update, scored along one sampling trajectory.",
        ConAblConfig(teacher="pretrained"),
        (SelFTConfig(kept_fraction=0.2),),
        _STEEP,
    ),
    "projection_ours": Preset(
        "Projection of the update in more strongly damped coordinates than in trained.",
        ConAblConfig(teacher="pretrained"),
        (replace(_DAMPED, damping=3e-6),),
        _STEEP,
    ),
    "projection_selft_ours": Preset(
        "The projection of trained and SelFT, exactly sparse in the subspace that projection allows.",
        ConAblConfig(teacher="pretrained"),
        (SelFTConfig(kept_fraction=0.3), _DAMPED),
        replace(_STEEP, learning_rate=4e-4),
    ),
    "projection_l1sp_ours": Preset(
        "The projection of trained in more strongly damped coordinates, and L1-SP towards the pretrained "
        "weights.",
        ConAblConfig(teacher="pretrained"),
        (replace(_DAMPED, damping=1e-5), L1SPConfig(strength=5e3)),
        _STEEP,
    ),
    "esd_reference": Preset(
        "Erased Stable Diffusion as its authors' code does it, with a new image for every update; on Stable "
        "Diffusion XL with the paper's settings.",
        ESDConfig(**ESDConfig.REFERENCE),
        (),
        TrainingConfig(batch_size=4, learning_rate=1.2e-3),
        training_of={
            "sd1": _ESD_PAPER,
            "sd2": _ESD_PAPER,
            "sdxl": TrainingConfig(iterations=200, batch_size=1, learning_rate=2e-4, max_grad_norm=0.0),
        },
    ),
    "distillation": Preset(
        "Concept Ablation as its authors' code does it, with distillation from the pretrained model on "
        "images it samples of what is to be kept.",
        ConAblConfig(**ConAblConfig.REFERENCE),
        (DistillationConfig(),),
        TrainingConfig(),
    ),
    "distillation_ours": Preset(
        "Concept Ablation towards the pretrained model's anchors, with stronger distillation: more states "
        "from shorter sampling trajectories.",
        ConAblConfig(teacher="pretrained"),
        (DistillationConfig(keep_weight=4.0, batch_size=4, trajectory_steps=20),),
        _STEEP,
    ),
    "sculpmem": Preset(
        "The paper's SculpMem as its authors' code does it: a mask lets half of the weights change.",
        SculpMemConfig(warm_up=3, interval=6, **SculpMemConfig.REFERENCE),
        (),
        TrainingConfig(),
        method_of=dict.fromkeys(_LARGE, SculpMemConfig(**SculpMemConfig.REFERENCE)),
    ),
    "sculpmem_ours": Preset(
        "SculpMem towards the pretrained model's anchors, with a frozen warm-up and distillation from the "
        "step's start.",
        SculpMemConfig(teacher="pretrained", warm_up=3, interval=6, distillation=1.5),
        (),
        TrainingConfig(learning_rate=8e-4, schedule="linear"),
        method_of=dict.fromkeys(_LARGE, SculpMemConfig(teacher="pretrained", distillation=1.5)),
    ),
    "thorough": Preset(
        "The preset trained with earlier targets trained again (replay) instead of protected. On MiniCanvas "
        "it also trains twice the images per update: after twelve styles the object is still there in 95 % "
        "of images of a target, where trained has 80 %, in twice the time.",
        ConAblConfig(teacher="pretrained", replay=0.25),
        (replace(_DAMPED, protect_previous=False),),
        TrainingConfig(batch_size=16, learning_rate=7e-4, schedule="linear"),
    ),
    "exact": Preset(
        "The same as recommended, under a name that stays when the recommendation changes.", **_EXACT
    ),
    "uce": Preset(
        "UCE with every token and the EOS of a name, solved anew over all requests so far. On MiniCanvas, "
        "after twelve styles one after another, 98 % of them are gone, and 89 % of the listed styles, 36 % "
        "of the others and 74 % of objects stay.",
        UCEConfig(),
        (),
        TrainingConfig(iterations=0),
    ),
    "uce_reference": Preset(
        "UCE as its authors' code does it, with the last token of a name, solved anew over all requests so "
        "far.",
        UCEConfig(**UCEConfig.REFERENCE),
        (),
        TrainingConfig(iterations=0),
    ),
    "trce_text": Preset(
        "The first of TRCE's two stages, which maps the EOS row alone, solved anew over all requests so far. "
        "On MiniCanvas, after twelve styles one after another, 100 % of them are gone, and 100 % of the "
        "listed styles, 41 % of the others and 92 % of objects stay.",
        TRCETextConfig(),
        (),
        TrainingConfig(iterations=0),
    ),
    "null_space": Preset(
        "One closed-form solve over all requests so far that leaves the text of names to keep exactly as it "
        "is. On MiniCanvas, after twelve styles one after another, 100 % of them are gone, but 3 % of "
        "images by description still show one; 100 % of other styles and 99 % of objects stay.",
        NullSpaceConfig(),
        (),
        TrainingConfig(iterations=0),
    ),
}


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ConfigError: there is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"There is no preset {brief_repr(name)}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
