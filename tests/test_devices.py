"""training/devices.py: the device's settings and precision."""
import os
import subprocess
import sys

import pytest
import torch

from runs import CPU, ROOT, load_config
from test_imports import files
from training import devices
from training.devices import pick_precision, set_backend


def test_allocator_settings_come_before_cuda_or_are_said_to_be_late(monkeypatch):
    """They were once set after CUDA had started, where they do nothing."""
    name = "PYTORCH_CUDA_ALLOC_CONF"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = load_config(["--memory.max_split_size_mb", "128"])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert "not applied" in set_backend(cfg)[0] and name not in os.environ
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv(name, "backend:native")
    assert "is kept" in set_backend(cfg)[0]
    monkeypatch.delenv(name)
    set_backend(cfg)
    assert os.environ.pop(name) == "expandable_segments:True,max_split_size_mb:128"


@pytest.mark.slow
def test_wait_policy_is_set_before_torch_loads():
    name = "OMP_WAIT_POLICY"
    code = f"import os; os.environ.pop('{name}', None); import train; print(os.environ['{name}'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "PASSIVE"
    source = (ROOT / "train.py").read_text()
    assert source.index("OMP_WAIT_POLICY") < source.index("import torch")


def test_amp_without_native_bf16_says_so(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert pick_precision(True, CPU) == (None, "float32: --amp is off, this CPU has no native bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(devices, "cpu_bf16_is_right", lambda: False)
    assert pick_precision(True, CPU) == (
        None, "float32: --amp is off, bf16 convolutions give wrong gradients on this CPU")
    monkeypatch.setattr(devices, "cpu_bf16_is_right", lambda: True)
    assert pick_precision(True, CPU)[0] is torch.bfloat16
    assert pick_precision(True, torch.device("cuda"))[0] is torch.bfloat16


@pytest.mark.parametrize("error", [ModuleNotFoundError("pynvml"), RuntimeError("NVML: not supported"),
                                   AttributeError("nvmlInit"), OSError("libnvidia-ml.so.1")])
def test_what_nvml_raises_ends_no_run(error, monkeypatch):
    """Under MIG, after an update of the driver, in a container without its library."""
    def fails(device):
        raise error
    monkeypatch.setattr(torch.cuda, "utilization", fails)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 ** 30)
    assert devices.gpu_use(torch.device("cuda")) == {"gpu_reserved_gib": 1.0}


def test_float64_is_made_on_the_cpu_alone():
    """`.double()` on MPS, which has none, raised at the end of a run, after a dead code, and at its first
    validation of a codebook.
    """
    for path in files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            made = line.replace(".cpu().double()", "")
            at_home = "usage.double()" in line or "(usage > 0)" in line     # moved to the CPU before
            assert ".double()" not in made or at_home, f"{path.name}:{number}: {line.strip()}"
