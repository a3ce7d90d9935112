"""Score TS-SAM, or any method's saved maps.

    python evaluate.py --ckpt runs/sod-vit_h                      on the data it was validated on
    python evaluate.py --ckpt runs/sod-vit_h --data DUTS ECSSD --save maps --csv table.csv
    python evaluate.py --ckpt theirs.pth --data COD/TestDataset --protocol full-size
    python evaluate.py --ckpt runs/mine --data photos --save predictions     predict only
    python evaluate.py --maps maps --data DUTS ECSSD              saved maps, no checkpoint

Metrics follow one of two protocols; `py_sod_metrics` computes both:

    paper      what the paper's released code computes: prediction and mask are compared at the
               model's S x S, the mask resized (nearest) and cut at > 0, the prediction in floating
               point. Weighted F-measure with beta^2 = 0.3. BER: mean over images.
    full-size  the usual protocol: logits upsampled to the mask's own size, sigmoid, rounded to 8
               bits; mask > 128. Weighted F-measure with beta^2 = 1; also the maximal, mean and
               adaptive F-measure with beta^2 = 0.3, and the maximal E-measure. Shadows: also BER
               over the pooled pixels of the dataset.

`train.py` validates with the same functions, under the paper's protocol.
"""

import argparse
import builtins
import csv
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
import unicodedata
import warnings
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from glob import glob
from itertools import islice, permutations
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import py_sod_metrics
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from tssam import TSSAM, InputError, load_checkpoint, one_line, write_atomically

# -------------------------------------------------------------------------------------------------
# Protocols and numerics


class Protocol(NamedTuple):
    """How predictions are compared with masks."""

    name: str
    full_size: bool  # at the mask's own size, predictions in 8 bits; else at S x S, in floats
    threshold: int  # a mask's foreground is above it
    beta_squared: float  # of the weighted F-measure


PAPER = Protocol("paper", full_size=False, threshold=0, beta_squared=0.3)
FULL_SIZE = Protocol("full-size", full_size=True, threshold=128, beta_squared=1)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER, FULL_SIZE)}

TASKS = ("sod", "cod", "shadow")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
torch.backends.cudnn.allow_tf32 = False  # float32 is float32, also in convolutions
# One kernel on every card: cuDNN's attention refuses a mask that needs a gradient, so a Hopper card
# would train with one kernel and validate with another.
torch.backends.cuda.enable_cudnn_sdp(False)
# The metrics handle one-sided masks, but NumPy warns on the way.
warnings.filterwarnings("ignore", "Mean of empty slice|invalid value", RuntimeWarning)


def run_network(network: Callable, images: Tensor, precision: str) -> Tensor:
    """The network's logits, float32, computed under autocast."""
    enabled = precision != "fp32"
    with torch.autocast(images.device.type, PRECISIONS[precision], enabled=enabled):
        return network(images)


# -------------------------------------------------------------------------------------------------
# The metrics of an image, of a dataset, and the paper's

balanced_error = py_sod_metrics.BERHandler(with_dynamic=False, with_adaptive=False)


def score_objects(prediction: np.ndarray, mask: np.ndarray, protocol: Protocol) -> dict:
    """An image's metrics for salient or camouflaged objects.

    E and F are curves over 256 thresholds. The prediction is stretched to [0, 1] first, as in the
    field's toolboxes: a map's offset and contrast do not count, and MAE is no plain mean of
    |prediction - mask|. A metric that is nan, as S is where all foreground lies in the last row or
    column, counts 0 (source: release).

    Args:
        prediction: (H, W), 0 to 255, float64 (paper) or uint8 (full-size).
        mask: (H, W) bool.
    """
    truth = mask.astype(np.uint8) * 255
    prediction, mask = py_sod_metrics.utils.prepare_data(prediction, truth)

    def result_of(metric) -> dict:
        metric.step(prediction, mask, normalize=False)
        return metric.get_results()

    row = dict(
        S=result_of(py_sod_metrics.Smeasure())["sm"],
        E=result_of(py_sod_metrics.Emeasure())["em"]["curve"],
        # What py_sod_metrics calls beta is beta^2.
        wF=result_of(py_sod_metrics.WeightedFmeasure(beta=protocol.beta_squared))["wfm"],
        MAE=result_of(py_sod_metrics.MAE())["mae"],
    )
    if protocol.full_size:
        handler = py_sod_metrics.FmeasureHandler(with_dynamic=True, with_adaptive=True, beta=0.3)
        f_measure = result_of(py_sod_metrics.FmeasureV2({"F": handler}))["F"]
        row |= dict(F=f_measure["dynamic"], adpF=f_measure["adaptive"])
    return {name: np.nan_to_num(value) for name, value in row.items()}


def score_shadow(prediction: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """An image's BER in percent, and the pixels it counts; shapes as in `score_objects`.

    The prediction is cut at 125/255 as it is (source: release). An image without shadow, or with
    nothing else, counts 50 at least.
    """
    positive = np.count_nonzero(mask)
    counts = py_sod_metrics.FmeasureV2.get_statistics(
        prediction > 125, mask, positive, mask.size - positive
    )
    return counts | {"BER": 100 * np.nan_to_num(balanced_error(**counts))}


def average(rows: list[dict], protocol: Protocol) -> dict[str, float]:
    """A dataset's metrics from its images'.

    E and meanF are the mean, maxE and maxF the largest value of the images' mean curve over the
    thresholds. BER is in percent: the mean over images; BER_pooled is over all pixels.
    """
    totals = {name: sum(row[name] for row in rows) for name in rows[0]}
    mean = {name: total / len(rows) for name, total in totals.items()}
    if "BER" in mean:
        metrics = dict(BER=mean["BER"])
        if protocol.full_size:
            del totals["BER"]
            metrics["BER_pooled"] = 100 * balanced_error(**totals)
    else:
        e = mean["E"]
        metrics = mean | dict(E=e.mean())
        if protocol.full_size:
            f = metrics.pop("F")
            metrics |= dict(maxF=f.max(), meanF=f.mean(), maxE=e.max())
    return {name: float(value) for name, value in metrics.items()}


# Tables I and II of the paper; Table III's numbers are not at hand. The integer is the number of
# images; rows are printed only when all are there.
PUBLISHED = """
TS-SAM_B CHAMELEON   76 S 0.912 E 0.947 wF 0.849 MAE 0.023
TS-SAM_H CHAMELEON   76 S 0.942 E 0.966 wF 0.900 MAE 0.017
TS-SAM_B CAMO       250 S 0.826 E 0.862 wF 0.753 MAE 0.073
TS-SAM_H CAMO       250 S 0.887 E 0.925 wF 0.830 MAE 0.047
TS-SAM_B COD10K    2026 S 0.863 E 0.909 wF 0.771 MAE 0.029
TS-SAM_H COD10K    2026 S 0.914 E 0.950 wF 0.856 MAE 0.017
TS-SAM_B NC4K      4121 S 0.866 E 0.900 wF 0.799 MAE 0.045
TS-SAM_H NC4K      4121 S 0.905 E 0.933 wF 0.860 MAE 0.032
TS-SAM_B ISTD       540 BER 1.11
TS-SAM_H ISTD       540 BER 1.04
"""

# -------------------------------------------------------------------------------------------------
# An image's way from its file to its row: `score_images`. Reading and scoring run in threads, in
# which no PyTorch is called; the network runs in the main thread.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
Image.MAX_IMAGE_PIXELS = None  # a user's own large photograph is no attack


class Pair(NamedTuple):
    """An image (or a saved map) and its mask."""

    name: str  # path below the folder of images, without extension
    image: Path
    mask: Path | None


class Sample(NamedTuple):
    """An image as the network takes it, its mask as a protocol takes it."""

    pair: Pair
    size: tuple[int, int]  # the image's own (height, width)
    pixels: np.ndarray  # (S, S, 3) uint8
    mask: np.ndarray | None  # bool, (S, S) (paper) or of the mask's own size (full-size)


class Prediction(NamedTuple):
    """What the network says about a sample."""

    sample: Sample
    to_score: np.ndarray  # 0 to 255: float64, (S, S) (paper); uint8, of the mask's size (full-size)
    to_save: np.ndarray  # uint8, of the image's own size


def score_images(
    model: TSSAM,
    pairs: list[Pair],
    task: str,
    protocol: Protocol,
    *,
    batch_size: int = 2,
    workers: int = 0,
    precision: str = "fp32",
    save: Path | None = None,
) -> Iterator[dict]:
    """Each image's metrics, in order; {} without a mask. `save` is a folder for maps, <name>.png."""

    def save_and_score(prediction: Prediction) -> dict:
        sample, to_score, to_save = prediction
        if save is not None:
            path = save / f"{sample.pair.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(Image.fromarray(to_save), path)
        return score(to_score, sample.mask, task, protocol)

    read = partial(read_sample, size=model.config["image_size"], protocol=protocol)
    samples = in_threads(read, pairs, workers)
    predictions = predict(model, samples, protocol, batch_size, precision)
    rows = in_threads(save_and_score, predictions, workers)
    yield from progress(rows, "evaluate", len(pairs))


def open_image(path: Path) -> Image.Image:
    """An image file, in memory."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except Exception as error:  # broken files raise anything
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from error


def read_image(path: Path, has_mask: bool = False) -> Image.Image:
    """An image file as RGB; alpha is dropped. EXIF orientation is applied unless the image has a mask.

    Source of both: release.
    """
    image = open_image(path).convert("RGB")
    if not has_mask:
        with suppress(Exception):  # broken EXIF raises anything
            image = ImageOps.exif_transpose(image)
    return image


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image resized bilinearly: (S, S, 3) uint8."""
    return np.asarray(image.resize((size, size), Image.BILINEAR))


def read_grey(path: Path) -> tuple[Image.Image, bool]:
    """A mask or map as 8-bit grey (floats of at most 1 times 255); also whether its file is lossy."""
    image = open_image(path)
    lossy = image.format in LOSSY or image.info.get("compression") == "jpeg"  # the latter in TIFF
    if image.mode == "F" and image.getextrema()[1] <= 1:
        image = image.point(lambda v: v * 255 + 0.5)
    return image.convert("L"), lossy


def brightest(pair: Pair) -> int:
    """The highest level of a map."""
    return read_grey(pair.image)[0].getextrema()[1]


def read_mask(path: Path) -> Image.Image:
    """A mask file as 8-bit grey.

    A lossy file, where faint noise surrounds the object, is cut at half of its maximum if that is
    above 8 (ours; the release cuts at 0). A mask that is nowhere above 128, such as one of 0 and 1,
    is read as 0 and 255.
    """
    mask, lossy = read_grey(path)
    top = mask.getextrema()[1]
    if lossy or top <= 128:
        cut = top / 2 if lossy and top > 8 else 0
        mask = mask.point(lambda v: 255 * (v > cut))
    return mask


def foreground(mask: Image.Image, protocol: Protocol, size: int) -> np.ndarray:
    """Binarize a grey mask: (S, S) bool (paper), or of the mask's own size (full-size)."""
    if not protocol.full_size:
        mask = mask.resize((size, size), Image.NEAREST)
    return np.asarray(mask) > protocol.threshold


def read_sample(pair: Pair, size: int, protocol: Protocol) -> Sample | None:
    """Read an image and, if it has one, its mask; None for a photograph that cannot be read."""
    try:
        image = read_image(pair.image, has_mask=pair.mask is not None)
    except InputError as error:
        if pair.mask is not None:
            raise
        warn(f"{error}: skipped")
        return None
    mask = pair.mask and foreground(read_mask(pair.mask), protocol, size)
    return Sample(pair, image.size[::-1], resize_image(image, size), mask)


def to_device(array: np.ndarray, device: str) -> Tensor:
    """An array as a tensor on the device; the program does not wait for the copy to a GPU."""
    tensor = torch.from_numpy(array)
    if device.startswith("cuda"):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_input(pixels: list[np.ndarray], device: str = "cpu") -> Tensor:
    """Images as the network takes them: B of (S, S, 3) uint8 -> (B, 3, S, S), /255, normalised."""
    images = to_device(np.stack(pixels), device).movedim(-1, 1)
    return normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD)


@torch.inference_mode()
def predict(
    model: TSSAM,
    samples: Iterable[Sample | None],
    protocol: Protocol,
    batch_size: int,
    precision: str,
) -> Iterator[Prediction]:
    """Run the network over samples, in their order."""
    model.eval()
    device = str(next(model.parameters()).device)
    samples = filter(None, samples)
    while batch := list(islice(samples, batch_size)):
        images = to_input([sample.pixels for sample in batch], device)
        for sample, logit in zip(batch, run_network(model, images, precision), strict=True):
            if not logit.isfinite().all():
                raise InputError(
                    f"{sample.pair.image}: the network's output is not finite: broken weights, or --precision fp16 (try fp32)"
                )
            if sample.mask is not None and protocol.full_size:
                to_score = to_map(logit, sample.mask.shape)
            else:
                to_score = logit[0].sigmoid().cpu().numpy().astype(np.float64) * 255
            yield Prediction(sample, to_score, to_map(logit, sample.size))


def to_map(logit: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logit (1, S, S) as a map of `size` (H, W): bilinear, sigmoid, rounded to 8 bits; (H, W) uint8."""
    full = F.interpolate(logit[None], size, mode="bilinear", align_corners=False)[0, 0]
    return (full.sigmoid() * 255).round().byte().cpu().numpy()


def score(prediction: np.ndarray, mask: np.ndarray | None, task: str, protocol: Protocol) -> dict:
    """An image's metrics; {} without a mask."""
    if mask is None:
        return {}
    if task == "shadow":
        return score_shadow(prediction, mask)
    return score_objects(prediction, mask, protocol)


def score_map(pair: Pair, task: str, scale: int) -> dict:
    """Score a saved map, its levels times `scale`, under the full-size protocol.

    A map of another size than the mask is resized bilinearly.
    """
    mask = read_mask(pair.mask)
    grey = read_grey(pair.image)[0].point(lambda v: v * scale)
    grey = grey.resize(mask.size, Image.BILINEAR)  # a copy where sizes agree
    return score(np.asarray(grey), foreground(mask, FULL_SIZE, 0), task, FULL_SIZE)


# -------------------------------------------------------------------------------------------------
# The script


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to score")
    source = group.add_mutually_exclusive_group(required=True).add_argument
    what = group.add_argument
    how = parser.add_argument_group("how to score it").add_argument
    output = parser.add_argument_group("what to write").add_argument
    machine = add_machine_options(parser)
    # fmt: off
    source("--ckpt", nargs="+", help="runs or checkpoints of train.py, or of the authors' code")
    source("--maps", type=Path, help="saved maps to score, MAPS/<dataset>/<image's name>.png")
    what("--sam-checkpoint", help="SAM's weights (default: the file used in training)")
    what("--data", nargs="+", help=f"{DATA_HELP}, folders above several, or photographs (default: what it was validated on)")
    how("--protocol", choices=PROTOCOLS, help="see above (default: paper; with --maps full-size)")
    how("--precision", choices=PRECISIONS, help="of the network (default: fp32, so that a table does not depend on the card)")
    how("--task", choices=TASKS, help="what --maps show: objects, or shadows, scored by BER (default: sod)")
    output("--csv", type=Path, help="table to append the rows to, in full precision")
    output("--save", type=Path, help="new or empty folder for 8-bit maps at each image's own size, <dataset>/<image's name>.png, and overview pictures")
    machine("--batch-size", type=number(1), default=2, help="images at a time (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    if WORLD > 1:
        raise InputError("evaluate.py runs in one process; start it with python, not torchrun")
    if args.maps:
        if args.save or args.sam_checkpoint or args.precision or args.protocol == "paper":
            raise InputError(
                "--maps: goes without --save, --sam-checkpoint, --precision and --protocol paper"
            )
        if not args.data:
            raise InputError("--data: pass the datasets that the maps belong to")
    else:
        if args.task:
            raise InputError("--task: goes with --maps; a checkpoint knows its own")
        if args.save and len(args.ckpt) > 1:
            raise InputError("--save: takes the maps of one --ckpt; run the others one by one")
        args.precision = args.precision or "fp32"
        check_device(args)
    if args.save and args.save.exists() and entries(args.save):
        raise InputError(f"--save: {args.save} is not empty; pass a new folder")
    args.task = args.task or "sod"
    args.protocol = PROTOCOLS[args.protocol or ("full-size" if args.maps else "paper")]
    if args.csv:
        append_csv(args.csv)  # refuses another program's table before anything is computed
    return args


def main() -> None:
    args = parse_arguments()
    protocol = args.protocol
    say(f"protocol: {protocol.name}")
    say(f"task: {args.task}" if args.maps else f"precision: {args.precision}")
    unread = 0
    for source, dataset, rows in score_saved_maps(args) if args.maps else score_checkpoints(args):
        if any(rows):
            metrics = average(rows, protocol)
            print_metrics(dataset.name, len(rows), metrics, protocol)
            if args.csv:
                row = dict(
                    model=source,
                    dataset=dataset.name,
                    images=len(rows),
                    **metrics,
                    protocol=protocol.name,
                    precision=args.precision,
                )
                append_csv(args.csv, row)
            if args.save:
                save_overview(dataset, rows, args.save)
        if args.save:
            say(f"{dataset.name}: {len(rows)} maps in {args.save / dataset.name}")
        unread += len(dataset.pairs) - len(rows)
    if unread:
        raise InputError(
            f"{unread} photographs could not be read, see above; the others are predicted"
        )


def score_checkpoints(args: Namespace) -> Iterator[tuple]:
    """Predict and score each dataset with each checkpoint: (checkpoint, dataset, rows)."""
    datasets = find_test_sets(args.data, TEST, args) if args.data else []
    for path in map(Path, args.ckpt):
        files = (path / "best.pt", path / "last.pt", path)  # of a run's folder, or a file
        file = next((file for file in files if file.exists()), path)
        model, info = load_checkpoint(file, args.sam_checkpoint)
        model.store_encoder(PRECISIONS[args.precision])
        model.to(args.device)
        say(f"{file}: {info['task']}, {model.config['sam']}, epoch {info.get('epoch', 'unknown')}")
        if not args.data:
            if not info.get("val"):
                raise InputError(
                    f"--ckpt: {file}: trained without a validation set, or with a fraction held out; pass datasets with --data"
                )
            datasets = find_test_sets(info["val"], VALIDATION, args)
        for dataset in datasets:
            rows = score_images(
                model,
                dataset.pairs,
                info["task"],
                args.protocol,
                batch_size=args.batch_size,
                workers=args.workers,
                precision=args.precision,
                save=args.save and args.save / dataset.name,
            )
            yield file, dataset, list(rows)


def score_saved_maps(args: Namespace) -> Iterator[tuple]:
    """Score each dataset's maps, if all are of 0 and 1 as 0 and 255: (folder of maps, dataset, rows)."""
    for dataset in find_test_sets(args.data, TEST, args):
        tops = in_threads(brightest, dataset.pairs, args.workers)
        work = partial(score_map, task=args.task, scale=255 if max(tops) == 1 else 1)
        rows = in_threads(work, dataset.pairs, args.workers)
        yield args.maps, dataset, list(progress(rows, "evaluate", len(dataset.pairs)))


def find_test_sets(roots: list[str], splits: tuple[str, ...], args: Namespace) -> list["ImageSet"]:
    """The datasets to score; with --maps, the maps are their images."""
    datasets = find_sets(roots, splits, need_masks=not args.save)
    if len({s.name for s in datasets}) < len(datasets):
        raise InputError(
            f"--data: two datasets have one name, of {[s.name for s in datasets]}; score them one at a time"
        )
    if args.maps:
        datasets = [find_maps(args.maps, s, len(datasets) == 1) for s in datasets]
    for s in datasets:
        say(s)
        check_files(s, args.workers, are_maps=bool(args.maps))
    return datasets


def find_maps(maps: Path, dataset: "ImageSet", is_alone: bool) -> "ImageSet":
    """A dataset with its maps in place of its images.

    They lie in the folder of its name below `maps`; those of a dataset alone may lie in `maps` itself.
    """
    folder = maps / dataset.name
    if is_alone and not folder.exists():
        folder = maps
    images = {pair.name: pair.image for pair in dataset.pairs}
    files = match(images, image_files(folder), more=True)
    pairs = [pair._replace(image=file) for pair, file in zip(dataset.pairs, files, strict=True)]
    return dataset._replace(pairs=pairs)


# -------------------------------------------------------------------------------------------------
# Datasets: two folders said outright, or known by their names

DATA_HELP = "datasets: folders in a known layout, or IMAGES,MASKS (folders, or patterns of files)"
EXTENSIONS = ".avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"

# Folder names of the datasets as people download them, see `matches`. ISTD's train_c, the image
# without its shadow, is no mask.
IMAGE_FOLDERS = (
    "im img imgs img_dir image images input jpegimages original shadowimages train_a test_a"
)
MASK_FOLDERS = (
    "gt gts gt_object groundtruth ground_truth mask masks shadowmasks pixelwisegt_new_png label labels"
    " ann_dir annotation annotations segmentationclass 1st_manual manual1 train_b test_b"
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


class ImageSet(NamedTuple):
    """A dataset."""

    name: str  # in tables
    folder: str  # what --data takes to find it
    split: str | None  # "train", "val", "test", or None where it has no splits
    pairs: list[Pair]  # sorted; all have masks, or none has

    def __str__(self) -> str:
        _, image, mask = self.pairs[0]
        masks = f"masks in {mask.parent}" if mask else "no masks"
        split = f"{self.split} split" if self.split else "no splits"
        return f"{self.name}: {len(self.pairs)} images in {image.parent}, {masks}, {split}"


def named_folders(text: str) -> list[Path]:
    """What --data takes: a path, or the two of IMAGES,MASKS, folders or patterns such as x/*_mask.png."""
    paths = [text] if os.path.exists(text) else text.split(",", 1)
    for path in paths:
        if not (os.path.exists(path) or glob(path)):
            raise InputError(
                f"{path}: no such file or folder; pass the dataset with --data (or --val)"
            )
    return [Path(path) for path in paths]


def find_sets(roots: list[str], splits: tuple[str, ...], need_masks: bool = True) -> list[ImageSet]:
    """The datasets in `roots`.

    Each root is IMAGES,MASKS, the folder of a dataset, with images beside masks or with splits, or a
    folder above several. To predict, also a folder of images alone, or image files.
    """
    files = [root for root in roots if os.path.isfile(root)]
    datasets = [without_masks(Path(files[0]).parent, map(Path, files))] if files else []
    for root in roots:
        paths = named_folders(root)
        if len(paths) == 2:
            folder = os.path.commonpath([os.path.abspath(path) for path in paths])
            datasets.append(ImageSet(name_of(folder), root, None, pair_files(*paths)))
        elif root not in files:
            found = find_split(paths[0], splits) or [without_masks(paths[0])]
            datasets += [s for s in found if s.split or splits != TRAIN] or found
    for s in datasets:
        if need_masks and s.pairs[0].mask is None:
            raise InputError(
                f"{s.folder}: no images beside masks for the {splits[0]} split (evaluate.py --save needs none); {advice(Path(s.folder))}"
            )
    return datasets


def find_split(root: Path, splits: tuple[str, ...]) -> list[ImageSet]:
    """The datasets in a folder: of the first of `splits` that it has, and those without splits."""
    for split in splits:
        found = list(search(root, split))
        if any(s.split for s in found):
            break
    return found


def search(folder: Path, split: str, own_split: str | None = None) -> Iterator[ImageSet]:
    """The datasets of a split, and those without splits, in a folder and below it."""
    images = only(folder, IMAGE_FOLDERS)
    masks = only(folder, MASK_FOLDERS)
    if images is None:
        for below in folders_in(folder):
            yield from search(below, split, split_of(below) or own_split)
    elif own_split in (split, None):
        image_part = split_folder(images, split)
        mask_part = masks and split_folder(masks, split)
        has_parts = image_part != images  # images/train, and masks/train or masks
        if image_part is not None:
            pairs = pair_files(image_part, mask_part, has_parts and mask_part == masks)
            yield ImageSet(name_of(folder), str(folder), split if has_parts else own_split, pairs)


def only(parent: Path, words: str) -> Path | None:
    """The only folder in another whose name matches, or None."""
    folders = [folder for folder in folders_in(parent) if matches(folder, words)]
    if len(folders) > 1:
        names = " and ".join(folder.name for folder in folders)
        raise InputError(f"{parent}: {names}: which? Name the two folders: --data IMAGES,MASKS")
    return folders[0] if folders else None


def split_folder(folder: Path, split: str) -> Path | None:
    """The subfolder of a split, or the folder itself where it has none for splits."""
    has_splits = any(map(split_of, folders_in(folder)))
    return only(folder, SPLIT_FOLDERS[split]) if has_splits else folder


def matches(folder: Path, words: str) -> bool:
    """Whether a folder's name is one of `words`, optionally after a prefix: DUTS-TR matches "tr".

    In any case; -, _ and blanks divide words and are the same.
    """
    name = re.sub(r"[-_ ]+", "_", folder.name.lower())
    return re.fullmatch(rf"(.*_)?({words.replace(' ', '|')})", name) is not None


def split_of(folder: Path) -> str | None:
    """The split that a folder is named after."""
    return next((split for split, words in SPLIT_FOLDERS.items() if matches(folder, words)), None)


def name_of(folder: str | Path) -> str:
    """A dataset's name: its folder's, or the next one's above where a folder only names the split."""
    splits = " ".join(SPLIT_FOLDERS.values()).split()
    names = Path(os.path.abspath(folder)).parts[:0:-1]
    return next((name for name in names if name.lower() not in splits), "data")


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, but for what systems hide: .x, and folders such as @eaDir."""
    try:
        found = sorted(folder.iterdir())
    except PermissionError:
        warn(f"{folder}: skipped, because it cannot be listed")
        return []
    return [f for f in found if not f.name.startswith((".", "@", "__") if f.is_dir() else ".")]


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder."""
    return [entry for entry in entries(folder) if entry.is_dir()]


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, or of a pattern."""
    for entry in entries(folder) if folder.is_dir() else map(Path, sorted(glob(str(folder)))):
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


Files = dict[str, Path]  # by their names: paths below a folder, without extension


def image_files(folder: Path, files: Iterable[Path] | None = None) -> Files:
    """The image files in a folder and below it, or among `files`.

    Names have accents in one form: macOS writes them as characters of their own.
    """
    named = {}
    others = []
    for file in files_below(folder) if files is None else files:
        path = file.relative_to(folder) if folder in file.parents else Path(file.name)
        name = unicodedata.normalize("NFC", path.with_suffix("").as_posix())
        if file.suffix.lower() not in EXTENSIONS.split():
            others.append(file)
        elif name in named:
            raise InputError(
                f"{named[name]} and {file}: one name for two files; pass IMAGES,MASKS, or one folder at a time"
            )
        else:
            named[name] = file
    such = "".join(f", such as {file.name}" for file in others[:1])
    if not named:
        raise InputError(
            f"{folder}: no image files there, but {len(others)} others{such}; {POLYGONS}"
        )
    if others:
        warn(f"{folder}: skipped {len(others)} files that are no images{such}")
    return named


POLYGONS = "polygons or boxes (.json, .xml, .txt) have to be drawn into images first"


def without_masks(folder: Path, files: Iterable[Path] | None = None) -> ImageSet:
    """Images alone, as a dataset."""
    pairs = [Pair(name, file, None) for name, file in image_files(folder, files).items()]
    return ImageSet(name_of(folder), str(folder), None, pairs)


def pair_files(
    image_folder: Path, mask_folder: Path | None, more_masks: bool = False
) -> list[Pair]:
    """The pairs of two folders; with `more_masks`, the second also has those of other images."""
    images = image_files(image_folder)
    masks = [None] * len(images)
    if mask_folder is not None:
        masks = match(images, image_files(mask_folder), more_masks)
    if masks == list(images.values()):
        raise InputError(f"{image_folder}: images and masks are the same; name patterns of each")
    return [Pair(name, images[name], mask) for name, mask in zip(images, masks, strict=True)]


def match(images: Files, others: Files, more: bool = False) -> list[Path]:
    """Each image's mask (or map) by its name, else by its name without shared words.

    With `more`, there may be masks of other images.
    """
    for named in (dict, without_shared_words):
        a = named(images)
        b = named(others)
        if a.keys() <= b.keys():
            if more or len(a) == len(b):
                return [b[name] for name in a]
            break
    alone = []
    for files, partners in ((a, b), (b, a)):
        names = [str(file) for name, file in files.items() if name not in partners]
        alone.append(f"{len(names)}{f' such as {names[0]}' if names else ''}")
    raise InputError(
        f"images without a partner: {alone[0]}; partners without an image: {alone[1]}; names must agree but for words that all share"
    )


def without_shared_words(files: Files) -> Files:
    """Files by their names without the words that all begin or end with: a_1_mask, a_2_mask -> 1, 2.

    Words are divided by -, _, . or a blank. Names that would then be the same stay as they are.
    """
    words = [re.split(r"[-_. ]", Path(name).name) for name in files]
    first = len(os.path.commonprefix(words))
    last = len(os.path.commonprefix([w[::-1] for w in words]))
    short = {}
    for (name, file), w in zip(files.items(), words, strict=True):
        short[str(Path(name).parent / "_".join(w[first : len(w) - last]))] = file
    return short if len(short) == len(files) else files


def advice(root: Path) -> str:
    """What to pass as --data for a folder in no known layout: two folders whose names pair up."""
    images = defaultdict(dict)
    size = defaultdict(int)
    for file in files_below(root):
        if file.suffix.lower() in EXTENSIONS.split():
            images[file.parent][file.stem] = file
            size[file.parent] += file.stat().st_size
    pairs = []
    for one, two in permutations(list(images)[:40], 2):
        with suppress(InputError):
            match(images[one], images[two])
            near = len(os.path.commonpath((one, two)))  # of one split rather than of two
            if size[one] > 2 * size[two]:  # masks are smaller files than photographs
                pairs.append((len(images[one]), near, f"{one},{two}"))
    if not pairs:
        return f"name both, as in --data IMAGES,MASKS or 'x/*.jpg,x/*_mask.png' ({POLYGONS})"
    return f"these folders pair up: --data {shlex.quote(max(pairs)[-1])}"


def plain_name(name: str) -> str:
    """A dataset's name without what folders add: COD10K of COD10K-Test, cod10k_te or COD10K_Dataset."""
    return re.sub(r"[-_](te|test|dataset)$", "", name, flags=re.IGNORECASE).upper()


# -------------------------------------------------------------------------------------------------
# A look at the files: warnings of what changes numbers


def inspect(pair: Pair, size: int, is_map: bool) -> list[str]:
    """Possible problems of an image (or a map) and its mask."""
    image = open_image(pair.image)
    mask_file = open_image(pair.mask)
    mask = read_mask(pair.mask)
    levels = mask.histogram()  # how many pixels have each
    above_0 = sum(levels[1:])
    above_128 = sum(levels[129:])
    problems = {
        "masks are empty": above_0 == 0,
        "masks are empty once resized for the network": (
            above_0 and 0 < size < max(mask.size) and not foreground(mask, PAPER, size).any()
        ),
        "masks have no background": levels[0] == 0,
        "masks shrink by a fifth or more from above 0 (training, paper) to above 128 (full-size)": (
            above_128 < 0.8 * above_0
        ),
        "files differ in size from their masks; both are resized independently": (
            image.size != mask.size
        ),
        "files have more than 8 bits per channel; values above 255 are clipped, so save them with 8": (
            image.mode[0] == "I" or (image.mode == "F" and not is_map)
        ),
        "files are turned by their EXIF, or their masks are; beside a mask it is ignored": (
            orientation(image) != 1 or orientation(mask_file) != 1
        ),
        "masks or maps have colours or a varying alpha, and are read by brightness": (
            not is_grey(mask_file) or (is_map and not is_grey(image))
        ),
        "maps are nowhere above 1; only if all are, 1 counts as 255": (
            is_map and brightest(pair) == 1
        ),
    }
    return [text for text, is_there in problems.items() if is_there]


def is_grey(image: Image.Image) -> bool:
    """Whether an image's grey levels are all that it has: no colours, no varying alpha."""
    pixels = np.asarray(image.convert("RGBA"))
    return bool((pixels[..., :3] == pixels[..., :1]).all() and np.ptp(pixels[..., 3]) == 0)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1: upright, or unreadable."""
    with suppress(Exception):  # broken EXIF raises anything
        return image.getexif().get(0x0112, 1)  # the tag Orientation
    return 1


def check_files(dataset: ImageSet, workers: int, size: int = 0, are_maps: bool = False) -> None:
    """Look at a dataset's files, and warn of what may be wrong; `size` is S, or 0: unknown."""
    name, _, _, pairs = dataset
    if pairs[0].mask is None:
        return
    inspected = in_threads(partial(inspect, size=size, is_map=are_maps), pairs, workers)
    files = defaultdict(list)
    for pair, problems in zip(pairs, progress(inspected, name, len(pairs)), strict=True):
        for problem in problems:
            files[problem].append(pair.image)
    for problem, found in files.items():
        text = f"{name}: {len(found)} of {len(pairs)} {problem} (such as {found[0]})"
        if problem.startswith(("masks are empty", "masks have no")) and len(found) == len(pairs):
            raise InputError(f"{text}; check how {pairs[0].mask.parent} was made")
        warn(text)


# -------------------------------------------------------------------------------------------------
# Tables and pictures

CSV_HEADER = (
    "model,dataset,images,protocol,S,E,wF,MAE,maxF,adpF,meanF,maxE,BER,BER_pooled,precision"
)


def print_metrics(name: str, images: int, metrics: dict[str, float], protocol: Protocol) -> None:
    """Print a dataset's row and, where images and protocol are the paper's, the paper's rows."""
    cells = [f"{column} {value:#.4g}" for column, value in metrics.items()]
    say(f"{name:<20}{images:>6} images  {'  '.join(cells)}")
    for line in PUBLISHED.strip().splitlines() if protocol == PAPER else ():
        model, dataset, count, *row = line.split()
        if (dataset, count) == (plain_name(name), str(images)):
            say(f"  {model} in the paper:  {' '.join(row)}")


def append_csv(path: Path, *rows: dict) -> None:
    """Append rows to a table, numbers in full precision, and at first the header."""
    with path.open("a+", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.seek(0)
        header = file.readline().strip()
        if header not in ("", CSV_HEADER):
            raise InputError(
                f"--csv: {path} was not written by this version of evaluate.py; pass another"
            )
        table = csv.DictWriter(file, CSV_HEADER.split(","))
        if not header:
            table.writeheader()
        table.writerows(rows)


def save_overview(dataset: ImageSet, rows: list[dict], save: Path) -> None:
    """Draw a dataset's worst, median and best image by S-measure or BER, with the maps in `save`."""
    metric = "BER" if "BER" in rows[0] else "S"
    order = np.argsort([row[metric] for row in rows])[:: -1 if metric == "BER" else 1]
    shown = []
    for which, i in (("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1])):
        pair = dataset.pairs[i]
        prediction = np.asarray(open_image(save / dataset.name / f"{pair.name}.png"))
        title = f"{which}: {pair.name}, {metric} {rows[i][metric]:.4g}"
        shown.append((title, read_sample(pair, 256, PAPER), prediction))
    draw_samples(shown, save / f"overview-{dataset.name}.png")


def draw_samples(rows: list[tuple[str, Sample, np.ndarray | None]], path: Path) -> None:
    """Draw rows of (title, sample, prediction or None), squeezed into squares as the network gets them:
    the image with its mask's outline in red, the mask, the prediction."""
    strips = []
    for title, sample, prediction in rows:
        arrays = [a for a in (sample.pixels, sample.mask, prediction) if a is not None]
        panels = [Image.fromarray(a).convert("RGB").resize((196, 196)) for a in arrays]
        outline = panels[1].convert("L").filter(ImageFilter.FIND_EDGES)
        panels[0].paste("red", mask=outline)
        ImageDraw.Draw(panels[0]).text(
            (4, 4), title.encode("ascii", "replace"), "white", stroke_width=1, stroke_fill="black"
        )
        strips.append(np.hstack([ImageOps.expand(panel, 2, "white") for panel in panels]))
    save_image(Image.fromarray(np.vstack(strips)), path)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    write_atomically(path, lambda file: image.save(file, "PNG"))


# -------------------------------------------------------------------------------------------------
# What both scripts share: threads, messages, options, errors, stopping


def launched_as(environment: Mapping) -> tuple[int, int, int, int]:
    """World size, rank, and both within this machine, as torchrun or another launcher says.

    Another tool's WORLD_SIZE, without RANK, does not count.
    """
    world, rank, local_world, local_rank = (
        int(environment.get(name) or 0)
        for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    )
    if world <= 1 or not environment.get("RANK"):
        return 1, 0, 1, 0
    return world, rank, local_world or 1, local_rank


WORLD, RANK, LOCAL_WORLD, LOCAL_RANK = launched_as(os.environ)
tqdm.set_lock(threading.RLock())  # its own is a lock between processes


def in_threads(work: Callable, jobs: Iterable, threads: int) -> Iterator:
    """map(work, jobs) in order, by a pool of threads (0: by this one), never far ahead.

    `jobs` is consumed in this thread, so inference mode applies.
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


def progress(items: Iterable, what: str, total: int) -> tqdm:
    """`items` under a progress bar; where stderr is no terminal, a line every five minutes.

    Of torchrun's processes the first draws it.
    """
    look = dict(leave=False)
    if not (sys.stderr and sys.stderr.isatty()):
        line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left{postfix}\n"
        look |= dict(delay=300, mininterval=300, maxinterval=300, bar_format=line)
    return tqdm(items, what, total, disable=RANK > 0, **look)


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
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(least: float, kind: type = int) -> Callable:
    """The type of an option that is a number."""

    def number(text: str) -> float:
        if not least <= kind(text) < 2**32:
            raise ValueError
        return kind(text)

    return number


def add_machine_options(parser: Parser) -> Callable:
    """The options both scripts have; returns what adds more of the kind."""
    cores = min(8, (os.cpu_count() or 1) // LOCAL_WORLD)
    add = parser.add_argument_group(
        "machine; results change by rounding error at most"
    ).add_argument
    # fmt: off
    add("--workers", type=number(0), default=cores, help="threads of a process that read images, and as many that score them (default: %(default)s)")
    add("--device", help="cuda, cuda:1, cpu, ... (default: a GPU if there is one)")
    # fmt: on
    return add


def check_device(args: Namespace) -> None:
    """Choose a device where --device does not, and try it; each process of several takes its own GPU."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.device == "cpu" and torch.version.cuda:
            warn(
                f"no GPU is found, or its driver is too old for CUDA {torch.version.cuda}: running on the CPU"
            )
    if args.device.startswith("cuda:") and WORLD > 1:
        raise InputError(f"--device: each process takes a GPU of its own; leave out {args.device}")
    try:
        if args.device == "cuda" and WORLD > 1:  # Slurm may show each process one GPU
            args.device = f"cuda:{LOCAL_RANK if torch.cuda.device_count() > 1 else 0}"
        if args.device.startswith("cuda:"):
            torch.cuda.set_device(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device: {args.device} cannot be used here ({one_line(error)}); try cpu"
        ) from error


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def on_stop(message: Callable) -> None:
    """Have Ctrl-C and SIGTERM end the script at once: one line, exit code 130.

    Sound because every file is written whole or not at all. Not in a notebook, whose variables
    would be lost, and not where a signal is ignored, as under nohup.
    """

    def stop(*_) -> None:
        start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
        os.write(2, f"{start}{Path(sys.argv[0]).name}: {message()}\n".encode(errors="replace"))
        os._exit(130)

    # Python would not run a handler while another process is waited for.
    set_handlers({number: stop if RANK == 0 else signal.SIG_DFL for number in STOP_SIGNALS})


def set_handlers(handlers: dict) -> None:
    """Set the handlers of signals, in the main thread of a script."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and not hasattr(builtins, "__IPYTHON__"):
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)


def run(main: Callable) -> None:
    """Run a script. Errors the user can fix are one line and exit code 2; others keep their traceback."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    on_stop(lambda: "stopped")
    with suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        return
    except Exception as error:
        message = what_to_do(error)
        if message is None:
            raise
    finally:
        set_handlers(handlers)
    message = f"{Path(sys.argv[0]).name}: error: {message}"
    if RANK > 0:  # what all processes meet, the first says, and torchrun ends this one meanwhile
        time.sleep(3)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it as its last words
        details = dict(py_callstack=message, timestamp=str(int(time.time())))
        failure = dict(message=dict(message=message, extraInfo=details))
        Path(file).write_text(json.dumps(failure))
    else:
        print(message, file=sys.stderr)
    sys.exit(2)


def what_to_do(error: Exception) -> str | None:
    """One line about an error that the user can fix; None for others."""
    text = str(error)
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    out_of_memory = ("allocate", "out of memory", "ALLOC_FAILED")  # a CPU's, CUDA's, cuBLAS's
    is_torchs = isinstance(error, RuntimeError) and any(words in text for words in out_of_memory)
    if is_torchs or isinstance(error, MemoryError):
        return f"too little memory ({one_line(error)}); lower --batch-size, or train with --grad-checkpoint, --accumulate or a lower --size"
    return None


if __name__ == "__main__":
    run(main)
