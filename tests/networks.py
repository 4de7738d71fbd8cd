"""Small autoencoders with all weights at work, what they give, and whether two settings of the dial agree."""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae3d import VAE3D, VAEConfig

TINY = dict(base_channels=4, channel_mult=(1, 2, 2), norm_groups=2, z_channels=2)

CODEBOOK_FIELDS = [  # of VAEConfig: they act on the codebook alone
    dict(num_codes=6), dict(codebook_update="gradient"), dict(codebook_update="gradient", lambda_vq=3.0),
    dict(codebook_decay=0.5), dict(codebook_init="samples"), dict(codebook_cosine=True),
    dict(codebook_restart=0.9), dict(lambda_commitment=2.0)]


def count(vae) -> int:
    return sum(p.numel() for p in vae.parameters())


def build(dtype=torch.float64, **fields) -> VAE3D:
    """A small network whose weights are all at work (initialise() makes logvar nearly constant)."""
    torch.manual_seed(0)
    vae = VAE3D(VAEConfig(**{**TINY, **fields})).to(dtype)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return vae


def objective(out) -> torch.Tensor:
    """Depends on every output, with a gradient that differs from voxel to voxel."""
    ramp = torch.linspace(0.5, 1.5, out.recon.numel(), dtype=out.recon.dtype).view_as(out.recon)
    return (
        (out.recon.square() * ramp).mean() + 0.1 * out.mu.square().mean() + 0.1 * out.logvar.square().mean()
    )


def outputs_and_gradients(vae: VAE3D, x: torch.Tensor, setting: tuple, wrap=None, input_grad=True):
    vae.memory(*setting)
    vae.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(input_grad)
    if wrap:
        with wrap:
            out = vae(x, torch.Generator().manual_seed(1))
    else:
        out = vae(x, torch.Generator().manual_seed(1))
    objective(out).backward()
    return [t.detach() for t in out], {
        "input": x.grad,
        **{name: p.grad for name, p in vae.named_parameters()},
    }


def relative(a, b) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()


def assert_same(vae, x, setting, forward=1e-10, backward=1e-10, wrap=None, input_grad=True):
    """The result under `setting` equals that of plain autograd; tolerances relative to the largest value of
    each tensor.
    """
    out, grads = outputs_and_gradients(vae, x, ("none",), wrap, input_grad)
    got, got_grads = outputs_and_gradients(vae, x, setting, wrap, input_grad)
    worst = max(relative(a, b) for a, b in zip(out, got))
    assert worst <= forward, f"{setting}: outputs differ by {worst:.2e} of their scale"
    assert grads.keys() == got_grads.keys()
    errors = {name: relative(grads[name], got_grads[name]) for name in grads}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= backward, f"{setting}: gradient of {worst} differs by {errors[worst]:.2e}"


class Live(TorchDispatchMode):
    """Counts the bytes of tensor storages that are alive; `peak` is the most there were."""
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = t.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self.free, key)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


def peak(vae, setting, size, training=True) -> int:
    x = torch.zeros(1, 1, *size)
    vae.memory(*setting)
    vae.zero_grad(set_to_none=True)
    with Live() as live, torch.set_grad_enabled(training):
        out = vae(x)
        if training:
            out.recon.backward(out.recon.detach())
    return live.peak
