"""The tests of tssam.py, train.py and evaluate.py: `python -m pytest`. No data, weights, network or GPU needed."""

import copy
import functools
import gc
import hashlib
import http.server
import math
import re
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import py_sod_metrics
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything import sam_model_registry
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import nn

import evaluate
import train
import tssam
from tssam import CSA, FFD, MRM, TSSAM, InputError, build_tssam, load_checkpoint, load_released, save_checkpoint

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
        ours, theirs = build_tssam(sam).image_encoder, sam_model_registry[sam]().image_encoder
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
    with pytest.raises(OSError, match="no space"):
        checkpoint(path, model)
    assert path.read_bytes() == whole


def test_checkpoints_that_are_none_are_named(tmp_path):
    torch.manual_seed(7)
    model = build_tssam("tiny", 64)
    path = checkpoint(tmp_path / "last.pt", model, encoder_seed=7)
    stored = torch.load(path, weights_only=True)
    del stored["trained"]["ffd.head.bias"]
    torch.save(stored, path)
    with pytest.raises(InputError, match="last.pt: ffd.head.bias is missing"):
        load_checkpoint(path)
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="last.pt: not a checkpoint written by train.py"):
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


@pytest.mark.parametrize(
    "train_folders, test_folders",
    [
        (("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask"), ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask")),
        (("train/Imgs", "train/GT"), ("test/Imgs", "test/GT")),
        (("train/train_A", "train/train_B"), ("test/test_A", "test/test_B")),
        (("TrainDataset/Imgs", "TrainDataset/GT"), ("TestDataset/Image", "TestDataset/GT")),
    ],
)
def test_splits_and_pairs(tmp_path, train_folders, test_folders):
    make_pairs(*(tmp_path / f for f in train_folders), stems=("t1", "t2", "t3"))
    make_pairs(*(tmp_path / f for f in test_folders), stems=("e1",))
    (tmp_path / "train" / "train_C").mkdir(parents=True, exist_ok=True) if "train_A" in train_folders[0] else None
    for split, folders, stems in (("train", train_folders, ["t1", "t2", "t3"]), ("test", test_folders, ["e1"])):
        folder = evaluate.find_split(tmp_path, split)
        assert folder == (tmp_path / folders[0]).parent
        pairs = evaluate.find_pairs(folder)
        assert [(i.relative_to(tmp_path), m.relative_to(tmp_path)) for i, m in pairs] == [
            (Path(folders[0]) / f"{stem}.jpg", Path(folders[1]) / f"{stem}.png") for stem in stems
        ]
        assert evaluate.find_split(folder, "test") is None


@pytest.mark.parametrize(
    "folders", [("images", "ground_truth_mask"), ("DUT-OMRON-image", "pixelwiseGT-new-PNG"), ("imgs", "gt")]
)
def test_test_sets_without_splits(tmp_path, folders):
    make_pairs(*(tmp_path / f for f in folders))
    assert evaluate.find_split(tmp_path, "test") is None
    assert [i.stem for i, _ in evaluate.find_pairs(tmp_path)] == ["a", "b"]


def test_pairs_that_are_none_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        evaluate.find_pairs(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no folder of images, such as Imgs"):
        evaluate.find_pairs(tmp_path)
    make_pairs(tmp_path / "Imgs", tmp_path / "GT", ("a", "b", "c"))
    (tmp_path / "GT" / "b.png").unlink()
    with pytest.raises(InputError, match="1 files have no mask of the same stem, such as b"):
        evaluate.find_pairs(tmp_path)
    (tmp_path / "Imgs" / "b.jpg").unlink()
    (tmp_path / "Imgs" / "c.jpg").unlink()
    with pytest.raises(InputError, match="1 files have no image of the same stem, such as c"):
        evaluate.find_pairs(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match=r"several folders of masks \(GT, masks\)"):
        evaluate.find_pairs(tmp_path)


def test_several_test_sets_are_named(tmp_path):
    for name in ("CAMO", "COD10K"):
        make_pairs(tmp_path / "TestDataset" / name / "Imgs", tmp_path / "TestDataset" / name / "GT")
    with pytest.raises(InputError, match=r"TestDataset: holds data sets \(CAMO, COD10K\), not images; name one"):
        evaluate.find_pairs(evaluate.find_split(tmp_path, "test"))
    assert len(evaluate.find_pairs(tmp_path / "TestDataset" / "CAMO")) == 2


def test_items_of_pairs(tmp_path):
    (tmp_path / "Imgs").mkdir()
    (tmp_path / "GT").mkdir()
    Image.new("RGB", (50, 30), (255, 0, 51)).save(tmp_path / "Imgs" / "a.png")
    mask = np.zeros((2, 2), np.uint8)
    mask[0, 1], mask[1, 0] = 1, 255  # above 0 is foreground
    Image.fromarray(mask).save(tmp_path / "GT" / "a.png")
    pairs = evaluate.Pairs(evaluate.find_pairs(tmp_path), 64)
    image, target, index = pairs[0]
    assert image.shape == (3, 64, 64) and image.dtype == target.dtype == torch.float32 and index == 0
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert torch.allclose(image.mean((1, 2)), torch.tensor(expected), atol=1e-4)
    assert torch.equal(target[0], torch.tensor([[0.0, 1], [1, 0]]).repeat_interleave(32, 0).repeat_interleave(32, 1))
    Image.fromarray(mask * 255).save(tmp_path / "Imgs" / "a.png")  # two by two pixels, read as RGB and blended
    assert len(pairs[0][0].unique()) > 20


def test_metrics_are_those_of_py_sod_metrics():
    rng = np.random.default_rng(0)
    ours = evaluate.Metrics("sod")
    theirs = [getattr(py_sod_metrics, m)() for m in ("Smeasure", "Emeasure", "WeightedFmeasure", "MAE")]
    for _ in range(3):
        probability = rng.random((40, 50)).astype(np.float32)
        mask = np.zeros((40, 50), bool)
        mask[10:30, 15:40] = True
        ours.add(probability, mask)
        for metric in theirs:
            metric.step(probability.astype(np.float64) * 255, mask.astype(np.uint8) * 255)
    s, e, wf, mae = (metric.get_results() for metric in theirs)
    assert ours.results() == {"S": s["sm"], "E": e["em"]["curve"].mean(), "wF": wf["wfm"], "MAE": mae["mae"]}
    perfect = evaluate.Metrics("sod")
    perfect.add(mask.astype(np.float32), mask)
    assert perfect.results() == pytest.approx({"S": 1, "E": 1, "wF": 1, "MAE": 0}, abs=0.02)


def test_ber_by_hand():
    metrics = evaluate.Metrics("shadow")
    mask = np.zeros((10, 10), bool)
    mask[:, :4] = True
    probability = np.full((10, 10), 0.3, np.float32)  # nothing reaches the threshold, stretched or not
    metrics.add(probability, mask)
    assert metrics.results() == {"BER": 50.0}
    probability[:, :3] = 126 / 255  # 30 of 40 found
    probability[:6, 9] = 0.9  # 6 of 60 wrongly found
    metrics.add(probability, mask)
    assert metrics.results() == {"BER": pytest.approx(100 * (0.5 + (10 / 40 + 6 / 60) / 2) / 2)}


@pytest.mark.parametrize("task", ["sod", "shadow"])
@pytest.mark.parametrize("value", [False, True])
def test_metrics_of_one_sided_masks_are_finite(task, value):
    metrics = evaluate.Metrics(task)
    for probability in (np.zeros((8, 8)), np.ones((8, 8)), np.full((8, 8), 0.5), np.random.rand(8, 8)):
        metrics.add(probability, np.full((8, 8), value))
    assert all(math.isfinite(v) for v in metrics.results().values())


def test_evaluate_scores_in_eval_mode_and_gives_the_mode_back(tmp_path):
    make_pairs(tmp_path / "Imgs", tmp_path / "GT")
    data, model = evaluate.Pairs(evaluate.find_pairs(tmp_path), 64), tiny(image_size=64)
    by_hand = evaluate.Metrics("sod")
    with torch.no_grad():
        for image, mask, _ in data:
            by_hand.add(model.eval()(image[None]).sigmoid()[0, 0].numpy(), mask[0].numpy() > 0)
    before = copy.deepcopy(model.state_dict())
    for training in (True, False):
        assert evaluate.evaluate(model.train(training), data, "sod", 2, 0) == pytest.approx(by_hand.results(), rel=1e-4)
        assert model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_are_saved_at_the_images_own_size(tmp_path):
    make_pairs(tmp_path / "Imgs", tmp_path / "GT", ("a",))
    logit = torch.full((1, 16, 16), -20.0)
    logit[:, :, 8:] = 20.0
    evaluate.save_mask(logit, tmp_path / "Imgs" / "a.jpg", tmp_path)
    with Image.open(tmp_path / "a.png") as mask:
        assert mask.size == (48, 40) and mask.mode == "L"
        grey = np.array(mask)
    assert (grey[:, :22] == 0).all() and (grey[:, 26:] == 255).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["GT", "Imgs", "a.png"]


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
    assert code == 0 and evaluate.show(stored["metrics"]) in out
    assert len(list(Path("m").glob("*.png"))) == 24


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
    assert code == 0 and evaluate.show(stored["metrics"]) in out


def test_defaults_are_the_papers(monkeypatch):
    for task, epochs in (("sod", 80), ("cod", 80), ("shadow", 100)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "DUTS", "--task", task])
        args = train.parse_arguments()
        assert (args.sam, args.size, args.epochs, args.batch_size, args.lr) == ("vit_h", 1024, epochs, 8, 8e-4)
        assert args.sam_checkpoint is None


LOSSES = [("sod", train.bce_iou), ("cod", train.bce_iou), ("shadow", train.balanced_bce)]


@pytest.mark.parametrize("task, loss_of", LOSSES)
def test_training_by_hand(pairs_folder, monkeypatch, capsys, task, loss_of):
    """Three epochs of one batch: Adam with the task's loss and a cosine, and nothing else."""
    arguments = ("--data", pairs_folder, *SMALL, "--batch-size", 4, "--epochs", 3, "--lr", "1e-2", "--workers", 0)
    order, item = [], evaluate.Pairs.__getitem__
    monkeypatch.setattr(evaluate.Pairs, "__getitem__", lambda data, i: order.append((len(data), i)) or item(data, i))
    assert script(monkeypatch, capsys, train, "--task", task, *arguments, "--out", "run")[0] == 0
    epochs = np.array([i for length, i in order if length == 4]).reshape(3, 4)
    assert (np.sort(epochs) == range(4)).all() and len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew

    torch.manual_seed(0)
    model = build_tssam("tiny", 64, high_freq=task == "shadow").train()
    data = evaluate.Pairs(evaluate.find_pairs(pairs_folder / "train"), 64)
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
    monkeypatch.setattr(train, "evaluate", lambda *args: {name: next(results)})
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
    assert [p.name for p in Path("run").iterdir()] == ["last.pt"]
    code, out, err = script(monkeypatch, capsys, evaluate, "--ckpt", "run/last.pt")
    assert code == 2 and "trained without a validation set; name the data: --data" in err
    code, out, err = script(
        monkeypatch, capsys, evaluate, "--ckpt", "run/last.pt", "--data", pairs_folder, "--device", "cpu"
    )
    assert code == 0 and "3 pairs" in out
    # --val is used when it is given
    code, out, err = script(monkeypatch, capsys, train, *arguments, "--out", "run2", "--val", pairs_folder / "train")
    assert code == 0 and Path("run2/best.pt").exists() and f"val:   {pairs_folder / 'train'}, 4 pairs" in out


def test_checkpoints_are_not_overwritten(pairs_folder, monkeypatch, capsys):
    arguments = ("--data", pairs_folder, *SMALL, "--out", "run")
    assert script(monkeypatch, capsys, train, *arguments, "--epochs", 1)[0] == 0
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    code, out, err = script(monkeypatch, capsys, train, *arguments, "--epochs", 1)
    assert code == 2 and err.count("\n") == 1 and "--out: run holds the checkpoints of another run" in err
    # A run that blows up keeps what its earlier epochs saved, and says so in one line.
    code, out, err = script(monkeypatch, capsys, train, *arguments[:-1], "run2", "--epochs", 2, "--lr", "1e30")
    assert code == 2 and "no longer finite in epoch" in err and "try a lower --lr than 1e+30" in err
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
        (evaluate, [], "the following arguments are required: --ckpt"),
    ):
        code, out, err = script(monkeypatch, capsys, module, *arguments)
        last = err.splitlines()[-1]
        assert code == 2 and message in last and last.startswith(f"{module.__name__}.py: error: "), err
        assert len([line for line in err.splitlines() if not line.startswith("warning: the encoder is random")]) == 1
    assert list(Path().iterdir()) == []  # and nothing is left behind


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(pairs_folder, monkeypatch, capsys, workers):
    broken = pairs_folder / "train/Imgs/c.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = ("--data", pairs_folder, *SMALL, "--epochs", 1, "--workers", workers)
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 2 and err.splitlines()[-1].startswith(f"train.py: error: {broken}: cannot be read as an image")
    assert "Traceback" not in err
    # One in the validation set costs no epoch.
    broken.unlink()
    (pairs_folder / "train/GT/c.png").unlink()
    (pairs_folder / "test/Imgs/y.jpg").write_bytes(b"")
    code, out, err = script(monkeypatch, capsys, train, *arguments, "--out", "run")
    assert code == 2 and "y.jpg: cannot be read as an image" in err and Path("run/last.pt").exists()


def test_masks_are_not_saved_over_the_data(pairs_folder, monkeypatch, capsys):
    script(monkeypatch, capsys, train, "--data", pairs_folder, *SMALL, "--epochs", 1, "--out", "run")
    masks = pairs_folder / "test/GT"
    before = [file.read_bytes() for file in sorted(masks.iterdir())]
    arguments = ("--ckpt", "run/best.pt", "--device", "cpu", "--save")
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments, masks)
    assert code == 2 and f"--save: {masks} holds the data itself" in err
    assert [file.read_bytes() for file in sorted(masks.iterdir())] == before
    (pairs_folder / "file").touch()
    code, out, err = script(monkeypatch, capsys, evaluate, *arguments, pairs_folder / "file/masks")
    assert code == 2 and "file/masks: no folder to write to" in err


def test_too_little_gpu_memory_is_one_line(monkeypatch, capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        evaluate.run(main)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: the GPU has too little memory for this; lower --batch-size")
    assert err.count("\n") == 1


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        evaluate.run(lambda: 1 / 0)


def test_imports_run_one_way():
    sources = {name: Path(tssam.__file__).with_name(f"{name}.py").read_text() for name in ("tssam", "evaluate")}
    assert not re.search(r"^(import|from) (evaluate|train)", sources["tssam"], re.MULTILINE)
    assert not re.search(r"^(import|from) train", sources["evaluate"], re.MULTILINE)
