"""Score TS-SAM, or any method's saved maps.

    python evaluate.py --ckpt runs/sod-vit_h/best.pt             on the validation set used in training
    python evaluate.py --ckpt runs/sod-vit_h/best.pt --data DUTS ECSSD --save masks --csv table.csv
    python evaluate.py --ckpt theirs.pth --data COD/TestDataset --protocol full-size   authors' checkpoint
    python evaluate.py --ckpt a.pt b.pt --data DUTS --csv table.csv       two models, appended to a table
    python evaluate.py --maps masks --data DUTS ECSSD                     saved maps, no checkpoint

Metrics follow one of two protocols; `py_sod_metrics` computes both:

    paper      as in the paper's released code: prediction and mask are compared at the model's S x S,
               the mask resized (nearest) and cut at > 0, the prediction in floating point.
               Weighted F-measure with beta^2 = 0.3. BER: mean over images.
    full-size  the usual protocol: logits upsampled to the mask's own size, sigmoid, rounded to 8
               bits; mask > 128. Weighted F-measure with beta^2 = 1; also the maximal, mean and
               adaptive F-measure with beta^2 = 0.3, and the maximal E-measure. Shadows: also BER
               over the pooled pixels of the dataset.

`train.py` validates with the same functions, under the paper's protocol.
"""

import argparse
import csv
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import py_sod_metrics
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from tssam import TSSAM, InputError, load_checkpoint, one_line, write_atomically

# -------------------------------------------------------------------------------------------------
# Find the images

# Pillow only recognises these formats.
UNREADABLE = {"BUFR", "EMF", "GRIB", "HDF5", "MPEG", "WMF"}
FORMATS = Image.registered_extensions()
EXTENSIONS = {end for end, kind in FORMATS.items() if kind in Image.OPEN.keys() - UNREADABLE}
Image.MAX_IMAGE_PIXELS = None  # a user's own large photograph is no attack

# Folder names of the datasets as people download them, see `matches`. ISTD's train_c, the image
# without its shadow, is no mask.
IMAGE_FOLDERS = "im img imgs img_dir image images shadowimages train_a test_a"
MASK_FOLDERS = (
    "gt gts gt_object groundtruth ground_truth ground-truth mask masks shadowmasks"
    " pixelwisegt-new-png label labels ann_dir annotation annotations train_b test_b"
)
SPLIT_FOLDERS = {
    "train": "tr train training traindataset trainingdataset",
    "val": "val valid validation",
    "test": "te test testing testdataset testingdataset",
}

# Which splits to look for, the first that there is.
TRAIN = ("train",)
VALIDATION = ("val", "test")
TEST = ("test", "val")

Pair = tuple[Path, Path | None]  # an image file, its mask file or None


class ImageSet(NamedTuple):
    """A dataset."""

    name: str  # in tables
    folder: Path
    split: str | None  # "train", "val", "test", or None where it has no splits
    pairs: list[Pair]  # sorted; all have masks, or none has

    def __str__(self) -> str:
        image, mask = self.pairs[0]
        masks = f"masks in {mask.parent}" if mask else "no masks"
        split = f"{self.split} split" if self.split else "no splits"
        return f"{self.name}: {len(self.pairs)} images in {image.parent}, {masks}, {split}"


def matches(folder: Path, words: str) -> bool:
    """Whether a folder's name is one of `words`, optionally after a prefix ending in - or _.

    Case-insensitive: DUTS-TR matches "tr train".
    """
    pattern = rf"(.*[-_])?({words.replace(' ', '|')})"
    return re.fullmatch(pattern, folder.name, re.IGNORECASE) is not None


def split_of(folder: Path) -> str | None:
    """The split that a folder is named after."""
    return next((split for split, words in SPLIT_FOLDERS.items() if matches(folder, words)), None)


def visible(folder: Path) -> list[Path]:
    """The visible entries of a folder, sorted."""
    return sorted(f for f in folder.iterdir() if not f.name.startswith((".", "@", "__")))


def subfolders(folder: Path, words: str = ".*") -> list[Path]:
    """The folders in a folder whose names match."""
    return [f for f in visible(folder) if f.is_dir() and matches(f, words)]


def search(
    folder: Path, split: str, own_split: str | None = None, depth: int = 4
) -> Iterator[ImageSet]:
    """The datasets of a split, and those without splits, in a folder and up to four levels below."""
    image_folders = subfolders(folder, IMAGE_FOLDERS)
    mask_folders = subfolders(folder, MASK_FOLDERS)
    if not image_folders:
        for below in subfolders(folder) if depth else ():
            yield from search(below, split, split_of(below) or own_split, depth - 1)
        return
    if own_split not in (split, None):
        return
    for kind in (image_folders, mask_folders):
        if len(kind) > 1:
            names = " and ".join(f.name for f in kind)
            raise InputError(f"{folder}: several folders of one kind, {names}; keep one")
    images = split_folder(image_folders[0], split)
    masks = split_folder(mask_folders[0], split) if mask_folders else None
    if images != image_folders[0]:  # images/train, and masks/train or masks
        own_split = split
    if images is not None:
        yield ImageSet(name_of(folder), folder, own_split, pair_files(images, masks))


def split_folder(folder: Path, split: str) -> Path | None:
    """The subfolder of a split, or the folder itself where it has none for splits."""
    parts = {split_of(f): f for f in subfolders(folder) if split_of(f)}
    return parts.get(split) if parts else folder


def name_of(folder: Path) -> str:
    """A dataset's name: its folder's, or the next one's above where a folder only names the split."""
    splits = " ".join(SPLIT_FOLDERS.values()).split()
    names = [name for name in folder.absolute().parts[1:] if name.lower() not in splits]
    return names[-1] if names else folder.absolute().name


def pair_files(image_folder: Path, mask_folder: Path | None) -> list[Pair]:
    """The (image, mask) files of two folders, paired by stem."""
    images = image_files(visible(image_folder))
    if not images:
        there = ", ".join(f.name for f in visible(image_folder)[:5]) or "nothing"
        raise InputError(f"{image_folder}: contains no image files, but {there}")
    if mask_folder is None:
        return [(file, None) for file in images.values()]
    masks = image_files(visible(mask_folder))
    ending = os.path.commonprefix([stem[::-1] for stem in masks])[::-1]
    for i in range(len(ending)):  # one more ending on all masks: a_mask.png
        renamed = {stem.removesuffix(ending[i:]): file for stem, file in masks.items()}
        if renamed.keys() >= images.keys():
            masks = renamed
            break
    without_mask = sorted(images.keys() - masks.keys())
    without_image = sorted(masks.keys() - images.keys())
    if split_of(image_folder) and not split_of(mask_folder):  # it holds the masks of all splits
        without_image = []
    if without_mask or without_image:
        raise InputError(
            f"{image_folder} and {mask_folder}: {len(without_mask)} images without a mask and"
            f" {len(without_image)} masks without an image, such as"
            f" {', '.join((without_mask + without_image)[:3])}; an image and its mask have the same name"
            " but for the extension"
        )
    return [(file, masks[stem]) for stem, file in images.items()]


def stem_of(file: Path) -> str:
    """A file's name without its extension; macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", file.stem)


def image_files(paths: list[Path]) -> dict[str, Path]:
    """The image files among `paths` by their stems."""
    files: dict[str, Path] = {}
    others = []
    for file in (path for path in paths if not path.is_dir()):
        stem = stem_of(file)
        if file.suffix.lower() not in EXTENSIONS:
            others.append(file)
        elif stem in files:
            raise InputError(
                f"{files[stem]} and {file}: the same name but for the extension; put masks into a folder"
                " of their own, called masks, and pass one folder of photographs at a time"
            )
        else:
            files[stem] = file
    if others:
        warn(
            f"{others[0].parent}: skipped {len(others)} files whose extensions Pillow does not know, such as"
            f" {others[0].name}"
        )
    return files


def find_split(root: Path, splits: tuple[str, ...]) -> list[ImageSet]:
    """The datasets in a folder, of the first of `splits` that it has, and those without splits."""
    for split in splits:
        found = list(search(root, split))
        if any(s.split for s in found):
            break
    return found


def find_sets(
    roots: list[Path], splits: tuple[str, ...], need_masks: bool = True
) -> list[ImageSet]:
    """The datasets in `roots`.

    Each root is the folder of a dataset, with images beside masks or with splits. To validate or
    test on, also a folder above several, a folder of images alone, or image files.
    """
    files = [root for root in roots if root.is_file()]
    datasets = without_masks(files[0].parent, files) if files else []
    for root in roots:
        if root.is_file():
            continue
        if not root.exists():
            raise InputError(
                f"{root}: no longer there, where training found it; pass the dataset's folder with --data"
                " (or --val)"
            )
        found = find_split(root, splits)
        if splits == TRAIN:
            found = [s for s in found if s.split] or found
            if len(found) > 1 and found[0].split is None:
                names = ", ".join(s.name for s in found)
                raise InputError(
                    f"--data: {root} contains several datasets ({names}); pass one or more"
                )
        elif not found:
            found = without_masks(root, visible(root))
        if not found:
            there = ", ".join(f.name for f in subfolders(root)[:10]) or "none"
            raise InputError(
                f"{root}: no dataset for the {splits[0]} split; pass the folder above images and masks."
                f" The folders there: {there}. Looked for, in any case and after any prefix that ends in"
                f" - or _: images in {IMAGE_FOLDERS}; masks in {MASK_FOLDERS}; the split in"
                f" {SPLIT_FOLDERS[splits[0]]}"
            )
        datasets += found
    if not datasets:
        raise InputError(f"--data: {files[0]} is no image, and neither is any other")
    for s in datasets:
        if need_masks and s.pairs[0][1] is None:
            raise InputError(
                f"{s.folder}: no folder of masks; looked for {MASK_FOLDERS} (evaluate.py --save DIR"
                " predicts without masks)"
            )
    return datasets


def without_masks(folder: Path, paths: list[Path]) -> list[ImageSet]:
    """The image files among `paths` as a dataset, if there are any."""
    pairs = [(file, None) for file in image_files(paths).values()]
    return [ImageSet(name_of(folder), folder, None, pairs)] if pairs else []


# -------------------------------------------------------------------------------------------------
# Read them

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")


class Sample(NamedTuple):
    """An image file as the network takes it, its mask as a protocol takes it."""

    image_file: Path
    size: tuple[int, int]  # the image's own (height, width)
    pixels: np.ndarray  # (S, S, 3) uint8
    mask: np.ndarray | None  # bool, (S, S) under the paper's protocol, else of the mask's own size


def open_image(path: Path, mode: str | None = None) -> Image.Image:
    """An image file converted to `mode`, or its header alone. Alpha is dropped (source: release)."""
    try:
        image = Image.open(path)
        converted = image.convert(mode) if mode else image
        converted.format = image.format
        return converted
    except Exception as error:  # broken files raise anything
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1: upright, or unreadable."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises anything
        return 1


def read_image(path: Path, has_mask: bool = False) -> Image.Image:
    """An image file as RGB. EXIF orientation is applied unless the image has a mask (source: release)."""
    image = open_image(path, "RGB")
    if not has_mask:
        with suppress(Exception):  # broken EXIF raises anything
            image = ImageOps.exif_transpose(image)
    return image


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image resized bilinearly: (S, S, 3) uint8."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def read_mask(path: Path) -> Image.Image:
    """A mask file as 8-bit grey.

    One that is nowhere above 128, such as a mask of 0 and 1, is read as 0 and 255. One in a lossy
    file, where faint noise surrounds the object, is cut at 128.
    """
    mask = open_image(path, "L")
    if mask.getextrema()[1] <= 128:
        return mask.point(lambda v: 255 * (v > 0))
    return mask.point(lambda v: 255 * (v > 128)) if mask.format in LOSSY else mask


def foreground(mask: Image.Image, protocol: str, size: int) -> np.ndarray:
    """Binarize a grey mask: (S, S) bool (paper), or of the mask's own size (full-size)."""
    if protocol == "paper":
        return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 0
    return np.asarray(mask) > 128


def read_sample(pair: Pair, size: int, protocol: str) -> Sample:
    """Read an image and, if it has one, its mask."""
    image_file, mask_file = pair
    image = read_image(image_file, has_mask=mask_file is not None)
    mask = None
    if mask_file is not None:
        mask = foreground(read_mask(mask_file), protocol, size)
    return Sample(image_file, (image.height, image.width), resize_image(image, size), mask)


def to_input(pixels: list[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """Images as the network takes them: B of (S, S, 3) uint8 -> (B, 3, S, S), /255, normalised."""
    images = torch.from_numpy(np.stack(pixels)).to(device).movedim(-1, 1)
    return normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD)


EMPTY = "masks are empty"
FULL = "masks have no background"


def inspect(pair: Pair) -> tuple[list[str], float, float]:
    """Possible problems of an image (or a map) and its mask; fractions of the mask above 0 and 128."""
    image_file, mask_file = pair
    image = open_image(image_file)
    found = []
    if image.mode[0] in "FI":  # Pillow's modes of floats and of 16 and 32 bits
        found.append(
            "files have more than 8 bits per channel; values above 255 are clipped, so save them with 8"
        )
    if mask_file is None:
        return found, 0, 0
    mask = read_mask(mask_file)
    above_0 = np.mean(np.asarray(mask) > 0)
    above_128 = np.mean(np.asarray(mask) > 128)
    if above_0 == 0:
        found.append(EMPTY)
    if above_0 == 1:
        found.append(FULL)
    if image.size != mask.size:
        found.append("files differ in size from their masks; both are resized independently")
    if orientation(image) != 1:
        found.append("photos are turned by their EXIF, which is ignored beside a mask")
    return found, above_0, above_128


def check_files(dataset: ImageSet, workers: int) -> None:
    """Read the headers of a dataset's images and its masks, and warn of what may be wrong."""
    name = dataset.name
    total = len(dataset.pairs)
    inspected = list(progress(in_threads(inspect, dataset.pairs, workers), name, total))
    files = defaultdict(list)
    for (image, _), (found, *_) in zip(dataset.pairs, inspected, strict=True):
        for what in found:
            files[what].append(image.name)
    for what, names in files.items():
        text = f"{name}: {len(names)} of {total} {what} (such as {names[0]})"
        if what in (EMPTY, FULL) and len(names) == total:
            raise InputError(f"{text}; check how {dataset.pairs[0][1].parent} was made")
        warn(text)
    _, above_0, above_128 = zip(*inspected, strict=True)
    if sum(above_128) < 0.9 * sum(above_0):
        worst = dataset.pairs[np.argmax(np.subtract(above_0, above_128))][1]
        warn(
            f"{name}: {np.mean(above_0):.2%} of the masks' pixels are above 0 (training, paper),"
            f" {np.mean(above_128):.2%} above 128 (full-size), see {worst}"
        )


# -------------------------------------------------------------------------------------------------
# Score one image, average a dataset

# The metrics handle one-sided masks, but NumPy warns on the way.
warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
balanced_error = py_sod_metrics.BERHandler(with_dynamic=False, with_adaptive=False)


def score(
    prediction: np.ndarray, mask: np.ndarray, task: str, protocol: str
) -> dict[str, float | np.ndarray]:
    """An image's metrics, by `py_sod_metrics`; curves over 256 thresholds as arrays (see `average`).

    All but BER see the prediction stretched to [0, 1] first, as in the field's toolboxes: a map's
    offset and contrast do not count, and MAE is no plain mean of |prediction - mask|. For BER it is
    cut at 125/255 as it is (source: release); an image without shadow, or with nothing else, counts
    50 at least. A metric that is nan, as S is where all foreground lies in the last row, counts 0
    (source: release).

    Args:
        prediction: (H, W), floats in [0, 1] (paper) or uint8 (full-size).
        mask: (H, W) bool.
    """
    grey = prediction  # in the range from 0 to 255
    if prediction.dtype != np.uint8:
        grey = prediction.astype(np.float64) * 255
    truth = mask.astype(np.uint8) * 255

    def result_of(metric) -> dict:
        metric.step(grey, truth)
        return metric.get_results()

    with np.errstate(all="ignore"):
        row = {"S": result_of(py_sod_metrics.Smeasure())["sm"]}
        if task == "shadow":
            positive = np.count_nonzero(mask)
            negative = mask.size - positive
            counts = py_sod_metrics.FmeasureV2.get_statistics(grey > 125, mask, positive, negative)
            row["BER"] = 100 * balanced_error(**counts)
            row |= counts  # tp, fp, tn, fn
        else:
            e_measure = result_of(py_sod_metrics.Emeasure())["em"]["curve"]
            row["E"] = e_measure * (mask.size > 1)  # it divides by the number of pixels less one
            beta_squared = 0.3 if protocol == "paper" else 1  # which `beta` is here
            row["wF"] = result_of(py_sod_metrics.WeightedFmeasure(beta=beta_squared))["wfm"]
            row["MAE"] = result_of(py_sod_metrics.MAE())["mae"]
            if protocol == "full-size":
                handler = py_sod_metrics.FmeasureHandler(
                    with_dynamic=True, with_adaptive=True, beta=0.3
                )
                f_measure = result_of(py_sod_metrics.FmeasureV2({"F": handler}))["F"]
                row["F"] = f_measure["dynamic"]
                row["adpF"] = f_measure["adaptive"]
    return {name: np.nan_to_num(value) for name, value in row.items()}


def average(rows: list[dict], task: str, protocol: str) -> dict[str, float]:
    """A dataset's metrics from its images' `score`.

    E and meanF are the mean, maxE and maxF the largest value of the images' mean curve over the
    thresholds. BER is in percent: the mean over images; BER_pooled is over all pixels.
    """
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    mean = {name: value / len(rows) for name, value in total.items()}
    if task == "shadow":
        metrics = {"BER": mean["BER"]}
        if protocol == "full-size":
            counts = {name: total[name] for name in ("tp", "fp", "tn", "fn")}
            metrics["BER_pooled"] = 100 * balanced_error(**counts)
    else:
        metrics = {"S": mean["S"], "E": mean["E"].mean(), "wF": mean["wF"], "MAE": mean["MAE"]}
        if protocol == "full-size":
            metrics["maxF"] = mean["F"].max()
            metrics["adpF"] = mean["adpF"]
            metrics["meanF"] = mean["F"].mean()
            metrics["maxE"] = mean["E"].max()
    return {name: float(value) for name, value in metrics.items()}


# -------------------------------------------------------------------------------------------------
# Score a dataset: read_sample -> predict -> save_and_score -> average. Reading and scoring run in
# threads, in which no PyTorch is called; the network runs in the main thread.

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(args: argparse.Namespace) -> torch.autocast:
    """What the network runs under; losses, FFT and metrics are float32 all the same."""
    device = torch.device(args.device).type
    return torch.autocast(device, PRECISIONS[args.precision], enabled=args.precision != "fp32")


class Prediction(NamedTuple):
    """What the network says about a sample."""

    sample: Sample
    to_score: np.ndarray  # float32 in [0, 1], (S, S) (paper); uint8, of the mask's size (full-size)
    to_save: np.ndarray | None  # uint8, at the image's size


def to_map(logit: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logit (1, S, S) as a map of `size` (H, W): bilinear, sigmoid, rounded to 8 bits; (H, W) uint8."""
    full = F.interpolate(logit[None], size, mode="bilinear", align_corners=False)[0, 0]
    return (full.sigmoid() * 255).round().byte().cpu().numpy()


@torch.inference_mode()
def predict(
    model: TSSAM, samples: Iterator[Sample], protocol: str, batch_size: int, save: bool
) -> Iterator[Prediction]:
    """Run the network over samples, in their order."""
    model.eval()
    device = next(model.parameters()).device
    while batch := list(islice(samples, batch_size)):
        logits = model(to_input([sample.pixels for sample in batch], device))
        for sample, logit in zip(batch, logits, strict=True):
            if not logit.isfinite().all():
                raise InputError(
                    f"{sample.image_file}: the network's output is not finite; its weights are broken"
                )
            if protocol == "paper" or sample.mask is None:
                to_score = logit[0].sigmoid().cpu().numpy()
            else:
                to_score = to_map(logit, sample.mask.shape)
            yield Prediction(sample, to_score, to_map(logit, sample.size) if save else None)


def save_and_score(prediction: Prediction, task: str, protocol: str, save: Path | None) -> dict:
    """Write an image's map to `save`, and score it; {} for an image without a mask."""
    sample, to_score, to_save = prediction
    if save is not None:
        save.mkdir(exist_ok=True)
        grey = Image.fromarray(to_save)
        write_atomically(
            save / f"{sample.image_file.stem}.png", lambda file: grey.save(file, "PNG")
        )
    if sample.mask is None:
        return {}
    return score(to_score, sample.mask, task, protocol)


def score_images(
    model: TSSAM,
    pairs: list[Pair],
    task: str,
    protocol: str,
    batch_size: int,
    workers: int,
    save: Path | None = None,
) -> Iterator[dict]:
    """What `score` gives for each image. `save` is a folder for the maps, <image's stem>.png."""
    read = partial(read_sample, size=model.config["image_size"], protocol=protocol)
    finish = partial(save_and_score, task=task, protocol=protocol, save=save)
    samples = in_threads(read, pairs, workers)
    predictions = predict(model, samples, protocol, batch_size, save is not None)
    rows = in_threads(finish, predictions, workers)
    yield from progress(rows, "evaluate", len(pairs))


def score_map(pair: tuple[Path, Path], task: str, scale: int = 1) -> dict:
    """Score a saved map under the full-size protocol; one of another size is resized bilinearly.

    Pixels count `scale` times: 255 for maps of 0 and 1.
    """
    map_file, mask_file = pair
    grey = open_image(map_file, "L").point(lambda v: v * scale)
    mask = read_mask(mask_file)
    if grey.size != mask.size:
        grey = grey.resize(mask.size, Image.Resampling.BILINEAR)
    return score(np.asarray(grey), np.asarray(mask) > 128, task, "full-size")


def score_maps(dataset: ImageSet, task: str, workers: int) -> Iterator[dict]:
    """What `score` gives for each saved map. If no map exceeds 1, maps are taken as 0/1."""
    total = len(dataset.pairs)
    levels = in_threads(
        lambda pair: open_image(pair[0], "L").getextrema()[1], dataset.pairs, workers
    )
    brightest = max(progress(levels, dataset.name, total))
    if task == "shadow" and brightest != 1 and brightest <= 125:
        warn(
            f"{dataset.name}: no map is brighter than {brightest} of 255; BER cuts them at 125, so all"
            " are black to it"
        )
    work = partial(score_map, task=task, scale=255 if brightest == 1 else 1)
    yield from progress(in_threads(work, dataset.pairs, workers), "evaluate", total)


# -------------------------------------------------------------------------------------------------
# Tables and pictures

METRICS = ("S", "E", "wF", "MAE", "maxF", "adpF", "meanF", "maxE", "BER", "BER_pooled")
CSV_COLUMNS = ("model", "dataset", "images", "protocol", *METRICS, "precision")

# Tables I (S, E, wF, MAE) and II (BER) of the paper. Table III's numbers are not at hand.
# fmt: off
PUBLISHED = {  # dataset: number of images, TS-SAM_B, TS-SAM_H
    "CHAMELEON": (76,   dict(S=0.912, E=0.947, wF=0.849, MAE=0.023), dict(S=0.942, E=0.966, wF=0.900, MAE=0.017)),
    "CAMO":      (250,  dict(S=0.826, E=0.862, wF=0.753, MAE=0.073), dict(S=0.887, E=0.925, wF=0.830, MAE=0.047)),
    "COD10K":    (2026, dict(S=0.863, E=0.909, wF=0.771, MAE=0.029), dict(S=0.914, E=0.950, wF=0.856, MAE=0.017)),
    "NC4K":      (4121, dict(S=0.866, E=0.900, wF=0.799, MAE=0.045), dict(S=0.905, E=0.933, wF=0.860, MAE=0.032)),
    "ISTD":      (540,  dict(BER=1.11), dict(BER=1.04)),
}
# fmt: on


def plain_name(name: str) -> str:
    """A dataset's name without what folders add: COD10K of COD10K-Test, cod10k_te or COD10K_Dataset."""
    return re.sub(r"[-_](te|test|dataset)$", "", name, flags=re.IGNORECASE).upper()


def print_row(first: str, second: object, cells: dict, digits: int = 4) -> None:
    """Print a line of the table: column names, or numbers with `digits`, BER with two."""
    text = ""
    for column, cell in cells.items():
        if not isinstance(cell, str):
            cell = f"{cell:.{2 if column.startswith('BER') else digits}f}"
        text += f"  {cell:>{max(6, len(column))}}"
    say(f"{first:<20}  {second:>6}{text}")


def print_metrics(name: str, images: int, metrics: dict[str, float], protocol: str) -> None:
    """Print a dataset's row and, where images and protocol are the paper's, the paper's rows."""
    print_row(name, images, metrics)
    published_images, *rows = PUBLISHED.get(plain_name(name), (0,))
    if images == published_images and protocol == "paper":
        for model, row in zip(("TS-SAM_B", "TS-SAM_H"), rows, strict=True):
            cells = {column: row.get(column, "") for column in metrics}
            print_row(f"  {model}, paper", "", cells, digits=3)


def check_csv(path: Path) -> None:
    """Refuse a file to which no row can be appended."""
    with path.open("a+", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.seek(0)
        header = file.readline()
        whole = file.read()[-1:] in ("", "\n")
    if header and (header.split() != [",".join(CSV_COLUMNS)] or not whole):
        raise InputError(
            f"--csv: {path} was not written by this version of evaluate.py; pass another"
        )


def append_csv(path: Path, row: dict) -> None:
    """Append a row to a table, numbers in full precision, and at first the header."""
    with path.open("a", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.DictWriter(file, CSV_COLUMNS)
        if file.tell() == 0:
            table.writeheader()
        table.writerow(row)


def draw_overview(rows: list[tuple], path: Path) -> None:
    """Draw rows of (title, image file, mask file, prediction) into one PNG; nothing is stretched."""
    box = (240, 160)
    column = box[0] + 6
    line = box[1] + 26
    sheet = Image.new("RGB", (3 * column, 20 + len(rows) * line), "white")
    draw = ImageDraw.Draw(sheet)
    for x, name in enumerate(("image", "ground truth", "prediction as saved")):
        draw.text((x * column + 3, 3), name, fill="black", font_size=12)
    for y, (title, image_file, mask_file, prediction) in enumerate(rows):
        top = 20 + y * line
        title = title.encode("ascii", "replace").decode()
        draw.text((3, top + 3), title, fill="black", font_size=12)
        panels = (read_image(image_file, has_mask=True), read_mask(mask_file), prediction)
        for x, panel in enumerate(panels):
            sheet.paste(ImageOps.contain(panel.convert("RGB"), box), (x * column + 3, top + 20))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


# -------------------------------------------------------------------------------------------------
# What both scripts share: threads, messages, options, errors, stopping

# The number of this process and of processes, of torchrun or of a launcher that sets both.
UNDER_TORCHRUN = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1
tqdm.set_lock(threading.RLock())  # its own is a lock between processes


def in_threads(work: Callable, jobs: Iterable, threads: int) -> Iterator:
    """map(work, jobs) in order, by a pool of threads (0: by this one), never far ahead.

    `jobs` is consumed in this thread, so autocast and inference mode apply.
    """
    if threads == 0:
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for job in jobs:
            pending.append(pool.submit(work, job))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def progress(items: Iterable, what: str, total: int, unit: str = "img") -> tqdm:
    """`items` under a progress bar, where stderr is a terminal; torchrun's first process draws it."""
    return tqdm(items, what, total, unit=unit, leave=False, disable=None if RANK == 0 else True)


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line; of torchrun's processes the first does. A closed pipe or a full disk is ignored."""
    if RANK == 0:
        with suppress(OSError):
            print(text, file=file, flush=True)


@cache
def warn(text: str) -> None:
    """Print a warning, once."""
    say(f"warning: {text}", sys.stderr)


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring as it is; errors are one line, with exit code 2."""

    def __init__(self, doc: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(least: float, kind: type = int) -> Callable[[str], float]:
    """The type of an option that is a number."""

    def number(text: str) -> float:
        if not least <= kind(text) < 2**32:
            raise ValueError
        return kind(text)

    return number


def existing(text: str) -> Path:
    """The type of an option that is a file or a folder."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return Path(text)


def add_machine_options(parser: Parser) -> argparse._ArgumentGroup:
    """The options both scripts have; returns their group."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = min(8, os.cpu_count() or 1)
    group = parser.add_argument_group("machine; results change by rounding error at most")
    # fmt: off
    group.add_argument("--workers", type=number(0),   default=cores, help=f"threads that read images, and as many that score them; 0: none (default here: {cores})")
    group.add_argument("--device",  default=device,                  help=f"cuda, cuda:1, cpu, ... (default here: {device})")
    # fmt: on
    return group


def check_device(args: argparse.Namespace) -> None:
    """Try --device; each of torchrun's processes takes its own GPU and its share of the workers."""
    if "LOCAL_RANK" in os.environ:
        args.workers //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if args.device.startswith("cuda:"):
            torch.cuda.set_device(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device: {args.device} cannot be used here ({one_line(error)}); try cpu"
        ) from error


def peak_memory(device: str) -> float:
    """Peak memory in MB: the GPU's on CUDA, else the process's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def on_stop(message: Callable[[], str]) -> None:
    """Have Ctrl-C and SIGTERM end the script at once: one line, exit code 130.

    Sound because every file is written whole or not at all.
    """

    def stop(*_) -> None:
        if RANK == 0:
            start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
            os.write(2, f"{start}{Path(sys.argv[0]).name}: {message()}\n".encode())
        os._exit(130)

    if threading.current_thread() is threading.main_thread():  # others may not
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)


def run(main: Callable[[], None]) -> None:
    """Run a script. Errors the user can fix are one line and exit code 2; others keep their traceback."""
    on_stop(lambda: "stopped")
    with suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(errors="replace")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, also in convolutions
    try:
        main()
        return
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # PyTorch's on a CPU
            raise
        message = (
            f"too little memory ({one_line(error)}); try --grad-checkpoint, --accumulate or --precision"
            " bf16 in training, or a lower --batch-size, --size or --sam"
        )
    if RANK > 0:  # what all processes meet, the first says, and torchrun ends this one meanwhile
        time.sleep(3)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to score")
    source = what.add_mutually_exclusive_group(required=True)
    how = parser.add_argument_group("how to score it")
    output = parser.add_argument_group("what to write")
    machine = add_machine_options(parser)
    # fmt: off
    source.add_argument("--ckpt",         type=existing, nargs="+",             help="checkpoints of train.py, or of the authors' code")
    source.add_argument("--maps",         type=existing,                        help="score saved maps, MAPS/<dataset>/<image's stem>.png")
    what.add_argument("--sam-checkpoint", type=existing,                        help="SAM's weights (default: the file used in training)")
    what.add_argument("--data",           type=existing, nargs="+",             help="datasets, folders above several, images without masks (default: what it was validated on)")
    how.add_argument("--protocol",        choices=("paper", "full-size", "original"), help="see above (default paper; --maps: full-size; `original` is full-size too)")
    how.add_argument("--precision",       choices=tuple(PRECISIONS),            help="of the network (default fp32, so that a table does not depend on the card)")
    how.add_argument("--task",            choices=("sod", "cod", "shadow"),     help="what --maps show (default sod): salient or camouflaged objects, or shadows, scored by BER")
    output.add_argument("--csv",          type=Path,                            help="table to append the rows to, in full precision")
    output.add_argument("--save",         type=Path,                            help="new folder for 8-bit maps at each image's own size, <dataset>/<image's stem>.png, and overview pictures")
    machine.add_argument("--batch-size",  type=number(1),   default=2,          help="images at a time (default 2)")
    # fmt: on
    args = parser.parse_args()
    if WORLD > 1:
        raise InputError("evaluate.py runs in one process; start it with python, not torchrun")
    check_device(args)
    if args.maps is not None:
        if args.data is None:
            raise InputError("--data: pass the datasets that the maps belong to")
        if args.save or args.sam_checkpoint or args.precision or args.protocol == "paper":
            raise InputError(
                "--maps: goes without --save, --sam-checkpoint, --precision and --protocol paper; nothing"
                " is predicted"
            )
        args.protocol = "full-size"
        args.task = args.task or "sod"
    else:
        if args.task is not None:
            raise InputError("--task: goes with --maps; a checkpoint knows its own")
        if args.save is not None and len(args.ckpt) > 1:
            raise InputError("--save: takes the maps of one --ckpt; run the others one by one")
        args.protocol = "full-size" if args.protocol == "original" else args.protocol or "paper"
        args.precision = args.precision or "fp32"
    if args.csv is not None:
        check_csv(args.csv)
    return args


def find_test_sets(
    roots: list[Path], splits: tuple[str, ...], args: argparse.Namespace
) -> list[ImageSet]:
    """The datasets to score; with --maps, the maps are their images."""
    datasets = find_sets(roots, splits, need_masks=args.save is None)
    names = [s.name for s in datasets]
    for i, s in enumerate(datasets):
        if names.count(s.name) > 1:
            raise InputError(
                f"--data: {s.folder}: another dataset is called {s.name} too; score them one at a time"
            )
        if args.maps is not None:
            s = s._replace(pairs=find_maps(args.maps, s, alone=len(datasets) == 1))
            datasets[i] = s
        say(s)
        check_files(s, args.workers)
    return datasets


def find_maps(maps: Path, dataset: ImageSet, alone: bool) -> list[Pair]:
    """The (map, mask) files of a dataset.

    Maps lie in its folder under `maps` (DUTS-TE, or DUTS, in any case), or in `maps` itself if that
    has no folders and the dataset is alone.
    """
    folders = subfolders(maps)
    fitting = [f for f in folders if plain_name(f.name) == plain_name(dataset.name)]
    if alone and not folders:
        fitting = [maps]
    if len(fitting) != 1:
        found = f"{len(fitting)} folders that fit" if fitting else "no folder for"
        there = ", ".join(f.name for f in fitting or folders)
        raise InputError(f"--maps: {maps} has {found} {dataset.name}: {there}")
    map_of = image_files(visible(fitting[0]))
    missing = [f"{i.stem}.png" for i, _ in dataset.pairs if stem_of(i) not in map_of]
    if missing:
        there = ", ".join(file.name for file in list(map_of.values())[:3]) or "no images"
        raise InputError(
            f"--maps: {fitting[0]}: {len(missing)} of {len(dataset.pairs)} maps are missing, such as"
            f" {', '.join(missing[:3])}; there are {there}"
        )
    return [(map_of[stem_of(image)], mask) for image, mask in dataset.pairs]


def prepare_save(save: Path, ckpt: Path) -> None:
    """Make the folder of --save; refuse one with other files than this checkpoint's maps."""
    source = save / "checkpoint.txt"
    content = os.fsencode(os.path.abspath(ckpt)) + b"\n"
    is_ours = source.is_file() and source.read_bytes() == content
    if save.exists() and not is_ours and visible(save):
        raise InputError(
            f"--save: {save} contains other files than maps of {ckpt}; pass a new or an empty folder"
        )
    save.mkdir(parents=True, exist_ok=True)
    source.write_bytes(content)


def score_checkpoints(args: argparse.Namespace) -> Iterator[tuple]:
    """Predict and score each dataset with each checkpoint: (checkpoint, task, dataset, rows)."""
    datasets = find_test_sets(args.data, TEST, args) if args.data else []
    for file in args.ckpt:
        model, info = load_checkpoint(file, args.sam_checkpoint)
        model.store_encoder(PRECISIONS[args.precision])
        model.to(args.device)
        task = info["task"]
        say(f"{file}: {task}, {model.config['sam']}, epoch {info.get('epoch', 'unknown')}")
        if args.data is None:
            if not info.get("val"):
                raise InputError(
                    f"--ckpt: {file}: trained without a validation set; pass datasets with --data"
                )
            roots = [Path(folder) for folder in info["val"]]
            datasets = find_test_sets(roots, VALIDATION, args)
        if args.save is not None:
            prepare_save(args.save, file)
        for dataset in datasets:
            save = args.save and args.save / dataset.name
            with autocast(args):
                rows = score_images(
                    model, dataset.pairs, task, args.protocol, args.batch_size, args.workers, save
                )
                yield file, task, dataset, list(rows)


def score_saved_maps(args: argparse.Namespace) -> Iterator[tuple]:
    """Score each dataset's maps: (folder of maps, task, dataset, rows)."""
    for dataset in find_test_sets(args.data, TEST, args):
        yield args.maps, args.task, dataset, list(score_maps(dataset, args.task, args.workers))


def save_overview(dataset: ImageSet, rows: list[dict], save: Path) -> None:
    """Draw a dataset's worst, median and best image by S-measure, with the maps in `save`."""
    order = sorted(range(len(rows)), key=lambda i: rows[i]["S"])
    shown = []
    for which, i in (("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1])):
        image_file, mask_file = dataset.pairs[i]
        title = f"{which}: {image_file.stem}, S {rows[i]['S']:.4f}"
        prediction = open_image(save / dataset.name / f"{image_file.stem}.png")
        shown.append((title, image_file, mask_file, prediction))
    draw_overview(shown, save / f"overview-{dataset.name}.png")


def main() -> None:
    args = parse_arguments()
    say(f"protocol: {args.protocol}")
    say(f"task: {args.task}" if args.maps else f"precision: {args.precision}")
    results = score_saved_maps(args) if args.maps else score_checkpoints(args)
    header = None
    for source, task, dataset, rows in results:
        if rows[0]:
            metrics = average(rows, task, args.protocol)
            if header != metrics.keys():
                header = metrics.keys()
                print_row("dataset", "images", {column: column for column in header})
            print_metrics(dataset.name, len(rows), metrics, args.protocol)
            if args.csv is not None:
                row = dict(model=source, dataset=dataset.name, images=len(rows))
                row |= dict(protocol=args.protocol, precision=args.precision)
                append_csv(args.csv, row | metrics)
            if args.save is not None:
                save_overview(dataset, rows, args.save)
        if args.save is not None:
            say(f"{dataset.name}: {len(rows)} maps in {args.save / dataset.name}")
    say(f"peak memory: {peak_memory(args.device):.0f} MB")


if __name__ == "__main__":
    run(main)
