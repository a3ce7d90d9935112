"""Train TS-SAM.

    python train.py --task sod --data DUTS          TS-SAM_H as in the paper; --sam vit_b for TS-SAM_B
    python train.py --task cod --data COD           validates on CAMO's test images
    python train.py --task shadow --data ISTD       with the high-frequency embedding, 100 epochs
    python train.py --data photos,masks --val 0.1   your own images and masks, a tenth to validate on
    python train.py --demo                          draws a small dataset and trains on it, without a GPU

The defaults are the paper's values: Adam, learning rate 8e-4 falling along a cosine, a batch of 8,
80 epochs (shadows 100), no augmentation but the resize (to 1024 x 1024, as in the released code).
After every epoch the model is scored on the validation set; `last.pt` and `best.pt` (best S-measure,
for shadows best BER) appear under --out, for `evaluate.py --ckpt`. --resume continues a run that was
stopped; `torchrun --nproc_per_node 4 train.py ...` shares it among four GPUs.
"""

import csv
import math
import os
import re
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import evaluate
import tssam
from evaluate import LOCAL_WORLD, PAPER, RANK, WORLD, Pair, number, say
from tssam import TSSAM, InputError

# -------------------------------------------------------------------------------------------------
# Losses and schedule (source: paper; their form from the release)


def bce_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """BCE + (1 - IoU), for camouflaged and salient objects; a soft IoU per image, then averaged.

    logits (B, 1, S, S), float32 as `TSSAM` gives them, and masks (B, 1, S, S) of 0 and 1 -> scalar.
    """
    probability = logits.sigmoid()
    intersection = (probability * masks).sum(dim=(1, 2, 3))
    union = (probability + masks).sum(dim=(1, 2, 3)) - intersection
    iou = intersection / union.clamp_min(1e-6)  # an empty mask, predicted empty, has IoU 0 (ours)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - iou).mean()


def balanced_bce(logits: Tensor, masks: Tensor) -> Tensor:
    """P/(P+N) * BCE(pos_weight = N/P), for shadows.

    P positive and N negative pixels are counted in the micro-batch (source: release). Computed as
    weights N/(P+N) of positive and P/(P+N) of negative pixels: the same, and defined for P = 0.
    Shapes as in `bce_iou`.
    """
    positive_share = masks.mean()  # P/(P+N)
    weight = torch.where(masks > 0, 1 - positive_share, positive_share)
    return F.binary_cross_entropy_with_logits(logits, masks, weight=weight)


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """Cosine decay from `lr` in epoch 1 towards 1e-7 (source: paper; the 1e-7 from the release)."""
    min_lr = 1e-7
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


# -------------------------------------------------------------------------------------------------
# An epoch


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    pairs: list[Pair],
    args: Namespace,
    epoch: int,
) -> dict:
    """Take an epoch's steps; returns its row of log.csv.

    `network` is a TSSAM, or the DistributedDataParallel around one.
    """
    start = time.monotonic()
    network.train()
    lr = optimizer.param_groups[0]["lr"] = learning_rate(epoch, args.epochs, args.lr)
    loss_of = balanced_bce if args.task == "shadow" else bce_iou
    steps = len(pairs) // args.batch_size
    losses = []  # on the device
    batches = micro_batches(pairs, args, epoch)
    bar = evaluate.progress(range(steps), f"epoch {epoch}", steps)
    for _ in bar:
        loss = torch.zeros((), device=args.device)
        for i in range(args.accumulate):
            images, masks = next(batches)
            # DistributedDataParallel communicates once, after the last micro-batch.
            network.require_backward_grad_sync = i + 1 == args.accumulate
            logits = evaluate.run_network(network, images, args.precision)
            micro_loss = loss_of(logits, masks) / args.accumulate
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach() / WORLD
        if WORLD > 1:
            dist.all_reduce(loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for before in losses[-1:]:  # a step late, so that a GPU need not be waited for
            check_finite("loss", [before], epoch)
            bar.set_postfix(loss=f"{before.item():.4f}", refresh=False)
        losses.append(loss)
    batches.close()  # and with it its threads, before validation
    for buffer in network.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)  # the running statistics of the first process
    check_finite("loss", losses, epoch)
    check_finite("weights", network.state_dict().values(), epoch)
    seconds = time.monotonic() - start
    mean_loss = torch.stack(losses).cpu().double().mean().item()
    speed = dict(images_per_s=steps * args.batch_size / seconds, seconds=seconds)
    if args.device.startswith("cuda"):
        speed["peak_MB"] = torch.cuda.max_memory_allocated(args.device) / 2**20
    return dict(epoch=epoch, loss=mean_loss, lr=lr, **speed)


def micro_batches(
    pairs: list[Pair], args: Namespace, epoch: int
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
    read = partial(evaluate.read_sample, size=args.size, protocol=PAPER)
    samples = evaluate.in_threads(read, [pairs[i] for i in own.flat], args.workers)
    for chosen in own:
        batch = list(islice(samples, len(chosen)))
        images = evaluate.to_input([sample.pixels for sample in batch], args.device)
        masks = evaluate.to_device(np.stack([sample.mask for sample in batch]), args.device)
        masks = masks[:, None].float()
        for i in np.flatnonzero(mirrored[chosen]):
            images[i] = images[i].flip(-1)
            masks[i] = masks[i].flip(-1)
        yield images, masks


def check_finite(what: str, tensors: Iterable[Tensor], epoch: int) -> None:
    """Stop a run that has diverged."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        saved = f"last.pt holds epoch {epoch - 1}" if epoch > 1 else "nothing is saved yet"
        raise InputError(
            f"epoch {epoch}: the {what} became nan or infinite; {saved}; try a lower --lr or --precision fp32"
        )


def validate(model: TSSAM, pairs: list[Pair], args: Namespace) -> dict[str, float]:
    """The metrics on the validation set, under the paper's protocol; processes share the work."""
    rows = evaluate.score_images(
        model,
        pairs[RANK::WORLD],
        args.task,
        PAPER,
        batch_size=args.micro_batch,
        workers=args.workers,
        precision=args.precision,
    )
    shares = [list(rows)] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, shares[0])
    return evaluate.average([row for share in shares for row in share], PAPER)


# -------------------------------------------------------------------------------------------------
# The script


def main() -> None:
    args, stored = parse_arguments()
    if WORLD > 1:
        start_processes(args.device)
    _lock = first_process(lambda: claim_out(args, stored))  # until the process ends
    evaluate.on_stop(partial(how_to_continue, args.out))
    train_pairs, val_pairs, val = find_data(args)
    model, encoder = build_model(args, stored)
    run = describe_run(args, training_images=train_pairs, validation_images=val_pairs)
    check_resumed(run, stored.get("run", run))
    about = dict(task=args.task, encoder=encoder, val=val, run=run)

    # Averages gradients. Each process normalises with the statistics of its own micro-batch.
    network = DistributedDataParallel(model) if WORLD > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    if args.recipe == "released":
        optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0.01)
    else:
        optimizer = torch.optim.Adam(trained, args.lr)
    device = torch.device(args.device).type
    scaler = torch.amp.GradScaler(device, enabled=args.precision == "fp16")
    first_process(partial(draw_data, train_pairs, args))
    say(f"model: {args.sam} at {args.size} x {args.size}, {args.precision}; run: {args.out}")
    say(f"steps: {args.batch_size} images, {args.micro_batch} at a time, {WORLD} x {device}")

    metric = "BER" if args.task == "shadow" else "S"  # selects the best epoch
    sign = -1 if metric == "BER" else 1
    rows = []  # of log.csv
    best = args.out / "best.pt"
    best_score = -math.inf  # sign x metric of best.pt: the higher, the better
    if stored:
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
        rows = stored["rows"]
        say(f"resume: after epoch {len(rows)} of {args.epochs}")
        if best.exists():
            best_score = sign * tssam.read_checkpoint(best)["metrics"][metric]
        elif val_pairs:
            say(f"resume: {args.out} has no best.pt; the next epoch is the best so far")

    def save(name: str, **info) -> None:
        if RANK == 0:
            tssam.save_checkpoint(args.out / name, model, epoch=len(rows), **about, **info)

    for epoch in range(len(rows) + 1, args.epochs + 1):
        start = time.monotonic()
        row = train_epoch(network, optimizer, scaler, train_pairs, args, epoch)
        rows.append(row)
        mark = ""
        if val_pairs:
            metrics = validate(model, val_pairs, args)
            row |= metrics
            if sign * row[metric] > best_score:
                best_score = sign * row[metric]
                mark = "  best"
                save(best.name, metrics=metrics)  # first: an epoch stopped in between is repeated
        save("last.pt", rows=rows, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        if RANK == 0:
            write_reports(model, rows, metric, val_pairs or train_pairs, args)
        left = timedelta(seconds=round((args.epochs - epoch) * (time.monotonic() - start)))
        cells = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        say(f"epoch {epoch}/{args.epochs}  {cells}{mark}  {left} left")
    if best_score > -math.inf:
        say(f"best:  {metric} {abs(best_score):.4f}, {best}")
    say(
        f"next:  python evaluate.py --ckpt {shlex.quote(str(args.out))} --data PHOTOS --save predictions"
    )
    if WORLD > 1:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------
# Options

# Enough for a few shapes, two CPU cores and a minute or two; command-line options override these.
DEMO = dict(sam="tiny", sam_checkpoint="random", size=256, epochs=10, batch_size=4, lr=2e-3)

# last.pt stores all options but those of the machine and the output. Of these, --resume may change
# only the second line's.
NOT_REMEMBERED = ("workers", "device", "out", "resume")
MAY_CHANGE = ("data", "val", "sam_checkpoint", "accumulate", "grad_checkpoint")


def parse_arguments() -> tuple[Namespace, dict]:
    """The command line, and last.pt of a run to resume ({}: a new run), which fills in what it leaves out."""
    parser = evaluate.Parser(__doc__)
    group = parser.add_argument_group("data")
    data = group.add_argument
    train_on = group.add_mutually_exclusive_group().add_argument
    experiment = parser.add_argument_group(
        "experiment; with the source of each default"
    ).add_argument
    run = parser.add_argument_group("run").add_argument
    machine = evaluate.add_machine_options(parser)
    # fmt: off
    data("--task", choices=evaluate.TASKS, default="sod", help="salient objects (or your own), camouflaged objects, shadows (default: sod)")
    train_on("--data", nargs="+", help=f"{evaluate.DATA_HELP}, joined")
    train_on("--demo", action="store_true", help="draw a small dataset and train a miniature on it, without SAM's weights")
    data("--val", nargs="+", help="datasets to validate on, or a fraction of --data to hold out, such as 0.1 (default: the val or test splits of --data; cod: CAMO's)")
    experiment("--sam", choices=tssam.ENCODERS, default="vit_h", help="SAM's encoder (paper: TS-SAM_H; default: %(default)s)")
    experiment("--sam-checkpoint", help="SAM's weights, or `random` for a random encoder (default: checkpoints/<published name>, downloaded if missing)")
    experiment("--init", help="checkpoint to start from, ours or the authors', trained on the same encoder")
    experiment("--size", type=number(1), default=1024, help="image side, a multiple of 16 (released code; default: %(default)s)")
    experiment("--epochs", type=number(1), help="number of epochs (paper; default: 80, shadow 100)")
    experiment("--batch-size", type=number(1), default=8, help="images in a step, over all GPUs (paper; default: %(default)s)")
    experiment("--lr", type=number(0, float), default=8e-4, help="initial learning rate (paper; default: %(default)s)")
    experiment("--recipe", choices=("paper", "released"), default="paper", help="paper: Adam; released: AdamW with weight decay 0.01 and horizontal flips, as in the released code (default: %(default)s)")
    experiment("--csa-blocks", type=number(0), nargs="+", help="encoder blocks with a CSA, counted from 0, such as 2 3 4 (paper; default: all)")
    experiment("--mrm-blocks", type=number(0), nargs="+", help="encoder blocks with an MRM (released code; default: the last 12)")
    experiment("--seed", type=number(0), default=0, help="of initial weights, order of images and held-out pairs (ours; default: %(default)s)")
    experiment("--precision", choices=evaluate.PRECISIONS, help="of the network; losses, FFT and metrics are fp32 (ours; default: bf16 on a GPU that has it, else fp32)")
    run("--out", type=Path, help="a folder without a run (default: runs/<task>-<sam>)")
    run("--resume", type=Path, nargs="?", const=True, help="continue the run in RESUME, or in --out, after its last whole epoch; with --data or --demo, start it if there is none")
    run("--accumulate", type=number(1), default=1, help="split each batch into N micro-batches; batch norms see one at a time (default: %(default)s)")
    machine("--grad-checkpoint", action="store_true", help="recompute the encoder's blocks in backward: less memory")
    # fmt: on

    if parser.parse_args().demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args()  # again, so that what is typed replaces other defaults
    if args.resume not in (None, True):
        if args.out not in (None, args.resume):
            raise InputError(
                f"--out: --resume {args.resume} continues in its own folder; leave out one"
            )
        args.out = args.resume
    args.out = args.out or Path("runs", "demo" if args.demo else f"{args.task}-{args.sam}")
    stored = {}
    if args.resume and (args.out / "last.pt").exists():
        stored = tssam.read_checkpoint(args.out / "last.pt")
        if not {"run", "optimizer"} <= stored.keys():
            raise InputError(
                f"--resume: {args.out}/last.pt is not of this version's train.py; start a new run with --init"
            )
        parser.set_defaults(**stored["run"], out=args.out)
        args = parser.parse_args()
    if args.demo and not stored:
        args.data = [str(args.out / "DUTS")]
    if args.data is None:
        missing = f"{args.out} has no last.pt to resume; " if args.resume else ""
        raise InputError(f"--data: {missing}pass the dataset to train on, or try --demo")
    if args.resume and not stored:
        say(f"resume: {args.out} has no last.pt; a new run starts")
    args.epochs = args.epochs or (100 if args.task == "shadow" else 80)
    evaluate.check_device(args)
    on_cuda = args.device.startswith("cuda")
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if has_bf16 else "fp32")
    args.micro_batch, left_over = divmod(args.batch_size, WORLD * args.accumulate)
    if left_over:
        raise InputError(
            f"--batch-size: {args.batch_size} is no multiple of {WORLD} (processes) x {args.accumulate} (--accumulate)"
        )
    return args, stored


def describe_run(args: Namespace, **pairs: list[Pair]) -> dict:
    """What last.pt remembers of a run: its options, its number of images, their first and last name."""
    run = {name: value for name, value in vars(args).items() if name not in NOT_REMEMBERED}
    run["data"] = absolute(args.data)
    if args.val and not held_out_fraction(args.val):
        run["val"] = absolute(args.val)
    if args.sam_checkpoint != "random":
        run["sam_checkpoint"] = None  # the encoder's description has it
    for name, files in pairs.items():
        names = [pair.image.name for pair in files] or ["none"]
        run[name] = f"{len(files)} ({min(names)} to {max(names)})"
    return run


def check_resumed(run: dict, before: dict) -> None:
    """Refuse to resume with other options or data."""
    for name, old in before.items():
        if name not in MAY_CHANGE and run[name] != old:
            todo = "start a new run, from its weights with --init"
            if name == "micro_batch":
                todo = "choose processes x --accumulate so that it is the same"
            raise InputError(
                f"--resume: {name.replace('_', ' ')} {run[name]}, but in this run {old}; {todo}"
            )


# -------------------------------------------------------------------------------------------------
# Data and model


def find_data(args: Namespace) -> tuple[list[Pair], list[Pair], list[str]]:
    """The pairs to train and to validate on, and where the latter are: what --data takes."""
    train_sets = evaluate.find_sets(args.data, evaluate.TRAIN)
    val_sets = []
    fraction = held_out_fraction(args.val)
    if args.val and not fraction:
        val_sets = evaluate.find_sets(args.val, evaluate.VALIDATION)
    elif not args.val:
        for root in filter(os.path.isdir, args.data):
            found = evaluate.find_split(Path(root), evaluate.VALIDATION)
            val_sets += [s for s in found if s.split and s.pairs[0].mask]
        camo = [s for s in val_sets if evaluate.plain_name(s.name) == "CAMO"]
        if args.task == "cod" and camo:
            val_sets = camo  # 250 images; the four test sets are 6,473 (source: release)
    for kind, datasets in (("train:", train_sets), ("val:  ", val_sets)):
        for s in datasets:
            say(f"{kind} {s}")
            first_process(partial(evaluate.check_files, s, args.workers, args.size))
    train_pairs = [pair for s in train_sets for pair in s.pairs]
    val_pairs = [pair for s in val_sets for pair in s.pairs]
    if fraction:
        order = np.random.default_rng((args.seed, 0)).permutation(len(train_pairs))
        held_out = sorted(order[: max(1, round(fraction * len(order)))], reverse=True)
        val_pairs = [train_pairs.pop(i) for i in held_out][::-1]
        say(f"val:   {len(val_pairs)} of these pairs, held out by --val {args.val[0]}")
    if not val_pairs:
        say(
            "val:   none, so there will be no best.pt; hold some out with --val 0.1, or pass a dataset"
        )
    train_files = {pair.image.resolve() for pair in train_pairs}
    if any(pair.image.resolve() in train_files for pair in val_pairs):
        evaluate.warn("some validation images are also training images")
    if len(train_pairs) < args.batch_size:
        raise InputError(
            f"--data: {len(train_pairs)} images do not fill a batch of {args.batch_size}; lower --batch-size"
        )
    return train_pairs, val_pairs, absolute([s.folder for s in val_sets])


def held_out_fraction(val: list[str] | None) -> float:
    """What --val 0.1 says; 0 where it names datasets."""
    return float(val[0]) if val and re.fullmatch(r"0?\.\d+", val[0]) else 0


def absolute(roots: list[str]) -> list[str]:
    """What --data takes, with absolute paths."""
    named = map(evaluate.named_folders, roots)
    return [",".join(os.path.abspath(path) for path in paths) for paths in named]


def build_model(args: Namespace, stored: dict) -> tuple[TSSAM, dict]:
    """The model with its weights, and what a checkpoint says about its encoder."""
    is_random = args.sam_checkpoint == "random"
    weights = None if is_random else args.sam_checkpoint
    if stored:
        model, _ = tssam.load_checkpoint(args.out / "last.pt", weights)
        encoder = dict(stored["encoder"])
    else:
        init = args.init and tssam.read_checkpoint(args.init)
        if init and init["config"]["sam"] != args.sam:
            raise InputError(f"--init: {args.init} belongs to --sam {init['config']['sam']}")
        if args.sam_checkpoint is None:
            first_process(lambda: tssam.sam_weights(args.sam))
            weights = tssam.sam_weights(args.sam)
        torch.manual_seed(args.seed)
        blocks = (args.csa_blocks, args.mrm_blocks)
        model = tssam.build_tssam(args.sam, args.size, args.task == "shadow", weights, *blocks)
        state = model.image_encoder.state_dict()
        encoder = dict(fingerprint=tssam.fingerprint(state), sam_checkpoint=None, weights=None)
        if is_random:
            encoder["weights"] = state
        if init:
            tssam.load_trained(model, init, args.init)
    if weights is not None:
        encoder["sam_checkpoint"] = os.path.abspath(weights)
    if encoder["weights"] is not None:
        evaluate.warn("the encoder is random, not SAM's: results say nothing about TS-SAM")
    model.set_grad_checkpointing(args.grad_checkpoint)
    model.store_encoder(evaluate.PRECISIONS[args.precision])
    return model.to(args.device), encoder


# -------------------------------------------------------------------------------------------------
# The run's folder and processes


def claim_out(args: Namespace, stored: dict) -> object:
    """Make a run's folder, with the demo's dataset, and lock it until this process ends."""
    args.out.mkdir(parents=True, exist_ok=True)
    lock = (args.out / ".lock").open("w")
    try:
        import fcntl

        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"--out: {args.out} is in use by another run; pass another folder"
        ) from error
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    if not stored:
        for name in ("last.pt", "best.pt", "log.csv"):
            if (args.out / name).exists():
                raise InputError(
                    f"--out: {args.out} contains a run ({name}); pass --resume, or --out {args.out}-2"
                )
        if args.demo:
            draw_demo(Path(args.data[0]))
    return lock


def start_processes(device: str) -> None:
    """Join torchrun's processes, or another launcher's."""
    nccl = device.startswith("cuda") and dist.is_nccl_available()
    own = torch.device(device) if nccl else None
    # Of its own for each of torchrun's restarts, which would find the addresses of dead processes.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=own)


def first_process(work: Callable) -> object:
    """Have the first process do something, which may take hours, while the others wait."""
    result = work() if RANK == 0 else None
    if WORLD > 1:
        dist.barrier(patient_group())
    return result


@cache
def patient_group() -> dist.ProcessGroup:
    """The processes once more, to wait for each other longer than elsewhere: a download."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=3))


def how_to_continue(out: Path) -> str:
    """The last line of a run that is stopped."""
    if not (out / "last.pt").exists():
        return "stopped before the first epoch was finished; start again with the same command"
    launcher = f"torchrun --nproc_per_node {LOCAL_WORLD}" if WORLD > 1 else "python"
    command = f"{launcher} train.py --resume --out {shlex.quote(str(out))}"
    return f"stopped; `{command}` continues after the last whole epoch"


# -------------------------------------------------------------------------------------------------
# Reports


def write_reports(
    model: TSSAM, rows: list[dict], metric: str, pairs: list[Pair], args: Namespace
) -> None:
    """Write log.csv, curves.png and samples.png; a failure is only warned of."""

    def save(path: Path) -> None:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, max(rows, key=len))
            table.writeheader()
            table.writerows(rows)

    try:
        tssam.write_atomically(args.out / "log.csv", save)
        draw_curves(rows, ["loss", metric] if metric in rows[-1] else ["loss"], args.out)
        samples = [evaluate.read_sample(pair, args.size, PAPER) for pair in pairs[:6]]
        predictions = evaluate.predict(model, samples, PAPER, args.micro_batch, args.precision)
        shown = [(p.sample.pair.name, p.sample, p.to_save) for p in predictions]
        evaluate.draw_samples(shown, args.out / "samples.png")
    except InputError as error:
        evaluate.warn(str(error))


def draw_data(pairs: list[Pair], args: Namespace) -> None:
    """Draw a few training pairs as the network gets them, to be looked at while it trains."""
    shown = [(pair.name, evaluate.read_sample(pair, args.size, PAPER), None) for pair in pairs[:6]]
    evaluate.draw_samples(shown, args.out / "data.png")
    say(f"look:  {args.out / 'data.png'} shows training pairs as the network gets them")


def draw_curves(rows: list[dict], columns: list[str], out: Path) -> None:
    """Draw columns of log.csv against the epoch, one below the other; red: best by the last column."""
    sheet = Image.new("RGB", (560, 210 * len(columns)), "white")
    draw = ImageDraw.Draw(sheet)
    deciding = [row[columns[-1]] for row in rows]
    best = np.argmax(deciding) if columns[-1] == "S" else np.argmin(deciding)
    xs = np.linspace(70, 540, len(rows))
    for i, column in enumerate(columns):
        values = [row[column] for row in rows]
        top = 210 * i + 30
        bottom = top + 140
        ys = np.interp(values, (min(values), max(values)), (bottom, top))
        draw.rectangle((70, top, 540, bottom), outline="grey")
        draw.line(list(zip(xs, ys, strict=True)), fill="blue")
        draw.circle((xs[best], ys[best]), 3, fill="red")
        for x, y, text in (
            (305, top - 12, f"{column}: {values[best]:.4g} in epoch {best + 1}"),
            (35, top, f"{max(values):.4g}"),
            (35, bottom, f"{min(values):.4g}"),
            (305, bottom + 12, f"epochs 1 to {len(rows)}"),
        ):
            draw.text((x, y), text, fill="black", font_size=12, anchor="mm")
    evaluate.save_image(sheet, out / "curves.png")


# -------------------------------------------------------------------------------------------------
# The demo's dataset


def draw_demo(root: Path) -> None:
    """Draw 96 + 24 warm shapes on cold backgrounds under `root`, in the layout of DUTS."""
    rng = np.random.default_rng(0)  # always the same ones

    def texture(size, darkest, brightest):
        colours = rng.integers(darkest, brightest, (9, 9, 3)).astype(np.uint8)
        return Image.fromarray(colours).resize(size, Image.BICUBIC)

    for split, count in (("DUTS-TR", 96), ("DUTS-TE", 24)):
        images = root / split / f"{split}-Image"
        masks = root / split / f"{split}-Mask"
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(exist_ok=True)
        for i in range(count):
            size = rng.integers(200, 321, 2).tolist()
            mask = Image.new("L", size)
            for sides in rng.choice([3, 4, 5, 80], rng.integers(1, 3)).tolist():
                circle = (*rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.15, 0.3) * min(size))
                ImageDraw.Draw(mask).regular_polygon(circle, sides, rng.uniform(0, 360), fill=255)
            paint = texture(size, (150, 60, 30), (250, 170, 120))
            background = texture(size, (30, 60, 60), (150, 180, 180))
            image = Image.composite(paint, background, mask)
            image.save(images / f"demo_{i:03}.jpg", quality=92)
            mask.save(masks / f"demo_{i:03}.png")


if __name__ == "__main__":
    evaluate.run(main)
