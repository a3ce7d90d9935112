"""Train TS-SAM.

    python train.py --task sod --data DUTS          TS-SAM_H as in the paper; --sam vit_b for TS-SAM_B
    python train.py --task cod --data COD           validates on CAMO's test images
    python train.py --task shadow --data ISTD       with the high-frequency embedding, 100 epochs
    python train.py --demo                          draws a small dataset and trains on it, without a GPU

The defaults are the paper's values: Adam, learning rate 8e-4 falling along a cosine, a batch of 8,
80 epochs (shadows 100), no augmentation but the resize (to 1024 x 1024, as in the released code).
After every epoch the model is scored on the validation set; `last.pt` and `best.pt` (best S-measure,
for shadows best BER) appear under --out, for `evaluate.py --ckpt`. --resume continues a run that was
stopped; `torchrun --nproc_per_node 4 train.py ...` shares it among four GPUs.
"""

import argparse
import csv
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import evaluate
import tssam
from evaluate import RANK, WORLD, Pair, autocast, existing, number, say
from tssam import TSSAM, InputError

# -------------------------------------------------------------------------------------------------
# Losses (source: paper; their form from the release)


def bce_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """Camouflaged and salient objects: BCE + (1 - IoU), the IoU of each image's sigmoid map, averaged.

    logits (B, 1, S, S), float32 as `TSSAM` gives them, and masks (B, 1, S, S) of 0 and 1 -> scalar.
    """
    probability = logits.sigmoid()
    intersection = (probability * masks).sum(dim=(1, 2, 3))
    union = (probability + masks).sum(dim=(1, 2, 3)) - intersection
    iou = intersection / union.clamp_min(1e-6)  # 0 / 0: an empty mask, predicted empty (ours)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - iou).mean()


def balanced_bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Shadows: P/(P+N) * BCE(pos_weight = N/P), with P positive and N negative pixels in the batch.

    On several GPUs or with --accumulate: in the micro-batch, as in the release. Written as positive
    pixels weighing N/(P+N) and negative ones P/(P+N), which is the same and allows P = 0. Shapes as
    in `bce_iou`.
    """
    positive_share = masks.mean()  # P/(P+N)
    weight = torch.where(masks > 0, 1 - positive_share, positive_share)
    return F.binary_cross_entropy_with_logits(logits, masks, weight=weight)


def learning_rate(epoch: int, epochs: int, first: float) -> float:
    """A cosine over the epochs, counted from 1, towards 1e-7 (source: paper; the 1e-7 from the release)."""
    last = 1e-7
    return last + (first - last) * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


# -------------------------------------------------------------------------------------------------
# The script

# Enough for a few shapes, two CPU cores and a minute or two; command-line options override these.
DEMO = dict(sam="tiny", sam_checkpoint="random", size=256, epochs=10, batch_size=4, lr=2e-3)

# Options that --resume may not change.
EXPERIMENT = ["task", "sam", "size", "epochs", "batch_size", "micro_batch", "lr", "recipe"]
EXPERIMENT += ["precision", "seed", "csa_blocks", "mrm_blocks", "init", "demo"]


def parse_arguments() -> argparse.Namespace:
    """The command line; with --resume, last.pt fills in what it leaves out."""
    parser = evaluate.Parser(__doc__)
    data = parser.add_argument_group("data")
    experiment = parser.add_argument_group("experiment; in parentheses the default and its source")
    run = parser.add_argument_group("run")
    machine = evaluate.add_machine_options(parser)
    demo = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in DEMO.items())
    # fmt: off
    data.add_argument("--task",                 choices=("sod", "cod", "shadow"), default="sod", help="salient objects (or objects of your own), camouflaged objects, shadows (sod)")
    data.add_argument("--data",                 type=existing, nargs="+",      help="datasets to train on, joined: their train split, or a folder of images beside one of masks")
    data.add_argument("--val",                  type=existing, nargs="+",      help="datasets to validate on, joined (the test splits of --data; cod: CAMO's, if it is among them)")
    data.add_argument("--demo",                 action="store_true",                    help=f"draw a small dataset and train on it, with {demo}")
    experiment.add_argument("--sam",            choices=tuple(tssam.ENCODERS), default="vit_h", help="SAM's encoder (vit_h: the paper's TS-SAM_H)")
    experiment.add_argument("--sam-checkpoint",                                         help="SAM's weights, or `random` for a random encoder (checkpoints/<published name>, downloaded if missing)")
    experiment.add_argument("--init",                                                   help="checkpoint to start from, ours or the authors', trained on the same encoder (none: paper)")
    experiment.add_argument("--size",           type=number(1), default=1024,           help="image side, a multiple of 16 (1024: released code)")
    experiment.add_argument("--epochs",         type=number(1),                         help="number of epochs (80, shadow 100: paper)")
    experiment.add_argument("--batch-size",     type=number(1), default=8,              help="images in a step, over all GPUs (8: paper)")
    experiment.add_argument("--lr",             type=number(0, float), default=8e-4,    help="initial learning rate (8e-4: paper)")
    experiment.add_argument("--recipe",         choices=("paper", "released"), default="paper", help="released: AdamW with weight decay 0.01 and horizontal flips, as in the released code (paper: Adam, none)")
    experiment.add_argument("--csa-blocks",     type=number(0), nargs="+",              help="encoder blocks with a CSA, counted from 0, such as 2 3 4 (all: paper)")
    experiment.add_argument("--mrm-blocks",     type=number(0), nargs="+",              help="encoder blocks with an MRM (the last 12: released code)")
    experiment.add_argument("--seed",           type=number(0), default=0,              help="of initial weights and order of images (0: ours)")
    experiment.add_argument("--precision",      choices=tuple(evaluate.PRECISIONS),     help="of the network; losses, FFT and metrics are fp32 (bf16 on a GPU that has it, else fp32: ours)")
    run.add_argument("--out",                   type=Path,                              help="a folder without a run (default runs/<task>-<sam>)")
    run.add_argument("--resume",                type=Path, nargs="?", const=True,       help="continue the run in RESUME, or in --out, after its last whole epoch")
    run.add_argument("--accumulate",            type=number(1), default=1,              help="split each batch into N micro-batches; batch norms see one at a time (default 1)")
    machine.add_argument("--grad-checkpoint",   action="store_true",                    help="recompute the encoder's blocks in backward: less memory")
    # fmt: on

    args = parser.parse_args()
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    args.out = args.out or Path("runs") / ("demo" if args.demo else f"{args.task}-{args.sam}")
    if args.resume:
        if args.resume is not True:
            args.out = args.resume
        if not (args.out / "last.pt").exists():
            raise InputError(
                f"--resume: {args.out} has no last.pt; pass the run's folder with --out"
            )
        last = tssam.load_file(args.out / "last.pt")
        parser.set_defaults(**last["args"], out=args.out)
        args = parser.parse_args()
    elif args.demo:
        if args.data or args.val:
            raise InputError("--demo: draws its own dataset; leave out --data and --val")
        args.data = [args.out / "DUTS"]
    elif args.data is None:
        raise InputError("--data: pass the dataset to train on, or try --demo")
    args.epochs = args.epochs or (100 if args.task == "shadow" else 80)
    evaluate.check_device(args)
    on_cuda = args.device.startswith("cuda")
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if has_bf16 else "fp32")
    args.micro_batch, left_over = divmod(args.batch_size, WORLD * args.accumulate)
    if left_over:
        raise InputError(
            f"--batch-size: {args.batch_size} cannot be split into {WORLD} (processes) x"
            f" {args.accumulate} (--accumulate) equal parts"
        )
    return args


def start_processes(args: argparse.Namespace) -> None:
    """Join torchrun's processes."""
    device = torch.device(args.device)
    patience = timedelta(hours=3)  # the others wait while the first downloads SAM's weights
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=patience, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=patience)


def first_process(work: Callable[[], object]) -> object:
    """Have the first process do something while the others wait."""
    result = work() if RANK == 0 else None
    if WORLD > 1:
        dist.barrier()
    return result


def claim_out(args: argparse.Namespace) -> TextIO:
    """Make a run's folder, with the demo's dataset, and lock it until this process ends."""
    args.out.mkdir(parents=True, exist_ok=True)
    lock = (args.out / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"--out: {args.out} is in use by another run; pass another folder"
        ) from error
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    if not args.resume:
        for name in ("last.pt", "best.pt", "log.csv", "curves.png", "samples.png"):
            if (args.out / name).exists():
                raise InputError(
                    f"--out: {args.out} contains a run ({name}); continue it with --resume, or pass a"
                    f" new folder, such as --out {args.out}-2"
                )
        if args.demo:
            draw_demo(args.data[0])
    return lock


def find_data(args: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train and to validate on; `args` then has their folders, for last.pt."""
    train_sets = evaluate.find_sets([Path(d) for d in args.data], evaluate.TRAIN)
    if args.val:
        val_sets = evaluate.find_sets([Path(d) for d in args.val], evaluate.VALIDATION)
    else:
        found = [s for d in args.data for s in evaluate.find_split(Path(d), evaluate.VALIDATION)]
        val_sets = [s for s in found if s.split]
        camo = [s for s in val_sets if evaluate.plain_name(s.name) == "CAMO"]
        if args.task == "cod" and camo:
            val_sets = camo  # 250 images; the four test sets are 6,473 (source: release)
    args.val = [os.path.abspath(s.folder) for s in val_sets]
    args.data = [os.path.abspath(folder) for folder in args.data]
    for kind, datasets in (("train:", train_sets), ("val:  ", val_sets)):
        for s in datasets:
            say(f"{kind} {s}")
            if RANK == 0:
                evaluate.check_files(s, args.workers)
    if not val_sets:
        say("val:   none, so there will be no best.pt; pass datasets with --val")
    train_pairs = [pair for s in train_sets for pair in s.pairs]
    val_pairs = [pair for s in val_sets for pair in s.pairs]
    train_files = {image.resolve() for image, _ in train_pairs}
    if len(train_files) < len(train_pairs):
        raise InputError("--data: the same images are given twice")
    if not train_files.isdisjoint(image.resolve() for image, _ in val_pairs):
        evaluate.warn("some validation images are also training images")
    if len(train_pairs) < args.batch_size:
        raise InputError(
            f"--data: {len(train_pairs)} images do not fill a batch of {args.batch_size}; pass a lower"
            " --batch-size"
        )
    return train_pairs, val_pairs


def build_model(args: argparse.Namespace) -> tuple[TSSAM, dict]:
    """The model with its weights, and last.pt's other content (of a new run: `encoder` alone)."""
    is_random = args.sam_checkpoint == "random"
    weights = None if is_random else args.sam_checkpoint
    if args.resume:
        model, stored = tssam.load_checkpoint(args.out / "last.pt", weights)
    else:
        if args.init is not None:  # checked before anything is downloaded
            sam = tssam.read_checkpoint(args.init)["config"]["sam"]
            if sam != args.sam:
                raise InputError(
                    f"--init: {args.init} belongs to {sam}, not {args.sam}; pass --sam {sam}"
                )
        if args.sam_checkpoint is None:
            first_process(lambda: tssam.sam_weights(args.sam))
            weights = tssam.sam_weights(args.sam)
        torch.manual_seed(args.seed)
        high_freq = args.task == "shadow"
        blocks = (args.csa_blocks, args.mrm_blocks)
        model = tssam.build_tssam(args.sam, args.size, high_freq, weights, *blocks)
        state = model.image_encoder.state_dict()
        encoder = dict(fingerprint=tssam.fingerprint(state), sam_checkpoint=None, weights=None)
        if is_random:
            encoder["weights"] = state
        stored = dict(encoder=encoder)
        if args.init is not None:
            tssam.load_trained(model, args.init)
    if weights is not None:
        stored["encoder"]["sam_checkpoint"] = os.path.abspath(weights)
    if stored["encoder"]["weights"] is not None:
        evaluate.warn("the encoder is random, not SAM's: results say nothing about TS-SAM")
    model.grad_checkpoint = args.grad_checkpoint
    model.store_encoder(evaluate.PRECISIONS[args.precision])
    return model.to(args.device), stored


def check_experiment(
    args: argparse.Namespace, train_pairs: list[Pair], val_pairs: list[Pair], stored: dict
) -> dict:
    """The settings that a resumed run must share with last.pt."""
    experiment = {name: getattr(args, name) for name in EXPERIMENT}
    for name, pairs in (("training images", train_pairs), ("validation images", val_pairs)):
        names = [image.name for image, _ in pairs]
        experiment[name] = f"{len(names)} ({min(names)} to {max(names)})" if names else "none"
    if experiment["micro_batch"] != stored.get("experiment", experiment)["micro_batch"]:
        before = stored["experiment"]["micro_batch"]
        raise InputError(
            f"--resume: micro-batches of {before}: choose processes x --accumulate accordingly"
        )
    for name, before in stored.get("experiment", {}).items():
        if experiment[name] != before:
            raise InputError(
                f"--resume: {name.replace('_', ' ')} {experiment[name]}, but in this run {before}; start"
                " a new run, from its weights with --init"
            )
    return experiment


def micro_batches(
    pairs: list[Pair], args: argparse.Namespace, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's images (B, 3, S, S), normalised, and masks (B, 1, S, S) of 0 and 1, on the device.

    The order follows from seed and epoch alone. An incomplete last batch is dropped; each batch is
    split into processes x --accumulate micro-batches, of which every process takes its own.
    """
    rng = np.random.default_rng((args.seed, epoch))
    order = rng.permutation(len(pairs))
    mirrored = rng.random(len(pairs)) < (0.5 if args.recipe == "released" else 0)
    whole = order[: len(order) // args.batch_size * args.batch_size]
    own = whole.reshape(-1, WORLD, args.micro_batch)[:, RANK]  # a row: indices of a micro-batch
    read = partial(evaluate.read_sample, size=args.size, protocol="paper")
    samples = evaluate.in_threads(read, [pairs[i] for i in own.flat], args.workers)
    for chosen in own:
        batch = list(islice(samples, len(chosen)))
        images = evaluate.to_input([sample.pixels for sample in batch], args.device)
        masks = torch.from_numpy(np.stack([sample.mask for sample in batch]))
        masks = masks[:, None].to(args.device).float()
        for i in np.flatnonzero(mirrored[chosen]):
            images[i] = images[i].flip(-1)
            masks[i] = masks[i].flip(-1)
        yield images, masks


def validate(model: TSSAM, pairs: list[Pair], args: argparse.Namespace) -> dict[str, float]:
    """The metrics on the validation set, under the paper's protocol; processes share the work."""
    own = pairs[RANK::WORLD]
    rows = list(
        evaluate.score_images(model, own, args.task, "paper", args.micro_batch, args.workers)
    )
    if WORLD > 1:
        shares: list = [None] * WORLD
        dist.all_gather_object(shares, rows)
        rows = [row for share in shares for row in share]
    return evaluate.average(rows, args.task, "paper")


def how_to_continue(args: argparse.Namespace) -> str:
    """The last line of a run that is stopped."""
    if not (args.out / "last.pt").exists():
        return "stopped before the first epoch was finished; start again with the same command"
    command = f"torchrun --nproc_per_node {WORLD}" if WORLD > 1 else "python"
    command += f" train.py --resume --out {shlex.quote(str(args.out))}"
    return f"stopped; `{command}` continues after the last whole epoch"


def main() -> None:
    args = parse_arguments()
    if WORLD > 1:
        start_processes(args)
    args.lock = first_process(lambda: claim_out(args))  # held until the process ends
    evaluate.on_stop(partial(how_to_continue, args))
    train_pairs, val_pairs = find_data(args)
    model, stored = build_model(args)
    experiment = check_experiment(args, train_pairs, val_pairs, stored)
    kept_args = experiment | dict(data=args.data, val=args.val)
    kept_args |= dict(accumulate=args.accumulate, grad_checkpoint=args.grad_checkpoint)
    about = dict(task=args.task, encoder=stored["encoder"], args=kept_args, val=args.val)

    network = model
    if WORLD > 1:  # averages gradients; each process has its own batch norms
        network = DistributedDataParallel(model, broadcast_buffers=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    if args.recipe == "released":
        optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0.01)
    else:
        optimizer = torch.optim.Adam(trained, args.lr)
    loss_of = balanced_bce if args.task == "shadow" else bce_iou
    metric = "BER" if args.task == "shadow" else "S"  # selects the best epoch
    device = torch.device(args.device).type
    scaler = torch.amp.GradScaler(device, enabled=args.precision == "fp16")
    steps = len(train_pairs) // args.batch_size
    say(f"model: {args.sam} at {args.size} x {args.size}; run: {args.out}")
    say(
        f"steps: {args.batch_size} images, {args.micro_batch} at a time, {WORLD} x {device}, {args.precision}"
    )

    rows: list[dict] = []  # of log.csv, and of last.pt's epochs
    best_score = -math.inf
    if args.resume:
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
        rows = stored["rows"]
        best_score = stored["best_score"]
        say(f"resume: after epoch {len(rows)} of {args.epochs}")
        if best_score > -math.inf and not (args.out / "best.pt").exists():
            best_score = -math.inf
            say(f"resume: {args.out} has no best.pt; the next epoch is the best so far")

    def save_last() -> None:
        if RANK == 0:
            tssam.save_checkpoint(
                args.out / "last.pt",
                model,
                epoch=len(rows),
                rows=rows,
                best_score=best_score,
                experiment=experiment,
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                **about,
            )

    # A run that was stopped in an epoch's validation goes on with that.
    is_pending = bool(rows and val_pairs and metric not in rows[-1])
    for epoch in range(len(rows) + 1 - is_pending, args.epochs + 1):
        if epoch > len(rows):
            start = time.monotonic()
            lr = learning_rate(epoch, args.epochs, args.lr)
            optimizer.param_groups[0]["lr"] = lr
            network.train()
            losses = []
            batches = micro_batches(train_pairs, args, epoch)
            bar = evaluate.progress(range(steps), f"epoch {epoch}", steps, "step")
            for _ in bar:
                loss = torch.zeros((), device=args.device)
                for i in range(args.accumulate):
                    images, masks = next(batches)
                    # DistributedDataParallel averages gradients in the last micro-batch alone.
                    network.require_backward_grad_sync = i + 1 == args.accumulate
                    with autocast(args):
                        logits = network(images)
                    micro_loss = loss_of(logits, masks) / args.accumulate
                    scaler.scale(micro_loss).backward()
                    loss += micro_loss.detach() / WORLD
                if WORLD > 1:
                    dist.all_reduce(loss)
                check_finite("loss", [loss], epoch)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
            end_epoch(model, epoch)
            seconds = time.monotonic() - start
            row = dict(
                epoch=epoch,
                loss=sum(losses) / steps,
                lr=lr,
                images_per_s=steps * args.batch_size / seconds,
                peak_MB=evaluate.peak_memory(args.device),
                seconds=seconds,
            )
            rows.append(row)
            save_last()  # before validation, which can take long

        start = time.monotonic()
        row = rows[-1]
        mark = ""
        if val_pairs:
            with autocast(args):
                metrics = validate(model, val_pairs, args)
            row |= metrics
            score = -row["BER"] if metric == "BER" else row["S"]
            if score > best_score:
                best_score = score
                mark = "  best"
                if RANK == 0:
                    best = args.out / "best.pt"
                    tssam.save_checkpoint(best, model, epoch=epoch, metrics=metrics, **about)
        if RANK == 0:
            with autocast(args):
                write_reports(model, rows, metric, val_pairs, args)
        save_last()
        seconds = row["seconds"] + time.monotonic() - start
        left = timedelta(seconds=round((args.epochs - epoch) * seconds))
        cells = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        say(f"epoch {epoch}/{args.epochs}  {cells}{mark}  {left} left")
    if best_score > -math.inf:
        say(f"best:  {metric} {abs(best_score):.4f}, {args.out / 'best.pt'}")
    if WORLD > 1:
        dist.destroy_process_group()


def end_epoch(model: TSSAM, epoch: int) -> None:
    """Check the weights, and give all processes the first one's batch norm statistics."""
    check_finite("weights", tssam.trained_part(model.state_dict()).values(), epoch)
    if WORLD > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def check_finite(what: str, tensors: Iterable[Tensor], epoch: int) -> None:
    """Stop a run that has diverged."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        saved = f"last.pt holds epoch {epoch - 1}" if epoch > 1 else "nothing is saved yet"
        raise InputError(
            f"epoch {epoch}: the {what} became nan or infinite; {saved}; start a new run with a"
            " lower --lr, or --precision fp32"
        )


# -------------------------------------------------------------------------------------------------
# Reports


def write_reports(
    model: TSSAM, rows: list[dict], metric: str, val_pairs: list[Pair], args: argparse.Namespace
) -> None:
    """Write log.csv, curves.png and, with a validation set, samples.png; a failure is only warned of."""

    def save(path: Path) -> None:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[-1])
            table.writeheader()
            table.writerows(rows)

    try:
        tssam.write_atomically(args.out / "log.csv", save)
        draw_curves(rows, ["loss", metric] if val_pairs else ["loss"], args.out / "curves.png")
        if val_pairs:
            draw_samples(model, val_pairs[:6], args)
    except InputError as error:
        evaluate.warn(str(error))


def draw_samples(model: TSSAM, pairs: list[Pair], args: argparse.Namespace) -> None:
    """Draw what the network predicts of a few images."""
    samples = (evaluate.read_sample(pair, args.size, "paper") for pair in pairs)
    predictions = evaluate.predict(model, samples, "paper", args.micro_batch, save=True)
    shown = []
    for (image_file, mask_file), prediction in zip(pairs, predictions, strict=True):
        shown.append((image_file.stem, image_file, mask_file, Image.fromarray(prediction.to_save)))
    evaluate.draw_overview(shown, args.out / "samples.png")


def draw_curves(rows: list[dict], columns: list[str], path: Path) -> None:
    """Draw columns of log.csv against the epoch, one below the other; red: best by the last column."""
    sheet = Image.new("RGB", (520, 190 * len(columns)), "white")
    draw = ImageDraw.Draw(sheet)
    deciding = [row[columns[-1]] for row in rows]
    best = np.argmax(deciding) if columns[-1] == "S" else np.argmin(deciding)
    xs = np.linspace(20, 500, len(rows))
    for i, column in enumerate(columns):
        values = np.array([row[column] for row in rows])
        top = 190 * i + 30
        ys = top + 150 * (values.max() - values) / (np.ptp(values) or 1)
        title = f"{column}: {values.min():.4g} to {values.max():.4g}; {values[best]:.4g} in epoch {best + 1} of {len(rows)}"
        draw.text((20, top - 20), title, fill="black", font_size=12)
        draw.rectangle((20, top, 500, top + 150), outline="grey")
        draw.line(list(zip(xs, ys, strict=True)), fill="blue")
        draw.circle((xs[best], ys[best]), 3, fill="red")
    tssam.write_atomically(path, lambda file: sheet.save(file, "PNG"))


# -------------------------------------------------------------------------------------------------
# The demo's dataset


def draw_demo(root: Path) -> None:
    """Draw 96 + 24 warm shapes on cold backgrounds under `root`, in the layout of DUTS."""
    rng = np.random.default_rng(0)  # always the same ones

    def texture(size: list[int], darkest: tuple, brightest: tuple) -> Image.Image:
        colours = rng.integers(darkest, brightest, (9, 9, 3)).astype(np.uint8)
        return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)

    for split, count in (("DUTS-TR", 96), ("DUTS-TE", 24)):
        images = root / split / f"{split}-Image"
        masks = root / split / f"{split}-Mask"
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(exist_ok=True)
        for i in range(count):
            size = rng.integers(200, 321, 2).tolist()
            mask = Image.new("L", size)
            for sides in rng.choice([3, 4, 5, 80], rng.integers(1, 3)):
                circle = (*rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.15, 0.3) * min(size))
                turn = rng.uniform(0, 360)
                ImageDraw.Draw(mask).regular_polygon(circle, int(sides), turn, fill=255)
            paint = texture(size, (150, 60, 30), (250, 170, 120))
            background = texture(size, (30, 60, 60), (150, 180, 180))
            image = Image.composite(paint, background, mask)
            image.save(images / f"demo_{i:03}.jpg", quality=92)
            mask.save(masks / f"demo_{i:03}.png")


if __name__ == "__main__":
    evaluate.run(main)
