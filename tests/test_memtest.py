"""memtest.py: rows, tables, plans and the command line. No GPU needed."""
import dataclasses
import json
import math
import shlex
import types
from xml.etree import ElementTree

import pytest
import torch
import yaml

import memtest
import peaks
import pictures
import runs
import vae3d
from bench import gpu, gpu_sample
from peaks import GIB
from tasks import TASKS
from training import fit, plan
from training.task import of

KEYS = [
    "preset",
    "resolution",
    "batch",
    "amp",
    "mode",
    "tile",
    "params",
    "predicted_gib",
    "measured_gib",
    "step_seconds",
    "fits",
]
SVG = "{http://www.w3.org/2000/svg}"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def test_what_depends_on_data_is_an_error_of_the_row_not_a_traceback():
    cfg = runs.load_config([])
    row = memtest.new_row(cfg, of(TASKS, cfg))
    row = memtest.fill(row, lambda device: lambda: torch.ones(3, device=device).nonzero(), "cuda", False)
    assert row.predicted_gib is None and "nonzero" in row.error
    row = memtest.fill(row, lambda device: lambda: torch.ones(1), "cpu", True)
    assert row.measured_gib == row.predicted_gib == 4 / GIB and row.step_seconds > 0


@pytest.fixture
def quick(monkeypatch):
    """The command line with a formula in the place of predictions: bytes per voxel, by precision and mode."""
    def formula(make_step, device="cuda"):
        cfg = make_step(None)
        per_voxel = {"none": 1000, "checkpoint": 400, "tile": 20}[cfg.memory.mode] * (
            1 if cfg.train.amp else 2
        )
        found = 10 ** 7 + per_voxel * math.prod(cfg.data.patch) * cfg.train.batch
        return types.SimpleNamespace(bytes=found, largest=1)
    monkeypatch.setattr(peaks, "predict", formula)
    monkeypatch.setattr(plan, "tile_plans_of", lambda vae, size, batch, dtype: [types.SimpleNamespace(
        tile=(64, 64, 64), stretch="1", peak_bytes=15 * math.prod(size) * batch, work=1.2)])
    monkeypatch.setattr(fit, "make_step", lambda cfg, task, device, rehearsal=False: cfg)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_json_rows_have_their_keys_and_the_picture_is_an_svg(quick, tmp_path, capsys):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "svg")}
    flags = ["--preset", "high_res", "--resolution", "16,32,64"]
    assert memtest.main([*flags, "--json", str(files["json"]), "--svg", str(files["svg"])]) == 0
    rows = json.loads(files["json"].read_text())
    assert [list(row) for row in rows] == [KEYS] * (1 + 2 * len(vae3d.MEMORY_MODES))
    assert [(r["amp"], r["mode"], r["batch"]) for r in rows[:2]] == [(False, "none", 1), (True, "none", 1)]
    assert rows[-1]["batch"] == 2
    assert (
        rows[0]["resolution"] == [16, 32, 64] and rows[0]["preset"] == "high_res" and rows[0]["tile"] is None
    )
    assert rows[0]["params"] == sum(p.numel() for p in vae3d.VAE3D.from_preset("high_res").parameters())
    assert all(row["measured_gib"] is row["step_seconds"] is row["fits"] is None for row in rows)
    said = capsys.readouterr().out
    assert "against row 1" in said and "context" in said and "workspace" in said and "fragmentation" in said
    picture = ElementTree.parse(files["svg"]).getroot()
    words = [element.text for element in picture.iter(f"{SVG}text")]
    assert any(word.startswith("high_res 16,32,64") for word in words)
    for row in rows:                                             # a label and a figure each
        mode = {"none": "all kept", "checkpoint": "checkpointed", "tile": "tiled"}[row["mode"]]
        precision = "bf16 AMP" if row["amp"] else "float32"
        tile = f" by {','.join(map(str, row['tile']))}" if row["tile"] else ""
        assert f"{precision}, {mode}{tile}, batch {row['batch']}" in words, words
        assert f"{pictures.figure(row['predicted_gib'])} GiB" in words, words
    bars = [
        element for element in picture.iter(f"{SVG}rect") if element.get("height") == f"{pictures.THICK:.1f}"
    ]
    assert len(bars) == len(rows)


def test_the_picture_marks_the_cards():
    row = memtest.Row("fast", (64, 64, 64), 1, True, "none", None, 7, predicted_gib=4.0)
    words = [e.text for e in ElementTree.fromstring(memtest.picture([row], "t")).iter(f"{SVG}text")]
    assert {"8 GiB", "12 GiB", "24 GiB", "4.00 GiB", "bf16 AMP, all kept, batch 1"} <= set(words)
    assert any("cards" in word and "10 %" in word for word in words)


def test_the_plan_is_yaml_that_train_takes(quick, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    flags = ["--preset", "high_res", "--resolution", "64,128,128", "--batch", "2", "--vae.norm", "group",
             # one rank's memory; other modes are tried
             "--memory.mode", "tile", "--memory.tile_parallel", "true"]
    assert memtest.main([*flags, "--budget", "1", "--yaml", str(path)]) == 0
    cfg = runs.load_config(["--config", str(path)])
    assert (cfg.preset, cfg.data.patch, cfg.train.batch, cfg.vae.norm, cfg.train.amp) == (
        "high_res",
        (64, 128, 128),
        2,
        "group",
        True,
    )
    assert cfg.memory.mode == "checkpoint"                       # 1.96 GiB without, 0.79 with
    assert set(yaml.safe_load(path.read_text())) == {"preset", "vae", "data", "train", "memory"}
    said = capsys.readouterr().out
    assert "largest cube" in said and "proportions of 64,128,128" in said and path.read_text() in said
    # The first line is the answer, the second one what to paste, which makes the same config.
    first, second = said.splitlines()[:2]
    assert first == ("64,128,128 fits 1 GiB with memory mode checkpoint: 0.79 GiB with 10 % to spare")
    words = shlex.split(second)
    assert words[:2] == ["python", "train.py"] and words[2:4] == ["--data", "FOLDER"]
    assert runs.load_config(words[4:]) == cfg
    # Every volume has its command, and what fits as it is says so.
    for line in said.splitlines():
        if line.startswith("  python train.py"):
            runs.load_config(shlex.split(line)[4:])
    assert said.count("  python train.py") == 3
    assert memtest.main(["--resolution", "64,128,128", "--budget", "8"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("64,128,128 fits 8 GiB as it is: 0.99 GiB with 10 % to spare\n")
    rows = {line.split("  ")[0]: line for line in said.splitlines()}
    assert rows["float32, all kept"].endswith("8 12 24") and "cards of GiB" in said


def test_the_table_marks_the_cards_that_a_setting_fits():
    row = memtest.Row("p", (1, 1, 1), 1, True, "tile", (8, 16, 16), 1)
    for gib, cards in ((7.2, "8 12 24"), (7.3, "12 24"), (10.9, "24"), (21.7, "none"), (None, "-")):
        row.predicted_gib = gib
        assert memtest.cells_of(row, None)["cards of GiB"] == cards
    assert row.label == "bf16 AMP, tiled by 8,16,16"


def test_more_budget_never_plans_less(quick, capsys):
    cubes = []
    for gib in (0.5, 1, 4, 24):
        assert memtest.main(["--resolution", "16,32,32", "--budget", str(gib)]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "largest cube" in line)
        cubes.append(int(line.split(": ")[1].split(",")[0]))
    assert cubes == sorted(set(cubes))


def test_where_nothing_fits_it_says_by_how_much_and_what_would(quick, capsys):
    assert memtest.main(["--resolution", "512,512,512", "--budget", "1"]) == 1
    said = capsys.readouterr().out
    assert all(
        part in said
        for part in (
            "512,512,512 does not fit 1 GiB: the least is",
            "GiB too much",
            "It would with --budget",
            "or as",
        )
    )
    budget = said.split("--budget ")[1].split(",")[0].split()[0]
    assert memtest.main(["--resolution", "512,512,512", "--budget", str(float(budget) + 0.01)]) == 0
    capsys.readouterr()
    assert memtest.main(["--resolution", "512,512,512", "--budget", "0.001"]) == 1
    assert "largest cube: none" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--resolution", "64,256"], "3 values"),
        (["--resolution", "a,b,c"], "whole number"),
        (["--preset", "huge"], "ultra_lightweight"),
        (["--budgets", "3"], "--budget"),
        (["--budget", "lots"], "'lots'"),
        (["--budget", "-3"], "above 0"),
        (["--device", "mps"], "mps"),
        (["--json", "/no/such/folder/x.json"], "no such folder"),
        pytest.param(["--budget"], "--budget 24", marks=NO_GPU),
        pytest.param(["--measure"], "no GPU|none", marks=NO_GPU),
    ],
    ids=str,
)
def test_what_cannot_start_is_one_line_and_exit_2(argv, said, capsys):
    assert memtest.main(argv) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("\n") == 1
        and err.startswith("memtest.py: ")
        and any(s in err for s in said.split("|"))
    ), err


@pytest.mark.slow
def test_a_row_runs_in_its_own_process():
    row = memtest.in_process(
        ["--resolution", "8,16,16", "--vae.base_channels", "8", "--device", "cpu", "--measure"]
    )
    assert (
        row["error"] is None
        and row["predicted_gib"] == pytest.approx(row["measured_gib"], rel=0.05)
        and row["step_seconds"] > 0
    )
    assert {f.name for f in dataclasses.fields(memtest.Row)} == set(row)
    assert "unknown flag --nonsense" in memtest.in_process(["--nonsense"])["error"]


@pytest.mark.slow
def test_the_gpu_bench_says_that_it_cannot_run(capsys):
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and "--device cpu --tiny" in said.err


@pytest.mark.slow
def test_the_gpu_bench_is_right_here_and_sees_what_is_not(tmp_path, monkeypatch, capsys):
    """Networks, sparse convolution and quantiser in float32 against float64; then with a fault."""
    found = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--tiny", "--only", "correctness"]
    assert gpu.main([*flags, "--json", str(found)]) == 0
    written = json.loads(found.read_text())
    assert len(written["correctness"]) == 14 and all(row["right"] for row in written["correctness"])
    assert written["facts"]["torch"] == torch.__version__ and "sparse_conv" in capsys.readouterr().out

    plain = gpu.sparse_conv.neighbours
    monkeypatch.setattr(gpu.sparse_conv, "neighbours", lambda code, bits: plain(code, bits).flip(1))
    monkeypatch.setitem(gpu.PARTS, "correctness", lambda options: iter([gpu.sparse_right(options)]))
    assert gpu.main(flags) == 1 and "right False" in capsys.readouterr().out


SHALLOW = {"seg": ["--unet.channels", "4,8"], "diffusion": ["--unet.channels", "32,64"],
           "sparse": ["--preset", "sparse_light", "--sparse.num_blocks", "1"]}


@pytest.mark.slow
def test_the_gpu_bench_samples_decodes_and_writes(tmp_path):
    """Small on this machine; what 512^3 takes on a card is predicted, 16 GiB at most."""
    found = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--tiny", "--only", "diffusion", "--json", str(found)]
    assert gpu.main(flags) == 0
    rows = json.loads(found.read_text())["diffusion"]
    assert [row["what"] for row in rows[:5]] == ["a step", "sampled", "decoded", "written", "all three"]
    parts = sum(row["seconds"] for row in rows[1:4])
    assert rows[4]["seconds"] == pytest.approx(parts, abs=0.01) and rows[1]["latent"] == [4, 4, 8, 8]

    peaks_of = gpu_sample.predicted((512, 512, 512), 30)
    guided = gpu_sample.predicted((512, 512, 512), 30, guidance=2.0)
    # the latent alone takes 32 MiB in float32, the volume 512 MiB
    assert 0.5 < peaks_of["sampled"] <= guided["sampled"] <= 16 and 0.5 < peaks_of["decoded"] <= 16


@pytest.mark.slow
def test_the_larger_denoiser_trains_on_latents_of_512_within_8_gib(capsys):
    """128,128,128 x 4, batch 1, AMP; a network of MAISI's size (180 M), checkpointed, within 20 GiB."""
    flags = ["--one", "--task", "diffusion", "--preset", "denoiser", "--resolution", "128,128,128", "--amp"]
    lean = ["--memory.mode", "checkpoint"]
    large = ["--unet.channels", "128,256,512,928", "--unet.num_convs", "2"]
    for more, millions, most in (([], 25.5, 8), (lean, 25.5, 5), ([*lean, *large], 179, 20)):
        assert memtest.main([*flags, *more]) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert row["params"] / 1e6 == pytest.approx(millions, rel=0.02), row
        assert 1 < row["predicted_gib"] <= most, row
    # a ControlNet beside the smaller one, whose label maps have 512^3 voxels; it took 36 GiB
    beside = ["--preset", "denoiser_light", "--cond.control", "x", "--init", "x", "--cond.control_width", "8"]
    assert memtest.main([*flags, *beside, *lean]) == 0
    assert 8 < json.loads(capsys.readouterr().out.splitlines()[-1])["predicted_gib"] <= 15


@pytest.mark.slow
@pytest.mark.parametrize("task", [name for name in TASKS if name != "vae"])
def test_every_task_has_a_table_and_a_plan(task, tmp_path):
    """Those without levels or a memory dial once ended in a traceback."""
    found = tmp_path / "m.json"
    flags = ["--task", task, "--patch", "16,16,16", "--device", "cpu", "--budget", "0.5"]
    assert memtest.main([*flags, *SHALLOW.get(task, []), "--json", str(found)]) == 0
    assert all(row["predicted_gib"] > 0 for row in json.loads(found.read_text()))
