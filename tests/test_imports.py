#!/usr/bin/env python3
"""The rooms of the house, over their syntax trees: who imports whom, how large they are, who knows a task.

    python tests/test_imports.py            # a table of the rooms: lines, their length, share of comments

An import inside a function is a door: the file works without what lies behind it until the function is
called.
"""
from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from pieces import run_alone

ROOT = Path(__file__).resolve().parents[1]
LINE = 110
FOLDERS = ("volumes", "training", "tasks")

# What people copy: each imports torch, and of ours what stands here, as it is loaded or through a door.
TORCH_ONLY: dict[str, set[str]] = {
    "vae3d": {"lean_conv", "lean_norm"},         # taken where they lie beside it
    "quantize": set(), "lean_conv": set(), "lean_norm": set(), "local_layers": {"lean_norm"},
    "tiles": {"local_layers", "lean_norm"}, "tile_plans": {"local_layers", "tiles"},
    "unet": {"lean_norm"}, "diffusion": set(),
    "losses": set(), "adversarial": set(), "perceptual": set(), "peaks": set(), "pictures": set(),
    "sparse_conv": set(), "sparse_attention": {"sparse_conv"},
    "sparse_tables": {"sparse_conv", "sparse_attention"},
    "sparse": {"sparse_conv", "sparse_attention", "sparse_tables"},
    "weights": {"vae3d", "unet"}, "unet_weights": {"unet"}, "control": set(), "muon": set(),
    "metrics": set(), "augment": set(), "windows": set(),
}
DOORS: dict[str, set[str]] = {
    "vae3d": {"quantize", "local_layers", "tiles", "tile_plans"},
    "sparse": {"quantize"},
}
LIBRARIES = {"torch", "numpy", "nibabel", "yaml", "PIL", "SimpleITK", "wandb"}
COMMANDS = {"train", "predict", "memtest"}
MAIN_PATH = {"losses.py", "data.py", "training/step.py", "tasks/vae.py", "train.py"}

# The file of tests of a room that has none of its name.
TESTED_IN = {
    "lean_conv": "test_vae3d",                  # VAE3D takes it where it lies beside it
    "local_layers": "test_tiles",               # the table of layers that tiles go by
    "tile_plans": "test_tiles",
    "control": "test_denoiser",
    "unet_weights": "test_unet",
    "volumes.classes": "test_label_maps",
    "volumes.config": "test_data_config",       # test_config.py is that of training/config.py
    "volumes.entries": "test_cache",
    "volumes.files": "test_find",
    "volumes.format_arrays": "test_formats",
    "volumes.format_nibabel": "test_formats",
    "volumes.loading": "test_label_maps",
    "volumes.seeds": "test_data",               # crops that are functions of (seed, index)
    "volumes.told": "test_intensities",         # notes and scales, as data.open_data tells them
    "volumes.volume": "test_formats",
    "tasks.vae": "test_tasks",
    "tasks.diffusion": "test_diffusion_task",   # test_diffusion.py is that of diffusion.py
    "training.conditions": "test_latent_data",
    "tasks.features": "test_tasks",
    "training.bf16_probe": "test_devices",
    "training.capacity": "test_memtest",
    "training.cases": "test_results",
    "training.console": "test_log",
    "training.facts": "test_foreign",
    "training.spellings": "test_flags",
    "training.forward": "test_step",
    "training.opening": "test_run_page",
    "training.run": "test_folder",
    "training.state": "test_step",
    "training.task": "test_tasks",
}
# What a room's own tests take long for is also tested, in part, by quick ones.
QUICK_IN = {"training.signals": "test_jobs"}


# --------------------------------------------------------------------------------------- reading the house

def files() -> list[Path]:
    """All rooms: neither tests nor benches."""
    found = sorted(ROOT.glob("*.py"))
    for folder in FOLDERS:
        found += sorted((ROOT / folder).rglob("*.py"))
    return found


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def rooms() -> dict[str, ast.Module]:
    """Name of a module -> its syntax tree."""
    found = {}
    for path in files():
        name = place(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def imported(nodes, known) -> set[str]:
    """The modules that import statements among these nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out, from the root on"
            for alias in node.names:
                part = f"{node.module}.{alias.name}"
                found.add(part if part in known else node.module)
    return found


def inside_functions(tree: ast.Module) -> list[ast.AST]:
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [node for function in functions for node in ast.walk(function)]


def arrows(tree: ast.Module, known) -> tuple[set[str], set[str]]:
    """The modules that a room imports as it is loaded, and those behind doors."""
    behind = inside_functions(tree)
    ids = {id(node) for node in behind}
    at_top = [node for node in ast.walk(tree) if id(node) not in ids]
    return imported(at_top, known), imported(behind, known)


def is_library(name: str) -> bool:
    top = name.split(".")[0]
    return top in LIBRARIES or top in sys.stdlib_module_names


def layer(name: str) -> int:
    """Height of a room: what people copy, files on disk, crops, a run, what is trained, commands."""
    if name in TORCH_ONLY:
        return 0
    if name in COMMANDS:
        return 5
    heights = {"volumes": 1, "data": 2, "training": 3, "tasks": 4}
    top = name.split(".")[0]
    assert top in heights, f"{name}.py: a file at the root that the table of rooms does not know"
    return heights[top]


# -------------------------------------------------------------------------------------------------- arrows

def test_files_that_people_copy_import_torch_alone():
    known = rooms()
    for name in TORCH_ONLY.keys() & known.keys():
        at_top, behind = arrows(known[name], known)
        for module in at_top | behind:
            top = module.split(".")[0]
            allowed = {"torch", *TORCH_ONLY[name]}
            if module not in at_top:
                allowed |= DOORS.get(name, set())
            assert top in allowed or top in sys.stdlib_module_names, f"{name}.py imports {module}"


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_a_file_that_people_copy_loads_in_a_folder_of_its_own(room, tmp_path):
    """Beside it lie the files that its row names, and those that theirs name; of packages torch is enough."""
    needed, found = [room], set()
    while needed:
        name = needed.pop()
        found.add(name)
        needed += TORCH_ONLY[name] - found
    said = run_alone(tmp_path, [f"{name}.py" for name in found], f"import {room}\nprint(*sys.modules)")
    loaded = set(said.split())
    assert room in loaded and not loaded & {"nibabel", "yaml", "monai", "PIL", "scipy", "SimpleITK"}


def test_arrows_point_downwards():
    """Doors included. No room imports a command, and volumes/ no file of the root."""
    known = rooms()
    for name, tree in known.items():
        for module in set.union(*arrows(tree, known)):
            if is_library(module):
                continue
            assert module in known, f"{name} imports {module}, which is no room and no library of ours"
            assert module not in COMMANDS, f"{name} imports the command {module}"
            assert layer(module) <= layer(name), f"{name} imports {module}, which lies above it"
            if name.split(".")[0] == "volumes":
                assert module.split(".")[0] == "volumes", f"{name} imports {module} of the root"


def test_there_is_no_circle():
    """As the rooms are loaded, and through doors too."""
    known = rooms()
    below = {name: set.union(*arrows(tree, known)) & known.keys() - {name} for name, tree in known.items()}
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in sorted(below[name]):
                visit(other, (*path, name))
            done.append(name)
    for name in below:
        visit(name, ())


def test_the_task_is_asked_for_in_one_place():
    """A task is a name in the config, a row of the table, and else an object."""
    asked = re.compile(r"cfg\.task\b|\.task ==")
    found = {place(path) for path in [*files(), *ROOT.glob("bench/*.py")] if asked.search(path.read_text())}
    assert found == {"training/task.py"}


# --------------------------------------------------------------------------------------------------- sizes

def every_file() -> list[Path]:
    return [*files(), *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("bench/*.py"))]


def most_lines(path: Path) -> int:
    if place(path).startswith("tests/"):
        return 900
    return 500 if place(path) in MAIN_PATH else 600


@pytest.mark.parametrize("path", every_file(), ids=place)
def test_a_room_is_not_too_large(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= most_lines(path), f"{place(path)}: {len(lines)} lines, at most {most_lines(path)}"
    too_long = [number for number, line in enumerate(lines, 1) if len(line) > LINE]
    assert not too_long, f"{place(path)}: {len(too_long)} lines above {LINE} columns: {too_long[:20]}"


def comment_lines(source: str) -> set[int]:
    """The numbers of lines with a `#`, or in a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def lines_of(path: str, name: str) -> int:
    """Lines of a function, a class or a method, `Class.method`."""
    node = ast.parse((ROOT / path).read_text())
    for part in name.split("."):
        node = next(inner for inner in node.body if getattr(inner, "name", "") == part)
    return node.end_lineno - node.lineno + 1


def main_path() -> dict[str, int]:
    """What docs/READING.md tells a newcomer to read: file and names -> lines."""
    found = {}
    for row in re.findall(
        r"^\| \[(\S+)\]\(\.\./\S+\): (.*?) \|", (ROOT / "docs/READING.md").read_text(), re.M
    ):
        path, names = row
        for name in re.findall(r"`([\w.]+)`", names):
            found[f"{path}: {name}"] = lines_of(path, name)
    return found


def test_the_main_path_takes_a_quarter_of_an_hour():
    found = main_path()
    assert len(found) > 25 and sum(found.values()) <= 800, f"{sum(found.values())} lines: {found}"


# --------------------------------------------------------------------------------------------------- tests

def file_of_tests(room: str) -> Path:
    name = TESTED_IN.get(room, "test_" + room.split(".")[-1])
    return ROOT / "tests" / f"{name}.py"


def rooms_with_code() -> list[str]:
    """All but a folder's `__init__.py` that holds nothing but words."""
    return [name for name, tree in rooms().items() if len(tree.body) > 1]


def quick_tests(path: Path) -> list[str]:
    """Names of the tests of a file that bear no mark `slow`, nor their file."""
    tree = ast.parse(path.read_text())
    if any(isinstance(node, ast.Assign) and ast.unparse(node) == "pytestmark = pytest.mark.slow"
           for node in tree.body):
        return []
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if function.name.startswith("test_")
            and "pytest.mark.slow" not in [ast.unparse(mark) for mark in function.decorator_list]]


@pytest.mark.parametrize("room", rooms_with_code())
def test_every_room_has_tests_and_quick_ones(room):
    path = file_of_tests(room)
    assert path.is_file(), f"{room}: no {path.name}; write it, or say in TESTED_IN where the room is tested"
    quick = path.with_name(f"{QUICK_IN.get(room, path.stem)}.py")
    assert quick_tests(quick), f"{room}: every test of {quick.name} is slow"


def test_exceptions_are_of_rooms_and_needed():
    known = rooms()
    assert TESTED_IN.keys() | QUICK_IN.keys() <= known.keys()
    for room in TESTED_IN.keys() - {"volumes.config", "tasks.diffusion"}:
        assert not (ROOT / "tests" / f"test_{room.split('.')[-1]}.py").exists(), room
    assert not any(quick_tests(file_of_tests(room)) for room in QUICK_IN)


def table() -> None:
    print(f"{'room':30} lines  longest  mean  comments")
    for path in files():
        source = path.read_text()
        lines = source.splitlines()
        lengths = [len(line) for line in lines if line.strip()] or [0]
        share = len(comment_lines(source)) / max(1, len(lines))
        mean = sum(lengths) / len(lengths)
        print(f"{place(path):30} {len(lines):5}  {max(lengths):7}  {mean:4.0f}  {share:7.0%}")
    print(f"main path of docs/READING.md: {sum(main_path().values())} lines")


if __name__ == "__main__":
    table()
