"""Train TS-SAM.

    python train.py --task sod --data DUTS          TS-SAM_H as in the paper; --sam vit_b for TS-SAM_B
    python train.py --task cod --data COD --val COD/TestDataset/CAMO
    python train.py --task shadow --data ISTD       with the high-frequency embedding, 100 epochs
    python train.py --demo                          draws a small data set and trains on it: no GPU, no downloads

The defaults are the paper's values: Adam, learning rate 8e-4 falling along a cosine, a batch of 8, 80 epochs (shadows
100), no augmentation but the resize (to 1024 x 1024, as in the released code). After every epoch the model is scored on
the validation set; `last.pt` and `best.pt` (best S-measure, for shadows best BER) appear under --out, for
`evaluate.py --ckpt`. A run that was stopped goes on with --resume; `torchrun --nproc_per_node 4 train.py ...` shares it
among four GPUs.
"""

import argparse
import csv
import errno
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, count
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from evaluate import (
    Pairs,
    add_machine_arguments,
    at_least,
    check_sizes,
    evaluate,
    find_sets,
    leave_signals,
    make_folder,
    progress,
    run,
    save_overview,
    search,
    show,
    write_csv,
)
from tssam import (
    ENCODERS,
    PRECISIONS,
    TSSAM,
    InputError,
    Parser,
    build_tssam,
    fingerprint,
    load_checkpoint,
    load_file,
    peak_memory,
    sam_weights,
    save_checkpoint,
    write,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---------------------------------------------------------------------------------------------------------------------
# Losses (source: paper; their form from the release), in float32 whatever the logits are


def bce_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """Camouflaged and salient objects: BCE + (1 - IoU), the IoU of each image's sigmoid map, averaged.

    Args:
        logits, masks: (B, 1, S, S); masks of 0 and 1.

    Returns:
        Scalar, float32.
    """
    logits, masks = logits.float(), masks.float()
    probability = logits.sigmoid()
    intersection = (probability * masks).sum(dim=(1, 2, 3))
    union = (probability + masks).sum(dim=(1, 2, 3)) - intersection
    iou = intersection / union.clamp_min(1e-6)  # an empty mask rightly predicted leaves 0 / 0
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - iou).mean()


def balanced_bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Shadows: P/(P+N) * BCE(pos_weight = N/P), with P positive and N negative pixels in the batch (with several GPUs
    or --accumulate: in what one of them takes at once, as in the release).

    Written as what that is, positive pixels weighing N/(P+N) and negative ones P/(P+N), which P = 0 does not break.

    Args:
        logits, masks: (B, 1, S, S); masks of 0 and 1.

    Returns:
        Scalar, float32.
    """
    logits, masks = logits.float(), masks.float()
    positive = masks.mean()
    weight = torch.where(masks > 0, 1 - positive, positive)
    return F.binary_cross_entropy_with_logits(logits, masks, weight=weight)


# ---------------------------------------------------------------------------------------------------------------------
# The demo's data set


def draw_demo(root: Path) -> None:
    """Draw 96 + 24 salient shapes on textured backgrounds under `root`, in the layout of DUTS; always the same ones."""
    rng = np.random.default_rng(0)

    def texture(size: tuple[int, int], colour: np.ndarray) -> np.ndarray:
        """(height, width, 3): a colour with noise of three grains."""
        noise = sum(
            np.array(Image.fromarray(rng.normal(size=(grain, grain)).astype(np.float32)).resize(size)) * strength
            for grain, strength in ((4, 14), (20, 12), (90, 10))
        )
        return colour + noise[..., None]

    def blob(size: tuple[int, int], radius: float, centre: np.ndarray) -> np.ndarray:
        """(height, width) bool: a polygon, an ellipse or a flower, stretched and turned."""
        corners, lobes, turn = rng.choice([3, 4, 5, 80, 80]), rng.integers(2, 6), rng.uniform(0, 2 * np.pi)
        angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        r = radius * (1 + rng.uniform(0, 0.3) * np.cos(lobes * angle))
        x, y = r * np.cos(angle), r * np.sin(angle) * rng.uniform(0.6, 1)
        corners_xy = np.stack([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y], axis=1)
        canvas = Image.new("1", size)
        ImageDraw.Draw(canvas).polygon([tuple(xy) for xy in corners_xy + centre], fill=1)
        return np.array(canvas)

    for split, number in (("DUTS-TR", 96), ("DUTS-TE", 24)):
        images, masks = root / split / f"{split}-Image", root / split / f"{split}-Mask"
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(exist_ok=True)
        for i in range(number):
            size = tuple(int(side) for side in rng.integers(200, 321, 2))  # width, height
            ground = rng.uniform((40, 70, 70), (130, 160, 160))  # dull and cold
            image = texture(size, ground)
            for _ in range(6):  # faint patches, to be overlooked
                patch = blob(size, rng.uniform(6, 20), rng.uniform(0, 1, 2) * size)
                image[patch] += rng.uniform(-18, 18, 3)
            mask, paint = np.zeros(size[::-1], bool), rng.uniform((170, 40, 20), (250, 170, 110))  # bright and warm
            for _ in range(rng.integers(1, 3)):
                mask |= blob(size, rng.uniform(0.14, 0.3) * min(size), rng.uniform(0.3, 0.7, 2) * size)
            image = np.where(mask[..., None], texture(size, paint), image)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(images / f"demo_{i:03}.jpg", quality=92)
            Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"demo_{i:03}.png")


# ---------------------------------------------------------------------------------------------------------------------
# The order of images


@dataclass(frozen=True)
class Part:
    """What one process takes through the network at once: (index, flipped) of its images, the share of the whole batch
    they are, and whether the batch's step follows."""

    items: list[tuple[int, bool]]
    share: float
    last: bool


class Batches(Sampler):
    """The batches of an epoch for one of `world` processes, each cut into at most `accumulate` parts.

    The order (and, with `flip`, which images are mirrored) follows from seed and epoch alone. A batch is dealt out to
    the processes image by image, so that none is seen twice or left out; only a last one that is smaller than `world`
    is dropped (`dropped` says how many images that is).
    """

    def __init__(
        self, images: int, batch_size: int, accumulate: int, rank: int, world: int, seed: int, flip: bool
    ) -> None:
        self.images, self.batch_size, self.accumulate = images, batch_size, accumulate
        self.rank, self.world, self.seed, self.flip = rank, world, seed, flip
        self.dropped = images % batch_size if images % batch_size < world else 0
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.images)
        flipped = rng.random(self.images) < (0.5 if self.flip else 0)
        self.parts: list[Part] = []
        for start in range(0, self.images - self.dropped, self.batch_size):
            batch = order[start : start + self.batch_size]
            count = min(self.accumulate, len(batch) // self.world)  # the same in every process
            for i, part in enumerate(np.array_split(batch[self.rank :: self.world], count), start=1):
                items = [(int(index), bool(flipped[index])) for index in part]
                self.parts.append(Part(items, len(part) / len(batch), i == count))

    def __iter__(self):
        return iter(part.items for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts)


# ---------------------------------------------------------------------------------------------------------------------
# The script


def free_folder(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    candidates = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(candidate for candidate in candidates if not candidate.exists())


# Enough for a few shapes, two CPU cores and a minute or two; what is given on the command line still counts.
DEMO = {"sam": "tiny", "sam_checkpoint": "random", "size": 256, "epochs": 10, "batch_size": 4, "lr": 2e-3}

# With another value of one of these, a resumed run would be another experiment.
EXPERIMENT = (
    *("task", "sam", "size", "epochs", "batch_size", "accumulate", "lr", "recipe", "precision", "seed", "demo"),
    *("csa_blocks", "mrm_blocks", "sync_bn"),
)
MACHINE = ("workers", "device", "grad_checkpoint", "resume")  # what a resumed run takes anew
SAMPLES = 4  # images in samples.png


def positive(text: str) -> float:
    """An argument that is a finite number above zero."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return float(text)


def blocks(text: str) -> list[int]:
    """An argument that names encoder blocks, counted from 0: `2-11`, or `0,3,5-7`."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        named = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not named:
            raise argparse.ArgumentTypeError(f"{text!r} names no blocks; write them as 2-11 or 0,3,5-7")
        chosen |= set(named)
    return sorted(chosen)


def plain(value: object) -> object:
    """An argument's value as files can hold it; paths in full, so that they hold anywhere."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value.resolve())
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def parse_arguments() -> tuple[argparse.Namespace, dict | None]:
    """The command line, and for what it leaves out the paper's values (with --demo: the demo's; with --resume: the
    run's). With --resume also the content of the run's last.pt, else None.

    Raises:
        InputError: arguments that do not go together.
    """
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--task", choices=("sod", "cod", "shadow"), default="sod", help="(default sod)")
    group.add_argument(
        "--data",
        type=Path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="data sets to train on, joined: their train split, or any folder of images beside one of masks",
    )
    group.add_argument(
        "--val",
        type=Path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="data sets to validate on, joined (default: the test splits, as in the released code)",
    )
    group.add_argument("--demo", action="store_true", help=f"draw a small data set and train on it, with {DEMO}")

    group = parser.add_argument_group("experiment; in brackets the default and its source")
    group.add_argument(
        "--sam", choices=tuple(ENCODERS), default="vit_h", help="SAM's encoder (vit_h: the paper's TS-SAM_H)"
    )
    group.add_argument(
        "--sam-checkpoint",
        metavar="FILE",
        help="SAM's weights, or `random` for a random encoder (checkpoints/<published name>, downloaded if missing)",
    )
    group.add_argument("--size", type=at_least(32, 16), default=1024, help="image side (1024: released code)")
    group.add_argument("--epochs", type=at_least(1), help="(80, shadow 100: paper)")
    group.add_argument("--batch-size", type=at_least(1), default=8, help="images in a step, over all GPUs (8: paper)")
    group.add_argument("--lr", type=positive, default=8e-4, help="first learning rate (8e-4: paper)")
    group.add_argument(
        "--recipe",
        choices=("paper", "released"),
        default="paper",
        help="released: AdamW with weight decay 0.01 and horizontal flips, as in the released code (paper: Adam, none)",
    )
    group.add_argument("--csa-blocks", type=blocks, help="encoder blocks with a CSA, such as 2-11 (all: paper)")
    group.add_argument("--mrm-blocks", type=blocks, help="encoder blocks with an MRM (the last 12: released code)")
    group.add_argument("--seed", type=at_least(0), default=0, help="of weights and order of images (0: ours)")
    group.add_argument(
        "--accumulate",
        type=at_least(1),
        default=1,
        help="take a batch in so many parts, one after the other; batch norms see a part (1: ours)",
    )
    group.add_argument(
        "--sync-bn", action="store_true", help="batch norm over all GPUs' images, not each GPU's own (off: paper)"
    )
    group.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        help="of the network; losses, FFT and metrics are fp32 (bf16 on a GPU that has it, else fp32: ours)",
    )

    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help="its folder (default runs/<task>-<sam>, or -2, -3, ...)")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out (without it: in runs/<task>-<sam>) from its last whole epoch",
    )

    group = add_machine_arguments(parser)
    group.add_argument(
        "--grad-checkpoint", action="store_true", help="compute the encoder's blocks again in backward: less memory"
    )
    args, stored = parser.parse_args(), None
    if args.resume:
        if args.out is None:
            args.out = Path("runs") / ("demo" if args.demo else f"{args.task}-{args.sam}")
        stored = load_file(args.out / "last.pt")
        folders = {"data": args.data, "val": args.val, "out": args.out}  # which may have moved
        if not ({"args", "optimizer", "epoch"} <= stored.keys() and {*EXPERIMENT, *folders} <= stored["args"].keys()):
            raise InputError(f"--resume: {args.out / 'last.pt'} is not the last.pt of a run of this train.py")
        parser.set_defaults(**{n: v for n, v in stored["args"].items() if n not in MACHINE and n not in folders})
        args = parser.parse_args()
        changed = [name for name in EXPERIMENT if plain(getattr(args, name)) != stored["args"][name]]
        if (args.sam_checkpoint == "random") != (stored["encoder_seed"] is not None):
            changed.append("sam_checkpoint")
        if changed:
            names = ", ".join(
                f"--{n.replace('_', '-')} {getattr(args, n)} (it has {stored['args'][n]})" for n in changed
            )
            raise InputError(f"--resume: that would be another experiment than {folders['out']}: {names}")
        for name, value in folders.items():
            kept = stored["args"][name]
            setattr(args, name, value or (kept and [Path(folder) for folder in kept]))
        if args.demo:
            args.data = [args.out / "DUTS"]
        return args, stored
    if args.demo:
        if args.data or args.val:
            raise InputError("--demo draws its own data set; leave out --data and --val")
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    elif args.data is None:
        raise InputError("--data: name the data set to train on, or try --demo")
    if args.epochs is None:
        args.epochs = 100 if args.task == "shadow" else 80
    if args.precision is None:
        has_bf16 = args.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if has_bf16 else "fp32"
    return args, None


def join_processes(device: torch.device) -> tuple[int, int]:
    """(this process's number, how many there are): as torchrun started them, else (0, 1)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    patience = timedelta(hours=3)  # the first process may have SAM's weights to download while the others wait
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=patience, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=patience)
    return dist.get_rank(), dist.get_world_size()


def validate(model: TSSAM, pairs: list, args: argparse.Namespace, rank: int, world: int) -> dict[str, float]:
    """The metrics over all `pairs`, of which each process scores its share with the weights of the first."""
    if world > 1:
        for buffer in model.buffers():  # the batch norms' statistics, which are each process's own
            dist.broadcast(buffer, 0)
    with autocast(args):
        scores = evaluate(model, pairs[rank::world], args.task, "paper", at_once(args, world), args.workers)
    if world > 1:
        shares: list = [None] * world
        dist.all_gather_object(shares, scores)
        scores = shares[0]
        for share in shares[1:]:
            scores.join(share)
    return scores.results()


def at_once(args: argparse.Namespace, world: int) -> int:
    """Images a process takes through the network at once, in training and so in validation."""
    return max(1, args.batch_size // (world * args.accumulate))


def autocast(args: argparse.Namespace) -> torch.autocast:
    """The network's precision, for a `with`; outside of it, and in fp32, all is float32."""
    dtype = PRECISIONS[args.precision]
    return torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32)


def wait_for_all(world: int) -> None:
    """Go on when every process has come here."""
    if world > 1:
        dist.barrier()


def score_of(metrics: dict[str, float]) -> float:
    """What the best epoch has most of: S-measure, or for shadows the least BER."""
    return -metrics["BER"] if "BER" in metrics else metrics["S"]


def draw_samples(model: TSSAM, pairs: list, args: argparse.Namespace, path: Path) -> None:
    """Draw the model's predictions of a few images beside their masks."""
    with tempfile.TemporaryDirectory() as folder, autocast(args):
        evaluate(model, pairs, args.task, "paper", 1, 0, Path(folder))
        save_overview([(i.stem, i, m, Path(folder) / f"{i.stem}.png") for i, m in pairs], path)


class Log:
    """`log.csv` under the run's folder, a row an epoch; where the tensorboard package is installed, its files too."""

    def __init__(self, folder: Path, done: int, rank: int) -> None:
        """Go on with the log that is there, from the epoch after `done`; only the first process writes."""
        self.file, self.rows, self.board = folder / "log.csv", [], None
        if done > 0 and self.file.exists():
            try:
                with self.file.open(newline="") as file:
                    self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= done]
            except (OSError, ValueError, KeyError) as error:
                raise InputError(f"{self.file}: not the log of a run; move it away to start a new one") from error
        if rank == 0:
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder), purge_step=len(self.rows) + 1)

    def add(self, row: dict, picture: Path | None) -> None:
        self.rows.append(row)
        write_csv(self.rows, tuple(row), self.file)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["epoch"])
            if picture is not None:
                with Image.open(picture) as image:
                    self.board.add_image("samples", np.array(image), row["epoch"], dataformats="HWC")
            self.board.flush()


def main() -> None:
    args, stored = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as with Ctrl-C
    rank, world = join_processes(args.device)
    try:
        train(args, stored, rank, world)
    except KeyboardInterrupt:
        if rank > 0:
            sys.exit(130)  # the first process says it
        last, how = args.out / "last.pt" if args.out is not None else None, "no epoch was finished"
        if last is not None and last.exists():
            start = f"torchrun --nproc_per_node {world}" if world > 1 else "python"
            again = f"{start} train.py --resume --out {shlex.quote(str(args.out))}"
            how = f"`{again}` goes on after epoch {load_file(last)['epoch']}"
        raise KeyboardInterrupt(f"stopped; {how}") from None
    except RuntimeError as error:
        if world > 1 and re.search("onnection (closed|reset)", str(error)):  # gloo's; NCCL's end with torchrun
            raise InputError("another process has stopped; its own message says why") from error
        raise
    finally:
        if world > 1:
            dist.destroy_process_group()


def lock(folder: Path) -> TextIO | None:
    """Keep other runs out of a folder as long as what is returned is open, and this process lives.

    Raises:
        InputError: another run is going on in it.
    """
    if fcntl is None:
        return None
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not kept on by a killed run's workers
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(f"--out: a run is going on in {folder}; name another folder") from error
    return file


def names_of(pairs: list[tuple[Path, Path]]) -> str:
    """sha256 of the images' names in their order, which the order of an epoch builds on."""
    return hashlib.sha256("\n".join(image.name for image, _ in pairs).encode(errors="surrogateescape")).hexdigest()


def train(args: argparse.Namespace, stored: dict | None, rank: int, world: int) -> None:
    """The whole run in one of `world` processes; `stored` is the content of the last.pt it goes on from."""

    def say(*text: object, **options) -> None:
        if rank == 0:
            print(*text, **options, flush=True)

    # The run's folder, which the first process chooses
    if args.out is None:
        args.out = free_folder(Path("runs") / ("demo" if args.demo else f"{args.task}-{args.sam}"))
    if world > 1:
        chosen = [args.out]
        dist.broadcast_object_list(chosen)
        args.out = chosen[0]
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out: {args.out} is a file; name a folder")
    last, best = args.out / "last.pt", args.out / "best.pt"
    if stored is None and (last.exists() or best.exists()):
        raise InputError(f"--out: {args.out} holds a run; go on with it by --resume, or name another folder")
    if args.batch_size < world * args.accumulate:
        raise InputError(
            f"--batch-size: {args.batch_size} is less than {world} processes x --accumulate {args.accumulate}"
        )
    if args.sync_bn and args.device.type != "cuda":
        raise InputError("--sync-bn: works on GPUs only")

    # Data
    if args.demo and stored is None:
        args.data = [args.out / "DUTS"]
        if rank == 0:
            make_folder(args.out, "--out")
            draw_demo(args.data[0])
        wait_for_all(world)
    train_sets = find_sets(args.data, "train")
    if args.val:
        val_sets = find_sets(args.val, "test")
    else:
        val_sets = [s for root in args.data for s in search(root, "test") if s.split == "test"]
        val_sets = [s for s in val_sets if s.folder not in [t.folder for t in train_sets]]
    for s in val_sets:
        if s.pairs[0][1] is None:
            raise InputError(f"{s.folder}: no folder of masks, which validation needs")
    for s in train_sets:
        say(f"train: {s}")
    for s in val_sets or ["none, so there will be no best.pt"]:
        say(f"val:   {s}")
    if rank == 0 and {s.folder.resolve() for s in train_sets} & {s.folder.resolve() for s in val_sets}:
        print("warning: validation is on images of the training set", file=sys.stderr)
    train_set = Pairs([pair for s in train_sets for pair in s.pairs], args.size)
    val_pairs = [pair for s in val_sets for pair in s.pairs]
    if rank == 0:
        check_sizes(train_set.pairs + val_pairs)
    names = {"--data": names_of(train_set.pairs), "--val": names_of(val_pairs)}
    if stored is not None:
        for flag in names:
            if names[flag] != stored["images"][flag]:
                raise InputError(f"--resume: {flag} has other images than the run in {args.out}")
        if world != stored["world"] and rank == 0:
            text = f"this run had {stored['world']} processes, not {world}: its batch norms saw other parts of a batch"
            print(f"warning: {text}", file=sys.stderr)

    # Model. The encoder's random weights are the first that are drawn from the seed: load_checkpoint draws them again.
    if args.sam_checkpoint == "random" and rank == 0:
        print("warning: the encoder is random, not SAM's: results say nothing about TS-SAM", file=sys.stderr)
    weights = args.sam_checkpoint if args.sam_checkpoint != "random" else None
    if rank > 0:
        wait_for_all(world)  # for the first process, which downloads SAM's weights if need be
    if stored is not None:
        model, info = load_checkpoint(last, weights)
        weights = weights or info["sam_checkpoint"]
    else:
        weights = weights or (sam_weights(args.sam) if args.sam_checkpoint is None else None)
        torch.manual_seed(args.seed)
        high_freq = args.task == "shadow"
        model = build_tssam(args.sam, args.size, high_freq, weights, args.csa_blocks, args.mrm_blocks)
    if rank == 0:
        wait_for_all(world)
    checkpoint_info = dict(
        task=args.task,
        encoder=fingerprint(model),
        encoder_seed=args.seed if args.sam_checkpoint == "random" else None,
        sam_checkpoint=str(Path(weights).resolve()) if weights else None,
        val=[str(s.folder.resolve()) for s in val_sets],
        args={name: plain(value) for name, value in vars(args).items()},
        images=names,
        world=world,
    )
    model.grad_checkpoint = args.grad_checkpoint
    model.use_attention(args.attention)
    model.store_encoder(PRECISIONS[args.precision])
    model.to(args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    own, total = (sum(p.numel() for p in group) for group in (trained, model.parameters()))
    processes = f"{world} x " if world > 1 else ""
    say(f"model: {args.sam} at {args.size} x {args.size}, {own:,} of {total:,} parameters trained")
    say(f"on:    {processes}{args.device}, {args.precision}; batches of {args.batch_size}")
    say(f"out:   {args.out}")
    net: nn.Module = model
    if args.sync_bn:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if world > 1:  # averages the processes' gradients, once a step
        net = DistributedDataParallel(net, device_ids=[args.device] if args.device.type == "cuda" else None)

    loss_of = balanced_bce if args.task == "shadow" else bce_iou
    released = args.recipe == "released"
    optimizer = (
        torch.optim.AdamW(trained, args.lr, weight_decay=0.01) if released else torch.optim.Adam(trained, args.lr)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs, eta_min=1e-7)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    batches = Batches(len(train_set), args.batch_size, args.accumulate, rank, world, args.seed, flip=released)
    if not batches.parts:
        raise InputError(f"--data: {len(train_set)} images are too few for {world} processes")
    if batches.dropped:
        say(f"note:  {batches.dropped} images of each epoch's order are left out, too few for {world} processes")
    loader = DataLoader(
        train_set,
        batch_sampler=batches,
        num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
        persistent_workers=args.workers > 0,
        worker_init_fn=leave_signals,
    )
    done, best_score = 0, -math.inf
    if stored is not None:
        done = stored["epoch"]
        optimizer.load_state_dict(stored["optimizer"])
        schedule.load_state_dict(stored["schedule"])
        scaler.load_state_dict(stored["scaler"])
        if best.exists():
            metrics = load_file(best).get("metrics")
            if not metrics:
                raise InputError(f"{best}: not the best.pt of a run; move it away")
            best_score = score_of(metrics)
    if rank == 0:
        make_folder(args.out, "--out")
        held = lock(args.out)  # noqa: F841, until this function ends
        write(args.out / "args.json", lambda file: file.write_text(json.dumps(checkpoint_info["args"], indent=1)))
    wait_for_all(world)
    log = Log(args.out, done, rank)

    def finish_epoch(row: dict, start: float) -> None:
        """What follows the last.pt of an epoch begun at `start`: validation, best.pt, samples.png, a row of log.csv."""
        nonlocal best_score
        epoch, better = row["epoch"], ""
        if val_sets:
            metrics = validate(model, val_pairs, args, rank, world)
            row = row | metrics
            if score_of(metrics) > best_score:
                best_score, better = score_of(metrics), "  best"
                if rank == 0:
                    save_checkpoint(best, model, metrics=metrics, epoch=epoch, **checkpoint_info)
        if rank == 0:
            picture = args.out / "samples.png" if val_sets else None
            if picture is not None:
                draw_samples(model, val_pairs[:SAMPLES], args, picture)
            log.add(row, picture)
        scores = f"  {show(metrics)}{better}" if val_sets else ""
        left = timedelta(seconds=round((args.epochs - epoch) * (time.monotonic() - start)))
        say(
            f"epoch {epoch}/{args.epochs}  loss {row['loss']:.4f}  lr {row['lr']:.2e}"
            f"  {row['images_per_s']:.2f} images/s  {row['peak_MB']:.0f} MB{scores}  {left} left"
        )

    def good() -> str:
        return f"{last} holds epoch {load_file(last)['epoch']}" if last.exists() else "no epoch was finished"

    if stored is not None:
        say(f"resume: after epoch {done}" + (", its last" if done == args.epochs else ""))
        if not any(int(row["epoch"]) == done for row in log.rows):  # stopped between last.pt and the end of validation
            finish_epoch(stored["row"], time.monotonic() - stored["row"]["seconds"])

    for epoch in range(done + 1, args.epochs + 1):
        net.train()
        batches.set_epoch(epoch)
        torch.manual_seed(args.seed + epoch)  # the random state, like the order of images, follows from seed and epoch
        seen, lr, start = torch.zeros(2, dtype=torch.float64), optimizer.param_groups[0]["lr"], time.monotonic()
        with progress(len(train_set), f"epoch {epoch}/{args.epochs}") as bar:
            for part, (images, masks) in zip(batches.parts, loader, strict=True):
                images, masks = (t.to(args.device, non_blocking=True) for t in (images, masks))
                with nullcontext() if part.last or world == 1 else net.no_sync():
                    with autocast(args):
                        logits = net(images)
                    loss = loss_of(logits, masks)
                    # Each part counts by its share of the batch; the gradients of processes are averaged, not summed.
                    scaler.scale(loss * part.share * world).backward()
                if not math.isfinite(loss.item()):
                    files = ", ".join(str(train_set.pairs[index][0]) for index, _ in part.items)
                    step = 1 + sum(p.last for p in batches.parts[: batches.parts.index(part)])
                    raise InputError(
                        f"epoch {epoch}, step {step}: the loss is {loss.item()} for {files}; {good()}; try a lower --lr"
                    )
                if part.last:
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                seen += torch.tensor([loss.item() * len(images), len(images)])
                bar.update(len(images) * world)
                bar.set_postfix(loss=f"{loss.item():.4f}", MB=f"{peak_memory(args.device):.0f}")
        seconds = time.monotonic() - start
        if world > 1:
            seen = seen.to(args.device)
            dist.all_reduce(seen)
        schedule.step()
        net.eval()  # as in validation, where batch norms use their statistics
        with torch.no_grad(), autocast(args):
            finite = model(images).isfinite().all() and all(p.isfinite().all() for p in trained)
        if not finite:  # an earlier epoch's checkpoint stays
            raise InputError(f"the network is no longer finite after epoch {epoch}; {good()}; try a lower --lr")
        row = dict(
            epoch=epoch,
            loss=(seen[0] / seen[1]).item(),
            lr=lr,
            images_per_s=seen[1].item() / seconds,
            peak_MB=peak_memory(args.device),
            seconds=seconds,
        )
        if rank == 0:
            save_checkpoint(  # before anything in validation can fail
                last,
                model,
                epoch=epoch,
                row=row,
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(),
                scaler=scaler.state_dict(),
                **checkpoint_info,
            )
        finish_epoch(row, start)

    if args.demo and rank == 0:
        masks = args.out / "masks"
        masks.mkdir(exist_ok=True)
        with autocast(args):
            scores = evaluate(model, val_pairs, args.task, "paper", at_once(args, world), args.workers, masks)
        shown = [(image.stem, image, mask, masks / f"{image.stem}.png") for image, mask in val_pairs[:6]]
        save_overview(shown, args.out / "demo.png")
        say(f"demo:  {show(scores.results())} on {len(val_pairs)} unseen images; masks in {masks}")
        say(f"demo:  {args.out / 'demo.png'} shows image | ground truth | prediction")


if __name__ == "__main__":
    run(main)
