"""The rooms and the arrows between them, over the syntax trees: imports point downwards, and there is no circle."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH_ONLY = {                                                   # what people copy alone -> the rooms that it may open besides torch
    "adversarial": set(), "losses": set(), "peaks": set(), "perceptual": set(), "pictures": set(), "unet": set(), "vae3d": set(),
    "weights": {"vae3d", "unet"},
}
COMMANDS = {"train", "predict", "memtest"}
LIBRARIES = {"torch", "numpy", "nibabel", "yaml", "PIL", "wandb"}


def rooms() -> dict[str, ast.Module]:
    """Name of a module -> its syntax tree, of all but tests and benches."""
    files = [*ROOT.glob("*.py"), *(ROOT / "training").glob("*.py"), *(ROOT / "tasks").glob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    return {name: ast.parse(path.read_text()) for path, name in names.items()}


def arrows(tree: ast.Module, known, doors: bool = True) -> set[str]:
    """The modules that a room imports; doors: also inside functions."""
    found = set()
    for node in ast.walk(tree) if doors else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in known else node.module for part in parts}
    return found


def layer(name: str) -> int:
    """Height of a room: what people copy, data, a run, what is trained, commands."""
    if name in TORCH_ONLY:
        return 0
    if name in COMMANDS:
        return 4
    return {"data": 1, "training": 2, "tasks": 3}[name.split(".")[0]]


def test_files_that_people_copy_import_torch_alone():
    known = rooms()
    for name, allowed in TORCH_ONLY.items():
        for module in arrows(known[name], known):
            top = module.split(".")[0]
            assert top in {"torch", *allowed} or top in sys.stdlib_module_names, f"{name}.py imports {module}"


def test_arrows_point_downwards():
    known = rooms()
    for name, tree in known.items():
        for module in arrows(tree, known):
            top = module.split(".")[0]
            if module in known or top in ("training", "tasks"):
                assert layer(module) <= layer(name), f"{name} imports {module}, which lies above it"
                assert layer(name) < 4 or module not in COMMANDS, f"{name} imports the command {module}"
            else:
                assert top in LIBRARIES or top in sys.stdlib_module_names, f"{name} imports {module}"


def test_there_is_no_circle():
    known = rooms()
    below = {name: arrows(tree, known) & known.keys() for name, tree in known.items()}
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in sorted(below[name]):
                if other != name:
                    visit(other, (*path, name))
            done.append(name)
    for name in below:
        visit(name, ())


def test_the_task_is_asked_for_in_one_place():
    """A task is a name in the config, a row of the table, and else an object."""
    asked = re.compile(r"cfg\.task\b|\.task ==")
    files = [path for path in ROOT.rglob("*.py") if "tests" not in path.parts and "venv" not in str(path)]
    assert {str(path.relative_to(ROOT)) for path in files if asked.search(path.read_text())} == {"training/task.py"}
