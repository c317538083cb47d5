"""Scaled, shifted and mirrored anchor images: where they lie, what is said of them, and what of them
counts."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from sd_layout import autoencoder_shapes, write_random
from torch import nn

from cul_core.base.errors import Cancelled, ModelError
from cul_core.models.diffusers_network import DiffusersNetwork
from cul_core.models.families.sd1 import SD1
from cul_core.models.families.sd2 import SD2
from cul_core.models.families.sdxl import SDXL
from cul_core.models.load_diffusers import _kl_autoencoder, load_autoencoder
from cul_core.models.sampling import SamplerConfig, generator_for, sample_latents
from cul_core.parts.anchor_augmentation import Placement, anchor_pool


def drawn(frame_px, count=600):
    generator = torch.Generator().manual_seed(0)
    return [Placement.draw(frame_px, generator) for _ in range(count)]


@pytest.mark.parametrize("frame_px", [64, 512])
def test_two_pictures_of_three_are_smaller_than_the_frame_and_lie_in_it_and_the_others_cover_it(frame_px):
    small = [place for place in drawn(frame_px) if place.size_px <= frame_px]
    large = [place for place in drawn(frame_px) if place.size_px > frame_px]
    # 396 of 600 expected, with a standard deviation of sqrt(600 * 0.66 * 0.34) = 11.6
    assert abs(len(small) - 396) < 58
    assert all(
        frame_px / 3 <= place.size_px and 0 <= place.top_px <= frame_px - place.size_px for place in small
    )
    assert all(
        1.2 * frame_px <= place.size_px <= 1.4 * frame_px and frame_px - place.size_px <= place.left_px <= 0
        for place in large
    )
    assert (
        min(place.size_px for place in small) < 0.4 * frame_px
        and max(place.size_px for place in small) > 0.95 * frame_px
    )


@pytest.mark.parametrize(
    ("size_px", "said"),
    [(38, {"A far away ", "A very small "}), (39, {""}), (64, {""}), (77, {"A zoomed in ", "A close up "})],
)  # 0.6 * 64 = 38.4
def test_captions_say_the_scale(size_px, said):
    generator = torch.Generator().manual_seed(0)
    assert {Placement(64, size_px).prefix(generator) for _ in range(40)} == said


def test_a_small_picture_lies_on_grey_and_a_large_one_is_cut():
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 32:] = 1  # its right half is white
    small = Placement(64, 32, top_px=8, left_px=16).apply(picture)
    assert small.shape == picture.shape
    assert (small[..., 8:40, 16:30] == 0).all() and (small[..., 8:40, 34:48] == 1).all()
    small[..., 8:40, 16:48] = 0.5
    assert (small == 0.5).all()
    large = Placement(64, 80, top_px=-16, left_px=-10).apply(picture)  # white from 40 - 10 on
    assert (large[..., :28] == 0).all() and (large[..., 32:] == 1).all()


@pytest.mark.parametrize(
    ("place", "margin", "rows", "columns"),
    [
        (Placement(64, 64), 0, (0, 8), (0, 8)),
        (Placement(64, 64), 1, (1, 7), (1, 7)),
        (Placement(64, 32, 8, 16), 0, (1, 5), (2, 6)),
        (Placement(64, 32, 9, 15), 0, (2, 5), (2, 5)),  # pixels 9 to 41 and 15 to 47
        (Placement(64, 32, 8, 16), 1, (2, 4), (3, 5)),
        (Placement(64, 80, -16, -3), 1, (0, 8), (0, 8)),  # no side of the picture is in the frame
    ],
)
def test_latent_cells_count_that_lie_wholly_in_the_picture(place, margin, rows, columns):
    expected = torch.zeros(8, 8)
    expected[slice(*rows), slice(*columns)] = 1
    assert torch.equal(place.mask(8, margin), expected)


def test_without_augmentation_the_pool_is_the_anchors_themselves():
    latents = torch.randn(2, 4, 8, 8)
    network = DiffusersNetwork(SD1, nn.Linear(1, 1), (), None, None)  # nothing can be decoded
    pool = anchor_pool(
        network, latents, versions=0, flip=False, border=True, generator=partial(generator_for, 0)
    )
    assert (
        pool.latents is latents
        and pool.masks is None
        and [*pool.anchors] == [0, 1]
        and pool.prefixes == ["", ""]
    )


@pytest.fixture(scope="module")
def anchor_latents(shipped_network):
    return sample_latents(
        shipped_network, ["a star", "a boat"], [generator_for(0, i) for i in range(2)], SamplerConfig(steps=4)
    )


def test_flipping_alone_keeps_the_anchors_bits_and_adds_their_mirror_images(shipped_network, anchor_latents):
    pool = anchor_pool(
        shipped_network,
        anchor_latents,
        versions=0,
        flip=True,
        border=False,
        generator=partial(generator_for, 0),
    )
    assert pool.anchors == [0, 0, 1, 1] and pool.masks is None
    assert torch.equal(pool.latents[::2], anchor_latents)
    before, mirrored = shipped_network.decode(anchor_latents), shipped_network.decode(pool.latents[1::2])
    assert (mirrored.flip(-1) - before).abs().mean() < 0.5 * (mirrored - before).abs().mean()


def test_versions_are_in_both_orientations_with_their_masks_and_each_anchors_do_not_depend_on_the_others(
    shipped_network, anchor_latents
):
    make = partial(
        anchor_pool, shipped_network, versions=2, flip=True, border=False, generator=partial(generator_for, 0)
    )
    pool, alone = make(anchor_latents), make(anchor_latents[:1])
    assert pool.anchors == [0] * 4 + [1] * 4 and pool.prefixes[:2] == pool.prefixes[2:4]
    assert torch.equal(pool.masks[:2].flip(-1), pool.masks[2:4])
    assert torch.equal(pool.latents[:4], alone.latents) and len(pool.latents.flatten(1).unique(dim=0)) == 8


def test_making_versions_can_be_cancelled(shipped_network, anchor_latents):
    def stop():
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        anchor_pool(
            shipped_network, anchor_latents, versions=1, flip=False, border=False, generator=None, check=stop
        )


# --- Stable Diffusion's autoencoder


SMALL = SD1.config("vae") | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}
SMALL_SHAPES = autoencoder_shapes(width=32, multiples=(1, 1, 2, 2), blocks=1)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("vae") / "small.safetensors", SMALL_SHAPES)


@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.name)
def test_autoencoder_of_stable_diffusion_fits_its_layout(family):
    tensors = {name: torch.empty(shape, device="meta") for name, shape in autoencoder_shapes().items()}
    autoencoder = _kl_autoencoder(tensors, family.config("vae"))
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_653_863  # as published
    assert autoencoder.config.scaling_factor == family.latent_scale


def test_autoencoder_is_loaded_for_the_pool_and_freed_after_it(small_file):
    opened = []

    def open_it():
        opened.append(load_autoencoder(small_file, SMALL))
        return opened[-1]

    family = replace(SD1, image_size_px=64, latent_shape=(4, 8, 8))
    network, latents = (
        DiffusersNetwork(family, nn.Linear(1, 1), (), None, None, open_autoencoder=open_it),
        torch.zeros(1, 4, 8, 8),
    )
    make = partial(
        anchor_pool, network, latents, flip=False, border=False, generator=partial(generator_for, 0)
    )
    make(versions=0)
    assert not opened
    pool = make(versions=1)
    assert len(opened) == 1 and network.autoencoder is None
    place = Placement.draw(64, generator_for(0, "augmentation", 0))
    picture = (opened[0].decode(latents).sample / 2 + 0.5).clamp(0, 1)
    posterior = opened[0].encode(place.apply(picture) * 2 - 1).latent_dist
    spread = (pool.latents / SD1.latent_scale - posterior.mean).div(posterior.std).std()
    # a sample of the posterior: 256 values, so a standard error of 1 / sqrt(512) = 0.04
    assert 0.8 < spread < 1.2


def test_autoencoder_that_a_file_lacks_is_refused_by_name(tmp_path):
    partly = {name: shape for name, shape in SMALL_SHAPES.items() if "decoder" not in name}
    path = write_random(tmp_path / "half.safetensors", partly)
    with pytest.raises(
        ModelError, match="'half.safetensors' does not fit.*AutoencoderKL weights are incomplete"
    ):
        load_autoencoder(path, SMALL)
