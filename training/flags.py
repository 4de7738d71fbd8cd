"""The command line of train.py, as flags and as the config that they make.

The flags are made from the dataclasses of the config, their help from the comments beside the fields.
Later beats earlier: defaults, preset, YAML file, flags. Version 0.3 (2026-11).
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from training import guide_json
from training.config import SECTIONS, TrainConfig, config_from, convert, one_of, read_yaml, with_optimizer
from training.console import tell
from training.foreign import foreign_init
from training.spellings import SHORT_FLAGS, advice, spelled
from training.stages import stage_configs, without
from training.task import named, of

DESCRIPTION = "Train a 3D VAE, VQ-VAE or U-Net with one command."
# What --help says; the flags' own texts are in --help-all.
EVERYDAY = """\
Train a 3D VAE, VQ-VAE or U-Net.

  python train.py --preset ultra_lightweight --steps 200            built-in synthetic volumes
  python train.py --data FOLDER --patch 32,96,96 --amp --out runs/ct
  python train.py --config config/ct_vae.yaml --data FOLDER         config/ has one experiment a file
  python train.py --task seg --data FOLDER                          image/label pairs
  python train.py --data FOLDER --patch 128 --fit 8 --dry-run       does it fit into 8 GiB?
  python train.py --resume runs/ct                                  goes on bit for bit
  torchrun --nproc_per_node 4 train.py --data FOLDER                4 GPUs

What    --data PATH              folder, file or datalist; none: synthetic volumes
        --task vae|seg|features|diffusion|sparse    an autoencoder; a U-Net on pairs; features for the
                                 perceptual loss; latent diffusion; a sparse VQ-VAE of points near a surface
        --preset NAME            the network's size: ultra_lightweight, lightweight, base, standard, high_res,
                                 fast, sharp, thick; unet3d, unet_light, unet2d ... for seg
        --config YAML            an experiment file; flags beat it
        --out FOLDER             run folder [runs/NAME_DATE, NAME of the data]
        --resume RUN, --init RUN_OR_FILE    go on with a run; start from weights
How     --patch D,H,W            crop in voxels, z first; 96 is 96,96,96
        --batch N, --accum N     crops at a time, and how many times an update [2, 1]
        --steps N, --epochs N    how long; whichever ends first
        --optim.lr 1e-3, --optim.optimizer muon|adamw, --optim.schedule cosine, --optim.warmup 0.05
        --seed N, --device auto|cuda|cuda:1|cpu, --workers N, --amp, --compile
Memory  --fit [GIB]              the cheapest memory settings that fit
        --memory.mode none|checkpoint|tile
        --dry-run [--verbose]    predicted peak and config, then stop; see memtest.py too
Data    --data.modality ct|mr|voxel, --data.window lung|bone|soft_tissue|brain, --data.hu_range=-1000,1000
        --data.spacing 3,1,1     mm; or random, with --data.zoom 0.8,1.25
        --data.flip W, --data.turn HW, --data.jitter 0.1, --data.gamma, --data.noise, --data.blur
        --data.val_fraction 0.2, --data.foreground 0.33
Network --vae.base_channels 16, --vae.channel_mult 1,2,2, --vae.z_channels 4, --vae.norm none|group
        --vae.bottleneck kl|vq|fsq, --vae.num_codes 512; --unet.channels 16,32,64,128
Loss    --loss.recon l1|mse, --loss.kl_weight, --loss.perceptual_weight, --loss.adv_weight, --loss.dice_share
Looks   --train.val_every 50, --log.every 10, --log.sample_every 100, --log.tensorboard, --log.wandb

Every field of every section is a flag and a key of the YAML: --help-all. Names from MONAI and others:
docs/COMING_FROM.md.
"""
# Flags that are about the command and no part of the config.
COMMANDS = ("config", "resume", "dry_run", "verbose", "fit")
# Section -> the field that has an entry a level, between which `strides` has one each.
LEVELS = {"vae": "channel_mult", "unet": "channels"}


# -------------------------------------------------------------------------------- the config

def load_config(
    argv: Sequence[str], tasks: Mapping[str, ModuleType], base: TrainConfig | None = None,
    say: Callable[[str], None] = tell,
) -> TrainConfig:
    """Defaults, preset, YAML file, flags: later beats earlier.

    tasks: the table of tasks/.
    base: a checkpoint's config, which takes the place of defaults and preset.
    say: gets a line where a flag beats a stage of train.stages.
    Where train.init is a file that another library made, what it says of the network takes the place of
    the preset. Raises ValueError with one line: which flag or key, what was found, what to do.
    """
    # First what is asked for, as {section: {field: value}}: by the flags, and by the file.
    options = vars(build_parser(tasks).parse_args(list(argv)))
    flags: dict = {}
    for name, value in options.items():
        section, _, key = name.rpartition(".")
        if name in COMMANDS:
            continue
        if section:
            flags.setdefault(section, {})[key] = value
        else:
            flags[key] = value
    from_file = read_yaml(options["config"]) if options.get("config") else {}
    if guide_json.is_guide(from_file):
        from_file = guide_json.translated(from_file, options["config"], say)

    # Then what these are put over.
    if base is None:
        base = starting_point(flags, from_file, tasks)
    elif "train.init" in options or "train.init_hints" in options:
        raise ValueError("--init and --resume exclude one another: a resumed run goes on with its own "
                         "weights")
    for name in ("task", "preset"):
        built_with = getattr(base, name)
        wanted = flags.get(name, from_file.get(name, built_with))
        if wanted != built_with:
            raise ValueError(f"{name} {wanted}: the run to resume was built with {built_with}; leave it out")
    follow_levels(flags, from_file, base)
    cfg = config_from(from_file, base, str(options.get("config")))
    cfg = config_from(flags, cfg, "command line")
    cfg, beaten = without(cfg, flags)
    if beaten:
        say(f"{', '.join(beaten)}: as the command line says, in every stage of train.stages")

    # Then what the tasks know: their metrics, and which fields go together.
    task = of(tasks, cfg, "command line")
    metrics = dict.fromkeys(name for each in tasks.values() for name in each.METRICS)
    cfg = with_optimizer(cfg, task.OPTIMIZER)
    for each in stage_configs(cfg).values():
        one_of("train.metric", each.train.metric, ("auto", *metrics))
        task.check(each)
    return cfg


def follow_levels(flags: dict, from_file: dict, base: TrainConfig) -> None:
    """Strides for levels that are asked for without them, in place: those of `base`, as many as are needed.

    The coarsest goes on, 2,2,2 where `base` has none. With strides that are asked for, nothing changes.
    """
    for section, field in LEVELS.items():
        # A section that is no mapping is told as an error when its values are read.
        asked = [part.get(section) for part in (from_file, flags)]
        asked = [part for part in asked if isinstance(part, dict)]
        known = getattr(base, section)
        hint = typing.get_type_hints(type(known))[field]
        for part in asked:
            if field not in part or any("strides" in each for each in asked):
                continue
            between = len(convert(part[field], hint, f"{section}.{field}")) - 1
            strides = list(known.strides)
            if len(strides) != between:
                strides += (strides[-1:] or [(2, 2, 2)]) * max(0, between - len(strides))
                part["strides"] = strides[:between]


def starting_point(flags: dict, from_file: dict, tasks: Mapping[str, ModuleType]) -> TrainConfig:
    """Defaults and preset, or defaults and the network of a file that another library made.

    With such a file a preset is taken out of `from_file`, since the network stands in its place.
    """
    task = named(tasks, flags.get("task", from_file.get("task", TrainConfig.task)))
    presets = task.PRESETS or {TrainConfig.preset: None}
    first = next(iter(presets))
    preset = flags.get("preset", from_file.get("preset", first))

    foreign = foreign_init(flags, from_file, task)
    if foreign is not None:
        preset, presets = foreign.layout, {foreign.layout: foreign.vae}
        from_file.pop("preset", None)
    # A run from such a file has its layout as preset, which its config.yaml may name but no flag. What a YAML
    # file says may be a list or a dict, of which no dict knows whether it has it.
    elif "preset" not in flags and preset in tuple(task.FILE_PRESETS):
        presets = task.FILE_PRESETS
    one_of("preset", preset, tuple(presets))
    return TrainConfig(task.name, preset, **task.sections(presets[preset]))


# -------------------------------------------------------------------------------- the flags

class Parser(argparse.ArgumentParser):
    """argparse with house errors: one line that says what to use instead."""
    def error(self, message: str) -> typing.NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        if unknown.startswith("-") and message.startswith("unrecognized"):
            message = f"unknown flag {unknown}{advice(unknown, self._option_string_actions)}"
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None):
        """With flags by the names that they have elsewhere (spellings.py)."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(spelled(words, self._option_string_actions), namespace)


class ShowEveryday(argparse.Action):
    """--help: one screen. --help-all is argparse's."""
    def __call__(self, parser, namespace, values, option_string=None):
        print(EVERYDAY, end="")
        parser.exit()


def build_parser(tasks: Mapping[str, ModuleType]) -> Parser:
    """The short flags, and for each field of each section `--section.field`."""
    parser = Parser(
        prog="train.py",
        description=DESCRIPTION,
        allow_abbrev=False,
        add_help=False,
        # A flag that is not given is absent, so that it beats nothing.
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=140),
    )
    add = parser.add_argument
    add("-h", "--help", nargs=0, action=ShowEveryday, help="the everyday flags, on one screen")
    add("--help-all", action="help", help="all flags: this")
    add("--config", metavar="YAML", help="experiment file, see config/")
    add("--resume", metavar="RUN_OR_FILE", help="go on with a run; config, data and out come from it")
    add("--dry-run", action="store_true", dest="dry_run",
        help="print the predicted peak and what differs from the defaults, then stop")
    add("--verbose", action="store_true", help="--dry-run: print the whole config")
    add("--fit", metavar="GIB", nargs="?", const="free",
        help="choose the cheapest memory settings that fit; without a number: into the card's free memory")

    add("--task", metavar="NAME", help=" | ".join(tasks) + " [vae]")
    presets = {name: named(tasks, name).PRESETS for name in tasks}
    known = [f"{name}: {' | '.join(names)}" for name, names in presets.items() if names]
    add("--preset", metavar="NAME", help="; ".join(known))
    for section in SECTIONS:
        add_section(parser.add_argument_group(f"section {section.name}"), section)
    return parser


def add_section(flags, section: dataclasses.Field) -> None:
    """A flag for each field of a section; flags: the part of the parser that they belong to."""
    cls = section.default_factory
    comments, hints = field_comments(cls), typing.get_type_hints(cls)
    short = {path: flag for flag, path in SHORT_FLAGS.items()}
    for f in dataclasses.fields(cls):
        path = f"{section.name}.{f.name}"
        names = [f"--{path}"]
        if path in short:
            names.insert(0, short[path])
        # `--train.amp` alone is `--train.amp true`.
        options = {}
        if hints[f.name] is bool:
            options = {"nargs": "?", "const": "true"}
        text = comments.get(f.name, "")
        if f.default is not dataclasses.MISSING:
            text += f" [{f.default}]"
        # argparse takes % for a format.
        text = text.replace("%", "%%")
        flags.add_argument(*names, dest=path, metavar=f.name.upper(), help=text, **options)


# Kept: reading the source of all sections takes 0.4 s, since inspect parses a module for each.
@functools.cache
def field_comments(cls) -> dict[str, str]:
    """Field name -> the comment beside it in the source.

    A comment may go on below its field, in lines that hold nothing else and begin further right than the
    fields do. A comment at the place of the fields is a heading and belongs to none of them.
    """
    try:
        lines = inspect.getsource(cls).splitlines()
    except OSError:                                              # no source, as in a frozen program
        return {}

    names = {f.name for f in dataclasses.fields(cls)}
    column = indentation(lines[0]) + 4                           # where fields begin
    comments: dict[str, str] = {}
    name = None
    for line in lines:
        code, _, comment = line.partition("# ")
        before_colon = line.split(":")[0].strip()
        # A field opens a new comment ...
        if before_colon in names and indentation(line) == column:
            name = before_colon
            comments[name] = comment
        # ... which goes on in the lines below, as long as they are part of it.
        elif name is not None and comment and not code.strip() and indentation(line) > column:
            comments[name] = f"{comments[name]} {comment}".strip()
        else:
            name = None
    return comments


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())
