"""Score TS-SAM, or any method's saved maps: the data sets, the metrics, and the script.

    python evaluate.py --ckpt runs/sod-vit_h/best.pt                             on what it was validated on in training
    python evaluate.py --ckpt runs/sod-vit_h/best.pt --data DUTS ECSSD --save masks --csv table.csv
    python evaluate.py --ckpt theirs.pth --data COD/TestDataset --protocol original       the authors' checkpoint
    python evaluate.py --maps maps --data COD/TestDataset                        saved maps, no checkpoint

A number belongs to one of two protocols, and `py_sod_metrics` computes both:

    paper     as the paper's released code has it: prediction and mask are compared at the model's S x S, the mask
              binarised at > 0 before its nearest resize, the prediction in floating point. BER: mean over images.
    original  the field's habit: logits upsampled to the mask's own size, sigmoid, rounded to 8 bits, mask > 128.
              Adds the maximal and the adaptive F-measure, and for shadows BER over the pooled pixels of the set.

`train.py` validates with the same functions, under the paper's protocol.
"""

import argparse
import csv
import multiprocessing.forkserver
import os
import re
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
import py_sod_metrics
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tssam import ATTENTIONS, TSSAM, InputError, Parser, load_checkpoint, one_line, write

# ---------------------------------------------------------------------------------------------------------------------
# Finding data sets

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# Folder names of the data sets as people download them, letter case ignored; * is anything, [-_] one of the two.
# train_a and train_b are ISTD's; its train_c is the shadow-free image, not a mask.
SPLIT_FOLDERS = {
    "train": ("train", "training", "traindataset", "trainingdataset", "*[-_]tr", "*[-_]train"),
    "test": ("test", "testing", "testdataset", "testingdataset", "*[-_]te", "*[-_]test"),
}
IMAGE_FOLDERS = (
    *("im", "img", "imgs", "image", "images", "*[-_]img", "*[-_]imgs", "*[-_]image", "*[-_]images", "shadowimages"),
    *("train_a", "test_a"),
)
MASK_FOLDERS = (
    *("gt", "gts", "mask", "masks", "*[-_]gt", "*[-_]gts", "*[-_]mask", "*[-_]masks", "gt_object", "shadowmasks"),
    *("groundtruth", "ground[-_]truth", "pixelwisegt*", "label", "labels", "annotation", "annotations"),
    *("train_b", "test_b"),
)


@dataclass(frozen=True)
class ImageSet:
    """A data set's images and masks: its name in tables, where it was found, "train", "test" or None where it has no
    splits, and its (image, mask) files, sorted; a mask is None where the set has none."""

    name: str
    folder: Path
    split: str | None
    pairs: list[tuple[Path, Path | None]]

    def __str__(self) -> str:
        image, mask = self.pairs[0]
        split = f"{self.split} split" if self.split else "no splits"
        if mask is None:
            return f"{self.name}: {image.parent}, {split}, {len(self.pairs)} images without masks"
        return f"{self.name}: {image.parent} and {mask.parent.name}, {split}, {len(self.pairs)} pairs"


def named(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns` (lower case) fits a folder's name."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def find_sets(roots: Iterable[Path], split: str) -> list[ImageSet]:
    """The data sets in `roots`.

    Args:
        roots: each a data set's root (its `split` is taken where it has splits), a folder of its images beside one of
            its masks, or for "test" also a folder above several data sets, a folder of images alone, or an image file.
        split: "train" (every set has masks) or "test".

    Raises:
        InputError: a root without a data set, the same set twice, and the errors of `pair_files`.
    """
    sets: list[ImageSet] = []
    for root in roots:
        found = search(root, split)
        if not found and split == "test":
            if os.path.isdir(root) and os.access(root, os.R_OK):
                name, files = own_name(root), list(image_files(root).values())
            else:
                name, files = root.stem, [root] if os.path.isfile(root) and root.suffix.lower() in IMAGE_ENDINGS else []
            found = [ImageSet(name, root, None, [(file, None) for file in files])] if files else []
        if not found:
            raise InputError(not_found(root, split))
        if split == "train":
            if len(found) > 1 and any(s.split is None for s in found):
                names = ", ".join(str(s.folder) for s in found)
                raise InputError(f"{root}: holds several data sets ({names}); name those to train on")
            for s in found:
                if s.pairs[0][1] is None:
                    raise InputError(f"{s.folder}: no folder of masks; looked for {', '.join(MASK_FOLDERS)}")
        sets += found
    folders = [s.folder.resolve() for s in sets]
    for s, folder in zip(sets, folders, strict=True):
        if folders.count(folder) > 1:
            raise InputError(f"{s.folder}: named twice; once is enough")
    return sets


def subfolders_of(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and macOS's __MACOSX; none where it cannot be read."""
    try:
        return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))
    except OSError:
        return []


def search(folder: Path, split: str, inside: str | None = None, depth: int = 4) -> list[ImageSet]:
    """The data sets in a folder, down to `depth` levels below it; `inside` is the split it lies in, if any."""
    subfolders = subfolders_of(folder)
    inside = next((s for s, patterns in SPLIT_FOLDERS.items() if named(own_name(folder), patterns)), inside)
    splits = [f for f in subfolders if named(f.name, SPLIT_FOLDERS[split])]
    if not splits and any(named(f.name, IMAGE_FOLDERS) for f in subfolders):
        return [ImageSet(set_name(folder), folder, inside, pair_files(folder, subfolders))]
    if splits and split == "train":
        subfolders = splits
    others = [p for s, patterns in SPLIT_FOLDERS.items() if s != split for p in patterns]
    below = [f for f in subfolders if depth > 0 and not named(f.name, others)]
    return [s for f in below for s in search(f, split, inside, depth - 1)]


def own_name(folder: Path) -> str:
    """A folder's name, of a linked one the link's, also of one that was given as `.`"""
    return os.path.basename(os.path.abspath(folder))


def set_name(folder: Path) -> str:
    """A data set's name: its folder's, or where that only says the split (ISTD/test) that of the folder above."""
    bare = [p for patterns in SPLIT_FOLDERS.values() for p in patterns if "*" not in p]
    name = own_name(folder)
    return own_name(Path(os.path.abspath(folder)).parent) if named(name, bare) else name


def not_found(root: Path, split: str) -> str:
    """The message of a root without a data set: what was looked for, and what is there."""
    if not os.path.exists(root):
        return f"{root}: no such folder"
    if not os.access(root, os.R_OK):
        return f"{root}: cannot be read"
    if root.is_file():
        return f"{root}: a file, not a folder" + (
            f" or an image ({', '.join(IMAGE_ENDINGS)})" if split == "test" else ""
        )
    there = [f.name for f in subfolders_of(root)]
    return (
        f"{root}: no data set for the {split} split; name the folder above images and masks (the folders there:"
        f" {', '.join(there[:10]) or 'none'}); looked, letter case ignored, there and below for a folder of images"
        f" ({', '.join(IMAGE_FOLDERS)}) beside one of masks ({', '.join(MASK_FOLDERS)}),"
        f" in a folder of the split ({', '.join(SPLIT_FOLDERS[split])}) where there is one"
    )


def image_files(folder: Path) -> dict[str, Path]:
    """The image files in a folder by their stems, sorted; hidden files are left out. Where there are none but a single
    folder, as archives unpack (images/images/*.jpg), those in that one."""
    files: dict[str, Path] = {}
    try:
        listed = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    for file in listed:
        if file.suffix.lower() in IMAGE_ENDINGS and not file.name.startswith(".") and not file.is_dir():
            if file.stem in files:
                raise InputError(
                    f"{file}: {files[file.stem].name} beside it has the same stem; a folder holds one file of a stem,"
                    " and images and masks lie in two folders"
                )
            files[file.stem] = file
    inner = subfolders_of(folder)
    return image_files(inner[0]) if not files and len(inner) == 1 else files


def pair_files(folder: Path, subfolders: list[Path]) -> list[tuple[Path, Path | None]]:
    """The (image, mask) files of a folder with a subfolder of images and one of masks, paired by stem.

    Raises:
        InputError: several such subfolders, no files in them, or an image or mask that stands alone.
    """
    files = []
    for kind, patterns in (("image", IMAGE_FOLDERS), ("mask", MASK_FOLDERS)):
        found = [f for f in subfolders if named(f.name, patterns)]
        if len(found) > 1:
            names = ", ".join(f.name for f in found)
            raise InputError(f"{folder}: several folders of {kind}s ({names}); leave one of them there")
        files.append(image_files(found[0]) if found else {})
        if found and not files[-1]:
            raise InputError(f"{found[0]}: no image files in it ({', '.join(IMAGE_ENDINGS)})")
    images, masks = files
    if not masks:
        return [(file, None) for file in images.values()]
    alone = [
        f"{len(stems)} {kind}s (such as {', '.join(sorted(stems)[:3])})"
        for kind, stems in (("image", images.keys() - masks.keys()), ("mask", masks.keys() - images.keys()))
        if stems
    ]
    if alone:
        raise InputError(f"{folder}: {' and '.join(alone)} stand alone; an image and its mask have the same stem")
    return [(file, masks[stem]) for stem, file in images.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Reading images and masks

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def open_image(path: Path, decode: bool = True) -> Image.Image:
    """An image file, with its pixels or (much faster) its header alone.

    Raises:
        InputError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image
    except Exception as error:  # what a broken file raises is anyone's guess
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from error


TURNS = {  # by EXIF's orientation; Pillow's exif_transpose also rewrites the EXIF block, and fails where that is odd
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_orientation(image: Image.Image) -> int:
    """What EXIF says of how an image's pixels lie: 1, as the picture does, to 8; from 5 on, on their side."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif"))
    except Exception:  # broken EXIF in an otherwise good file
        return 1
    value = exif.get(0x0112)
    return value if value in TURNS else 1


def orientation(image: Image.Image, mask_size: tuple[int, int] | None) -> int:
    """The EXIF orientation in which an image is to be read.

    With a mask of `mask_size` (width, height) it is 1, as the pixels lie, unless EXIF turns the image by a quarter and
    the mask is upright where the pixels lie across, or the other way round: then it was drawn on the turned picture.
    Without a mask it is EXIF's, as in any viewer.
    """
    value = exif_orientation(image)
    if mask_size is None:
        return value
    (width, height), (mask_width, mask_height) = image.size, mask_size
    return value if value >= 5 and (width - height) * (mask_width - mask_height) < 0 else 1


def sizes_of(image_file: Path, mask_file: Path | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of an image as `read_image` gives it, and of its mask (without one, the image's again)."""
    mask_size = open_image(mask_file, decode=False).size if mask_file is not None else None
    image = open_image(image_file, decode=False)
    size = image.size[::-1] if orientation(image, mask_size) >= 5 else image.size
    return size, mask_size or size


def read_image(path: Path, mask_size: tuple[int, int] | None = None) -> Image.Image:
    """An image file of any mode as RGB, turned as `orientation` says; alpha is dropped (source: release)."""
    turn = TURNS.get(orientation(open_image(path, decode=False), mask_size))
    image = to_rgb(eight_bit(open_image(path)))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, alpha dropped; a palette's by way of RGBA, without which PIL warns of its transparency."""
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def eight_bit(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey levels as 8-bit ones (as they are where none is above 255), any other as it is."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 65535)
    return Image.fromarray((values / (257 if values.max() > 255 else 1)).round().astype(np.uint8))


def read_mask(path: Path) -> Image.Image:
    """A mask file of any mode as 8-bit grey, 0 only where the file is black.

    Colours count by their strongest channel. Masks of 0 and 1, and coloured ones that are nowhere above 128 (dark
    palettes), are read as 0 and 255, so that the original protocol's threshold sees them too.
    """
    image = open_image(path)
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535).astype(np.int64)
        if values.max() > 255:  # else 8-bit levels in a 16-bit file
            values = (values + 256) // 257  # 65535 -> 255, and nothing but 0 -> 0
    elif image.mode in ("1", "L", "LA"):
        values = np.asarray(image.convert("L"))
    else:
        values = np.asarray(to_rgb(image)).max(axis=-1)
    dark = 128 if image.mode not in ("L", "LA") and not image.mode.startswith("I") else 1
    if values.max() <= dark:
        values = (values > 0) * 255
    return Image.fromarray(values.astype(np.uint8))


def foreground(mask: Image.Image, size: int) -> np.ndarray:
    """A mask at S x S, nearest: (S, S) bool, true where its grey is above 0 (source: release)."""
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 0


def to_input(image: Image.Image, size: int) -> Tensor:
    """An RGB image as the network takes it: (3, S, S) float32, resized bilinearly, /255, ImageNet's mean and std."""
    pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    return (torch.from_numpy(pixels).movedim(-1, 0).float() / 255 - IMAGENET_MEAN) / IMAGENET_STD


class Pairs(Dataset):
    """Images and masks at the model's size, without augmentation (source: paper; resizing as in the release).

    Args:
        pairs: (image, mask) files.
        size: S.

    An item is (image, mask): (3, S, S) float32 as in `to_input`, and (1, S, S) float32 of 0 and 1; its key is a pair's
    index, or (index, whether to mirror it left to right).
    """

    def __init__(self, pairs: list[tuple[Path, Path]], size: int) -> None:
        self.pairs, self.size = pairs, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, mirror = key if isinstance(key, tuple) else (key, False)
        image_file, mask_file = self.pairs[index]
        mask = read_mask(mask_file)
        item = (
            to_input(read_image(image_file, mask.size), self.size),
            torch.from_numpy(foreground(mask, self.size)[None]).float(),
        )
        return tuple(t.flip(-1) for t in item) if mirror else item


class Pictures(Pairs):
    """The images alone, to predict from. An item is (image, index, [[height, width] of the image, of its mask])."""

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        image_file, mask_file = self.pairs[index]
        image_size, mask_size = sizes_of(image_file, mask_file)
        image = read_image(image_file, mask_size if mask_file is not None else None)
        return to_input(image, self.size), index, torch.tensor([image_size[::-1], mask_size[::-1]])


def check_sizes(pairs: list[tuple[Path, Path | None]], kind: str = "image") -> None:
    """Open the header of every file; warn, once, of the images (or maps) that are not of their mask's size, and of
    those that EXIF turns upside down or mirrors, or turns though they are square, of which a mask's size says nothing.

    Raises:
        InputError: a file is no image.
    """
    unequal, unsure = [], []
    for file, mask_file in tqdm(pairs, "headers", unit="img", leave=False, disable=None):
        (width, height), mask_size = sizes_of(file, mask_file)
        if (width, height) != mask_size:
            unequal.append(f"{file.stem} ({width} x {height}, mask {mask_size[0]} x {mask_size[1]})")
        value = exif_orientation(open_image(file, decode=False))
        if mask_file is not None and (1 < value < 5 or value > 4 and width == height):
            unsure.append(file.stem)
    for names, problem in (
        (unequal, "not of their mask's size, {}; each is resized by itself"),
        (
            unsure,
            "turned or mirrored by EXIF, {}, in a way no mask's size can confirm; they are read as the pixels lie",
        ),
    ):
        if names:
            text = problem.format(f"such as {', '.join(names[:3])}")
            print(f"warning: {len(names)} of {len(pairs)} {kind}s are {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

PROTOCOLS = {
    "paper": "compared at the model's size, mask > 0, prediction in floating point",
    "original": "compared at each mask's own size, mask > 128, prediction in 8 bits",
}


def score(prediction: np.ndarray, mask: np.ndarray, task: str, protocol: str) -> dict[str, float | np.ndarray]:
    """One image's metrics, by `py_sod_metrics`.

    All but BER see the prediction stretched to [0, 1] first, as the field's toolboxes do: a map's offset and contrast
    do not count, and MAE is no plain mean of |prediction - mask|. For BER it is cut at 125/255 as it is (source:
    release); an image without shadow, or with nothing else, counts 50 at least.

    Args:
        prediction: (H, W), floats in [0, 1] (paper) or uint8 (original).
        mask: (H, W) bool.

    Returns:
        "S"; for the task "shadow" also "BER" in percent and "counts", the true and false positive, true and false
        negative pixels; else "E" (at 256 thresholds), "wF", "MAE", and original: "F" (at 256 thresholds), "adpF".
    """
    grey = prediction if prediction.dtype == np.uint8 else prediction.astype(np.float64) * 255  # the range step takes

    def result_of(metric) -> dict:
        metric.step(grey, mask.astype(np.uint8) * 255)
        return metric.get_results()

    result = {"S": result_of(py_sod_metrics.Smeasure())["sm"]}
    if task == "shadow":
        positive = np.count_nonzero(mask)
        counts = py_sod_metrics.FmeasureV2.get_statistics(grey > 125, mask, positive, mask.size - positive)
        return result | {"BER": ber(counts.values()), "counts": np.array(list(counts.values()))}
    result["E"] = result_of(py_sod_metrics.Emeasure())["em"]["curve"]
    result["wF"] = result_of(py_sod_metrics.WeightedFmeasure())["wfm"]
    result["MAE"] = result_of(py_sod_metrics.MAE())["mae"]
    if protocol == "original":
        handler = py_sod_metrics.FmeasureHandler(with_dynamic=True, with_adaptive=True, beta=0.3)
        f = result_of(py_sod_metrics.FmeasureV2({"F": handler}))["F"]
        result |= {"F": f["dynamic"], "adpF": f["adaptive"]}
    return result


def ber(counts: Iterable[int]) -> float:
    """Balanced error rate in percent from the numbers of true and false positives, true and false negatives."""
    tp, fp, tn, fn = counts
    return 100 * float(py_sod_metrics.BERHandler(with_dynamic=False, with_adaptive=False)(tp=tp, fp=fp, tn=tn, fn=fn))


class Scores:
    """The metrics over a data set: the sums of what `score` gave, and each image's S-measure in the order added."""

    def __init__(self, task: str, protocol: str) -> None:
        self.task, self.protocol = task, protocol
        self.sums: dict[str, float | np.ndarray] = {}
        self.s: list[float] = []

    def add(self, result: dict[str, float | np.ndarray]) -> None:
        self.sums = {name: self.sums.get(name, 0) + value for name, value in result.items()}
        self.s.append(float(result["S"]))

    def join(self, other: "Scores") -> None:
        """Add the images of another part of the data set."""
        self.sums = {n: self.sums.get(n, 0) + other.sums.get(n, 0) for n in self.sums.keys() | other.sums.keys()}
        self.s += other.s

    def results(self) -> dict[str, float]:
        """Shadows: BER in percent, the mean over images; original protocol: also BER_pooled, over all their pixels.
        Others: S-measure, mean E-measure, weighted F-measure and MAE; original: also the maximum of the mean F-measure
        over thresholds, and the adaptive one, with beta^2 = 0.3."""
        mean = {name: total / len(self.s) for name, total in self.sums.items()}
        original = self.protocol == "original"
        if self.task == "shadow":
            results = {"BER": mean["BER"]} | ({"BER_pooled": ber(self.sums["counts"])} if original else {})
        else:
            results = {"S": mean["S"], "E": mean["E"].mean(), "wF": mean["wF"], "MAE": mean["MAE"]}
            results |= {"maxF": mean["F"].max(), "adpF": mean["adpF"]} if original else {}
        return {name: float(value) for name, value in results.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tables

CSV_COLUMNS = ("dataset", "images", "protocol", "S", "E", "wF", "MAE", "maxF", "adpF", "BER", "BER_pooled")

# Tables I and II of the paper, for TS-SAM_B and TS-SAM_H: S, E, wF, MAE, or BER. Table III's numbers are not at hand.
PUBLISHED = {
    "CHAMELEON": ((0.912, 0.947, 0.849, 0.023), (0.942, 0.966, 0.900, 0.017)),
    "CAMO": ((0.826, 0.862, 0.753, 0.073), (0.887, 0.925, 0.830, 0.047)),
    "COD10K": ((0.863, 0.909, 0.771, 0.029), (0.914, 0.950, 0.856, 0.017)),
    "NC4K": ((0.866, 0.900, 0.799, 0.045), (0.905, 0.933, 0.860, 0.032)),
    "ISTD": ((1.11,), (1.04,)),
}


def digits(name: str, value: float, number: int = 4) -> str:
    """A metric as tables print it: BER with two decimals, the others with `number`."""
    return f"{value:.{2 if name.startswith('BER') else number}f}"


def show(metrics: dict[str, float]) -> str:
    """Metrics on a line: `S 0.9142  E 0.9504  wF 0.8560  MAE 0.0171`, or `BER 1.04`."""
    return "  ".join(f"{name} {digits(name, value)}" for name, value in metrics.items())


def table_row(name: str, images: object, cells: dict[str, str], width: int) -> str:
    """A line of the table; `cells` are its columns' names and what they say here."""
    return f"{name:<{width}}  {images:>6}" + "".join(f"  {cell:>{max(6, len(m))}}" for m, cell in cells.items())


def plain_name(name: str) -> str:
    """A data set's name without what folders add to it: COD10K of COD10K-Test, cod10k_te or COD10K_Dataset."""
    return re.sub(r"[-_](te|test|dataset|v\d)$", "", name, flags=re.IGNORECASE).upper()


def published_rows(name: str, metrics: dict[str, float], width: int) -> list[str]:
    """The paper's rows for a data set that it has (CAMO, camo-test, ...), in the columns of `metrics`."""
    name = plain_name(name)
    columns = ("BER",) if name == "ISTD" else ("S", "E", "wF", "MAE")
    rows = []
    for model, values in zip(("TS-SAM_B", "TS-SAM_H"), PUBLISHED.get(name, ()), strict=False):
        published = dict(zip(columns, values, strict=True))
        if published.keys() <= metrics.keys():
            cells = {m: digits(m, published[m], 3) if m in published else "" for m in metrics}
            rows.append(table_row(f"  {model}, paper", "", cells, width))
    return rows


def write_csv(rows: list[dict], columns: tuple[str, ...], path: Path) -> None:
    """A table of `rows`, numbers in full precision, empty where a row has not all `columns`."""

    def save(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.DictWriter(file, columns, restval="")
            table.writeheader()
            table.writerows(rows)

    write(path, save)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def progress(images: int, what: str) -> tqdm:
    """A bar that counts images, with images/s; only where stderr is a terminal, and gone when it is full. Of torchrun's
    processes the first draws it."""
    disable = None if os.environ.get("RANK", "0") == "0" else True
    return tqdm(total=images, desc=what, unit="img", leave=False, disable=disable)


def leave_signals(*_) -> None:
    """In a worker: Ctrl-C and SIGTERM, which terminals and job schedulers send to all processes, are the script's to
    answer. A worker that one of them killed would be taken for a crash."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def in_order(work: Callable, jobs: Iterable[tuple], workers: int) -> Iterator:
    """work(*job) for each job, in their order, done in `workers` processes beside this one (0: in this one).

    At most two jobs a process are under way: `jobs` is only drawn from as they are done.
    """
    if workers == 0:
        yield from (work(*job) for job in jobs)
        return
    # Forked from a clean server, not from here: a copy of this process would keep old pages of the network's memory.
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else None)
    if os.name == "posix":
        context.set_forkserver_preload(["torch", "segment_anything", "py_sod_metrics", "tqdm"])
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server's imports take seconds
        multiprocessing.forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    with ProcessPoolExecutor(workers, context, leave_signals) as pool:
        under_way = deque()
        for job in jobs:
            under_way.append(pool.submit(work, *job))
            if len(under_way) >= 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def to_map(logit: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logit (1, S, S) as a map of `size` (height, width): bilinear, sigmoid, rounded to 8 bits; (H, W) uint8."""
    full = F.interpolate(logit[None], size, mode="bilinear", align_corners=False)[0, 0]
    return (full.sigmoid() * 255).round().byte().cpu().numpy()


@torch.inference_mode()
def predict(
    model: TSSAM, pairs: list, protocol: str, batch_size: int, workers: int, save: Path | None
) -> Iterator[tuple]:
    """The first three arguments of `finish` for each pair; in `save` it will write <image's stem>.png."""
    device, data = next(model.parameters()).device, Pictures(pairs, model.config["image_size"])
    batches = DataLoader(
        data, batch_size, num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=leave_signals
    )
    for images, indices, sizes in batches:
        logits = model(images.to(device, non_blocking=True)).float()
        for logit, index, (own_size, mask_size) in zip(logits, indices.tolist(), sizes.tolist(), strict=True):
            image_file, mask_file = pairs[index]
            if not logit.isfinite().all():
                raise InputError(f"{image_file}: the model's output is not finite; its weights are broken")
            saved = (to_map(logit, own_size), save / f"{image_file.stem}.png") if save is not None else None
            if mask_file is None:
                prediction = None
            elif protocol == "paper":
                prediction = logit[0].sigmoid().cpu().numpy()
            elif saved is not None and own_size == mask_size:
                prediction = saved[0]
            else:
                prediction = to_map(logit, mask_size)
            yield prediction, mask_file, saved


def finish(
    prediction: np.ndarray | None, mask_file: Path | None, saved: tuple | None, task: str, protocol: str
) -> dict | None:
    """What is left to do for an image after the network: write its map (`saved`: map, file) and `score` it."""
    if saved is not None:
        grey, file = saved
        write(file, lambda temporary: Image.fromarray(grey).save(temporary, "PNG"))
    if mask_file is None:
        return None
    mask = read_mask(mask_file)
    if protocol == "paper":
        return score(prediction, foreground(mask, len(prediction)), task, protocol)
    return score_original(prediction, mask, task)


def score_original(prediction: np.ndarray, mask: Image.Image, task: str) -> dict:
    """`score` under the original protocol; "faint": whether the mask has levels above 0, none above 128."""
    levels = np.asarray(mask)
    return score(prediction, levels > 128, task, "original") | {"faint": 0 < levels.max() <= 128}


def finish_map(map_file: Path, mask_file: Path, task: str) -> dict:
    """`score` a saved map under the original protocol; one of another size than the mask is resized bilinearly."""
    mask, grey = read_mask(mask_file), to_rgb(eight_bit(open_image(map_file))).convert("L")
    if grey.size != mask.size:
        grey = grey.resize(mask.size, Image.Resampling.BILINEAR)
    return score_original(np.asarray(grey), mask, task)


def collect(results: Iterable[dict | None], total: int, task: str, protocol: str) -> Scores:
    """Add up an image's `results` after the other, under a progress bar."""
    scores = Scores(task, protocol)
    with progress(total, "evaluate") as bar:
        for result in results:
            if result is not None:
                scores.add(result)
            bar.update()
    return scores


def evaluate(
    model: TSSAM,
    pairs: list[tuple[Path, Path | None]],
    task: str,
    protocol: str,
    batch_size: int,
    workers: int,
    save: Path | None = None,
) -> Scores:
    """Score a model (on its own device) and leave it in the mode it was in. No image is kept after its turn.

    Args:
        pairs: (image, mask) files; images without a mask are only predicted.
        workers: processes that read images, and as many that score them; 0: neither.
        save: existing folder for the maps: <image's stem>.png, 8-bit grey, at the image's own size.
    """
    was_training = model.training
    model.eval()
    try:
        jobs = predict(model, pairs, protocol, batch_size, workers, save)
        results = in_order(partial(finish, task=task, protocol=protocol), jobs, workers)
        return collect(results, len(pairs), task, protocol)
    finally:
        model.train(was_training)


def save_overview(rows: list[tuple[str, Path, Path, Path]], path: Path, height: int = 160) -> None:
    """Draw a row `image | ground truth | prediction` for each (title, image, mask, prediction file) into one PNG."""
    panels = []
    for _, image_file, mask_file, prediction_file in rows:
        mask = read_mask(mask_file)
        row = [read_image(image_file, mask.size), mask, open_image(prediction_file)]
        width = min(max(1, round(height * row[0].width / row[0].height)), 3 * height)
        panels.append([panel.convert("RGB").resize((width, height)) for panel in row])
    gap, text = 6, 16
    column = max(row[0].width for row in panels) + gap
    sheet = Image.new("RGB", (3 * column + gap, text + len(rows) * (text + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, name in enumerate(("image", "ground truth", "prediction")):
        draw.text((gap + x * column, 2), name, fill="black")
    for y, ((title, *_), row) in enumerate(zip(rows, panels, strict=True)):
        top = text + y * (text + height + gap)
        draw.text((gap, top + 2), title.encode("ascii", "replace").decode(), fill="black")  # what any font can draw
        for x, panel in enumerate(row):
            sheet.paste(panel, (gap + x * column, top + text))
    write(path, lambda file: sheet.save(file, "PNG"))


def make_folder(path: Path, flag: str) -> None:
    """Make a folder the user named with `flag`, or raise an InputError; also where nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"{flag}: {path}: no folder to write to ({error.strerror}); name another one") from error


# ---------------------------------------------------------------------------------------------------------------------
# The script


def at_least(minimum: int, multiple_of: int = 1) -> Callable[[str], int]:
    """An argument that is a whole number of at least `minimum`, and a multiple of `multiple_of`."""

    def whole_number(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text) or int(text) < minimum or int(text) % multiple_of:
            multiple = f", and a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}{multiple}")
        return int(text)

    return whole_number


def usable_device(text: str) -> torch.device:
    """An argument that names a device this machine has, such as cuda, cuda:1 or cpu. Each process of torchrun has its
    own GPU."""
    if text.startswith("cuda") and "LOCAL_RANK" in os.environ:
        text = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=text).item()
        return torch.device(text)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {one_line(error)}; try cpu") from error


def add_machine_arguments(parser: Parser) -> argparse._ArgumentGroup:
    """The arguments train.py and evaluate.py share; returns their group."""
    default, cores = "cuda" if torch.cuda.is_available() else "cpu", min(8, os.cpu_count() or 1)
    group = parser.add_argument_group("machine; these change no number by more than rounding")
    group.add_argument(
        "--workers",
        type=at_least(0),
        default=cores,
        help=f"processes that read images, and as many that score them; 0: none (here: {cores})",
    )
    group.add_argument(
        "--device", type=usable_device, default=default, help=f"cuda, cuda:1, cpu, ... (here: {default})"
    )
    group.add_argument(
        "--attention",
        choices=tuple(ATTENTIONS),
        default="fused",
        help="sam: the package's own, the same numbers in more memory, to compare with (default fused)",
    )
    return group


def run(main: Callable[[], None]) -> None:
    """Run a script's main: an InputError is one line on stderr and exit code 2, Ctrl-C one line and 130; anything else
    keeps its traceback."""
    sys.stdout.reconfigure(errors="replace")  # names a terminal cannot show
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, also in convolutions
    try:
        try:
            main()
        except torch.OutOfMemoryError as error:
            raise InputError(
                "the GPU has too little memory for this; try --grad-checkpoint, --accumulate 2, --precision bf16 in"
                " training, or a lower --batch-size, --size or --sam"
            ) from error
    except KeyboardInterrupt as stop:
        print(f"{Path(sys.argv[0]).name}: {stop or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    except InputError as error:
        # One raised in a loader's worker arrives with that worker's traceback in front of its own line.
        message = str(error).rsplit("InputError: ", 1)[-1].strip()
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def find_maps(maps: Path, s: ImageSet) -> list[tuple[Path, Path]]:
    """The (map, mask) files of a data set: the maps lie in its folder under `maps` (DUTS-TE, or DUTS; letter case
    ignored), or in `maps` itself where that has no folders."""
    if not maps.is_dir():
        raise InputError(f"--maps: {maps}: no such folder")
    folders = subfolders_of(maps)
    known = [f for f in folders if f.name.lower() == s.name.lower()]
    known = known or [f for f in folders if plain_name(f.name) == plain_name(s.name)] or ([] if folders else [maps])
    if not known:
        there = ", ".join(f.name for f in folders)
        raise InputError(
            f"--maps: {maps} has no folder {s.name}, only {there}; maps are looked for as {s.name}/<image>.png"
        )
    files = image_files(known[0])
    missing = [image.stem for image, _ in s.pairs if image.stem not in files]
    if missing:
        names = ", ".join(f"{stem}.png" for stem in missing[:3])
        endings = ", ".join(IMAGE_ENDINGS)
        raise InputError(
            f"{known[0]}: {len(missing)} of {len(s.pairs)} maps are missing, such as {names} (or {endings})"
        )
    return [(files[image.stem], mask) for image, mask in s.pairs]


def parse_arguments() -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: arguments that do not go together.
    """
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to score")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", metavar="FILE", help="checkpoint of train.py, or of the authors' code")
    what.add_argument("--maps", type=Path, metavar="DIR", help="score saved maps, DIR/<data set>/<stem>.png")
    group.add_argument("--sam-checkpoint", metavar="FILE", help="SAM's weights (default: the file used in training)")
    group.add_argument(
        "--data",
        type=Path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="data sets (their test split, if they have one), folders above several, images without masks, or image"
        " files (default: the data it was validated on in training)",
    )

    group = parser.add_argument_group("how to score it")
    group.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="see above (default paper, as the released code scores; --maps knows the original protocol only)",
    )
    group.add_argument(
        "--task", choices=("sod", "cod", "shadow"), help="what --maps show (default sod): shadows are scored by BER"
    )

    group = parser.add_argument_group("what to write")
    group.add_argument(
        "--csv", type=Path, metavar="FILE", help="the table, in full precision (an older one goes; default none)"
    )
    group.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="DIR/<data set>/<stem>.png, 8-bit maps at each image's own size, and overview.png beside them"
        " (default none)",
    )

    group = add_machine_arguments(parser)
    group.add_argument("--batch-size", type=at_least(1), default=2, help="images at a time (default 2: ours)")
    args = parser.parse_args()
    if args.maps is None:
        if args.task is not None:
            raise InputError("--task: goes with --maps; a checkpoint knows its own")
        args.protocol = args.protocol or "paper"
    else:
        if args.data is None:
            raise InputError("--data: name the data sets the maps belong to")
        if args.save is not None or args.sam_checkpoint is not None:
            raise InputError("--maps: nothing is predicted; leave out --save and --sam-checkpoint")
        if args.protocol == "paper":
            raise InputError("--protocol: saved maps can be scored under the original protocol only")
        args.protocol, args.task = "original", args.task or "sod"
    return args


def main() -> None:
    args = parse_arguments()
    if args.csv is not None:
        make_folder(args.csv.parent, "--csv")
        if args.csv.exists() and (args.csv.is_dir() or not args.csv.read_bytes().startswith(b"dataset,images,")):
            raise InputError(f"--csv: {args.csv} exists and is no table of evaluate.py; name another file")
    if args.ckpt is not None:
        model, info = load_checkpoint(args.ckpt, args.sam_checkpoint)
        model.use_attention(args.attention)
        model.to(args.device)
        args.task = info["task"]
        if args.data is None and not info.get("val"):
            raise InputError(f"{args.ckpt}: trained without a validation set; name the data: --data")
        if args.data is None:
            args.data = [Path(folder) for folder in info["val"]]
            if not all(folder.is_dir() for folder in args.data):
                raise InputError(f"{args.ckpt}: validated on {args.data[0]}, which has gone; name the data: --data")
        print(f"{args.ckpt}: {args.task}, {model.config['sam']}, epoch {info.get('epoch', 'unknown')}")

    sets = find_sets(args.data, "test")
    names = [s.name for s in sets]
    folders = {s.name: args.save if s.folder.is_file() else args.save / s.name for s in sets} if args.save else {}
    data_folders = {f.resolve() for s in sets for f in (s.folder, *(f.parent for f in s.pairs[0] if f))}
    if args.save is None and not any(s.pairs[0][1] for s in sets):
        instead = "; --save DIR writes predictions" if args.maps is None else ""
        looked = ", ".join(MASK_FOLDERS)
        raise InputError(f"{sets[0].folder}: no masks to score by (looked for {looked}){instead}")
    for s in sets:
        if names.count(s.name) > 1:
            raise InputError(f"--data: {s.folder}: another data set is called {s.name} too; evaluate them one by one")
        if args.save is not None:
            if folders[s.name].resolve() in data_folders:
                raise InputError(f"--save: {folders[s.name]} holds the data itself; name another folder")
            if s.pairs[0][1] is not None and any(image.stem == "overview" for image, _ in s.pairs):
                raise InputError(f"--save: {s.folder}: overview.png is written there too; rename the image overview")
    if args.save is None:
        for s in sets:
            if s.pairs[0][1] is None:
                print(f"{s.name}: no masks in {s.folder}, metrics skipped")
        sets = [s for s in sets if s.pairs[0][1] is not None]
    maps = {s.name: find_maps(args.maps, s) for s in sets} if args.maps is not None else {}
    for s in sets:
        print(f"{s}; maps: {maps[s.name][0][0].parent}" if maps else s)
    check_sizes([pair for s in sets for pair in maps.get(s.name, s.pairs)], "image" if args.maps is None else "map")
    task = f"; task: {args.task}" if args.maps is not None else ""
    print(f"protocol: {args.protocol} ({PROTOCOLS[args.protocol]}){task}", flush=True)

    width = max(len("  TS-SAM_B, paper"), *map(len, names))
    rows: list[dict] = []
    for s in sets:
        folder = folders.get(s.name)
        if folder is not None:
            make_folder(folder, "--save")
        if args.maps is None:
            scores = evaluate(model, s.pairs, args.task, args.protocol, args.batch_size, args.workers, folder)
        else:
            work = partial(finish_map, task=args.task)
            scores = collect(in_order(work, maps[s.name], args.workers), len(s.pairs), args.task, args.protocol)
        if not scores.s:
            print(f"{s.name}: no masks, metrics skipped; {len(s.pairs)} predictions are in {folder}", flush=True)
            continue
        metrics = scores.results()
        if faint := scores.sums.get("faint"):
            print(f"warning: {s.name}: {faint} masks are nowhere above 128 and count as empty", file=sys.stderr)
        if not rows:
            print(table_row("data set", "images", {name: name for name in metrics}, width))
        print(table_row(s.name, len(s.pairs), {name: digits(name, value) for name, value in metrics.items()}, width))
        for row in published_rows(s.name, metrics, width):
            print(row)
        sys.stdout.flush()
        rows.append({"dataset": s.name, "images": len(s.pairs), "protocol": args.protocol, **metrics})
        if args.csv is not None:
            write_csv(rows, CSV_COLUMNS, args.csv)
        if folder is not None:
            ranked = sorted(range(len(scores.s)), key=lambda i: scores.s[i])
            overview = []
            for which, i in (("worst", ranked[0]), ("median", ranked[len(ranked) // 2]), ("best", ranked[-1])):
                stem = s.pairs[i][0].stem
                overview.append((f"{which}: {stem}, S {scores.s[i]:.4f}", *s.pairs[i], folder / f"{stem}.png"))
            save_overview(overview, folder / "overview.png")
    for folder in folders.values():
        print(f"masks: {folder}")


if __name__ == "__main__":
    run(main)
