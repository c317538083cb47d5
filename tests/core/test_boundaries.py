"""What the library must never contain or import, read from its source and from a bare interpreter."""

import ast
import json
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cul_core").rglob("*.py"))

# From the bottom, one or more folders on a floor: a module imports from its own folder and from floors below.
FLOORS = (
    ("base",),
    ("files",),
    ("models",),
    ("concepts",),
    ("history",),
    ("parts",),
    ("methods", "regularizers", "mergers"),
    ("requests",),
    ("training",),
    ("output",),
    ("store",),
    ("audits",),
    ("minicanvas",),
    ("cli",),
    ("__main__",),
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

BARE_INTERPRETER = """
import importlib, json, pkgutil, sys

HOST = {"comfy", "comfy_api", "folder_paths", "nodes", "server", "execution"}

class NoHost:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HOST:
            raise ImportError(f"{name} belongs to the host")

sys.meta_path.insert(0, NoHost())
import cul_core
names = ["cul_core", *(m.name for m in pkgutil.walk_packages(cul_core.__path__, "cul_core."))]
names.remove("cul_core.__main__")
failed = {}
for name in names:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "cul_core"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = repr(error)
heavy = sorted({"diffusers", "transformers"} & sys.modules.keys())
print(json.dumps({"names": names, "failed": failed, "heavy": heavy}))
"""


def module_of(file):
    """Dotted name below `cul_core`; "" for the package itself."""
    parts = file.relative_to(ROOT / "cul_core").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(file):
    """Dotted names below `cul_core` that a file imports, at its top or inside a function."""
    package = ["cul_core", *file.relative_to(ROOT / "cul_core").parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*origin, *(node.module or "").split(".")]).strip(".")
            is_package = (ROOT / origin.replace(".", "/")).is_dir()
            found |= {f"{origin}.{alias.name}" if is_package else origin for alias in node.names}
    return {name.partition(".")[2] for name in found if name.startswith("cul_core.")}


def trees():
    return [(module_of(file) or "cul_core", ast.parse(file.read_text(encoding="utf-8"))) for file in FILES]


@pytest.fixture(scope="module")
def bare_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", BARE_INTERPRETER], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_imports_alone_without_a_host(bare_interpreter):
    assert {"cul_core.training.step", "cul_core.methods.conabl", "cul_core.minicanvas.demo"} <= set(
        bare_interpreter["names"]
    )
    assert bare_interpreter["failed"] == {}


def test_importing_the_library_loads_neither_diffusers_nor_transformers(bare_interpreter):
    assert bare_interpreter["heavy"] == []


def rooms():
    """(module, imported module) for every import within the library from another room."""
    found = []
    for file in FILES:
        module = module_of(file)
        for name in imported_by(file):
            room = name.partition(".")[0]
            if module and room not in (module.partition(".")[0], "__version__"):
                found.append((module, name))
    return found


def test_every_module_is_in_a_room():
    assert {module_of(file).partition(".")[0] for file in FILES} - {""} == LEVELS.keys()


def test_no_module_imports_from_a_room_on_its_own_floor_or_above():
    arrows = rooms()
    assert len(arrows) > 200
    upward = {
        (module, name)
        for module, name in arrows
        if LEVELS[name.partition(".")[0]] >= LEVELS[module.partition(".")[0]]
    }
    assert upward == set()


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside a function count too: a circle that waits until it is called is one."""
    modules = {module_of(file): file for file in FILES}
    arrows = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imported_by(file)}
        for module, file in modules.items()
    }
    order = TopologicalSorter(arrows)
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert sum(map(len, arrows.values())) > 300


def test_no_module_changes_the_search_path_or_uses_what_is_banned():
    banned_calls = {"print", "eval", "exec", "torch.load", "sys.exit", "sys.path.append", "sys.path.insert"}
    banned_imports = {"pickle", "cPickle", "dill", "cloudpickle"}
    wrong = []
    for module, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in banned_calls:
                wrong.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names} | {
                    getattr(node, "module", None)
                }
                if names & banned_imports or (getattr(node, "module", None) == "torch" and "load" in names):
                    wrong.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    assert wrong == []


def test_no_exception_is_swallowed_whatever_it_is():
    wrong = []
    for module, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                if not any(isinstance(part, ast.Raise) for part in ast.walk(node)):
                    wrong.append(f"{module}:{node.lineno}")
    assert wrong == []


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_a_host_installs_nothing_for_the_pack(pyproject):
    assert pyproject["project"]["dependencies"] == [] and not (ROOT / "requirements.txt").exists()


def test_packages_of_the_library_are_asked_for_by_extras(pyproject):
    extras = " ".join(
        entry.lower()
        for entries in pyproject["project"]["optional-dependencies"].values()
        for entry in entries
    )
    for package in ("diffusers", "torch", "transformers", "safetensors", "pillow", "numpy"):
        assert package in extras


def test_the_pack_names_its_publisher_and_itself_for_the_host(pyproject):
    assert all(pyproject["tool"]["comfy"].get(key) for key in ("PublisherId", "DisplayName"))
