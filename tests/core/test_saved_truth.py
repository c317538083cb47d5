"""A written file tells the truth about itself: hashes and pictures of the source, and what rounding keeps."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_layout import sd2_shapes, write_hollow, xl_shapes

from cul_core.base.errors import ConfigError
from cul_core.cli import main
from cul_core.files.safetensors_format import read_header
from cul_core.models.recognize import detect_family
from cul_core.output.checkpoint import difference, kept_by_rounding, open_model, rounded, save_checkpoint
from cul_core.requests.presets import Preset, preset
from cul_core.requests.resolve import Overrides, adapt

KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def edited_copy(path, source, scale, dtype=None, metadata=None):
    """A model of a copy of a checkpoint with one edit of normal values times `scale`."""
    tensors = load_file(source)
    if dtype is not None:
        tensors = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()
        }
    save_file(tensors, path, metadata=metadata)
    model = open_model(path)
    edit = torch.randn(tensors[KEY].shape, generator=torch.Generator().manual_seed(0)) * scale
    return type(model)(model.source, model.family, {KEY: edit})


# --- identity


STALE = {
    "modelspec.hash_sha256": "0xaaaa",
    "sshs_model_hash": "bbbb",
    "sshs_legacy_hash": "cccc",
    "modelspec.thumbnail": "data:image/jpeg;base64,x",
    "thumbnail": "x",
    "ssmd_cover_images": "[]",
    "SHA256": "dddd",
    "prompt": "{}",
    "workflow": "{}",
}
KEPT = {
    "format": "pt",
    "modelspec.title": "Foo",
    "modelspec.author": "Bar",
    "ss_sd_model_hash": "of the base it was trained from",
    "modelspec.prediction_type": "epsilon",
}


def test_what_identifies_or_shows_the_source_is_not_inherited(random_checkpoint, tmp_path):
    model = edited_copy(tmp_path / "a.safetensors", random_checkpoint, 0.1, metadata=STALE | KEPT)
    _, metadata, _ = read_header(save_checkpoint(model, tmp_path / "b.safetensors"))
    assert not metadata.keys() & STALE.keys()
    assert KEPT.items() <= metadata.items() and "cul_source" in metadata


def test_metadata_that_the_user_allows_are_written(random_checkpoint, tmp_path):
    model = edited_copy(tmp_path / "a.safetensors", random_checkpoint, 0.1, metadata=STALE)
    _, metadata, _ = read_header(
        save_checkpoint(model, tmp_path / "b.safetensors", metadata={"prompt": "mine"})
    )
    assert metadata["prompt"] == "mine" and "workflow" not in metadata


# --- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -0.3, 1e-3, 0.0, 1000.5])
def test_stochastic_rounding_takes_one_of_two_neighbours_and_is_exact_on_average(value, dtype):
    values = torch.full((40_000,), value) * 1.0007 + 1e-6
    found = rounded(values, dtype, torch.Generator().manual_seed(0))
    assert found.dtype == dtype and len(found.unique()) <= 2
    exact, spread = values[0].double().item(), found.double().std().item()
    assert abs(found.double().mean().item() - exact) <= 5 * spread / len(values) ** 0.5 + 1e-12
    low, high = found.double().min().item(), found.double().max().item()
    assert low <= exact <= high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_the_dtype_holds_are_not_changed(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    assert torch.equal(rounded(values, dtype, torch.Generator().manual_seed(1)).float(), values)


def kept(path, model):
    got = difference(path, model.source.path).get(KEY, torch.zeros(1))
    return ((got * model.edits[KEY]).sum() / model.edits[KEY].square().sum()).item()


@pytest.mark.parametrize(
    ("dtype", "scale", "said"),
    [
        (torch.bfloat16, 2e-5, "at random"),
        (torch.bfloat16, 1e-4, "at random"),
        (torch.float16, 2e-6, "at random"),
        (torch.float16, 1e-3, "The file's precision keeps 100.0% of the edit."),
        (torch.float32, 1e-5, "The file's precision keeps 100.0% of the edit."),
    ],
)
def test_what_a_file_keeps_is_said_and_no_edit_is_rounded_away(
    dtype, scale, said, random_checkpoint, tmp_path
):
    model, messages = edited_copy(tmp_path / "a.safetensors", random_checkpoint, scale, dtype), []
    path = save_checkpoint(model, tmp_path / "b.safetensors", on_message=messages.append)
    assert len(messages) == 1 and said in messages[0]
    nearest = save_checkpoint(model, tmp_path / "c.safetensors", rounding="nearest")
    assert kept(nearest, model) == pytest.approx(kept_by_rounding(model), abs=1e-6)
    assert kept(path, model) == pytest.approx(1.0, abs=0.1)
    if "at random" in said:
        assert f"would keep {kept(nearest, model):.1%}" in messages[0] and kept(nearest, model) < 0.98


def test_equal_models_make_equal_files_whatever_the_rounding(random_checkpoint, tmp_path):
    model = edited_copy(tmp_path / "a.safetensors", random_checkpoint, 2e-5, torch.bfloat16)
    paths = [save_checkpoint(model, tmp_path / "b.safetensors", rounding="stochastic") for _ in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert save_checkpoint(model, tmp_path / "c.safetensors").read_bytes() == paths[0].read_bytes()
    with pytest.raises(ConfigError, match="choose one of auto, nearest, stochastic"):
        save_checkpoint(model, tmp_path / "d.safetensors", rounding="up")


def test_the_command_line_says_what_the_file_keeps(random_checkpoint, tmp_path, monkeypatch, capsys):
    full, out = Preset.request, str(tmp_path / "a.safetensors")
    monkeypatch.setattr(Preset, "request", lambda self, *a, **k: replace(full(self, *a, **k), anchor_count=2))
    command = ["unlearn", "Lava", "--model", str(random_checkpoint), "--preset", "plain", "--iterations", "1"]
    assert main([*command, "--rounding", "nearest", "--out", out]) == 0
    assert "The file's precision keeps" in capsys.readouterr().out


# --- distilled models


DISTILLED = (
    "sd_xl_turbo_1.0_fp16",
    "sdxl_lightning_4step",
    "Hyper-SDXL-8steps-CFG",
    "dreamshaperXL_v21TurboDPMSDE",
    "realvisxlV40_v40LightningBakedvae",
    "dreamshaper_8LCM",
    "sdxl-dmd2-4step",
    "model.tcd",
)
OTHERS = ("sd_xl_base_1.0", "hyperrealistic", "v1-5-pruned-emaonly", "alchemist", "dreamshaper_8", "welcome")


@pytest.mark.parametrize("name", [*DISTILLED, *OTHERS])
def test_a_distilled_model_is_told_by_its_name(name, tmp_path):
    family = detect_family(write_hollow(tmp_path / f"{name}.safetensors", xl_shapes()))
    sampler = preset("plain").for_family(family).anchor_sampler
    assert family.is_distilled == (name in DISTILLED)
    assert (sampler.steps, sampler.guidance_scale) == ((8, 1.0) if name in DISTILLED else (25, 6.0))


def test_a_distilled_model_is_told_by_its_metadata(random_checkpoint, tmp_path):
    tensors = load_file(random_checkpoint)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"modelspec.title": "Foo XL Turbo"})
    save_file(
        tensors, tmp_path / "b.safetensors", metadata={"cul_source": '{"name":"sdxl_lightning.safetensors"}'}
    )
    save_file(tensors, tmp_path / "c.safetensors", metadata={"modelspec.description": "no turbo"})
    found = [detect_family(tmp_path / f"{letter}.safetensors").is_distilled for letter in "abc"]
    assert found == [True, True, False]


def test_what_the_user_sets_wins_over_a_distilled_model(tmp_path):
    family = detect_family(write_hollow(tmp_path / "sd_turbo.safetensors", sd2_shapes()))
    set_by_user = Overrides(training={"anchor_steps": 4, "anchor_guidance": 2.0})
    sampler = adapt("plain", family, set_by_user).anchor_sampler
    assert (sampler.steps, sampler.guidance_scale) == (4, 2.0)
    with pytest.raises(ConfigError, match="guidance_scale is 0.5"):
        adapt("plain", family, Overrides(training={"anchor_guidance": 0.5}))


def test_the_command_line_warns_of_a_distilled_model(random_checkpoint, tmp_path, capsys):
    path = tmp_path / "mini-turbo.safetensors"
    path.write_bytes(random_checkpoint.read_bytes())
    command = ["unlearn", "Lava", "--model", str(path), "--preset", "esd", "--iterations", "0"]
    assert main([*command, "--anchor-guidance", "1", "--out", str(tmp_path / "a.safetensors")]) == 0
    assert "looks like a distilled model" in capsys.readouterr().err
