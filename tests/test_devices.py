"""training/devices.py: the device's settings and precision."""
import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch

from runs import CPU, ROOT, load_config
from test_imports import files
from training import bf16_probe, devices
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


NETWORK = torch.nn.Sequential(torch.nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1)), torch.nn.Conv3d(4, 4, 3),
                              torch.nn.Conv3d(4, 4, 3))
KINDS = ((1, 4, (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1),
         (4, 4, (3, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1))


@pytest.fixture
def tried(monkeypatch):
    """A CPU that says it has bf16, and what the probe was given; its answer is to be put in first."""
    answers, seen = [], []

    def run(words, input, timeout, **options):
        seen.append(json.loads(input))
        answer = answers[0]
        if isinstance(answer, Exception):
            raise answer
        return types.SimpleNamespace(returncode=0 if answer else 1, stdout=json.dumps(answer))
    devices.what_is_wrong_with_bf16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    monkeypatch.setattr(devices.subprocess, "run", run)
    yield answers, seen
    devices.what_is_wrong_with_bf16.cache_clear()


@pytest.mark.parametrize("answer, says", [
    ({"error": 0.01, "float32": 1.0, "bf16": 0.6}, None),
    ({"error": 0.01, "float32": 1.0, "bf16": 2.5}, "take 2.5 times as long as float32"),
    ({"error": math.inf, "float32": 1.0, "bf16": 0.6}, "wrong results or gradients"),
    (subprocess.TimeoutExpired("probe", 60), "hardly end on this CPU"),
    (None, "fail on this CPU"),
], ids=["right", "slow", "wrong", "hangs", "dies"])
def test_bf16_of_a_cpu_is_for_networks_that_are_right_and_not_slower_in_it(answer, says, tried):
    """A U-Net of 1x3x3 kernels hung in its first backward, since one 3x3x3 convolution had been tried."""
    answers, seen = tried
    answers.append(answer)
    dtype, why = pick_precision(True, CPU, NETWORK)
    assert seen == [json.loads(json.dumps(KINDS))]               # each kind once
    if says is None:
        assert (dtype, why) == (torch.bfloat16, "bf16 autocast")
    else:
        assert dtype is None and why.startswith("float32: --amp is off, ") and says in why
    assert pick_precision(True, CPU, NETWORK) == (dtype, why) and len(seen) == 1


def test_amp_without_native_bf16_says_so(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert pick_precision(True, CPU, NETWORK) == (None, "float32: --amp is off, this CPU has no native bf16")
    assert pick_precision(True, torch.device("cuda"), NETWORK)[0] is torch.bfloat16


def test_the_probe_of_bf16_sees_errors_and_takes_time(monkeypatch):
    found = bf16_probe.probe([list(kind) for kind in KINDS])
    assert found["float32"] > 0 and found["bf16"] > 0
    convolution = torch.nn.functional.conv3d

    def spoiled(x, weight, **options):
        out = convolution(x.float(), weight.float(), **options)
        return out * (math.nan if x.dtype == torch.bfloat16 else 1)
    monkeypatch.setattr(bf16_probe.F, "conv3d", spoiled)
    assert bf16_probe.probe([list(kind) for kind in KINDS])["error"] == math.inf


@pytest.mark.slow
def test_the_probe_of_bf16_is_a_program():
    devices.what_is_wrong_with_bf16.cache_clear()
    answer = devices.what_is_wrong_with_bf16(KINDS)
    assert answer is None or "fail" not in answer


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
