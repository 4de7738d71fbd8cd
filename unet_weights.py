"""Weights of the common 2D Pytorch-UNet to `unet.UNet`. Needs torch, and unet.py copied beside it.

    cfg, weights = unet_weights.from_pytorch_unet(torch.load("unet.pth", weights_only=True))

Version 0.2 (2026-11).
"""
from __future__ import annotations

import torch
from torch import Tensor

from unet import UNet, UNetConfig


def from_pytorch_unet(state: dict[str, Tensor]) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Weights of the common 2D Pytorch-UNet -> the config of the same network here, and its state dict.

        cfg, weights = from_pytorch_unet(torch.load("unet.pth", map_location="cpu", weights_only=True))
        unet = UNet(cfg)
        unet.load_state_dict(weights)

    Its modules are inc, down1-4, up1-4, outc. Channels, classes and kind of upsampling are read from the
    shapes; kernels (O, I, h, w) become (O, I, 1, h, w). The entry `mask_values`, which its trainer adds
    (grey values of the classes, no weight), is left out. Raises ValueError naming every key that is
    missing, not known, or of another shape than the others make it.
    """
    state = {key: value for key, value in state.items() if key != "mask_values"}

    # first the config, from the shapes of a few convolutions
    ends = ["inc.double_conv.3.weight"]
    ends += [f"down{level}.maxpool_conv.1.double_conv.3.weight" for level in range(1, 5)]
    first, out = "inc.double_conv.0.weight", "outc.conv.weight"
    absent = [key for key in (first, *ends, out) if getattr(state.get(key), "ndim", 0) != 4]
    if absent:
        some = ", ".join(list(state)[:3]) + (", ..." if len(state) > 3 else "")
        raise ValueError(f"from_pytorch_unet: no convolution weight {', '.join(absent)}; this is not the "
                         f"state dict of a Pytorch-UNet (its keys: {some})")
    is_bilinear = not any(key.startswith("up1.up.") for key in state)
    widths = [len(state[key]) for key in ends]
    if is_bilinear:
        widths[-1] *= 2
    upsampling = "interpolate" if is_bilinear else "transposed"
    cfg = UNetConfig(state[first].shape[1], len(state[out]), tuple(widths), ((1, 3, 3),), ((1, 2, 2),),
                     norm="batch", act="relu", upsampling=upsampling)

    # then the names: our module -> theirs
    theirs = {"head": "outc.conv"}
    for level in range(5):
        down = f"down{level}.maxpool_conv.1.double_conv" if level else "inc.double_conv"
        entered = ".block" if level else ""      # below the top, the first block comes with its downsampling
        block = f"encoder.{level}"
        theirs |= {f"{block}.0{entered}.conv": f"{down}.0", f"{block}.0{entered}.norm": f"{down}.1",
                   f"{block}.1.conv": f"{down}.3", f"{block}.1.norm": f"{down}.4"}
    for level in range(4):
        up, block = f"up{4 - level}.conv.double_conv", f"decoder.{level}"
        theirs |= {f"{block}.0.up": f"up{4 - level}.up",
                   f"{block}.0.block.conv": f"{up}.0", f"{block}.0.block.norm": f"{up}.1",
                   f"{block}.1.conv": f"{up}.3", f"{block}.1.norm": f"{up}.4"}
    with torch.device("meta"):
        expected = UNet(cfg).state_dict()
    keys = {}                                    # our key -> theirs
    for ours in expected:
        module, _, kind = ours.rpartition(".")
        keys[ours] = f"{theirs[module]}.{kind}"

    # then the weights themselves; every fault is collected before one is raised
    faults = [f"missing {key}" for key in keys.values() if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in set(keys.values())]
    weights = {}
    for ours, key in keys.items():
        if key not in state:
            continue
        value = state[key]
        if getattr(value, "ndim", 0) == 4:
            value = value.unsqueeze(2)
        if getattr(value, "shape", None) != expected[ours].shape:
            want = [n for i, n in enumerate(expected[ours].shape) if i != 2]
            faults.append(f"{key} is {list(getattr(state[key], 'shape', ()))}, expected {want}")
        weights[ours] = value
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"from_pytorch_unet: {'; '.join(faults[:8])}{more}; the file must hold one "
                         f"Pytorch-UNet, whole")
    return cfg, weights
