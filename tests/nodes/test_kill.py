"""The server is killed in the middle of a chain: after a restart the same graph takes the finished steps from
the store and goes on."""

import json
import re
import time

import pytest
from graphs import CUL, REPORT, Graph
from hosts import on_newest

ITERATIONS = 200


def chain_of_three():
    graph = Graph()
    last, reports = graph.load(), []
    for target, iterations in (("Candy Stripes", 3), ("Dusk Dots", ITERATIONS), ("Neon Cyan", 3)):
        last = graph.step(
            last,
            target,
            training=graph.training(iterations=iterations, anchor_count=16, anchor_steps=4),
            preset="trained",
            train_seed=5,
        )
        reports.append(graph.add("PreviewAny", source=(last, REPORT)))
    graph.add("CUL_DriftMap", model=(last, CUL))
    return graph, reports


def log_of(host):
    return host.log.read_text(errors="replace")


@on_newest()
def test_a_chain_goes_on_after_the_server_was_killed(host):
    graph, reports = chain_of_three()

    def hashes(entry):
        return [
            re.search(r"model ([0-9a-f]{12}) from", json.dumps(entry["outputs"][report])).group(1)
            for report in reports
        ]

    store = host.folder / "models/unlearning_chains"
    clear = Graph()
    clear.add("CUL_Store", clear="everything")
    host.run(clear)
    whole = hashes(host.run(graph))
    host.run(clear)
    assert not [path for path in store.rglob("*.safetensors") if path.parent.name != "sources"]
    host.forget()

    trained, begun = log_of(host).count("forgot 1 concept(s)"), len(log_of(host))
    host.queue(graph)
    deadline = time.monotonic() + 300

    def names(part):
        return {path.stem for path in (store / part).glob("*.safetensors")}

    while len(names("steps")) != 1 or not names("states") - names("steps"):
        if time.monotonic() > deadline:
            pytest.fail(f"no state was written:\n{host.tail()}")
        time.sleep(0.05)
    host.process.kill()
    host.process.wait()
    before = log_of(host)
    host.start()
    assert before.count("forgot 1 concept(s)") == trained + 1
    assert hashes(host.run(graph)) == whole
    said = log_of(host)[begun:]
    assert log_of(host).count("forgot 1 concept(s)") == trained + 3
    assert re.search(r"took a finished step from the store in \d+\.\d s: Candy.Stripes", said)
    (at,) = re.findall(rf"resumed at iteration (\d+) of {ITERATIONS}", said)
    assert 0 < int(at) < ITERATIONS
    assert not list((store / "states").glob("*")) and not list(store.rglob("*.cul-part"))
