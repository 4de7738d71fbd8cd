"""Section `data` of the config, and those of its fields that the voxels in the cache depend on.

Sizes and spacing (mm) are D,H,W. Version 1.0.
"""
import dataclasses
import math
from dataclasses import dataclass

WINDOWS = {name: (level - width / 2, level + width / 2) for name, width, level in
           (("lung", 1500, -600), ("bone", 1500, 300), ("soft_tissue", 400, 50), ("brain", 80, 35))}  # HU, low and high
MODALITIES = {"ct": "ct", "mr": "mr", "mri": "mr", "voxel": "voxel", "radar": "voxel", "lidar": "voxel",
              "picture": "picture"}  # name -> rule
MAX_CLASSES = 1024   # of a label map: class ids lie below


@dataclass(frozen=True)
class DataConfig:
    """Section `data` of the config. Sizes and spacing are D,H,W. Raises ValueError for values that cannot be meant."""
    path: str | None = None                  # folder (searched recursively), file or JSON datalist; None: synthetic volumes
    synthetic: str = "ct"                    # ct (phantoms with organs, bones, vessels, airways) | radar (sparse, 4 channels)
    synthetic_count: int = 12                # volumes; 12 of 48,96,96 take 3 s on a slow core
    synthetic_size: tuple[int, int, int] = (48, 96, 96)  # voxels
    patch: tuple[int, int, int] | None = None  # crop, voxels; None: 32,64,64 (synthetic 16,48,48), less where the middle volume is smaller
    val_fraction: float = 0.2                # of the files, at least one; a datalist's `validation` list wins
    crops_per_volume: int = 4                # an epoch is this many crops of every training volume
    modality: str = "auto"                   # auto (by the values) | ct | mr | voxel (or radar) | picture; a datalist's `class` wins
    window: str = "none"                     # CT: none (hu_range) | lung | bone | soft_tissue | brain
    hu_range: tuple[float, float] = (-1000.0, 1000.0)  # CT without window: HU mapped to -1 and 1; air to dense bone
    percentiles: tuple[float, float] = (0.5, 99.5)  # MR: mapped to -1 and 1; MAISI: 0,99.5 of all
    percentiles_of: str = "foreground"       # MR: foreground (voxels above 0) | all (MAISI)
    voxel_scale: tuple[float, ...] | None = None  # voxel: magnitude mapped to 1, one per channel; None: each volume's largest
    spacing: str = "original"                # original | random (zoom of every crop) | mm as D,H,W such as 3,1,1
    zoom: tuple[float, float] = (0.8, 1.25)  # spacing random: smallest and largest magnification, drawn log-uniformly
    resize: tuple[int, int, int] | None = None  # voxels; whole volumes are resampled to this grid; wins over a spacing in mm
    scale: float = 1.0                       # shrinks H and W by this factor, after a spacing in mm; resize wins
    four_d: str = "volumes"                  # 4th axis of an image: volumes (separate; split by file all the same) | channels
    nan: str = "error"                       # NaN and infinite voxels: error (the file is refused) | zero
    channel_axis: int | None = None          # of 4-D .npy and .npz; None: the shorter of the last and the first axis, up to 8
    select_channel: int | None = None        # use this channel alone, from 0
    labels: bool = False                     # image/label pairs, for segmentation; train.py sets it for its task
    classes: int | None = None               # labels lie below; None: the training set's largest + 1, at least 2
    ignore_label: int | None = None          # a label that may lie beyond the classes: voxels that the loss leaves out
    label_values: tuple[int, ...] | None = None  # stored values of class 0, 1, ..., all others are 0; None: as stored (pictures: in order)
    flip: str = "none"                       # none, or axes flipped at random, such as W or DHW
    foreground: float = 0.0                  # share of crops that are placed to hold a voxel that is not background (with labels: of a
                                             # class drawn evenly among the volume's); above 0 every validation crop holds one
    jitter: float = 0.0                      # contrast times a factor in [1 - jitter, 1 + jitter]; the background stays where it is
    strict: bool = False                     # a refused file is an error instead of a line
    cache_dir: str | None = None             # None: $XDG_CACHE_HOME/vae3d, else ~/.cache/vae3d; may be deleted when nothing trains
    max_gib: float = 8.0                     # GiB as float32 that one file may declare; checked before memory is taken
    workers: int = 0                         # DataLoader processes; 0 is enough where a step takes longer than its crops (~1 ms each)
    pin_memory: bool = True                  # page-locked batches for faster copies; of use with CUDA only

    def __post_init__(self):
        if not isinstance(self.spacing, str):  # a YAML list or a tuple
            object.__setattr__(self, "spacing", ",".join(f"{value:g}" for value in self.spacing))
        for name, allowed in (("synthetic", ("ct", "radar")), ("modality", ("auto", *MODALITIES)), ("window", ("none", *WINDOWS)),
                              ("four_d", ("volumes", "channels")), ("nan", ("error", "zero")),
                              ("percentiles_of", ("foreground", "all"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        for name in ("patch", "resize", "synthetic_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 3 or any(int(n) != n or n < 1 for n in size)):
                raise ValueError(f"data.{name} is {size}; give three whole numbers of voxels D,H,W, each at least 1")
        for name, least in (("synthetic_count", 1), ("crops_per_volume", 1), ("workers", 0), ("select_channel", 0),
                            ("classes", 2)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; use {least} or more")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction is {self.val_fraction}; use a share of the files in [0, 1)")
        if not 0 < self.scale <= 1:
            raise ValueError(f"data.scale is {self.scale}; use a factor in (0, 1], such as 0.5")
        if self.classes is not None and self.classes > MAX_CLASSES:
            raise ValueError(f"data.classes is {self.classes}; use {MAX_CLASSES} at most")
        if self.ignore_label is not None and not -2**15 <= self.ignore_label < 2**15:
            raise ValueError(f"data.ignore_label is {self.ignore_label}; use a number that fits in 16 bits, such as 255 or -1")
        if (values := self.label_values) is not None and (
                len(set(values)) != len(values) or not 2 <= len(values) <= MAX_CLASSES or not all(0 <= value < 2**15 for value in values)):
            raise ValueError(f"data.label_values is {values}; give the stored value of each class once, background first, such as 0,255")
        if values is not None and self.classes not in (None, len(values)):
            raise ValueError(f"data.label_values is {values}, {len(values)} classes, but data.classes is {self.classes}; leave one out")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"data.foreground is {self.foreground}; use a share of the crops in [0, 1], such as 0.5")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"data.jitter is {self.jitter}; use a factor in [0, 1), such as 0.1")
        if len(self.hu_range) != 2 or not -math.inf < self.hu_range[0] < self.hu_range[1] < math.inf:
            raise ValueError(f"data.hu_range is {self.hu_range}; give two HU values, the lower first")
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"data.percentiles is {self.percentiles}; give two numbers from 0 to 100, the lower first")
        if len(self.zoom) != 2 or not 0 < self.zoom[0] <= self.zoom[1] < math.inf:
            raise ValueError(f"data.zoom is {self.zoom}; give two factors above 0, the smaller first")
        if self.voxel_scale is not None and not all(0 < scale < math.inf for scale in self.voxel_scale):
            raise ValueError(f"data.voxel_scale is {self.voxel_scale}; give a magnitude above 0 for each channel")
        if not 0 < self.max_gib < math.inf:
            raise ValueError(f"data.max_gib is {self.max_gib}; use a number of GiB above 0")
        if self.flip != "none" and not (self.flip and set(self.flip.upper()) <= set("DHW")):
            raise ValueError(f"data.flip is {self.flip!r}; use none, or letters of DHW")
        self.spacing_mm()

    def spacing_mm(self) -> tuple[float, ...] | None:
        """The fixed spacing in mm (D, H, W), or None for `original` and `random`."""
        if self.spacing in ("original", "random"):
            return None
        try:
            mm = tuple(float(value) for value in self.spacing.strip("[]() ").split(","))
        except ValueError:
            mm = ()
        if len(mm) != 3 or not all(0 < value < math.inf for value in mm):
            raise ValueError(f"data.spacing is {self.spacing!r}; use original, random, or three sizes in mm D,H,W such as 3,1,1")
        return mm

    def hu_limits(self) -> tuple[float, float]:
        return self.hu_range if self.window == "none" else WINDOWS[self.window]


@dataclass(frozen=True)
class VoxelSettings:
    """All that changes the voxels in the cache, beside the file itself: the cache's key is its hash."""
    kind: str | None                         # the datalist's class of the file
    modality: str
    window: str
    hu_range: tuple[float, float]
    percentiles: tuple[float, float]
    percentiles_of: str
    voxel_scale: tuple[float, ...] | None
    spacing: str
    resize: tuple[int, int, int] | None
    scale: float
    four_d: str
    nan: str
    channel_axis: int | None
    select_channel: int | None
    labels: bool

    @classmethod
    def of(cls, cfg: DataConfig, kind: str | None) -> "VoxelSettings":
        """Of a file of this class. Random zooms are applied to crops: the voxels are the original ones."""
        named = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cls) if field.name != "kind"}
        if named["spacing"] == "random":
            named["spacing"] = "original"
        return cls(kind, **named)


# Fields of DataConfig that no voxel in the cache depends on.
NOT_IN_THE_CACHE = {
    "path", "synthetic", "synthetic_count", "synthetic_size", "patch", "val_fraction", "crops_per_volume", "zoom",
    "classes", "ignore_label", "label_values", "flip", "foreground", "jitter", "strict", "cache_dir", "max_gib",
    "workers", "pin_memory",
}
