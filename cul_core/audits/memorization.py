"""Memorized images: sort paraphrases of a caption into targets and anchors by their rate of copies.

After Kumari et al., ICCV 2023, arXiv 2303.13516, and their code. The caller supplies the paraphrases (theirs
come from a language model) and the similarity measure (theirs is the copy detector SSCD).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..base.config import Config, setting
from ..base.errors import ConceptError, brief_repr
from ..concepts.cleaning import clean_text, read_text
from ..concepts.concept import Concept, check_count, check_text
from ..methods.conabl import ConAblConfig
from ..models.network import Network
from ..models.sampling import SamplerConfig, generator_for, sample_latents
from ..parts.training_config import TrainingConfig
from ..requests.presets import Preset
from ..requests.request import Request
from ..requests.resolve import Overrides, adapt, resolve
from ..training.anchor_images import anchor_generator

Similarity = Callable[[Tensor], Tensor]
"""Images (b, 3, h, w) in [0, 1] -> similarity (b,) of each to the memorized image, 1 for equal images."""

MEMORIZATION = Preset(
    "Forgets one memorized image, with all weights, while other paraphrases keep their own images.",
    ConAblConfig(teacher="pretrained", preservation=1.0),
    (),
    TrainingConfig(learning_rate=1e-4, group="full"),
    # the authors' rate: 5e-7 per image times a batch of 2, doubled with preservation
    training_of={"sd1": TrainingConfig(iterations=400, batch_size=2, learning_rate=2e-6, group="full")},
)


@dataclass(frozen=True)
class MemorizationConfig(Config):
    """Thresholds for copies, targets and anchors; the defaults are the authors'."""

    pictures: int = setting(
        10, "Images per prompt to compare with the memorized one.", minimum=1, maximum=1000
    )
    copy_similarity: float = setting(0.5, "Similarity above which an image is a copy.")
    anchor_rate: float = setting(
        0.3, "Largest share of copies for a paraphrase to be an anchor.", minimum=0.0, maximum=1.0
    )
    target_rate: float = setting(
        0.6, "Smallest share of copies for a paraphrase to be a target.", minimum=0.0, maximum=1.0
    )
    most_anchors: int = setting(
        10, "Largest number of anchors; those with the fewest copies are taken.", minimum=1
    )
    fewest_anchors: int = setting(5, "Smallest number of anchors.", minimum=1)


def pixel_correlation(original: Tensor, side_px: int = 32) -> Similarity:
    """Pixel correlation with `original` (3, h, w), both scaled to `side_px`.

    It needs no network, but misses copies that are shifted or mirrored: use `embedding_cosine` with a copy
    detector for these.
    """

    def centred(images: Tensor) -> Tensor:
        small = functional.interpolate(
            images.float(), (side_px, side_px), mode="bilinear", antialias=True
        ).flatten(1)
        return small - small.mean(1, keepdim=True)

    reference = centred(original[None])
    return lambda images: functional.cosine_similarity(centred(images), reference.to(images.device))


def embedding_cosine(original: Tensor, embed: Callable[[Tensor], Tensor]) -> Similarity:
    """Cosine of image embeddings with that of `original` (3, h, w).

    Args:
        original: the memorized image in [0, 1].
        embed: images (b, 3, h, w) in [0, 1] -> vectors (b, d), such as SSCD's.
    """
    reference = embed(original[None])
    return lambda images: functional.cosine_similarity(embed(images), reference)


def read_image(path: Path) -> Tensor:
    """The image in a file as (3, h, w) in [0, 1].

    Raises:
        ConceptError: the file cannot be read.
    """
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConceptError(
            f"The image {path.name!r} cannot be read ({brief_repr(str(error))}); give a PNG or JPEG file."
        ) from error


def read_paraphrases(path: Path) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        ConceptError: the file cannot be read, has no line or too many, or a line is no caption.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ConceptError(
            f"The paraphrases in {path.name!r} cannot be read ({error}); give a text file with one a line."
        ) from error
    paraphrases = [line.strip() for line in lines if line.strip()]
    if not paraphrases:
        raise ConceptError(
            f"The file of paraphrases {path.name!r} is empty; give a text file with one a line."
        )
    check_count("paraphrases", paraphrases)
    for line in paraphrases:
        check_text("paraphrase", line)
    return [clean_text("paraphrase", line).strip() for line in paraphrases]


def memorization_request(
    network: Network,
    caption: str,
    paraphrases: Sequence[str],
    similarity: Similarity,
    *,
    seed: int,
    anchor_seed: int = 0,
    retain: Sequence[Concept] = (),
    chosen: Preset | None = None,
    overrides: Overrides | None = None,
    config: MemorizationConfig | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Request, dict[str, float]]:
    """(request to forget the image, share of copies by caption and paraphrase).

    Args:
        network: the pretrained model.
        caption: prompt that gives the memorized image.
        paraphrases: other captions of such an image; about twenty usually give targets and anchors.
        similarity: to the memorized image.
        seed: of the training.
        anchor_seed: of all sampled images.
        retain: concepts to retain.
        chosen: preset for training and sampling; `MEMORIZATION` if it is not given.
        overrides: values that replace the preset's.
        config: thresholds.
        check: called after each batch of images; may raise to stop.

    Raises:
        ConceptError: the caption does not give the image, or too few paraphrases give other images.
        ModelError: the model's latents cannot be decoded here.
    """
    network.check_autoencoder()
    chosen, config = chosen or MEMORIZATION, config or MemorizationConfig()
    caption = clean_text("caption", caption).strip()
    paraphrases = [clean_text("paraphrase", paraphrase).strip() for paraphrase in paraphrases]
    overrides = replace(overrides or Overrides(), seed=seed, anchor_seed=anchor_seed)
    adapted = adapt(chosen, network.family, overrides)
    sampler = adapted.anchor_sampler
    rates = copy_rates(network, [caption, *paraphrases], similarity, config, sampler, anchor_seed, check)
    concepts, anchors = sorted_captions(caption, rates, config)
    prompts = captions_without_copies(
        network, anchors, similarity, config, sampler, adapted.anchor_count, anchor_seed, check
    )
    overrides = replace(overrides, anchor_prompts=prompts)
    return resolve(chosen, network.family, concepts, retain, overrides), rates


def copy_rates(
    network: Network,
    prompts: Sequence[str],
    similarity: Similarity,
    config: MemorizationConfig,
    sampler: SamplerConfig,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Prompt -> share of copies among its images, for distinct prompts.

    Seeds depend on the prompt alone, so other prompts do not change a prompt's share.
    """
    prompts = list(dict.fromkeys(prompts))
    generators = [
        generator_for(seed, "copies", prompt, i) for prompt in prompts for i in range(config.pictures)
    ]
    repeated = [prompt for prompt in prompts for _ in range(config.pictures)]
    are_copies = _are_copies(network, repeated, generators, similarity, config, sampler, check)
    copies = are_copies.view(-1, config.pictures).sum(1).tolist()
    # divided in fp64, so that 3 / 10 equals the threshold 0.3
    return {prompt: number / config.pictures for prompt, number in zip(prompts, copies, strict=True)}


def sorted_captions(
    caption: str, rates: Mapping[str, float], config: MemorizationConfig | None = None
) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """(targets, anchors): the caption and paraphrases to forget, and anchor captions by ascending rate.

    Args:
        caption: prompt that gives the memorized image.
        rates: share of copies of the caption and of every paraphrase.
        config: thresholds.

    Raises:
        ConceptError: the caption's rate is low enough for an anchor, or there are too few anchors.
    """
    config = config or MemorizationConfig()
    if rates[caption] <= config.anchor_rate:
        raise ConceptError(
            f"{caption!r} draws the memorized image in only {rates[caption]:.0%} of its images, which "
            "leaves nothing to forget; check the caption, the image and how they are compared."
        )
    targets = [
        caption,
        *(prompt for prompt, rate in rates.items() if prompt != caption and rate >= config.target_rate),
    ]
    forgotten = [Concept(prompt, "memorized") for prompt in targets]
    anchors = sorted(
        (prompt for prompt, rate in rates.items() if rate <= config.anchor_rate), key=rates.__getitem__
    )
    anchors = [
        prompt for prompt in anchors if not any(concept.mentioned_in(prompt) for concept in forgotten)
    ][: config.most_anchors]
    if len(anchors) < config.fewest_anchors:
        raise ConceptError(
            f"Only {len(anchors)} of {len(rates) - 1} paraphrases of {caption!r} can be anchors, where "
            f"{config.fewest_anchors} are needed: they must draw the image in at most "
            f"{config.anchor_rate:.0%} of theirs and not contain what is forgotten; add paraphrases that "
            "say it in quite other words."
        )
    return tuple(replace(concept, anchor=anchors[0]) for concept in forgotten), tuple(anchors)


def captions_without_copies(
    network: Network,
    anchors: Sequence[str],
    similarity: Similarity,
    config: MemorizationConfig,
    sampler: SamplerConfig,
    count: int,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> tuple[str, ...]:
    """One caption per anchor image of a request, such that no image is a copy.

    Captions are taken in turn; where an image would be a copy, the next caption is tried with its seed.

    Raises:
        ConceptError: every caption gives a copy for one of the images.
    """
    chosen: dict[int, str] = {}
    for turn in range(len(anchors)):
        missing = {i: anchors[(i + turn) % len(anchors)] for i in range(count) if i not in chosen}
        if not missing:
            break
        generators = [anchor_generator(seed, i) for i in missing]
        are_copies = _are_copies(network, [*missing.values()], generators, similarity, config, sampler, check)
        chosen |= {
            i: prompt
            for (i, prompt), is_copy in zip(missing.items(), are_copies.tolist(), strict=True)
            if not is_copy
        }
    if len(chosen) < count:
        raise ConceptError(
            f"{count - len(chosen)} of {count} anchor images are copies of the memorized one whichever of "
            f"the {len(anchors)} anchors draws them; add paraphrases, or change the anchors' seed."
        )
    return tuple(chosen[i] for i in range(count))


def _are_copies(
    network: Network,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    similarity: Similarity,
    config: MemorizationConfig,
    sampler: SamplerConfig,
    check: Callable[[], None],
) -> Tensor:
    """Boolean (n,): whether the image sampled for each prompt is a copy."""
    latents = sample_latents(network, prompts, generators, sampler, lambda done: check())
    with network.with_autoencoder():
        values = [
            similarity(network.decode(part.to(network.device))).cpu()
            for part in latents.split(network.family.sampling_batch)
        ]
    return torch.cat(values) > config.copy_similarity
