"""ControlNet: a frozen denoiser learns to follow an image, such as a label map. Needs torch alone.

    control = ControlNet(unet, hint_channels=8, hint_strides=((2, 2, 2), (2, 2, 2)))
    network = Controlled(unet.requires_grad_(False), control)
    logits = network(x, t, hint=bit_planes(label)).logits      # label: 4 times as large as x along each axis

Follows ControlNet (arXiv:2302.05543): a copy of the denoiser's encoder, made when it is built, sees the noisy
input and the image, and adds to each level that the decoder takes from the frozen encoder. Everything that
it adds passes a 1x1x1 convolution that starts at zero, so it changes nothing before its first step. The
denoiser is a unet.UNet, or has the same parts and is built by its class from its `cfg` alone.

Shapes: B batch, C channels, D H W depth height width of the denoiser's input.
Version 0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Triple = tuple[int, int, int]


def bit_planes(label: Tensor, planes: int = 8) -> Tensor:
    """A label map (B, 1, D, H, W) of whole numbers in [0, 2^planes) -> its bits (B, planes, D, H, W) as 0, 1.

    So 256 classes take 8 channels, and no order among them is made up; the first plane is the lowest bit.
    Raises ValueError for another shape. A label outside the range loses its higher bits.
    """
    if label.dim() != 5 or label.shape[1] != 1:
        raise ValueError(f"bit_planes: a label map is (B, 1, D, H, W), got {tuple(label.shape)}")
    # Whole numbers of as few bytes as hold them: int64 would take 8 bytes a voxel and plane.
    whole = label.long() & (1 << planes) - 1
    whole = whole.to(torch.uint8 if planes <= 8 else torch.int32)
    return torch.cat([(whole >> place & 1).float() for place in range(planes)], 1)


class ControlNet(nn.Module):
    """x (B, C, D, H, W), t (B,), hint (B, hint_channels, D s, H s, W s) -> a tensor a level of the denoiser.

    hint_strides are the D,H,W strides that take the hint to the grid of x, s their product; () for a hint of
    the size of x. hint_width is the width of the layers that do. Raises ValueError when the sizes disagree.
    """
    def __init__(self, base: nn.Module, hint_channels: int, hint_strides: Sequence[Triple] = (),
                 hint_width: int = 32):
        super().__init__()
        # the way down as it is now, to be trained on
        self.encoder = twin(base).requires_grad_(True)
        self.encoder.decoder = nn.ModuleList()
        self.encoder.deep_heads = nn.ModuleList()
        self.encoder.up_attention = nn.ModuleDict()
        self.encoder.head = nn.Identity()

        # the hint, on its own grid down to that of x
        layers: list[nn.Module] = [nn.Conv3d(hint_channels, hint_width, 3, padding=1), nn.SiLU()]
        for stride in hint_strides:
            kernel = tuple(2 * s - 1 for s in stride)
            padding = tuple(s - 1 for s in stride)
            layers += [nn.Conv3d(hint_width, hint_width, kernel, stride, padding), nn.SiLU()]
        entered = base.cfg.in_channels if base.stem is None else base.stem.out_channels
        self.hint = nn.Sequential(*layers, zero_conv(hint_width, entered))

        self.outputs = nn.ModuleList(zero_conv(width, width) for width in level_widths(base))

    def forward(self, x: Tensor, t: Tensor, hint: Tensor, vector: Tensor | None = None) -> list[Tensor]:
        entered = self.encoder._run(self.hint, hint)              # as the memory dial of the encoder says
        if entered.shape[0] != x.shape[0] or entered.shape[2:] != x.shape[2:]:
            raise ValueError(f"ControlNet: the strides take the hint {tuple(hint.shape)} to "
                             f"{tuple(entered.shape[2:])}, while the input is {tuple(x.shape)}")
        levels, _ = self.encoder.encode(x, t, vector, hint=entered)
        return [output(level) for output, level in zip(self.outputs, levels)]


class Controlled(nn.Module):
    """A denoiser and its ControlNet as one network; the denoiser is frozen by whoever builds this.

    x (B, C, D, H, W), t (B,), hint, vector (B, V) or None -> what the denoiser gives.
    """
    def __init__(self, base: nn.Module, control: ControlNet):
        super().__init__()
        self.base, self.control = base, control

    def memory(self, mode: str) -> Controlled:
        """The memory dial of both, as UNet.memory."""
        self.base.memory(mode)
        self.control.encoder.memory(mode)
        return self

    def forward(self, x: Tensor, t: Tensor, hint: Tensor, vector: Tensor | None = None):
        return self.base(x, t, vector, control=self.control(x, t, hint, vector))


def twin(base: nn.Module) -> nn.Module:
    """A network of the same class, config and weights, by its own constructor.

    Not copy.deepcopy, which also copies what a tensor belongs to, such as the mode of simulated ones. The
    caller's random numbers go on as they were.
    """
    like = next(base.parameters())
    with torch.random.fork_rng(devices=[]):
        network = type(base)(base.cfg)
    network.load_state_dict(base.state_dict())
    return network.to(like.device, like.dtype)


def zero_conv(in_channels: int, out_channels: int) -> nn.Conv3d:
    """A 1x1x1 convolution that starts at zero."""
    conv = nn.Conv3d(in_channels, out_channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def level_widths(base: nn.Module) -> list[int]:
    """Channels of each level's output on the way down: `interpolate` halves the lowest."""
    *widths, low = base.cfg.channels
    if widths and base.cfg.upsampling == "interpolate":
        low = max(low // 2, 1)
    return [*widths, low]
