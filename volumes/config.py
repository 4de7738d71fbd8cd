"""Section `data` of the config, and the part of it that the cached voxels of a file depend on.

Sizes and spacing are D, H, W (depth, height, width), spacing in mm. Version 1.2.
"""
import math
import re
from dataclasses import dataclass

from volumes.surfaces import LEVELS, Surface

MAX_CLASSES = 1024   # of a label map: class ids lie below

# Names of `data.window` -> (width, level) in HU.
WIDTH_LEVEL = {"lung": (1500, -600), "bone": (1500, 300), "soft_tissue": (400, 50), "brain": (80, 35)}
WINDOWS = {name: (level - width / 2, level + width / 2) for name, (width, level) in WIDTH_LEVEL.items()}

# Names of `data.modality` and of a datalist's `class` -> the rule for intensities.
MODALITIES = {"ct": "ct", "mr": "mr", "mri": "mr", "signed": "signed", "voxel": "voxel", "radar": "voxel",
              "lidar": "voxel", "picture": "picture"}

# Fields that take one of a few names.
CHOICES = {
    "synthetic": ("ct", "radar"),
    "modality": ("auto", *MODALITIES),
    "window": ("none", *WINDOWS),
    "four_d": ("volumes", "channels"),
    "nan": ("error", "zero"),
    "percentiles_of": ("foreground", "all"),
    "metric": ("voxels", "mm"),
}
# The least value of fields that are whole numbers.
LEAST = {"synthetic_count": 1, "crops_per_volume": 1, "workers": 0, "select_channel": 0, "classes": 2,
         "min_points": 1, "max_points": 1}


@dataclass(frozen=True)
class DataConfig:
    """Section `data` of the config. Sizes and spacing are D,H,W.

    Raises ValueError for values that cannot be meant.
    """
    path: str | None = None                  # folder (searched recursively), file or JSON datalist;
                                             # None: synthetic volumes
    synthetic: str = "ct"                    # ct (phantoms with organs, bones, vessels, airways) |
                                             # radar (sparse, 4 channels)
    synthetic_count: int = 12                # volumes; 12 of 48,96,96 take 3 s on a slow core
    synthetic_size: tuple[int, int, int] = (48, 96, 96)  # voxels
    patch: tuple[int, int, int] | None = None  # crop, voxels; None: 32,64,64 (synthetic 16,48,48), less
                                               # where the middle volume is smaller
    val_fraction: float = 0.2                # of the patients, at least one; a datalist's `validation` list
                                             # and `fold` keys win
    patient: str = "auto"                    # whose files are held out together: auto (a datalist's patient,
                                             # subject or case_id, BIDS sub-, a folder for each case) | file |
                                             # folder | a regular expression with one group
    split_seed: int | None = None            # which patients are held out; None: train.seed
    fold: str | None = None                  # K/N: part K, from 0, of N parts of the patients is held out;
                                             # K alone: that `fold` of a datalist; None: val_fraction, or
                                             # the first `fold`
    crops_per_volume: int = 4                # an epoch is this many crops of every training volume
    modality: str = "auto"                   # auto (by the values) | ct | mr | signed (z-scores, phase, maps
                                             # of t values) | voxel (or radar) | picture; a datalist's
                                             # `class` wins
    window: str = "none"                     # CT: none (hu_range) | lung | bone | soft_tissue | brain
    hu_range: tuple[float, float] = (-1000.0, 1000.0)  # CT without window: HU mapped to -1 and 1;
                                                       # air to dense bone
    percentiles: tuple[float, float] = (0.5, 99.5)  # MR: mapped to -1 and 1; MAISI: 0,99.5 of all.
                                                    # Signed: the second, of magnitudes, is mapped to 1
    percentiles_of: str = "foreground"       # MR: foreground (voxels above 0) | all (MAISI)
    surface: str = "none"                    # CT as points near a surface with their distance: none | auto
                                             # (by window: lung -500, bone 300, soft_tissue -150, brain 0) |
                                             # window (inside: the window's HU) | a level in HU, or
                                             # several, each a channel: --data.surface=-500,300
    band: float = 2.0                        # of distances, voxels to either side
    metric: str = "voxels"                   # of distances: voxels (a step along each axis is 1) | mm (in
                                             # units of the finest axis; thick slices tear a surface)
    smooth: float = 1.0                      # sigma in voxels of a Gaussian before the level: noise makes
                                             # points that cost and say nothing
    points: bool = False                     # crops are boxes of tokens; train.py sets it for its task
    min_points: int = 100                    # a volume with fewer is refused, a box drawn anew
    max_points: int | None = None            # of a crop: the largest box of tokens that holds no more;
                                             # None: data.patch alone says
    voxel_scale: tuple[float, ...] | None = None  # voxel: magnitude mapped to 1, one per channel;
                                                  # None: each volume's largest
    spacing: str = "original"                # original | random (zoom of every crop) |
                                             # mm as D,H,W such as 3,1,1
    zoom: tuple[float, float] = (0.8, 1.25)  # spacing random: smallest and largest magnification,
                                             # drawn log-uniformly
    resize: tuple[int, int, int] | None = None  # voxels; whole volumes are resampled to this grid;
                                                # wins over a spacing in mm
    scale: float = 1.0                       # shrinks H and W by this factor, after a spacing in mm;
                                             # resize wins
    four_d: str = "volumes"                  # 4th axis of an image: volumes (separate; split by file
                                             # all the same) | channels
    nan: str = "error"                       # NaN and infinite voxels: error (the file is refused) | zero (or
                                             # what is background: air in a CT, the floor of an MR)
    channel_axis: int | None = None          # of 4-D .npy and .npz; None: the shorter of the last and the
                                             # first axis, up to 8
    select_channel: int | None = None        # use this channel alone, from 0
    labels: bool = False                     # image/label pairs, for segmentation; train.py sets it for
                                             # its task
    classes: int | None = None               # labels lie below, as stored; None: what the training set
                                             # holds, at least 2
    ignore_label: int | None = None          # a label that may lie beyond the classes: voxels that the loss
                                             # leaves out
    label_values: tuple[int, ...] | None = None  # stored values of class 0, 1, ..., all others are 0;
                                                 # None: as stored, in their order where it has gaps
    flip: str = "none"                       # none, or axes flipped at random, such as W or DHW; W
                                             # exchanges left and right, of labels too
    foreground: float = 0.0                  # share of crops that are placed to hold a voxel that is not
                                             # background (with labels: of a class drawn evenly among the
                                             # volume's); above 0 every validation crop holds one
    jitter: float = 0.0                      # contrast times a factor in [1 - jitter, 1 + jitter]; the
                                             # background stays where it is
    turn: str = "none"                       # none, or quarter turns at random: HW in plane, DHW in all three
                                             # planes
    gamma: tuple[float, float] = (1.0, 1.0)  # exponents between which intensities are bent, over the
                                             # background; 1,1: none. MAISI has 0.5,2 for MR
    bias_field: float = 0.0                  # MR: a smooth field is multiplied; the largest coefficient of
                                             # its logarithm. MAISI has 0.3
    blur: float = 0.0                        # standard deviation of a Gaussian blur, up to so many voxels
    low_resolution: float = 1.0              # as from voxels up to so many times as large
    noise: float = 0.0                       # standard deviation of Gaussian noise, up to this, of [-1, 1]
    augment_share: float = 0.3               # of the crops that each of the last five is done to
    strict: bool = False                     # a refused file is an error instead of a line
    cache_dir: str | None = None             # None: $XDG_CACHE_HOME/vae3d, else ~/.cache/vae3d; may be
                                             # deleted when nothing trains
    max_gib: float = 8.0                     # GiB as float32 that one file may declare; checked before memory
                                             # is taken
    workers: int = 0                         # DataLoader processes; 0 is enough where a step takes longer
                                             # than its crops (~1 ms each)
    pin_memory: bool = True                  # page-locked batches for faster copies; of use with CUDA only

    def __post_init__(self):
        if isinstance(self.spacing, (int, float)):  # a number of a YAML file
            object.__setattr__(self, "spacing", f"{self.spacing:g}")
        elif not isinstance(self.spacing, str):  # a YAML list or a tuple
            text = ",".join(f"{value:g}" for value in self.spacing)
            object.__setattr__(self, "spacing", text)  # the instance is frozen

        # First what is alike for several fields ...
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"data.{name} is {value!r}; use one of {', '.join(allowed)}")
        for name in ("patch", "resize", "synthetic_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 3 or any(int(n) != n or n < 1 for n in size)):
                raise ValueError(f"data.{name} is {size}; give three whole numbers of voxels D,H,W, each at "
                                 f"least 1")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} is {value}; use {least} or more")

        # ... then one after the other.
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction is {self.val_fraction}; use a share of the files in [0, 1)")
        if not 0 < self.scale <= 1:
            raise ValueError(f"data.scale is {self.scale}; use a factor in (0, 1], such as 0.5")
        self.check_split()
        self.check_labels()
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"data.foreground is {self.foreground}; use a share of the crops in [0, 1], "
                             f"such as 0.5")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"data.jitter is {self.jitter}; use a factor in [0, 1), such as 0.1")
        if len(self.hu_range) != 2 or not -math.inf < self.hu_range[0] < self.hu_range[1] < math.inf:
            raise ValueError(f"data.hu_range is {self.hu_range}; give two HU values, the lower first")
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"data.percentiles is {self.percentiles}; give two numbers from 0 to 100, the "
                             f"lower first")
        if len(self.zoom) != 2 or not 0 < self.zoom[0] <= self.zoom[1] < math.inf:
            raise ValueError(f"data.zoom is {self.zoom}; give two factors above 0, the smaller first")
        if not 0.5 < self.band <= 10 or not 0 <= self.smooth <= 10:
            raise ValueError(f"data.band is {self.band} and data.smooth {self.smooth} voxels; use above 0.5, "
                             f"and from 0, up to 10")
        self.surface_of()
        scales = self.voxel_scale
        if scales is not None and not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"data.voxel_scale is {scales}; give a magnitude above 0 for each channel")
        if not 0 < self.max_gib < math.inf:
            raise ValueError(f"data.max_gib is {self.max_gib}; use a number of GiB above 0")
        if self.flip != "none" and not (self.flip and set(self.flip.upper()) <= set("DHW")):
            raise ValueError(f"data.flip is {self.flip!r}; use none, or letters of DHW")
        self.check_augmentation()
        self.spacing_mm()

    def check_augmentation(self) -> None:
        """Raises ValueError for changes of crops that cannot be meant."""
        if self.turn != "none" and not (len(self.turn) >= 2 and set(self.turn.upper()) <= set("DHW")):
            raise ValueError(f"data.turn is {self.turn!r}; use none, HW for turns in plane, or DHW")
        if len(self.gamma) != 2 or not 0 < self.gamma[0] <= self.gamma[1] < math.inf:
            raise ValueError(f"data.gamma is {self.gamma}; give two exponents above 0, the smaller first, "
                             f"such as 0.7,1.5")
        for name, least in (("bias_field", 0), ("blur", 0), ("low_resolution", 1), ("noise", 0)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ValueError(f"data.{name} is {value}; use a number of {least} (none) or more")
        if not 0 <= self.augment_share <= 1:
            raise ValueError(f"data.augment_share is {self.augment_share}; use a share of the crops in "
                             f"[0, 1], such as 0.3")

    def check_split(self) -> None:
        """Raises ValueError for patients and folds that cannot be meant."""
        if self.patient not in ("auto", "file", "folder"):
            try:
                groups = re.compile(self.patient).groups
            except re.error as error:
                raise ValueError(f"data.patient is {self.patient!r}; use auto, file, folder or a regular "
                                 f"expression ({error})") from None
            if groups != 1:
                raise ValueError(f"data.patient is {self.patient!r}; use auto, file, folder or a regular "
                                 f"expression with one group, such as '(p[0-9]+)', found {groups} groups")
        self.fold_numbers()

    def fold_numbers(self) -> tuple[int | None, int | None]:
        """K and N of `fold`; None where it does not name them."""
        if self.fold is None:
            return None, None
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:/\s*(\d{1,6}))?\s*", self.fold)
        number, count = (None, None) if match is None else match.groups()
        if match is None or count is not None and not (int(count) >= 2 and int(number) < int(count)):
            raise ValueError(f"data.fold is {self.fold!r}; use K/N with K from 0 to N - 1, such as 0/5, or "
                             f"the number of a datalist's fold")
        return int(number), None if count is None else int(count)

    def check_labels(self) -> None:
        """Raises ValueError for numbers of classes that cannot be meant."""
        if self.classes is not None and self.classes > MAX_CLASSES:
            raise ValueError(f"data.classes is {self.classes}; use {MAX_CLASSES} at most")
        if self.ignore_label is not None and not -2**15 <= self.ignore_label < 2**15:
            raise ValueError(f"data.ignore_label is {self.ignore_label}; use a number that fits in 16 bits, "
                             f"such as 255 or -1")
        values = self.label_values
        if values is None:
            return
        is_unique = len(set(values)) == len(values)
        if not is_unique or not 2 <= len(values) <= MAX_CLASSES or not all(0 <= v < 2**15 for v in values):
            raise ValueError(f"data.label_values is {values}; give the stored value of each class once, "
                             f"background first, such as 0,255")
        if self.classes not in (None, len(values)):
            raise ValueError(f"data.label_values is {values}, {len(values)} classes, but data.classes is "
                             f"{self.classes}; leave one out")

    def spacing_mm(self) -> tuple[float, ...] | None:
        """The fixed spacing in mm (D, H, W), or None for `original` and `random`."""
        if self.spacing in ("original", "random"):
            return None
        try:
            mm = tuple(float(value) for value in self.spacing.strip("[]() ").split(","))
        except ValueError:
            mm = ()
        if len(mm) == 1:  # one number for a cube
            mm = mm * 3
        if len(mm) != 3 or not all(0 < value < math.inf for value in mm):
            raise ValueError(f"data.spacing is {self.spacing!r}; use original, random, or three sizes in mm "
                             f"D,H,W such as 3,1,1")
        return mm

    def hu_limits(self) -> tuple[float, float]:
        """HU that are mapped to -1 and 1."""
        if self.window == "none":
            return self.hu_range
        return WINDOWS[self.window]

    def surface_of(self) -> Surface | None:
        """What `surface`, `band` and `smooth` say."""
        if self.surface == "none":
            return None
        high, more = math.inf, []
        if self.surface == "auto":
            low = LEVELS[self.window]
        elif self.surface == "window":
            low, high = self.hu_limits()
        else:
            try:
                low, *more = (float(level) for level in self.surface.split(","))
            except ValueError:
                raise ValueError(f"data.surface is {self.surface!r}; use none, auto, window or a level in HU "
                                 f"such as -500, or several such as -500,300") from None
        return Surface(low, high, self.band, self.smooth, self.metric, tuple(more))

    def voxel_settings(self, kind: str | None = None) -> "VoxelSettings":
        """What the voxels of one file depend on. kind: its `class` in a datalist."""
        return VoxelSettings(self.modality, kind, self.hu_limits(), self.voxel_scale, self.spacing_mm(),
                             self.resize, self.four_d, self.nan, self.channel_axis, self.select_channel,
                             self.scale, (self.percentiles, self.percentiles_of), self.surface_of())


@dataclass(frozen=True)
class VoxelSettings:
    """All that turns a file into the voxels that are cached.

    Reading, normalising and resampling are given this and no DataConfig, and the cache's key is made of all
    its fields: what changes voxels must stand here to have an effect, so it cannot be missing in the key.

    A new field has a default, which leaves voxels as they were: then caches from before it came in still
    serve (see cache.key_of). Raise cache.CACHE_VERSION when the same settings give other voxels.
    """
    modality: str                             # auto, or a name of MODALITIES
    kind: str | None                          # a datalist's `class`, which goes before `modality`
    hu_limits: tuple[float, float]            # ct: HU that are mapped to -1 and 1
    voxel_scale: tuple[float, ...] | None     # voxel: magnitude mapped to 1, one per channel
    spacing_mm: tuple[float, ...] | None      # D H W; None: as stored
    resize: tuple[int, int, int] | None       # voxels
    four_d: str                               # volumes | channels
    nan: str                                  # error | zero
    channel_axis: int | None
    select_channel: int | None
    scale: float = 1.0                        # of H and W
    # mr: the two that are mapped to -1 and 1, and of which voxels they are
    percentiles: tuple[tuple[float, float], str] = (DataConfig.percentiles, DataConfig.percentiles_of)
    surface: Surface | None = None            # ct: distances from it instead of intensities


# Fields of DataConfig that leave the cached voxels as they are: which files, which crops, how fast, and
# what a stored label means. (With `labels` a record has the label's voxels beside the image's, and its key
# both files.)
NOT_OF_VOXELS = ("path", "synthetic", "synthetic_count", "synthetic_size", "patch", "val_fraction",
                 "patient", "split_seed", "fold",
                 "crops_per_volume", "zoom", "labels", "classes", "ignore_label", "label_values", "flip",
                 "foreground", "jitter", "turn", "gamma", "bias_field", "blur", "low_resolution", "noise",
                 "augment_share", "strict", "cache_dir", "max_gib", "workers", "pin_memory", "points",
                 "min_points", "max_points")
