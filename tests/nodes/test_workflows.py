"""Every shipped workflow runs from end to end; one of them in a real browser, by its template."""

import io
import json
from pathlib import Path

import pytest
from browser import CHROMIUM, NO_CHROMIUM, PACK_NAME, open_page
from graphs import Graph, api_of
from PIL import Image

WORKFLOWS = Path(__file__).parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
NEEDS_SD15 = "Remove an artist from SD 1.5"
SHORT_TRAINING = {
    "iterations": 2,
    "batch_size": 2,
    "learning_rate": 1e-4,
    "schedule": "constant",
    "group": "kv",
    "anchor_count": 8,
    "anchor_steps": 4,
}


def workflow(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def shortened(graph):
    """The same graph with less to train and to draw: what is tested is that it runs, not how well it
    forgets."""
    for node in list(graph.values()):
        if (
            node["class_type"] in ("CUL_UnlearnStep", "CUL_UnlearnSequence")
            and "training" not in node["inputs"]
        ):
            node["inputs"]["training"] = ["short", 0]
        if node["class_type"] == "CUL_TrainingSettings":
            node["inputs"] |= {"iterations": 2, "anchor_count": 8, "anchor_steps": 4}
        if node["class_type"] == "CUL_UnlearnSequence":
            node["inputs"]["requests"] = "\n".join(node["inputs"]["requests"].splitlines()[:2])
        if node["class_type"] == "CUL_Regularizer_projection":
            node["inputs"]["decoys"] = 30
        if node["class_type"] == "CUL_Compare":
            node["inputs"]["steps"] = 4
    return graph | {"short": {"class_type": "CUL_TrainingSettings", "inputs": dict(SHORT_TRAINING)}}


def shortened_file(saved):
    """A workflow as the page opens it, with short training settings connected to its one step."""
    (step,) = [node for node in saved["nodes"] if node["type"] == "CUL_UnlearnStep"]
    slot = [entry["name"] for entry in step["inputs"]].index("training")
    number, link = saved["last_node_id"] + 1, saved["last_link_id"] + 1
    step["inputs"][slot]["link"] = link
    saved["links"].append([link, number, 0, step["id"], slot, "CUL_TRAINING"])
    settings = {
        "id": number,
        "type": "CUL_TrainingSettings",
        "pos": [0, 900],
        "size": [330, 230],
        "outputs": [{"name": "training", "type": "CUL_TRAINING", "links": [link]}],
        "widgets_values": list(SHORT_TRAINING.values()),
    }
    saved["nodes"].append({"flags": {}, "order": 0, "mode": 0, "inputs": [], "properties": {}} | settings)
    return saved


def test_all_seven_workflows_are_there():
    assert len(NAMES) == 7 and NEEDS_SD15 in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_workflow_names_only_nodes_that_exist_and_has_a_thumbnail(host, name):
    schemas = host.get("/object_info")
    for node in workflow(name)["nodes"]:
        assert node["type"] in schemas or node["type"] == "MarkdownNote", node["type"]
    assert name in host.get("/workflow_templates")[PACK_NAME]
    with Image.open(WORKFLOWS / f"{name}.jpg") as thumbnail:
        assert 200 <= min(thumbnail.size) and max(thumbnail.size) <= 1000
    assert (WORKFLOWS / f"{name}.jpg").stat().st_size < 200_000


@pytest.mark.parametrize("name", [name for name in NAMES if name != NEEDS_SD15])
def test_workflow_runs(host, name):
    graph = shortened(api_of(workflow(name), host.get("/object_info")))
    entry = host.run(graph)
    shown = [output for output in entry["outputs"].values() if output.get("images")]
    assert shown
    for output in shown:
        assert output["images"][0]["type"] in ("temp", "output")


def test_the_second_half_of_the_save_workflow_runs_on_what_the_first_has_written(host):
    schemas, parts = host.get("/object_info"), workflow("Save, reload and compare")
    host.run(shortened(api_of(parts, schemas)))
    for node in parts["nodes"]:
        node["mode"] = 0
    host.forget()
    entry = host.run(shortened(api_of(parts, schemas)))
    previews = [node["id"] for node in parts["nodes"] if node["type"] == "PreviewImage"]
    pictures = [
        Image.open(io.BytesIO(host.picture(entry, str(node)))).convert("L").tobytes() for node in previews
    ]
    assert len(pictures) == 2
    assert max(abs(a - b) for a, b in zip(*pictures, strict=True)) <= 1  # the file holds fp16


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_template_opens_in_the_page_runs_and_shows_its_picture(host, tmp_path):
    with open_page(host) as page:
        for name in NAMES:
            page.open(page.template(name))
            assert page.tab.evaluate("() => app.graph._nodes.length") == len(workflow(name)["nodes"])
            assert name == NEEDS_SD15 or page.toasts() == []
        page.open(shortened_file(page.template("Forget a style")))
        entry = page.queue()
        assert entry["status"]["status_str"] == "success", host.error_of(entry)
        assert "CUL_TrainingSettings" in [node["class_type"] for node in entry["prompt"][2].values()]
        compare = next(
            node["id"] for node in workflow("Forget a style")["nodes"] if node["type"] == "CUL_Compare"
        )
        page.tab.wait_for_function(f"() => (app.nodeOutputs || {{}})['{compare}']", timeout=120_000)
        page.fit()
        page.tab.screenshot(path=tmp_path / "canvas.png")
        # the grid is light, the page dark
        assert Image.open(tmp_path / "canvas.png").convert("L").resize((64, 40)).getextrema()[1] > 150


@pytest.mark.slow
def test_the_workflow_for_stable_diffusion_runs_on_a_checkpoint_of_that_architecture(host):
    """Random weights, one picture of each kind, one iteration: on a CPU some minutes and 7 GB of memory."""
    from sd_layout import checkpoint_shapes, write_random

    path = write_random(
        host.folder / "models/checkpoints/v1-5-pruned-emaonly.safetensors", checkpoint_shapes()
    )
    graph = shortened(api_of(workflow(NEEDS_SD15), host.get("/object_info")))
    graph["short"]["inputs"].update(iterations=1, batch_size=1, anchor_count=1, anchor_steps=1)
    for node in graph.values():
        if node["class_type"] == "CUL_Compare":
            node["inputs"].update(prompts="a garden in the style of Van Gogh", steps=1)
        if node["class_type"] == "CUL_UnlearnStep":
            node["inputs"]["preview_every"] = 0
    host.run(graph, seconds=1800)
    (saved,) = host.saved("checkpoints/sd15-without-van-gogh_*")
    assert saved.stat().st_size > path.stat().st_size
    stock = Graph()
    loader = stock.add("CheckpointLoaderSimple", ckpt_name=saved.name)
    shown = stock.sample((loader, 0), (loader, 1), (loader, 2))
    assert host.run(stock, seconds=900)["outputs"][shown]["images"]
    path.unlink()
    saved.unlink()
