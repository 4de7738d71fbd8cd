"""What tests of several files use: tensors, generators, what autograd keeps, sources to compare, a file
alone in a folder."""
import ast
import atexit
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]


def pair(shape=(2, 3, 5, 6, 7), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


class Largest(TorchDispatchMode):
    """Elements of the largest float32 tensor that an operation returned."""
    float32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.float32 = max(self.float32, out.numel())
        return out


def saved_bytes(function):
    """Bytes of the distinct storages that autograd keeps for the backward of function()."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


def source(file: str, path: str) -> str:
    """A function, class, method or constant of a file of ours, without comments: two copies have the same."""
    node = ast.parse((ROOT / file).read_text())
    for name in path.split("."):
        node = next(n for n in node.body if name in names_of(n))
    return ast.dump(node)


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [getattr(node, "name", "")]


def assert_copies(file: str) -> int:
    """Every line of `file` that says `# same as other.Name` opens a copy of what other.py has under that
    name; how many there are."""
    lines, found = (ROOT / file).read_text().splitlines(), 0
    for line in lines:
        if "# same as " not in line:
            continue
        other, _, path = line.partition("# same as ")[2].split()[0].partition(".")
        here, there = source(file, path), source(f"{other}.py", path)
        assert here == there, f"{file}: {path} is no longer the same as in {other}.py"
        found += 1
    return found


# A process that has loaded torch and nothing of ours, and lets a fork of it run the code that it is sent.
FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    folder, code = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    status = 1
    try:
        os.chdir(folder)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        exec(compile(code, "alone", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


@functools.cache
def forks() -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-I", "-c", FORKS], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def run_alone(folder: Path, files: list[str], code: str) -> str:
    """What `code` prints in a folder that holds nothing but these files of ours, where torch was loaded
    before.
    """
    for file in files:
        shutil.copy(ROOT / file, folder)
    forks().stdin.write(json.dumps([str(folder), f"import sys; sys.path.insert(0, '.')\n{code}"]) + "\n")
    forks().stdin.flush()
    status = int(forks().stdout.readline())
    out, error = (folder.with_name(f"{folder.name}.{name}").read_text() for name in ("out", "err"))
    assert status == 0, error
    return out
