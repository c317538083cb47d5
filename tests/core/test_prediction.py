"""What a model predicts: by its header's metadata, by the host's marks, or as the user says."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from cul_core.base.errors import ConfigError
from cul_core.cli import main
from cul_core.models.load_diffusers import NetworkCache
from cul_core.models.recognize import detect_family
from cul_core.models.source import PREDICTIONS, ZERO_SNR
from cul_core.output.checkpoint import open_continued, open_model, save_checkpoint
from cul_core.store.steps import step_key
from cul_core.training.step import run_step

NAMES = "mini", "sd2", "sdxl"


@pytest.fixture
def file_of(random_checkpoint, tiny_checkpoints, known_tiny, tmp_path):
    """`file_of(family, metadata, tensors)`: a copy of its small checkpoint with more of these."""

    def make(name, metadata=None, **more):
        source = random_checkpoint if name == "mini" else tiny_checkpoints[name]
        path = tmp_path / f"{name}.safetensors"
        save_file(load_file(source) | more, path, metadata=metadata or {})
        return path

    return make


def predicted(path, prediction="auto"):
    process = detect_family(path, prediction).process
    return process.prediction_type, process.ends_in_noise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", ["v", "v_prediction", "V-Prediction", " v_pred ", "velocity"])
def test_metadata_say_velocity_for_every_family(name, said, file_of):
    assert predicted(file_of(name, {"modelspec.prediction_type": said})) == ("v_prediction", False)


@pytest.mark.parametrize("name", NAMES)
def test_metadata_of_other_tools_say_velocity(name, file_of):
    assert predicted(file_of(name, {"prediction_type": "v_prediction"})) == ("v_prediction", False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", ["epsilon", "eps", "", "other"])
def test_other_metadata_say_nothing(name, said, file_of):
    assert predicted(file_of(name, {"modelspec.prediction_type": said})) == ("epsilon", False)


@pytest.mark.parametrize("name", NAMES)
def test_marks_of_the_host_count_for_every_family(name, file_of):
    mark = torch.empty(0)
    assert predicted(file_of(name, v_pred=mark)) == ("v_prediction", False)
    assert predicted(file_of(name, v_pred=mark, ztsnr=mark)) == ("v_prediction", True)
    marked = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    assert predicted(file_of(name, marked)) == ("v_prediction", True)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_says_wins(name, file_of):
    plain = file_of(name)
    assert predicted(plain, "velocity") == ("v_prediction", False)
    assert predicted(plain, ZERO_SNR) == ("v_prediction", True)
    assert predicted(file_of(name, v_pred=torch.empty(0)), "noise") == ("epsilon", False)
    with pytest.raises(ConfigError, match="choose one of auto, noise, velocity"):
        detect_family(plain, "flow")


def test_every_prediction_is_another_model_and_auto_is_the_one_it_has_been(random_checkpoint, make_request):
    models = {prediction: open_model(random_checkpoint, prediction=prediction) for prediction in PREDICTIONS}
    assert len({model.content_hash for model in models.values()}) == len(PREDICTIONS)
    assert len({step_key(model, make_request()) for model in models.values()}) == len(PREDICTIONS)
    assert models["auto"].source.identity == models["auto"].source.sha256


def test_a_chosen_prediction_trains_and_stays_with_the_edited_file(file_of, make_request, tmp_path):
    path, networks = file_of("mini"), NetworkCache()
    request, edits = make_request(iterations=1), {}
    for prediction in ("auto", "velocity"):
        model = open_model(path, prediction=prediction)
        edited, _ = run_step(model, request, networks=networks)
        assert networks.get(model.source).process == model.family.process
        edits[prediction] = edited
    (key,) = {min(model.edits) for model in edits.values()}
    assert not torch.equal(edits["auto"].edits[key], edits["velocity"].edits[key])
    written = save_checkpoint(edits["velocity"], tmp_path / "edited.safetensors")
    assert predicted(written) == ("v_prediction", False)
    for again in (open_model(written), open_model(written, path), open_continued(written, [path])):
        assert again.family.process.prediction_type == "v_prediction"
        assert NetworkCache().get(again.source).process.prediction_type == "v_prediction"
    assert predicted(save_checkpoint(edits["auto"], tmp_path / "auto.safetensors")) == ("epsilon", False)


def test_the_command_line_takes_a_prediction(file_of, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    command = ["unlearn", "Lava", "--model", str(file_of("mini")), "--preset", "esd", "--iterations", "0"]
    assert main([*command, "--prediction", "velocity", "--out", str(out)]) == 0
    assert predicted(out) == ("v_prediction", False)
    with pytest.raises(SystemExit):
        main([*command, "--prediction", "flow"])
