"""training/devices.py: the device's settings and precision."""
import os
import subprocess
import sys

import pytest
import torch

from runs import CPU, ROOT, load_config
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
