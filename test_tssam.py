"""The tests of tssam.py, train.py and evaluate.py: `python -m pytest`. No data, weights, network or GPU needed."""

import copy
import csv
import functools
import gc
import hashlib
import http.server
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import py_sod_metrics
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from segment_anything import sam_model_registry
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import train
import tssam
from tssam import (
    CSA,
    FFD,
    MRM,
    TSSAM,
    FusedAttention,
    InputError,
    build_tssam,
    load_checkpoint,
    load_released,
    save_checkpoint,
)

SIZE = 128  # pixels: 8 x 8 patches, which the windows of `tiny` do not divide


def tiny(seed: int = 0, **arguments) -> TSSAM:
    """A `tiny` model in which nothing is zero or one by initialisation, so that no term can hide."""
    torch.manual_seed(seed)
    model = build_tssam("tiny", **{"image_size": SIZE, **arguments})
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.abs())
            elif tensor.ndim <= 1 or "pos" in name or name.startswith("high_freq"):
                tensor.add_(0.1 * noise)
            elif "gate" in name:
                tensor.copy_(0.3 * noise)
    return model


def images(count: int = 2, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))


# ---------------------------------------------------------------------------------------------------------------------
# The equations, derived again from a module's weights with torch.nn.functional


def norm_relu(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    if norm.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp_min(0)


def conv_norm_relu(x: torch.Tensor, block: nn.Sequential, padding: int = 0) -> torch.Tensor:
    return norm_relu(F.conv2d(x, block[0].weight, block[0].bias, padding=padding), block[1])


def csa_by_hand(m: CSA, f_csa: torch.Tensor, f_vit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    merged = f_vit + conv_norm_relu(f_csa, m.up)
    return conv_norm_relu(merged, m.down), merged


def mrm_by_hand(m: MRM, f_vit: torch.Tensor, f_mrm: dict | None) -> dict[int, torch.Tensor]:
    compressed, result = conv_norm_relu(f_vit, m.compress), {}
    for k, steps in ((1, (0, 3)), (2, (0,))):
        f = compressed
        for i in steps:
            layer = m.deconv[str(k)]
            f = norm_relu(F.conv_transpose2d(f, layer[i].weight, layer[i].bias, stride=2), layer[i + 1])
        w1, w2 = m.gate[str(k)][0].weight, m.gate[str(k)][2].weight
        hidden = torch.einsum("oc,bchw->bohw", w1, f).clamp_min(0)
        f = torch.einsum("oc,bchw->bohw", w2, hidden).tanh() * f
        result[k] = f if f_mrm is None else f + f_mrm[k]
    return result


def ffd_by_hand(m: FFD, f_csa: torch.Tensor, f_mrm: dict[int, torch.Tensor]) -> torch.Tensor:
    x = conv_norm_relu(f_csa, m.conv_csa, 1)
    for k in ("2", "1"):
        r = conv_norm_relu(f_mrm[int(k)], m.conv_mrm[k], 1)
        quads = torch.stack([r[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
        x = conv_norm_relu(torch.cat([x, quads.mean(0) + quads.amax(0)], 1), m.stage1[k], 1)
        x = nn.UpsamplingBilinear2d(scale_factor=2)(x)  # corners aligned
        x = conv_norm_relu(torch.cat([x, f_mrm[int(k)]], 1), m.stage2[k], 1)
    return F.conv2d(x, m.head.weight, m.head.bias)


def tssam_by_hand(m: TSSAM, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits, what each block and the neck receive): the encoder walked by hand, no hooks."""
    encoder, config = m.image_encoder, m.config
    patches = encoder.patch_embed(x)
    b, g, _, width = patches.shape
    shuffled = patches.flatten().view(b, width, g * g)  # the release's reading
    f_csa = torch.einsum("oc,bcn->bon", m.csa_embedding.weight, shuffled) + m.csa_embedding.bias[:, None]
    f_csa = f_csa.view(b, -1, g, g)
    if config["high_freq"]:
        high = F.conv2d(tssam.high_pass(x), m.high_freq_embedding.weight, m.high_freq_embedding.bias, stride=16)
        f_csa = f_csa + high
    tokens = patches + encoder.pos_embed
    f_csa, _ = csa_by_hand(m.csa[0], f_csa, tokens.permute(0, 3, 1, 2))
    csa, mrm, f_mrm, received = iter(m.csa[1:]), iter(m.mrm), None, []
    for i, block in enumerate(encoder.blocks):
        received.append(tokens)
        f_vit = block(tokens).permute(0, 3, 1, 2)
        if i in config["mrm_blocks"]:
            f_mrm = mrm_by_hand(next(mrm), f_vit, f_mrm)
        if i in config["csa_blocks"]:
            f_csa, f_vit = csa_by_hand(next(csa), f_csa, f_vit)
        tokens = f_vit.permute(0, 2, 3, 1)
    received.append(tokens.permute(0, 3, 1, 2))
    f_vit = encoder.neck(received[-1])
    f_mrm = mrm_by_hand(next(mrm), f_vit, f_mrm)
    f_csa, _ = csa_by_hand(next(csa), f_csa, f_vit)
    assert next(csa, None) is None and next(mrm, None) is None
    logits = ffd_by_hand(m.ffd, f_csa, f_mrm)
    return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False), received


@pytest.mark.parametrize("training", [False, True])
def test_csa_is_equations_1_and_2(training):
    m = tiny().csa[1].train(training)
    f_csa, f_vit = torch.randn(2, 32, 8, 8), torch.randn(2, 64, 8, 8)
    for ours, by_hand in zip(m(f_csa, f_vit), csa_by_hand(m, f_csa, f_vit), strict=True):
        assert same(ours, by_hand)


@pytest.mark.parametrize("training", [False, True])
def test_mrm_is_equations_3_to_5(training):
    m = tiny().mrm[0].train(training)
    f_vit, before = torch.randn(2, 64, 8, 8), {1: torch.randn(2, 16, 32, 32), 2: torch.randn(2, 16, 16, 16)}
    for f_mrm in (None, before):
        ours, by_hand = m(f_vit, f_mrm), mrm_by_hand(m, f_vit, f_mrm)
        assert all(same(ours[k], by_hand[k]) for k in (1, 2))


@pytest.mark.parametrize("training", [False, True])
def test_ffd_is_equations_6_to_10(training):
    m = tiny().ffd.train(training)
    f_csa, f_mrm = torch.randn(2, 32, 8, 8), {1: torch.randn(2, 16, 32, 32), 2: torch.randn(2, 16, 16, 16)}
    assert same(m(f_csa, f_mrm), ffd_by_hand(m, f_csa, f_mrm))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "arguments", [{}, {"high_freq": True}, {"csa_blocks": (0, 2), "mrm_blocks": (1,)}, {"csa_blocks": ()}], ids=str
)
@torch.no_grad()
def test_two_streams(training, arguments):
    model = tiny(**arguments).train(training)
    expected, received = tssam_by_hand(model, images())
    seen = []
    modules = [*model.image_encoder.blocks, model.image_encoder.neck]
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in modules]
    logits = model(images())
    for handle in handles:
        handle.remove()
    assert logits.shape == (2, 1, SIZE, SIZE)
    assert same(logits, expected, 1e-4)
    # Write-back: what every block and the neck receive is the merged map, not the output of the block before.
    assert len(seen) == len(received) == 5
    assert all(same(a, b, 1e-4) for a, b in zip(seen, received, strict=True))


def test_high_pass():
    assert tssam.high_pass(torch.full((1, 3, 64, 64), 2.5)).abs().max() < 1e-5  # a constant image has no detail
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")

    def wave(fx: int, fy: int) -> torch.Tensor:
        return torch.cos(2 * math.pi * (fx * x + fy * y) / 64).expand(1, 3, 64, 64)

    # The square spans the frequencies -16 ... 15 of -32 ... 31 in each direction.
    assert tssam.high_pass(wave(15, 15)).abs().max() < 1e-4
    assert same(tssam.high_pass(wave(17, 0)), wave(17, 0).abs(), 1e-4)
    assert same(tssam.high_pass(wave(3, -20)), wave(3, -20).abs(), 1e-4)
    assert same(tssam.high_pass(wave(16, 0)), wave(16, 0).abs() / 2, 1e-4)  # -16 is removed, +16 is not
    mixed = tssam.high_pass(wave(2, 5) + wave(20, 1))
    assert same(mixed, wave(20, 1).abs(), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = tssam.high_pass((wave(2, 5) + wave(20, 1)).bfloat16())
    assert low.dtype == torch.float32 and same(low, mixed, 0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize(
    "sam, csa, mrm, trained", [("vit_b", 14, 13, 11_892_865), ("vit_l", 26, 13, None), ("vit_h", 34, 13, 29_437_569)]
)
def test_counts(sam, csa, mrm, trained):
    def count(model, requires_grad):
        return sum(p.numel() for p in model.parameters() if p.requires_grad or not requires_grad)

    with torch.device("meta"):
        model, with_high_freq = build_tssam(sam), build_tssam(sam, high_freq=True)
    assert (len(model.csa), len(model.mrm)) == (csa, mrm)
    assert trained in (None, count(model, True))
    assert count(with_high_freq, True) - count(model, True) == 196_864
    if sam == "vit_h":
        assert count(model, False) == 666_463_617  # the paper's 4.4 %
        assert model.config["mrm_blocks"] == list(range(20, 32))


@pytest.mark.parametrize("sam", ["vit_b", "vit_l", "vit_h"])
def test_encoders_are_those_of_segment_anything(sam):
    with torch.device("meta"):
        ours, theirs = build_tssam(sam, attention="sam").image_encoder, sam_model_registry[sam]().image_encoder
    assert str(ours) == str(theirs)  # layers, widths, the epsilon of the norms
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        assert (a.window_size, a.attn.num_heads, a.attn.use_rel_pos) == (b.window_size, b.attn.num_heads, True)


def test_initialisation():
    torch.manual_seed(0)
    model = TSSAM("vit_b", 64)
    up, down, compress = model.csa[3].up[0], model.csa[3].down[0], model.mrm[3].compress[0]
    for conv, fan_out in ((up, 768), (down, 256), (compress, 128)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
        assert not conv.bias.any()
    for linear in (model.mrm[3].gate["1"][0], model.mrm[3].gate["2"][2]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and linear.bias is None


def test_one_step_moves_every_trained_tensor_and_leaves_the_encoder():
    model = tiny(high_freq=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    masks = (images(2, seed=1)[:, :1] > 0).float()
    train.bce_iou(model(images()), masks).backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("image_encoder."), name
    assert all(p.grad is None and not p.requires_grad for p in model.image_encoder.parameters())


def test_taps_leave_nothing_behind():
    model = tiny()
    encoder, kept = model.image_encoder, []
    probe = encoder.blocks[2].mlp.register_forward_hook(lambda m, args, output: kept.append(weakref.ref(output)))
    first = model(images())
    hooks = [
        m for m in model.modules() if m._forward_pre_hooks or (m._forward_hooks and m is not encoder.blocks[2].mlp)
    ]
    assert not hooks
    gc.collect()
    del first
    assert kept[0]() is None  # freed with the graph, without waiting for the garbage collector
    with torch.no_grad():
        one, two = model.eval()(images()), model(images())
    assert torch.equal(one, two) and all(ref() is None for ref in kept)
    probe.remove()

    # A forward that fails half-way leaves no tap either.
    def fail(module, args):
        raise RuntimeError("half-way")

    with encoder.blocks[1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="half-way"):
        model(images())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(images()), one)


@torch.no_grad()
def test_copies_and_second_models_are_independent():
    model, other = tiny().eval(), tiny(seed=1).eval()
    alone = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), alone)
    for p in twin.parameters():
        p.zero_()
    assert not twin(images()).any()
    assert not same(other(images()), alone)
    assert torch.equal(model(images()), alone)
    model.train()(images(seed=3))  # moves the batch norms' statistics
    assert not torch.equal(model.eval()(images()), alone)


def test_model_says_what_is_wrong():
    with pytest.raises(InputError, match="no encoder is called 'vit_x'"):
        build_tssam("vit_x")
    with pytest.raises(InputError, match="100 is not a positive multiple of 16"):
        build_tssam("tiny", 100)
    with pytest.raises(InputError, match=r"csa_blocks: \[4\] is not within the 4 blocks"):
        build_tssam("tiny", SIZE, csa_blocks=[4])
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\), not \(batch, 3, 128, 128\)"):
        tiny()(images(2, 64))


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_bce_iou_by_hand():
    logits = torch.tensor([[[[0.0, 2.0], [-1.0, 3.0]]], [[[1.0, 1.0], [1.0, -4.0]]]])
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[0.0, 1.0], [0.0, 0.0]]]])
    bce, ious = 0.0, []
    for logit, mask in zip(logits, masks, strict=True):
        p = [1 / (1 + math.exp(-v)) for v in logit.flatten().tolist()]
        t = mask.flatten().tolist()
        bce -= sum(math.log(a if b else 1 - a) for a, b in zip(p, t, strict=True)) / 8
        inter = sum(a * b for a, b in zip(p, t, strict=True))
        ious.append(inter / (sum(p) + sum(t) - inter))
    expected = bce + sum(1 - iou for iou in ious) / 2
    assert train.bce_iou(logits, masks).item() == pytest.approx(expected, rel=1e-5)


def test_balanced_bce_by_hand():
    logits = torch.tensor([[[[0.5, 2.0]]], [[[-1.0, 3.0]]]])
    masks = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]])
    # One positive pixel, three negative ones in the whole batch: P/(P+N) = 1/4, pos_weight = 3.
    log = [math.log(1 / (1 + math.exp(-v))) for v in (0.5, -2.0, 1.0, -3.0)]
    expected = 0.25 * -(3 * log[0] + log[1] + log[2] + log[3]) / 4
    assert train.balanced_bce(logits, masks).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_of", [train.bce_iou, train.balanced_bce])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("certain", [0.0, -500.0, 500.0])
def test_losses_of_one_sided_masks_are_finite(loss_of, value, certain):
    logits = torch.full((2, 1, 4, 4), certain, dtype=torch.bfloat16, requires_grad=True)
    loss = loss_of(logits, torch.full((2, 1, 4, 4), value))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("loss_of", [train.bce_iou, train.balanced_bce])
def test_losses_are_float32_whatever_the_logits(loss_of):
    logits, masks = torch.randn(2, 1, 32, 32).bfloat16(), (torch.rand(2, 1, 32, 32) > 0.7).float()
    assert loss_of(logits, masks.bfloat16()).item() == loss_of(logits.float(), masks).item()


# ---------------------------------------------------------------------------------------------------------------------
# Weights and checkpoints


def sam_file(path: Path, image_size: int, seed: int = 5) -> Path:
    """A file in the format of SAM's published weights, holding a `tiny` encoder."""
    encoder = tiny(seed, image_size=image_size).image_encoder
    state = {f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    torch.save({**state, "mask_decoder.iou_token.weight": torch.zeros(1, 256)}, path)
    return path


def test_sam_weights_at_their_own_size(tmp_path):
    path = sam_file(tmp_path / "sam.pth", SIZE)
    loaded = build_tssam("tiny", SIZE, sam_checkpoint=path).image_encoder.state_dict()
    for name, tensor in tiny(5).image_encoder.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("size", [64, 192, 256])
def test_sam_weights_resampled(tmp_path, size):
    path = sam_file(tmp_path / "sam.pth", SIZE)
    model, grid = build_tssam("tiny", size, sam_checkpoint=path), size // 16
    for ours, sams in zip(model.image_encoder.blocks, tiny(5).image_encoder.blocks, strict=True):
        span = grid if ours.window_size == 0 else 7
        rule = get_rel_pos(span, span, sams.attn.rel_pos_h)  # SAM's own, from its 8 x 8 grid
        assert torch.allclose(get_rel_pos(span, span, ours.attn.rel_pos_h), rule, atol=1e-6)
    # The position embedding keeps its picture: a map that rises along the rows still does, from about 0 to about 1.
    state = torch.load(path, weights_only=True)
    state["image_encoder.pos_embed"] = torch.linspace(0, 1, 8)[None, :, None, None].expand(1, 8, 8, 64).clone()
    torch.save(state, path)
    ramp = build_tssam("tiny", size, sam_checkpoint=path).image_encoder.pos_embed[0]
    assert ramp.shape == (grid, grid, 64) and torch.allclose(ramp, ramp[:, :1, :1].expand_as(ramp), atol=1e-6)
    assert (ramp[1:, 0, 0] > ramp[:-1, 0, 0]).all() and ramp.min() > -0.1 and ramp.max() < 1.1
    assert model(images(1, size)).shape == (1, 1, size, size)


def test_sam_weights_that_do_not_fit_are_named(tmp_path):
    path = sam_file(tmp_path / "sam.pth", SIZE)
    with pytest.raises(InputError, match=r"sam.pth, as SAM's vit_b encoder: .*blocks.4.norm1.weight is missing"):
        build_tssam("vit_b", 64, sam_checkpoint=path)
    for broken in (path.read_bytes()[:1000], b"hello world", b"<html>", b""):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="sam.pth: not a checkpoint, or not a whole one; torch.load says") as error:
            build_tssam("tiny", SIZE, sam_checkpoint=path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="nowhere.pth: no such file"):
        build_tssam("tiny", SIZE, sam_checkpoint=tmp_path / "nowhere.pth")
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="sam.pth: holds a list"):
        build_tssam("tiny", SIZE, sam_checkpoint=path)
    torch.save({"f": functools.partial(print)}, path)  # anything but tensors and plain values is refused unread
    with pytest.raises(InputError, match="sam.pth: not a checkpoint, .* says UnpicklingError"):
        build_tssam("tiny", SIZE, sam_checkpoint=path)


def test_released_names():
    """Every name of the released checkpoints, spelled out again for a small model with two blocks tapped."""
    model = tiny(csa_blocks=(0, 3), mrm_blocks=(3,), high_freq=True)
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = {f"image_encoder.{name}" for name in model.image_encoder.state_dict()}
    expected |= {f"image_encoder.{e}.{w}" for e in ("csa_embedding", "fft_embedding.proj") for w in ("weight", "bias")}
    for i in range(4):
        csa = f"image_encoder.csa_blocks.{i}"
        expected |= {f"{csa}.conv{j}.{w}" for j in (1, 2) for w in ("weight", "bias")}
        expected |= {f"{csa}.bn{j}.{w}" for j in (1, 2) for w in bn}
    for i in range(2):
        mrm = f"image_encoder.mrm_blocks.{i}"
        expected |= {f"{mrm}.{c}.{w}" for c in ("conv_in.0", "fpn1.0", "fpn1.3", "fpn2.0") for w in ("weight", "bias")}
        expected |= {f"{mrm}.{n}.{w}" for n in ("conv_in.1", "fpn1.1", "fpn1.4", "fpn2.1") for w in bn}
        expected |= {f"{mrm}.{g}.res_gate.{j}.weight" for g in ("fpn1.6", "fpn2.3") for j in (0, 2)}
    for conv in ("conv1", "conv2", "conv4", "conv12_1", "conv12_2", "conv24_1", "conv24_2"):
        expected |= {f"mask_decoder.{conv}.0.weight"} | {f"mask_decoder.{conv}.1.{w}" for w in bn}
    expected |= {"mask_decoder.conv1_1.weight", "mask_decoder.conv1_1.bias"}
    assert {tssam.released_name(name) for name in model.state_dict()} == expected
    # What names and shapes alone would not tell apart.
    for ours, theirs in {
        "csa.1.up.0.bias": "image_encoder.csa_blocks.1.conv1.bias",
        "csa.1.down.1.bias": "image_encoder.csa_blocks.1.bn2.bias",
        "mrm.0.gate.1.0.weight": "image_encoder.mrm_blocks.0.fpn1.6.res_gate.0.weight",
        "mrm.0.gate.2.2.weight": "image_encoder.mrm_blocks.0.fpn2.3.res_gate.2.weight",
        "mrm.0.deconv.1.3.weight": "image_encoder.mrm_blocks.0.fpn1.3.weight",
        "ffd.conv_csa.0.weight": "mask_decoder.conv1.0.weight",
        "ffd.conv_mrm.2.0.weight": "mask_decoder.conv2.0.weight",
        "ffd.conv_mrm.1.0.weight": "mask_decoder.conv4.0.weight",
        "ffd.stage1.2.0.weight": "mask_decoder.conv12_1.0.weight",
        "ffd.stage2.2.0.weight": "mask_decoder.conv12_2.0.weight",
        "ffd.stage1.1.0.weight": "mask_decoder.conv24_1.0.weight",
        "ffd.stage2.1.0.weight": "mask_decoder.conv24_2.0.weight",
        "ffd.head.weight": "mask_decoder.conv1_1.weight",
    }.items():
        assert tssam.released_name(ours) == theirs


@torch.no_grad()
def test_load_released(tmp_path):
    source, target = tiny(1).eval(), tiny(2).eval()
    released = {tssam.released_name(name): tensor for name, tensor in source.state_dict().items()}
    torch.save(released, tmp_path / "released.pth")
    for given in (released, tmp_path / "released.pth"):
        load_released(target, given)
        assert torch.equal(target(images()), source(images()))
        target = tiny(2).eval()
    before = target(images())
    gate = "image_encoder.mrm_blocks.0.fpn1.6.res_gate.0.weight"
    for broken, message in (
        ({k: v for k, v in released.items() if k != gate}, f"{gate} is missing"),
        ({**released, "mask_decoder.extra": torch.zeros(1)}, "mask_decoder.extra is surplus"),
        ({**released, gate: torch.zeros(3, 16)}, f"{gate} is (3, 16), not (16, 16)"),
        ({**released, gate: "text"}, f"{gate} is no tensor, not (16, 16)"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            load_released(target, broken)
    assert torch.equal(target(images()), before)


def checkpoint(path: Path, model: TSSAM, **info) -> Path:
    save_checkpoint(path, model, **{"task": "sod", "encoder": tssam.fingerprint(model), **info})
    return path


@torch.no_grad()
def test_checkpoint_holds_the_trained_part_and_rebuilds_the_model(tmp_path):
    sam = sam_file(tmp_path / "sam.pth", 64)
    model = build_tssam("tiny", SIZE, True, sam, csa_blocks=np.array([1, 3]), mrm_blocks=(0, 2))
    model(images())  # the batch norms' statistics must come back too
    path = checkpoint(tmp_path / "best.pt", model, sam_checkpoint=str(sam), task="shadow")
    stored = torch.load(path, weights_only=True)
    assert not any(name.startswith("image_encoder") for name in stored["trained"])
    assert stored["config"] == {
        "sam": "tiny",
        "image_size": SIZE,
        "high_freq": True,
        "csa_blocks": [1, 3],
        "mrm_blocks": [0, 2],
    }
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
    for given in (None, sam):  # remembered, and named
        rebuilt, info = load_checkpoint(path, given)
        assert info["task"] == "shadow" and torch.equal(rebuilt.eval()(images()), model.eval()(images()))
    other = sam_file(tmp_path / "other.pth", 64, seed=6)
    with pytest.raises(InputError, match="best.pt: trained on another tiny encoder than .*other.pth"):
        load_checkpoint(path, other)


@torch.no_grad()
def test_checkpoint_of_a_random_encoder(tmp_path):
    torch.manual_seed(7)
    model = build_tssam("tiny", SIZE, high_freq=True).eval()
    path = checkpoint(tmp_path / "last.pt", model, encoder_seed=7)
    torch.manual_seed(8)  # the caller's own random numbers
    state = torch.get_rng_state()
    rebuilt, _ = load_checkpoint(path)
    assert torch.equal(rebuilt.eval()(images()), model(images()))
    assert torch.equal(torch.get_rng_state(), state)
    checkpoint(path, model, encoder_seed=8)
    with pytest.raises(InputError, match="trained on another tiny encoder than the random one of seed 8"):
        load_checkpoint(path)


def test_a_failed_save_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    torch.manual_seed(7)
    model = build_tssam("tiny", 64)
    path = checkpoint(tmp_path / "last.pt", model, encoder_seed=7)
    whole = path.read_bytes()

    def full_disk(content, file):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(
        InputError, match=r"last.pt: cannot be written \(no space left\); what was there before is whole"
    ):
        checkpoint(path, model)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_checkpoints_that_are_none_are_named(tmp_path):
    torch.manual_seed(7)
    model = build_tssam("tiny", 64)
    path = checkpoint(tmp_path / "last.pt", model, encoder_seed=7)
    stored = torch.load(path, weights_only=True)
    del stored["trained"]["ffd.head.bias"]
    torch.save(stored, path)
    with pytest.raises(InputError, match="last.pt: ffd.head.bias is missing"):
        load_checkpoint(path)
    for broken in ({**stored, "config": None}, {**stored, "config": {"odd": 1}}, {**stored, "trained": None}):
        torch.save(broken, path)
        with pytest.raises(InputError, match="last.pt: not written by this train.py"):
            load_checkpoint(path)
    torch.save({"image_encoder.csa_embedding.weight": torch.zeros(1), 3: 4}, path)
    with pytest.raises(InputError, match="last.pt: holds a dict, not a checkpoint"):
        load_checkpoint(path)
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, path)
    with pytest.raises(
        InputError, match="last.pt: neither a checkpoint written by train.py nor one of the authors' code"
    ):
        load_checkpoint(path)


@pytest.fixture
def download(tmp_path, monkeypatch):
    """SAM's public URL replaced by a folder of this machine, served over HTTP; (that folder, checkpoints folder)."""
    public = tmp_path / "public"
    public.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(public)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(tssam, "SAM_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(tssam, "SAM_FILES", {"vit_b": ("sam_b.pth", hashlib.sha256(b"weights").hexdigest())})
    yield public, tmp_path / "checkpoints"
    server.shutdown()
    server.server_close()


def test_download(download):
    public, folder = download
    (public / "sam_b.pth").write_bytes(b"weights")
    assert tssam.sam_weights("vit_b", folder).read_bytes() == b"weights"
    (public / "sam_b.pth").unlink()
    assert tssam.sam_weights("vit_b", folder).read_bytes() == b"weights"  # there already: not asked for again
    assert [p.name for p in folder.iterdir()] == ["sam_b.pth"]


def test_failed_downloads_say_where_to_put_the_file(download):
    public, folder = download
    where = f"get {tssam.SAM_URL}sam_b.pth and put it at {folder / 'sam_b.pth'}"
    with pytest.raises(InputError, match=re.escape(where)):  # 404
        tssam.sam_weights("vit_b", folder)
    (public / "sam_b.pth").write_bytes(b"weightz")
    with pytest.raises(InputError, match=re.escape(where)):  # wrong hash
        tssam.sam_weights("vit_b", folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(InputError, match="tiny: no weights are published for it"):
        tssam.sam_weights("tiny", folder)


def test_published_weights_are_the_ones_of_sam():
    assert tssam.SAM_URL == "https://dl.fbaipublicfiles.com/segment_anything/"
    assert {sam: name for sam, (name, _) in tssam.SAM_FILES.items()} == {
        "vit_b": "sam_vit_b_01ec64.pth",
        "vit_l": "sam_vit_l_0b3195.pth",
        "vit_h": "sam_vit_h_4b8939.pth",
    }
    assert all(len(sha256) == 64 for _, sha256 in tssam.SAM_FILES.values())


# ---------------------------------------------------------------------------------------------------------------------
# Data and metrics


def make_pairs(images_folder: Path, masks_folder: Path, stems: tuple[str, ...] = ("a", "b"), side: int = 40) -> None:
    rng = np.random.default_rng(0)
    images_folder.mkdir(parents=True)
    masks_folder.mkdir(parents=True)
    for stem in stems:
        Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(images_folder / f"{stem}.jpg")
        mask = np.zeros((side, side + 8), np.uint8)
        mask[5:30, 5:30] = 255
        Image.fromarray(mask).save(masks_folder / f"{stem}.png")


def build_layout(root: Path, folders: str, stems: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """Pairs in root/<images> and root/<masks>, given as "a/b + c"; what `find_sets` should find."""
    image_folder, mask_folder = (root / folder for folder in folders.split(" + "))
    make_pairs(image_folder, mask_folder, stems)
    return [(image_folder / f"{stem}.jpg", mask_folder / f"{stem}.png") for stem in stems]


COD_SETS = ("CAMO", "CHAMELEON", "COD10K", "NC4K")
LAYOUTS = {  # SPEC: root, train split, {test set's name: its folders}, a set without splits has no train split
    "DUTS": (
        "DUTS-TR/DUTS-TR-Image + DUTS-TR/DUTS-TR-Mask",
        {"DUTS-TE": "DUTS-TE/DUTS-TE-Image + DUTS-TE/DUTS-TE-Mask"},
    ),
    "ECSSD": (None, {"ECSSD": "images + ground_truth_mask"}),
    "DUT-OMRON": (None, {"DUT-OMRON": "DUT-OMRON-image + pixelwiseGT-new-PNG"}),
    "HKU-IS": (None, {"HKU-IS": "imgs + gt"}),
    "PASCAL-S": (None, {"PASCAL-S": "imgs + masks"}),
    "pascal-s": (None, {"pascal-s": "Imgs + gt"}),
    "Pascal_S": (None, {"Pascal_S": "Image + masks"}),
    "COD": ("TrainDataset/Imgs + TrainDataset/GT", {n: f"TestDataset/{n}/Imgs + TestDataset/{n}/GT" for n in COD_SETS}),
    "older": ("TrainDataset/Image + TrainDataset/GT", {"CAMO": "TestDataset/CAMO/Image + TestDataset/CAMO/GT"}),
    "ISTD": ("train/train_A + train/train_B", {"ISTD": "test/test_A + test/test_B"}),
    "mine": (None, {"mine": "My-IMAGES + my_Masks"}),
    "SBU": (
        "SBU-Train/ShadowImages + SBU-Train/ShadowMasks",
        {"SBU-Test": "SBU-Test/ShadowImages + SBU-Test/ShadowMasks"},
    ),
    "COD10K-v3": ("Train/Image + Train/GT_Object", {"COD10K-v3": "Test/Image + Test/GT_Object"}),
}


def build_data_set(root: Path) -> tuple[list, dict[str, list]]:
    """A data set of LAYOUTS: its training pairs and those of each of its test sets."""
    train_folders, tests = LAYOUTS[root.name]
    train_pairs = build_layout(root, train_folders, ("t1", "t2")) if train_folders else []
    test_pairs = {name: build_layout(root, folders, ("b", "a")) for name, folders in tests.items()}
    return train_pairs, {name: sorted(pairs) for name, pairs in test_pairs.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(tmp_path, layout):
    train_pairs, test_pairs = build_data_set(tmp_path / layout)
    if layout == "ISTD":  # _C is the shadow-free image
        for split in ("train", "test"):
            make_pairs(tmp_path / layout / split / f"{split}_C", tmp_path / "elsewhere" / split, ("t1", "b"))
    found = evaluate.find_sets([tmp_path / layout], "test")
    assert {s.name: s.pairs for s in found} == test_pairs
    assert all(s.split == ("test" if train_pairs else None) for s in found)
    (s,) = evaluate.find_sets([tmp_path / layout], "train")
    if train_pairs:
        assert s.pairs == train_pairs and s.split == "train"
        (named,) = evaluate.find_sets([s.folder], "train")  # the split's own folder, named
        assert named == s
    else:
        assert {s.name: s.pairs} == test_pairs


def test_a_folder_above_several_sets(tmp_path):
    expected = {}
    for layout in ("DUTS", "ECSSD", "HKU-IS", "COD", "ISTD"):
        expected |= build_data_set(tmp_path / layout)[1]
    make_pairs(tmp_path / "__MACOSX/Imgs", tmp_path / "__MACOSX/GT")
    (tmp_path / ".cache/Imgs").mkdir(parents=True)
    (tmp_path / "papers").mkdir()
    found = evaluate.find_sets([tmp_path], "test")
    assert {s.name: s.pairs for s in found} == expected
    # The same by their names, in the order given.
    roots = [tmp_path / "ISTD", tmp_path / "COD" / "TestDataset", tmp_path / "DUTS"]
    assert [s.name for s in evaluate.find_sets(roots, "test")] == ["ISTD", *COD_SETS, "DUTS-TE"]
    # Training takes no guess among them, and no test split.
    with pytest.raises(InputError, match=r"holds several data sets \(.*ECSSD.*\); name those to train on"):
        evaluate.find_sets([tmp_path], "train")
    roots = [tmp_path / "COD", tmp_path / "DUTS"]
    assert [s.split for s in evaluate.find_sets(roots, "train")] == ["train", "train"]
    # Splits and whole sets side by side: still a row of each, and training takes the split.
    build_layout(tmp_path / "flat", "DUTS-TR/Imgs + DUTS-TR/GT", ("t",))
    build_layout(tmp_path / "flat", "DUTS-TE/Imgs + DUTS-TE/GT", ("e",))
    build_data_set(tmp_path / "flat/ECSSD")
    (tmp_path / "flat/images").mkdir()  # of no account beside splits
    assert [s.name for s in evaluate.find_sets([tmp_path / "flat"], "test")] == ["DUTS-TE", "ECSSD"]
    assert [s.name for s in evaluate.find_sets([tmp_path / "flat"], "train")] == ["DUTS-TR"]
    # A linked set has the link's name.
    (tmp_path / "NC4K").symlink_to(tmp_path / "flat/ECSSD")
    (linked,) = evaluate.find_sets([tmp_path / "NC4K"], "test")
    assert linked.name == "NC4K" and len(linked.pairs) == 2
    (tmp_path / "NC4K").unlink()
    # Unpacked into a folder of its own name, as archives are.
    (tmp_path / "DUTS/DUTS-TE").rename(tmp_path / "inner")
    (tmp_path / "DUTS/DUTS-TE").mkdir()
    (tmp_path / "inner").rename(tmp_path / "DUTS/DUTS-TE/DUTS-TE")
    (s,) = evaluate.find_sets([tmp_path / "DUTS"], "test")
    assert s.name == "DUTS-TE" and len(s.pairs) == 2
    # The same for a folder of images alone.
    (tmp_path / "ECSSD/images").rename(tmp_path / "inner")
    (tmp_path / "ECSSD/images").mkdir()
    (tmp_path / "inner").rename(tmp_path / "ECSSD/images/images")
    (unpacked,) = evaluate.find_sets([tmp_path / "ECSSD"], "test")
    assert [i.relative_to(tmp_path) for i, _ in unpacked.pairs] == [Path(f"ECSSD/images/images/{x}.jpg") for x in "ab"]
    # What was found is said with its folders, split and pairs.
    folder = tmp_path / "DUTS/DUTS-TE/DUTS-TE"
    assert str(s) == f"DUTS-TE: {folder / 'DUTS-TE-Image'} and DUTS-TE-Mask, test split, 2 pairs"


def test_files_that_are_images(tmp_path):
    for folder in ("Imgs", "GT"):
        (tmp_path / folder).mkdir()
    for stem, ending in zip("abcdef", (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG"), strict=True):
        Image.new("RGB", (8, 8)).save(tmp_path / "Imgs" / f"{stem}{ending}")
        Image.new("L", (8, 8)).save(tmp_path / "GT" / f"{stem}.PNG")
    for clutter in ("Imgs/Thumbs.db", "Imgs/.DS_Store", "Imgs/._a.jpg", "GT/._a.png", "GT/desktop.ini", "GT/read.txt"):
        (tmp_path / clutter).write_bytes(b"clutter")
    (tmp_path / "Imgs/folder.png").mkdir()
    (tmp_path / "Imgs/g.png").symlink_to(tmp_path / "nowhere")  # as a data manager leaves what it has not fetched
    (tmp_path / "GT/g.PNG").symlink_to(tmp_path / "nowhere")
    (s,) = evaluate.find_sets([tmp_path], "train")
    assert [(i.name, m.name) for i, m in s.pairs] == [
        ("a.jpg", "a.PNG"),
        ("b.jpeg", "b.PNG"),
        ("c.png", "c.PNG"),
        ("d.bmp", "d.PNG"),
        ("e.webp", "e.PNG"),
        ("f.JPG", "f.PNG"),
        ("g.png", "g.PNG"),
    ]
    with pytest.raises(InputError, match="g.PNG: cannot be read as an image"):
        evaluate.check_sizes(s.pairs)


def test_images_without_masks(tmp_path):
    make_pairs(tmp_path / "new" / "Imgs", tmp_path / "elsewhere")
    expected = [(tmp_path / f"new/Imgs/{stem}.jpg", None) for stem in "ab"]
    for root, name in ((tmp_path / "new", "new"), (tmp_path / "new" / "Imgs", "Imgs")):
        (s,) = evaluate.find_sets([root], "test")
        assert (s.name, s.split, s.pairs) == (name, None, expected)
    assert str(s).endswith("Imgs, no splits, 2 images without masks")
    (s,) = evaluate.find_sets([tmp_path / "new/Imgs/b.jpg"], "test")
    assert (s.name, s.pairs) == ("b", expected[1:])
    with pytest.raises(InputError, match="new: no folder of masks; looked for gt, .*train_b"):
        evaluate.find_sets([tmp_path / "new"], "train")
    # Folders of unknown names are not taken for images.
    make_pairs(tmp_path / "odd" / "pictures", tmp_path / "odd" / "labels")
    with pytest.raises(InputError, match="odd: no data set for the test split"):
        evaluate.find_sets([tmp_path / "odd"], "test")
    # ISTD's shadow-free images are no masks.
    make_pairs(tmp_path / "ISTD/train/train_A", tmp_path / "ISTD/train/train_C")
    with pytest.raises(InputError, match="ISTD/train: no folder of masks"):
        evaluate.find_sets([tmp_path / "ISTD"], "train")


def test_data_that_is_not_found_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        evaluate.find_sets([tmp_path / "nowhere"], "test")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        InputError, match=r"notes.txt: a file, not a folder or an image \(.jpg, .jpeg, .png, .bmp, .web"
    ):
        evaluate.find_sets([tmp_path / "notes.txt"], "test")
    Image.new("RGB", (5, 5)).save(tmp_path / "photo.png")
    with pytest.raises(InputError, match="photo.png: a file, not a folder$"):
        evaluate.find_sets([tmp_path / "photo.png"], "train")
    (tmp_path / "stuff").mkdir()
    message = (
        r"for a folder of images \(im, img, .*train_a, test_a\) beside one of masks \(gt, .*test_b\),"
        r" in a folder of the split \(train, .*\*\[-_\]tr.*\) where there is one$"
    )
    with pytest.raises(InputError, match=message) as error:
        evaluate.find_sets([tmp_path], "train")
    assert "\n" not in str(error.value)
    # A root that has the other split only.
    build_layout(tmp_path / "D", "D-TR/Imgs + D-TR/GT", ("a",))
    with pytest.raises(InputError, match="D: no data set for the test split.*the folders there: D-TR"):
        evaluate.find_sets([tmp_path / "D"], "test")
    with pytest.raises(InputError, match="D-TR: named twice"):
        evaluate.find_sets([tmp_path / "D", tmp_path / "D" / "D-TR"], "train")


def test_pairs_that_are_none_are_named(tmp_path):
    make_pairs(tmp_path / "Imgs", tmp_path / "GT", ("a", "b", "c"))
    (tmp_path / "GT" / "b.png").unlink()
    with pytest.raises(
        InputError, match=r"1 images \(such as b\) stand alone; an image and its mask have the same stem"
    ):
        evaluate.find_sets([tmp_path], "train")
    (tmp_path / "Imgs" / "b.jpg").unlink()
    (tmp_path / "Imgs" / "d.jpg").write_bytes((tmp_path / "Imgs" / "c.jpg").read_bytes())
    (tmp_path / "Imgs" / "c.jpg").unlink()
    with pytest.raises(InputError, match=r"1 images \(such as d\) and 1 masks \(such as c\) stand alone"):
        evaluate.find_sets([tmp_path], "train")
    (tmp_path / "Imgs" / "d.jpg").unlink()
    with pytest.raises(InputError, match=r"1 masks \(such as c\) stand alone"):
        evaluate.find_sets([tmp_path], "test")
    (tmp_path / "GT" / "c.png").unlink()
    (tmp_path / "Imgs" / "a.bmp").touch()
    with pytest.raises(
        InputError, match="a.jpg: a.bmp beside it has the same stem; .*images and masks lie in two folders"
    ):
        evaluate.find_sets([tmp_path], "test")
    (tmp_path / "masks").mkdir()
    (tmp_path / "Imgs" / "a.bmp").unlink()
    with pytest.raises(InputError, match=r"several folders of masks \(GT, masks\)"):
        evaluate.find_sets([tmp_path], "test")
    (tmp_path / "masks").rmdir()
    (tmp_path / "GT" / "a.png").unlink()
    with pytest.raises(InputError, match="GT: no image files in it"):
        evaluate.find_sets([tmp_path], "test")


PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def odd_images() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Images of every mode PIL reads from our file types, and their 8-bit RGB values."""
    rgb, grey = Image.fromarray(PICTURE), Image.fromarray(PICTURE[..., 0])
    three = np.repeat(PICTURE[..., :1], 3, axis=-1)
    alpha = Image.fromarray(PICTURE[..., 1])
    palette = Image.fromarray(PICTURE[..., 0] % 4)
    palette = palette.convert("P")
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [255, 255, 255]], np.uint8)
    palette.putpalette(colours.tobytes())
    clear = palette.copy()
    clear.info["transparency"] = bytes([0, 128, 255, 255])
    wide = PICTURE[..., 0].astype(np.uint16) * 257
    with_alpha = {"RGBA": rgb.copy(), "LA": grey.copy()}
    for image in with_alpha.values():
        image.putalpha(alpha)
    return {
        "rgb.png": (rgb, PICTURE),
        "grey.png": (grey, three),
        "rgba.png": (with_alpha["RGBA"], PICTURE),
        "grey-alpha.png": (with_alpha["LA"], three),
        "one-bit.png": (grey.point(lambda v: 255 if v > 99 else 0).convert("1"), (three > 99) * 255),
        "palette.png": (palette, colours[PICTURE[..., 0] % 4]),
        "palette-clear.png": (clear, colours[PICTURE[..., 0] % 4]),
        "16-bit.png": (Image.fromarray(wide), three),
        "16-bit-of-8.png": (Image.fromarray(wide // 257), three),
        "palette.bmp": (palette, colours[PICTURE[..., 0] % 4]),
        "rgba.webp": (with_alpha["RGBA"], None),
        "cmyk.jpg": (Image.new("CMYK", (30, 20), (0, 255, 255, 0)), np.full((20, 30, 3), (255, 0, 0))),
        "grey.jpg": (Image.new("L", (30, 20), 77), np.full((20, 30, 3), 77)),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", odd_images())
def test_images_of_every_kind(tmp_path, name):
    image, expected = odd_images()[name]
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    image.save(tmp_path / name, **options)
    read = evaluate.read_image(tmp_path / name)
    expected = PICTURE if expected is None else expected
    assert read.mode == "RGB" and read.size == (30, 20)
    assert np.abs(np.asarray(read).astype(int) - expected).max() <= (2 if name.endswith("jpg") else 0)


def odd_masks() -> dict[str, tuple[Image.Image, np.ndarray | None]]:
    """Masks of every kind of DISK, and the grey levels they should be read as (None: 0 and 255)."""
    disk = DISK.astype(np.uint8)
    levels = np.zeros_like(disk)
    levels[2:6], levels[6:10], levels[10:14], levels[14:] = 1, 128, 129, 255

    def palette(colours: list[int], indices: np.ndarray = disk) -> Image.Image:
        image = Image.fromarray(indices).convert("P")
        image.putpalette(colours)
        return image

    white = Image.fromarray(disk * 255)
    return {
        "one-bit.png": (white.convert("1"), None),
        "grey.png": (white, None),
        "grey.bmp": (white, None),
        "0-and-1.png": (Image.fromarray(disk), None),
        "0-and-128.png": (Image.fromarray(disk * 128), disk * 128),  # grey levels stay what they are
        "rgb-0-and-1.png": (Image.fromarray(disk).convert("RGB"), None),
        "16-bit.png": (Image.fromarray(disk.astype(np.uint16) * 65535), None),
        "16-bit-0-and-255.png": (Image.fromarray(disk.astype(np.uint16) * 255), None),
        "16-bit-0-and-1.png": (Image.fromarray(disk.astype(np.uint16)), None),
        "16-bit-edges.png": (Image.fromarray(levels.astype(np.uint16) * 257), levels),
        "16-bit-faint.png": (Image.fromarray(np.where(levels == 1, 3, levels.astype(np.uint16) * 257)), levels),
        "rgb.png": (white.convert("RGB"), None),
        "rgb-red.png": (Image.fromarray(disk[..., None] * np.array([255, 0, 0], np.uint8)), None),
        "rgba.png": (white.convert("RGBA"), None),
        "grey-alpha.png": (white.convert("LA"), None),
        "palette.png": (palette([0, 0, 0, 255, 255, 255]), None),
        "palette-turned.png": (palette([255, 255, 255, 0, 0, 0], 1 - disk), None),
        "palette-dark.png": (palette([0, 0, 0, 128, 0, 0]), None),
        "palette-objects.png": (
            palette([0, 0, 0, 128, 0, 0, 0, 128, 0], disk * (1 + (np.arange(30) > 14)).astype(np.uint8)),
            None,
        ),
        "edges.png": (Image.fromarray(levels), levels),
        "16-bit-of-8.png": (Image.fromarray(levels.astype(np.uint16)), levels),
        "dark-edges.png": (Image.fromarray(levels // 2), levels // 2),
        "nothing.png": (Image.new("L", (30, 20)), np.zeros_like(disk)),
        "all-of-it.png": (Image.new("L", (30, 20), 1), np.full_like(disk, 255)),
    }


DISK = np.hypot(*np.mgrid[-10:10, -15:15]) < 8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", odd_masks())
def test_masks_of_every_kind(tmp_path, name):
    image, expected = odd_masks()[name]
    image.save(tmp_path / name)
    mask = evaluate.read_mask(tmp_path / name)
    assert mask.mode == "L" and mask.size == (30, 20)
    expected = DISK * 255 if expected is None else expected
    assert np.array_equal(np.asarray(mask), expected)
    # The paper's protocol and training: above 0, then nearest. Every second pixel of twice the size is the same one.
    assert np.array_equal(
        evaluate.foreground(mask.resize((60, 60), Image.Resampling.NEAREST), 60)[::3, ::2], expected > 0
    )


def save_turned(path: Path, orientation: int) -> None:
    """A 30 x 20 JPEG, its left half white, that EXIF says to show turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    pixels[:5, :15, 1] = 0
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize(
    "orientation, mask_size, bright",
    [
        (1, (30, 20), "left"),
        (6, (30, 20), "left"),  # the mask lies as the pixels do
        (6, (20, 30), "top"),  # the mask is upright
        (8, (20, 30), "bottom"),
        (8, (200, 400), "bottom"),  # of another size, but upright
        (6, (25, 25), "left"),  # says nothing
        (3, (30, 20), "left"),  # sizes cannot tell
        (3, (20, 30), "left"),  # the mask is of another picture's size
        (3, None, "right"),
        (6, None, "top"),
    ],
)
def test_exif_rotation_where_the_masks_size_says_so(tmp_path, orientation, mask_size, bright):
    save_turned(tmp_path / "a.jpg", orientation)
    mask_file = None
    if mask_size:
        Image.new("L", mask_size, 255).save(mask_file := tmp_path / "mask.png")
    image = evaluate.read_image(tmp_path / "a.jpg", mask_size)
    sizes = evaluate.sizes_of(tmp_path / "a.jpg", mask_file)
    assert sizes == (image.size, mask_size or image.size)
    assert image.size == ((20, 30) if bright in ("top", "bottom") else (30, 20))
    grey = np.asarray(image.convert("L")).astype(float)
    halves = {"left": grey[:, :10], "right": grey[:, -10:], "top": grey[:10], "bottom": grey[-10:]}
    assert max(halves, key=lambda half: halves[half].mean()) == bright
    x, index, item_sizes = evaluate.Pictures([(tmp_path / "a.jpg", mask_file)], 32)[0]
    assert item_sizes.tolist() == [list(size[::-1]) for size in sizes] and index == 0
    middle = x[0].mean().item()
    assert {"left": x[0][:, :15], "right": x[0][:, 17:], "top": x[0][:15], "bottom": x[0][17:]}[bright].mean() > middle
    if mask_file:
        assert torch.equal(evaluate.Pairs([(tmp_path / "a.jpg", mask_file)], 32)[0][0], x)


def test_exif_that_no_mask_can_confirm_is_warned_about(tmp_path, capsys):
    pairs = []
    for orientation, size in ((1, (30, 20)), (6, (30, 20)), (3, (30, 20)), (6, (20, 20))):
        save_turned(tmp_path / "a.jpg", orientation)
        file = tmp_path / f"{orientation}-{size[0]}.jpg"
        with Image.open(tmp_path / "a.jpg") as image:
            image.crop((0, 0, *size)).save(file, exif=image.getexif())
        Image.new("L", size).save(mask := file.with_suffix(".png"))
        pairs.append((file, mask))
    evaluate.check_sizes(pairs)
    err = capsys.readouterr().err
    assert err == (
        "warning: 2 of 4 images are turned or mirrored by EXIF, such as 3-30, 6-20, in a way no mask's size can"
        " confirm; they are read as the pixels lie\n"
    )
    evaluate.check_sizes([(image, None) for image, _ in pairs])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", range(1, 9))
def test_every_turn_is_exifs(tmp_path, value):
    save_turned(tmp_path / "a.png", value)
    with Image.open(tmp_path / "a.png") as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(evaluate.read_image(tmp_path / "a.png")), np.asarray(upright))
    assert evaluate.sizes_of(tmp_path / "a.png", None)[0] == upright.size


def test_broken_exif_is_no_error(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00not a TIFF header")
    assert evaluate.read_image(tmp_path / "a.jpg").size == (30, 20)


def test_unequal_sizes_are_warned_about_once(tmp_path, capsys):
    make_pairs(tmp_path / "Imgs", tmp_path / "GT", tuple("abcdef"))
    (s,) = evaluate.find_sets([tmp_path], "train")
    evaluate.check_sizes(s.pairs)
    assert capsys.readouterr().err == ""
    for stem in "bcdf":
        Image.new("L", (48, 41), 255).save(tmp_path / "GT" / f"{stem}.png")
    evaluate.check_sizes(s.pairs)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(
        "warning: 4 of 6 images are not of their mask's size, such as b (48 x 40"
    )
    assert "mask 48 x 41), c (" in err and "), d (" in err and "f (" not in err and "each is resized by itself" in err
    image, mask = evaluate.Pairs(s.pairs, 64)[1]
    assert image.shape == (3, 64, 64) and mask.shape == (1, 64, 64) and mask.all()
    (tmp_path / "GT" / "e.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="e.png: cannot be read as an image"):
        evaluate.check_sizes(s.pairs)


def test_items_of_pairs(tmp_path):
    (tmp_path / "Imgs").mkdir()
    (tmp_path / "GT").mkdir()
    Image.new("RGB", (50, 30), (255, 0, 51)).save(tmp_path / "Imgs" / "a.png")
    mask = np.zeros((2, 2), np.uint8)
    mask[0, 1], mask[1, 0] = 1, 255  # above 0 is foreground
    Image.fromarray(mask).save(tmp_path / "GT" / "a.png")
    pairs = evaluate.Pairs(evaluate.find_sets([tmp_path], "train")[0].pairs, 64)
    image, target = pairs[0]
    assert image.shape == (3, 64, 64) and image.dtype == target.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert torch.allclose(image.mean((1, 2)), torch.tensor(expected), atol=1e-4)
    assert torch.equal(target[0], torch.tensor([[0.0, 1], [1, 0]]).repeat_interleave(32, 0).repeat_interleave(32, 1))
    Image.fromarray(mask * 255).save(tmp_path / "Imgs" / "a.png")  # two by two pixels, read as RGB and blended
    assert len(pairs[0][0].unique()) > 20


def samples(protocol: str, count: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """Hand-made predictions and masks, of different sizes, empty and full masks among them."""
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        size = (40 + 3 * i, 50 - 2 * i)
        mask = np.zeros(size, bool)
        mask[10 + i : 30, 15:40] = True
        if i >= count - 2:
            mask[:] = i == count - 1
        prediction = (0.6 * mask + 0.4 * rng.random(size)) * (0.3 + 0.6 * rng.random(size))
        made.append(
            (prediction.astype(np.float32) if protocol == "paper" else (prediction * 255).astype(np.uint8), mask)
        )
    return made


def by_py_sod_metrics(pairs: list[tuple[np.ndarray, np.ndarray]], task: str, protocol: str) -> dict[str, float]:
    """The same numbers from direct calls, the library's own averages."""
    metrics = {n: getattr(py_sod_metrics, n)() for n in ("Smeasure", "Emeasure", "WeightedFmeasure", "MAE")}
    f = py_sod_metrics.FmeasureV2({"f": py_sod_metrics.FmeasureHandler(True, True, beta=0.3)})
    ber, pooled = (
        py_sod_metrics.FmeasureV2({"b": py_sod_metrics.BERHandler(False, False, with_binary=True, sample_based=s)})
        for s in (True, False)
    )
    for prediction, mask in pairs:
        grey = prediction if protocol == "original" else prediction.astype(np.float64) * 255
        for metric in (*metrics.values(), f):
            metric.step(grey, mask.astype(np.uint8) * 255)
        binary = (grey > 125).astype(np.float64)
        ber.step(binary, mask, normalize=False)
        pooled.step(binary, mask, normalize=False)
    if task == "shadow":
        result = {"BER": 100 * ber.get_results()["b"]["binary"]}
        return result | ({"BER_pooled": 100 * pooled.get_results()["b"]["binary"]} if protocol == "original" else {})
    s, e, wf, mae = (metric.get_results() for metric in metrics.values())
    result = {"S": s["sm"], "E": e["em"]["curve"].mean(), "wF": wf["wfm"], "MAE": mae["mae"]}
    if protocol == "original":
        result |= {"maxF": f.get_results()["f"]["dynamic"].max(), "adpF": f.get_results()["f"]["adaptive"]}
    return result


@pytest.mark.parametrize("protocol", ["paper", "original"])
@pytest.mark.parametrize("task", ["sod", "shadow"])
def test_metrics_are_those_of_py_sod_metrics(task, protocol):
    every = evaluate.Scores(task, protocol)
    for sample in samples(protocol):
        alone = evaluate.Scores(task, protocol)
        alone.add(evaluate.score(*sample, task, protocol))
        every.add(evaluate.score(*sample, task, protocol))
        assert alone.results() == by_py_sod_metrics([sample], task, protocol)
    expected = by_py_sod_metrics(samples(protocol), task, protocol)
    assert every.results() == pytest.approx(expected, rel=1e-12) and every.results().keys() == expected.keys()
    assert all(type(value) is float for value in every.results().values())
    assert len(every.s) == 4 and np.mean(every.s) == pytest.approx(
        by_py_sod_metrics(samples(protocol), "sod", protocol)["S"]
    )
    (_, mask), *_ = samples(protocol)
    perfect = evaluate.Scores("sod", protocol)
    perfect.add(
        evaluate.score(
            mask.astype(np.float32) if protocol == "paper" else mask.astype(np.uint8) * 255, mask, "sod", protocol
        )
    )
    expected = {"S": 1, "E": 1, "wF": 1, "MAE": 0} | ({"maxF": 1, "adpF": 1} if protocol == "original" else {})
    assert perfect.results() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("protocol", ["paper", "original"])
def test_ber_by_hand(protocol):
    def of(*predictions: np.ndarray) -> dict[str, float]:
        scores = evaluate.Scores("shadow", protocol)
        for prediction, mask in predictions:
            grey = prediction if protocol == "paper" else (prediction * 255).round().astype(np.uint8)
            scores.add(evaluate.score(grey, mask, "shadow", protocol))
        return scores.results()

    mask = np.zeros((10, 10), bool)
    mask[:, :4] = True
    faint = np.full((10, 10), 0.3, np.float32)  # nothing reaches the threshold, stretched or not
    assert of((faint, mask))["BER"] == 50.0
    half = faint.copy()
    half[:, 4:] = 125 / 255 - 1e-6  # just below it
    half[:, :3] = 126 / 255  # 30 of 40 found
    half[:6, 9] = 0.9  # 6 of 60 wrongly found
    small = (half[:, :8], mask[:, :8])  # 30 of 40 found, nothing wrongly
    results = of((faint, mask), (half, mask), small)
    assert results["BER"] == pytest.approx(100 * (0.5 + (10 / 40 + 6 / 60) / 2 + (10 / 40) / 2) / 3)
    if protocol == "original":
        assert results["BER_pooled"] == pytest.approx(100 * (60 / 120 + 6 / 160) / 2)
    else:
        assert results.keys() == {"BER"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", ["paper", "original"])
@pytest.mark.parametrize("task", ["sod", "shadow"])
@pytest.mark.parametrize("value", [False, True])
def test_metrics_of_one_sided_masks_are_finite(task, value, protocol):
    scores = evaluate.Scores(task, protocol)
    for probability in (np.zeros((8, 8)), np.ones((8, 8)), np.full((8, 8), 0.5), np.random.rand(8, 8)):
        grey = probability.astype(np.float32) if protocol == "paper" else (probability * 255).astype(np.uint8)
        scores.add(evaluate.score(grey, np.full((8, 8), value), task, protocol))
    assert all(math.isfinite(v) for v in scores.results().values())


class Brightness(nn.Module):
    """Stands in for a TSSAM: logits from an image's brightness, so that they can be made by hand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config, self.weight = {"image_size": size}, nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * images.mean(1, keepdim=True) + images[:, :1]


@pytest.fixture
def mixed_pairs(tmp_path) -> list[tuple[Path, Path]]:
    """Seven pairs of different sizes; one mask has another size than its image, one grey edges, one is of 0, 1."""
    rng = np.random.default_rng(0)
    for folder in ("Imgs", "GT"):
        (tmp_path / "mixed" / folder).mkdir(parents=True)
    for i in range(7):
        width, height = 30 + 7 * i, 60 - 5 * i
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
        coarse.save(tmp_path / f"mixed/Imgs/{i}.jpg")
        mask = Image.new("L", (width + (i == 2), height))
        ImageDraw.Draw(mask).ellipse((5, 5, 25, 20), fill=1 if i == 3 else 255)
        if i == 4:
            mask = mask.filter(ImageFilter.GaussianBlur(2))
        if i == 5:  # the original protocol's threshold is above 128
            mask = mask.point(lambda grey: 128 if grey else 0)
            ImageDraw.Draw(mask).ellipse((15, 10, 25, 20), fill=129)
        mask.save(tmp_path / f"mixed/GT/{i}.png")
    return evaluate.find_sets([tmp_path / "mixed"], "test")[0].pairs


@pytest.mark.parametrize("protocol", ["paper", "original"])
@pytest.mark.parametrize("task", ["sod", "shadow"])
def test_protocols_from_files_to_numbers(tmp_path, mixed_pairs, task, protocol):
    model, made = Brightness(32), []
    for image_file, mask_file in mixed_pairs:
        image = np.asarray(Image.open(image_file).resize((32, 32), Image.Resampling.BILINEAR)) / np.float32(255)
        x = (image - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        logits = torch.from_numpy(2 * x.mean(-1) + x[..., 0])
        mask = np.asarray(Image.open(mask_file))
        if protocol == "paper":
            rows, columns = ((np.arange(32) + 0.5) * side / 32 for side in mask.shape)
            made.append((logits.sigmoid().numpy(), mask[rows.astype(int)][:, columns.astype(int)] > 0))
        else:
            full = F.interpolate(logits[None, None], mask.shape, mode="bilinear", align_corners=False)[0, 0]
            made.append(
                (np.round(255 * full.sigmoid().numpy()).astype(np.uint8), mask > (128 if mask.max() > 1 else 0))
            )
    expected = by_py_sod_metrics(made, task, protocol)
    results = evaluate.evaluate(model, mixed_pairs, task, protocol, 2, 0).results()
    assert results == pytest.approx(expected, abs=1e-4)
    map_file = tmp_path / "map.png"
    if protocol == "original":  # the same from saved maps
        for (prediction, mask), (_, mask_file) in zip(made, mixed_pairs, strict=True):
            Image.fromarray(prediction).save(map_file)
            alone = evaluate.Scores(task, protocol)
            alone.add(evaluate.finish_map(map_file, mask_file, task))
            assert alone.results() == pytest.approx(by_py_sod_metrics([(prediction, mask)], task, protocol))
    # The same to the last bit, however many workers and whatever the batches; in another order up to rounding.
    for batch_size, workers in ((1, 0), (7, 0), (3, 1), (2, 2)):
        assert evaluate.evaluate(model, mixed_pairs, task, protocol, batch_size, workers).results() == results
    (tmp_path / "maps").mkdir()  # nor does saving change it
    assert evaluate.evaluate(model, mixed_pairs, task, protocol, 2, 0, tmp_path / "maps").results() == results
    turned = evaluate.evaluate(model, mixed_pairs[::-1], task, protocol, 3, 2)
    assert turned.results() == pytest.approx(results, rel=1e-13)
    assert turned.s[::-1] == evaluate.evaluate(model, mixed_pairs, task, protocol, 2, 0).s


def test_scoring_is_done_by_workers(mixed_pairs, monkeypatch):
    used, in_order = [], evaluate.in_order
    monkeypatch.setattr(evaluate, "in_order", lambda *a: used.append(a[2]) or in_order(*a))
    shown = []
    monkeypatch.setattr(evaluate, "progress", lambda n, what: Bar(n, shown))
    evaluate.evaluate(Brightness(32), mixed_pairs, "sod", "paper", 2, 2)
    assert used == [2] and shown == [7, *range(1, 8)]


class Bar:
    """Stands in for a progress bar: writes down its total and where it comes to."""

    def __init__(self, total: int, shown: list) -> None:
        self.n, self.shown = 0, shown
        shown.append(total)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, n: int = 1) -> None:
        self.n += n
        self.shown.append(self.n)


def test_broken_weights_are_no_numbers(mixed_pairs):
    model = Brightness(32)
    model.weight.data.fill_(math.nan)
    for protocol in ("paper", "original"):
        with pytest.raises(InputError, match="0.jpg: the model's output is not finite; its weights are broken"):
            evaluate.evaluate(model, mixed_pairs, "sod", protocol, 2, 0)


def test_masks_that_the_original_protocol_does_not_see(tmp_path, model_file, monkeypatch, capsys):
    build_layout(tmp_path, "Imgs + GT", ("a", "b"))
    Image.open(tmp_path / "GT/b.png").point(lambda grey: 100 if grey else 0).save(tmp_path / "GT/b.png")
    for protocol, warnings in (("paper", 0), ("original", 1)):
        arguments = ("--ckpt", "model.pt", "--data", tmp_path, "--device", "cpu", "--protocol", protocol)
        code, out, err = script(monkeypatch, capsys, evaluate, *arguments)
        assert (
            code == 0 and err.count("1 masks are nowhere above 128 and count as empty") == err.count("\n") == warnings
        )


def square_slowly(value: int) -> int:
    time.sleep(0.1 if value % 3 == 0 else 0)
    return value * value


@pytest.mark.parametrize("workers", [0, 2])
def test_work_in_order_and_never_far_ahead(workers):
    drawn = []
    jobs = ((drawn.append(i) or i,) for i in range(20))
    for i, result in enumerate(evaluate.in_order(square_slowly, jobs, workers)):
        assert result == i * i
        assert len(drawn) - i <= max(1, 2 * workers)
    assert len(drawn) == 20


def test_evaluate_scores_in_eval_mode_and_gives_the_mode_back(tmp_path):
    make_pairs(tmp_path / "Imgs", tmp_path / "GT")
    pairs, model = evaluate.find_sets([tmp_path], "test")[0].pairs, tiny(image_size=64)
    by_hand = evaluate.Scores("sod", "paper")
    with torch.no_grad():
        for image, mask in evaluate.Pairs(pairs, 64):
            prediction = model.eval()(image[None]).sigmoid()[0, 0].numpy()
            by_hand.add(evaluate.score(prediction, mask[0].numpy() > 0, "sod", "paper"))
    before = copy.deepcopy(model.state_dict())
    for training in (True, False):
        results = evaluate.evaluate(model.train(training), pairs, "sod", "paper", 2, 0).results()
        assert results == pytest.approx(by_hand.results(), rel=1e-4)
        assert model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_maps_are_bilinear_logits_in_8_bits():
    logit = torch.full((1, 16, 16), -20.0)
    logit[:, :, 8:] = 20.0
    grey = evaluate.to_map(logit, (40, 48))
    assert grey.shape == (40, 48) and grey.dtype == np.uint8
    assert (grey[:, :22] == 0).all() and (grey[:, 26:] == 255).all()
    assert evaluate.to_map(torch.full((1, 4, 4), 0.01), (5, 5)).tolist() == [[128] * 5] * 5  # rounded: 127.5 + 0.6


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


def script(monkeypatch, capsys, module, *arguments: object) -> tuple[int, str, str]:
    """Run train.py or evaluate.py in this process; (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    code = 0
    try:
        evaluate.run(module.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def in_table(name: str, count: int, metrics: dict[str, float]) -> str:
    """A row of evaluate.py's table."""
    return f"{name:<17}  {count:>6}" + "".join(f"  {v:>6.{2 if 'BER' in k else 4}f}" for k, v in metrics.items())


def lines_of_epochs(out: str) -> list[dict[str, float]]:
    """The numbers of every `epoch` line by name."""
    pattern = r"(loss|lr|S|E|wF|MAE|BER) ([\d.e+-]+)"
    return [{k: float(v) for k, v in re.findall(pattern, x)} for x in out.splitlines() if x.startswith("epoch")]


@pytest.fixture
def pairs_folder(tmp_path, monkeypatch) -> Path:
    """A data set of train and test pairs; the test runs in an empty folder beside it."""
    make_pairs(tmp_path / "data/train/Imgs", tmp_path / "data/train/GT", tuple("abcd"))
    make_pairs(tmp_path / "data/test/Imgs", tmp_path / "data/test/GT", tuple("xyz"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "data"


SMALL = ("--sam", "tiny", "--sam-checkpoint", "random", "--size", 64, "--batch-size", 2, "--device", "cpu")


def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = script(monkeypatch, capsys, train, "--demo", "--epochs", 3, "--size", 128, "--device", "cpu")
    assert code == 0 and "warning: the encoder is random" in err
    epochs, demo = lines_of_epochs(out), Path("runs/demo")
    assert len(epochs) == 3
    assert epochs[-1]["loss"] < 0.9 * epochs[0]["loss"]
    assert epochs[-1]["S"] > epochs[0]["S"] + 0.1
    for split, count in (("TR", 96), ("TE", 24)):
        assert len(list((demo / f"DUTS/DUTS-{split}/DUTS-{split}-Image").glob("*.jpg"))) == count
        assert len(list((demo / f"DUTS/DUTS-{split}/DUTS-{split}-Mask").glob("*.png"))) == count
    for image in (demo / "DUTS/DUTS-TE/DUTS-TE-Image").iterdir():
        with Image.open(image) as a, Image.open(demo / "masks" / f"{image.stem}.png") as b:
            assert a.size == b.size and b.mode == "L"
    with Image.open(demo / "demo.png") as picture:
        assert picture.height > 6 * 160
    # best.pt, evaluated by itself on the remembered data, gives the line of the best epoch, and saves masks.
    best = max(epochs, key=lambda epoch: epoch["S"])
    stored = torch.load(demo / "best.pt", weights_only=True)
    assert stored["metrics"]["S"] == pytest.approx(best["S"], abs=1e-4)
    code, out, err = script(monkeypatch, capsys, evaluate, "--ckpt", demo / "best.pt", "--save", "m", "--device", "cpu")
    assert code == 0 and in_table("DUTS-TE", 24, stored["metrics"]) in out
    assert len(list(Path("m/DUTS-TE").glob("demo_*.png"))) == 24


def test_a_run_takes_a_free_folder(tmp_path):
    path = tmp_path / "demo"
    for name in ("demo", "demo-2", "demo-3"):
        assert train.free_folder(path) == tmp_path / name
        (tmp_path / name).mkdir()


def test_shadow_end_to_end(pairs_folder, monkeypatch, capsys):
    arguments = ("--task", "shadow", "--data", pairs_folder, *SMALL, "--epochs", 2, "--lr", "1e-3")
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 0
    stored = torch.load("runs/shadow-tiny/best.pt", weights_only=True)
    assert stored["config"]["high_freq"] and stored["task"] == "shadow" and stored["metrics"].keys() == {"BER"}
    epochs = lines_of_epochs(out)
    assert stored["metrics"]["BER"] == pytest.approx(min(epoch["BER"] for epoch in epochs), abs=0.01)  # lower is better
    assert epochs[0]["lr"] == 1e-3 and epochs[1]["lr"] == pytest.approx((1e-3 + 1e-7) / 2, rel=0.01)  # cosine
    code, out, err = script(monkeypatch, capsys, evaluate, "--ckpt", "runs/shadow-tiny/best.pt", "--device", "cpu")
    assert code == 0 and in_table("data", 3, stored["metrics"]) in out


def test_defaults_are_the_papers(monkeypatch):
    for task, epochs in (("sod", 80), ("cod", 80), ("shadow", 100)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "DUTS", "--task", task])
        args, _ = train.parse_arguments()
        assert (args.sam, args.size, args.epochs, args.batch_size, args.lr) == ("vit_h", 1024, epochs, 8, 8e-4)
        assert args.sam_checkpoint is args.csa_blocks is args.mrm_blocks is None
        assert (args.recipe, args.accumulate, args.grad_checkpoint, args.sync_bn) == ("paper", 1, False, False)


LOSSES = [("sod", train.bce_iou), ("cod", train.bce_iou), ("shadow", train.balanced_bce)]


@pytest.mark.parametrize("task, loss_of", LOSSES)
def test_training_by_hand(pairs_folder, monkeypatch, capsys, task, loss_of):
    """Three epochs of one batch: Adam with the task's loss and a cosine, and nothing else."""
    arguments = ("--data", pairs_folder, *SMALL, "--batch-size", 4, "--epochs", 3, "--lr", "1e-2", "--workers", 0)
    order, item = [], evaluate.Pairs.__getitem__
    monkeypatch.setattr(evaluate.Pairs, "__getitem__", lambda data, k: order.append((len(data), k)) or item(data, k))
    assert script(monkeypatch, capsys, train, "--task", task, *arguments, "--out", "run")[0] == 0
    epochs = np.array([key[0] for length, key in order if length == 4 and isinstance(key, tuple)]).reshape(3, 4)
    assert (np.sort(epochs) == range(4)).all() and len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew

    torch.manual_seed(0)
    model = build_tssam("tiny", 64, high_freq=task == "shadow").train()
    data = evaluate.Pairs(evaluate.find_sets([pairs_folder], "train")[0].pairs, 64)
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in trained]
    for step, epoch in enumerate(epochs):
        batch = [data[i] for i in epoch]
        loss = loss_of(model(torch.stack([b[0] for b in batch])), torch.stack([b[1] for b in batch]))
        lr = 1e-7 + (1e-2 - 1e-7) * (1 + math.cos(math.pi * step / 3)) / 2
        for p, g, (m, v) in zip(trained, torch.autograd.grad(loss, trained), moments, strict=True):
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.001)
            t = step + 1
            p.data -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    stored = torch.load("run/last.pt", weights_only=True)["trained"]
    for name in ("ffd.head.weight", "ffd.stage2.1.1.weight", "ffd.stage2.1.1.bias", "ffd.conv_csa.1.weight"):
        assert torch.allclose(stored[name], model.state_dict()[name], atol=2e-5), name


@pytest.mark.parametrize("task, name, scores", [("sod", "S", (0.5, 0.7, 0.6)), ("shadow", "BER", (30.0, 20.0, 25.0))])
def test_best_is_the_best_epoch(pairs_folder, monkeypatch, capsys, task, name, scores):
    results = iter(scores)
    monkeypatch.setattr(train, "validate", lambda *args: {name: next(results)})
    arguments = ("--task", task, "--data", pairs_folder, *SMALL, "--epochs", 3, "--out", "run")
    assert script(monkeypatch, capsys, train, *arguments)[0] == 0
    best, last = (torch.load(f"run/{file}.pt", weights_only=True) for file in ("best", "last"))
    assert (best["epoch"], best["metrics"], last["epoch"]) == (2, {name: scores[1]}, 3)


def test_same_seed_same_run(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 1)
    first = script(monkeypatch, capsys, train, *arguments, "--workers", 0)[1]
    again = script(monkeypatch, capsys, train, *arguments, "--workers", 2)[1]
    other = script(monkeypatch, capsys, train, *arguments, "--workers", 0, "--seed", 1)[1]
    assert lines_of_epochs(first) == lines_of_epochs(again) != lines_of_epochs(other)


def test_training_without_validation(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder / "train", *SMALL, "--epochs", 1, "--out", "run")
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 0 and "no best.pt" in out
    assert sorted(p.name for p in Path("run").iterdir()) == [".lock", "args.json", "last.pt", "log.csv"]
    code, out, err = script(monkeypatch, capsys, evaluate, "--ckpt", "run/last.pt")
    assert code == 2 and "trained without a validation set; name the data: --data" in err
    code, out, err = script(
        monkeypatch, capsys, evaluate, "--ckpt", "run/last.pt", "--data", pairs_folder, "--device", "cpu"
    )
    assert code == 0 and "3 pairs" in out
    # --val is used when it is given, even if it is of no use
    code, out, err = script(monkeypatch, capsys, train, *arguments, "--out", "run2", "--val", pairs_folder / "train")
    assert code == 0 and "warning: validation is on images of the training set" in err
    assert Path("run2/best.pt").exists() and f"val:   data: {pairs_folder / 'train/Imgs'} and GT" in out


def test_checkpoints_are_not_overwritten(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder, *SMALL, "--out", "run")
    assert script(monkeypatch, capsys, train, *arguments, "--epochs", 1)[0] == 0
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    code, out, err = script(monkeypatch, capsys, train, *arguments, "--epochs", 1)
    assert code == 2 and err.count("\n") == 1 and "--out: run holds a run" in err
    # A run that blows up keeps what its earlier epochs saved, and says so in one line.
    code, out, err = script(monkeypatch, capsys, train, *arguments[:-1], "run2", "--epochs", 2, "--lr", "1e30")
    assert (
        code == 2
        and re.search("no longer finite in epoch|the loss is (nan|inf) for", err)
        and "try a lower --lr" in err
    )
    for file in Path("run2").glob("*.pt"):
        assert all(t.isfinite().all() for t in torch.load(file, weights_only=True)["trained"].values())
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == before


def test_each_error_is_one_line_and_exit_code_2(pairs_folder, monkeypatch, capsys):
    file = pairs_folder / "file"
    file.touch()
    for module, arguments, message in (
        (train, [], "--data: name the data set"),
        (train, ["--demo", "--data", pairs_folder], "--demo draws its own data set"),
        (train, ["--data", "nowhere"], "nowhere: no such folder"),
        (train, ["--data", pairs_folder, "--task", "cars"], "invalid choice: 'cars'"),
        (
            train,
            ["--data", pairs_folder, *SMALL, "--size", 100],
            "'100' is not a whole number of at least 32, and a multiple of 16",
        ),
        (train, ["--data", pairs_folder, *SMALL, "--epochs", 0], "'0' is not a whole number of at least 1"),
        (train, ["--data", pairs_folder, *SMALL, "--seed", 10**20], "is not a whole number of at least 0"),
        (train, ["--data", pairs_folder, *SMALL, "--lr", 0], "'0' is not a number above zero"),
        (train, ["--data", pairs_folder, *SMALL, "--lr", "nan"], "'nan' is not a number above zero"),
        (train, ["--data", pairs_folder, *SMALL, "--device", "cuda:77"], "'cuda:77' cannot be used here"),
        (train, ["--data", pairs_folder, *SMALL, "--device", "meta"], "'meta' cannot be used here"),
        (train, ["--data", pairs_folder, *SMALL, "--out", file], f"--out: {file} is a file; name a folder"),
        (train, ["--data", pairs_folder, "--sam", "tiny"], "tiny: no weights are published"),
        (train, ["--data", pairs_folder, "--sam", "vit_b", "--sam-checkpoint", "no.pth"], "no.pth: no such file"),
        (evaluate, ["--ckpt", "no.pt"], "no.pt: no such file"),
    ):
        code, out, err = script(monkeypatch, capsys, module, *arguments)
        last = err.splitlines()[-1]
        assert code == 2 and message in last and last.startswith(f"{module.__name__}.py: error: "), err
        assert len([line for line in err.splitlines() if not line.startswith("warning: the encoder is random")]) == 1
    assert list(Path().iterdir()) == []  # and nothing is left behind


def test_training_sets_are_joined(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_pairs(tmp_path / "CAMO/Imgs", tmp_path / "CAMO/GT", tuple("ab"))
    build_data_set(tmp_path / "COD")
    (tmp_path / "COD/TestDataset/CAMO/GT/b.png").unlink()
    Image.new("L", (5, 5)).save(tmp_path / "COD/TestDataset/CAMO/GT/b.png")
    seen, item = [], evaluate.Pairs.__getitem__
    monkeypatch.setattr(
        evaluate.Pairs, "__getitem__", lambda data, k: seen.append(data.pairs[k[0]][0]) or item(data, k)
    )
    arguments = ("--data", "CAMO", "COD", *SMALL, "--epochs", 1, "--workers", 0, "--out", "run")
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 0
    assert sorted(map(str, seen)) == [
        *("CAMO/Imgs/a.jpg", "CAMO/Imgs/b.jpg", "COD/TrainDataset/Imgs/t1.jpg", "COD/TrainDataset/Imgs/t2.jpg")
    ]
    lines = [line for line in out.splitlines() if line.startswith(("train:", "val:"))]
    assert lines[0] == "train: CAMO: CAMO/Imgs and GT, no splits, 2 pairs"
    assert lines[1] == "train: COD: COD/TrainDataset/Imgs and GT, train split, 2 pairs"
    assert [line.split(":")[1].strip() for line in lines[2:]] == [*COD_SETS]  # all of the root's test sets
    assert err.count("warning: 1 of 12 images are not of their mask's size, such as b (48 x 40, mask 5 x 5)") == 1
    stored = torch.load("run/best.pt", weights_only=True)
    assert stored["val"] == [str(tmp_path / "COD/TestDataset" / name) for name in COD_SETS]
    # evaluate.py makes a row of each. Of equal sizes, their mean is the number of training.
    code, out, err = script(monkeypatch, capsys, evaluate, "--ckpt", "run/best.pt", "--device", "cpu", "--csv", "t.csv")
    assert code == 0
    rows = [*csv.DictReader(Path("t.csv").read_text().splitlines())]
    assert np.mean([float(row["S"]) for row in rows]) == pytest.approx(stored["metrics"]["S"], rel=1e-5)
    # Nor is what is no test split, such as another set beside the train split.
    build_data_set(tmp_path / "D/HKU-IS")
    build_layout(tmp_path, "D/D-TR/Imgs + D/D-TR/GT", ("a", "b"))
    build_layout(tmp_path, "E-TE/Imgs + E-TE/GT", ("a", "b"))
    code, out, err = script(monkeypatch, capsys, train, "--data", "D", *arguments[3:-1], "run4")
    assert code == 0 and "train: D-TR: " in out and "val:   none" in out
    # The test split is not validated on when it is what was trained on; images alone are no validation set.
    code, out, err = script(monkeypatch, capsys, train, "--data", "E-TE", *arguments[3:-1], "run2")
    assert code == 0 and "val:   none" in out
    (tmp_path / "new/Imgs").mkdir(parents=True)
    Image.new("RGB", (5, 5)).save("new/Imgs/a.png")
    code, out, err = script(monkeypatch, capsys, train, *arguments[:-1], "run3", "--val", "new")
    assert code == 2 and "new: no folder of masks, which validation needs" in err


@pytest.mark.parametrize(
    "kind, workers", [("Imgs/c.jpg", 0), ("Imgs/c.jpg", 2), ("GT/c.png", 2), ("Imgs/c.bmp", 0), ("Imgs/c.webp", 0)]
)
def test_a_truncated_file_is_named(pairs_folder, monkeypatch, capsys, kind, workers):
    torch.manual_seed(0)
    checkpoint(Path("model.pt"), build_tssam("tiny", 64), encoder_seed=0)
    broken = pairs_folder / "train" / kind
    if not broken.exists():
        (pairs_folder / "train/Imgs/c.jpg").unlink()
        Image.fromarray(PICTURE).save(broken)
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) * 2 // 3])
    arguments = ("--data", pairs_folder / "train", "--workers", workers, "--device", "cpu")
    for module, others in ((train, (*SMALL, "--epochs", 1)), (evaluate, ("--ckpt", "model.pt"))):
        code, out, err = script(monkeypatch, capsys, module, *arguments, *others)
        assert code == 2 and "Traceback" not in err
        assert err.splitlines()[-1].startswith(f"{module.__name__}.py: error: {broken}: cannot be read as an image (")
    # One without even a header is found before anything else.
    broken.write_bytes(b"")
    code, out, err = script(monkeypatch, capsys, train, *arguments, *SMALL, "--epochs", 1, "--out", "run")
    assert code == 2 and f"{broken}: cannot be read as an image" in err and not Path("run").exists()


def test_a_broken_validation_image_costs_no_epoch(pairs_folder, monkeypatch, capsys):
    broken = pairs_folder / "test/Imgs/y.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])
    code, out, err = script(monkeypatch, capsys, train, "--data", pairs_folder, *SMALL, "--epochs", 1, "--out", "run")
    assert code == 2 and "y.jpg: cannot be read as an image" in err and Path("run/last.pt").exists()


@pytest.fixture
def model_file(tmp_path, monkeypatch) -> Path:
    """A checkpoint of a model with structure in its maps; the test runs beside it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = build_tssam("tiny", 64)
    model.ffd.head.weight.data *= 600
    return checkpoint(tmp_path / "model.pt", model, encoder_seed=3, epoch=7)


def table(path: str) -> list[dict]:
    """The rows of a CSV file, whose header is checked."""
    header, *lines = Path(path).read_text().splitlines()
    assert header == "dataset,images,protocol,S,E,wF,MAE,maxF,adpF,BER,BER_pooled"
    return [*csv.DictReader([header, *lines])]


@pytest.mark.parametrize("protocol", ["paper", "original"])
def test_a_table_of_test_sets(tmp_path, model_file, monkeypatch, capsys, protocol):
    build_data_set(tmp_path / "COD")
    build_data_set(tmp_path / "HKU-IS")
    model, _ = load_checkpoint(model_file)
    arguments = ("--ckpt", "model.pt", "--data", "COD", "HKU-IS", "--device", "cpu", "--csv", "out/table.csv")
    if protocol == "original":
        arguments += ("--protocol", protocol)  # paper is the default
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments)
    assert code == 0 and err == ""
    start, *found, named = out.splitlines()[:7]
    assert start == "model.pt: sod, tiny, epoch 7"
    assert found[0] == "CAMO: COD/TestDataset/CAMO/Imgs and GT, test split, 2 pairs"
    assert found[4] == "HKU-IS: HKU-IS/imgs and gt, no splits, 2 pairs"
    assert named == f"protocol: {protocol} ({evaluate.PROTOCOLS[protocol]})"
    sets = evaluate.find_sets([tmp_path / "COD", tmp_path / "HKU-IS"], "test")
    results = {s.name: evaluate.evaluate(model, s.pairs, "sod", protocol, 2, 0).results() for s in sets}
    header, *rows = out.splitlines()[7:]
    names = ["S", "E", "wF", "MAE"] + (["maxF", "adpF"] if protocol == "original" else [])
    assert header.split() == ["data", "set", "images", *names]
    empty = " " * 16 if protocol == "original" else ""
    assert rows[:3] == [
        in_table("CAMO", 2, results["CAMO"]),
        f"  TS-SAM_B, paper           0.826   0.862   0.753   0.073{empty}",
        f"  TS-SAM_H, paper           0.887   0.925   0.830   0.047{empty}",
    ]
    assert [row.split()[0] for row in rows[::3]] == [*COD_SETS, "HKU-IS"] and len(rows) == 13
    assert len({len(row) for row in [header, *rows]}) == 1
    written = table("out/table.csv")
    assert [row["dataset"] for row in written] == [*COD_SETS, "HKU-IS"]
    for row in written:
        assert (row["images"], row["protocol"], row["BER"], row["BER_pooled"]) == ("2", protocol, "", "")
        assert {name: float(row[name]) for name in names} == results[row["dataset"]]  # to the last digit
        assert all((row[name] == "") == (protocol == "paper") for name in ("maxF", "adpF"))


def test_a_table_of_shadows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build_data_set(tmp_path / "ISTD")
    torch.manual_seed(3)
    checkpoint(Path("model.pt"), build_tssam("tiny", 64, high_freq=True), encoder_seed=3, task="shadow")
    arguments = ("--ckpt", "model.pt", "--data", "ISTD", "--device", "cpu", "--csv", "t.csv", "--save", "m")
    for protocol in ("paper", "original"):
        code, out, err = script(monkeypatch, capsys, evaluate, *arguments, "--protocol", protocol)
        (row,) = table("t.csv")
        assert code == 0 and row["dataset"] == "ISTD" and row["S"] == "" and float(row["BER"]) > 0
        assert (row["BER_pooled"] == "") == (protocol == "paper")
        empty = " " * 12 if protocol == "original" else ""  # under BER_pooled
        for line in (f"  TS-SAM_B, paper            1.11{empty}", f"  TS-SAM_H, paper            1.04{empty}"):
            assert line in out.splitlines()
    by_model = row
    code, out, err = script(
        monkeypatch, capsys, evaluate, "--maps", "m", "--data", "ISTD", "--task", "shadow", "--csv", "t.csv"
    )
    assert code == 0 and table("t.csv") == [by_model]


def test_the_papers_rows():
    """Tables I and II, typed from the paper again."""
    assert evaluate.PUBLISHED["CAMO"] == ((0.826, 0.862, 0.753, 0.073), (0.887, 0.925, 0.830, 0.047))
    assert evaluate.PUBLISHED["COD10K"] == ((0.863, 0.909, 0.771, 0.029), (0.914, 0.950, 0.856, 0.017))
    assert evaluate.PUBLISHED["CHAMELEON"] == ((0.912, 0.947, 0.849, 0.023), (0.942, 0.966, 0.900, 0.017))
    assert evaluate.PUBLISHED["NC4K"] == ((0.866, 0.900, 0.799, 0.045), (0.905, 0.933, 0.860, 0.032))
    assert evaluate.PUBLISHED["ISTD"] == ((1.11,), (1.04,)) and len(evaluate.PUBLISHED) == 5
    metrics = {"S": 0.5, "E": 0.5, "wF": 0.5, "MAE": 0.5}
    for name in ("camo-Test", "CAMO_TE", "COD10K-v3", "NC4K_Dataset"):
        assert len(evaluate.published_rows(name, metrics, 20)) == 2
    assert evaluate.published_rows("ISTD", metrics, 20) == evaluate.published_rows("DUTS-TE", metrics, 20) == []
    assert evaluate.published_rows("CAMO", {"BER": 1.0}, 20) == []


def test_saved_maps_give_the_same_numbers(tmp_path, mixed_pairs, model_file, monkeypatch, capsys):
    """--save, then --maps; in the set of several sizes but for the one mask that is not of its image's size."""
    (tmp_path / "mixed/GT/2.png").unlink()
    (tmp_path / "mixed/Imgs/2.jpg").unlink()
    save_turned(tmp_path / "mixed/Imgs/8.jpg", 6)
    Image.new("L", (20, 30), 255).save(tmp_path / "mixed/GT/8.png")
    arguments = ("--ckpt", "model.pt", "--data", "mixed", "--device", "cpu", "--save", "maps", "--csv", "model.csv")
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments, "--protocol", "original")
    assert code == 0 and out.splitlines()[-1] == "masks: maps/mixed"
    for image, mask in evaluate.find_sets([Path("mixed")], "test")[0].pairs:
        with Image.open(mask) as m, Image.open(f"maps/mixed/{image.stem}.png") as saved:
            assert saved.size == m.size and saved.mode == "L" and len(set(saved.tobytes())) > 20
    Path("other").mkdir()
    Path("maps/mixed").rename("other/Mixed-Test")  # as others name it
    code, again, err = script(monkeypatch, capsys, evaluate, "--maps", "other", "--data", "mixed", "--csv", "maps.csv")
    assert code == 0 and Path("maps.csv").read_bytes() == Path("model.csv").read_bytes()
    Path("other/Mixed-Test").rename("maps/mixed")
    for maps in ("maps", "maps/mixed"):
        code, again, err = script(monkeypatch, capsys, evaluate, "--maps", maps, "--data", "mixed", "--csv", "maps.csv")
        assert code == 0 and again.splitlines()[-1] == out.splitlines()[-2]
        assert again.startswith("mixed: mixed/Imgs and GT, no splits, 7 pairs; maps: maps/mixed\nprotocol: original (")
        assert Path("maps.csv").read_bytes() == Path("model.csv").read_bytes()
    # Under the paper's protocol the same maps are saved.
    before = Path("maps/mixed/8.png").read_bytes()
    Path("maps/mixed/8.png").unlink()
    assert script(monkeypatch, capsys, evaluate, *arguments)[0] == 0
    assert Path("maps/mixed/8.png").read_bytes() == before
    # A map of another size is resized to the mask, and that is said.
    Image.open("maps/mixed/8.png").resize((40, 60), Image.Resampling.NEAREST).save("maps/mixed/8.png")
    code, out, err = script(monkeypatch, capsys, evaluate, "--maps", "maps", "--data", "mixed", "--csv", "maps.csv")
    assert code == 0 and "warning: 1 of 7 maps are not of their mask's size, such as 8 (40 x 60, mask 20 x 30)" in err
    grey = Image.open("maps/mixed/8.png").resize((20, 30), Image.Resampling.BILINEAR)
    by_hand = by_py_sod_metrics([(np.asarray(grey), np.ones((30, 20), bool))], "sod", "original")
    alone = evaluate.Scores("sod", "original")
    alone.add(evaluate.finish_map(Path("maps/mixed/8.png"), Path("mixed/GT/8.png"), "sod"))
    assert alone.results() == by_hand


def test_overview(tmp_path, model_file, monkeypatch, capsys):
    build_layout(tmp_path, "Imgs + GT", tuple("abcde"))
    maps = {"a": 0.2, "b": 0.9, "c": 0.1, "d": 0.5, "e": 0.7}  # how much of the mask is found
    drawn = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, xy, line, **k: drawn.append(line) or text(self, xy, line, **k)
    )

    def predict(model, pairs, protocol, batch_size, workers, save):
        for image, mask in pairs:
            grey = (np.asarray(Image.open(mask)) * maps[image.stem]).astype(np.uint8)
            grey[0, 0] = 255
            yield grey, mask, (grey, save / f"{image.stem}.png")

    monkeypatch.setattr(evaluate, "predict", predict)
    arguments = ("--ckpt", "model.pt", "--data", tmp_path, "--device", "cpu", "--save", "out", "--protocol", "original")
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments, "--workers", 0)
    assert code == 0
    assert drawn[:3] == ["image", "ground truth", "prediction"]
    assert [line.split(",")[0] for line in drawn[3:]] == ["worst: c", "median: d", "best: b"]
    assert all(re.fullmatch(r"\w+: \w, S 0\.\d{4}", line) for line in drawn[3:])
    with Image.open(Path("out") / tmp_path.name / "overview.png") as overview:
        pixels = np.asarray(overview.convert("L")).astype(float)
    # Three columns of 160 x 192 panels, three rows; in the third column ever more of the second one's white shows.
    panels = [[pixels[32 + y * 182 :][:160, 6 + x * 198 :][:, :192] for x in range(3)] for y in range(3)]
    truth = np.asarray(Image.open(tmp_path / "GT/a.png").resize((192, 160)))
    for row, found in zip(panels, (0.1, 0.5, 0.9), strict=True):
        assert np.abs(row[1] - truth).mean() < 1 and np.abs(row[2] - truth * found).mean() < 2
        assert row[0].std() > 30


def test_images_alone_are_predicted(tmp_path, model_file, monkeypatch, capsys):
    make_pairs(tmp_path / "new/Imgs", tmp_path / "elsewhere")
    save_turned(tmp_path / "new/Imgs/c.jpg", 6)  # a phone's photograph
    build_data_set(tmp_path / "HKU-IS")
    arguments = ("--ckpt", "model.pt", "--device", "cpu", "--save", "out", "--csv", "t.csv", "--data", "new")
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments, "HKU-IS")
    assert code == 0 and "new: no masks, metrics skipped; 3 predictions are in out/new" in out
    assert [row["dataset"] for row in table("t.csv")] == ["HKU-IS"]
    assert sorted(p.name for p in Path("out/new").iterdir()) == ["a.png", "b.png", "c.png"]
    assert Image.open("out/new/a.png").size == (48, 40) and Image.open("out/new/c.png").size == (20, 30)
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments[:-1], "new/Imgs/b.jpg", "new/Imgs/a.jpg")
    assert code == 0 and "a: no masks, metrics skipped" in out
    for stem in "ab":
        assert Path(f"out/{stem}.png").read_bytes() == Path(f"out/new/{stem}.png").read_bytes()
    arguments = ("--ckpt", "model.pt", "--device", "cpu")
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments, "--data", "HKU-IS", "--data", "new")
    assert code == 0 and "new: no masks in new, metrics skipped" in out and "HKU-IS  " in out
    assert out.count("metrics skipped") == 1  # and nothing predicted for nobody
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments, "--data", "new")
    assert code == 2 and "new: no masks to score by (looked for gt, " in err and "--save DIR writes predictions" in err


def test_the_authors_checkpoints_are_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build_data_set(tmp_path / "HKU-IS")
    (s,) = evaluate.find_sets([tmp_path / "HKU-IS"], "test")
    for high_freq, task in ((False, "sod"), (True, "shadow")):
        model = tiny(image_size=64, high_freq=high_freq).eval()
        released = {tssam.released_name(name): tensor for name, tensor in model.state_dict().items()}
        torch.save(released, "theirs.pth")
        rebuilt, info = load_checkpoint("theirs.pth")
        assert info["task"] == task and rebuilt.config == model.config
        with torch.no_grad():
            assert torch.equal(rebuilt.eval()(images(2, 64)), model(images(2, 64)))
        arguments = ("--ckpt", "theirs.pth", "--device", "cpu")
        code, out, err = script(monkeypatch, capsys, evaluate, *arguments, "--data", "HKU-IS")
        assert code == 0 and f"theirs.pth: {task}, tiny, epoch unknown" in out
        assert in_table("HKU-IS", 2, evaluate.evaluate(model, s.pairs, task, "paper", 2, 0).results()) in out
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments)
    assert code == 2 and "theirs.pth: trained without a validation set; name the data: --data" in err
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments, "--data", "HKU-IS", "--sam-checkpoint", "x.pth")
    assert code == 2 and "theirs.pth: a checkpoint of the authors' code, with SAM's weights inside; leave out" in err
    gate = "image_encoder.mrm_blocks.0.fpn1.6.res_gate.0.weight"
    for broken, message in (
        ({k: v for k, v in released.items() if k != gate}, f"theirs.pth: {gate} is missing"),
        ({k: v for k, v in released.items() if "pos_embed" not in k}, "theirs.pth: image_encoder.pos_embed is missing"),
        (
            {k: v for k, v in released.items() if ".blocks.3." not in k},
            "no encoder of SAM is 64 wide and 3 blocks deep",
        ),
    ):
        torch.save(broken, "theirs.pth")
        with pytest.raises(InputError, match=re.escape(message)):
            load_checkpoint("theirs.pth")


def test_each_error_of_evaluate_is_one_line_and_exit_code_2(tmp_path, model_file, monkeypatch, capsys):
    build_data_set(tmp_path / "HKU-IS")
    build_data_set(tmp_path / "ECSSD")
    build_data_set(tmp_path / "other/ECSSD")
    make_pairs(tmp_path / "named/Imgs", tmp_path / "named/GT", ("overview",))
    make_pairs(tmp_path / "new/Imgs", tmp_path / "elsewhere")
    Path("maps/HKU-IS").mkdir(parents=True)
    Path("old.csv").write_text("my,notes\n")
    Path("file").touch()
    Path("to").mkdir()
    Path("to/ECSSD").symlink_to(tmp_path / "ECSSD/ground_truth_mask")
    stored = torch.load("model.pt", weights_only=True)
    torch.save({**stored, "val": ["/gone/DUTS-TE"]}, "gone.pt")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    model, maps = ("--ckpt", "model.pt", "--device", "cpu"), ("--maps", "maps")
    for arguments, message in (
        ((), "one of the arguments --ckpt --maps is required"),
        ((*model, *maps), "argument --maps: not allowed with argument --ckpt"),
        ((*model, "--data", "nowhere"), "nowhere: no such folder"),
        ((*model, "--data"), "argument --data: expected at least one argument"),
        ((*model, "--data", "ECSSD", "other"), "another data set is called ECSSD too; evaluate them one by one"),
        ((*model, "--data", "ECSSD", "./ECSSD"), "ECSSD: named twice; once is enough"),
        ((*model, "--data", "ECSSD", "--protocol", "both"), "invalid choice: 'both'"),
        ((*model, "--data", "ECSSD", "--task", "sod"), "--task: goes with --maps; a checkpoint knows its own"),
        ((*model, "--data", "ECSSD", "--save", "."), "--save: ECSSD holds the data itself; name another folder"),
        ((*model, "--data", "ECSSD", "--save", "to"), "--save: to/ECSSD holds the data itself"),
        ((*model, "--data", "new/Imgs", "--save", "new"), "--save: new/Imgs holds the data itself"),
        ((*model, "--data", "new/Imgs/a.jpg", "--save", "new/Imgs"), "--save: new/Imgs holds the data itself"),
        ((*model, "--data", "ECSSD", "--save", "file"), "--save: file/ECSSD: no folder to write to"),
        ((*model, "--data", "named", "--save", "out"), "overview.png is written there too; rename the image overview"),
        ((*model, "--data", "ECSSD", "--csv", "file/t.csv"), "--csv: file: no folder to write to"),
        (
            (*model, "--data", "ECSSD", "--csv", "maps"),
            "--csv: maps exists and is no table of evaluate.py; name another",
        ),
        ((*model, "--data", "ECSSD", "--csv", "model.pt"), "--csv: model.pt exists and is no table of evaluate.py"),
        ((*model, "--data", "ECSSD", "--csv", "old.csv"), "--csv: old.csv exists and is no table of evaluate.py"),
        ((*model, "--dat", "ECSSD"), "unrecognized arguments: --dat ECSSD"),
        (("--ckpt", "maps"), "maps: a folder; name a file"),
        (
            ("--ckpt", "gone.pt", "--device", "cpu"),
            "gone.pt: validated on /gone/DUTS-TE, which has gone; name the data: --da",
        ),
        (maps, "--data: name the data sets the maps belong to"),
        ((*maps, "--data", "HKU-IS"), "maps/HKU-IS: 2 of 2 maps are missing, such as a.png, b.png (or .jpg,"),
        (
            (*maps, "--data", "ECSSD", "HKU-IS"),
            "--maps: maps has no folder ECSSD, only HKU-IS; maps are looked for as ECSSD/<image>.png",
        ),
        (("--maps", "nowhere", "--data", "HKU-IS"), "--maps: nowhere: no such folder"),
        ((*maps, "--data", "new"), "new: no masks to score by (looked for gt,"),
        ((*maps, "--data", "HKU-IS", "--save", "out"), "--maps: nothing is predicted; leave out --save"),
        ((*maps, "--data", "HKU-IS", "--protocol", "paper"), "under the original protocol only"),
    ):
        code, out, err = script(monkeypatch, capsys, evaluate, *arguments)
        assert code == 2 and message in err and err.startswith("evaluate.py: error: ") and err.count("\n") == 1, err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Attention without the N x N matrix


def attentions(width: int, heads: int, sides: tuple[int, int]) -> tuple[Attention, FusedAttention]:
    """SAM's own and ours with the same weights, relative positions and all, none of them zero."""
    torch.manual_seed(0)
    sam = Attention(width, heads, use_rel_pos=True, input_size=sides)
    for parameter in sam.parameters():
        nn.init.normal_(parameter, std=0.2)
    sam.requires_grad_(False)
    fused = copy.deepcopy(sam)
    fused.__class__ = FusedAttention
    return sam, fused


def output_and_gradient(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = attention(x)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return output.detach(), x.grad


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize(
    "width, heads, sides, shape",
    [
        (64, 4, (7, 7), (4, 7, 7)),  # tiny's windows
        (768, 12, (14, 14), (3, 14, 14)),  # ViT-B's windows, d = 64
        (1280, 16, (14, 14), (2, 14, 14)),  # ViT-H's, d = 80
        (768, 12, (16, 16), (2, 16, 16)),  # global at 256 x 256
        (1280, 16, (12, 20), (1, 12, 20)),  # not square
        (64, 4, (8, 8), (2, 13, 9)),  # maps for which SAM resamples the relative positions
    ],
)
def test_both_attentions_agree(width, heads, sides, shape, windowed):
    sam, fused = attentions(width, heads, sides)
    fused.windowed = windowed
    x = 0.3 * torch.randn(*shape, width)
    for ours, theirs in zip(output_and_gradient(fused, x), output_and_gradient(sam, x), strict=True):
        assert (ours - theirs).abs().max() <= 5e-6 * theirs.abs().max()
    kept = fused.one_hot
    fused(x)
    assert fused.one_hot is kept  # built once, for maps of this size
    assert (fused(x.transpose(1, 2)) - sam(x.transpose(1, 2))).abs().max() <= 5e-6 * theirs.abs().max()


@pytest.mark.parametrize("arguments", [{}, {"image_size": 224, "high_freq": True}, {"csa_blocks": [1]}])
def test_models_with_either_attention_agree(arguments):
    fused = tiny(**arguments).train()
    sam = copy.deepcopy(fused)
    sam.use_attention("sam")
    assert not any(isinstance(block.attn, FusedAttention) for block in sam.image_encoder.blocks)
    assert all(isinstance(block.attn, FusedAttention) for block in fused.image_encoder.blocks)
    x, gradients = images(size=fused.config["image_size"]), []
    for model in (fused, sam):
        logits = model(x)
        logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.logits = logits
    assert same(fused.logits, sam.logits)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7
    with pytest.raises(InputError, match="attention: none is called 'flash'; there are fused, sam"):
        build_tssam("tiny", SIZE, attention="flash")


def test_the_scripts_take_either_attention(pairs_folder, monkeypatch, capsys):
    used, use_attention = [], TSSAM.use_attention

    def spy(self, attention):
        used.append(attention)
        use_attention(self, attention)

    monkeypatch.setattr(TSSAM, "use_attention", spy)
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 1)
    tables = []
    for attention in ("sam", "fused"):
        chosen = ("--attention", attention)
        assert script(monkeypatch, capsys, train, *arguments, "--out", attention, *chosen)[0] == 0
        assert used[-1] == attention and json.loads(Path(attention, "args.json").read_text())["attention"] == attention
        checkpoint = ("--ckpt", "sam/best.pt", "--csv", f"{attention}.csv", "--device", "cpu")
        assert script(monkeypatch, capsys, evaluate, *checkpoint, *chosen)[0] == 0
        assert used[-1] == attention
        tables.append([*csv.DictReader(Path(f"{attention}.csv").read_text().splitlines())][0])
    assert all(abs(float(tables[0][name]) - float(tables[1][name])) < 1e-4 for name in ("S", "E", "wF", "MAE"))


def test_tables_follow_the_weights():
    model = tiny().eval()
    with torch.inference_mode():
        before = model(images())  # tables made here are also good for training
    model.train()(images()).mean().backward()
    model.eval().load_state_dict(tiny(seed=1).state_dict())
    assert not same(model(images()), before, 1e-3) and same(model(images()), tiny(seed=1).eval()(images()))
    assert not any("table" in name or "one_hot" in name for name in model.state_dict())


class Allocations(TorchDispatchMode):
    """The largest number of elements a tensor had that an operation within returned."""

    largest = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if torch.is_tensor(t)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("windowed", [False, True])
def test_no_n_by_n_tensor_is_allocated(windowed):
    sam, fused = attentions(16, 2, (24, 24))  # N = 576
    fused.windowed = windowed
    x, largest = torch.randn(1, 24, 24, 16), []
    for attention in (fused, sam):
        with Allocations() as allocations:
            output_and_gradient(attention, x)
        largest.append(allocations.largest)
    assert largest[0] < 576 * 576 <= largest[1]


def test_the_encoder_in_bf16_is_what_autocast_makes_of_it():
    once, each_step = tiny(), tiny()
    once.store_encoder(torch.bfloat16)
    results = []
    for model in (once, each_step):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images())
        logits.float().square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    types = {type(m): m.weight.dtype for m in once.image_encoder.modules() if hasattr(m, "weight")}
    assert types[nn.Linear] == types[nn.Conv2d] == torch.bfloat16 and types[nn.LayerNorm] == torch.float32


def test_the_benchmark(capfd, monkeypatch):
    arguments = ["--sam", "tiny", "--size", "64", "--batch-size", "2", "--attention", "fused,sam"]
    monkeypatch.setattr(sys, "argv", ["tssam.py", *arguments])
    tssam.main()
    out = capfd.readouterr().out
    assert "  80,177 of 3" in out and re.search(r"  mrm +\d\d,\d{3}  trained  5 of them\n", out)
    fused, sam = ([cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("tiny |"))
    for row, attention in ((fused, "fused"), (sam, "sam")):
        assert row[:6] == ["tiny", "64", "2", "fp32", attention, "no"]
        forward, per_second, megabytes, step, step_per_second, step_megabytes = map(float, row[6:12])
        assert 0 < forward < step and 0 < step_per_second < per_second
        assert 100 < megabytes < 8000 and 100 < step_megabytes < 8000
    assert fused[12] == "49 x 32: flash, 16 x 24: flash" and sam[12] == "none"
    for arguments, message in ((["--sam", "vit_x"], "'vit_x' is none of"), (["--size", "a"], "'a' is no comma list")):
        monkeypatch.setattr(sys, "argv", ["tssam.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            tssam.main()
        assert message in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are stopped, shared and squeezed


def weights_of(path: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["trained"]


def same_weights(a: str | Path, b: str | Path) -> bool:
    one, two = weights_of(a), weights_of(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Runs train.py and kills it with SIGKILL: after so many seconds, or half-way through its n-th torch.save.
CRASH = """
import io, os, signal, sys, threading
import torch, evaluate, train
when, number = sys.argv[1].split("-")
if when == "after":
    threading.Timer(float(number), os.kill, (os.getpid(), signal.SIGKILL)).start()
else:
    save, left = torch.save, [int(number)]
    def crash(content, file):
        left[0] -= 1
        if left[0]:
            return save(content, file)
        buffer = io.BytesIO()
        save(content, buffer)
        open(file, "wb").write(buffer.getvalue()[: buffer.tell() // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = crash
sys.argv = ["train.py", *sys.argv[2:]]
evaluate.run(train.main)
"""


def in_a_process(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(tssam.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def test_a_killed_run_ends_as_if_it_had_not_been(pairs_folder, monkeypatch, capsys):
    torch.set_num_threads(1)  # as in the processes
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 6, "--lr", "1e-3", "--workers", 0)
    assert script(monkeypatch, capsys, train, *arguments, "--out", "whole")[0] == 0
    rng, resume = np.random.default_rng(), ()
    moments = ["write-2", "write-2", f"after-{rng.uniform(0.3, 2):.2f}", "write-3", f"after-{rng.uniform(0, 3):.2f}"]
    for moment in moments:
        ended = in_a_process(CRASH, moment, *arguments, "--out", "cut", *resume)
        assert ended.returncode in (-signal.SIGKILL, 0), ended.stderr
        if Path("cut/last.pt").exists():
            assert torch.load("cut/last.pt", weights_only=True)["epoch"] >= 1  # whole, whenever it was killed
            resume = ("--resume",)
    code, out, err = script(monkeypatch, capsys, train, "--resume", "--out", "cut", "--device", "cpu")
    assert code == 0, err
    for file in ("last.pt", "best.pt"):
        assert same_weights(f"whole/{file}", f"cut/{file}")
    whole, cut = (torch.load(f"{run}/last.pt", weights_only=True) for run in ("whole", "cut"))
    for index, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, cut["optimizer"]["state"][index][name]) for name, value in state.items())
    logs = [[*csv.DictReader(Path(run, "log.csv").read_text().splitlines())] for run in ("whole", "cut")]
    for one, two in zip(*logs, strict=True):
        assert all(one[name] == two[name] for name in ("epoch", "loss", "lr", "S", "E", "wF", "MAE"))


RUN_FILES = [".lock", "args.json", "best.pt", "last.pt", "log.csv", "samples.png"]


def test_a_failed_write_leaves_the_checkpoint_before_it_whole(pairs_folder, monkeypatch, capsys):
    saved, save = [], torch.save

    def full_disk(content, file):
        saved.append(file)
        if len(saved) < 3:  # last.pt and best.pt of the first epoch
            return save(content, file)
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    code, out, err = script(monkeypatch, capsys, train, "--data", pairs_folder, *SMALL, "--epochs", 3, "--out", "run")
    assert code == 2 and "run/last.pt: cannot be written ([Errno 28] No space left on device); what was there" in err
    assert sorted(p.name for p in Path("run").iterdir()) == RUN_FILES
    assert torch.load("run/last.pt", weights_only=True)["epoch"] == 1


STOP = """
import os, signal, subprocess, sys, time, evaluate, train
how, number = sys.argv[1], int(sys.argv[2])
if how == "ignored":  # as of a script's `train.py ... &`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
step = train.bce_iou
def stop(logits, masks):
    if os.path.exists("run/log.csv") and len(open("run/log.csv").readlines()) == 3:
        # By another process: torch's workers end quietly where their parent sends the signal.
        target = f"-{os.getpgrp()}" if how == "group" else str(os.getpid())
        subprocess.run(["kill", f"-{number}", "--", target])
    return step(logits, masks)
train.bce_iou = stop
load = train.load_file
train.load_file = lambda path: (time.sleep(1), load(path))[1]  # time for what becomes of the workers to arrive
sys.argv = ["train.py", *sys.argv[3:]]
evaluate.run(train.main)
"""


@pytest.mark.parametrize(
    "how, number",
    [("one", signal.SIGINT), ("one", signal.SIGTERM), ("group", signal.SIGTERM), ("group", signal.SIGINT)]
    + [("ignored", signal.SIGTERM)],
)
def test_a_stopped_run_says_how_to_go_on(pairs_folder, how, number):
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 500, "--out", "run", "--workers", 2)
    ended = in_a_process(STOP, how, int(number), *arguments, start_new_session=True)
    assert ended.returncode == 130, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("warning: the encoder is random")]
    assert lines == ["train.py: stopped; `python train.py --resume --out run` goes on after epoch 2"], ended.stderr


def test_what_is_odd_in_a_folder_is_said(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 2, "--out", "run")
    assert script(monkeypatch, capsys, train, *arguments)[0] == 0
    good = {p: p.read_bytes() for p in Path("run").iterdir()}
    log = Path("run/log.csv")
    resume = ("--resume", "--out", "run", "--device", "cpu")
    for file, content, message in (
        (log, b"epoch,loss\nx,1\n", "run/log.csv: not the log of a run"),
        (Path("run/best.pt"), good[Path("run/last.pt")], "run/best.pt: not the best.pt of a run"),
    ):
        file.write_bytes(content)
        code, out, err = script(monkeypatch, capsys, train, *resume)
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err
        file.write_bytes(good[file])
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[2]]) + "\n")  # the first epoch's row is missing, the last one's is not
    assert script(monkeypatch, capsys, train, *resume)[0] == 0
    assert log.read_text().splitlines() == [lines[0], lines[2]]


def test_a_folder_has_one_run_at_a_time(pairs_folder, monkeypatch, capsys):
    Path("run").mkdir()
    hold = "import pathlib, train; held = train.lock(pathlib.Path('run')); print('held', flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(Path(tssam.__file__).parent)}
    other = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert other.stdout.readline() == "held\n"
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 1, "--out", "run")
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 2 and "--out: a run is going on in run; name another folder" in err
    assert [p.name for p in Path("run").iterdir()] == [".lock"]
    other.kill()
    other.wait()
    assert script(monkeypatch, capsys, train, *arguments)[0] == 0


def test_a_moved_run_goes_on(pairs_folder, monkeypatch, capsys):
    monkeypatch.chdir(pairs_folder.parent)
    assert (
        script(monkeypatch, capsys, train, "--data", pairs_folder.name, *SMALL, "--epochs", 1, "--out", "run")[0] == 0
    )
    elsewhere = pairs_folder.parent / "elsewhere"
    elsewhere.mkdir()
    Path("run").rename(elsewhere / "run")
    monkeypatch.chdir(elsewhere)
    code, out, err = script(monkeypatch, capsys, train, "--resume", "--out", "run", "--device", "cpu")
    assert code == 0 and "resume: after epoch 1, its last" in out, err


def test_outputs_that_are_not_finite_in_eval_mode_cost_no_checkpoint(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 3, "--out", "run")
    forward, epochs = TSSAM.forward, []

    def overflow(self, images):
        if self.training and (not epochs or epochs[-1] == "eval"):
            epochs.append("train")
        elif not self.training and epochs[-1] == "train":
            epochs.append("eval")
        return forward(self, images) * (math.inf if not self.training and epochs.count("train") == 2 else 1)

    monkeypatch.setattr(TSSAM, "forward", overflow)
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    message = "the network is no longer finite after epoch 2; run/last.pt holds epoch 1; try a lower --lr"
    assert code == 2 and message in err.splitlines()[-1], err
    assert torch.load("run/last.pt", weights_only=True)["epoch"] == 1


def test_resume_refuses_what_would_be_another_experiment(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 1, "--out", "run")
    assert script(monkeypatch, capsys, train, *arguments)[0] == 0
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    for changes, message in (
        (
            ("--lr", "1e-3", "--size", 32),
            "another experiment than run: --size 32 (it has 64), --lr 0.001 (it has 0.0008)",
        ),
        (("--task", "shadow"), "--task shadow (it has sod)"),
        (("--sam", "vit_b"), "--sam vit_b (it has tiny)"),
        (("--batch-size", 4), "--batch-size 4 (it has 2)"),
        (("--sam-checkpoint", "sam.pth"), "--sam-checkpoint sam.pth (it has random)"),
        (("--csa-blocks", "1-2"), "--csa-blocks [1, 2] (it has None)"),
        (("--data", pairs_folder / "test"), "--resume: --data has other images than the run in run"),
        (("--val", pairs_folder / "train"), "--resume: --val has other images than the run in run"),
        (("--out", "nowhere"), "nowhere/last.pt: no such file"),
    ):
        code, out, err = script(monkeypatch, capsys, train, "--resume", "--out", "run", "--device", "cpu", *changes)
        assert code == 2 and message in err.splitlines()[-1], err
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 2 and "--out: run holds a run; go on with it by --resume, or name another folder" in err
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == before
    # The same arguments again, other workers: the same run, which is at its end.
    code, out, err = script(monkeypatch, capsys, train, *arguments, "--resume", "--workers", 1)
    assert code == 0 and "resume: after epoch 1, its last" in out


def test_bad_checkpoints_are_refused(pairs_folder, tmp_path, monkeypatch, capsys):
    sam, other = sam_file(tmp_path / "sam.pth", 64), sam_file(tmp_path / "other.pth", 64, seed=6)
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 2, "--sam-checkpoint")
    assert script(monkeypatch, capsys, train, *arguments, sam, "--out", "run")[0] == 0
    assert script(monkeypatch, capsys, train, *arguments, sam, "--out", "small", "--size", 32)[0] == 0
    good, marker = Path("run/last.pt").read_bytes(), tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"args": Evil()}, "evil.pt")
    for content, changes, message in (
        (good[: len(good) // 2], (), "run/last.pt: not a checkpoint, or not a whole one"),
        (b"not one", (), "run/last.pt: not a checkpoint, or not a whole one"),
        (Path("evil.pt").read_bytes(), (), "run/last.pt: not a checkpoint, or not a whole one"),
        (sam.read_bytes(), (), "--resume: run/last.pt is not the last.pt of a run"),
        (Path("run/best.pt").read_bytes(), (), "--resume: run/last.pt is not the last.pt of a run"),
        (good, ("--sam-checkpoint", other), "run/last.pt: trained on another tiny encoder than"),
        (Path("small/last.pt").read_bytes(), ("--size", 64), "another experiment than run: --size 64 (it has 32)"),
    ):
        Path("run/last.pt").write_bytes(content)
        before = {p: p.read_bytes() for p in Path("run").iterdir()}
        code, out, err = script(monkeypatch, capsys, train, "--resume", "--out", "run", "--device", "cpu", *changes)
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err
        assert {p: p.read_bytes() for p in Path("run").iterdir()} == before
    assert not marker.exists()


@pytest.mark.parametrize(
    "images_, batch, accumulate, world", [(10, 4, 1, 1), (10, 4, 2, 2), (9, 4, 1, 4), (11, 8, 3, 2)]
)
def test_batches_deal_every_image_out_once(images_, batch, accumulate, world):
    ranks = [train.Batches(images_, batch, accumulate, rank, world, seed=3, flip=True) for rank in range(world)]
    seen = []
    for epoch in (1, 2):
        for r in ranks:
            r.set_epoch(epoch)
        dealt = [index for r in ranks for part in r.parts for index, _ in part.items]
        assert len(dealt) == len(set(dealt)) == images_ - ranks[0].dropped
        assert len({len(r.parts) for r in ranks}) == 1 and all(part.items for r in ranks for part in r.parts)
        assert [part.items for part in ranks[0].parts] == [*ranks[0]] and len(ranks[0]) == len(ranks[0].parts)
        step = [0.0]
        for parts in zip(*(r.parts for r in ranks), strict=True):
            step[-1] += sum(part.share for part in parts)
            assert len({part.last for part in parts}) == 1
            if parts[0].last:
                step.append(0.0)
        assert step[:-1] == pytest.approx([1.0] * math.ceil((images_ - ranks[0].dropped) / batch))
        seen.append(dealt)
    assert seen[0] != seen[1]  # another order in every epoch, and the same again
    ranks[0].set_epoch(1)
    first = [index for part in ranks[0].parts for index, _ in part.items]
    assert first == seen[0][: len(first)]
    assert ranks[0].dropped == (images_ % batch if images_ % batch < world else 0)


RANKS = """
import sys, torch, torch.distributed as dist
import evaluate, train
validate = train.validate
def keep(model, *others):
    torch.save({name: p for name, p in model.named_parameters() if p.requires_grad}, f"rank{dist.get_rank()}.pt")
    return validate(model, *others)
train.validate = keep
score = train.evaluate
def share(model, pairs, *others):
    with open(f"share{dist.get_rank()}", "a") as file:
        print(len(pairs), file=file)
    return score(model, pairs, *others)
train.evaluate = share
sys.argv = ["train.py", *sys.argv[1:]]
evaluate.run(train.main)
"""


def average_step(halves: list[list[int]], data: evaluate.Pairs, share: float = 0.5) -> TSSAM:
    """A model of seed 0 after one step of Adam on the average of two halves' gradients."""
    torch.manual_seed(0)
    model = build_tssam("tiny", 64).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    start, gradients = copy.deepcopy(model.state_dict()), []
    for half in halves:
        model.load_state_dict(start)  # the statistics of the first half are the first process's
        batch = [data[i] for i in half]
        loss = train.bce_iou(model(torch.stack([b[0] for b in batch])), torch.stack([b[1] for b in batch]))
        gradients.append(torch.autograd.grad(loss, trained))
    for p, one, two in zip(trained, *gradients, strict=True):
        p.grad = one * share + two * share
    torch.optim.Adam(trained, 1e-2).step()
    return model


def test_two_processes_take_the_step_of_the_average(pairs_folder, monkeypatch, capsys):
    Path("ranks.py").write_text(RANKS)
    arguments = ("--data", pairs_folder, *SMALL, "--batch-size", 4, "--epochs", 1, "--lr", "1e-2", "--out", "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ranks.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tssam.__file__).parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *map(str, arguments), "--workers", "0"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epoch 1/1") == 1 and "on:    2 x cpu" in ended.stdout  # the first process alone speaks
    one, two = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    data = evaluate.Pairs(evaluate.find_sets([pairs_folder], "train")[0].pairs, 64)
    halves = [[i for i, _ in train.Batches(4, 4, 1, rank, 2, 0, False).parts[0].items] for rank in (0, 1)]
    expected = dict(average_step(halves, data).named_parameters())
    assert all(torch.allclose(one[name], expected[name], atol=2e-5) for name in one)
    assert [Path(f"share{rank}").read_text().split()[0] for rank in (0, 1)] == ["2", "1"]
    # Validation, shared between the two, gives the numbers of one process with the stored weights.
    stored = torch.load("run/best.pt", weights_only=True)
    model, _ = load_checkpoint("run/best.pt")
    pairs = evaluate.find_sets([pairs_folder], "test")[0].pairs
    assert evaluate.evaluate(model, pairs, "sod", "paper", 2, 0).results() == pytest.approx(stored["metrics"], rel=1e-5)


def test_accumulated_gradients_are_the_average_of_the_halves(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder, *SMALL, "--batch-size", 4, "--epochs", 1, "--lr", "1e-2", "--out", "run")
    assert script(monkeypatch, capsys, train, *arguments, "--workers", 0, "--accumulate", 2)[0] == 0
    data = evaluate.Pairs(evaluate.find_sets([pairs_folder], "train")[0].pairs, 64)
    halves = [[i for i, _ in part.items] for part in train.Batches(4, 4, 2, 0, 1, 0, False).parts]
    assert [len(half) for half in halves] == [2, 2]
    expected, stored = dict(average_step(halves, data).named_parameters()), weights_of("run/last.pt")
    assert all(torch.allclose(stored[n], p, atol=2e-5) for n, p in expected.items() if p.requires_grad)


@pytest.mark.parametrize("high_freq", [False, True])
def test_grad_checkpoint_changes_nothing_but_memory(high_freq):
    models, kept = [tiny(high_freq=high_freq), tiny(high_freq=high_freq)], []
    models[1].grad_checkpoint = True
    for model in models:
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = train.bce_iou(model(images()), (images(seed=1)[:, :1] > 0).float())
        loss.backward()
        assert "forward" not in vars(model.image_encoder.blocks[0])  # as it was
    assert kept[1] < 0.85 * kept[0]
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (one.grad is None and two.grad is None) or same(two.grad, one.grad, 1e-6), name
    for (name, one), two in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.equal(one, two), name


def test_bf16_losses_stay_with_fp32(tmp_path):
    train.draw_demo(tmp_path)
    data = evaluate.Pairs(evaluate.find_sets([tmp_path], "train")[0].pairs, 96)
    losses = {}
    for precision in ("fp32", "bf16"):
        args = SimpleNamespace(precision=precision, device=torch.device("cpu"))
        torch.manual_seed(0)
        model = build_tssam("tiny", 96).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-3)
        losses[precision] = []
        for part in train.Batches(80, 4, 1, 0, 1, 0, False).parts:
            x, masks = (torch.stack(t) for t in zip(*(data[item] for item in part.items), strict=True))
            with train.autocast(args):
                logits = model(x)
            assert logits.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
            loss = train.bce_iou(logits, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[precision].append(loss.item())
    assert len(losses["fp32"]) == 20 and losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_bf16_runs_from_end_to_end(pairs_folder, monkeypatch, capsys):
    recomputed, used = tssam.recomputed, []
    monkeypatch.setattr(tssam, "recomputed", lambda block: used.append(block) or recomputed(block))
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 1, "--precision", "bf16", "--grad-checkpoint")
    for task in ("sod", "shadow"):
        code, out, err = script(monkeypatch, capsys, train, *arguments, "--task", task, "--out", task)
        assert code == 0 and "on:    cpu, bf16" in out and used  # --grad-checkpoint
        used.clear()
        assert all(t.dtype in (torch.float32, torch.int64) for t in weights_of(f"{task}/last.pt").values())


@pytest.mark.parametrize("recipe, optimizer", [("paper", "Adam"), ("released", "AdamW")])
def test_recipes(pairs_folder, monkeypatch, capsys, recipe, optimizer):
    used, flipped = [], []
    for name in ("Adam", "AdamW"):
        made = getattr(torch.optim, name)
        monkeypatch.setattr(
            torch.optim, name, lambda *a, made=made, name=name, **k: used.append((name, k)) or made(*a, **k)
        )
    item = evaluate.Pairs.__getitem__
    monkeypatch.setattr(evaluate.Pairs, "__getitem__", lambda data, key: flipped.append(key[1]) or item(data, key))
    arguments = ("--data", pairs_folder / "train", *SMALL, "--epochs", 6, "--workers", 0, "--recipe", recipe)
    assert script(monkeypatch, capsys, train, *arguments)[0] == 0
    assert used == [(optimizer, {"weight_decay": 0.01} if recipe == "released" else {})]
    assert len(flipped) == 24 and (0 < sum(flipped) < 24 if recipe == "released" else not any(flipped))


def test_mirrored_items(pairs_folder):
    data = evaluate.Pairs(evaluate.find_sets([pairs_folder], "train")[0].pairs, 64)
    for plain, mirrored in zip(data[0], data[0, True], strict=True):
        assert torch.equal(plain.flip(-1), mirrored) and not torch.equal(plain, mirrored)


def test_chosen_blocks(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder / "train", *SMALL, "--epochs", 1)
    chosen = ("--csa-blocks", "1-3", "--mrm-blocks", "0,2-3")
    assert script(monkeypatch, capsys, train, *arguments, *chosen, "--out", "run")[0] == 0
    model, _ = load_checkpoint("run/last.pt")
    assert (model.config["csa_blocks"], model.config["mrm_blocks"]) == ([1, 2, 3], [0, 2, 3])
    for text, message in (
        ("a-b", "'a-b' names no blocks; write them as 2-11 or 0,3,5-7"),
        ("3-1", "'3-1' names no blocks"),
        ("2-9", "csa_blocks: [2, 3, 4"),
    ):
        code, out, err = script(monkeypatch, capsys, train, *arguments, "--csa-blocks", text)
        assert code == 2 and message in err


def test_a_loss_that_is_not_finite_stops_the_run(pairs_folder, monkeypatch, capsys):
    losses, loss_of = [], train.bce_iou
    monkeypatch.setattr(
        train, "bce_iou", lambda *a: losses.append(0) or loss_of(*a) * (math.nan if len(losses) == 4 else 1)
    )
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 3, "--workers", 0, "--out", "run")
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    files = [str(pairs_folder / f"train/Imgs/{x}.jpg") for x in "abcd"]
    line = err.splitlines()[-1]
    assert code == 2 and "epoch 2, step 2: the loss is nan for" in line and sum(f in line for f in files) == 2
    assert "run/last.pt holds epoch 1" in line and torch.load("run/last.pt", weights_only=True)["epoch"] == 1


def test_what_a_run_leaves_to_look_at(pairs_folder, monkeypatch, capsys):
    board: list = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            board.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            board.append((name, float(value), step))

        def add_image(self, name, image, step, dataformats):
            board.append((name, image.shape[-1], step))

        def flush(self):
            pass

    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 2)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not installed
    assert script(monkeypatch, capsys, train, *arguments, "--out", "run")[0] == 0
    assert sorted(p.name for p in Path("run").iterdir()) == RUN_FILES
    kept = json.loads(Path("run/args.json").read_text())
    assert (kept["size"], kept["lr"], kept["data"], kept["precision"]) == (64, 8e-4, [str(pairs_folder)], "fp32")
    rows = [*csv.DictReader(Path("run/log.csv").read_text().splitlines())]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [*rows[0]] == ["epoch", "loss", "lr", "images_per_s", "peak_MB", "seconds", "S", "E", "wF", "MAE"]
    assert float(rows[1]["S"]) == pytest.approx(torch.load("run/best.pt", weights_only=True)["metrics"]["S"], abs=0.1)
    with Image.open("run/samples.png") as picture:
        assert picture.height == 16 + 3 * (16 + 160 + 6)  # the validation set's three images
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    assert script(monkeypatch, capsys, train, *arguments, "--out", "run2")[0] == 0
    assert board[0] == ("open", "run2", 1)
    assert {entry[0] for entry in board[1:]} == {*rows[0], "samples"} and ("samples", 3, 2) in board


def test_too_little_gpu_memory_is_one_line(monkeypatch, capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        evaluate.run(main)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "train.py: error: the GPU has too little memory for this; try --grad-checkpoint, --accumulate"
    )
    assert err.count("\n") == 1


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        evaluate.run(lambda: 1 / 0)


def test_imports_run_one_way():
    sources = {name: Path(tssam.__file__).with_name(f"{name}.py").read_text() for name in ("tssam", "evaluate")}
    assert not re.search(r"^(import|from) (evaluate|train)", sources["tssam"], re.MULTILINE)
    assert not re.search(r"^(import|from) train", sources["evaluate"], re.MULTILINE)


README = Path(tssam.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_reading_guide_is_true():
    entries = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py#L(\d+)-L(\d+)\)", README)
    assert len(entries) > 12
    for name, module, first, last in entries:
        thing = functools.reduce(
            getattr, name.split("."), {"tssam": tssam, "train": train, "evaluate": evaluate}[module]
        )
        lines, start = inspect.getsourcelines(thing)
        assert (int(first), int(last)) == (start, start + len(lines) - 1), f"README: {name} is at {start}"


def test_the_readme_names_what_there_is(monkeypatch, capsys):
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in globals(), name
    helps = ""
    for module in (train, evaluate, tssam):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", "--help"])
        with pytest.raises(SystemExit, match="0"):
            module.main()
        helps += capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--nproc_per_node", "--nproc"}
    assert len(flags) > 15
    for flag in flags:
        assert re.search(rf"{flag}\b", helps), flag
    for file in re.findall(r"\]\(((?!http|#)[^)#]+)", README):
        assert Path(tssam.__file__).with_name(file.split("/")[0]).exists(), file
