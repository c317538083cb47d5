"""Small models with the layout of Stable Diffusion 2.x and XL: what their networks are told, how they train,
and what is written."""

import json
import tomllib
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sd_layout import UNET, sd2_shapes, write_hollow, xl_shapes
from short import SHORT

import cul_core
from cul_core.base.errors import ModelError
from cul_core.files.safetensors_format import read_header
from cul_core.methods import METHODS
from cul_core.methods.conabl import ConAblConfig
from cul_core.methods.esd import ESDConfig
from cul_core.models.build_diffusers import build_unet
from cul_core.models.diffusers_network import DiffusersNetwork
from cul_core.models.discrete_process import DiscreteProcess
from cul_core.models.families.sdxl import SDXL
from cul_core.models.family import FAMILIES
from cul_core.models.load_diffusers import load_network
from cul_core.models.recognize import detect_family
from cul_core.models.sampling import SamplerConfig, generator_for, sample_latents
from cul_core.models.text_conditioning import Conditioning
from cul_core.models.trajectory_buffer import run_trajectory
from cul_core.models.weight_roles import ROLES, keys_with_role
from cul_core.output.checkpoint import difference, open_model, save_checkpoint
from cul_core.output.lora import save_difference, save_lora
from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFTConfig
from cul_core.store.anchors import AnchorStore
from cul_core.training.callbacks import Callbacks
from cul_core.training.memory_plan import count_passes, network_hash, table_key, table_path
from cul_core.training.step import run_step

ESD = ESDConfig(trajectories=2, trajectory_steps=4)
only_xl = pytest.mark.parametrize("tiny_model", ["sdxl"], indirect=True)


@pytest.fixture(scope="session")
def tiny_anchors():
    return AnchorStore()


@pytest.fixture
def step(tiny_model, tiny_networks, tiny_anchors):
    networks = tiny_networks[tiny_model.family.name]
    return lambda request, **options: run_step(
        tiny_model, request, store=tiny_anchors, networks=networks, **options
    )


@contextmanager
def unet_calls(network):
    """(latents, keyword arguments) of every call."""
    seen = []
    handle = network.unet.register_forward_pre_hook(
        lambda module, inputs, named: seen.append((inputs[0], named)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def configs(registry):
    return [entry.config(**SHORT.get(entry.name, {})) for entry in registry]


# --- what the network is told


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_larger_families_have_all_the_weights_that_methods_and_regularizers_need(name):
    for entry in (*METHODS, *REGULARIZERS):
        assert ROLES & set(entry.cls.needs) <= FAMILIES[name].roles.keys()


@only_xl
def test_every_call_of_the_network_gets_each_prompts_own_pooled_vector_and_the_pictures_size(
    step, tiny_network, make_request
):
    callbacks = Callbacks(preview_prompts=("a cat",), preview_every=3)
    regularizers = [SelFTConfig(states=2), ProjectionConfig()]
    with unet_calls(tiny_network) as seen:
        step(
            make_request("Lava", method=ConAblConfig(), regularizers=regularizers, seed=1),
            callbacks=callbacks,
        )
        step(make_request("Lava", method=ESD), callbacks=callbacks)
    known = tiny_network.encode(list(tiny_network._prompts))
    assert len(known) > 5 and len(set(map(tuple, known.pooled.tolist()))) == len(known)
    used = set()
    for latents, named in seen:
        text, added = named["encoder_hidden_states"], named["added_cond_kwargs"]
        # height, width, top, left, target height, target width
        assert added["time_ids"].tolist() == len(latents) * [[1024, 1024, 0, 0, 1024, 1024]]
        assert added["text_embeds"].shape == (len(latents), 64) and len(text) == len(latents)
        for row, pooled in zip(text, added["text_embeds"], strict=True):
            (number,) = (known.text == row).all(-1).all(-1).nonzero().flatten().tolist()
            assert torch.equal(pooled, known.pooled[number])
            used.add(number)
    assert len(used) > 5 and list(tiny_network._prompts).index("") in used


def test_pooled_text_and_size_are_as_wide_as_the_full_network_reads_them():
    assert SDXL.config("text_encoder_2")["projection_dim"] == 1280
    assert (
        SDXL.config("unet")["projection_class_embeddings_input_dim"]
        == 1280 + 6 * SDXL.config("unet")["addition_time_embed_dim"]
    )


@only_xl
def test_a_prompt_is_the_first_encoders_rows_beside_the_seconds(tiny_network):
    ids = tiny_network.token_ids(["a cat", ""])
    assert ids[1].tolist() == [966] + 76 * [967]
    first, second = tiny_network.open_text_encoders()
    padded = ids.clone()
    padded[0, 4:], padded[1, 2:] = 0, 0  # start, a, cat, end; start, end
    with torch.no_grad():
        one, other = first(ids, output_hidden_states=True), second(padded, output_hidden_states=True)
    encoded = tiny_network.encode(["a cat", ""])
    # of three layers, after the second
    rows = torch.cat([one.hidden_states[2], other.hidden_states[2]], -1)
    torch.testing.assert_close(encoded.text, rows)
    torch.testing.assert_close(encoded.pooled, other.text_embeds)
    assert encoded.text.shape == (2, 77, 128) and encoded[0].text.shape == (1, 77, 128)


# --- training


@pytest.mark.parametrize(
    ("method", "regularizers"),
    [
        *((method, []) for method in configs(METHODS)),
        *((ESD, [regularizer]) for regularizer in configs(REGULARIZERS)),
    ],
    ids=lambda value: (
        value.registry_name if not isinstance(value, list) else value[0].registry_name if value else "alone"
    ),
)
def test_methods_and_regularizers_train_it_and_change_only_their_group(
    method, regularizers, step, tiny_network, make_request
):
    edited, report = step(make_request(method=method, regularizers=regularizers, iterations=2))
    group = tiny_network.weights(METHODS.of(method).cls.role or "text_readers")
    assert edited.edits and set(edited.edits) <= set(group)
    assert all(torch.isfinite(torch.tensor(report.losses)))


@only_xl
def test_erasing_lowers_the_loss_and_changes_only_its_group(step, tiny_network, make_request):
    # every update has the same state
    method = ESDConfig(trajectories=1, trajectory_steps=1, erase_from="a house")
    edited, report = step(
        make_request("Denim", method=method, iterations=15, learning_rate=2e-3, group="attn2")
    )
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert edited.edits and set(edited.edits) <= set(tiny_network.weights("cross_attention"))


# --- files


@pytest.fixture
def edited(step, make_request):
    return step(make_request(method=ESD, iterations=1, learning_rate=1e-2))[0]


def test_saved_checkpoint_has_every_other_byte_of_its_source_and_opens_again(tiny_model, edited, tmp_path):
    path = save_checkpoint(edited, tmp_path / "edited.safetensors")
    (before, _, _), (after, metadata, _) = read_header(tiny_model.source.path), read_header(path)
    assert before == after and "cul_history" in metadata and "model_ema.decay" in after
    old, new = load_file(tiny_model.source.path), load_file(path)
    assert {key for key in old if not torch.equal(old[key], new[key])} == set(edited.edits)
    rounded = difference(path, tiny_model.source.path)
    for name, delta in edited.edits.items():
        assert (rounded[name] - delta).abs().max() <= 2**-10  # half an fp16 step of weights below 2
    assert open_model(path).family.name == tiny_model.family.name


def test_edits_are_exported_in_the_hosts_names(tiny_model, edited, tmp_path):
    modules = {key.removeprefix("model.").removesuffix(".weight") for key in edited.edits}
    assert all(module.startswith("diffusion_model.") and ".attn2.to_" in module for module in modules)
    assert load_file(save_difference(edited, tmp_path / "difference.safetensors")).keys() == {
        f"{module}.diff" for module in modules
    }
    saved = save_lora(edited, tmp_path / "lora.safetensors", rank=64)
    leaves = ("lora_up.weight", "lora_down.weight", "alpha")
    assert load_file(saved.path).keys() == {f"{module}.{leaf}" for module in modules for leaf in leaves}
    assert saved.energy == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "width", "pooled"),
    [(sd2_shapes, 1024, None), (xl_shapes, 2048, (2, 1280))],
    ids=["sd2", "sdxl"],
)
def test_full_size_file_is_loaded_and_written_with_one_matrix_changed(
    shapes, width, pooled, clip_tokenizer, tmp_path
):
    """7 GB on the disk and of memory for XL, in bf16; every weight is 0."""
    path = write_hollow(tmp_path / "full.safetensors", shapes())
    encoded = load_network(path, torch.bfloat16, clip_tokenizer).encode(["a cat", ""])
    assert encoded.text.shape == (2, 77, width) and (
        encoded.pooled is None if pooled is None else encoded.pooled.shape == pooled
    )
    model = open_model(path)
    key = min(keys_with_role(model.family, "text_readers", shapes()))
    edit = torch.full(shapes()[key], 0.5)
    with safe_open(
        save_checkpoint(replace(model, edits={key: edit}), tmp_path / "edited.safetensors"), "pt"
    ) as file:
        assert {k for k in file.keys() if file.get_tensor(k).any()} == {key}
        assert torch.equal(file.get_tensor(key), edit.half())
    for written in tmp_path.iterdir():
        written.unlink()  # pytest would keep the gigabytes of three runs


# --- what the network predicts


def marked(source, path, **tensors):
    """A copy of a checkpoint with more tensors."""
    save_file(load_file(source) | tensors, path)
    return path


@only_xl
def test_xl_that_predicts_the_velocity_is_told_by_its_marks(tiny_model, tmp_path):
    mark, path = torch.empty(0), tmp_path / "a.safetensors"
    assert tiny_model.family.process == DiscreteProcess("epsilon")
    for names, noisy in ((["v_pred"], False), (["v_pred", "ztsnr"], True)):
        family = detect_family(marked(tiny_model.source.path, path, **dict.fromkeys(names, mark)))
        assert (family.process.prediction_type, family.process.ends_in_noise) == ("v_prediction", noisy)
    assert load_network(path).family == open_model(path).family == family


def test_sd2_that_predicts_the_velocity_is_told_by_the_spread_of_one_tensor(tmp_path):
    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    path = write_hollow(tmp_path / "a.safetensors", sd2_shapes())
    header, _, start = read_header(path)
    for spread, found in ((0.08, ("epsilon", (4, 64, 64), 512)), (0.1, ("v_prediction", (4, 96, 96), 768))):
        with path.open("r+b") as file:
            file.seek(start + header[name]["data_offsets"][0])
            values = spread * torch.tensor([-1.0, 1.0]).repeat(160)
            file.write(values.half().view(torch.uint8).numpy().tobytes())
        family = detect_family(path)
        assert (family.process.prediction_type, family.latent_shape, family.image_size_px) == found


@only_xl
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"edm_mean": torch.zeros(4)}, "noise schedule of EDM"),
        (
            {f"{UNET}middle_block.1.proj_in.weight": torch.zeros(64, 64, dtype=torch.float8_e4m3fn)},
            "8 bits.*choose the fp16",
        ),
    ],
    ids=["edm", "fp8"],
)
def test_checkpoint_that_cannot_be_edited_is_refused_with_the_reason(more, said, tiny_model, tmp_path):
    with pytest.raises(ModelError, match=f"'a.safetensors' .*{said}"):
        detect_family(marked(tiny_model.source.path, tmp_path / "a.safetensors", **more))


@pytest.mark.parametrize(
    ("predicted", "noisy"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_sampling_finds_the_picture_of_a_network_that_knows_it(predicted, noisy):
    """Whatever z_t is, the network knows the picture x in it: noise e = (z - a x) / s, velocity a e - s x =
    (a z - x) / s."""
    process = DiscreteProcess(predicted, noisy)
    family = replace(SDXL, process=process, latent_shape=(4, 8, 8))
    picture = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(latents, timesteps, embeddings):
        signal, sigma = process.coefficients(timesteps.long().expand(len(latents)))
        return (
            (latents - signal * picture) if predicted == "epsilon" else (signal * latents - picture)
        ) / sigma

    prompts = Conditioning(torch.zeros(1, 77, 8))
    network = SimpleNamespace(
        device="cpu",
        family=family,
        process=process,
        encode=lambda texts: prompts.expand(len(texts)),
        predict=predict,
    )
    (sampled,) = sample_latents(
        network, ["a cat"], [generator_for(0)], SamplerConfig(steps=6, guidance_scale=1.0)
    )
    torch.testing.assert_close(sampled, picture, atol=2e-3, rtol=0)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    kept = run_trajectory(predict, prompts, prompts, noise, process.trajectory(5), 1.0)
    signal, sigma = process.coefficients(kept.times)
    # deterministic DDIM keeps picture and noise as they are in the first state
    first = (noise - signal[0] * picture) / sigma[0]
    torch.testing.assert_close(kept.states.float(), signal * picture + sigma * first, atol=3e-3, rtol=0)


# --- what a step takes


COUNTED = [family for family in FAMILIES.values() if family.text_encoders and not family.is_small]


def by_name(family):
    return family.name


@pytest.mark.parametrize("family", COUNTED, ids=by_name)
def test_counts_kept_beside_a_family_are_of_its_network_as_it_is(family):
    values = json.loads(table_path(family).read_text(encoding="utf-8"))
    assert values["network"] == network_hash(family), "run benchmarks/count_passes.py"
    assert values["passes"].keys() >= {
        table_key(dtype, "kv", is_checkpointed)
        for dtype in (torch.bfloat16, torch.float32)
        for is_checkpointed in (False, True)
    }


def test_counts_are_among_the_files_of_the_package():
    package = Path(cul_core.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["cul_core"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert len(COUNTED) > 2 and {table_path(family) for family in COUNTED} <= packed


@pytest.mark.slow
@pytest.mark.parametrize("family", COUNTED, ids=by_name)
def test_counts_kept_beside_a_family_are_what_its_network_takes(family):
    kept = json.loads(table_path(family).read_text(encoding="utf-8"))["passes"]
    network = DiffusersNetwork(family, build_unet(family), (), None, None).blank(torch.bfloat16)
    counted = count_passes(network, "kv", 1, False)
    assert asdict(counted) == kept[table_key(torch.bfloat16, "kv", False)]
