"""Datalists, configs, weights and run folders that are damaged or lie, for fuzz_data.py.

A file is a function of the random state it is given.
"""
import contextlib
import functools
import io
import json
import math
import os
import pickle
import random
import shutil
import tempfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import yaml

import train
import training.config
import training.console
from fuzz_volumes import common, flip, one_member, zeros
from training import checkpoints

ROOT = Path(__file__).resolve().parent.parent

TEXTS = (
    "", "\0", "../..", "/dev/zero", "/dev/null", "~", "~root", "é", "\ud800", "x" * 5000, "a\nb", "\x1b[31m",
    "none", "nan", "1e400", "[1, 2", "${HOME}", "%n", "2001-13-99", "0x", "--data", "true", "-1", "1e-4",
    "16,64,64", "\u202e", "a/b/c.nii", ".", "..")
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, math.nan, math.inf,
    -math.inf, [], {}, [[]], [None], {"": {}}, [1, 2, 3], ["a"], {"a": [1]}, [[[[1]]]], list(range(300)))


def volumes(folder: Path) -> Path:
    """Good and bad files that the datalists name, made once."""
    place = folder / "volumes"
    if not place.is_dir():
        place.mkdir()
        rng = np.random.default_rng(0)
        for name in ("a.nii.gz", "b ü.nii.gz"):
            nib.save(
                nib.Nifti1Image(rng.integers(-1000, 900, (9, 8, 7)).astype(np.int16), np.eye(4)), place / name
            )
        np.save(place / "c.npy", rng.integers(-1000, 900, (9, 8, 7)).astype(np.int16))
        np.savez(
            place / "d.npz", vol=rng.integers(-1000, 900, (9, 8, 7)).astype(np.int16),
            seg=rng.integers(0, 3, (9, 8, 7)))
        nib.save(
            nib.Nifti1Image(rng.integers(0, 3, (9, 8, 7)).astype(np.uint8), np.eye(4)), place / "label.nii.gz"
        )
        (place / "empty.nii.gz").write_bytes(b"")
        (place / "folder.nii.gz").mkdir()
        (place / "loop.nii.gz").symlink_to("loop.nii.gz")
        os.mkfifo(place / "pipe.nii.gz")
    return place


def hostile(rng: random.Random) -> object:
    return rng.choice((rng.choice(VALUES), rng.choice(TEXTS)))


def changed(rng: random.Random, value: object, share: float = 0.15) -> object:
    """A tree of plain values with some of them replaced, doubled or left out."""
    if rng.random() < share:
        return hostile(rng)
    if isinstance(value, dict):
        out = {
            (rng.choice(TEXTS) if rng.random() < 0.03 else key[:-1] if rng.random() < 0.03 else key): changed(
                rng, part, share / 2)
            for key, part in value.items() if rng.random() > 0.03}
        return out | ({rng.choice(TEXTS): hostile(rng)} if rng.random() < 0.1 else {})
    if isinstance(value, list):
        return [changed(rng, part, share) for part in value if rng.random() > 0.05] + (
            [hostile(rng)] if rng.random() < 0.1 else [])
    return value


def nested(rng: random.Random, key: str) -> str:
    depth = rng.choice((50, 500, 900, 990, 1500, 20_000))
    first, last = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"image":', "}]")))
    return f'{{"{key}": {first * depth}1{last * rng.choice((depth, depth, 0))}}}'


def make_json(rng: random.Random, folder: Path, name: str) -> Path:
    path, place = folder / f"{name}.json", f"../{volumes(folder.parent).name}/"
    files = (
        "a.nii.gz", "b ü.nii.gz", "c.npy", "d.npz", "empty.nii.gz", "folder.nii.gz", "loop.nii.gz",
        "pipe.nii.gz", "absent.nii.gz", "label.nii.gz")
    entries = [{"image": place + rng.choice(files)} for _ in range(rng.randrange(1, 5))]
    entries[0]["image"] = place + "a.nii.gz"
    for entry in entries:
        if rng.random() < 0.5:
            entry["label"] = place + rng.choice(
                ("label.nii.gz", "label.nii.gz", "d.npz", "absent.nii.gz", "pipe.nii.gz"))
        if rng.random() < 0.4:
            entry["class"] = rng.choice(("ct", "CT", "mr", "radar", "liver", ""))
    entries = [entry["image"] if rng.random() < 0.2 else entry for entry in entries]
    content = {
        "name": "fuzz", "training": entries, "validation": [place + "c.npy"] if rng.random() < 0.5 else [],
        "testing": []}
    what = rng.random()
    if what < 0.6:
        content = changed(rng, content)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    if 0.6 <= what < 0.7:
        twice = text.replace("{", '{"training": [], ', rng.choice((1, 3)))
        text = nested(rng, rng.choice(("training", "x", "validation"))) if what < 0.64 else twice
    elif 0.7 <= what < 0.8:
        odd = (
            "9" * 5000, "1e999", "NaN", "-Infinity", "0x1", "'a'", "nul", "01", "[1,]",
            nested(rng, "training"))
        text = text.replace('"fuzz"', rng.choice(odd))
        text = text.replace(place, rng.choice((place, "9" * 5000, "\\ud800", "\\u0000")))
        text = text.replace('"ct"', rng.choice(("9" * 4000, nested(rng, "a"), '"\\udfff"')))
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    packed = text.encode(encoding, "backslashreplace" if encoding != "utf-8" else "surrogatepass")
    path.write_bytes(flip(rng, packed) if what >= 0.9 else common(rng, packed) if what >= 0.8 else packed)
    return path


YAML_SCALARS = (
    "!!python/object/apply:os.system ['touch executed']", "!!timestamp x", "!!int ''", "!!int '-'",
    "!!float x", "!!bool maybe", "!!binary x", "!!set {a, a}", "!!omap [a]", "!!pairs 3", "2001-01-01",
    "2001-99-99", "2001-01-01 99:00:00", "0x" + "f" * 5000, "9" * 5000, "1:60:60", "0o8", ".nan", ".inf", "~",
    "? [a]", "{a: {b: 1}}", "&x [*x]", "*absent", "&a a", "<<: 3", "'\\0'", '"\\0"', '"\\ud800"',
    '"\\x1b[2J"', "|\n  two\n  lines", "null", "[" * 600, "- " * 300, "[1, [2, [3]]]", "1,2", "[1.5, 2, 3]",
    "-0", "1e400", "yes", "{}", "[]", "[null, null, null]", "{1: 2}", "[1, 2, 3, 4]", "!!str 3", "!x y",
    "%TAG", "@", "`", "\t")


@functools.cache
def config_texts() -> tuple[str, ...]:
    return (
        training.config.to_yaml(training.config.TrainConfig()),
        *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "config").glob("*.yaml"))))


def laughs(rng: random.Random) -> str:
    """A billion values in a few hundred bytes, by aliases or by merges."""
    merge, depth = rng.random() < 0.5, rng.choice((3, 9, 12))
    lines = ["a0: &a0 {k0: lol}" if merge else "a0: &a0 [lol, lol]"]
    for i in range(1, depth):
        many = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{many}], k{i}: lol}}" if merge else f"a{i}: &a{i} [{many}]")
    return (
        "\n".join(
            [*lines, f"{rng.choice(('data', 'train', 'x'))}: {rng.choice(('', '{patch: '))}*a{depth - 1}"])
        + "\n")


def make_yaml(rng: random.Random, folder: Path, name: str) -> Path:
    path, what, text = folder / f"{name}.yaml", rng.random(), rng.choice(config_texts())
    lines = text.splitlines()
    if what < 0.5:                                               # values, keys, lines
        for _ in range(rng.choice((1, 1, 2, 5))):
            i = rng.randrange(len(lines))
            key, colon, value = lines[i].partition(":")
            new = rng.choice(YAML_SCALARS) if rng.random() < 0.5 else json.dumps(hostile(rng))
            lines[i] = rng.choice((f"{key}{colon} {new}", f"{key}{colon} {new}", f"{key[:-1]}{colon}{value}",
                                   f"{key}{colon}{value}\n{lines[i]}", f"  {lines[i]}", f"{lines[i]}  {new}",
                                   f"{rng.choice(TEXTS)}: {value}", f"{new}: {value}", ""))
        text = "\n".join(lines)
    elif what < 0.75:
        text = yaml.safe_dump(changed(rng, yaml.safe_load(text)), allow_unicode=rng.random() < 0.5)
    elif what < 0.8:
        text = laughs(rng)
    elif what < 0.85:
        text = rng.choice((
            nested(rng, "data"), "data: " + nested(rng, "patch"), "- " * 2000, "a: " + "x" * 400_000,
            "{" * 3000, "? " * 2000, "x: |\n" + " y\n" * 90_000))
    elif what < 0.9:
        text = rng.choice((
            "", "null", "[]", "3", "data", "--- 1\n--- 2\n", "data: {path: a}\n" * 2, "%YAML 9.9\n---\n",
            "\0", "\t", "data:\n\tpath: x", "&a [*a]"))
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    packed = text.encode(encoding, "backslashreplace" if encoding != "utf-8" else "surrogatepass")
    path.write_bytes(flip(rng, packed) if what >= 0.95 else common(rng, packed) if what >= 0.9 else packed)
    return path


class Evil:
    """Runs a command when it is unpickled by a loader that lets it."""
    def __reduce__(self):
        return os.system, ("touch executed",)


def make_pt(rng: random.Random, folder: Path, name: str) -> Path:
    path, what = folder / f"{name}.pt", rng.random()
    kind = rng.choice(("vae3d.train", "vae3d.weights"))
    content = {
        "kind": kind, "version": checkpoints.VERSIONS[kind], "config": {"train": {"seed": 0}}, "step": 3,
        "ema": [], "best": None, "model": {"w": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.float16)},
        "disc": None, "lecam": None, "latent": None,
        "data": {
            "modality": "ct", "channels": 1, "classes": 0, "label_values": None, "background": -1.0,
            "spacing": [1, 1.0, 1.0], "training": ["a"]},
        "optimizer": {"state": {}, "param_groups": []}, "disc_optimizer": None, "scaler": {},
        "best_loss": 0.5, "bad_validations": 0, "plateau": [1.0, 1.0, 0], "bad_steps": 0, "finished": False,
        "validated": 0, "sampled": 0, "usage": torch.zeros(4), "norms": [0.5], "log_scale": 16.0,
        "global_batch": 2}
    if what < 0.15:
        place = rng.choice(("kind", "version", "config", "model", "step", "x"))
        content[place] = rng.choice((
            torch.zeros(3), Evil(), [Evil()], {"a": Evil()}, slice(1), np.float64(1), Path("x"),
            functools.partial(os.getcwd)))
    elif what < 0.35:
        content = (
            changed(rng, {key: value for key, value in content.items() if key != "model"}) if what < 0.3
            else hostile(rng))
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=rng.random() > 0.1)
    packed = stream.getvalue()
    if 0.35 <= what < 0.45:
        packed = pickle.dumps(content if what < 0.4 else Evil(), rng.choice((0, 2, 5)))
    elif 0.45 <= what < 0.6 and zipfile.is_zipfile(io.BytesIO(packed)):  # other members
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        victim = rng.choice(list(members))
        if rng.random() < 0.5:
            del members[victim]
        else:
            members[rng.choice((victim, "../../x", "x/y"))] = rng.choice(
                (b"", b"cos\nsystem\n(S'touch executed'\ntR.", rng.randbytes(100)))
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for member, part in members.items():
                archive.writestr(member, part)
        packed = stream.getvalue()
    elif 0.6 <= what < 0.65:
        packed = one_member("archive/data.pkl", zeros(2048), 2048 * 2**20)
    elif 0.65 <= what < 0.9:
        packed = common(rng, packed)
    path.write_bytes(packed)
    return path


@functools.cache
def finished_run() -> dict:
    """The last.pt of a small run with a codebook, a discriminator, a feature network and an average."""
    flags = [
        "--data.synthetic_count", "3", "--data.synthetic_size", "8,16,16", "--patch", "4,8,8",
        "--data.crops_per_volume", "3", "--batch", "1", "--vae.base_channels", "4", "--vae.bottleneck", "vq",
        "--vae.num_codes", "16", "--loss.adv_weight", "0.3", "--loss.disc_channels", "4",
        "--loss.disc_layers", "1", "--loss.disc_strides", "1,2,2", "--loss.lecam_weight", "0.1",
        "--optim.clip_percentile", "90", "--optim.clip_window", "3", "--train.ema", "0.9",
        "--train.val_crops", "1", "--optim.schedule", "plateau", "--loss.perceptual_weight", "0.1",
        "--train.latent_crops", "1", "--log.sample_every", "0", "--log.samples", "1", "--device", "cpu",
        "--steps", "2"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*flags, "--out", f"{folder}/run"]) == 0
        return checkpoints.read(Path(folder) / "run/last.pt")


def replaced(rng: random.Random, value: object) -> object:
    """A tree of plain values and tensors with one of them, at any depth, replaced, left out, doubled or
    changed within its type.
    """
    if isinstance(value, bool) and rng.random() < 0.5:
        return not value
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice(
            (0, -1, 10**9, 2**70) if isinstance(value, int) else (0.0, -1.0, 1e300, math.nan, math.inf))
    if isinstance(value, list) and rng.random() < 0.15:
        return value[:-1] if rng.random() < 0.5 else value * 2
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and rng.random() < 0.5:
        return rng.choice((
            value.flatten(), value[None], value.to(torch.int8), value.to("meta"), value * math.nan,
            value.half()))
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice((
            hostile(rng), torch.zeros(()), torch.full((3,), math.nan), torch.zeros(0),
            torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.ones(1).expand(5),
            torch.ones(16, dtype=torch.int8), b"x", 7, 0.5))
    value, place = value.copy(), rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.1:
        del value[place]
    elif rng.random() < 0.1 and isinstance(value, dict):
        value[rng.choice((*TEXTS, 7, None, 0.5))] = hostile(rng)
    else:
        value[place] = replaced(rng, value[place])
    return value


def make_run(rng: random.Random, folder: Path, name: str) -> Path:
    """A last.pt whose checksums are right and whose contents are not. Its config is left alone: that is the
    format yaml.
    """
    content = dict(finished_run())
    for _ in range(rng.choice((1, 1, 1, 2))):
        place = rng.choice([key for key in content if key != "config"])
        content |= {place: replaced(rng, content[place])}
    path = folder / name / "last.pt"
    shutil.rmtree(path.parent, ignore_errors=True)               # of a case that failed
    path.parent.mkdir()
    torch.save(content, path)
    return path
