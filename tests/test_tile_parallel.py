"""vae3d.py: the tiles of one volume shared among the ranks of a process group equal one process's, and each
rank runs its own only.
"""
import contextlib
import copy
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import tile_plans
import tiles
import training.config
import training.plan
import training.ranks
import vae3d
from networks import build, objective, peak, relative
from tasks import TASKS
from training.task import of

pytestmark = pytest.mark.slow

OLD = dict(
    down_padding="end",
    upsample="transposed3",
    strides=((2, 2, 2), (1, 2, 2)),
    quant_conv="joint",
    post_quant_conv=True,
)
SMALL = dict(num_res_blocks=0)

# name -> (fields of the network, size of the volume, tile, stretch, what else: see `circumstances`)
CASES = {
    "none, odd size": (SMALL, (7, 13, 10), (4, 4, 4), "2", ""),
    "group, two stretches": (dict(norm="group", **SMALL), (8, 12, 9), (4, 8, 4), "2+1", ""),
    "group, each level apart": (dict(norm="group", **SMALL), (5, 9, 12), (2, 4, 8), "1+1+1", ""),
    "layer, attention": (dict(norm="layer", attention=True), (6, 12, 8), (4, 4, 4), "2+1", ""),
    "one tile, idle ranks": (dict(norm="group", **SMALL), (4, 8, 8), (64, 64, 64), "2", ""),
    "two tiles": (dict(norm="group", **SMALL), (8, 8, 8), (4, 64, 64), "2", ""),
    "strides, 3 channels, batch 2": (
        dict(strides=((3, 1, 2), (2, 2, 1)), in_channels=3, **SMALL),
        (7, 5, 9),
        (3, 4, 4),
        "2",
        "batch",
    ),
    "networks of others": (dict(norm="group", **OLD, **SMALL), (9, 8, 11), (4, 4, 8), "1+1", ""),
    "vq": (dict(bottleneck="vq", num_codes=16), (6, 8, 12), (4, 4, 4), "2", ""),
    "vq by gradient, group": (
        dict(bottleneck="vq", num_codes=16, codebook_update="gradient", norm="group", **SMALL),
        (6, 8, 12),
        (4, 4, 4),
        "2",
        "",
    ),
    "some frozen, no input gradient": (dict(norm="group", **SMALL), (6, 8, 8), (4, 4, 4), "2", "frozen"),
    "encoder frozen": (dict(norm="group", **SMALL), (6, 8, 8), (4, 4, 4), "1", "encoder"),
    "input gradient only": (dict(norm="group", **SMALL), (6, 8, 8), (4, 4, 4), "2", "input"),
    "two backward calls": (dict(norm="group", **SMALL), (6, 8, 8), (4, 4, 4), "2", "twice"),
    "inside torch's checkpoint": (dict(norm="group", **SMALL), (6, 8, 8), (4, 4, 4), "2", "checkpoint"),
    "no gradient": (dict(norm="group", **SMALL), (6, 8, 9), (4, 4, 4), "2", "no_grad"),
    "inference mode": (dict(norm="layer", **SMALL), (6, 8, 9), (4, 4, 4), "2", "inference_mode"),
    "channels last, float32": (dict(norm="group", in_channels=2, **SMALL), (6, 8, 9), (4, 4, 4), "2", "last"),
    "float16": (dict(norm="group", **SMALL), (4, 8, 8), (4, 4, 4), "2", "half"),
    "autocast": (dict(norm="group", **SMALL), (4, 8, 8), (4, 4, 4), "2", "autocast"),
}
ROUNDED = {"channels last, float32": 1e-4, "float16": 0.02, "autocast": 0.05}  # else 1e-9


def circumstances(case: str, setting: tuple) -> dict:
    """The case's outputs and gradients by name, its codebook after an update, and how many tiles this process
    ran.
    """
    fields, size, _, _, how = CASES[case]
    vae = build(**fields)
    x = torch.randn(2 if how == "batch" else 1, fields.get("in_channels", 1), *size, dtype=torch.float64)
    if how == "last":
        vae, x = (t.float().to(memory_format=torch.channels_last_3d) for t in (vae, x))
    elif how == "half":
        vae, x = vae.half(), x.half()
    elif how == "autocast":
        vae, x = vae.float(), x.float()
    for i, (name, p) in enumerate(vae.named_parameters()):
        p.requires_grad_(
            how != "input"
            and not (how == "encoder" and name.startswith("encoder"))
            and (how != "frozen" or i % 3 == 0)
        )
    x.requires_grad_(how not in ("frozen", "encoder"))
    vae.memory(*setting)
    ran, original = [], tiles.run_tile
    tiles.run_tile = lambda *args: ran.append(1) or original(*args)
    guard = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode(),
             "autocast": torch.autocast("cpu", torch.bfloat16)}.get(how, contextlib.nullcontext())
    try:
        # Docs/LOG.md: bf16 without bf16.
        with guard, torch.backends.mkldnn.flags(enabled=how != "autocast"):
            if how == "checkpoint":
                out = SimpleNamespace(**checkpoint(lambda x: vae.eval()(x)._asdict(), x, use_reentrant=False))
            else:
                out = vae(x, torch.Generator().manual_seed(1))
            found = {
                name: t.detach() for name, t in (vars(out) if how == "checkpoint" else out._asdict()).items()
            }
            if out.recon.requires_grad:
                total = (
                    objective(out) if hasattr(out, "mu") else (out.recon.square() * 1.5).mean() + out.vq_loss
                )
                total.backward(retain_graph=how == "twice")
                if how == "twice":
                    total.backward()
    finally:
        tiles.run_tile = original
    found |= {
        f"gradient of {name}": p.grad
        for name, p in [("input", x), *vae.named_parameters()]
        if p.grad is not None
    }
    if vae.quantizer is not None:
        vae.quantizer.update(torch.Generator().manual_seed(2))
        found |= {name: b.clone() for name, b in vae.quantizer.state_dict().items()}
    return {"found": found, "tiles": len(ran)}


def failures(group) -> dict[str, list[str]]:
    """What this rank is told where one of them fails; after each the group must still work."""
    original, told = tiles.run_tile, {}
    kinds = {
        "oom": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"),
        "cpu": (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        "other": (ZeroDivisionError, "something else"),
    }
    for kind, call, norm in [
        ("oom", 1, "none"),
        ("oom", 1, "group"),
        ("cpu", 5, "group"),
        ("other", 3, "none"),
        ("cpu", "backward", "none"),
        ("oom", "backward", "group"),
        ("oom", "statistics", "group"),
        ("oom", "outside", "none"),
    ]:
        error, text = kinds[kind]
        vae, count = build(norm=norm, **SMALL).memory("tile", (4, 4, 4), "2", None, group), []
        x = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)

        def failing(stretch, tile, *args, call=call, error=error, text=text, count=count):
            count.append(torch.is_grad_enabled())                # True in backward
            backward, shortened = sum(count) == 1, len(tile[0].cuts) < len(stretch.ops)
            if group.rank() == 1 and (call == len(count) or call == "backward" and backward
                                      or call == "statistics" and shortened and count[-1]):
                raise error(text)
            return original(stretch, tile, *args)

        tiles.run_tile = failing
        try:
            with tiles.together(group, x):                       # as a step would: told once
                out = vae(x, torch.Generator().manual_seed(1))
                if call == "outside" and group.rank() == 1:      # before the others' backward
                    raise error(text)
                objective(out).backward()
            told[f"{kind} {call} {norm}"] = "nothing"
        except (RuntimeError, ZeroDivisionError) as caught:
            told[f"{kind} {call} {norm}"] = f"{type(caught).__name__}: {caught}"
            # So all turn the dial.
            assert kind == "other" or tiles.is_out_of_memory(caught), caught
        finally:
            tiles.run_tile = original
        agreed = torch.ones(())
        dist.all_reduce(agreed, group=group)
        assert agreed == group.size()                            # nobody is a collective ahead
    return told


def planning(group) -> dict:
    """Plans with the ranks counted; the least free memory of them decides."""
    vae, size = vae3d.VAE3D.from_preset("high_res"), (64, 96, 96)
    alone, shared = (
        [(p.work, p.peak_bytes) for p in vae.memory("tile", group=g).tiling().plans(size)]
        for g in (None, group)
    )
    plain = vae.memory("tile", budget=1e3).tiling().plan(size, 1, torch.float32)
    roomy = vae.memory("tile", budget=1e3, group=group).tiling().plan(size, 1, torch.float32)
    bound = vae.memory("tile", group=group).tiling().plan(size, 1, torch.float32).work
    # Then cards of which the first rank's has least free.
    dial, original = training.config.MemoryConfig(mode="tile", tile_parallel=True), torch.cuda
    torch.cuda = SimpleNamespace(
        is_available=lambda: True,
        memory_reserved=lambda device: 0,
        mem_get_info=lambda device: (int(alone[-1][1] * (1.5 + 50 * group.rank())), 0),
    )
    training.ranks._here["alike"] = True                         # as training/ranks.py starts its processes
    try:
        budget = training.plan.budget_of(dial, "cuda")
    finally:
        torch.cuda = original
        training.ranks._here.clear()
    found = training.plan.settled(vae, dial, size, 1, torch.float32, budget).dial
    card = vae.memory("tile", found.tile, found.stretch, group=group).tiling().plan(size, 1, torch.float32)
    return {
        "alone": alone,
        "shared": shared,
        "plain": plain.tile,
        "roomy": roomy.tile,
        "card": card.tile,
        "card_peak": card.peak_bytes,
        "bound": bound,
    }


def of_rank(folder: Path) -> None:
    """One of three processes: all cases on ranks 0 and 1, the networks and sizes on all three as well. It
    writes what it found.
    """
    patience = timedelta(seconds=120)                            # a rank that waits in vain fails the test
    dist.init_process_group("gloo", timeout=patience)
    rank = dist.get_rank()
    groups, found = {2: dist.new_group([0, 1], timeout=patience), 3: dist.group.WORLD}, {}
    for ranks, group in groups.items():
        if rank >= ranks:
            continue
        for case, (_, _, tile, stretch, how) in CASES.items():
            if ranks == 2 or not how:
                found[case, ranks] = circumstances(case, ("tile", tile, stretch, None, group))
        found["failures", ranks] = failures(group)
    found["planning"] = planning(dist.group.WORLD)
    vae = build(torch.float32, base_channels=8, **SMALL)
    found["peaks"] = [
        peak(vae, ("tile", (8, 8, 8), "2", None, g), (32, 16, 16)) for g in (None, dist.group.WORLD)
    ]
    vae.progress, shares = lambda *told: shares.append(told[0]), []
    with torch.no_grad():
        vae(torch.zeros(1, 1, 32, 16, 16))
    found["progress"] = shares
    if rank == 0:                                                # memory prediction: one rank may do it alone
        with FakeTensorMode():
            fake = vae3d.VAE3D(vae3d.VAEConfig(base_channels=4, norm="group")).memory(
                "tile", (4, 4, 4), "2", None, dist.group.WORLD, True
            )
            fake(torch.empty(1, 1, 8, 8, 8)).recon.mean().backward()
    alone = copy.deepcopy(vae)
    found["copy"] = (
        alone.group is None
        and vae.group is not None
        and bool((alone.encoder[0].weight == vae.encoder[0].weight).all())
    )
    dial = (
        training.plan.set_dial(vae, training.config.MemoryConfig(mode="tile", tile_parallel=True)).group,
        training.plan.set_dial(vae, training.config.MemoryConfig()).group,
    )
    found["dial"] = dial[0] is dist.group.WORLD and dial[1] is None
    try:
        vae.memory("tile", group=groups[2])
        found["member"] = "member"
    except ValueError as error:
        found["member"] = str(error)
    # Not through the pipe, where tensors are shared memory.
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(pool, tmp_path_factory):
    """What each of the three processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    pool.begin(3, of_rank, folder)
    pool.end(range(3), 240)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.mark.parametrize("case", CASES)
def test_shared_tiles_equal_one_process_and_one_another(case, ranks):
    tile, stretch = CASES[case][2:4]
    # 16 bits: against the tiles of one process, which round alike.
    low = case in ("float16", "autocast")
    want = circumstances(case, ("tile", tile, stretch) if low else ("none",))["found"]
    tiles = circumstances(case, ("tile", tile, stretch))["tiles"]
    for many in (2, 3)[:1 if CASES[case][4] else 2]:
        each = [ranks[rank][case, many] for rank in range(many)]
        for other in each[1:]:
            assert other["found"].keys() == want.keys()
            different = [
                name for name, t in each[0]["found"].items() if not torch.equal(t, other["found"][name])
            ]
            assert not different, f"{many} ranks hold different bits: {different}"
        errors = {name: relative(want[name].double(), t.double()) for name, t in each[0]["found"].items()}
        worst = max(errors, key=errors.get)
        error = f"{many} ranks: {worst} differs by {errors[worst]:.2e}"
        assert errors[worst] <= ROUNDED.get(case, 1e-9), error
        shares = [result["tiles"] for result in each]
        assert sum(shares) == tiles, f"{shares} tiles of {tiles}"
        # Every pass deals out as evenly as its tiles allow.
        if "tile" not in case:
            assert max(shares) < 0.8 * tiles and min(shares) > 0, f"{shares} tiles of {tiles}"


@pytest.mark.parametrize("many", [2, 3])
def test_a_failure_on_one_rank_raises_on_all(many, ranks):
    told = [ranks[rank]["failures", many] for rank in range(many)]
    assert len(told[0]) == 8
    for name in told[0]:
        own = (
            "OutOfMemoryError: CUDA out of memory"
            if name.startswith("oom")
            else "ZeroDivisionError: something else"
            if name.startswith("other")
            else "RuntimeError: DefaultCPUAllocator: can't allocate memory"
        )
        other = "RuntimeError: rank 1 of those that share the tiles failed" if name.startswith("other") else \
            "OutOfMemoryError: out of memory on rank 1 of those that share the tiles"
        for rank in range(many):
            assert told[rank][name].startswith(own if rank == 1 else other), (name, rank, told[rank][name])


def test_a_rank_holds_no_more_than_one_process(ranks):
    alone, shared = ranks[0]["peaks"]
    assert shared <= 1.02 * alone, (alone, shared)


def test_plans_count_the_ranks_and_agree(ranks):
    found = [r["planning"] for r in ranks]
    assert found[0] == found[1] == found[2]
    one = found[0]
    assert one["shared"][0][0] < 0.6 * one["alone"][0][0], one   # the untiled layers are not shared
    count = [tiles.prod(-(-n // t) for n, t in zip((64, 96, 96), one[name])) for name in ("plain", "roomy")]
    # Room for large tiles: one process takes them, three want a tile each.
    assert count[0] < 3 <= count[1] <= 24, count
    assert one["bound"] <= tile_plans.WORK_BOUND * one["shared"][0][0]
    # What the rank with the least free memory can hold.
    assert one["card_peak"] <= 1.5 * one["alone"][-1][1]


def test_progress_copies_and_settings(ranks):
    for rank, found in enumerate(ranks):
        assert len(found["progress"]) >= 6 and found["copy"] and found["dial"], found
        assert ("member" if rank < 2 else "must be a process group of torch.distributed that this process "
                                          "belongs to") in found["member"]


def test_configuration_of_train():
    for mode in ("none", "checkpoint"):
        with pytest.raises(ValueError, match=f"memory.tile_parallel shares tiles .* memory.mode is {mode}, "
                                             ".* add --memory.mode tile"):
            training.config.MemoryConfig(mode=mode, tile_parallel=True)
    memory = training.config.MemoryConfig(mode="tile", tile=(16, 16, 16), stretch="1", tile_parallel=True)
    vae = training.plan.set_dial(vae3d.VAE3D.from_preset("ultra_lightweight", base_channels=4), memory)
    assert vae.group is None                                     # one process: nothing to share
    cfg = training.config.changed(training.config.TrainConfig(), vae={"base_channels": 4})
    state = SimpleNamespace(
        task=of(TASKS, cfg), model=vae, dial=memory, activations=torch.float32, device=torch.device("cpu")
    )
    softer = training.memory.next_dial(cfg, state, (1, 1, 32, 32, 32))
    # Recovery goes on sharing.
    assert softer.tile_parallel and softer.mode == "tile" and softer.tile != memory.tile, softer


def of_one_rank() -> bool:
    dist.init_process_group("gloo")
    try:
        return build().memory("tile", group=dist.group.WORLD).group is None
    finally:
        dist.destroy_process_group()


def test_a_group_of_one_rank_is_none(pool):
    assert pool(1, of_one_rank) == [True]


@pytest.mark.parametrize("size, ranks", [((30, 70, 50), 2), ((64, 64, 68), 3), ((17, 40, 33), 8)])
def test_no_rank_has_more_than_another_by_more_than_a_tile(size, ranks):
    vae = build(torch.float32)
    ops, x = tile_plans.flatten(vae.memory("tile").encoder), torch.empty(1, 1, *size, device="meta")
    shares = [
        list(
            tiles.Stretch(
                ops, (4, 4, 4), None, SimpleNamespace(rank=partial(int, rank), size=partial(int, ranks))
            ).tiles(x)
        )
        for rank in range(ranks)
    ]
    work = [[tiles.prod(s.source[1] - s.source[0] for s in tile) for tile in share] for share in shares]
    assert max(map(sum, work)) - min(map(sum, work)) <= max(map(max, work)), [sum(w) for w in work]
    assert {tile for share in shares for tile in share} == set(
        tiles.Stretch(ops, (4, 4, 4)).tiles(x)
    ) and sum(map(len, shares)) > ranks
