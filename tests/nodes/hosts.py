"""ComfyUI checkouts, and one of them as a running server with nothing but this pack, talked to over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

PACK = Path(__file__).parents[2]
HOW = "no ComfyUI found: set COMFYUI_PATH to one or several checkouts, or put them into ~/comfyui/"


def find_hosts() -> list[Path]:
    """Checkouts named by COMFYUI_PATH, those in ~/comfyui, and the one this pack is installed in."""
    named = [Path(part) for part in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if part]
    around = [PACK.parents[1]] if PACK.parent.name == "custom_nodes" else []
    places = named or [*sorted((Path.home() / "comfyui").glob("*")), *around]
    return [place.resolve() for place in places if (place / "comfyui_version.py").is_file()]


def version_of(host: Path) -> str:
    return (host / "comfyui_version.py").read_text().split('"')[-2]


def python_of(host: Path) -> str:
    """The interpreter of the host's own environment; this one if it has none."""
    for place in (
        ".venv/bin/python",
        "venv/bin/python",
        ".venv/Scripts/python.exe",
        "venv/Scripts/python.exe",
    ):
        if (host / place).exists():
            return str(host / place)
    return sys.executable


def without_diffusers(folder: Path) -> dict[str, str]:
    """Environment variables with which Python cannot find diffusers, whatever is installed."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib import metadata\n\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'diffusers':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n\n"
        "version = metadata.version\n\n"
        "def present(name):\n"
        "    if name == 'diffusers':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n\n"
        "sys.meta_path.insert(0, Absent())\n"
        "metadata.version = present\n"
    )
    return {"PYTHONPATH": str(folder)}


class Host:
    """A running server. Its models, outputs and user files lie in `folder`; the pack is linked into its
    custom nodes."""

    def __init__(self, checkout: Path, folder: Path, environment: dict[str, str] | None = None):
        self.checkout, self.folder, self.version = checkout, folder, version_of(checkout)
        self.environment = environment or {}
        for name in (
            "elsewhere",
            "models/checkpoints",
            "models/loras",
            "custom_nodes",
            "input",
            "output",
            "user/default",
            "temp",
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
        link = folder / "custom_nodes" / "continual-unlearning"
        if not link.exists():
            link.symlink_to(PACK, target_is_directory=True)
        (folder / "user/default/comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')
        (folder / "elsewhere.yaml").write_text(f"elsewhere:\n  checkpoints: {folder / 'elsewhere'}\n")
        self.log = folder / "server.log"
        self.start()

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        arguments = [
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.folder),
            "--database-url",
            f"sqlite:///{self.folder}/user/db.sqlite",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            "continual-unlearning",
            "--disable-api-nodes",
            "--disable-auto-launch",
            "--log-stdout",
            "--extra-model-paths-config",
            str(self.folder / "elsewhere.yaml"),
        ]
        environment = (
            os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONUNBUFFERED": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
            }
            | self.environment
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python_of(self.checkout), "main.py", *arguments],
                cwd=self.checkout,
                env=environment,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 600
        while True:
            try:
                self.get("/system_stats")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    pytest.fail(f"the host did not start:\n{self.tail()}")
                time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, raw: bool = False):
        with urllib.request.urlopen(self.url + path, timeout=120) as answer:
            data = answer.read()
        return data if raw else json.loads(data)

    def post(self, path: str, values: dict) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            data = answer.read()
        return json.loads(data) if data else {}

    def queue(self, graph: dict) -> str:
        """Prompt id; a rejected graph fails the test with the host's reasons."""
        try:
            return self.post("/prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"rejected: {error.read().decode()}")

    def rejected(self, graph: dict) -> str | None:
        """What the host says to a graph that it refuses to run; None if it would run it."""
        try:
            self.wait(self.post("/prompt", {"prompt": graph})["prompt_id"])
        except urllib.error.HTTPError as error:
            return error.read().decode()
        return None

    def wait(self, prompt_id: str, seconds: float = 900) -> dict:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if history := self.get(f"/history/{prompt_id}"):
                return history[prompt_id]
            if self.process.poll() is not None:
                pytest.fail(f"the host died:\n{self.tail()}")
            time.sleep(0.05)
        pytest.fail(f"prompt still running after {seconds} s:\n{self.tail()}")

    def run(self, graph: dict, seconds: float = 900) -> dict:
        """The finished history entry; an error fails the test with its message."""
        entry = self.wait(self.queue(graph), seconds)
        if entry["status"]["status_str"] != "success":
            pytest.fail(f"{self.error_of(entry)}\n{self.tail()}")
        return entry

    def forget(self) -> None:
        """What the "Free memory" button does: the host drops all cached results."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)

    def error_of(self, entry: dict) -> dict:
        return next(
            (
                values
                for kind, values in entry["status"]["messages"]
                if kind in ("execution_error", "execution_interrupted")
            ),
            {},
        )

    def executed(self, entry: dict) -> set[str]:
        """Ids of nodes that were not taken from the host's cache."""
        cached = {
            node
            for kind, values in entry["status"]["messages"]
            if kind == "execution_cached"
            for node in values["nodes"]
        }
        return set(entry["prompt"][2]) - cached

    def picture(self, entry: dict, node: str) -> bytes:
        image = entry["outputs"][node]["images"][0]
        return self.get("/view?" + urllib.parse.urlencode(image), raw=True)

    def saved(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "output").glob(pattern))


HOSTS = find_hosts()
IDS = [version_of(host) for host in HOSTS] or ["none"]
NEWEST = max(HOSTS, key=lambda host: [int(part) for part in version_of(host).split(".")], default=None)


def on_newest(fixture: str = "host"):
    """Marks a test of what is the same on every host, and takes long: it runs on the newest one only."""
    return pytest.mark.parametrize(fixture, [NEWEST], ids=[NEWEST and version_of(NEWEST)], indirect=True)
