"""Train TS-SAM.

    python train.py --task sod --data DUTS          TS-SAM_H as in the paper; --sam vit_b for TS-SAM_B
    python train.py --task cod --data COD           validates on CAMO's test images
    python train.py --task shadow --data ISTD       with the high-frequency embedding, 100 epochs
    python train.py --demo                          draws a small dataset and trains on it: no GPU, no downloads

The defaults are the paper's values: Adam, learning rate 8e-4 falling along a cosine, a batch of 8, 80 epochs (shadows
100), no augmentation but the resize (to 1024 x 1024, as in the released code). After every epoch the model is scored on
the validation set; `last.pt` and `best.pt` (best S-measure, for shadows best BER) appear under --out, for
`evaluate.py --ckpt`. --resume continues a run that was stopped; `torchrun --nproc_per_node 4 train.py ...` shares it
among four GPUs.
"""

import argparse
import math
import os
import shlex
import tempfile
import time
from datetime import timedelta
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader

import evaluate
import tssam
from tssam import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Losses (source: paper; their form from the release): logits and masks (B, 1, S, S), masks of 0 and 1 -> scalar, in
# float32 whatever the logits are


def bce_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """Camouflaged and salient objects: BCE + (1 - IoU), the IoU of each image's sigmoid map, averaged."""
    logits, masks = logits.float(), masks.float()
    probability = logits.sigmoid()
    intersection = (probability * masks).sum(dim=(1, 2, 3))
    union = (probability + masks).sum(dim=(1, 2, 3)) - intersection
    iou = intersection / union.clamp_min(1e-6)  # an empty mask, predicted empty, leaves 0 / 0
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - iou).mean()


def balanced_bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Shadows: P/(P+N) * BCE(pos_weight = N/P), with P positive and N negative pixels in the batch (on several GPUs or
    with --accumulate: in the part of it that passes the network at once, as in the release).

    Written as positive pixels weighing N/(P+N) and negative ones P/(P+N), which is the same and allows P = 0.
    """
    logits, masks = logits.float(), masks.float()
    positive = masks.mean()
    weight = torch.where(masks > 0, 1 - positive, positive)
    return F.binary_cross_entropy_with_logits(logits, masks, weight=weight)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: a run's curves, the demo's dataset


def draw_curves(rows: list[dict], columns: tuple[str, ...], path: Path) -> None:
    """Draw columns of log.csv against the epoch, one below the other, each from its least to its largest value."""
    width, height, gap = 480, 160, 24
    sheet = Image.new("RGB", (width + 2 * gap, gap + len(columns) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        top, values = gap + number * (height + gap), [row[column] for row in rows if column in row]
        low, high = min(values), max(values)
        xs = np.linspace(gap, gap + width, len(values))
        points = [(x, top + height * (high - v) / (high - low or 1)) for x, v in zip(xs, values, strict=True)]
        draw.rectangle((gap, top, gap + width, top + height), outline="grey")
        title = f"{column}: {low:.4g} to {high:.4g}, last {values[-1]:.4g}; {len(values)} epochs"
        draw.text((gap, top - 16), title, fill="black", font_size=12)
        draw.line(points, fill="blue")
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="blue")
    tssam.write(path, lambda file: sheet.save(file, "PNG"))


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

# Enough for a few shapes, two CPU cores and a minute or two; what is given on the command line still counts.
DEMO = {"sam": "tiny", "sam_checkpoint": "random", "size": 256, "epochs": 10, "batch_size": 4, "lr": 2e-3}

# A resumed run takes these from last.pt; with another value it would be another experiment.
EXPERIMENT = ("task", "sam", "size", "epochs", "batch_size", "lr", "recipe", "precision", "seed", "demo")
EXPERIMENT += ("csa_blocks", "mrm_blocks", "init")


def parse_arguments() -> tuple[argparse.Namespace, dict | None]:
    """The command line; with --resume also the content of the run's last.pt, which fills in what it leaves out."""
    parser = evaluate.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--task", choices=("sod", "cod", "shadow"), default="sod", help="(default sod)")
    text = "datasets to train on, joined: their train split, or a folder of images beside one of masks"
    group.add_argument("--data", type=Path, nargs="+", metavar="DIR", help=text)
    text = "datasets to validate on, joined (default: the test splits of --data; cod: CAMO's, if it is among them)"
    group.add_argument("--val", type=Path, nargs="+", metavar="DIR", help=text)
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in DEMO.items())
    group.add_argument("--demo", action="store_true", help=f"draw a small dataset and train on it, with {options}")

    group = parser.add_argument_group("experiment; in brackets the default and its source")
    text = "SAM's encoder (vit_h: the paper's TS-SAM_H)"
    group.add_argument("--sam", choices=tuple(tssam.ENCODERS), default="vit_h", help=text)
    text = "SAM's weights, or `random` for a random encoder (checkpoints/<published name>, downloaded if missing)"
    group.add_argument("--sam-checkpoint", metavar="FILE", help=text)
    text = "checkpoint to start from, ours or the authors', trained on the same encoder (none: paper)"
    group.add_argument("--init", metavar="FILE", help=text)
    group.add_argument("--size", type=int, default=1024, help="image side, a multiple of 16 (1024: released code)")
    group.add_argument("--epochs", type=int, help="(80, shadow 100: paper)")
    group.add_argument("--batch-size", type=int, default=8, help="images in a step, over all GPUs (8: paper)")
    group.add_argument("--lr", type=float, default=8e-4, help="first learning rate (8e-4: paper)")
    text = "released: AdamW with weight decay 0.01 and horizontal flips, as in the released code (paper: Adam, none)"
    group.add_argument("--recipe", choices=("paper", "released"), default="paper", help=text)
    text = "encoder blocks with a CSA, counted from 0, such as 2 3 4 (all: paper)"
    group.add_argument("--csa-blocks", type=int, nargs="+", metavar="N", help=text)
    text = "encoder blocks with an MRM (the last 12: released code)"
    group.add_argument("--mrm-blocks", type=int, nargs="+", metavar="N", help=text)
    group.add_argument("--seed", type=int, default=0, help="of initial weights and order of images (0: ours)")
    text = "of the network; losses, FFT and metrics are fp32 (bf16 on a GPU that has it, else fp32: ours)"
    group.add_argument("--precision", choices=tuple(evaluate.PRECISIONS), help=text)

    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default runs/<task>-<sam>)")
    group.add_argument("--resume", action="store_true", help="continue the run in --out after its last whole epoch")
    text = "pass a batch in so many parts, one after the other; batch norms see one part at a time (default 1)"
    group.add_argument("--accumulate", type=int, default=1, help=text)

    group = evaluate.add_machine_arguments(parser)
    text = "compute the encoder's blocks again in backward: less memory"
    group.add_argument("--grad-checkpoint", action="store_true", help=text)

    args, stored = parser.parse_args(), None
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    args.out = args.out or Path("runs") / ("demo" if args.demo else f"{args.task}-{args.sam}")
    if args.resume:
        stored = tssam.load_file(args.out / "last.pt")
        if "optimizer" not in stored:
            raise InputError(f"--resume: {args.out / 'last.pt'} is not the last.pt of a run of this train.py")
        parser.set_defaults(**stored["args"], out=args.out)
        args = parser.parse_args()
        args.data, args.val = ([Path(d) for d in dirs] if dirs else None for dirs in (args.data, args.val))
        for name in EXPERIMENT:
            if getattr(args, name) != stored["args"].get(name):
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise InputError(f"--resume: {flag} would be another experiment; this one has {stored['args'][name]}")
    elif args.demo:
        if args.data or args.val:
            raise InputError("--demo: draws its own dataset; leave out --data and --val")
        args.data = [args.out / "DUTS"]
    elif args.data is None:
        raise InputError("--data: name the dataset to train on, or try --demo")
    if args.epochs is None:
        args.epochs = 100 if args.task == "shadow" else 80
    evaluate.check_arguments(args, ("size", "epochs", "batch_size", "lr", "accumulate"))
    has_bf16 = args.device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if has_bf16 else "fp32")
    return args, stored


def main() -> None:
    args, stored = parse_arguments()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    on_cuda, last, best = args.device.startswith("cuda"), args.out / "last.pt", args.out / "best.pt"
    part_size, left_over = divmod(args.batch_size, world * args.accumulate)  # images that pass the network at once
    if left_over:
        text = f"cannot be cut into {world} (processes) x {args.accumulate} (--accumulate) equal parts"
        raise InputError(f"--batch-size: {args.batch_size} {text}")
    if stored is None and args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"--out: {args.out} is not empty; continue its run with --resume, or name another folder")
    if stored is not None and part_size != stored["part_size"]:
        text = f"{stored['part_size']} images at a time, not {part_size}; choose processes x --accumulate accordingly"
        raise InputError(f"--resume: the batch norms of this run saw {text}")
    if world > 1:
        if on_cuda:
            torch.cuda.set_device(args.device)
        # Patient, because the first process may have SAM's weights to download while the others wait.
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(hours=3))

    def say(text: str) -> None:
        if rank == 0:
            print(text)

    # Data
    if args.demo and stored is None and rank == 0:
        draw_demo(args.data[0])
    if world > 1:
        dist.barrier()
    train_sets = evaluate.find_sets(args.data, "train")
    if args.val is not None:
        val_sets = evaluate.find_sets(args.val, "test")
    else:
        val_sets = [s for root in args.data for s in evaluate.search(root, "test") if s.split == "test"]
        camo = [s for s in val_sets if evaluate.plain_name(s.name) == "CAMO"]
        if args.task == "cod" and camo:  # 250 images; the four test sets are 6,473 (source: release)
            val_sets = camo
    for kind, sets in (("train:", train_sets), ("val:  ", val_sets)):
        for s in sets:
            if s.pairs[0][1] is None:
                raise InputError(f"{s.folder}: no folder of masks, which validation needs")
            say(f"{kind} {s}")
            if rank == 0:
                evaluate.check_files(s.name, s.pairs)
    if not val_sets:
        say("val:   none, so there will be no best.pt")
    train_pairs, val_pairs = ([pair for s in sets for pair in s.pairs] for sets in (train_sets, val_sets))
    if set(train_pairs) & set(val_pairs):
        evaluate.warn("validation is on images of the training set")
    if len(train_pairs) < args.batch_size:
        raise InputError(f"--data: {len(train_pairs)} images do not fill a batch of {args.batch_size}; --batch-size")
    if stored is not None and len(train_pairs) != stored["images"]:
        raise InputError(f"--resume: --data has {len(train_pairs)} images; this run has {stored['images']}")

    # Model. A checkpoint says which encoder it belongs to; a random one it holds itself.
    random = args.sam_checkpoint == "random"
    weights = None if random else args.sam_checkpoint
    if stored is not None:
        model, _ = tssam.load_checkpoint(last, weights)
        encoder = stored["encoder"]
    else:
        if args.init is not None:
            content = tssam.load_file(args.init)
            sam = content["config"]["sam"] if "trained" in content else tssam.encoder_name(content, args.init)
            if sam != args.sam:
                raise InputError(f"--init: {args.init} belongs to {sam}, not {args.sam}: --sam {sam}")
            del content
        if not random and weights is None:
            if rank == 0:
                tssam.sam_weights(args.sam)
            if world > 1:
                dist.barrier()
            weights = tssam.sam_weights(args.sam)
        torch.manual_seed(args.seed)
        model = tssam.build_tssam(args.sam, args.size, args.task == "shadow", weights, args.csa_blocks, args.mrm_blocks)
        random_state = model.image_encoder.state_dict() if random else None  # frozen: no step changes these tensors
        encoder = dict(fingerprint=tssam.fingerprint(model), sam_checkpoint=None, random=random_state)
        if args.init is not None:
            source, _ = tssam.load_checkpoint(args.init, weights)
            if tssam.fingerprint(source) != encoder["fingerprint"]:
                text = "was trained on another encoder; name it with --sam-checkpoint (a random one: with --seed)"
                raise InputError(f"--init: {args.init} {text}")
            if source.config["high_freq"] != model.config["high_freq"]:
                raise InputError(f"--init: {args.init} and --task {args.task}: both or none must be of shadows")
            own = {name: t for name, t in model.state_dict().items() if name.startswith("image_encoder.")}
            tssam.load_strictly(model, source.state_dict() | own, f"--init: {args.init}")
            del source, own
    if weights is not None:
        encoder["sam_checkpoint"] = os.path.abspath(weights)
    if encoder["random"] is not None:
        evaluate.warn("the encoder is random, not SAM's: results say nothing about TS-SAM")
    autocast = partial(evaluate.autocast, args.device, args.precision)
    model.grad_checkpoint = args.grad_checkpoint
    model.store_encoder(evaluate.PRECISIONS[args.precision])
    model.to(args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    say(f"model: {args.sam} at {args.size} x {args.size}, {sum(p.numel() for p in trained):,} trained parameters")
    say(f"on:    {world} x {args.device}, {args.precision}; batches of {args.batch_size}, {part_size} at a time")
    say(f"out:   {args.out}")

    # Optimiser
    loss_of = balanced_bce if args.task == "shadow" else bce_iou
    adam = partial(torch.optim.AdamW, weight_decay=0.01) if args.recipe == "released" else torch.optim.Adam
    optimizer = adam(trained, args.lr)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")
    selected_by = "BER" if args.task == "shadow" else "S"
    rows, best_score, validated = [], -math.inf, True  # log.csv's rows; whether the last one's epoch was validated
    if stored is not None:
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
        rows, best_score, validated = stored["rows"], stored["best_score"], stored["validated"]
        say(f"resume: after epoch {len(rows)} of {args.epochs}" + ("" if validated else ", which is validated first"))

    # Checkpoints
    args.out.mkdir(parents=True, exist_ok=True)
    done = len(rows)  # the epoch that last.pt holds
    kept_args = {name: getattr(args, name) for name in (*EXPERIMENT, "accumulate")}
    kept_args |= {"data": [os.path.abspath(d) for d in args.data], "val": [os.path.abspath(s.folder) for s in val_sets]}
    about = dict(task=args.task, encoder=encoder, args=kept_args, val=kept_args["val"])

    def save_last(validated: bool) -> None:
        if rank == 0:
            state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rows=rows, best_score=best_score)
            state |= dict(validated=validated, part_size=part_size, images=len(train_pairs))
            tssam.save_checkpoint(last, model, epoch=len(rows), **state, **about)

    def how_to_go_on() -> str:
        if done == 0:
            return "stopped before the first epoch was finished"
        command = f"torchrun --nproc_per_node {world}" if world > 1 else "python"
        return f"stopped; `{command} train.py --resume --out {shlex.quote(str(args.out))}` goes on after epoch {done}"

    evaluate.on_stop(how_to_go_on)
    for epoch in range(done + validated, args.epochs + 1):
        start = time.monotonic()
        if epoch > done:  # else the run was stopped in this epoch's validation
            # The order follows from seed and epoch alone. An incomplete last batch is dropped; each batch is cut into
            # world x accumulate parts, of which every process takes its own.
            rng = np.random.default_rng((args.seed, epoch))
            order = rng.permutation(len(train_pairs))
            mirrored = rng.random(len(train_pairs)) < (0.5 if args.recipe == "released" else 0)
            parts = order[: len(order) // args.batch_size * args.batch_size].reshape(-1, world, part_size)[:, rank]
            loader = DataLoader(
                [(*train_pairs[i], bool(mirrored[i])) for i in parts.flat],
                part_size,
                collate_fn=partial(evaluate.read_pairs, size=args.size),
                num_workers=args.workers,
                worker_init_fn=evaluate.start_worker,
                pin_memory=on_cuda,
            )
            lr = 1e-7 + (args.lr - 1e-7) * (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2
            optimizer.param_groups[0]["lr"] = lr
            model.train()
            losses, step_loss = [], 0.0
            bar = evaluate.progress(loader, f"epoch {epoch}/{args.epochs}", len(parts), "part")
            for number, (images, masks) in enumerate(bar, start=1):
                with autocast():
                    logits = model(images.to(args.device, non_blocking=True))
                loss = loss_of(logits, masks.to(args.device, non_blocking=True)) / args.accumulate
                scaler.scale(loss).backward()
                step_loss = step_loss + loss.detach()
                if number % args.accumulate:
                    continue
                if world > 1:  # average loss and gradients over the processes
                    for tensor in (step_loss, *(p.grad for p in trained)):
                        dist.all_reduce(tensor)
                        tensor /= world
                losses.append(step_loss.item())
                if not math.isfinite(losses[-1]):
                    text = f"the loss is {losses[-1]}; last.pt holds epoch {done}; try a lower --lr or --precision fp32"
                    raise InputError(f"epoch {epoch}, step {len(losses)}: {text}")
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                bar.set_postfix(loss=f"{losses[-1]:.4f}", MB=f"{evaluate.peak_memory(args.device):.0f}")
                step_loss = 0.0
            if world > 1:  # the batch norms' statistics are each process's own; the first's are kept
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            if not all(t.isfinite().all() for t in model.state_dict().values()):
                raise InputError(f"epoch {epoch}: weights are not finite; last.pt holds epoch {done}; try a lower --lr")
            seconds = time.monotonic() - start
            row = dict(epoch=epoch, loss=sum(losses) / len(losses), lr=lr)
            row |= dict(images_per_s=len(losses) * args.batch_size / seconds, peak_MB=evaluate.peak_memory(args.device))
            rows.append(row | dict(seconds=seconds))
            save_last(validated=not val_sets)  # before validation, which can take long
            done = epoch

        row, best_yet = rows[-1], ""
        if val_sets:
            results = evaluate.evaluate(model, val_pairs[rank::world], args.task, "paper", part_size, args.workers)
            with autocast():
                sums = reduce(evaluate.add, results, {})
            if world > 1:
                shares: list = [None] * world
                dist.all_gather_object(shares, sums)
                sums = reduce(evaluate.add, shares, {})
            metrics = evaluate.average(sums, args.task, "paper")
            row |= metrics
            score = metrics[selected_by] * (-1 if selected_by == "BER" else 1)  # higher is better
            if score > best_score:
                best_score, best_yet = score, "  best"
                if rank == 0:
                    tssam.save_checkpoint(best, model, epoch=epoch, metrics=metrics, **about)
            save_last(validated=True)
        if rank == 0:
            evaluate.write_csv(rows, tuple(row), args.out / "log.csv")
            draw_curves(rows, ("loss", selected_by) if val_sets else ("loss",), args.out / "curves.png")
            if val_sets:
                with tempfile.TemporaryDirectory() as maps, autocast():
                    list(evaluate.evaluate(model, val_pairs[:6], args.task, "paper", part_size, 0, Path(maps)))
                    shown = [(i.stem, i, mask, Path(maps) / f"{i.stem}.png") for i, mask in val_pairs[:6]]
                    evaluate.save_overview(shown, args.out / "samples.png")
        cells = [f"epoch {epoch}/{args.epochs}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}"]
        cells += [f"{row['images_per_s']:.2f} images/s", f"{row['peak_MB']:.0f} MB"]
        cells += [f"{name} {text}" for name, text in evaluate.show(metrics).items()] if val_sets else []
        left = timedelta(seconds=round((args.epochs - epoch) * (time.monotonic() - start)))
        say("  ".join(cells) + f"{best_yet}  {left} left")
    if best_score > -math.inf:
        say(f"best:  {selected_by} {abs(best_score):.4f}, {best}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    evaluate.run(main)
