"""API prompts with wrong values in every input of every node, on a running host: refused in one sentence, and
it goes on."""

import json
import os
import shutil
import time
import urllib.error
import urllib.request

import pytest
from graphs import CLIP, CUL, MODEL, SAMPLING, VAE, Graph
from hosts import HOW, NEWEST, Host
from refusals import entry, is_one_sentence, write_file
from safetensors.torch import load_file, save_file

from cul_core.base import errors
from cul_core.minicanvas.models import CHECKPOINT_PATH

OURS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.CulError)
} - {"CulError"}
MARKUP = "T<img src=x onerror=alert(1)>[[x|https://evil.example]]\x1b[2J"
BAD = {
    "INT": [
        "x",
        None,
        [],
        {},
        float("nan"),
        float("inf"),
        -(10**30),
        10**30,
        "1e400",
        ["99", 0],
        [1, 2, 3],
        {"__value__": [1]},
        [None, None],
    ],
    "FLOAT": [
        "x",
        None,
        [],
        {},
        float("nan"),
        "nan",
        float("inf"),
        "-inf",
        -1e300,
        10**30,
        ["99", 0],
        {"__value__": {}},
    ],
    "STRING": [
        "x" * 1_000_000,
        "a\n" * 10_000,
        "a\x00b",
        "\x1b[2J",
        "\u202e",
        "\ud800",
        [],
        ["99", 0],
        {"__value__": ["x"] * 3},
        "a -> a",
    ],
    "BOOLEAN": [[], ["99", 0], [1, 2, 3]],
    "COMBO": [
        "no such",
        1,
        None,
        [],
        {},
        ["x"],
        "../../etc/passwd",
        "/etc/passwd",
        {"__value__": [1]},
        "x" * 100_000,
        "",
        float("nan"),
    ],
    "socket": [5, "x", None, {}, [], {"a": 1}, ["99", 0], {"__value__": [1, 2]}, True, float("nan")],
}
PREFIXES = [
    "",
    "/",
    "/etc/x",
    "../x",
    "a/../../x",
    "..",
    "CON",
    "x/nul",
    "COM1.x",
    "a:b",
    "C:\\x",
    "a\0b",
    "a\nb",
    "a.",
    "a ",
    "x" * 300,
    "\u00e9" * 150,
    "a|b",
    "a?",
    "a*",
    '"',
    "<x>",
    "\u202e",
    "a//b",
    "\\\\server\\x",
    "checkpoints/../../../x",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The newest host: older ones stop working for good at prompts with nodes that have no inputs at all,
    whoever's the nodes are."""
    if NEWEST is None:
        pytest.skip(HOW)
    running = Host(NEWEST, tmp_path_factory.mktemp("host"))
    yield running
    running.stop()
    shutil.rmtree(running.folder)


def kind_of(spec):
    return "COMBO" if isinstance(spec[0], list) else spec[0] if spec[0] in BAD else "socket"


class Maker:
    """Graphs around one node whose inputs are all good but one."""

    def __init__(self, schemas):
        self.schemas = {name: schema for name, schema in schemas.items() if name.startswith("CUL_")}

    def inputs(self, name):
        return {
            key: spec
            for part in ("required", "optional")
            for key, spec in self.schemas[name]["input"].get(part, {}).items()
        }

    def graph(self, name, **changes):
        graph = Graph()
        loaded = graph.load()
        places = {
            "CUL_MODEL": (loaded, CUL),
            "MODEL": (loaded, MODEL),
            "CLIP": (loaded, CLIP),
            "CUL_CONCEPTS": (graph.concept(), 0),
            "CUL_TRAINING": (graph.training(anchor_count=4, anchor_steps=2), 0),
        }
        values = {}
        for key, spec in self.schemas[name]["input"]["required"].items():
            details = spec[1]
            options = spec[0] if isinstance(spec[0], list) else details.get("options")
            values[key] = places.get(spec[0], details.get("default", options[0] if options else None))
        values |= {"checkpoint": "minicanvas.safetensors"} if name == "CUL_LoadModel" else {}
        values |= {"target": "Candy Stripes"} if name == "CUL_Concept" else {}
        values |= (
            {"requests": "Candy Stripes", "training": places["CUL_TRAINING"]}
            if name == "CUL_UnlearnSequence"
            else {}
        )
        values |= {"training": places["CUL_TRAINING"]} if name == "CUL_UnlearnStep" else {}
        values |= {"preset": "plain"} if "preset" in values else {}  # it trains quickly
        values |= {"prompts": "a cat"} | SAMPLING if name == "CUL_Compare" else {}
        node = graph.add(name, **{key: value for key, value in values.items()} | changes)
        if not self.schemas[name]["output_node"]:
            graph.add("PreviewAny", source=(node, 0))
        return graph

    def bad(self, name):
        """(what is wrong, a prompt in which it is) for every input: a wrong value, none, and a link to what
        gives something else."""
        for number, (key, spec) in enumerate(self.inputs(name).items()):
            kind, details = kind_of(spec), spec[1]
            limits = [details["min"] - 1, details["max"] + 1] if kind in ("INT", "FLOAT") else []
            other = VAE if spec[0] == "CUL_MODEL" else CUL
            values = [*BAD[kind], *limits, ["1", 77], ["1", -1]]
            # inputs of a kind take turns
            third = [value for i, value in enumerate(values) if (i + number) % 3 == 0]
            for value in (float("nan"), ["1", other], *third):
                if value in ({}, []) and spec[0] == "CUL_TRAINING":
                    continue  # no settings are settings too
                if value is None and key in self.schemas[name]["input"].get("optional", {}):
                    continue  # as good as not connected
                yield f"{name}.{key} = {str(value)[:40]!r}", self.graph(name, **{key: value})
            if key in self.schemas[name]["input"]["required"]:
                graph = self.graph(name)
                del next(node for node in graph.values() if node["class_type"] == name)["inputs"][key]
                yield f"{name} without {key}", graph
        yield (
            f"{name} of itself",
            self.graph(name, **{key: [str(number), 0] for key in self.inputs(name) for number in (4,)}),
        )
        for inputs in (None, [], "x", 5):
            graph = self.graph(name)
            next(node for node in graph.values() if node["class_type"] == name)["inputs"] = inputs
            yield f"{name} with inputs {inputs!r}", graph


def posted(server, graph):
    """Prompt id; None where the host refuses it."""
    try:
        return server.post("/prompt", {"prompt": graph})["prompt_id"]
    except urllib.error.HTTPError as error:
        error.read()
        return None


def drained(server, seconds=900):
    deadline = time.monotonic() + seconds
    while server.get("/prompt")["exec_info"]["queue_remaining"]:
        assert server.process.poll() is None and time.monotonic() < deadline, server.tail()
        time.sleep(0.1)


def outside(server):
    """What lies where nothing of ours may write."""
    free = {"output", "temp", "user", "server.log", "unlearning_chains"}
    return {
        path
        for path in server.folder.parent.rglob("*")
        if not free & set(path.relative_to(server.folder.parent).parts) and "custom_nodes" not in path.parts
    }


def judged(server, sent, count):
    """Number of prompts refused by us; every one of those that ran and failed must have failed with one of
    our sentences."""
    drained(server)
    refused = 0
    for what, prompt in sent:
        if prompt is None:
            count("bad inputs")
            continue
        history = server.get(f"/history/{prompt}")[prompt]
        if history["status"]["status_str"] == "error":
            error = server.error_of(history)
            said = error["exception_message"].strip()
            assert error["exception_type"] in OURS and is_one_sentence(said), (
                what,
                error["exception_type"],
                said[:500],
            )
            count("bad inputs")
            refused += 1
    return refused


def test_wrong_values_in_every_input_of_every_node(server, count):
    maker, before, sent = Maker(server.get("/object_info")), outside(server), []
    for name in maker.schemas:
        sent += [(what, posted(server, graph)) for what, graph in maker.bad(name)]
    refused = judged(server, sent, count)
    assert refused > 100 and len(sent) > 500
    assert outside(server) == before
    assert "Traceback" not in "".join(line for line in server.tail().splitlines() if "cul_core" in line)


def test_prefixes_of_file_names_never_leave_the_output_folder(server, count):
    maker, before, saved, sent = (
        Maker(server.get("/object_info")),
        outside(server),
        server.saved("**/*.safetensors"),
        [],
    )
    for name in ("CUL_SaveCheckpoint", "CUL_SaveLora"):
        sent += [
            (f"{name} to {prefix[:40]!r}", posted(server, maker.graph(name, filename_prefix=prefix)))
            for prefix in PREFIXES
        ]
    refused_at_once = sum(prompt is None for _, prompt in sent)
    assert refused_at_once + judged(server, sent, count) == 2 * len(PREFIXES)
    assert outside(server) == before and server.saved("**/*.safetensors") == saved


@pytest.fixture(scope="module")
def strangers(server):
    """Names of files in the folder of checkpoints that are not what they seem."""
    folder, tensors = server.folder / "models/checkpoints", load_file(CHECKPOINT_PATH)
    write_file(folder / "header.safetensors", {"a": entry((1,), (0, 1 << 40))}, bytes(4))
    (folder / "zip.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    shape = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    save_file(tensors | {shape: tensors[shape][:3].clone()}, folder / "shape.safetensors")
    save_file(
        tensors,
        folder / "history.safetensors",
        metadata={"cul_format": "1", "cul_history": "[{}]", "cul_source": "{}"},
    )
    return sorted(path.name for path in folder.iterdir())


def test_files_that_are_not_what_they_seem_are_refused(server, strangers, count):
    sent = []
    for file in strangers:
        graph = Graph()
        graph.add("CUL_DriftMap", model=(graph.load(file), CUL))
        sent.append((f"load {file}", posted(server, graph)))
        graph = Graph()
        graph.add("CUL_History", file=file)
        sent.append((f"history of {file}", posted(server, graph)))
    before = len([prompt for _, prompt in sent if prompt])
    # the history of a checkpoint with one tensor cut is an honest "none"
    assert judged(server, sent, count) >= before - 1


def test_a_strangers_history_reaches_the_page_as_text(server, count):
    websocket = pytest.importorskip("websocket")
    request = {
        "concepts": [{"target": MARKUP, "kind": "style", "anchor": ""}],
        "method": {"name": MARKUP},
        "regularizers": [],
        "training": {"iterations": 1, "seed": 0},
    }
    record = {
        "request": request,
        "losses": {},
        "drift": {},
        "parent": "0",
        "result": "1",
        "seconds": 1,
        "finished": MARKUP,
        "versions": {},
    }
    source = {"name": MARKUP, "size": 1, "sha256": "0"}
    save_file(
        load_file(CHECKPOINT_PATH),
        server.folder / "models/checkpoints/markup.safetensors",
        metadata={"cul_format": "1", "cul_history": json.dumps([record]), "cul_source": json.dumps(source)},
    )
    graph = Graph()
    graph.add("PreviewAny", source=(graph.add("CUL_History", file="markup.safetensors"), 0))
    graph.add("CUL_DriftMap", model=(graph.load("markup.safetensors"), CUL))
    link = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=hostile", timeout=60)
    prompt, said = server.post("/prompt", {"prompt": graph, "client_id": "hostile"})["prompt_id"], []
    try:
        while True:
            data = link.recv()
            if isinstance(data, bytes) and int.from_bytes(data[:4], "big") == 3:
                said.append(data[8:])
            elif (
                isinstance(data, str)
                and json.loads(data)["type"] == "executing"
                and json.loads(data)["data"]["node"] is None
            ):
                break
    except (TimeoutError, websocket.WebSocketTimeoutException):
        pass
    link.close()
    history = server.wait(prompt)
    assert history["status"]["status_str"] == "success", server.error_of(history)
    shown = json.dumps(history["outputs"])
    assert "\\u001b" not in shown and "onerror" in shown
    assert len(said) >= 2 and all(
        b"onerror" in text and b"<" not in text and b"[[" not in text and b"://" not in text for text in said
    )
    count("bad inputs")


def test_the_host_still_works(server):
    graph = Graph()
    graph.add("CUL_DriftMap", model=(graph.step(graph.load(), train_seed=5), CUL))
    server.run(graph)
