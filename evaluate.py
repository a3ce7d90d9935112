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
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from glob import glob
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import py_sod_metrics
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFilter, ImageOps
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

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
torch.backends.cudnn.allow_tf32 = False  # float32 is float32, also in convolutions
# One kernel on every card: cuDNN's attention refuses a mask that needs a gradient, so a Hopper card
# would train with one kernel and validate with another.
torch.backends.cuda.enable_cudnn_sdp(False)
# The metrics handle one-sided masks, but NumPy warns on the way.
warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)


def run_network(network: Callable, images: Tensor, precision: str) -> Tensor:
    """The network's logits, float32, computed under autocast."""
    enabled = precision != "fp32"
    with torch.autocast(images.device.type, PRECISIONS[precision], enabled=enabled):
        return network(images)


# -------------------------------------------------------------------------------------------------
# The metrics of an image, of a dataset, and the paper's

balanced_error = py_sod_metrics.BERHandler(with_dynamic=False, with_adaptive=False)


def to_grey(prediction: np.ndarray) -> np.ndarray:
    """A prediction, floats in [0, 1] (paper) or uint8 (full-size), scaled to [0, 255]."""
    return prediction if prediction.dtype == np.uint8 else prediction.astype(np.float64) * 255


def score_objects(
    prediction: np.ndarray, mask: np.ndarray, protocol: Protocol
) -> dict[str, float | np.ndarray]:
    """An image's metrics for salient or camouflaged objects.

    E and F are curves over 256 thresholds. The prediction is stretched to [0, 1] first, as in the
    field's toolboxes: a map's offset and contrast do not count, and MAE is no plain mean of
    |prediction - mask|. A metric that is nan, as S is where all foreground lies in the last row or
    column, counts 0 (source: release).

    Args:
        prediction: (H, W), floats in [0, 1] (paper) or uint8 (full-size).
        mask: (H, W) bool.
    """
    truth = mask.astype(np.uint8) * 255
    prediction, mask = py_sod_metrics.utils.prepare_data(to_grey(prediction), truth)

    def result_of(metric) -> dict:
        metric.step(prediction, mask, normalize=False)
        return metric.get_results()

    with np.errstate(all="ignore"):
        e_measure = result_of(py_sod_metrics.Emeasure())["em"]["curve"]
        row = dict(
            S=result_of(py_sod_metrics.Smeasure())["sm"],
            E=e_measure * (mask.size > 1),  # it divides by the number of pixels less one
            # What py_sod_metrics calls beta is beta^2.
            wF=result_of(py_sod_metrics.WeightedFmeasure(beta=protocol.beta_squared))["wfm"],
            MAE=result_of(py_sod_metrics.MAE())["mae"],
        )
        if protocol.full_size:
            handler = py_sod_metrics.FmeasureHandler(
                with_dynamic=True, with_adaptive=True, beta=0.3
            )
            f_measure = result_of(py_sod_metrics.FmeasureV2({"F": handler}))["F"]
            row |= dict(F=f_measure["dynamic"], adpF=f_measure["adaptive"])
    return {name: np.nan_to_num(value) for name, value in row.items()}


def score_shadow(prediction: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """An image's BER in percent, and the pixels it counts; shapes as in `score_objects`.

    The prediction is cut at 125/255 as it is (source: release). An image without shadow, or with
    nothing else, counts 50 at least.
    """
    positive = np.count_nonzero(mask)
    found = to_grey(prediction) > 125
    counts = py_sod_metrics.FmeasureV2.get_statistics(found, mask, positive, mask.size - positive)
    with np.errstate(all="ignore"):
        return counts | {"BER": 100 * np.nan_to_num(balanced_error(**counts))}


def average(rows: list[dict], protocol: Protocol) -> dict[str, float]:
    """A dataset's metrics from its images'.

    E and meanF are the mean, maxE and maxF the largest value of the images' mean curve over the
    thresholds. BER is in percent: the mean over images; BER_pooled is over all pixels.
    """

    def mean(name: str) -> float | np.ndarray:
        return sum(row[name] for row in rows) / len(rows)

    if "BER" in rows[0]:
        metrics = dict(BER=mean("BER"))
        if protocol.full_size:
            counts = {name: sum(row[name] for row in rows) for name in ("tp", "fp", "tn", "fn")}
            metrics["BER_pooled"] = 100 * balanced_error(**counts)
    else:
        e = mean("E")
        metrics = dict(S=mean("S"), E=e.mean(), wF=mean("wF"), MAE=mean("MAE"))
        if protocol.full_size:
            f = mean("F")
            metrics |= dict(maxF=f.max(), adpF=mean("adpF"), meanF=f.mean(), maxE=e.max())
    return {name: float(value) for name, value in metrics.items()}


METRICS = ("S", "E", "wF", "MAE", "maxF", "adpF", "meanF", "maxE", "BER", "BER_pooled")

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

    name: str  # path below the dataset's folder, without extension
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
    to_score: np.ndarray  # float32 in [0, 1], (S, S) (paper); uint8, of the mask's size (full-size)
    to_save: np.ndarray | None  # uint8, of the image's own size


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
    read = partial(read_sample, size=model.config["image_size"], protocol=protocol)
    finish = partial(save_and_score, task=task, protocol=protocol, save=save)
    samples = in_threads(read, pairs, workers)
    predictions = predict(model, samples, protocol, batch_size, precision, save is not None)
    rows = in_threads(finish, predictions, workers)
    yield from progress(rows, "evaluate", len(pairs))


def open_image(path: Path, mode: str | None = None) -> Image.Image:
    """An image file, converted to `mode` if given. Alpha is dropped (source: release)."""
    try:
        image = Image.open(path)
        image.load()
        return image.convert(mode) if mode else image
    except Exception as error:  # broken files raise anything
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from error


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


def read_grey(path: Path) -> tuple[Image.Image, bool]:
    """A mask or map as 8-bit grey (floats of at most 1 times 255); also whether its file is lossy."""
    image = open_image(path)
    lossy = image.format in LOSSY or image.info.get("compression") == "jpeg"  # the latter in TIFF
    if image.mode == "F" and image.getextrema()[1] <= 1:
        image = image.point(lambda v: v * 255 + 0.5)
    return image.convert("L"), lossy


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
        mask = mask.resize((size, size), Image.Resampling.NEAREST)
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
    return Sample(pair, (image.height, image.width), resize_image(image, size), mask)


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """An array as a tensor on the device; the program does not wait for the copy to a GPU."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_input(pixels: list[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
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
    save: bool,
) -> Iterator[Prediction]:
    """Run the network over samples, in their order."""
    model.eval()
    device = next(model.parameters()).device
    samples = filter(None, samples)
    while batch := list(islice(samples, batch_size)):
        images = to_input([sample.pixels for sample in batch], device)
        for sample, logit in zip(batch, run_network(model, images, precision), strict=True):
            if not logit.isfinite().all():
                raise InputError(
                    f"{sample.pair.image}: the network's output is not finite; its weights are broken,"
                    " or --precision fp16 overflows: try bf16 or fp32"
                )
            if sample.mask is not None and protocol.full_size:
                to_score = to_map(logit, sample.mask.shape)
            else:
                to_score = logit[0].sigmoid().cpu().numpy()
            yield Prediction(sample, to_score, to_map(logit, sample.size) if save else None)


def to_map(logit: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logit (1, S, S) as a map of `size` (H, W): bilinear, sigmoid, rounded to 8 bits; (H, W) uint8."""
    full = F.interpolate(logit[None], size, mode="bilinear", align_corners=False)[0, 0]
    return (full.sigmoid() * 255).round().byte().cpu().numpy()


def save_and_score(
    prediction: Prediction, task: str, protocol: Protocol, save: Path | None
) -> dict:
    """Write an image's map to `save`, and score it; {} for an image without a mask."""
    sample, to_score, to_save = prediction
    if save is not None:
        path = save / f"{sample.pair.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: Image.fromarray(to_save).save(file, "PNG"))
    return {} if sample.mask is None else score(to_score, sample.mask, task, protocol)


def score(prediction: np.ndarray, mask: np.ndarray, task: str, protocol: Protocol) -> dict:
    """An image's metrics."""
    if task == "shadow":
        return score_shadow(prediction, mask)
    return score_objects(prediction, mask, protocol)


def score_map(pair: Pair, task: str, scale: int) -> dict:
    """Score a saved map under the full-size protocol; one of another size is resized bilinearly.

    Pixels count `scale` times: 255 for maps of 0 and 1.
    """
    grey = read_grey(pair.image)[0].point(lambda v: v * scale)
    mask = read_mask(pair.mask)
    if grey.size != mask.size:
        grey = grey.resize(mask.size, Image.Resampling.BILINEAR)
    return score(np.asarray(grey), foreground(mask, FULL_SIZE, 0), task, FULL_SIZE)


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
    source.add_argument("--ckpt", type=existing, nargs="+", help="runs or checkpoints of train.py, or of the authors' code")
    source.add_argument("--maps", type=existing, help="saved maps to score, MAPS/<dataset>/<image's name>.png")
    what.add_argument("--sam-checkpoint", type=existing, help="SAM's weights (default: the file used in training)")
    what.add_argument("--data", nargs="+", help=f"{DATA_HELP}, folders above several, or photographs (default: what it was validated on)")
    how.add_argument("--protocol", choices=tuple(PROTOCOLS), help="see above (default: paper; with --maps full-size)")
    how.add_argument("--precision", choices=tuple(PRECISIONS), help="of the network (default: fp32, so that a table does not depend on the card)")
    how.add_argument("--task", choices=("sod", "cod", "shadow"), help="what --maps show: objects, or shadows, scored by BER (default: sod)")
    output.add_argument("--csv", type=Path, help="table to append the rows to, in full precision")
    output.add_argument("--save", type=Path, help="folder for 8-bit maps at each image's own size, <dataset>/<image's name>.png, and overview pictures")
    machine.add_argument("--batch-size", type=number(1), default=2, help="images at a time")
    # fmt: on
    args = parser.parse_args()
    if WORLD > 1:
        raise InputError("evaluate.py runs in one process; start it with python, not torchrun")
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
        args.protocol = args.protocol or "paper"
        args.precision = args.precision or "fp32"
        check_device(args)
    if args.csv is not None:
        check_csv(args.csv)
    return args


def main() -> None:
    args = parse_arguments()
    protocol = PROTOCOLS[args.protocol]
    say(f"protocol: {protocol.name}")
    say(f"task: {args.task}" if args.maps else f"precision: {args.precision}")
    header = None
    unread = 0
    for source, dataset, rows in score_saved_maps(args) if args.maps else score_checkpoints(args):
        if rows and rows[0]:
            metrics = average(rows, protocol)
            if header != metrics.keys():
                header = metrics.keys()
                print_row("dataset", "images", dict(zip(header, header, strict=True)))
            print_metrics(dataset.name, len(rows), metrics, protocol)
            if args.csv is not None:
                row = dict(model=source, dataset=dataset.name, images=len(rows))
                row |= dict(protocol=protocol.name, precision=args.precision)
                append_csv(args.csv, row | metrics)
            if args.save is not None:
                save_overview(dataset, rows, args.save)
        unread += len(dataset.pairs) - len(rows)
        if args.save is not None:
            say(f"{dataset.name}: {len(rows)} maps in {args.save / dataset.name}")
    if args.ckpt and args.device.startswith("cuda"):
        say(f"peak memory: {peak_memory(args.device):.0f} MB")
    if unread:
        raise InputError(
            f"{unread} photographs could not be read, see above; the others are predicted"
        )


def score_checkpoints(args: argparse.Namespace) -> Iterator[tuple[Path, "ImageSet", list[dict]]]:
    """Predict and score each dataset with each checkpoint: (checkpoint, dataset, rows)."""
    datasets = find_test_sets(args.data, TEST, args) if args.data else []
    for file in map(checkpoint_in, args.ckpt):
        model, info = load_checkpoint(file, args.sam_checkpoint)
        model.store_encoder(PRECISIONS[args.precision])
        model.to(args.device)
        say(f"{file}: {info['task']}, {model.config['sam']}, epoch {info.get('epoch', 'unknown')}")
        if args.data is None:
            if not info.get("val"):
                raise InputError(
                    f"--ckpt: {file}: trained without a validation set, or with a fraction held out; pass datasets with --data"
                )
            datasets = find_test_sets(info["val"], VALIDATION, args)
        if args.save is not None:
            prepare_save(args.save, datasets)
        for dataset in datasets:
            rows = score_images(
                model,
                dataset.pairs,
                info["task"],
                PROTOCOLS[args.protocol],
                batch_size=args.batch_size,
                workers=args.workers,
                precision=args.precision,
                save=args.save and args.save / dataset.name,
            )
            yield file, dataset, list(rows)


def score_saved_maps(args: argparse.Namespace) -> Iterator[tuple[Path, "ImageSet", list[dict]]]:
    """Score each dataset's maps, those of 0 and 1 as 0 and 255: (folder of maps, dataset, rows)."""
    for dataset in find_test_sets(args.data, TEST, args):
        levels = in_threads(
            lambda pair: read_grey(pair.image)[0].getextrema()[1], dataset.pairs, args.workers
        )
        tops = list(levels)
        if 1 in tops and max(tops) > 1:
            file = dataset.pairs[tops.index(1)].image
            warn(
                f"{dataset.name}: {tops.count(1)} maps are of 0 and 1 among others, such as {file}"
            )
        if args.task == "shadow" and 1 != max(tops) <= 125:
            warn(
                f"{dataset.name}: no map is brighter than {max(tops)} of 255; BER cuts them at 125, so"
                " all are black to it"
            )
        work = partial(score_map, task=args.task, scale=255 if max(tops) == 1 else 1)
        rows = in_threads(work, dataset.pairs, args.workers)
        yield args.maps, dataset, list(progress(rows, "evaluate", len(tops)))


def find_test_sets(
    roots: list[str], splits: tuple[str, ...], args: argparse.Namespace
) -> list["ImageSet"]:
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
        check_files(s, args.workers, are_maps=args.maps is not None)
    return datasets


def find_maps(maps: Path, dataset: "ImageSet", alone: bool) -> list[Pair]:
    """A dataset's maps in place of its images.

    Maps lie in its folder under `maps` (DUTS-TE, or DUTS, in any case), or in `maps` itself if that
    has no folders and the dataset is alone.
    """
    folders = [f for f in entries(maps) if f.is_dir()]
    fitting = [f for f in folders if plain_name(f.name) == plain_name(dataset.name)]
    if alone and not folders:
        fitting = [maps]
    if len(fitting) != 1:
        found = f"{len(fitting)} folders that fit" if fitting else "no folder for"
        there = ", ".join(f.name for f in fitting or folders)
        raise InputError(f"--maps: {maps} has {found} {dataset.name}: {there}")
    images = {pair.name: pair.image for pair in dataset.pairs}
    map_of = match(
        images, image_files(fitting[0]), f"{dataset.folder} and --maps {fitting[0]}", True
    )
    return [pair._replace(image=map_of[pair.name]) for pair in dataset.pairs]


def checkpoint_in(path: Path) -> Path:
    """A checkpoint, or the best one in a run's folder, else the last."""
    found = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
    return found[0] if found else path


def prepare_save(save: Path, datasets: list["ImageSet"]) -> None:
    """Make the folder of --save; refuse one with other files than these datasets' maps, or with these."""
    ours = {save / s.name / f"{pair.name}.png" for s in datasets for pair in s.pairs}
    ours |= {save / f"overview-{s.name}.png" for s in datasets}
    read = {file.resolve() for s in datasets for pair in s.pairs for file in pair[1:] if file}
    there = [file for file in files_below(save) if file.suffix != ".csv"] if save.exists() else []
    for file in there:
        if file not in ours or file.resolve() in read:
            raise InputError(
                f"--save: {file} is none of these datasets' maps; pass a new or an empty folder"
            )
    save.mkdir(parents=True, exist_ok=True)


# -------------------------------------------------------------------------------------------------
# Datasets: two folders said outright, or known by their names

DATA_HELP = "datasets: folders in a known layout, or IMAGES,MASKS (folders, or patterns of files)"
UNREADABLE = {"BUFR", "EMF", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow only recognises these formats
FORMATS = Image.registered_extensions()
EXTENSIONS = {end for end, kind in FORMATS.items() if kind in Image.OPEN.keys() - UNREADABLE}

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


def existing(text: str) -> Path:
    """The type of an option that is a file or a folder."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return Path(text)


def named_folders(text: str | Path) -> list[Path]:
    """What --data takes: a path, or the two of IMAGES,MASKS, folders or patterns such as x/*_mask.png."""
    text = str(text)
    commas = [i for i, character in enumerate(text) if character == ","]
    for paths in ([text], *([text[:i], text[i + 1 :]] for i in commas)):
        if all(os.path.exists(path) or glob(path) for path in paths):
            return [Path(path) for path in paths]
    raise InputError(f"{text}: no such file or folder; pass the dataset with --data (or --val)")


def find_sets(roots: list[str], splits: tuple[str, ...], need_masks: bool = True) -> list[ImageSet]:
    """The datasets in `roots`.

    Each root is IMAGES,MASKS or the folder of a dataset, with images beside masks or with splits.
    To validate or test on, also a folder above several, a folder of images alone, or image files.
    """
    files = [Path(root) for root in roots if os.path.isfile(root)]
    datasets = without_masks(files[0].parent, files) if files else []
    for root in roots:
        paths = named_folders(root)
        if len(paths) == 1 and paths[0].is_file():
            continue
        if len(paths) == 2:
            if paths[0] == paths[1]:
                raise InputError(
                    f"--data: {root}: images and masks are the same; name patterns of each"
                )
            holder = Path(os.path.commonpath([os.path.abspath(path) for path in paths]))
            datasets.append(ImageSet(name_of(holder), root, None, pair_files(*paths)))
            continue
        found = find_split(paths[0], splits)
        if splits == TRAIN:
            found = [s for s in found if s.split] or found
            if len(found) > 1 and found[0].split is None:
                names = " ".join(s.folder for s in found[:3])
                raise InputError(
                    f"--data: {root} contains {len(found)} datasets; pass one or more, as in --data {names}"
                )
        elif not found and not need_masks:
            found = without_masks(paths[0], files_below(paths[0]))
        if not found or (need_masks and any(s.pairs[0].mask is None for s in found)):
            todo = "; evaluate.py --save predicts without masks" if splits == TEST else ""
            raise InputError(
                f"{root}: no images beside masks for the {splits[0]} split; {advice(paths[0])}{todo}"
            )
        datasets += found
    if not datasets:
        raise InputError(f"--data: {files[0]} is no image, and neither is any other")
    if files and need_masks:
        raise InputError(
            f"--data: {files[0]} has no mask; evaluate.py --save predicts without masks"
        )
    return datasets


def find_split(root: Path, splits: tuple[str, ...]) -> list[ImageSet]:
    """The datasets in a folder, of the first of `splits` that it has, and those without splits."""
    for split in splits:
        found = list(search(root, split))
        if any(s.split for s in found):
            break
    return found


def search(
    folder: Path, split: str, own_split: str | None = None, depth: int = 4
) -> Iterator[ImageSet]:
    """The datasets of a split, and those without splits, in a folder and up to four levels below."""
    image_folder = only(folder, subfolders(folder, IMAGE_FOLDERS))
    mask_folder = only(folder, subfolders(folder, MASK_FOLDERS))
    if image_folder is None:
        for below in entries(folder) if depth else ():
            if below.is_dir():
                yield from search(below, split, split_of(below) or own_split, depth - 1)
        return
    if own_split not in (split, None):
        return
    images = split_folder(image_folder, split)
    masks = mask_folder and split_folder(mask_folder, split)
    if images != image_folder:  # images/train, and masks/train or masks
        own_split = split
    if images is not None:
        pairs = pair_files(images, masks, masks == mask_folder and images != image_folder)
        yield ImageSet(name_of(folder), str(folder), own_split, pairs)


def only(parent: Path, folders: list[Path]) -> Path | None:
    """The only one of `folders`, or None."""
    if len(folders) > 1:
        names = " and ".join(folder.name for folder in folders)
        raise InputError(f"{parent}: {names}: which? Name the two folders: --data IMAGES,MASKS")
    return folders[0] if folders else None


def split_folder(folder: Path, split: str) -> Path | None:
    """The subfolder of a split, or the folder itself where it has none for splits."""
    parts = [f for f in entries(folder) if f.is_dir() and split_of(f)]
    return only(folder, [f for f in parts if split_of(f) == split]) if parts else folder


def matches(folder: Path, words: str) -> bool:
    """Whether a folder's name is one of `words`, optionally after a prefix: DUTS-TR matches "tr".

    In any case; -, _ and blanks divide words and are the same.
    """
    name = re.sub(r"[-_ ]+", "_", folder.name.lower())
    return re.fullmatch(rf"(.*_)?({words.replace(' ', '|')})", name) is not None


def subfolders(folder: Path, words: str) -> list[Path]:
    """The folders in a folder whose names match."""
    return [f for f in entries(folder) if f.is_dir() and matches(f, words)]


def split_of(folder: Path) -> str | None:
    """The split that a folder is named after."""
    return next((split for split, words in SPLIT_FOLDERS.items() if matches(folder, words)), None)


def name_of(folder: Path) -> str:
    """A dataset's name: its folder's, or the next one's above where a folder only names the split."""
    parts = Path(os.path.abspath(folder)).parts[1:] or ("data",)
    splits = " ".join(SPLIT_FOLDERS.values()).split()
    return next((name for name in parts[::-1] if name.lower() not in splits), parts[-1])


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, but for what systems hide: .x, and folders such as @eaDir."""
    try:
        found = sorted(folder.iterdir())
    except PermissionError:
        warn(f"{folder}: skipped, because it cannot be listed")
        return []
    hidden = (".", "@", "__")
    return [f for f in found if not f.name.startswith(hidden if f.is_dir() else ".")]


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, or of a pattern."""
    for entry in entries(folder) if folder.is_dir() else map(Path, sorted(glob(str(folder)))):
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


def name_in(folder: Path, file: Path) -> str:
    """A file's path below a folder without extension."""
    name = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    return name.with_suffix("").as_posix()


def image_files(folder: Path, files: Iterable[Path] | None = None) -> dict[str, Path]:
    """The image files in a folder and below it, or among `files`, by their names."""
    named: dict[str, Path] = {}
    others = []
    for file in files_below(folder) if files is None else files:
        name = name_in(folder, file)
        if file.suffix.lower() not in EXTENSIONS:
            others.append(file)
        elif name in named:
            raise InputError(
                f"{named[name]} and {file}: the same name but for the extension; name the folders of images"
                " and masks apart (--data IMAGES,MASKS), and photographs one folder at a time"
            )
        else:
            named[name] = file
    if others and not named and others[0].suffix.lower() in POLYGONS:
        raise InputError(f"{others[0]}: {NO_MASKS}")
    if others:
        warn(
            f"{others[0].parent}: skipped {len(others)} files whose extensions Pillow does not know, such as"
            f" {others[0].name}"
        )
    return named


POLYGONS = (".json", ".xml", ".txt")
NO_MASKS = "polygons or boxes, not masks; draw them into images first"


def without_masks(folder: Path, files: Iterable[Path]) -> list[ImageSet]:
    """The image files among `files` as a dataset, if there are any."""
    pairs = [Pair(name, file, None) for name, file in image_files(folder, files).items()]
    return [ImageSet(name_of(folder), str(folder), None, pairs)] if pairs else []


def pair_files(
    image_folder: Path, mask_folder: Path | None, more_masks: bool = False
) -> list[Pair]:
    """The pairs of two folders; with `more_masks`, the second also has those of other images."""
    images = image_files(image_folder)
    if not images:
        raise InputError(f"{image_folder}: contains no image files")
    if mask_folder is None:
        return [Pair(name, file, None) for name, file in images.items()]
    where = f"{image_folder} and {mask_folder}"
    mask_of = match(images, image_files(mask_folder), where, more_masks)
    return [Pair(name, file, mask_of[name]) for name, file in images.items()]


def match(
    images: dict[str, Path], others: dict[str, Path], where: str, more: bool
) -> dict[str, Path]:
    """Each image's mask (or map) by its name, else by its name without shared words.

    With `more`, there may be masks of other images.
    """
    for key in (composed, without_shared_words):
        other_of = dict(zip(key(others), others.values(), strict=True))
        keys = dict(zip(key(images), images, strict=True))
        if (
            len(other_of) == len(others)
            and len(keys) == len(images)
            and keys.keys() <= other_of.keys()
        ):
            if more or len(others) == len(images):
                return {name: other_of[key] for key, name in keys.items()}
            break
    alone = [
        sorted(images[keys[key]].name for key in keys.keys() - other_of.keys()),
        sorted(other_of[key].name for key in other_of.keys() - keys.keys()),
    ]
    alone = [f"{len(names)}{f' such as {names[0]}' if names else ''}" for names in alone]
    raise InputError(
        f"{where}: images without a partner: {alone[0]}; partners without an image: {alone[1]};"
        " names must agree but for words that all of them share"
    )


def composed(names: Iterable[str]) -> list[str]:
    """Names with accents in one form; macOS writes them as characters of their own."""
    return [unicodedata.normalize("NFC", name) for name in names]


def without_shared_words(names: Iterable[str]) -> list[str]:
    """Names without the words that all of them begin or end with: a_1_mask, a_2_mask -> 1, 2.

    Words of a file's name are divided by -, _, . or a blank.
    """
    paths = [Path(name) for name in composed(names)]
    words = [re.split(r"[-_. ]", path.name) for path in paths]
    first = len(os.path.commonprefix(words))
    last = len(os.path.commonprefix([w[::-1] for w in words]))
    return [
        str(p.parent / "_".join(w[first : len(w) - last]))
        for p, w in zip(paths, words, strict=True)
    ]


def advice(root: Path) -> str:
    """What to pass as --data for a folder in no known layout."""
    below = defaultdict(dict)
    files = list(islice(files_below(root), 50_000))
    for file in files:
        if file.suffix.lower() in EXTENSIONS:
            for folder in [f for f in file.parents if f.is_relative_to(root)]:
                below[folder][name_in(folder, file)] = file
    photos = [folder for folder, images in below.items() if are_photographs(images) == {True}]
    masks = [folder for folder, images in below.items() if are_photographs(images) == {False}]
    pairs = []
    for one, two in product(photos[:40], masks[:40]):
        with suppress(InputError):
            match(below[one], below[two], "", True)
            pairs.append((len(below[one]), len(os.path.commonpath((one, two))), f"{one},{two}"))
    if not pairs:
        for file in files:
            if file.suffix.lower() in POLYGONS:
                return f"{file.name}: {NO_MASKS}"
    folders = max(pairs)[-1] if pairs else "IMAGES,MASKS"
    return f"name both folders, as in --data {shlex.quote(folders)}"


def are_photographs(images: dict[str, Path]) -> set[bool]:
    """Whether the first and the last of some images have many colours."""
    answers = set()
    for file in list(images.values())[:: max(1, len(images) - 1)]:
        thumbnail = open_image(file, "RGB").resize((64, 64), Image.Resampling.NEAREST)
        answers.add(thumbnail.getcolors(100) is None)
    return answers


def plain_name(name: str) -> str:
    """A dataset's name without what folders add: COD10K of COD10K-Test, cod10k_te or COD10K_Dataset."""
    return re.sub(r"[-_](te|test|dataset)$", "", name, flags=re.IGNORECASE).upper()


# -------------------------------------------------------------------------------------------------
# A look at the files: warnings of what changes numbers

EMPTY = "masks are empty"
FULL = "masks have no background"
LOST = "masks are empty once resized for the network"


def inspect(pair: Pair, size: int | None, is_map: bool) -> tuple[list[str], float, float]:
    """Possible problems of a pair; the fractions of its mask above 0 and above 128."""
    image = open_image(pair.image)
    mask_file = open_image(pair.mask)
    mask = read_mask(pair.mask)
    above_0 = np.mean(np.asarray(mask) > 0)
    above_128 = np.mean(np.asarray(mask) > 128)
    lost = size and size < max(mask.size) and not foreground(mask, PAPER, size).any()
    problems = {
        EMPTY: above_0 == 0,
        LOST: lost and above_0 > 0,
        FULL: above_0 == 1,
        "files differ in size from their masks; both are resized independently": image.size
        != mask.size,
        "files have more than 8 bits per channel; values above 255 are clipped, so save them with 8": (
            image.mode[0] == "I" or (image.mode == "F" and not is_map)
        ),
        "photos or masks are turned by their EXIF, which is ignored beside a mask": (
            orientation(image) != 1 or orientation(mask_file) != 1
        ),
        "maps have colours or a varying alpha, and are read by brightness": is_map
        and not is_grey(image),
        "masks have colours or a varying alpha, and are read by brightness": not is_grey(mask_file),
    }
    return [text for text, is_there in problems.items() if is_there], above_0, above_128


def is_grey(image: Image.Image) -> bool:
    """Whether an image's grey levels are all that it has: no colours, no varying alpha."""
    if image.mode in ("1", "L", "F") or image.mode[0] == "I":
        return True
    red, green, blue, alpha = image.convert("RGBA").split()
    return red.tobytes() == green.tobytes() == blue.tobytes() and len(set(alpha.getextrema())) == 1


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1: upright, or unreadable."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises anything
        return 1


def check_files(
    dataset: ImageSet, workers: int, size: int | None = None, are_maps: bool = False
) -> None:
    """Look at a dataset's files, and warn of what may be wrong; `size` is S where it is known."""
    name, _, _, pairs = dataset
    if pairs[0].mask is None:
        return
    look = partial(inspect, size=size, is_map=are_maps)
    inspected = list(progress(in_threads(look, pairs, workers), name, len(pairs)))
    files = defaultdict(list)
    for pair, (found, *_) in zip(pairs, inspected, strict=True):
        for what in found:
            files[what].append(pair.image.name)
    for what, names in files.items():
        text = f"{name}: {len(names)} of {len(pairs)} {what} (such as {names[0]})"
        if what in (EMPTY, FULL, LOST) and len(names) == len(pairs):
            raise InputError(f"{text}; check how {pairs[0].mask.parent} was made")
        warn(text)
    _, above_0, above_128 = zip(*inspected, strict=True)
    if sum(above_128) < 0.9 * sum(above_0):
        worst = pairs[np.argmax(np.subtract(above_0, above_128))].mask
        warn(
            f"{name}: {np.mean(above_0):.2%} of the masks' pixels are above 0 (training, paper),"
            f" {np.mean(above_128):.2%} above 128 (full-size), see {worst}"
        )


# -------------------------------------------------------------------------------------------------
# Tables and pictures

CSV_COLUMNS = ("model", "dataset", "images", "protocol", *METRICS, "precision")


def print_row(first: str, second: object, cells: dict[str, str]) -> None:
    """Print a line of the table, with the cells of some columns."""
    text = "".join(f"  {cell:>{max(6, len(column))}}" for column, cell in cells.items())
    say(f"{first:<20}  {second:>6}{text}")


def print_metrics(name: str, images: int, metrics: dict[str, float], protocol: Protocol) -> None:
    """Print a dataset's row and, where images and protocol are the paper's, the paper's rows."""
    digits = {column: 2 if column.startswith("BER") else 4 for column in metrics}
    print_row(name, images, {c: f"{value:.{digits[c]}f}" for c, value in metrics.items()})
    for line in PUBLISHED.strip().splitlines() if protocol == PAPER else ():
        model, dataset, count, *row = line.split()
        if (dataset, int(count)) == (plain_name(name), images):
            published = dict(zip(row[::2], row[1::2], strict=True))
            print_row(f"  {model}, paper", "", {c: published.get(c, "") for c in metrics})


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


def save_overview(dataset: ImageSet, rows: list[dict], save: Path) -> None:
    """Draw a dataset's worst, median and best image by S-measure or BER, with the maps in `save`."""
    metric = "BER" if "BER" in rows[0] else "S"
    order = sorted(range(len(rows)), key=lambda i: rows[i][metric], reverse=metric == "BER")
    shown = []
    for which, i in (("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1])):
        pair = dataset.pairs[i]
        prediction = np.asarray(open_image(save / dataset.name / f"{pair.name}.png"))
        title = f"{which}: {pair.name}, {metric} {rows[i][metric]:.4g}"
        shown.append((title, read_sample(pair, 256, PAPER), prediction))
    draw_samples(shown, save / f"overview-{dataset.name}.png")


def draw_samples(rows: list[tuple[str, Sample, np.ndarray | None]], path: Path) -> None:
    """Draw rows of (title, sample, prediction or None): the image, its mask's outline in red, the
    mask, and the prediction."""
    width, height = 246, 186
    sheet = Image.new("RGB", (3 * width, 20 + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    columns = "image with the outline of its mask; mask" + "; prediction" * (rows[0][2] is not None)
    draw.text((3, 3), columns, fill="black", font_size=12)
    for y, (title, sample, prediction) in enumerate(rows):
        top = 20 + y * height
        title = title.encode("ascii", "replace").decode()
        draw.text((3, top + 3), title, fill="black", font_size=12)
        scale = min((height - 26) / sample.size[0], (width - 6) / sample.size[1])
        fit = [max(1, round(side * scale)) for side in sample.size[::-1]]
        mask = Image.fromarray(sample.mask).resize(fit)
        image = Image.fromarray(sample.pixels).resize(fit)
        image.paste("red", mask=mask.convert("L").filter(ImageFilter.FIND_EDGES))
        panels = [image, mask]
        if prediction is not None:
            panels.append(Image.fromarray(prediction).resize(fit))
        for x, panel in enumerate(panels):
            sheet.paste(panel, (x * width + 3, top + 20))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


# -------------------------------------------------------------------------------------------------
# What both scripts share: threads, messages, options, errors, stopping


def launched_as(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """World size, rank, and both within this machine, as torchrun or another launcher says.

    Another tool's WORLD_SIZE, without RANK, does not count.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    world, rank, local_world, local_rank = (int(environment.get(name) or 0) for name in names)
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


def progress(items: Iterable, what: str, total: int, unit: str = "img") -> tqdm:
    """`items` under a progress bar; where stderr is no terminal, a line every five minutes.

    Of torchrun's processes the first draws it.
    """
    look = dict(leave=False)
    if not (sys.stderr and sys.stderr.isatty()):
        line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left{postfix}\n"
        look |= dict(delay=300, mininterval=300, maxinterval=300, bar_format=line)
    return tqdm(items, what, total, unit=unit, disable=RANK > 0, **look)


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line; of torchrun's processes the first does. A closed pipe or a full disk is ignored."""
    if RANK == 0:
        with suppress(OSError):
            print(text, file=file, flush=True)


@cache
def warn(text: str) -> None:
    """Print a warning, once."""
    say(f"warning: {text}", sys.stderr)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is, and each option's default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """Errors are one line, with exit code 2."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(least: float, kind: type = int) -> Callable[[str], float]:
    """The type of an option that is a number."""

    def number(text: str) -> float:
        if not least <= kind(text) < 2**32:
            raise ValueError
        return kind(text)

    return number


def add_machine_options(parser: Parser) -> argparse._ArgumentGroup:
    """The options both scripts have; returns their group."""
    cores = min(8, (os.cpu_count() or 1) // LOCAL_WORLD)
    group = parser.add_argument_group("machine; results change by rounding error at most")
    # fmt: off
    group.add_argument("--workers", type=number(0), default=cores, help="threads of a process that read images, and as many that score them")
    group.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: a GPU if there is one)")
    # fmt: on
    return group


def check_device(args: argparse.Namespace) -> None:
    """Choose a device where --device does not, and try it; each process of several takes its own GPU."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.device == "cpu" and torch.version.cuda:
            warn(
                f"PyTorch {torch.__version__} finds no GPU, or a driver too old for CUDA"
                f" {torch.version.cuda}: running on the CPU (--device cpu to say so)"
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


def peak_memory(device: str) -> float:
    """Peak memory of a GPU in MB."""
    return torch.cuda.max_memory_allocated(device) / 2**20


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def on_stop(message: Callable[[], str]) -> None:
    """Have Ctrl-C and SIGTERM end the script at once: one line, exit code 130.

    Sound because every file is written whole or not at all. Not in a notebook, whose variables
    would be lost, and not where a signal is ignored, as under nohup.
    """

    def stop(*_) -> None:
        start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
        os.write(2, f"{start}{Path(sys.argv[0]).name}: {message()}\n".encode(errors="replace"))
        os._exit(130)

    if (
        hasattr(builtins, "__IPYTHON__")
        or threading.current_thread() is not threading.main_thread()
    ):
        return
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            # Python would not run a handler while another process is waited for.
            signal.signal(number, stop if RANK == 0 else signal.SIG_DFL)


def run(main: Callable[[], None]) -> None:
    """Run a script. Errors the user can fix are one line and exit code 2; others keep their traceback."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    on_stop(lambda: "stopped")
    with suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(errors="replace")
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
        message = known_failure(error)
        if message is None:
            raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    message = f"{Path(sys.argv[0]).name}: error: {message}"
    if RANK > 0:  # what all processes meet, the first says, and torchrun ends this one meanwhile
        time.sleep(3)
    if error_file := os.environ.get(
        "TORCHELASTIC_ERROR_FILE"
    ):  # torchrun shows it as its last words
        details = dict(py_callstack=message, timestamp=str(int(time.time())))
        failure = dict(message=dict(message=message, extraInfo=details))
        Path(error_file).write_text(json.dumps(failure))
    else:
        print(message, file=sys.stderr)
    sys.exit(2)


def known_failure(error: Exception) -> str | None:
    """What to do about an error of PyTorch's, where a user can do something."""
    text = str(error)
    out_of_memory = ("allocate", "out of memory", "ALLOC_FAILED")  # a CPU's, CUDA's, cuBLAS's
    if isinstance(error, MemoryError) or any(words in text for words in out_of_memory):
        return (
            f"too little memory ({one_line(error)}); try --grad-checkpoint, --accumulate or --precision"
            " bf16 in training, or a lower --batch-size, --size or --sam"
        )
    if "no kernel image" in text:
        return (
            f"PyTorch {torch.__version__} was not built for this GPU; install a build that was, for"
            f" CUDA {torch.version.cuda} or newer, or pass --device cpu"
        )
    return None


if __name__ == "__main__":
    run(main)
