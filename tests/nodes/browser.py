"""The host's page in a real Chromium: open a template, queue it, look at it."""

from __future__ import annotations

import shutil
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

PACK_NAME = "continual-unlearning"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
NO_CHROMIUM = "no Chromium found: install Debian's chromium, or Google Chrome, to run the browser test"

_READY = "() => window.app && app.graph && Object.keys(LiteGraph.registered_node_types).length > 100"
_FIT = """() => {
    const box = [Infinity, Infinity, -Infinity, -Infinity];
    for (const node of app.graph._nodes) {
        box[0] = Math.min(box[0], node.pos[0]); box[1] = Math.min(box[1], node.pos[1] - 50);
        box[2] = Math.max(box[2], node.pos[0] + node.size[0]);
        box[3] = Math.max(box[3], node.pos[1] + node.size[1]);
    }
    const view = app.canvas.ds, canvas = app.canvas.canvas, ratio = window.devicePixelRatio || 1;
    const width = canvas.width / ratio - 90, height = canvas.height / ratio - 170;
    view.scale = Math.min(width / (box[2] - box[0] + 60), height / (box[3] - box[1] + 40), 1);
    view.offset[0] = -box[0] + 80 / view.scale; view.offset[1] = -box[1] + 100 / view.scale;
    app.canvas.setDirty(true, true);
    return [box[0], box[1], box[2], box[3], view.scale, view.offset[0], view.offset[1]];
}"""

_RECTANGLE = """(type) => {
    const node = app.graph._nodes.find((node) => node.type === type), view = app.canvas.ds;
    const frame = app.canvas.canvas.getBoundingClientRect();
    return {
        x: frame.x + (node.pos[0] + view.offset[0]) * view.scale - 6,
        y: frame.y + (node.pos[1] - 34 + view.offset[1]) * view.scale,
        width: node.size[0] * view.scale + 12,
        height: (node.size[1] + 40) * view.scale,
    };
}"""


class Page:
    """One tab of the host's page."""

    def __init__(self, tab, host):
        self.tab, self.host = tab, host
        tab.goto(host.url)
        tab.wait_for_function(_READY, timeout=120_000)
        tab.wait_for_timeout(1500)

    def template(self, name: str) -> dict:
        path = urllib.parse.quote(f"/api/workflow_templates/{PACK_NAME}/{name}.json")
        return self.host.get(path)

    def open(self, workflow: dict) -> None:
        """Put a workflow on the canvas, as the page does with a template or a dropped file."""
        self.tab.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self.tab.wait_for_timeout(800)

    def toasts(self) -> list[str]:
        """Messages the page shows about what is wrong."""
        return [
            text for text in self.tab.locator(".p-toast-message, .p-dialog").all_inner_texts() if text.strip()
        ]

    def queue(self, seconds: float = 300) -> dict:
        """Press Queue and wait: the history entry."""
        before = set(self.host.get("/history"))
        self.tab.evaluate("() => app.queuePrompt(0, 1)")
        for _ in range(int(seconds * 4)):
            self.tab.wait_for_timeout(250)
            if new := set(self.host.get("/history")) - before:
                return self.host.get("/history")[new.pop()]
        raise AssertionError(f"nothing in the history after {seconds} s; the page says {self.toasts()}")

    def outputs(self) -> dict:
        """What the page shows on its nodes, by node id."""
        return self.tab.evaluate("() => JSON.parse(JSON.stringify(app.nodeOutputs || {}))")

    def fit(self) -> list[float]:
        self.tab.wait_for_timeout(600)
        box = self.tab.evaluate(_FIT)
        self.tab.wait_for_timeout(900)
        return box

    def rectangle(self, node_type: str) -> dict:
        """Clip rectangle, in page pixels, of the first node of a type."""
        return self.tab.evaluate(_RECTANGLE, node_type)


@contextmanager
def open_page(host, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
            ],
        )
        try:
            yield Page(browser.new_page(viewport={"width": width, "height": height}), host)
        finally:
            browser.close()
