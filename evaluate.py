"""Score TS-SAM, or any method's saved maps.

    python evaluate.py --ckpt runs/sod-vit_h/best.pt                             on what it was validated on in training
    python evaluate.py --ckpt runs/sod-vit_h/best.pt --data DUTS ECSSD --save masks --csv table.csv
    python evaluate.py --ckpt theirs.pth --data COD/TestDataset --protocol full-size      the authors' checkpoint
    python evaluate.py --ckpt a.pt b.pt --data DUTS --csv table.csv              two models, below what the table holds
    python evaluate.py --maps masks --data DUTS ECSSD                            saved maps, no checkpoint

Every number is made under one of two protocols; `py_sod_metrics` computes both:

    paper      as in the paper's released code: prediction and mask are compared at the model's S x S, the mask cut at
               > 0 before its nearest resize, the prediction in floating point. Weighted F-measure with beta^2 = 0.3.
               BER: mean over images.
    full-size  the field's habit: logits upsampled to the mask's own size, sigmoid, rounded to 8 bits; mask > 128.
               Weighted F-measure with beta^2 = 1; also the maximal, mean and adaptive F-measure with beta^2 = 0.3, and
               the maximal E-measure. Shadows: also BER over the pooled pixels of the dataset.

`train.py` validates with the same functions, under the paper's protocol.
"""

import argparse
import csv
import io
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import py_sod_metrics
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tssam import TSSAM, InputError, load_checkpoint, one_line, write

# ---------------------------------------------------------------------------------------------------------------------
# Find the images

Image.init()
IMAGE_KINDS = Image.OPEN.keys() - {"BUFR", "EMF", "GRIB", "HDF5", "MPEG", "WMF"}  # these Pillow only recognises
IMAGE_ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in IMAGE_KINDS}
Image.MAX_IMAGE_PIXELS = None  # a user's own large photograph is no attack

# Folder names of the datasets as people download them, see `named`. ISTD's train_c is the shadow-free image, no mask.
IMAGE_FOLDERS = "im img imgs image images shadowimages train_a test_a"
MASK_FOLDERS = (
    "gt gts gt_object groundtruth ground_truth ground-truth mask masks shadowmasks pixelwisegt-new-png label labels"
    " annotation annotations train_b test_b"
)
SPLIT_FOLDERS = {
    "train": "tr train training traindataset trainingdataset",
    "test": "te test testing testdataset testingdataset",
}

Pairs = list[tuple[Path, Path | None]]  # (image file, mask file or None)


class ImageSet(NamedTuple):
    """A dataset: its name in tables, its folder, its split ("train", "test", or None where it has none), and its
    (image, mask) files, sorted; a mask is None where the dataset has no masks."""

    name: str
    folder: Path
    split: str | None
    pairs: Pairs

    def __str__(self) -> str:
        image, mask = self.pairs[0]
        folders = f"{image.parent} and {mask.parent.name}" if mask else f"{image.parent}, without masks"
        return f"{self.name}: {folders}, {self.split or 'no'} split, {len(self.pairs)} images"


@cache
def warn(text: str) -> None:
    """Print a warning, once."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first speaks
        print(f"warning: {text}", file=sys.stderr)


def named(folder: str, words: str) -> bool:
    """Whether a folder is called by one of `words`, or by anything that ends in - or _ and one of them (any case)."""
    return re.fullmatch(rf"(.*[-_])?({words.replace(' ', '|')})", folder, re.IGNORECASE) is not None


def search(root: Path, split: str) -> list[ImageSet]:
    """The datasets of a split in a folder and up to four levels below it, and those that have no splits."""
    sets = []
    for path, subfolders, _ in os.walk(root, followlinks=True):
        folder, below = Path(path), Path(path).relative_to(root).parts
        subfolders[:] = sorted(f for f in subfolders if not f.startswith((".", "__")) and len(below) < 4)
        image_folders, mask_folders = ([f for f in subfolders if named(f, w)] for w in (IMAGE_FOLDERS, MASK_FOLDERS))
        of_split = next((s for f in reversed(below) for s, words in SPLIT_FOLDERS.items() if named(f, words)), None)
        if image_folders and of_split in (split, None):
            names = reversed(folder.absolute().parts)  # a folder that only says the split is called by the one above
            name = next(n for n in names if n.lower() not in " ".join(SPLIT_FOLDERS.values()).split())
            sets.append(ImageSet(name, folder, of_split, pair_files(folder, image_folders, mask_folders)))
            subfolders.clear()
    return sets


def find_sets(roots: Iterable[Path], split: str) -> list[ImageSet]:
    """The datasets in `roots`: each root that of a dataset (its `split` is taken where it has splits) or a folder of
    images beside one of masks; for the "test" split also a folder above several, of images alone, or an image file."""
    sets: list[ImageSet] = []
    for root in roots:
        if not root.exists():
            raise InputError(f"{root}: no such file or folder")
        found = search(root, split)
        if not found and split == "test":  # images alone
            images = image_files(root).values() if root.is_dir() else [root]
            found = [ImageSet(root.absolute().stem, root, None, [(file, None) for file in images])] if images else []
        if split == "train" and any(s.split for s in found):
            found = [s for s in found if s.split]
        elif split == "train" and len(found) > 1:
            raise InputError(f"{root}: holds several datasets ({', '.join(s.name for s in found)}); name one or more")
        if not found:
            there = ", ".join(sorted(f.name for f in root.iterdir() if f.is_dir())[:10]) if root.is_dir() else ""
            raise InputError(
                f"{root}: no dataset for the {split} split; name the folder above images and masks. The folders there:"
                f" {there or 'none'}. Looked for, in any case and after any prefix that ends in - or _: images in"
                f" {IMAGE_FOLDERS}; masks in {MASK_FOLDERS}; the split in {SPLIT_FOLDERS[split]}"
            )
        sets += found
    for s in sets:
        if split == "train" and s.pairs[0][1] is None:
            raise InputError(f"{s.folder}: no folder of masks; looked for {MASK_FOLDERS}")
        if sum(other.folder.resolve() == s.folder.resolve() for other in sets) > 1:
            raise InputError(f"{s.folder}: named twice; once is enough")
    return sets


def pair_files(folder: Path, image_folders: list[str], mask_folders: list[str]) -> Pairs:
    """A dataset's (image, mask) files, paired by stem, from one folder of images and one or none of masks."""
    files = []
    for found in (image_folders, mask_folders):
        if len(found) > 1:
            raise InputError(f"{folder}: several folders of one kind, {' and '.join(found)}; leave one of them there")
        files.append(image_files(folder / found[0]) if found else {})
        if found and not files[-1]:
            there = ", ".join(sorted(f.name for f in (folder / found[0]).iterdir())[:5]) or "nothing"
            hint = "; CAMO is read as SINet's COD packs have it" if there == "Test, Train" else ""
            raise InputError(f"{folder / found[0]}: no image files in it, but {there}{hint}")
    images, masks = files
    alone = sorted(images.keys() ^ masks.keys())
    if alone and masks:
        raise InputError(
            f"{folder}: {len(images.keys() - masks.keys())} images without a mask and"
            f" {len(masks.keys() - images.keys())} masks without an image, such as {', '.join(alone[:3])};"
            " an image and its mask have the same name but for the ending"
        )
    return [(file, masks.get(stem)) for stem, file in images.items()]


def image_files(folder: Path) -> dict[str, Path]:
    """The image files in a folder by their stems, sorted, without hidden ones."""
    files, others = {}, []
    for file in sorted(f for f in folder.iterdir() if not f.name.startswith(".") and not f.is_dir()):
        if file.suffix.lower() not in IMAGE_ENDINGS:
            others.append(file.name)
        elif file.stem in files:
            raise InputError(f"{file}: {files[file.stem].name} has the same name but for its ending; remove one")
        else:
            files[file.stem] = file
    if others:
        warn(f"{folder}: skipped {len(others)} files whose endings Pillow does not know, such as {others[0]}")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Read them

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")


def open_image(path: Path, mode: str | None = None) -> Image.Image:
    """An image file converted to `mode`, or with its header alone read. Alpha is dropped (source: release)."""
    try:
        image = Image.open(path)
        converted = image.convert(mode) if mode else image
        converted.format = image.format
        return converted
    except Exception as error:  # broken files raise anything
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from error


def read_image(path: Path, has_mask: bool = False) -> Image.Image:
    """An image file as RGB, turned as its EXIF says; but beside a mask as its pixels lie (source: release)."""
    image = open_image(path, "RGB")
    return image if has_mask else ImageOps.exif_transpose(image)


def read_mask(path: Path) -> Image.Image:
    """A mask file as 8-bit grey. One that is nowhere above 128, such as a mask of 0 and 1, is read as 0 and 255; one in
    a lossy file, where the object's border is surrounded by faint noise, is cut at 128."""
    mask = open_image(path, "L")
    if mask.getextrema()[1] <= 128:
        return mask.point(lambda v: 255 * (v > 0))
    return mask.point(lambda v: 255 * (v > 128)) if mask.format in LOSSY else mask


def resize_mask(mask: Image.Image, size: int) -> np.ndarray:
    """A mask at S x S, nearest: (S, S) bool, true where it is above 0 (source: release)."""
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 0


def to_input(image: Image.Image, size: int) -> Tensor:
    """An RGB image as the network takes it: (3, S, S) float32, resized bilinearly, /255, ImageNet's mean and std."""
    pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    return (torch.from_numpy(pixels).movedim(-1, 0).float() / 255 - IMAGENET_MEAN) / IMAGENET_STD


def read_pairs(batch: list[tuple[Path, Path, bool]], size: int) -> tuple[Tensor, Tensor]:
    """A batch to train on: (image file, mask file, whether to mirror both) of each pair -> images (B, 3, S, S) as in
    `to_input`, masks (B, 1, S, S), float32 of 0 and 1."""
    images = torch.stack([to_input(read_image(image, has_mask=True), size) for image, _, _ in batch])
    masks = torch.stack([torch.from_numpy(resize_mask(read_mask(mask), size)).float()[None] for _, mask, _ in batch])
    mirror = torch.tensor([mirror for *_, mirror in batch]).view(-1, 1, 1, 1)
    return torch.where(mirror, images.flip(-1), images), torch.where(mirror, masks.flip(-1), masks)


def read_images(batch: Pairs, size: int) -> tuple[Tensor, list[tuple]]:
    """A batch to predict from: (image file, mask file or None) of each pair -> images (B, 3, S, S) as in `to_input`,
    and for each the image's own (height, width) and the two files."""
    images = [read_image(file, has_mask=mask is not None) for file, mask in batch]
    infos = [((image.height, image.width), *pair) for image, pair in zip(images, batch, strict=True)]
    return torch.stack([to_input(image, size) for image in images]), infos


def check_files(name: str, pairs: Pairs) -> int:
    """Open every file's header and read every mask; warn of images (or maps) of more than 8 bits or not of their mask's
    size, and of masks that say nothing. The number of empty masks."""
    unequal, deep, empty, full = [], 0, 0, 0
    for image_file, mask_file in progress(pairs, name, len(pairs)):
        image = open_image(image_file)
        deep += image.mode[0] in "FI"  # Pillow's modes of floats and of 16 and 32 bits
        if mask_file is not None:
            mask = read_mask(mask_file)
            darkest, brightest = mask.getextrema()
            empty += brightest == 0
            full += darkest > 0
            if image.size != mask.size:
                a, b = image.size, mask.size
                unequal.append(f"{image_file.name} ({a[0]} x {a[1]}, mask {b[0]} x {b[1]})")
    text = f"{empty} of {len(pairs)} masks are empty, {full} have no background"
    if len(pairs) in (empty, full):
        raise InputError(f"{name}: {text}; check how {mask_file.parent} was made")
    if empty or full:
        warn(f"{name}: {text}")
    if deep:
        warn(f"{name}: {deep} of {len(pairs)} files have more than 8 bits, which are cut off at 255; save them with 8")
    if unequal:
        which = f"{len(unequal)} of {len(pairs)} files are not of their mask's size, such as {', '.join(unequal[:3])}"
        warn(f"{name}: {which}; each is resized by itself")
    return empty


# ---------------------------------------------------------------------------------------------------------------------
# Score one

balanced_error = py_sod_metrics.BERHandler(with_dynamic=False, with_adaptive=False)  # of tp, fp, tn, fn


def score(prediction: np.ndarray, mask: np.ndarray, task: str, protocol: str) -> dict[str, float | np.ndarray]:
    """prediction (H, W), floats in [0, 1] (paper) or uint8 (full-size), and mask (H, W) bool -> the image's metrics, by
    `py_sod_metrics`, as values that add up over a dataset (see `average`).

    All but BER see the prediction stretched to [0, 1] first, as the field's toolboxes do: a map's offset and contrast
    do not count, and MAE is no plain mean of |prediction - mask|. For BER it is cut at 125/255 as it is (source:
    release); an image without shadow, or with nothing else, counts 50 at least. A metric that is nan, as S is where all
    foreground lies in the last row, counts 0 (source: release).
    """
    grey = prediction if prediction.dtype == np.uint8 else prediction.astype(np.float64) * 255  # the range step takes

    def result_of(metric) -> dict:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, about nan
            metric.step(grey, mask.astype(np.uint8) * 255)
            return metric.get_results()

    row = {"images": 1, "S": result_of(py_sod_metrics.Smeasure())["sm"]}
    if task == "shadow":
        positive = np.count_nonzero(mask)
        counts = py_sod_metrics.FmeasureV2.get_statistics(grey > 125, mask, positive, mask.size - positive)
        row |= {"BER": 100 * balanced_error(**counts)} | counts
    else:
        e_curve = result_of(py_sod_metrics.Emeasure())["em"]["curve"]  # at 256 thresholds
        row["E"] = e_curve * (mask.size > 1)  # PySODMetrics divides by the number of pixels less one
        row["wF"] = result_of(py_sod_metrics.WeightedFmeasure(beta=0.3 if protocol == "paper" else 1))["wfm"]  # beta^2
        row["MAE"] = result_of(py_sod_metrics.MAE())["mae"]
        if protocol == "full-size":
            handler = py_sod_metrics.FmeasureHandler(with_dynamic=True, with_adaptive=True, beta=0.3)
            f_measure = result_of(py_sod_metrics.FmeasureV2({"F": handler}))["F"]
            row |= {"F": f_measure["dynamic"], "adpF": f_measure["adaptive"]}
    return {name: np.nan_to_num(value) for name, value in row.items()}


def add(sums: dict, row: dict) -> dict:
    """The sums of what `score` gave, with one more image (or another process's sums)."""
    return {name: sums.get(name, 0) + value for name, value in row.items()} if row else sums


def average(sums: dict, task: str, protocol: str) -> dict[str, float]:
    """A dataset's metrics from the sums over its images. E and meanF are the mean, maxE and maxF the largest value of
    the images' mean curve over the thresholds; BER is in percent, the mean over images, BER_pooled over all pixels."""
    mean = {name: total / sums["images"] for name, total in sums.items()}
    if task == "shadow":
        metrics = {"BER": mean["BER"]}
        if protocol == "full-size":
            metrics["BER_pooled"] = 100 * balanced_error(**{name: sums[name] for name in ("tp", "fp", "tn", "fn")})
    else:
        metrics = {"S": mean["S"], "E": mean["E"].mean(), "wF": mean["wF"], "MAE": mean["MAE"]}
        if protocol == "full-size":
            metrics |= {"maxF": mean["F"].max(), "adpF": mean["adpF"]}
            metrics |= {"meanF": mean["F"].mean(), "maxE": mean["E"].max()}
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Score a dataset: image files -> network, in this process -> `finish`, in workers -> sums

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str, precision: str) -> torch.autocast:
    """What the network runs under; losses, FFT and metrics are float32 all the same."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "fp32")


def to_map(logit: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logit (1, S, S) as a map of `size` (height, width): bilinear, sigmoid, rounded to 8 bits; (H, W) uint8."""
    full = F.interpolate(logit[None], size, mode="bilinear", align_corners=False)[0, 0]
    return (full.sigmoid() * 255).round().byte().numpy()


def finish(job: tuple, task: str, protocol: str, save: Path | None) -> dict:
    """What follows the network for one image: write its map to `save`, and score it if it has a mask."""
    logit, size, image_file, mask_file = job  # (1, S, S), the image's own (height, width), and two files
    logit = torch.from_numpy(logit)
    if save is not None:
        grey = Image.fromarray(to_map(logit, size))
        write(save / f"{image_file.stem}.png", lambda file: grey.save(file, "PNG"))
    if mask_file is None:
        return {}
    mask = read_mask(mask_file)
    if protocol == "paper":
        return score(logit[0].sigmoid().numpy(), resize_mask(mask, logit.shape[-1]), task, protocol)
    return score(to_map(logit, (mask.height, mask.width)), np.asarray(mask) > 128, task, protocol)


def finish_map(job: tuple[Path, Path], task: str, scale: int = 1) -> dict:
    """Score a saved map (map, mask file) under the full-size protocol; one of another size is resized bilinearly. What
    the map's pixels are times `scale` counts: 255 for maps of 0 and 1."""
    grey, mask = open_image(job[0], "L").point(lambda v: v * scale), read_mask(job[1])
    if grey.size != mask.size:
        grey = grey.resize(mask.size, Image.Resampling.BILINEAR)
    return score(np.asarray(grey), np.asarray(mask) > 128, task, "full-size")


@torch.inference_mode()
def predict(model: TSSAM, pairs: Pairs, batch_size: int, workers: int) -> Iterator[tuple]:
    """The jobs of `finish`, in the order of the pairs."""
    device, read = next(model.parameters()).device, partial(read_images, size=model.config["image_size"])
    batches = DataLoader(pairs, batch_size, num_workers=workers, collate_fn=read, worker_init_fn=start_worker)
    for images, infos in batches:
        for logit, info in zip(model(images.to(device)).cpu(), infos, strict=True):
            if not logit.isfinite().all():
                raise InputError(f"{info[1]}: the network's output is not finite; its weights are broken")
            yield logit.numpy(), *info


def in_workers(work: Callable, jobs: Iterable, workers: int) -> Iterator:
    """map(work, jobs), done in `workers` processes; `jobs` is drawn from in this thread, and never far ahead."""
    if workers == 0:
        yield from map(work, jobs)
        return
    # Not forked from this process, which may have used CUDA, but from a clean server that has done the slow imports.
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else None)
    if os.name == "posix":
        context.set_forkserver_preload(["torch", "segment_anything", "py_sod_metrics", "tqdm"])
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # it cleans up after a stop, silently
        multiprocessing.resource_tracker.ensure_running()  # first, because it unblocks SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C does not end server or workers
        multiprocessing.forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with ProcessPoolExecutor(workers, context, start_worker) as pool:
        under_way = deque()
        for job in jobs:
            under_way.append(pool.submit(work, job))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def evaluate(
    model: TSSAM, pairs: Pairs, task: str, protocol: str, batch_size: int, workers: int, save: Path | None = None
) -> Iterator[dict]:
    """What `score` gives for each image, {} without a mask; the model runs in eval mode on its own device. As many
    `workers` read images as score them. `save` is a folder for the maps, <image's stem>.png, of the image's size."""
    model.eval()
    jobs = predict(model, pairs, batch_size, workers)
    results = in_workers(partial(finish, task=task, protocol=protocol, save=save), jobs, workers)
    yield from progress(results, "evaluate", len(pairs))


def score_maps(name: str, pairs: list[tuple[Path, Path]], task: str, workers: int) -> Iterator[dict]:
    """What `score` gives for each saved map of a dataset; where none is brighter than 1, maps are of 0 and 1."""
    brightest = max(open_image(file, "L").getextrema()[1] for file, _ in progress(pairs, name, len(pairs)))
    if task == "shadow" and brightest != 1 and brightest <= 125:
        warn(f"{name}: no map is brighter than {brightest} of 255; BER cuts them at 125, so all are black to it")
    work = partial(finish_map, task=task, scale=255 if brightest == 1 else 1)
    yield from progress(in_workers(work, pairs, workers), "evaluate", len(pairs))


def progress(items: Iterable, what: str, total: int, unit: str = "img") -> tqdm:
    """`items` under a progress bar, where stderr is a terminal; of torchrun's processes the first draws it."""
    disable = None if os.environ.get("RANK", "0") == "0" else True
    return tqdm(items, what, total, unit=unit, leave=False, disable=disable)


def save_overview(rows: list[tuple[str, Path, Path, Path]], path: Path) -> None:
    """Draw a row `image | ground truth | prediction` for each (title, image, mask, map file) into one PNG; maps are
    shown as they were saved, not stretched as for the metrics."""
    height, gap, text = 160, 6, 20
    panels = []
    for _, image_file, mask_file, map_file in rows:
        image = read_image(image_file, has_mask=True)
        width = min(max(1, round(height * image.width / image.height)), 3 * height)
        row = (image, read_mask(mask_file), open_image(map_file))
        panels.append([panel.convert("RGB").resize((width, height)) for panel in row])
    column = max(row[0].width for row in panels) + gap
    sheet = Image.new("RGB", (3 * column + gap, text + len(rows) * (text + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, name in enumerate(("image", "ground truth", "prediction as saved")):
        draw.text((gap + x * column, 2), name, fill="black", font_size=12)
    for y, ((title, *_), row) in enumerate(zip(rows, panels, strict=True)):
        top = text + y * (text + height + gap)
        draw.text((gap, top + 2), title.encode("ascii", "replace").decode(), fill="black", font_size=12)
        for x, panel in enumerate(row):
            sheet.paste(panel, (gap + x * column, top + text))
    write(path, lambda file: sheet.save(file, "PNG"))


# ---------------------------------------------------------------------------------------------------------------------
# Tables

CSV_COLUMNS = ("model", "dataset", "images", "protocol", "S", "E", "wF", "MAE", "maxF", "adpF", "meanF", "maxE")
CSV_COLUMNS += ("BER", "BER_pooled", "precision")

# Tables I and II of the paper for TS-SAM_B and TS-SAM_H. Table III's numbers are not at hand.
PUBLISHED = {
    "CHAMELEON": (dict(S=0.912, E=0.947, wF=0.849, MAE=0.023), dict(S=0.942, E=0.966, wF=0.900, MAE=0.017)),
    "CAMO": (dict(S=0.826, E=0.862, wF=0.753, MAE=0.073), dict(S=0.887, E=0.925, wF=0.830, MAE=0.047)),
    "COD10K": (dict(S=0.863, E=0.909, wF=0.771, MAE=0.029), dict(S=0.914, E=0.950, wF=0.856, MAE=0.017)),
    "NC4K": (dict(S=0.866, E=0.900, wF=0.799, MAE=0.045), dict(S=0.905, E=0.933, wF=0.860, MAE=0.032)),
    "ISTD": (dict(BER=1.11), dict(BER=1.04)),
}


def plain_name(name: str) -> str:
    """A dataset's name without what folders add to it: COD10K of COD10K-Test, cod10k_te or COD10K_Dataset."""
    return re.sub(r"[-_](te|test|dataset|v\d)$", "", name, flags=re.IGNORECASE).upper()


def show(metrics: dict[str, float], number: int = 4) -> dict[str, str]:
    """Metrics as tables print them: BER with two decimals, the others with `number`."""
    return {name: f"{value:.{2 if name.startswith('BER') else number}f}" for name, value in metrics.items()}


def print_rows(name: str, images: int, metrics: dict[str, float], header: bool, published: bool) -> None:
    """Print a dataset's row of the table and, if `published` and the metrics are the paper's, the paper's rows."""
    lines = [("dataset", "images", {column: column for column in metrics})] if header else []
    lines.append((name, images, show(metrics)))
    for model, row in zip(("TS-SAM_B", "TS-SAM_H"), PUBLISHED.get(plain_name(name), ()), strict=False):
        if published and row.keys() == metrics.keys():
            lines.append((f"  {model}, paper", "", show(row, 3)))
    for first, second, cells in lines:
        print(f"{first:<20}  {second:>6}" + "".join(f"  {cell:>{max(6, len(c))}}" for c, cell in cells.items()))


def read_csv(path: Path) -> list[dict]:
    """The rows of a table that this script wrote; none where there is no file."""
    lines = path.read_text("utf-8", "surrogateescape").splitlines() if path.exists() else [",".join(CSV_COLUMNS)]
    rows = [*csv.DictReader(lines)]
    if lines[:1] != [",".join(CSV_COLUMNS)] or any(None in row for row in rows):
        raise InputError(f"--csv: {path} exists and is no table of this evaluate.py; name another file")
    return rows


def write_csv(rows: list[dict], columns: tuple[str, ...], path: Path) -> None:
    """Write a table of `rows`, numbers in full precision, empty where a row has not all `columns`."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(rows)
    write(path, lambda file: file.write_bytes(text.getvalue().encode("utf-8", "surrogateescape")))


# ---------------------------------------------------------------------------------------------------------------------
# What both scripts share: arguments, errors, workers, stopping


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows a script's docstring as it is and whose errors are one line (exit code 2)."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def add_machine_arguments(parser: Parser) -> argparse._ArgumentGroup:
    """The arguments both scripts have; returns their group."""
    device, cores = "cuda" if torch.cuda.is_available() else "cpu", min(8, os.cpu_count() or 1)
    group = parser.add_argument_group("machine; these change no number by more than rounding")
    text = f"processes that read images, and as many that score them; 0: none (here {cores})"
    group.add_argument("--workers", type=int, default=cores, help=text)
    group.add_argument("--device", default=device, help=f"cuda, cuda:1, cpu, ... (here {device})")
    return group


def check_arguments(args: argparse.Namespace, above_zero: tuple[str, ...]) -> None:
    """Check the numbers and the device. Each of torchrun's processes takes its own GPU and its share of the workers."""
    for name in (*above_zero, "workers"):
        value = getattr(args, name)
        if not 0 <= value < float("inf") or value == 0 and name in above_zero:
            raise InputError(f"--{name.replace('_', '-')}: {value} is not a number above zero")
    if "LOCAL_RANK" in os.environ:
        args.workers //= int(os.environ["LOCAL_WORLD_SIZE"])
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {args.device} cannot be used here ({one_line(error)}); try cpu") from error


def peak_memory(device: str) -> float:
    """MB this process has held at most: of the GPU's memory, or on a CPU of the machine's (Windows: nan)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def start_worker(*_) -> None:
    """In a worker: the main process answers Ctrl-C and SIGTERM, and its end, whatever ends it, is the worker's too."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)


def kill_workers() -> None:
    for process in multiprocessing.active_children():
        if os.name == "posix":
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for a crash
        process.kill()


def on_stop(message: Callable[[], str]) -> None:
    """Have Ctrl-C and SIGTERM end this process at once: workers killed, one line, exit code 130. Sound because every
    file is written whole or not at all."""
    main_process = os.getpid()

    def stop(*_) -> None:
        if os.getpid() != main_process:
            os._exit(0)  # a worker that was forked a moment ago
        kill_workers()
        server = multiprocessing.forkserver._forkserver._forkserver_pid
        if server is not None:  # may be busy with its imports, and would end after them alone
            os.kill(server, signal.SIGKILL)
        if os.environ.get("RANK", "0") == "0":
            start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
            os.write(2, f"{start}{Path(sys.argv[0]).name}: {message()}\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def run(main: Callable[[], None]) -> None:
    """Run a script: what the user can mend is one line on stderr and exit code 2; anything else keeps its traceback."""
    on_stop(lambda: "stopped")
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, also in convolutions
    try:
        main()
        return
    except InputError as error:
        # One raised in a loader's worker arrives with that worker's traceback in front of its own line.
        message = str(error).rsplit("InputError: ", 1)[-1].strip()
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    except (torch.OutOfMemoryError, MemoryError) as error:
        less = "--grad-checkpoint or --precision bf16 in training, or a lower --batch-size, --size or --sam"
        message = f"too little memory ({one_line(error)}); try {less}"
    finally:
        kill_workers()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to score")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", nargs="+", metavar="FILE", help="checkpoints of train.py, or of the authors' code")
    what.add_argument("--maps", type=Path, metavar="DIR", help="score saved maps, DIR/<dataset>/<image's stem>.png")
    group.add_argument("--sam-checkpoint", metavar="FILE", help="SAM's weights (default: the file used in training)")
    text = "datasets, folders above several, images without masks (default: what it was validated on)"
    group.add_argument("--data", type=Path, nargs="+", metavar="DIR", help=text)
    group = parser.add_argument_group("how to score it")
    text = "see above (default paper; --maps: full-size; `original` is full-size too)"
    group.add_argument("--protocol", choices=("paper", "full-size", "original"), help=text)
    text = "of the network (default fp32, so that a table does not depend on the card)"
    group.add_argument("--precision", choices=tuple(PRECISIONS), help=text)
    text = "what --maps show (default sod): shadows are scored by BER"
    group.add_argument("--task", choices=("sod", "cod", "shadow"), help=text)
    group = parser.add_argument_group("what to write")
    group.add_argument("--csv", type=Path, metavar="FILE", help="table to add the rows to, in full precision")
    text = "new folder for 8-bit maps at each image's own size, <dataset>/<image's stem>.png, and overview pictures"
    group.add_argument("--save", type=Path, metavar="DIR", help=text)
    group = add_machine_arguments(parser)
    group.add_argument("--batch-size", type=int, default=2, help="images at a time (default 2)")

    args = parser.parse_args()
    check_arguments(args, ("batch_size",))
    if args.protocol == "original":
        args.protocol = "full-size"
    for file in args.ckpt or ():
        if not os.path.isfile(file):
            raise InputError(f"{file}: no such file")
    if args.ckpt is not None and args.save is not None and len(args.ckpt) > 1:
        raise InputError("--save: takes the maps of one --ckpt; name the others one by one")
    if args.maps is not None:
        if args.data is None:
            raise InputError("--data: name the datasets that the maps belong to")
        if args.save or args.sam_checkpoint or args.precision or args.protocol == "paper":
            text = "--save, --sam-checkpoint, --precision and --protocol paper"
            raise InputError(f"--maps: goes without {text}; nothing is predicted")
    elif args.task is not None:
        raise InputError("--task: goes with --maps; a checkpoint knows its own")
    args.precision = args.precision or "fp32"
    args.protocol = args.protocol or ("paper" if args.maps is None else "full-size")
    if args.csv is not None:
        read_csv(args.csv)  # which refuses another file
    return args


def find_maps(maps: Path, s: ImageSet) -> list[tuple[Path, Path]]:
    """The (map, mask) files of a dataset: its maps lie in its folder under `maps` (DUTS-TE, or DUTS, in any case), or
    in `maps` itself where that has no folders."""
    folders = sorted(f for f in maps.iterdir() if f.is_dir())
    known = [f for f in folders if f.name.lower() == s.name.lower()]
    known = known or [f for f in folders if plain_name(f.name) == plain_name(s.name)] or ([] if folders else [maps])
    if not known:
        raise InputError(f"--maps: {maps} has no folder {s.name}, only {', '.join(f.name for f in folders)}")
    map_of = image_files(known[0])
    missing = [f"{image.stem}.png" for image, _ in s.pairs if image.stem not in map_of]
    if missing:
        there = ", ".join(file.name for file in [*map_of.values()][:3]) or "no images"
        text = f"{len(missing)} of {len(s.pairs)} maps are missing, such as {', '.join(missing[:3])}; there are {there}"
        raise InputError(f"{known[0]}: {text}")
    return [(map_of[image.stem], mask) for image, mask in s.pairs]


def prepare_save(save: Path, ckpt: str) -> None:
    """Make the folder of --save; one that holds anything else than this checkpoint's maps is refused."""
    source = save / "checkpoint.txt"
    is_ours = source.is_file() and source.read_text().strip() == os.path.abspath(ckpt)
    if save.exists() and not is_ours and any(save.iterdir()):
        raise InputError(f"--save: {save} holds other files than maps of {ckpt}; name a new or an empty folder")
    save.mkdir(parents=True, exist_ok=True)
    source.write_text(os.path.abspath(ckpt) + "\n")


def main() -> None:
    args = parse_arguments()
    header, print_once = (), cache(print)
    for source in args.ckpt or [args.maps]:
        model, task, data = None, args.task or "sod", args.data
        if args.maps is None:
            model, info = load_checkpoint(source, args.sam_checkpoint)
            model.store_encoder(PRECISIONS[args.precision])
            model.to(args.device)
            task, data = info["task"], data or [Path(folder) for folder in info.get("val", ())]
            print(f"{source}: {task}, {model.config['sam']}, epoch {info.get('epoch', 'unknown')}")
            if not data:
                raise InputError(f"{source}: trained without a validation set; name the data: --data")
        sets = find_sets(data, "test")
        for s in sets:
            if [other.name for other in sets].count(s.name) > 1:
                raise InputError(f"--data: {s.folder}: another dataset is called {s.name} too; name one at a time")
            if s.pairs[0][1] is None and args.save is None:
                raise InputError(
                    f"{s.folder}: no masks to score by; --save DIR only predicts (looked for {MASK_FOLDERS})"
                )
            print_once(str(s))
        pairs_of = {s.name: find_maps(args.maps, s) if args.maps else s.pairs for s in sets}
        empty_masks = {name: check_files(name, pairs) for name, pairs in pairs_of.items()}
        precision = "" if args.maps else args.precision
        print_once(f"protocol: {args.protocol}; task: {task}" + (precision and f"; precision: {precision}"))
        if args.save is not None:
            prepare_save(args.save, source)

        for s in sets:
            pairs, sums, ranking, start = pairs_of[s.name], {}, [], time.monotonic()
            folder = None if args.save is None else args.save / s.name if s.folder.is_dir() else args.save
            if folder is not None:
                folder.mkdir(exist_ok=True)
            if args.maps is None:
                rows = evaluate(model, pairs, task, args.protocol, args.batch_size, args.workers, folder)
            else:
                rows = score_maps(s.name, pairs, task, args.workers)
            with autocast(args.device, args.precision):
                for row, (image, mask) in zip(rows, s.pairs, strict=True):
                    sums = add(sums, row)
                    if mask is not None:
                        ranking.append((row["S"], image, mask))
            cost = f"{len(pairs) / (time.monotonic() - start):.2f} images/s, {peak_memory(args.device):.0f} MB"
            if not sums:
                print(f"{s.name}: no masks, so no metrics; {len(pairs)} predictions in {folder}; {cost}")
                continue
            metrics = average(sums, task, args.protocol)
            print_rows(s.name, len(pairs), metrics, header != tuple(metrics), published=empty_masks[s.name] == 0)
            header = tuple(metrics)
            if args.csv is not None:
                row = dict(model=source, dataset=s.name, images=len(pairs), protocol=args.protocol, precision=precision)
                write_csv([*read_csv(args.csv), row | metrics], CSV_COLUMNS, args.csv)
            if folder is not None:
                ranking.sort()
                shown = []
                for which, place in (("worst", 0), ("median", len(ranking) // 2), ("best", -1)):
                    s_measure, image, mask = ranking[place]
                    title = f"{which}: {image.stem}, S {s_measure:.4f}"
                    shown.append((title, image, mask, folder / f"{image.stem}.png"))
                save_overview(shown, args.save / f"overview-{s.name}.png")
                print(f"{s.name}: maps in {folder}, {cost}")


if __name__ == "__main__":
    run(main)
