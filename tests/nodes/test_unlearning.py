"""Forgetting in the real host: caches and store, branches, cancelling, native models, files, and what errors
say."""

import html
import io
import json
import os
import threading
import time

import numpy as np
import pytest
import torch
from graphs import CLIP, CUL, FORGOTTEN, KEPT, MODEL, REPORT, SAMPLING, VAE, Graph
from hosts import on_newest
from PIL import Image
from safetensors.torch import save_file
from short import SHORT

from cul_core.history.step_record import read_history
from cul_core.methods import METHODS
from cul_core.minicanvas.models import CHECKPOINT_PATH


def pixels(host, entry, node):
    return np.asarray(Image.open(io.BytesIO(host.picture(entry, node)))).astype(int)


def steps_trained(host):
    """How often the loop has run since the server first started."""
    return host.log.read_text(errors="replace").count("forgot 1 concept(s)")


def checkpoints_loaded(host):
    """How often a checkpoint was loaded to train on since the server first started."""
    return host.log.read_text(errors="replace").count("for training in")


def wait_until(host, is_so, what, seconds=300):
    """Waits as long as a busy machine may take for what a running graph does."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen in {seconds} s:\n{host.tail()}")
        time.sleep(0.1)


def files_in_store(host, part):
    return sorted(
        path.name for path in (host.folder / "models/unlearning_chains" / part).glob("*.safetensors")
    )


def test_the_stock_graph_runs_on_the_checkpoint_that_comes_with_the_pack(host):
    graph = Graph()
    stock = graph.add("CheckpointLoaderSimple", ckpt_name="minicanvas.safetensors")
    shown = graph.sample((stock, 0), (stock, 1), (stock, 2), "A cat image in Navy Stripes style.")
    picture = pixels(host, host.run(graph), shown)
    assert picture.shape == (64, 64, 3)
    left = picture[:, :6].mean((1, 2))  # horizontal stripes: rows differ, columns do not
    assert left.std() > 40


@on_newest()
def test_three_nodes_and_two_words_forget_a_style_and_keep_its_relatives(host):
    graph = Graph()
    loaded = graph.load()
    concept = graph.add("CUL_Concept", target="Candy Stripes", kind="style", anchor="", keep="")
    step = graph.add(
        "CUL_UnlearnStep",
        model=(loaded, CUL),
        concepts=(concept, 0),
        preset="recommended",
        train_seed=0,
        preview_every=20,
    )
    shown = {
        (node, prompt): graph.sample_from(node, prompt)
        for node in (loaded, step)
        for prompt in (FORGOTTEN, KEPT)
    }
    entry = host.run(graph)
    change = {
        prompt: np.abs(
            pixels(host, entry, shown[step, prompt]) - pixels(host, entry, shown[loaded, prompt])
        ).mean()
        for prompt in (FORGOTTEN, KEPT)
    }
    assert change[FORGOTTEN] > 25 and change[KEPT] < 0.4 * change[FORGOTTEN], change


def chain_of_five(seeds):
    graph = Graph()
    training = graph.training()
    steps = [graph.load()]
    for target, seed in zip(
        ("Candy Stripes", "Dusk Dots", "Chess Board", "Neon Cyan", "Blueprint"), seeds, strict=True
    ):
        steps.append(graph.step(steps[-1], target, training=training, train_seed=seed))
    graph.add("CUL_DriftMap", model=(steps[-1], CUL))
    return graph, steps[1:]


def test_a_change_in_the_middle_of_a_chain_retrains_from_there_on_only(host):
    graph, steps = chain_of_five((1, 1, 1, 1, 1))
    before = steps_trained(host)
    host.run(graph)
    assert steps_trained(host) == before + 5
    graph, steps = chain_of_five((1, 1, 2, 1, 1))
    executed = host.executed(host.run(graph))
    assert set(steps) & executed == set(steps[2:])
    assert steps_trained(host) == before + 8
    host.run(Graph(chain_of_five((1, 1, 1, 1, 1))[0]))
    assert steps_trained(host) == before + 8  # the store still has the first chain


@on_newest()
def test_finished_steps_survive_a_restart_of_the_host(host):
    graph, steps = chain_of_five((7, 7, 7, 7, 7))
    first = pixels(host, host.run(graph), list(graph)[-1])
    trained = steps_trained(host)
    host.stop()
    host.start()
    entry = host.run(graph)
    assert set(steps) <= host.executed(entry)  # the host's own cache is gone
    assert steps_trained(host) == trained
    assert np.array_equal(pixels(host, entry, list(graph)[-1]), first)


def test_free_memory_and_an_unrelated_prompt_cost_no_training(host):
    graph, steps = chain_of_five((1, 1, 1, 1, 1))
    host.run(graph)
    trained = steps_trained(host)
    host.forget()
    assert set(steps) <= host.executed(host.run(graph))
    unrelated = Graph()
    unrelated.add(
        "PreviewImage", images=(unrelated.add("EmptyImage", width=64, height=64, batch_size=1, color=0), 0)
    )
    host.run(unrelated)
    host.run(graph)
    assert steps_trained(host) == trained


def test_a_checkpoint_that_is_replaced_under_its_name_is_loaded_anew(host):
    copy = host.folder / "models/checkpoints/copy.safetensors"
    copy.write_bytes(CHECKPOINT_PATH.read_bytes())
    graph = Graph()
    loaded = graph.load(copy.name)
    graph.add("CUL_DriftMap", model=(loaded, CUL))
    host.run(graph)
    assert loaded not in host.executed(host.run(graph))
    os.utime(copy, (1, 1))
    assert loaded in host.executed(host.run(graph))


def test_checkpoints_in_subfolders_and_further_folders_are_listed_and_described(host):
    (host.folder / "models/checkpoints/some").mkdir()
    for path in (
        host.folder / "models/checkpoints/some/deep.safetensors",
        host.folder / "elsewhere/far.safetensors",
    ):
        path.write_bytes(CHECKPOINT_PATH.read_bytes())
        name = path.name if path.parent.name == "elsewhere" else os.path.join("some", path.name)
        assert name in json.dumps(host.get("/object_info/CUL_LoadModel")).replace("\\\\", "\\")
        graph = Graph()
        graph.add("CUL_DriftMap", model=(graph.load(name), CUL))
        texts = html.unescape(
            " ".join(
                data.decode() for data in progress_of(host, graph)[0] if int.from_bytes(data[:4], "big") == 3
            )
        )
        assert "MiniCanvas, 15.9 MB" in texts and "fp16, predicts noise, 64 px" in texts


def test_an_unsupported_file_is_refused_before_anything_runs(host):
    tensors = {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(8, 8)}
    save_file(tensors, host.folder / "models/checkpoints/flux.safetensors")
    graph = Graph()
    step, unsupported = graph.step(graph.load()), graph.load("flux.safetensors")
    graph.add(
        "CUL_Compare",
        before=(step, CUL),
        after=(unsupported, CUL),
        prompts="A cat.",
        row_labels="a, b",
        **SAMPLING,
    )
    answer = json.loads(host.rejected(graph))
    (reason,) = [error["details"] for error in answer["node_errors"][unsupported]["errors"]]
    assert all(
        said in reason
        for said in (
            "'flux.safetensors' is",
            "Flux",
            "no Stable Diffusion UNet",
            "choose a full checkpoint of",
        )
    )


@on_newest()
def test_two_steps_from_one_loader_do_not_disturb_each_other_or_the_loader(host):
    graph = Graph()
    loaded, training = graph.load(), graph.training(iterations=20)
    one, two = (
        graph.step(loaded, "Candy Stripes", training=training),
        graph.step(loaded, "Dusk Dots", training=training),
    )
    shown = {node: graph.sample_from(node) for node in (loaded, one, two)}
    together = host.run(graph)
    for node in (loaded, one, two):
        alone = Graph()
        copy = alone.load()
        if node != loaded:
            copy = alone.step(
                copy, "Candy Stripes" if node == one else "Dusk Dots", training=alone.training(iterations=20)
            )
        picture = alone.sample_from(copy)
        assert np.array_equal(pixels(host, host.run(alone), picture), pixels(host, together, shown[node])), (
            node
        )


def test_cancel_ends_the_step_at_once_and_leaves_nothing_behind(host):
    graph = Graph()
    step = graph.step(graph.load(), training=graph.training(iterations=5000), train_seed=99)
    graph.add("CUL_DriftMap", model=(step, CUL))
    trained, stored = steps_trained(host), files_in_store(host, "steps")
    prompt = host.queue(graph)
    wait_until(host, lambda: files_in_store(host, "states"), "the first state of the step")
    host.post("/interrupt", {})
    entry = host.wait(prompt, 60)  # its iterations would take far longer
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    assert steps_trained(host) == trained
    # from where it can go on
    assert files_in_store(host, "steps") == stored and len(files_in_store(host, "states")) == 1
    cleared = Graph()
    shown = cleared.add("PreviewAny", source=(cleared.add("CUL_Store", clear="unfinished"), 0))
    assert (
        "removed 1 files" in json.dumps(host.run(cleared)["outputs"][shown])
        and files_in_store(host, "states") == []
    )
    plain = Graph()
    stock = plain.add("CheckpointLoaderSimple", ckpt_name="minicanvas.safetensors")
    reference = plain.sample((stock, 0), (stock, 1), (stock, 2))
    again = Graph()
    shown = again.sample_from(again.load())
    assert np.array_equal(pixels(host, host.run(again), shown), pixels(host, host.run(plain), reference))


@pytest.fixture(scope="module")
def saved(host):
    """(history entry, id of the picture by the edited MODEL, file names by kind) of one step saved in every
    form."""
    graph = Graph()
    step = graph.step(graph.load(), training=graph.training(iterations=25))
    shown = graph.sample_from(step)
    graph.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix="checkpoints/forgot")
    graph.add("CUL_SaveLora", model=(step, CUL), filename_prefix="loras/exact", format="diff", rank=4)
    graph.add("CUL_SaveLora", model=(step, CUL), filename_prefix="loras/full", format="lora", rank=192)
    graph.add(
        "CheckpointSave",
        model=(step, MODEL),
        clip=(step, CLIP),
        vae=(step, VAE),
        filename_prefix="checkpoints/stock",
    )
    entry = host.run(graph)
    names = {
        name: host.saved(f"*/{name}_*.safetensors")[-1].name for name in ("forgot", "exact", "full", "stock")
    }
    return entry, shown, names


def sampled_by_stock_nodes(host, checkpoint, lora=None, strength=1.0):
    graph = Graph()
    stock = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    model = stock
    if lora:
        model = graph.add("LoraLoaderModelOnly", model=(stock, 0), lora_name=lora, strength_model=strength)
    shown = graph.sample((model, 0), (stock, 1), (stock, 2))
    return pixels(host, host.run(graph), shown)


def test_the_saved_file_in_the_stock_loader_draws_what_the_edited_model_draws(host, saved):
    entry, shown, names = saved
    edited = pixels(host, entry, shown)
    assert np.abs(sampled_by_stock_nodes(host, names["forgot"]) - edited).max() <= 1  # the file holds fp16
    assert np.abs(sampled_by_stock_nodes(host, "minicanvas.safetensors") - edited).max() > 60


def test_the_saved_file_gives_equal_pixels_to_an_edited_model_of_the_same_weights(host, saved):
    """Our loader opens the saved file beside the original: the same fp16-rounded edits, here as a patch,
    there in the file."""
    graph = Graph()
    shown = graph.sample_from(graph.load(saved[2]["forgot"]))
    assert np.array_equal(
        pixels(host, host.run(graph), shown), sampled_by_stock_nodes(host, saved[2]["forgot"])
    )


@pytest.mark.parametrize("form", ["exact", "full"])
def test_the_stock_lora_loader_applies_what_was_forgotten(host, saved, form):
    entry, shown, names = saved
    edited, untouched = pixels(host, entry, shown), sampled_by_stock_nodes(host, "minicanvas.safetensors")
    assert np.abs(sampled_by_stock_nodes(host, "minicanvas.safetensors", names[form]) - edited).max() <= 1
    assert np.array_equal(
        sampled_by_stock_nodes(host, "minicanvas.safetensors", names[form], strength=0.0), untouched
    )


def test_the_stock_save_node_keeps_the_edit(host, saved):
    entry, shown, names = saved
    # it rewrites text in fp16
    assert np.abs(sampled_by_stock_nodes(host, names["stock"]) - pixels(host, entry, shown)).max() <= 2


def test_the_edited_model_stacks_with_loras_and_merges_like_the_saved_file(host, saved):
    names = saved[2]
    graph = Graph()
    step = graph.step(graph.load(), training=graph.training(iterations=25))
    stock = graph.add("CheckpointLoaderSimple", ckpt_name=names["forgot"])
    base = graph.add("CheckpointLoaderSimple", ckpt_name="minicanvas.safetensors")
    shown = []
    for model in ((step, MODEL), (stock, 0)):
        lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=names["full"], strength_model=-0.5)
        merged = graph.add("ModelMergeSimple", model1=model, model2=(base, 0), ratio=0.5)
        shown.append([graph.sample((node, 0), (stock, 1), (stock, 2)) for node in (lora, merged)])
    entry = host.run(graph)
    for ours, theirs in zip(*shown, strict=True):
        assert np.abs(pixels(host, entry, ours) - pixels(host, entry, theirs)).max() <= 2


def test_written_files_explain_themselves_and_hold_the_graph(host, saved):
    for name in ("forgot", "exact", "full"):
        (path,) = host.saved(f"*/{name}_*.safetensors")
        history, source = read_history(path)
        assert [record.targets for record in history] == [("Candy Stripes",)] and source[
            "name"
        ] == "minicanvas.safetensors"
        header = path.read_bytes()
        assert b"CUL_UnlearnStep" in header[: 1 << 20] and str(host.folder).encode() not in header[: 1 << 20]
    graph = Graph()
    graph.add("CUL_History", file=saved[2]["forgot"])
    host.run(graph)


@on_newest()
def test_a_saved_checkpoint_goes_on_from_where_it_was_and_is_never_overwritten(host, saved):
    graph = Graph()
    step = graph.step(graph.load(saved[2]["forgot"]), "Dusk Dots")
    graph.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix="checkpoints/forgot")
    before = host.saved("checkpoints/forgot_*")
    host.run(graph)
    (new,) = set(host.saved("checkpoints/forgot_*")) - set(before)
    history, source = read_history(new)
    assert [record.targets for record in history] == [("Candy Stripes",), ("Dusk Dots",)]
    assert source["name"] == "minicanvas.safetensors"  # drift stays measured from the original
    assert history[1].parent != history[0].parent


@on_newest()
def test_a_sequence_gives_the_same_model_as_a_chain_of_steps(host):
    graph = Graph()
    training, loaded = graph.training(), graph.load()
    last = loaded
    for target in ("Candy Stripes", "Dusk Dots"):
        last = graph.step(last, target, training=training)
    sequence = graph.add(
        "CUL_UnlearnSequence",
        model=(loaded, CUL),
        requests="# a list\nCandy Stripes\n\nstyle: Dusk Dots",
        kind="style",
        anchor="",
        keep="Navy Stripes, Pop Dots",
        preset="trained",
        train_seed=1,
        preview_every=0,
        training=(training, 0),
    )
    one, other = graph.sample_from(last), graph.sample_from(sequence)
    entry = host.run(graph)
    assert np.array_equal(pixels(host, entry, one), pixels(host, entry, other))


def solved(graph, loaded, requests):
    """Unlearn Sequence by the preset exact."""
    values = {"kind": "style", "anchor": "", "keep": "Navy Stripes", "preset": "exact"}
    linked = {"model": (loaded, CUL), "train_seed": 1, "preview_every": 0}
    return graph.add("CUL_UnlearnSequence", requests=requests, **values, **linked)


def test_a_request_is_taken_back_as_if_it_had_never_been_made(host):
    graph = Graph()
    loaded = graph.load()
    both, never = (solved(graph, loaded, lines) for lines in ("Candy Stripes\nLava", "Candy Stripes"))
    left = graph.add("CUL_TakeBack", model=(both, CUL), names="lava\n")
    text = graph.add("PreviewAny", source=(left, REPORT))
    lava = "A cat image in Lava style."
    shown = [graph.sample_from(node, lava) for node in (both, left, never)]
    entry = host.run(graph)
    forgotten, one, other = (pixels(host, entry, node) for node in shown)
    assert np.array_equal(one, other) and np.abs(one - forgotten).mean() > 20
    report = json.dumps(entry["outputs"][text])
    assert "Taken back: Lava." in report and "Still forgotten: Candy Stripes." in report


def test_an_exact_edit_is_a_small_lora_without_loss_at_any_strength(host):
    graph = Graph()
    edited = solved(graph, graph.load(), "Candy Stripes\nLava")
    for form in ("diff", "lora"):
        values = {"filename_prefix": f"loras/solved-{form}", "format": form, "rank": 1}
        graph.add("CUL_SaveLora", model=(edited, CUL), **values)
    shown = graph.sample_from(edited)
    whole = pixels(host, host.run(graph), shown)
    files = [host.saved(f"loras/solved-{form}_*")[-1] for form in ("diff", "lora")]
    assert files[1].stat().st_size < files[0].stat().st_size / 3
    for strength in (0.5, 1.0):
        drawn = [
            sampled_by_stock_nodes(host, "minicanvas.safetensors", file.name, strength) for file in files
        ]
        assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert np.abs(drawn[1] - whole).max() <= 1


def sequence_of(*requests):
    graph = Graph()
    values = {"kind": "style", "anchor": "", "keep": "Navy Stripes", "preset": "plain", "train_seed": 4711}
    linked = {"model": (graph.load(), CUL), "training": (graph.training(), 0)}
    lines = "\n".join(requests)
    sequence = graph.add("CUL_UnlearnSequence", requests=lines, preview_every=0, **values, **linked)
    graph.add("CUL_DriftMap", model=(sequence, CUL))
    return graph


@on_newest()
def test_a_sequence_loads_its_checkpoint_once_if_at_all(host):
    loaded, trained = checkpoints_loaded(host), steps_trained(host)
    host.run(sequence_of("Candy Stripes", "Dusk Dots", "Chess Board"))
    assert (checkpoints_loaded(host), steps_trained(host)) == (loaded + 1, trained + 3)
    host.forget()
    host.run(sequence_of("Candy Stripes", "Dusk Dots"))
    assert (checkpoints_loaded(host), steps_trained(host)) == (loaded + 1, trained + 3)
    host.run(sequence_of("Candy Stripes", "Dusk Dots", "Neon Cyan"))
    assert (checkpoints_loaded(host), steps_trained(host)) == (loaded + 2, trained + 4)


@pytest.fixture(scope="module")
def independent(host):
    """(graph, id of the loader, ids of two steps behind it), to be added to."""
    graph = Graph()
    loaded, training = graph.load(), graph.training(iterations=60)
    return (
        graph,
        loaded,
        [graph.step(loaded, target, training=training) for target in ("Candy Stripes", "Dusk Dots")],
    )


DOTS = "A cat image in Dusk Dots style."


@on_newest()
def test_two_independent_steps_merge_into_a_model_that_has_forgotten_both(host, independent):
    graph, loaded, (one, two) = Graph(independent[0]), *independent[1:]
    merged, swapped = graph.merge(one, two), graph.merge(two, one)
    shown = {
        (node, prompt): graph.sample_from(node, prompt)
        for node in (loaded, one, two, merged)
        for prompt in (FORGOTTEN, DOTS, KEPT)
    }
    again = graph.sample_from(swapped)
    report = graph.add("PreviewAny", source=(merged, REPORT))
    graph.add("CUL_SaveCheckpoint", model=(merged, CUL), filename_prefix="checkpoints/merged")
    entry = host.run(graph)
    drawn = {place: pixels(host, entry, node) for place, node in shown.items()}

    def change(node, prompt):
        return np.abs(drawn[node, prompt] - drawn[loaded, prompt]).mean()

    for prompt, step, other in ((FORGOTTEN, one, two), (DOTS, two, one)):
        assert change(merged, prompt) > 0.5 * change(step, prompt) > 10 > change(other, prompt), prompt
    assert change(merged, KEPT) < 0.4 * change(merged, FORGOTTEN)
    assert np.array_equal(pixels(host, entry, again), drawn[merged, FORGOTTEN])
    text = json.dumps(entry["outputs"][report])
    assert "forgotten: Candy Stripes, Dusk Dots" in text and "ties" in text and "keep fraction 0.8" in text
    (path,) = host.saved("checkpoints/merged_*")
    history, source = read_history(path)
    assert [record.targets for record in history] == [("Candy Stripes",), ("Dusk Dots",), ()]
    assert (
        history[2].request["models"] == [history[0].result, history[1].result]
        and source["name"] == "minicanvas.safetensors"
    )
    further = Graph()
    last = further.step(further.load(path.name), "Neon Cyan")
    further.add("CUL_DriftMap", model=(last, CUL))
    host.run(further)


@on_newest()
def test_a_model_merged_uniformly_with_itself_is_that_model(host, independent):
    graph, _, (step, _) = Graph(independent[0]), *independent[1:]
    for count in (2, 6):
        merged = graph.merge(*[step] * count, how="uniform")
        one, other = graph.sample_from(step), graph.sample_from(merged)
        entry = host.run(graph)
        assert np.array_equal(pixels(host, entry, one), pixels(host, entry, other))


def test_models_of_different_files_do_not_merge(host):
    data = bytearray(CHECKPOINT_PATH.read_bytes())
    data[-1] ^= 1
    (host.folder / "models/checkpoints/foreign.safetensors").write_bytes(data)
    graph = Graph()
    merged = graph.merge(graph.load(), graph.load("foreign.safetensors"))
    graph.add("CUL_DriftMap", model=(merged, CUL))
    said = host.error_of(host.wait(host.queue(graph)))["exception_message"]
    assert (
        "different files, 'minicanvas.safetensors' and 'foreign.safetensors'; make all of them from the "
        "same one" in said
    )


@on_newest()
def test_methods_plug_in(host):
    schemas = host.get("/object_info")
    for name in [name for name in schemas if name.startswith("CUL_Method_")]:
        graph = Graph()
        values = {key: spec[1]["default"] for key, spec in schemas[name]["input"]["required"].items()}
        values |= SHORT.get(name.removeprefix("CUL_Method_"), {})
        step = graph.step(graph.load(), method=(graph.add(name, **values), 0))
        graph.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix=f"checkpoints/{name}")
        host.run(graph)
        (path,) = host.saved(f"checkpoints/{name}_*")
        config = METHODS.get(name.removeprefix("CUL_Method_")).config
        assert config.from_json(read_history(path)[0][0].request["method"]) == config(**values)


@on_newest()
def test_regularizers_plug_in(host):
    schemas = host.get("/object_info")
    for name in [name for name in schemas if name.startswith("CUL_Regularizer_")]:
        graph = Graph()
        values = {key: spec[1]["default"] for key, spec in schemas[name]["input"]["required"].items()}
        values |= SHORT.get(name.removeprefix("CUL_Regularizer_"), {})
        regularizer = graph.add(name, **values)
        again = graph.add(name, **values, regularizers=(regularizer, 0))
        method = graph.add("CUL_Method_conabl", teacher="pretrained", block_first_token=True)
        step = graph.step(graph.load(), method=(method, 0), regularizers=(again, 0))
        graph.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix=f"checkpoints/{name}")
        host.run(graph)
        (path,) = host.saved(f"checkpoints/{name}_*")
        request = read_history(path)[0][0].request
        assert [entry["name"] for entry in request["regularizers"]] == [
            name.removeprefix("CUL_Regularizer_")
        ] * 2
        assert request["method"]["name"] == "conabl" and request["training"]["iterations"] == 3


@on_newest()
def test_evaluations_chain_into_one_table_and_chart(host):
    graph = Graph()
    loaded = graph.load()
    step = graph.step(loaded)
    first = graph.add("CUL_Evaluate", model=(loaded, CUL), pictures=1, sampling_seed=3)
    second = graph.add("CUL_Evaluate", model=(step, CUL), pictures=1, sampling_seed=3, earlier=(first, 2))
    entry = host.run(graph, seconds=900)  # some 600 pictures
    assert pixels(host, entry, second).shape[0] > 200


def progress_of(host, graph):
    """(kinds of binary messages, JSON messages) that a page gets while a graph runs."""
    websocket = pytest.importorskip("websocket")
    link = websocket.create_connection(f"ws://127.0.0.1:{host.port}/ws?clientId=tests", timeout=60)
    previews, messages = [], []

    def listen():
        while True:
            try:
                data = link.recv()
            except Exception:
                return
            if data:
                (previews.append(data) if isinstance(data, bytes) else messages.append(json.loads(data)))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    prompt = host.post("/prompt", {"prompt": graph, "client_id": "tests"})["prompt_id"]
    host.wait(prompt)
    time.sleep(0.5)
    link.close()
    return previews, messages


def test_the_page_gets_progress_previews_and_the_time_left(host):
    graph = Graph()
    step = graph.step(
        graph.load(), training=graph.training(iterations=8, batch_size=64), train_seed=31, preview_every=5
    )
    graph.add("CUL_DriftMap", model=(step, CUL))
    binary, messages = progress_of(host, graph)
    texts = [data for data in binary if int.from_bytes(data[:4], "big") == 3]
    assert any(b"iteration" in text and b"s left" in text for text in texts)
    # at 0, 5 and 8; a smaller batch would have none between
    assert len([data for data in binary if b"\xff\xd8\xff" in data[:64] or b"JFIF" in data[:512]]) >= 3
    assert any(message["type"].startswith("progress") for message in messages)


@on_newest()
def test_a_store_that_cannot_be_written_costs_no_result(host):
    graph = Graph()
    step = graph.step(graph.load(), train_seed=77)
    shown = graph.add("PreviewAny", source=(step, REPORT))
    steps = host.folder / "models/unlearning_chains/steps"
    aside = steps.rename(steps.with_name("aside"))
    steps.write_text("in the way")
    try:
        assert "Candy Stripes" in json.dumps(host.run(graph)["outputs"][shown])
    finally:
        steps.unlink()
        aside.rename(steps)
    assert "not kept for later runs" in host.log.read_text(errors="replace")


# --- errors: one sentence that says what, where and what to do; refused before training where possible


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g["2"]["inputs"].update(target="  "), "target is empty"),
        (
            lambda g: g["2"]["inputs"].update(kind="object", target="cat"),
            "'cat' of kind 'object' has no anchor; give the word",
        ),
        (lambda g: g["2"]["inputs"].update(anchor="Candy_Stripes"), "choose an anchor that differs"),
        (
            lambda g: g["3"]["inputs"].update(group="non-attn2"),
            "does not support parameter group 'non-attn2'; it supports",
        ),
        (
            lambda g: g["3"]["inputs"].update(learning_rate=1.0, group="full", iterations=40),
            "lower the learning rate",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_value_and_the_remedy(host, change, said):
    graph = Graph()
    loaded = graph.load()
    concept, training = graph.concept(), graph.training()
    step = graph.add(
        "CUL_UnlearnStep",
        model=(loaded, CUL),
        concepts=(concept, 0),
        training=(training, 0),
        preset="plain",
        train_seed=1,
        preview_every=0,
    )
    graph.add("CUL_DriftMap", model=(step, CUL))
    change(graph)
    entry = host.wait(host.queue(graph))
    assert entry["status"]["status_str"] == "error"
    assert said in host.error_of(entry)["exception_message"]
    assert "." not in host.error_of(entry)["exception_type"]  # a bare name, not a path on somebody's disk


@pytest.mark.parametrize(
    "name",
    [
        "../../../../etc/passwd",
        "/etc/passwd",
        "missing.safetensors",
        "../models/checkpoints/minicanvas.safetensors",
    ],
)
def test_a_file_that_is_not_in_the_list_is_not_read(host, name):
    graph = Graph()
    graph.add("CUL_DriftMap", model=(graph.load(name), CUL))
    refused = host.rejected(graph)
    if refused is None:  # older hosts do not compare with the list
        refused = host.error_of(host.wait(host.queue(graph)))["exception_message"]
    assert "not in list" in refused or "choose one of the list" in refused


def test_no_text_reaches_a_file_outside_the_output_folder(host):
    graph = Graph()
    graph.add("CUL_SaveCheckpoint", model=(graph.step(graph.load()), CUL), filename_prefix="../outside/x")
    assert host.rejected(graph) and not (host.folder / "outside").exists()


def test_compare_without_a_prompt_says_so(host):
    graph = Graph()
    loaded = graph.load()
    graph.add(
        "CUL_Compare", before=(loaded, CUL), after=(loaded, CUL), prompts=" \n", row_labels="a, b", **SAMPLING
    )
    assert "type at least one" in host.error_of(host.wait(host.queue(graph)))["exception_message"]


def test_the_report_names_what_was_done(host):
    graph = Graph()
    step = graph.step(graph.load())
    shown = graph.add("PreviewAny", source=(step, REPORT))
    entry = host.run(graph)
    text = json.dumps(entry["outputs"][shown])
    assert "Candy Stripes" in text and "projection" in text and "3 iterations" in text
