"""Score a TS-SAM checkpoint: the data set, the metrics, and the script.

    python evaluate.py --ckpt runs/sod-vit_h/best.pt                          the data it was validated on in training
    python evaluate.py --ckpt runs/sod-vit_h/best.pt --data DUTS --save masks

Numbers follow the paper's protocol as its released code has it: prediction and mask are compared at the model's S x S,
the mask binarised at > 0, the prediction in floating point; `py_sod_metrics` computes them. `train.py` validates with
the same functions.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import py_sod_metrics
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tssam import TSSAM, InputError, load_checkpoint, one_line, write

# ---------------------------------------------------------------------------------------------------------------------
# Data

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

# Folder names of the data sets as people download them, letter case ignored: DUTS-TR/DUTS-TR-Image, TestDataset/Imgs,
# train/train_A and train_B (ISTD; _C is the shadow-free image, not a mask), ...
SPLIT_FOLDERS = {"train": r"train(ing)?(dataset)?|.*[-_]tr(ain)?", "test": r"test(ing)?(dataset)?|.*[-_]te(st)?"}
IMAGE_FOLDERS = r"(.*[-_])?(imgs?|images?)|(train|test)_a"
MASK_FOLDERS = r"(.*[-_])?(gts?|masks?)|ground[-_]?truths?|pixelwisegt.*|(train|test)_b"


def _subfolders(folder: Path, names: str) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return [f for f in sorted(folder.iterdir()) if f.is_dir() and re.fullmatch(names, f.name, re.IGNORECASE)]


def find_split(root: str | Path, split: str) -> Path | None:
    """The folder of a data set's "train" or "test" split, such as DUTS/DUTS-TR; None if `root` has no such folder."""
    found = _subfolders(Path(root), SPLIT_FOLDERS[split])
    if len(found) > 1:
        raise InputError(f"{root}: several {split} folders ({', '.join(f.name for f in found)}); name one of them")
    return found[0] if found else None


def find_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """The (image, mask) files of a folder that holds a folder of images and one of masks, paired by file stem.

    Raises:
        InputError: no such folders, nothing in them, or an image or mask that stands alone.
    """
    files = []
    for kind, pattern, example in (("image", IMAGE_FOLDERS, "Imgs"), ("mask", MASK_FOLDERS, "GT")):
        found = _subfolders(Path(folder), pattern)
        if not found:
            sets = [f.name for f in sorted(Path(folder).iterdir()) if f.is_dir() and _subfolders(f, IMAGE_FOLDERS)]
            if sets:
                raise InputError(
                    f"{folder}: holds data sets ({', '.join(sets)}), not images; name one with --data or --val"
                )
            raise InputError(f"{folder}: no folder of {kind}s, such as {example}, which it must have")
        if len(found) > 1:
            names = ", ".join(f.name for f in found)
            raise InputError(f"{folder}: several folders of {kind}s ({names}); leave one of them there")
        stems: dict[str, Path] = {}
        for file in sorted(found[0].iterdir()):
            if file.suffix.lower() in IMAGE_ENDINGS and not file.name.startswith("."):
                if file.stem in stems:
                    raise InputError(f"{file}: {stems[file.stem].name} beside it has the same stem; remove one of them")
                stems[file.stem] = file
        if not stems:
            raise InputError(f"{found[0]}: no image files ({', '.join(sorted(IMAGE_ENDINGS))})")
        files.append(stems)
    images, masks = files
    for kind, alone in (("mask", images.keys() - masks.keys()), ("image", masks.keys() - images.keys())):
        if alone:
            names = ", ".join(sorted(alone)[:3])
            raise InputError(f"{folder}: {len(alone)} files have no {kind} of the same stem, such as {names}")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def read_image(path: Path, mode: str) -> Image.Image:
    """An image file as a PIL image of `mode` ("RGB", or "L" for masks).

    Raises:
        InputError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from error


class Pairs(Dataset):
    """Images and masks at the model's size, without augmentation (source: paper; resizing as in the release).

    Args:
        pairs: (image, mask) files.
        size: S.

    An item is (image, mask, index into `pairs`). image: (3, S, S) float32, RGB, resized bilinearly, /255, ImageNet's
    mean and std taken out. mask: (1, S, S) float32, 1 where the file's grey is above 0, resized to the nearest.
    """

    def __init__(self, pairs: list[tuple[Path, Path]], size: int) -> None:
        self.pairs, self.size = pairs, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image_file, mask_file = self.pairs[index]
        size = (self.size, self.size)
        image = read_image(image_file, "RGB").resize(size, Image.Resampling.BILINEAR)
        mask = read_image(mask_file, "L").resize(size, Image.Resampling.NEAREST)
        image = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
        mask = torch.from_numpy(np.array(mask)[None] > 0).float()
        return (image - IMAGENET_MEAN) / IMAGENET_STD, mask, index


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class Metrics:
    """The paper's metrics over a data set, by `py_sod_metrics`: S-measure, mean E-measure, weighted F-measure and MAE;
    for the task "shadow" the balanced error rate BER, in percent, the mean over images (source: release).

    The first four see each prediction stretched to [0, 1] first, as the field's toolboxes do: a map's offset and
    contrast do not count, and MAE is no plain mean of |prediction - mask|. For BER it is cut at 125/255 (source:
    release) as it is; an image without shadow, or with nothing else, counts 50 at least.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self.s, self.e = py_sod_metrics.Smeasure(), py_sod_metrics.Emeasure()
        self.wf, self.mae = py_sod_metrics.WeightedFmeasure(), py_sod_metrics.MAE()
        handler = py_sod_metrics.BERHandler(with_dynamic=False, with_adaptive=False, with_binary=True)
        self.ber = py_sod_metrics.FmeasureV2({"ber": handler})

    def add(self, probability: np.ndarray, mask: np.ndarray) -> None:
        """One image: probability (H, W) float in [0, 1], mask (H, W) bool."""
        probability = probability.astype(np.float64)
        if self.task == "shadow":
            # Thresholded here: the handler's own step stretches a prediction to [0, 1] first.
            binary = (probability > 125 / 255).astype(np.float64)
            self.ber.step(binary, mask, normalize=False)
        else:
            for metric in (self.s, self.e, self.wf, self.mae):
                metric.step(probability * 255, mask.astype(np.uint8) * 255)  # step takes the range of 8-bit images

    def results(self) -> dict[str, float]:
        """{"S", "E", "wF", "MAE"}, or {"BER"} in percent."""
        if self.task == "shadow":
            return {"BER": 100 * float(self.ber.get_results()["ber"]["binary"])}
        return {
            "S": float(self.s.get_results()["sm"]),
            "E": float(self.e.get_results()["em"]["curve"].mean()),
            "wF": float(self.wf.get_results()["wfm"]),
            "MAE": float(self.mae.get_results()["mae"]),
        }


def show(metrics: dict[str, float]) -> str:
    """Metrics as the tables print them: `S 0.9142  E 0.9504  wF 0.8560  MAE 0.0171`, or `BER 1.04`."""
    return "  ".join(f"{name} {value:.{2 if name == 'BER' else 4}f}" for name, value in metrics.items())


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def loader(data: Pairs, batch_size: int, workers: int, **options) -> DataLoader:
    """A DataLoader over `data`; page-locked memory where there is a GPU to copy to."""
    return DataLoader(data, batch_size, num_workers=workers, pin_memory=torch.cuda.is_available(), **options)


def progress(images: int, what: str) -> tqdm:
    """A bar that counts images, with images/s; only where stderr is a terminal, and gone when it is full."""
    return tqdm(total=images, desc=what, unit="img", leave=False, disable=None)


@torch.inference_mode()
def evaluate(model: TSSAM, data: Pairs, task: str, batch_size: int, workers: int, save: Path | None = None) -> dict:
    """Score a model (on its own device) and leave it in the mode it was in.

    Args:
        save: existing folder for the masks: <image's stem>.png, 8-bit grey, at the image's own size.

    Returns:
        `Metrics.results`.
    """
    device = next(model.parameters()).device
    metrics, was_training = Metrics(task), model.training
    model.eval()
    try:
        with progress(len(data), "evaluate") as bar:
            for images, masks, indices in loader(data, batch_size, workers):
                logits = model(images.to(device, non_blocking=True)).float()
                for logit, mask, index in zip(logits, masks, indices.tolist(), strict=True):
                    metrics.add(logit.sigmoid()[0].cpu().numpy(), mask[0].numpy() > 0)
                    if save is not None:
                        save_mask(logit, data.pairs[index][0], save)
                bar.update(len(images))
    finally:
        model.train(was_training)
    return metrics.results()


def save_mask(logit: Tensor, image_file: Path, folder: Path) -> None:
    """Write logit (1, S, S) as folder/<stem>.png at the size of `image_file`: bilinear, sigmoid, rounded to 8 bits."""
    with Image.open(image_file) as image:
        width, height = image.size
    full = F.interpolate(logit[None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    grey = (full.sigmoid() * 255).round().byte().cpu().numpy()
    write(folder / f"{image_file.stem}.png", lambda file: Image.fromarray(grey).save(file, "PNG"))


def save_overview(files: list[tuple[Path, Path, Path]], path: Path, height: int = 160) -> None:
    """Draw a row `image | ground truth | prediction` for each (image, mask, prediction) file into one PNG."""
    rows = []
    for image_file, mask_file, prediction_file in files:
        mask = read_image(mask_file, "L").point(lambda grey: 255 if grey > 0 else 0)
        row = [read_image(image_file, "RGB"), mask, read_image(prediction_file, "L")]
        width = max(1, round(height * row[0].width / row[0].height))
        rows.append([panel.resize((width, height)).convert("RGB") for panel in row])
    gap, title = 6, 16
    column = max(row[0].width for row in rows) + gap
    sheet = Image.new("RGB", (3 * column + gap, title + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, name in enumerate(("image", "ground truth", "prediction")):
        draw.text((gap + x * column, 2), name, fill="black")
        for y, row in enumerate(rows):
            sheet.paste(row[x], (gap + x * column, title + y * (height + gap)))
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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows a script's docstring as it is and whose errors are one line (exit code 2)."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def at_least(minimum: int, multiple_of: int = 1) -> Callable[[str], int]:
    """An argument that is a whole number of at least `minimum`, and a multiple of `multiple_of`."""

    def whole_number(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text) or int(text) < minimum or int(text) % multiple_of:
            multiple = f", and a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}{multiple}")
        return int(text)

    return whole_number


def usable_device(text: str) -> torch.device:
    """An argument that names a device this machine has, such as cuda, cuda:1 or cpu."""
    try:
        torch.zeros(1, device=text).item()
        return torch.device(text)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {one_line(error)}") from error


def add_machine_arguments(parser: Parser) -> None:
    """The arguments train.py and evaluate.py share: how many workers and which device; they change no number."""
    default, cores = "cuda" if torch.cuda.is_available() else "cpu", min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--workers", type=at_least(0), default=cores, help=f"processes that read images; 0: none (here: {cores})"
    )
    parser.add_argument(
        "--device", type=usable_device, default=default, help=f"cuda, cuda:1, cpu, ... (here: {default})"
    )


def run(main: Callable[[], None]) -> None:
    """Run a script's main: an InputError is one line on stderr and exit code 2, anything else keeps its traceback."""
    try:
        try:
            main()
        except torch.OutOfMemoryError as error:
            raise InputError(
                "the GPU has too little memory for this; lower --batch-size, or train a smaller --size or --sam"
            ) from error
    except InputError as error:
        # One raised in a loader's worker arrives with that worker's traceback in front of its own line.
        message = str(error).rsplit("InputError: ", 1)[-1].strip()
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py: last.pt or best.pt")
    parser.add_argument("--data", help="data set, its test split if it has one (default: the one validated on)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the masks there, at each image's own size")
    parser.add_argument("--sam-checkpoint", metavar="FILE", help="SAM's weights (default: the file used in training)")
    parser.add_argument("--batch-size", type=at_least(1), default=2, help="images at a time (default 2)")
    add_machine_arguments(parser)
    args = parser.parse_args()

    if args.save is not None:
        make_folder(args.save, "--save")
    model, info = load_checkpoint(args.ckpt, args.sam_checkpoint)
    if args.data is None and info.get("val") is None:
        raise InputError(f"{args.ckpt}: trained without a validation set; name the data: --data")
    root = Path(args.data or info["val"])
    folder = find_split(root, "test") or root
    data = Pairs(find_pairs(folder), model.config["image_size"])
    if args.save is not None and args.save.resolve() in {file.resolve().parent for pair in data.pairs for file in pair}:
        raise InputError(f"--save: {args.save} holds the data itself; name another folder")
    print(f"{args.ckpt}: {info['task']}, {model.config['sam']}, epoch {info.get('epoch', 'unknown')}")
    print(f"{folder}: {len(data)} pairs, paper protocol (compared at {data.size} x {data.size})", flush=True)
    metrics = evaluate(model.to(args.device), data, info["task"], args.batch_size, args.workers, args.save)
    print(show(metrics))
    if args.save is not None:
        print(f"masks: {args.save}")


if __name__ == "__main__":
    run(main)
