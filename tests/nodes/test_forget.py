"""Forget in the real host: between stock loaders and samplers, in a row, with LoRAs between, at a strength,
saved and taken back; and what it refuses."""

import json
import re

import numpy as np
import pytest
from graphs import FORGOTTEN, KEPT, Graph
from hosts import on_newest
from test_from_model import kept, lora  # noqa: F401  (a fixture)
from test_unlearning import pixels, sampled_by_stock_nodes, steps_trained

from cul_core.history.step_record import read_history

LAVA = "A cat image in Lava style."


def stock_loader(graph, name="minicanvas.safetensors"):
    return graph.add("CheckpointLoaderSimple", ckpt_name=name)


def forget(graph, model, names, **more):
    """Forget behind the node `model`, with the CLIP of the loader, the graph's first node."""
    values = {"keep": "", "how": "fast", "strength": 1.0} | more
    return graph.add("CUL_Forget", model=(model, 0), clip=("1", 1), forget=names, **values)


def drawn(graph, model, prompt=FORGOTTEN):
    return graph.sample((model, 0), ("1", 1), ("1", 2), prompt)


def text_of(graph, node, slot=0):
    """Id of a node whose output is the text of another one."""
    return graph.add("PreviewAny", source=(node, slot))


def test_between_stock_nodes_it_changes_what_is_forgotten_and_shows_it(host):
    graph = Graph()
    stock = stock_loader(graph)
    forgot = forget(graph, stock, "Candy Stripes", vae=(stock, 2))
    report = text_of(graph, forgot, 2)
    shown = [
        (drawn(graph, stock, prompt), graph.sample((forgot, 0), (forgot, 1), (stock, 2), prompt))
        for prompt in (FORGOTTEN, KEPT)
    ]
    entry = host.run(graph)
    gone, left = (
        np.abs(pixels(host, entry, after) - pixels(host, entry, before)).mean() for before, after in shown
    )
    assert gone > 25 and left < 0.4 * gone
    assert "Forgot Candy Stripes" in json.dumps(entry["outputs"][report])
    picture = pixels(host, entry, forgot)
    assert min(picture.shape[:2]) > 128 and picture.std() > 30
    found = host.get("/object_info/CUL_Forget")["CUL_Forget"]
    assert "erase" in found.get("search_aliases", ["erase"])


@on_newest()
def test_in_a_row_they_are_one_set_also_with_a_lora_between(host, lora):  # noqa: F811
    def patched(graph, model):
        return graph.add("LoraLoaderModelOnly", model=(model, 0), lora_name=lora, strength_model=1.0)

    graph, before = Graph(), kept(host)
    stock = stock_loader(graph)
    both, first = (forget(graph, stock, names) for names in ("Candy Stripes\nLava", "Candy Stripes"))
    second = forget(graph, first, "Lava")
    behind, between = patched(graph, both), forget(graph, patched(graph, first), "Lava")
    histories = [
        text_of(graph, graph.add("CUL_History", file="minicanvas.safetensors", model=(node, 0)))
        for node in (both, second, between)
    ]
    pictures = [drawn(graph, node, LAVA) for node in (both, second, behind, between)]
    taken = graph.add("CUL_TakeBack", model=(between, 0), names="Lava")
    pictures += [
        drawn(graph, patched(graph, first), LAVA),
        graph.sample((taken, 1), ("1", 1), ("1", 2), LAVA),
    ]
    entry = host.run(graph)
    hashes = [re.findall(r"model (\w{12}) from", json.dumps(entry["outputs"][node])) for node in histories]
    assert len(hashes[0]) == 2 and hashes[0] == hashes[1] == hashes[2]
    one, other, lora_behind, lora_between, without, taken_back = (
        pixels(host, entry, node) for node in pictures
    )
    assert np.array_equal(one, other)
    assert np.abs(lora_behind - lora_between).max() <= 1  # sums of patches in another order
    assert np.abs(without - taken_back).max() <= 1
    assert np.abs(lora_between - one).mean() > 2 and np.abs(without - lora_between).mean() > 20
    assert kept(host) == before  # the loader's file is the pretrained model


@on_newest()
def test_strength_scales_what_is_drawn_and_saved_without_computing_anew(host):
    def graph_at(strength):
        graph = Graph()
        forgot = forget(graph, stock_loader(graph), "Candy Stripes", strength=strength)
        graph.add("CUL_SaveCheckpoint", model=(forgot, 0), filename_prefix=f"checkpoints/at-{strength}")
        return graph, drawn(graph, forgot)

    pictures, computed = {}, None
    for strength in (1.0, 0.5, 0.0):
        graph, shown = graph_at(strength)
        pictures[strength] = pixels(host, host.run(graph), shown)
        computed = computed or steps_trained(host)
    assert steps_trained(host) == computed
    untouched = sampled_by_stock_nodes(host, "minicanvas.safetensors")
    assert np.array_equal(pictures[0.0], untouched)
    far, near = (np.abs(pictures[strength] - untouched).mean() for strength in (1.0, 0.5))
    assert far > 25 and 1 < near and np.abs(pictures[1.0] - pictures[0.5]).mean() > 1
    for strength in (1.0, 0.5):
        (saved,) = host.saved(f"checkpoints/at-{strength}_*")
        # the file holds fp16
        assert np.abs(sampled_by_stock_nodes(host, saved.name) - pictures[strength]).max() <= 2
        assert [record.targets for record in read_history(saved)[0]] == [("Candy Stripes",)]
    again = Graph()
    further = forget(again, stock_loader(again, host.saved("checkpoints/at-1.0_*")[0].name), "Lava")
    again.add("CUL_SaveCheckpoint", model=(further, 0), filename_prefix="checkpoints/forgot-further")
    host.run(again)
    (saved,) = host.saved("checkpoints/forgot-further_*")
    assert [record.targets for record in read_history(saved)[0]] == [("Candy Stripes",), ("Lava",)]


@on_newest()
def test_a_model_without_history_or_merged_since_is_refused_where_a_history_is_needed(host):
    graph = Graph()
    stock = stock_loader(graph)
    forgot = forget(graph, stock, "Candy Stripes")
    merged = graph.add("ModelMergeSimple", model1=(forgot, 0), model2=(stock, 0), ratio=0.5)
    for node, said in ((stock, "Put Forget"), (merged, "put Forget behind the merge")):
        asked = Graph(graph)
        asked.add("CUL_DriftMap", model=(node, 0))
        assert said in host.error_of(host.wait(host.queue(asked)))["exception_message"]


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"forget": " \n# nothing\n"}, "list of requests is empty"),
        ({"forget": "Lava\nlava"}, "to be forgotten twice"),
        ({"forget": "Lava", "keep": "Frost, lava"}, "in both lists"),
        ({"forget": "(Lava:1.2)"}, "the syntax of prompts"),
        ({"forget": "Lava", "keep": "<lora:Frost:1>"}, "the syntax of prompts"),
        ({"forget": "object: cat"}, "has no anchor"),
    ],
)
@on_newest()
def test_lists_that_cannot_work_are_refused_before_anything_runs(host, lists, said):
    graph = Graph()
    forgot = forget(graph, stock_loader(graph), lists["forget"], keep=lists.get("keep", ""))
    drawn(graph, forgot)
    assert said in (host.rejected(graph) or "")
