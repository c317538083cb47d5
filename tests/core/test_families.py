"""Model families: told apart by shapes, refused with what was found, loaded from every layout, and trained at
full size."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from flow_layout import flux_shapes, sd3_shapes
from safetensors.torch import load_file, save_file
from sd_layout import (
    SD2_TEXT,
    TEXT,
    UNET,
    autoencoder_shapes,
    checkpoint_shapes,
    open_clip_shapes,
    sd2_shapes,
    text_shapes,
    unet_shapes,
    write_hollow,
    write_random,
    xl_shapes,
)
from torch import nn

from cul_core.base.errors import Cancelled, CheckpointError, ModelError
from cul_core.cli import main
from cul_core.concepts.concept import Concept
from cul_core.files.safetensors_format import read_header
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.methods import METHODS
from cul_core.minicanvas.family import MINI
from cul_core.models.build_diffusers import build_text_encoder, build_unet
from cul_core.models.diffusers_network import DiffusersNetwork
from cul_core.models.families.sd1 import SD1
from cul_core.models.families.sd2 import SD2
from cul_core.models.families.sdxl import SDXL
from cul_core.models.family import FAMILIES
from cul_core.models.load_diffusers import (
    NetworkCache,
    checkpoint_key_map,
    load_network,
    load_tokenizer,
    text_tensors,
)
from cul_core.models.recognize import detect_family, family_of, stored_dtypes
from cul_core.models.sampling import SamplerConfig
from cul_core.models.source import source_of
from cul_core.models.weight_roles import ROLES, keys_with_role
from cul_core.output.checkpoint import difference, open_model, save_checkpoint
from cul_core.output.drift import drift_of, short_name
from cul_core.output.lora import save_difference, save_lora
from cul_core.parts.prompt_vectors import prompt_rows
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.weight_anchor import L1SPConfig, L2SPConfig
from cul_core.requests.presets import PRESETS, preset
from cul_core.requests.request import Request
from cul_core.store.anchors import AnchorStore
from cul_core.training.memory_plan import count_passes, passes
from cul_core.training.step import run_step


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The header of Stable Diffusion 1.x: enough for all that happens before weights are read."""
    monkeypatch.setattr("cul_core.models.source._sha256", lambda *_: "0" * 64)  # of two gigabytes
    return write_hollow(tmp_path / "sd15.safetensors", checkpoint_shapes())


# --- recognition


def test_family_is_recognized_by_shapes(random_checkpoint):
    emas = {
        key.replace(UNET, "model_ema.diffusion_model").replace(".", ""): shape
        for key, shape in unet_shapes().items()
    }
    assert family_of(checkpoint_shapes(), "a") is SD1
    assert family_of(sd2_shapes(), "a") is SD2
    assert family_of(xl_shapes(), "a") is SDXL
    assert (
        family_of(checkpoint_shapes(level="") | emas | {"betas": (1000,), "model_ema.decay": ()}, "a") is SD1
    )
    assert detect_family(random_checkpoint) is MINI


def test_every_family_is_told_apart_and_complete():
    loadable = [family for family in FAMILIES.values() if family.text_encoders]
    assert {family.name for family in loadable} == {"sd1", "sd2", "sdxl", "mini", "mini_large"}
    assert len({family.signature for family in loadable}) == len(loadable)
    for family in loadable:
        unet = family.config("unet")
        assert (unet["block_out_channels"][0], unet["cross_attention_dim"]) == family.signature
        assert (unet["in_channels"], unet["sample_size"], unet["sample_size"]) == family.latent_shape
        assert (
            sum(family.config(kind.config)["hidden_size"] for kind in family.text_encoders)
            == family.signature[1]
        )
        assert family.tokenizer_folder is None or family.tokenizer_folder.is_dir()


FLOWS = {"sd3": sd3_shapes(192, 192), "flux": flux_shapes(192, 192)}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "net.", "model.", ""])
def test_flow_transformers_are_recognized_read_and_written_under_every_prefix(name, prefix, tmp_path):
    shapes = {prefix + key: shape for key, shape in FLOWS[name].items()}
    path = write_random(tmp_path / "flow.safetensors", shapes)
    family, source = detect_family(path), source_of(path)
    assert family.name == name and stored_dtypes(path, family) == "fp16"
    keys = [UNET + key for key in FLOWS[name]]
    assert all(keys_with_role(family, role, keys) for role in family.roles)
    (reader,) = keys_with_role(family, "text_readers", keys)
    ((key, tensor),) = source.read([reader])
    assert key == reader and tensor.shape == FLOWS[name][reader.removeprefix(UNET)]
    with pytest.raises(ModelError, match="runs only in ComfyUI"):
        load_network(path)
    model = UnlearnModel(source, family, {reader: torch.full(tensor.shape, 0.5)})
    original, saved = load_file(path), load_file(save_checkpoint(model, tmp_path / "edited.safetensors"))
    assert list(saved) == list(original)
    (changed,) = (name for name, tensor in saved.items() if not torch.equal(tensor, original[name]))
    assert changed == prefix + reader.removeprefix(UNET)
    assert torch.equal(saved[changed], (original[changed].float() + 0.5).half())


def test_a_source_whose_layout_is_not_that_of_the_network_is_not_written(tmp_path):
    path = write_random(tmp_path / "flow.safetensors", FLOWS["flux"])
    edits = {f"{UNET}other.weight": torch.ones(2)}
    model = UnlearnModel(source_of(path), detect_family(path), edits)
    with pytest.raises(CheckpointError, match="another layout than its network.*save a LoRA"):
        save_checkpoint(model, tmp_path / "edited.safetensors")
    with pytest.raises(ModelError, match="has no weight 'model.diffusion_model.other.weight'"):
        list(model.source.read(edits))


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (
            unet_shapes(in_channels=9),
            r"9 input channels \(inpainting\), where Stable Diffusion 1.x has 4: inp.*choose the text-to",
        ),
        (unet_shapes(in_channels=8), "8 input channels"),
        (
            unet_shapes(1024, in_channels=5),
            r"5 input channels \(depth-to-image\), where Stable Diffusion 2.x has 4",
        ),
        (unet_shapes(1024, linear=True, pooled=2048), "is an unCLIP checkpoint.*choose the text-to-image"),
        (
            unet_shapes(1280, width=384),
            r"width 384 and text width 1280 \(the Stable Diffusion XL refiner\).*choose.*Stable Diffusion XL",
        ),
        (unet_shapes(context=512), "width 320 and text width 512, which is no supported"),
        (
            text_shapes() | autoencoder_shapes(),
            "holds no Stable Diffusion UNet.*choose.*Stable Diffusion 1.x.*MiniCanvas",
        ),
    ],
    ids=["inpainting", "picture-to-picture", "depth", "unclip", "refiner", "unknown", "no-unet"],
)
def test_other_architecture_is_refused_with_what_was_found(shapes, said, tmp_path):
    with pytest.raises(ModelError, match=f"'other.safetensors' .*{said}"):
        detect_family(write_hollow(tmp_path / "other.safetensors", shapes))


# --- key maps


@pytest.mark.parametrize(
    ("family", "file", "tensors", "matrices", "values"),
    [
        (SD1, checkpoint_shapes, 686, 32, 19_169_280),
        (SD2, sd2_shapes, 686, 32, 25_559_040),
        (SDXL, xl_shapes, 1680, 140, 340_787_200),
    ],
    ids=["sd1", "sd2", "sdxl"],
)
def test_unet_keys_of_stable_diffusion_map_one_to_one(family, file, tensors, matrices, values, tmp_path):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(family.config("unet"))
    emas = {
        key.replace(UNET, "model_ema.diffusion_model").replace(".", ""): (1,)
        for key in file()
        if key.startswith(UNET)
    }
    shapes = {key: shape for key, shape in file().items() if key.startswith(UNET)}
    keys = checkpoint_key_map(write_hollow(tmp_path / "a.safetensors", file() | emas))
    assert len(keys) == tensors and set(keys.values()) == set(shapes)
    assert {name: shapes[key] for name, key in keys.items()} == {
        name: tuple(w.shape) for name, w in unet.state_dict().items()
    }
    kv = keys_with_role(family, "text_readers", keys.values())
    assert len(kv) == matrices and sum(math.prod(shapes[key]) for key in kv) == values


@pytest.mark.parametrize("level", ["text_model.", ""], ids=["new-file", "old-file"])
@pytest.mark.parametrize("ours", ["text_model.", ""], ids=["old-transformers", "new-transformers"])
def test_text_keys_map_from_both_layouts_to_both(level, ours):
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**SD1.config("text_encoder")))
        tensors = {key: torch.empty(shape) for key, shape in (text_shapes(level) | unet_shapes()).items()}
    wanted = {ours + name.removeprefix("text_model."): weight for name, weight in text.state_dict().items()}
    text.state_dict = lambda: wanted
    found = text_tensors(SD1.text_encoders[0], tensors, text)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: weight.shape for name, weight in wanted.items()
    }


@pytest.mark.parametrize(
    ("family", "file", "left_out"),
    [
        # the layer after the rows that are read, and the projection of a vector that is not
        (
            SD2,
            sd2_shapes,
            {key for key in open_clip_shapes(SD2_TEXT, 1024, 24) if ".23." in key}
            | {SD2_TEXT + "text_projection"},
        ),
        (SDXL, xl_shapes, set()),
    ],
    ids=["sd2", "sdxl"],
)
def test_text_encoders_take_every_value_of_theirs_and_no_other(family, file, left_out):
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in file().items()}
    assert left_out <= tensors.keys()
    for kind in family.text_encoders:
        encoder = build_text_encoder(family, kind)
        found = text_tensors(kind, tensors, encoder)
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: w.shape for name, w in encoder.state_dict().items()
        }
        theirs = [
            tensor.numel()
            for key, tensor in tensors.items()
            if key.startswith(kind.prefix)
            and key not in left_out
            and not key.endswith(("position_ids", "logit_scale"))
        ]
        assert sum(tensor.numel() for tensor in found.values()) == sum(theirs)


def test_open_clips_joined_matrices_are_query_key_and_value_and_its_projection_is_turned(
    known_tiny, tiny_checkpoints
):
    file, network = load_file(tiny_checkpoints["sdxl"]), load_network(tiny_checkpoints["sdxl"])
    ours = dict(network.text_encoders[1].named_parameters())
    joined = file["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"].float()
    for i, letter in enumerate("qkv"):
        (weight,) = (
            w for name, w in ours.items() if name.endswith(f"layers.1.self_attn.{letter}_proj.weight")
        )
        assert torch.equal(weight, joined[64 * i : 64 * (i + 1)])
    assert torch.equal(
        ours["text_projection.weight"], file["conditioner.embedders.1.model.text_projection"].float().T
    )


def test_text_encoder_of_an_old_file_is_the_same_one(random_checkpoint, random_network, tmp_path):
    level = f"{TEXT}text_model."
    tensors = {name.replace(level, TEXT): tensor for name, tensor in load_file(random_checkpoint).items()}
    save_file(tensors, tmp_path / "old.safetensors")
    assert f"{TEXT}final_layer_norm.weight" in tensors
    assert torch.equal(
        load_network(tmp_path / "old.safetensors").encode(["a cat"]).text,
        random_network.encode(["a cat"]).text,
    )


# --- tokenizer and decoder


def copied(source, folder, *names):
    folder.mkdir()
    for name in names:
        shutil.copy(source / name, folder)
    return folder


def test_tokenizer_that_does_not_come_with_the_package_is_asked_for(stub):
    said = "Stable Diffusion 1.x needs CLIP's tokenizer.*vocab.json and merges.txt"
    with pytest.raises(ModelError, match=said):
        load_network(stub)
    with pytest.raises(ModelError, match=said):
        NetworkCache().get(open_model(stub).source)


def test_tokenizer_folder_that_does_not_fit_is_refused_by_name(stub, tmp_path):
    bare = copied(MINI.tokenizer_folder, tmp_path / "bare", "vocab.json")
    broken = copied(MINI.tokenizer_folder, tmp_path / "broken", "vocab.json", "merges.txt")
    (broken / "vocab.json").write_text("{")
    for folder, said in (
        (tmp_path / "nowhere", "has no vocab.json"),
        (bare, "has no merges.txt"),
        (broken, "cannot be read"),
        (MINI.tokenizer_folder, "has 968 tokens.*where Stable Diffusion 1.x has 49408"),
    ):
        with pytest.raises(ModelError, match=f"{folder}.*{said}"):
            load_network(stub, tokenizer_folder=folder)
        with pytest.raises(ModelError, match=said):
            NetworkCache(folder).get(open_model(stub).source)


def test_family_with_a_tokenizer_of_its_own_ignores_the_folder(random_checkpoint, tmp_path):
    assert load_network(random_checkpoint, tokenizer_folder=tmp_path / "nowhere").token_count("a cat") == 2


def test_clip_tokenizer_needs_two_files_and_pads_with_the_end(clip_tokenizer, tmp_path):
    second = copied(clip_tokenizer, tmp_path / "sd2", "vocab.json", "merges.txt")
    (second / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "!"})
    )
    for folder in (
        clip_tokenizer,
        copied(clip_tokenizer, tmp_path / "two", "vocab.json", "merges.txt"),
        second,
    ):
        ids = load_tokenizer(SD1, folder)(
            ["A photo of a Cat"], padding="max_length", max_length=77, truncation=True
        ).input_ids[0]
        assert ids == [49406, 320, 1125, 539, 320, 2368] + 71 * [49407]  # CLIP's ids of these words


def test_latents_of_a_family_without_a_decoder_are_not_decoded():
    network = DiffusersNetwork(SD1, nn.Linear(1, 1), (), None, None).to("cpu")
    with pytest.raises(
        ModelError, match="Latents of Stable Diffusion 1.x cannot be decoded here.*decode them with the VAE"
    ):
        network.decode(torch.zeros(1, 4, 64, 64))


# --- presets, registry, command line


TRAINED = [name for name, entry in PRESETS.items() if not METHODS.of(entry.method).cls.is_closed_form]


def test_a_closed_form_takes_no_training_settings_of_a_family():
    assert preset("exact").for_family(SD1) is preset("exact")


@pytest.mark.parametrize("name", [name for name in TRAINED if not PRESETS[name].training_of])
def test_preset_takes_the_values_of_its_family(name):
    chosen = preset(name)
    assert chosen.for_family(MINI) is chosen
    request = chosen.for_family(SD1).request(
        [Concept("Van_Gogh")], retain=[], anchor_prompts=["a cup"], seed=3
    )
    training = request.training
    assert (training.iterations, training.batch_size, training.learning_rate, training.seed) == (
        1000,
        4,
        8e-6,
        3,
    )
    assert (request.anchor_count, request.anchor_sampler) == (
        200,
        SamplerConfig(steps=25, guidance_scale=6.0),
    )
    assert (request.method, training.schedule) == (
        chosen.method_of.get("sd1", chosen.method),
        chosen.training.schedule,
    )


def test_erased_stable_diffusion_trains_on_its_own_family_as_its_authors_do():
    request = (
        preset("esd")
        .for_family(SD1)
        .request([Concept("Van_Gogh")], retain=[], anchor_prompts=["a cup"], seed=3)
    )
    training = request.training
    assert (training.iterations, training.batch_size, training.learning_rate, training.group) == (
        200,
        1,
        5e-5,
        "attn2",
    )
    assert (training.schedule, training.max_grad_norm, training.seed) == ("constant", 0.0, 3)
    assert preset("esd").for_family(MINI) is preset("esd")


def test_erased_stable_diffusion_trains_on_sdxl_as_the_paper_does():
    request = (
        preset("esd_reference")
        .for_family(SDXL)
        .request([Concept("Van_Gogh")], retain=[], anchor_prompts=["a cup"], seed=3)
    )
    training, method = request.training, request.method
    assert (training.iterations, training.batch_size, training.learning_rate, training.group) == (
        200,
        1,
        2e-4,
        "kv",
    )
    assert (training.schedule, training.max_grad_norm, training.weight_decay) == ("constant", 0.0, 0.0)
    assert (method.negative_guidance, method.guidance_scale, method.teacher, method.block_first_token) == (
        2.0,
        3.0,
        "start",
        False,
    )


def test_papers_penalties_have_the_papers_strengths():
    for name, strength in (("l1sp", 50.0), ("l2sp", 25000.0)):
        assert [config.strength for config in preset(name).for_family(SD1).regularizers] == [strength]


def test_what_a_user_sets_wins_over_the_family(stub, tmp_path, monkeypatch, capsys):
    seen = []

    def stop(model, request, **settings):
        seen.append(request.training)
        assert settings["device"] == torch.device("cpu")
        raise Cancelled("stop")

    monkeypatch.setattr("cul_core.training.step.run_step", stop)
    out = ["--out", str(tmp_path / "out.safetensors")]
    main(
        ["unlearn", "Van Gogh", "--preset", "trained", "--model", str(stub), "--learning-rate", "1e-6", *out]
    )
    assert (seen[0].iterations, seen[0].learning_rate) == (1000, 1e-6)


@pytest.mark.parametrize("entry", [*METHODS, *REGULARIZERS], ids=lambda entry: entry.name)
def test_every_part_needs_only_what_families_and_the_loop_have(entry):
    roles, others = ROLES & set(entry.cls.needs), set(entry.cls.needs) - ROLES
    assert others <= {"anchor_latents", "autoencoder"}
    assert all(roles <= family.roles.keys() for family in FAMILIES.values())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["unlearn", "Van Gogh", "--model"], "--tokenizer on the command line"),
        (["evaluate"], "there is no classifier"),
    ],
    ids=["unlearn", "evaluate"],
)
def test_command_that_lacks_something_for_stable_diffusion_is_one_line(
    stub, tmp_path, monkeypatch, capsys, command, said
):
    monkeypatch.chdir(tmp_path)
    assert main([*command, str(stub)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert [*tmp_path.iterdir()] == [stub]


# --- full size: 4 GB on the disk, 7 GB of memory, three minutes


@pytest.fixture(scope="module")
def full_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    yield write_random(folder / "sd15.safetensors", checkpoint_shapes() | {"model_ema.decay": (1,)})
    shutil.rmtree(folder)  # pytest would keep the gigabytes of three runs


@pytest.fixture(scope="module")
def full_step(full_checkpoint, clip_tokenizer):
    """(model, edited, report, [text vector (768,) of the kept, of the forgotten name]) of one update, under
    every regularizer at once."""
    model, networks = open_model(full_checkpoint), NetworkCache(clip_tokenizer)
    kept, target = Concept("Claude_Monet"), Concept("Van_Gogh")
    request = Request(
        concepts=(target,),
        method=preset("trained").method,
        retain=(kept,),
        anchor_prompts=("A painting of a horse.",),
        regularizers=(
            ProjectionConfig(decoys=8),
            L1SPConfig(strength=50.0),
            L2SPConfig(strength=25000.0, form="penalty"),
        ),
        training=TrainingConfig(iterations=1, batch_size=1, learning_rate=1e-3),
        anchor_count=1,
        anchor_sampler=SamplerConfig(steps=1),
    )
    edited, report = run_step(model, request, store=AnchorStore(), networks=networks)
    rows = [
        prompt_rows(networks.get(model.source), [concept.prompt], "mean", concept.name)[0].float()
        for concept in (kept, target)
    ]
    return model, edited, report, rows


@pytest.fixture(scope="module")
def full_saved(full_step, full_checkpoint):
    return save_checkpoint(full_step[1], full_checkpoint.parent / "edited.safetensors")


@pytest.mark.slow
def test_full_size_step_edits_keys_and_values_and_keeps_what_was_asked(full_step):
    model, edited, report, (kept, target) = full_step
    assert model.family is SD1 and not model.edits
    assert len(edited.edits) == 32 == len(keys_with_role(model.family, "text_readers", edited.edits))
    assert math.isfinite(report.losses[0]) and report.losses[0] > 0
    assert report.figures["protected_rank"] == 1
    for delta in edited.edits.values():
        assert (delta @ kept).norm() <= 1e-5 * delta.norm() * kept.norm()
        assert (delta @ target).norm() >= 1e-3 * delta.norm() * target.norm()


@pytest.mark.slow
def test_full_size_checkpoint_differs_only_in_the_edited_tensors(full_step, full_saved):
    model, edited, *_ = full_step
    (before, _, start), (after, metadata, new_start) = read_header(model.source.path), read_header(full_saved)
    assert before == after and "cul_history" in metadata
    changed = set()
    with model.source.path.open("rb") as old, full_saved.open("rb") as new:
        for key, entry in before.items():
            begin, end = entry["data_offsets"]
            old.seek(start + begin)
            new.seek(new_start + begin)
            if old.read(end - begin) != new.read(end - begin):
                changed.add(key)
    assert changed == set(edited.edits)
    rounded = difference(full_saved, model.source.path)
    largest = max(float((rounded[name] - delta).abs().max()) for name, delta in edited.edits.items())
    # half an fp16 step of weights below 1
    assert rounded.keys() == edited.edits.keys() and largest <= 2**-11
    reopened = open_model(full_saved)
    assert reopened.family is SD1 and [record.targets for record in reopened.history] == [("Van_Gogh",)]


@pytest.mark.slow
def test_full_size_edits_are_exported_in_the_hosts_names(full_step, tmp_path):
    _, edited, *_ = full_step
    few = replace(edited, edits={name: edited.edits[name] for name in sorted(edited.edits)[:2]})
    places = [
        "middle_block",
        *(f"input_blocks.{i}" for i in (1, 2, 4, 5, 7, 8)),
        *(f"output_blocks.{i}" for i in range(3, 12)),
    ]
    modules = {
        f"diffusion_model.{place}.1.transformer_blocks.0.attn2.to_{letter}"
        for place in places
        for letter in "kv"
    }
    whole = load_file(save_difference(edited, tmp_path / "difference.safetensors"))
    assert whole.keys() == {f"{module}.diff" for module in modules}
    saved = save_lora(few, tmp_path / "lora.safetensors", rank=4)
    names = {name.rpartition(".attn2.")[0] for name in load_file(saved.path)}
    assert 0 < saved.energy <= 1 and names <= {module.rpartition(".attn2.")[0] for module in modules}


@pytest.mark.slow
def test_full_size_drift_is_reported_per_layer(full_step):
    _, edited, *_ = full_step
    drifts = drift_of(edited)
    assert len(drifts) == 32 and short_name(drifts[0].name) == "in 1.1.0 attn2.to_k"
    assert all(0 < drift.percent < 100 and math.isfinite(drift.percent) for drift in drifts)


@pytest.mark.slow
@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.name)
def test_what_an_image_takes_is_what_the_table_of_its_family_says(family):
    network = DiffusersNetwork(family, build_unet(family), (), None, None)
    counted = count_passes(network.blank(torch.bfloat16), "kv", 1, False)
    assert passes(network, torch.bfloat16, "kv", 1) == counted
