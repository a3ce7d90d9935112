"""Train TS-SAM.

    python train.py --task sod --data DUTS          TS-SAM_H as in the paper; --sam vit_b for TS-SAM_B
    python train.py --task cod --data COD --val COD/TestDataset/CAMO
    python train.py --task shadow --data ISTD       with the high-frequency embedding, 100 epochs
    python train.py --demo                          draws a small data set and trains on it: no GPU, no downloads

The defaults are the paper's values: Adam, learning rate 8e-4 falling along a cosine, a batch of 8, 80 epochs (shadows
100), no augmentation but the resize (to 1024 x 1024, as in the released code). After every epoch the model is scored on
the validation set; `last.pt` and `best.pt` (best S-measure, for shadows best BER) appear under --out, for
`evaluate.py --ckpt`.
"""

import argparse
import math
import sys
import time
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from evaluate import (
    Pairs,
    Parser,
    add_machine_arguments,
    at_least,
    check_sizes,
    evaluate,
    find_sets,
    loader,
    make_folder,
    progress,
    run,
    save_overview,
    search,
    show,
)
from tssam import ENCODERS, InputError, build_tssam, fingerprint, sam_weights, save_checkpoint

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
    """Shadows: P/(P+N) * BCE(pos_weight = N/P), with P positive and N negative pixels in the batch.

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
# The script


def free_folder(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    candidates = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(candidate for candidate in candidates if not candidate.exists())


# Enough for a few shapes, two CPU cores and about a minute; what is given on the command line still counts.
DEMO = {"sam": "tiny", "sam_checkpoint": "random", "size": 256, "epochs": 10, "batch_size": 4, "lr": 2e-3}


def positive(text: str) -> float:
    """An argument that is a finite number above zero."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return float(text)


def parse_arguments() -> argparse.Namespace:
    """The command line, and for what it leaves out the paper's values (with --demo: the demo's).

    Raises:
        InputError: arguments that do not go together.
    """
    parser = Parser(__doc__)
    parser.add_argument("--task", choices=("sod", "cod", "shadow"), default="sod", help="(default sod)")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="data sets to train on, joined: their train split, or any folder of images beside one of masks",
    )
    parser.add_argument(
        "--val", type=Path, nargs="+", metavar="DIR", help="data sets to validate on, joined (default: the test splits)"
    )
    parser.add_argument("--sam", choices=tuple(ENCODERS), default="vit_h", help="SAM's encoder (default vit_h)")
    parser.add_argument(
        "--sam-checkpoint",
        metavar="FILE",
        help="SAM's weights, or `random` for a random encoder (default: checkpoints/<published name>, downloaded there"
        " if missing)",
    )
    parser.add_argument("--size", type=at_least(32, 16), default=1024, help="image side (default 1024)")
    parser.add_argument("--epochs", type=at_least(1), help="(default 80; shadow 100)")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="images in a step (default 8)")
    parser.add_argument("--lr", type=positive, default=8e-4, help="first learning rate (default 8e-4)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (default runs/<task>-<sam>, or -2, -3, ...)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and order of images (default 0)")
    parser.add_argument("--demo", action="store_true", help=f"draw a small data set and train on it, with {DEMO}")
    add_machine_arguments(parser)
    args = parser.parse_args()
    if args.demo:
        if args.data or args.val:
            raise InputError("--demo draws its own data set; leave out --data and --val")
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    elif args.data is None:
        raise InputError("--data: name the data set to train on, or try --demo")
    if args.epochs is None:
        args.epochs = 100 if args.task == "shadow" else 80
    return args


def main() -> None:
    args = parse_arguments()
    if args.out is None:
        args.out = free_folder(Path("runs") / ("demo" if args.demo else f"{args.task}-{args.sam}"))
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out: {args.out} is a file; name a folder")
    if any((args.out / name).exists() for name in ("last.pt", "best.pt")):
        raise InputError(f"--out: {args.out} holds the checkpoints of another run; name another folder")

    # Data
    if args.demo:
        make_folder(args.out, "--out")
        args.data = [args.out / "DUTS"]
        draw_demo(args.data[0])
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
        print(f"train: {s}")
    for s in val_sets or ["none, so there will be no best.pt"]:
        print(f"val:   {s}")
    if {s.folder.resolve() for s in train_sets} & {s.folder.resolve() for s in val_sets}:
        print("warning: validation is on images of the training set", file=sys.stderr)
    train_set = Pairs([pair for s in train_sets for pair in s.pairs], args.size)
    val_pairs = [pair for s in val_sets for pair in s.pairs]
    check_sizes(train_set.pairs + val_pairs)

    # Model. The encoder's random weights are the first that are drawn from the seed: load_checkpoint draws them again.
    if args.sam_checkpoint == "random":
        print("warning: the encoder is random, not SAM's: results say nothing about TS-SAM", file=sys.stderr)
        weights = None
    else:
        weights = args.sam_checkpoint or sam_weights(args.sam)
    torch.manual_seed(args.seed)
    model = build_tssam(args.sam, args.size, high_freq=args.task == "shadow", sam_checkpoint=weights)
    checkpoint_info = dict(
        task=args.task,
        encoder=fingerprint(model),
        encoder_seed=args.seed if weights is None else None,
        sam_checkpoint=str(Path(weights).resolve()) if weights else None,
        val=[str(s.folder.resolve()) for s in val_sets],
        args={name: [*map(str, v)] if isinstance(v, list) else str(v) for name, v in vars(args).items()},
    )
    model.to(args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    own, total = (sum(p.numel() for p in group) for group in (trained, model.parameters()))
    print(f"model: {args.sam} at {args.size} x {args.size} on {args.device}, {own:,} of {total:,} parameters trained")
    print(f"out:   {args.out}", flush=True)

    loss_of = balanced_bce if args.task == "shadow" else bce_iou
    optimizer = torch.optim.Adam(trained, lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs, eta_min=1e-7)
    # The last batch of an epoch may be smaller: every image is seen once.
    batches = loader(train_set, args.batch_size, args.workers, shuffle=True, persistent_workers=args.workers > 0)
    make_folder(args.out, "--out")
    best = -math.inf

    for epoch in range(1, args.epochs + 1):
        model.train()
        total_loss, lr, start = 0.0, optimizer.param_groups[0]["lr"], time.monotonic()
        with progress(len(train_set), f"epoch {epoch}/{args.epochs}") as bar:
            for images, masks in batches:
                images, masks = (t.to(args.device, non_blocking=True) for t in (images, masks))
                loss = loss_of(model(images), masks)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total_loss += loss.item() * len(images)
                bar.update(len(images))
                bar.set_postfix(loss=f"{loss.item():.4f}")
        speed = len(train_set) / (time.monotonic() - start)
        schedule.step()
        if not all(p.isfinite().all() for p in trained):  # an earlier epoch's checkpoint stays
            raise InputError(f"the weights are no longer finite in epoch {epoch}; try a lower --lr than {args.lr:g}")

        checkpoint_info["epoch"] = epoch
        save_checkpoint(args.out / "last.pt", model, **checkpoint_info)  # before anything in validation can fail

        line = f"epoch {epoch}/{args.epochs}  loss {total_loss / len(train_set):.4f}  lr {lr:.2e}  {speed:.2f} images/s"
        if val_sets:
            metrics = evaluate(model, val_pairs, args.task, "paper", args.batch_size, args.workers).results()
            line += f"  {show(metrics)}"
            score = -metrics["BER"] if args.task == "shadow" else metrics["S"]
            if score > best:
                best = score
                line += "  best"
                save_checkpoint(args.out / "best.pt", model, metrics=metrics, **checkpoint_info)
        print(line, flush=True)

    if args.demo:
        masks = args.out / "masks"
        masks.mkdir(exist_ok=True)
        metrics = evaluate(model, val_pairs, args.task, "paper", args.batch_size, args.workers, masks).results()
        shown = [(image.stem, image, mask, masks / f"{image.stem}.png") for image, mask in val_pairs[:6]]
        save_overview(shown, args.out / "demo.png")
        print(f"demo:  {show(metrics)} on {len(val_pairs)} unseen images; masks in {masks}")
        print(f"demo:  {args.out / 'demo.png'} shows image | ground truth | prediction")


if __name__ == "__main__":
    run(main)
