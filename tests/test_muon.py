"""muon.py: against a plain loop, torch's AdamW and exact polar factors; what it keeps, and what it moves."""
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import muon
import peaks
from muon import HIGH, LOW, Muon, groups_of, orthogonalise


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Kernels of several kinds, two of one shape, one wide and one tall; a codebook; biases and gains."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv3d(2, 6, 3), nn.Conv3d(6, 6, 3), nn.Conv3d(6, 6, 3), nn.GroupNorm(2, 6), nn.Conv3d(6, 40, 1),
        nn.ConvTranspose3d(40, 3, 2), nn.Linear(5, 4), nn.Embedding(7, 3),
    )
    layers.register_parameter("codebook", nn.Parameter(torch.randn(8, 3)))
    return layers.to(dtype).to(memory_format=torch.channels_last_3d)


def kernels_of(layers: nn.Module) -> tuple[list[str], list[str]]:
    """The names in the two groups."""
    names = {id(p): name for name, p in layers.named_parameters()}
    return tuple([names[id(p)] for p in group["params"]] for group in groups_of(layers))


def optimizer_of(layers: nn.Module, lr: float | torch.Tensor = 0.02) -> Muon:
    return Muon(groups_of(layers), lr)


def put_gradients(layers: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in layers.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


# ------------------------------------------------------------------------------------ the orthogonal factor

@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (16, 27), (40, 12), (24, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    """Against the exact polar factor U V^T: U^T X V is diagonal, and its values lie in the stated band."""
    generator = torch.Generator().manual_seed(sum(shape))
    matrices = torch.randn(3, *shape, generator=generator) * torch.tensor([1e-6, 1.0, 1e5])[:, None, None]
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    inner = u.mT @ orthogonalise(matrices).double() @ vh.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 2e-4
    share = s / s.square().sum(1, keepdim=True).sqrt()
    for found in (values[share > 0.005], values[share <= 0.005]):
        assert found.numel() == 0 or found.max() < 1.21
    assert LOW < values[share > 0.005].min() and values[share > 0.005].max() < HIGH


def test_the_stated_band_is_that_of_the_polynomial():
    """The scalar iteration on a fine grid, apart from the code."""
    x = s = torch.logspace(-3.5, 0, 20001, dtype=torch.float64)
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x ** 3 + 2.0315 * x ** 5
    assert LOW < x[s >= 0.005].min() < LOW + 0.01 and HIGH - 0.01 < x[s >= 0.005].max() < HIGH
    assert x.max() < 1.21 and x.min() > 0


def test_a_kernel_without_any_gradient_gets_no_update():
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


# ------------------------------------------------------------------------------------ whole steps

def plain_step(p: torch.Tensor, m: torch.Tensor, lr: float) -> None:
    """A kernel's step by the text of the method: one matrix, X itself iterated, no Gram matrix kept."""
    m.copy_(0.95 * m + 0.05 * p.grad)
    x = (0.95 * m + 0.05 * p.grad).reshape(len(p), -1)
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        a = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        poly = -4.775 * a + 2.0315 * a @ a
        x = 3.4445 * x + (poly @ x if x.shape[0] <= x.shape[1] else x @ poly)
    p.data = p.data * (1 - lr * 0.01) - lr * muon.Muon([p], lr).defaults["scale"] * x.reshape(p.shape)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_steps_equal_a_loop_over_matrices_and_torchs_adamw(dtype, tolerance, monkeypatch):
    """Three steps; also where batches are cut to one matrix each."""
    results = []
    for most in (muon.MOST_ELEMENTS, 1):
        monkeypatch.setattr(muon, "MOST_ELEMENTS", most)
        layers = network(dtype)
        ours = optimizer_of(layers)
        reference = copy.deepcopy(layers)
        named, (kernels, others) = dict(reference.named_parameters()), kernels_of(reference)
        adamw = torch.optim.AdamW([named[name] for name in others], 0.02, weight_decay=0.01, fused=True)
        moments = {name: torch.zeros_like(named[name]) for name in kernels}
        for step in range(3):
            put_gradients(layers, step)
            put_gradients(reference, step)
            ours.step()
            adamw.step()
            with torch.no_grad():
                for name in kernels:
                    plain_step(named[name], moments[name], 0.02)
        for name, p in layers.named_parameters():
            assert (p - named[name]).abs().max() <= (0 if name in others else tolerance), name
        results.append(torch.cat([p.detach().flatten() for p in layers.parameters()]))
    assert (results[0] - results[1]).abs().max() <= tolerance


def test_what_is_a_kernel():
    """First, last and transposed ones; no codebook, no embedding, no bias."""
    kernels, others = kernels_of(network())
    assert kernels == ["0.weight", "1.weight", "2.weight", "4.weight", "5.weight", "6.weight"]
    assert {"codebook", "7.weight", "3.weight", "0.bias"} <= set(others)
    with pytest.raises(ValueError, match="two axes"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="lr must be"):
        Muon([nn.Parameter(torch.zeros(3, 3))], lr=-1)


def test_without_gradient_or_when_frozen_nothing_moves():
    layers = network()
    layers[0].requires_grad_(False)
    optimizer = optimizer_of(layers)
    assert layers[0].weight not in optimizer.state and layers[1].weight in optimizer.state
    before = copy.deepcopy(layers.state_dict())
    layers[2].weight.grad = torch.ones_like(layers[2].weight)
    optimizer.step()
    moved = [name for name, value in layers.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["2.weight"]


def test_a_step_is_bounded_whatever_the_gradient():
    """Spectral norm of a kernel's step: at most lr x scale x 1.21, for gradients of 1e-12 and of 1e12."""
    for size in (1e-12, 1e12):
        layer = nn.Conv3d(4, 8, 3, bias=False)
        optimizer = Muon([layer.weight], 1e-3, weight_decay=0)
        before = layer.weight.detach().clone()
        layer.weight.grad = size * torch.randn_like(before)
        optimizer.step()
        norm = torch.linalg.matrix_norm((layer.weight.detach() - before).flatten(1), 2)
        scale = optimizer.defaults["scale"]
        assert 0.6e-3 * scale < norm < 1.21e-3 * scale


# ------------------------------------------------------------------------------------ state, rate, memory

def test_masters_are_moved_in_place_of_the_parameters():
    layers = network()
    masters = [p.detach().clone() for p in layers.parameters()]
    groups = groups_of(layers, masters)
    for ours, theirs in zip(groups, groups_of(layers)):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(ours["params"], theirs["params"]))
    assert sum(len(group["params"]) for group in groups) == len(masters)


def test_saved_and_loaded_it_goes_on_to_the_bit():
    layers = network()
    optimizer = optimizer_of(layers)
    for step in range(2):
        put_gradients(layers, step)
        optimizer.step()
    other = network()
    other.load_state_dict(layers.state_dict())
    again = optimizer_of(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, step_of in ((layers, optimizer), (other, again)):
        put_gradients(each, 5)
        step_of.step()
    assert all(torch.equal(a, b) for a, b in zip(layers.state_dict().values(), other.state_dict().values()))


def test_the_rate_may_be_a_tensor_and_nothing_is_read_back():
    """As a captured step needs it: on fake tensors, where reading a value raises; the result is the same."""
    a, b = network(), network()
    fixed, free = optimizer_of(a, 0.02), optimizer_of(b, torch.tensor(0.02))
    for each in (a, b):
        put_gradients(each, 1)
    fixed.step()
    free.step()
    assert all((p - q).abs().max() < 1e-7 for p, q in zip(a.parameters(), b.parameters()))

    with FakeTensorMode():
        layers = nn.Sequential(nn.Conv3d(2, 6, 3), nn.Conv3d(6, 6, 3), nn.Linear(6, 2))
        optimizer = optimizer_of(layers)
        for p in layers.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(DataDependentOutputException):
            layers[0].bias.sum().item()


def test_moments_are_there_before_the_first_step_and_are_counted():
    """One float32 moment of a kernel, two of all else, and no more after a step."""
    def make_step(device: torch.device):
        layer = nn.Conv3d(8, 16, 3).to(device)
        optimizer = Muon([{"params": [layer.weight], "orthogonal": True},
                          {"params": [layer.bias], "orthogonal": False}])

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            layer(torch.ones(1, 8, 4, 4, 4, device=device)).sum().backward()
            optimizer.step()
        return step
    counted, predicted = peaks.count(make_step), peaks.predict(make_step, "cpu")
    assert predicted.optimizer == counted.optimizer == 4 * (16 * 8 * 27 + 2 * 16 + 1)
    assert abs(predicted.bytes - counted.bytes) <= 0.02 * counted.bytes
    layers = network()
    assert all(p in optimizer_of(layers).state for p in layers.parameters())
