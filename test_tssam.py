"""The tests of tssam.py, evaluate.py and train.py: `python -m pytest`. No data, weights, network or GPU needed."""

import argparse
import copy
import csv
import functools
import gc
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import py_sod_metrics
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from segment_anything import sam_model_registry
from segment_anything.modeling.image_encoder import Attention, Block, get_rel_pos
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _python_dispatch, _pytree

import evaluate
import train
import tssam
from evaluate import FULL_SIZE, PAPER, Pair
from tssam import TSSAM, InputError, build_tssam, load_checkpoint, load_released

SIZE = 128  # pixels: 8 x 8 patches, which the windows of `tiny` do not divide
torch.set_num_threads(1)  # faster at these sizes, and as in the processes that some tests start
README = Path(tssam.__file__).with_name("README.md").read_text(encoding="utf-8")


def cases(table: str) -> list[list[str]]:
    """The rows of a table, a case a line, its cells divided by bars."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


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


def under_released_names(model: TSSAM) -> dict[str, torch.Tensor]:
    return {tssam.released_name(name): tensor for name, tensor in model.state_dict().items()}


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    tolerance *= max(1, b.abs().max().item())
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance)


def load(path: Path | str) -> dict:
    return torch.load(path, weights_only=True)


def fail_with(error: Exception, *_) -> None:
    raise error


def refused(message: str):
    return pytest.raises(InputError, match=message)


# -------------------------------------------------------------------------------------------------
# The equations, derived again from a module's weights with torch.nn.functional; the authors' numbers


def layers_by_hand(x: torch.Tensor, layers: nn.Sequential) -> torch.Tensor:
    """Convolution, batch norm, ReLU: once, or again and again."""
    for conv, norm in zip(layers[::3], layers[1::3], strict=True):
        if isinstance(conv, nn.ConvTranspose2d):
            x = F.conv_transpose2d(x, conv.weight, conv.bias, stride=2)
        else:
            x = F.conv2d(x, conv.weight, conv.bias, padding="same")
        statistics = (None, None) if norm.training else (norm.running_mean, norm.running_var)
        x = F.batch_norm(x, *statistics, norm.weight, norm.bias, norm.training).clamp_min(0)
    return x


def tssam_by_hand(m: TSSAM, x: torch.Tensor) -> torch.Tensor:
    """The encoder walked by hand, no hooks: each block and the neck receive the merged map."""
    encoder, csa, mrm = m.image_encoder, iter(m.csa), iter(m.mrm)
    patches = encoder.patch_embed(x)
    shuffled = patches.flatten().view(patches.permute(0, 3, 1, 2).shape)  # the release's reading
    f_csa = F.conv2d(shuffled, m.csa_embedding.weight[..., None, None], m.csa_embedding.bias)
    if m.config["high_freq"]:
        f_csa += F.conv2d(tssam.high_pass(x), *m.high_freq_embedding.parameters(), stride=16)
    f_vit, first, f_mrm = (patches + encoder.pos_embed).permute(0, 3, 1, 2), next(csa), [0, 0]
    f_csa = layers_by_hand(f_vit + layers_by_hand(f_csa, first.expand), first.compress)
    for i, block in enumerate([*encoder.blocks, encoder.neck]):
        neck = block is encoder.neck
        f_vit = block(f_vit) if neck else block(f_vit.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if neck or i in m.config["mrm_blocks"]:
            at = next(mrm)
            for k, deconv, gate in ((0, at.deconv1, at.gate1), (1, at.deconv2, at.gate2)):
                f = layers_by_hand(layers_by_hand(f_vit, at.compress), deconv)  # Eq. 3
                hidden = torch.einsum("oc,bchw->bohw", gate.w1.weight, f).clamp_min(0)
                weight = torch.einsum("oc,bchw->bohw", gate.w2.weight, hidden).tanh()
                f_mrm[k] = weight * f + f_mrm[k]  # Eq. 4, 5
        if neck or i in m.config["csa_blocks"]:
            at = next(csa)
            f_vit = f_vit + layers_by_hand(f_csa, at.expand)  # Eq. 1
            f_csa = layers_by_hand(f_vit, at.compress)  # Eq. 2
    assert next(csa, None) is None and next(mrm, None) is None
    x = layers_by_hand(f_csa, m.ffd.conv_csa)
    for inject, detail in zip((m.ffd.inject1, m.ffd.inject2), f_mrm, strict=True):
        r = layers_by_hand(detail, inject.conv_mrm)  # Eq. 6
        quads = torch.stack([r[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
        x = torch.cat([x, quads.mean(0) + quads.amax(0)], 1)  # Eq. 7
        x = nn.UpsamplingBilinear2d(scale_factor=2)(layers_by_hand(x, inject.stage1))  # Eq. 8, 9
        x = layers_by_hand(torch.cat([x, detail], 1), inject.stage2)  # Eq. 10
    logits = F.conv2d(x, m.ffd.head.weight, m.ffd.head.bias)
    return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", [{}, dict(high_freq=True), dict(csa_blocks=[0, 2], mrm_blocks=[1])])
@torch.no_grad()
def test_equations_1_to_10(training, how):
    model = tiny(**how).train(training)
    expected, logits = tssam_by_hand(model, images()), model(images())
    assert logits.shape == (2, 1, SIZE, SIZE) and same(logits, expected, 1e-4)


def test_high_pass():
    """The square that is removed spans the frequencies -16 ... 15 of -32 ... 31 in each direction."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for fx, fy, rest in ((2, 5, 0), (15, 15, 0), (16, 0, 0.5), (0, 16, 0.5), (17, 0, 1)):
        wave = torch.cos(2 * math.pi * (fx * x + fy * y) / 64).expand(1, 3, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            high = tssam.high_pass(1 + wave)
        assert high.dtype == torch.float32 and same(high, rest * wave.abs(), 1e-4), (fx, fy)


# The released network in float64, ViT-B at 64 x 64, batch 2: some logits in eval and in train mode,
# without the high-frequency path, then with it; the loss and norms of gradients, without it and with it.
LOGITS = """
0.1050752096019 -0.3481609592614 0.4081638206628 0.5747045321780 0.2249986852153 0.1054618034242 0.0034920724703
0.4667275530479 0.1350944773623 0.2907443270460 0.4357443761098 0.3809180622418 -0.6855632680771 0.1471303948092
0.0631867603225 0.1149228509546 -0.7093597663290 -0.4310190047810 -0.0774674830722 0.0383797743123 0.1070537559300
-0.0117786880211 -0.3993100856986 -0.1019128132450 -0.1956225239883 0.0656247090872 -0.3353982422873 0.0675427106159
-0.1498666577096 -0.1029378844754 -0.4121694690643 -0.0078039540620 0.1485071364382 0.4779838523597 0.6629647094905
0.0695327513404 0.2187860713167 0.5654207336178 0.4591822129292 0.9954114375156 -0.8010876415191 0.5969642931392
-0.1281413334618 0.2710887948917
"""
NORMS = """
loss                    1.49891474997   0.276996936575    mrm.7.deconv2.3.weight        0.261278557745  0.091633688814
csa_embedding.weight    1.05278737905   0.375718051599    ffd.conv_csa.0.weight         0.148644262484  0.0494297170031
csa.0.expand.0.weight   0.610565218386  0.221536715539    ffd.inject1.conv_mrm.0.weight 0.2081862212    0.0611182171676
csa.5.compress.0.weight 0.562689093152  0.201323118355    ffd.inject1.stage1.0.weight   0.311622231097  0.100145199408
csa.13.expand.1.weight  0.0029125374240 0.00088666618514  ffd.inject2.stage2.1.weight   0.0747602178399 0.0166241971274
mrm.0.compress.0.weight 0.453601701896  0.145765707423    ffd.head.weight               0.885383435268  0.17218138174
mrm.3.gate2.w1.weight   0.0884279532824 0.033196245214    high_freq_embedding.weight    none            0.10538720545
mrm.12.gate1.w2.weight  0.0318246377503 0.00967974825676
"""


def seeded(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """What the authors' network was filled with: a released tensor's numbers follow from its name and a seed."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    key = (seed, zlib.crc32(name.encode()))
    x = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)
    if name.endswith("running_var"):
        x = 1 + 0.2 * np.abs(x)
    elif name.endswith(("running_mean", ".bias")) or "pos" in name:
        x = 0.1 * x
    elif len(shape) == 1:  # a norm's scale
        x = 1 + 0.1 * x
    else:
        scale = 0.3 if name.endswith(("attn.proj.weight", "mlp.lin2.weight")) else 1
        x = x * scale / math.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.parametrize("high_freq", [False, True])
def test_float64_parity_with_the_release(high_freq):
    """Seen, of all logits and gradients: logits within 7e-15 of the largest, the loss 1e-15, norms 6e-12."""
    model, seed = build_tssam("vit_b", 64, high_freq), 31 + high_freq
    released = under_released_names(model)
    load_released(model, {n: seeded(n, tuple(t.shape), seed) for n, t in released.items()})
    rng = np.random.Generator(np.random.Philox(key=(seed, 0xDA7A)))
    coarse = np.kron(rng.standard_normal((2, 3, 4, 4)), np.ones((16, 16)))
    x = torch.tensor(coarse + 0.5 * rng.standard_normal((2, 3, 64, 64))).float().double()
    row, column = np.mgrid[0:64, 0:64] / 64
    circles = zip(0.3 + 0.4 * rng.random((2, 2)), 0.15 + 0.2 * rng.random(2), strict=True)
    masks = [[(row - c[0]) ** 2 + (column - c[1]) ** 2 < r * r] for c, r in circles]
    logits = [model.double().eval()(x), model.train()(x)]
    some = [each.detach()[..., ::16, ::16].flatten()[::3].numpy() for each in logits]
    expected = np.array(LOGITS.split(), float).reshape(2, 2, 11)[int(high_freq)]
    assert np.array(some) == pytest.approx(expected, rel=0, abs=1e-9)
    loss_of = train.balanced_bce if high_freq else train.bce_iou
    loss = loss_of(logits[1], torch.tensor(np.array(masks)).double())
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    norms["loss"] = loss.item()
    rows = np.array(NORMS.split()).reshape(-1, 3)
    expected = {name: float(two[high_freq]) for name, *two in rows if two[high_freq] != "none"}
    assert {name: norms[name] for name in expected} == pytest.approx(expected, rel=1e-9)


# -------------------------------------------------------------------------------------------------
# The model and its losses


@pytest.mark.parametrize("sam", ["vit_b", "vit_l", "vit_h"])
def test_counts(sam):
    csas, size = dict(vit_b=(14, 11_892_865), vit_l=(26, 20_403_073), vit_h=(34, 29_437_569))[sam]
    with torch.device("meta"):
        model, with_high_freq = build_tssam(sam), build_tssam(sam, high_freq=True)
        whole_sam = sam_model_registry[sam]()

    def count(*modules: nn.Module, every: bool = False) -> int:
        return sum(p.numel() for m in modules for p in m.parameters() if every or p.requires_grad)

    ours, theirs = model.image_encoder, whole_sam.image_encoder
    assert re.sub("Encoder(?=Block)|Chunked", "", str(ours)) == str(theirs)  # layers, epsilons
    ours.load_state_dict(theirs.state_dict())  # names and shapes, so the heads and windows too
    assert (len(model.csa), len(model.mrm), count(model)) == (csas, 13, size)
    assert count(with_high_freq) == count(model) + 196_864
    assert model.config["mrm_blocks"] == list(range(csas - 14, csas - 2))
    if sam == "vit_b":  # III-C: to train SAM's mask decoder in place of MRM and FFD saves 2.35 M
        parts = [whole_sam.mask_decoder], [*model.mrm, model.ffd], [*model.csa, model.csa_embedding]
        assert [count(*part, every=True) for part in parts] == [4_058_340, 6_411_649, 5_481_216]
    assert sam != "vit_h" or count(model, every=True) == 666_463_617  # the paper's 4.4 %


def test_arguments_and_initialisation():
    model = build_tssam("tiny", 64, True, csa_blocks=(3, 1, 1), mrm_blocks=[0])
    blocks = dict(csa_blocks=[1, 3], mrm_blocks=[0])
    assert model.config == dict(sam="tiny", image_size=64, high_freq=True, **blocks)
    assert (len(model.csa), len(model.mrm), model.training) == (4, 2, True)
    torch.manual_seed(0)
    model = TSSAM("vit_b", 64)
    csa, mrm, default = model.csa[3], model.mrm[3], nn.Conv2d(256, 128, 3)
    convs = csa.expand[0], csa.compress[0], mrm.compress[0]
    others = model.ffd.conv_csa[0], mrm.gate1.w1, mrm.gate2.w2
    stds = [*((2 / n) ** 0.5 for n in (768, 256, 128)), default.weight.std().item(), 0.02, 0.02]
    assert [m.weight.std().item() for m in convs + others] == pytest.approx(stds, rel=0.02)
    assert not any(conv.bias.any() for conv in convs) and all(m.bias is None for m in others)
    assert csa.expand[1].eps == 1e-5 and csa.expand[1].momentum == 0.1  # PyTorch's defaults


def test_taps_live_for_one_pass_of_one_model_in_one_thread():
    model, kept = tiny(high_freq=True), []
    blocks = model.image_encoder.blocks
    with blocks[2].mlp.register_forward_hook(lambda m, args, y: kept.append(weakref.ref(y))):
        model(images())
    gc.collect()
    assert kept[0]() is None  # freed with the graph
    with blocks[1].register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        model(images())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    run, twin = torch.inference_mode()(model.eval().requires_grad_(False)), copy.deepcopy(model)
    inputs = [images(1, seed=seed) for seed in range(12)]
    alone = [run(x) for x in inputs]
    assert torch.equal(twin(inputs[0]), alone[0])  # a copy taps its own encoder
    for parameter in twin.parameters():
        parameter.zero_()
    assert not twin(inputs[0]).any() and torch.equal(model(inputs[0]), alone[0])
    with ThreadPoolExecutor(4) as pool:
        assert all(same(a, b) for a, b in zip(pool.map(run, inputs), alone, strict=True))


def test_a_step_moves_what_is_trained_and_recomputing_changes_nothing():
    masks, stepped, calls = (images(seed=1)[:, :1] > 0).float(), [], []
    for grad_checkpoint in (False, True):
        model = tiny(high_freq=True)
        model.set_grad_checkpointing(grad_checkpoint)
        model.image_encoder.blocks[1].mlp.register_forward_pre_hook(lambda m, _: calls.append(m))
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        train.bce_iou(model(images()), masks).backward()
        optimizer.step()
        stepped.append(model.state_dict())
        for name, tensor in stepped[-1].items():
            assert torch.equal(tensor, before[name]) == name.startswith("image_encoder."), name
    assert len(calls) == 3 and calls[1] is calls[2]  # once, and once more in backward
    assert all(map(torch.equal, *(state.values() for state in stepped)))


class Returned(_python_dispatch.TorchDispatchMode):
    seen = frozenset()  # (elements, device) of all tensors that the operations within returned

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for t in _pytree.tree_leaves(result):
            if torch.is_tensor(t) and t.ndim:  # plain numbers may be anywhere
                self.seen |= {(t.untyped_storage().nbytes() // t.element_size(), t.device.type)}
        return result


def test_no_tensor_is_left_on_the_cpu(monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, std: tensor)  # looks at values
    with FakeTensorMode(), torch.no_grad():
        try:
            with torch.device("cuda"):
                model = TSSAM("tiny", 64, high_freq=True)
                x, masks = torch.empty(2, 3, 64, 64), torch.empty(2, 1, 64, 64)
            with Returned() as returned:
                for loss_of in (train.bce_iou, train.balanced_bce):
                    loss_of(model(x), masks)
        except RuntimeError as error:
            if "CUDA driver" not in str(error):
                raise
            pytest.skip("this PyTorch asks the driver about a pretended GPU")
        assert {device for _, device in returned.seen} == {"cuda"}
        written = {}
        monkeypatch.setattr(tssam, "write_atomically", lambda path, save: save("file"))
        monkeypatch.setattr(torch, "save", lambda content, file: written.update(content))
        tssam.save_checkpoint("best.pt", model, task="sod", encoder={})
        assert {t.device.type for t in written["trained"].values()} == {"cpu"}


def our_attention(width: int, heads: int, *sides: int) -> tssam.ChunkedAttention:
    """With relative positions and all, none of them zero. SAM's own is `Attention.forward` of it."""
    torch.manual_seed(0)
    attention = tssam.ChunkedAttention(width, heads, True, True, True, sides).requires_grad_(False)
    for parameter in attention.parameters():
        parameter.normal_(std=0.2)
    return attention


@pytest.mark.parametrize("scores", [2**18, 2**10])  # all rows of queries at once, and one row
def test_both_attentions_agree(monkeypatch, scores):
    monkeypatch.setattr(tssam.ChunkedAttention, "SCORES_PER_CHUNK", {"cpu": scores})
    for numbers, case in cases("""
         768 12 14 14 3 14 14 | ViT-B's windows, d = 64
        1280 16 14 14 2 14 14 | ViT-H's, d = 80
         768 12 16 16 2 16 16 | global at 256 x 256
        1280 16 12 20 1 12 20 | not square
          64  4  8  8 2 13  9 | maps for which SAM resamples the relative positions"""):
        width, heads, *sides, batch, h, w = map(int, numbers.split())
        attention = our_attention(width, heads, *sides)
        x = (0.3 * torch.randn(batch, h, w, width)).requires_grad_()
        outputs = [attention(x), Attention.forward(attention, x)]
        gradients = [torch.autograd.grad(output, x, x.detach())[0] for output in outputs]
        for ours, theirs in (outputs, gradients):
            assert (ours - theirs).abs().max() <= 5e-6 * theirs.abs().max(), case


def test_memory(monkeypatch):
    """No N x N tensor is allocated; a gate and a piece of attention store nothing for backward."""
    assert dict(cpu=64**3, cuda=2**28) == tssam.ChunkedAttention.SCORES_PER_CHUNK  # a row at 1024
    monkeypatch.setitem(tssam.ChunkedAttention.SCORES_PER_CHUNK, "cpu", 3 * 24 * 576)
    mrm, attention = tssam.MRM(8, 8).eval(), our_attention(16, 2, 24, 24)  # N = 576
    x, tokens = torch.randn(1, 8, 16, 16), torch.randn(1, 24, 24, 16, requires_grad=True)
    with Returned() as by_sam:
        Attention.forward(attention, tokens).sum().backward()
    with Returned() as by_ours:
        attention(tokens).sum().backward()
    assert max(by_sam.seen)[0] >= 2 * 576 * 576  # of two heads
    assert max(by_ours.seen)[0] == 2 * 3 * 24 * 576  # three rows of queries

    def stored(module: nn.Module, *inputs: torch.Tensor | int) -> int:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            module(*inputs)
        return sum({(s := t.untyped_storage()).data_ptr(): s.nbytes() // 4 for t in kept}.values())

    lean = stored(mrm, x, 0, 0), stored(attention, tokens)
    monkeypatch.setattr(tssam, "recompute", lambda function, *args: function(*args))
    assert stored(mrm, x, 0, 0) - lean[0] == 2 * 8 * (32**2 + 64**2) + 4 * 8**2  # maps, weights
    assert stored(attention, tokens) - lean[1] > 2 * 576 * 576  # the scores of two heads
    model, bf16 = tiny().eval(), tiny().eval()
    bf16.store_encoder(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which makes the same of it
        logits = model(images())
        assert torch.equal(logits, bf16(images())) and logits.dtype == torch.float32
    assert bf16.image_encoder.blocks[0].mlp.lin1.weight.dtype == torch.bfloat16
    assert bf16.image_encoder.pos_embed.dtype == bf16.csa_embedding.weight.dtype == torch.float32


def test_losses():
    logits = torch.tensor([0.0, 2, -1, 3, 1, 1, 1, -4]).view(2, 1, 2, 2)
    masks = torch.tensor([1.0, 1, 0, 0, 0, 1, 0, 0]).view(2, 1, 2, 2)
    p = 1 / (1 + (-logits).exp())
    log = torch.where(masks > 0, p, 1 - p).log()
    ious = [(a * b).sum() / (a + b - a * b).sum() for a, b in zip(p, masks, strict=True)]
    bce_iou = (-log.mean() + 1 - sum(ious) / 2).item()
    assert train.bce_iou(logits, masks).item() == pytest.approx(bce_iou, rel=1e-5)
    # Three positive pixels, five negative ones in the whole batch: P/(P+N) = 3/8, pos_weight = 5/3.
    balanced = -3 / 8 * (5 / 3 * log[masks > 0].sum() + log[masks == 0].sum()).item() / 8
    assert train.balanced_bce(logits, masks).item() == pytest.approx(balanced, rel=1e-5)
    for loss_of in (train.bce_iou, train.balanced_bce):
        for value in (0.0, 1.0):  # one-sided masks
            logits = torch.tensor([0.0, -500, 500]).view(3, 1, 1, 1).requires_grad_()
            loss = loss_of(logits, torch.full_like(logits, value))
            loss.backward()
            assert loss.isfinite() and logits.grad.isfinite().all(), (loss_of, value)


# -------------------------------------------------------------------------------------------------
# Weights and checkpoints


def sam_file(path: Path, image_size: int, seed: int = 5) -> Path:
    """A file in the format of SAM's published weights, holding a `tiny` encoder."""
    encoder = tiny(seed, image_size=image_size).image_encoder
    state = {f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    torch.save({**state, "mask_decoder.iou_token.weight": torch.zeros(1, 256)}, path)
    return path


@pytest.mark.parametrize("size", [64, 128, 192])
def test_sam_weights_at_other_sizes(tmp_path, size):
    path = sam_file(tmp_path / "sam.pth", SIZE)
    model, grid = build_tssam("tiny", size, sam_checkpoint=path), size // 16
    ours, theirs = model.image_encoder.state_dict(), tiny(5).image_encoder.state_dict()
    kept = [name for name in theirs if size == SIZE or "pos" not in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    for mine, sams in zip(model.image_encoder.blocks, tiny(5).image_encoder.blocks, strict=True):
        span = grid if mine.window_size == 0 else 7
        rule = get_rel_pos(span, span, sams.attn.rel_pos_h)  # SAM's own, from its 8 x 8 grid
        assert torch.allclose(get_rel_pos(span, span, mine.attn.rel_pos_h), rule, atol=1e-6)
    positions = theirs["pos_embed"].permute(0, 3, 1, 2)
    resampled = F.interpolate(positions, (grid, grid), mode="bicubic", antialias=True)
    expected = theirs["pos_embed"] if size == SIZE else resampled.permute(0, 2, 3, 1)
    assert torch.equal(ours["pos_embed"], expected)


@torch.no_grad()
def test_released_checkpoints(tmp_path):
    """All names together are held by the parity test; here: which model a file is, and what is wrong with it."""
    file = tmp_path / "theirs.pth"
    for high_freq, task in ((False, "sod or cod"), (True, "shadow")):
        source = tiny(1, high_freq=high_freq).eval()
        released = under_released_names(source)
        double = {f"module.{n}": t.double() for n, t in released.items()}
        for content in (released, {"model": double}):
            torch.save(content, file)
            rebuilt, info = load_checkpoint(file)
            assert info["task"] == task and rebuilt.config == source.config
            assert torch.equal(rebuilt(images()), source(images()))
    gate = "image_encoder.mrm_blocks.0.fpn1.6.res_gate.0.weight"
    for change, message in (
        ({gate: None}, 'Missing key.* "mrm.0.gate2.w1.weight".$'),
        ({"mask_decoder.extra": torch.zeros(1)}, 'Unexpected key.* "mask_decoder.extra".$'),
        ({gate: torch.zeros(3, 16)}, "mrm.0.gate2.w1.weight: copying a param .*3, 16.*16, 16"),
    ):
        broken = {n: t for n, t in (released | change).items() if t is not None}
        with refused(f"^released checkpoint: Error.* TSSAM: .*{message}"):
            load_released(tiny(2, high_freq=True), broken)
        torch.save(broken, file)
        with refused(f"theirs.pth: Error.* TSSAM: .*{message}"):
            load_checkpoint(file)
    torch.save({n: t for n, t in released.items() if "pos_embed" not in n}, file)
    with refused("theirs.pth: no checkpoint of train.py or the authors .SAM's weights go with"):
        load_checkpoint(file)


def checkpoint(path: Path, model: TSSAM, sam: Path | None = None, task="sod", **info) -> Path:
    """A checkpoint as train.py writes it, of an encoder from SAM's file, or of a random one."""
    state = model.image_encoder.state_dict()
    encoder = dict(fingerprint=tssam.fingerprint(state), sam_checkpoint=sam and str(sam))
    encoder["weights"] = state if sam is None else None
    tssam.save_checkpoint(path, model, task=task, encoder=encoder, **info)
    return path


@torch.no_grad()
def test_checkpoints_hold_the_trained_part_and_rebuild_the_model(tmp_path, monkeypatch):
    sam = sam_file(tmp_path / "sam.pth", 64)
    model = build_tssam("tiny", SIZE, True, sam, csa_blocks=[1, 3], mrm_blocks=(0, 2))
    model(images())  # the batch norms' statistics must come back too
    path = checkpoint(tmp_path / "best.pt", model, sam, task="shadow", epoch=3)
    logits, stored = model.eval()(images()), load(path)
    assert not any(name.startswith("image_encoder") for name in stored["trained"])
    assert not list(tmp_path.glob("*.tmp"))
    for given in (None, sam):  # remembered, and named
        rebuilt, info = load_checkpoint(path, given)
        assert (info["task"], info["epoch"], rebuilt.config) == ("shadow", 3, model.config)
        assert torch.equal(rebuilt(images()), logits) and not rebuilt.training
    moved = sam.rename(tmp_path / "moved.pth")  # the published weights again, then
    with monkeypatch.context() as patch:
        patch.setattr(tssam, "sam_weights", lambda name: moved)
        assert torch.equal(load_checkpoint(path)[0](images()), logits)
    # Another encoder, by one number of any part: as a LoRA that was merged.
    for name in ("blocks.3.mlp.lin2.bias", "patch_embed.proj.weight", "neck.1.bias"):
        state = load(moved)
        state[f"image_encoder.{name}"].view(-1)[0] += 1e-3
        torch.save(state, tmp_path / "other.pth")
        for trained in (path, checkpoint(tmp_path / "random.pt", model)):
            with refused(".pt: trained on another encoder, not the one loaded; pass it with"):
                load_checkpoint(trained, tmp_path / "other.pth")
    assert torch.equal(load_checkpoint(tmp_path / "random.pt")[0](images()), logits)
    with refused("nowhere.pth: cannot be read as a checkpoint"):  # given, so not looked for
        load_checkpoint(path, tmp_path / "nowhere.pth")
    del stored["trained"]["ffd.head.bias"]
    torch.save(stored, path)
    with refused('best.pt: Error.* Missing key.* "ffd.head.bias".$'):
        load_checkpoint(path, moved)


def test_files_that_are_refused(tmp_path):
    """Anything but tensors and plain values is refused unread."""
    path, other = sam_file(tmp_path / "sam.pth", SIZE), tmp_path / "x.pth"
    state = load(path)
    renamed = {f"vision_{name}": t for name, t in state.items()}
    incomplete = {n: t for n, t in state.items() if not n.endswith("blocks.3.norm1.weight")}
    for sam, content, message in (
        ("vit_b", state, 'Missing key.*"blocks.4.norm1.weight"'),
        ("tiny", renamed, 'Missing key.*"pos_embed"'),
        ("tiny", incomplete, 'Missing key.* "blocks.3.norm1.weight".$'),
    ):
        torch.save(content, other)
        with refused(f"x.pth, as the encoder of --sam {sam}: Error.*{message}") as error:
            build_tssam(sam, 64, sam_checkpoint=other)
        assert len(str(error.value)) < 300 + 150 and "\n" not in str(error.value)
    nested = {"model": "vit_b", "state_dict": {f"module.{n}": t for n, t in state.items()}}
    for wrapped in ({"model": state, "epoch": 3}, nested):
        torch.save(wrapped, other)
        encoder = build_tssam("tiny", SIZE, sam_checkpoint=other).image_encoder
        assert torch.equal(encoder.pos_embed, state["image_encoder.pos_embed"])
    unreadable = r"cannot be read as a checkpoint \({}\); pass a state_dict\(\) saved with torch"
    for content, message in (
        (path.read_bytes()[:1000], unreadable.format("RuntimeError")),
        (b"<html>", unreadable.format("UnpicklingError")),
        (b"", unreadable.format("EOFError")),
        ({"f": functools.partial(print)}, unreadable.format("UnpicklingError")),
        ([1], "contains a list"),
        ({1: 2}, "no checkpoint of train.py or the authors"),
    ):
        other.write_bytes(content) if isinstance(content, bytes) else torch.save(content, other)
        with refused(f"x.pth: {message}"):
            load_checkpoint(other)
    for name, reason in (("nowhere.pth", "No such file or directory"), ("", "Is a directory")):
        with refused(unreadable.format(reason)):
            load_checkpoint(tmp_path / name)
    for arguments, message in (
        (("vit_x",), "no encoder is called 'vit_x'"),
        (("tiny", 100), "100 is not a positive multiple of 16"),
        (("tiny", 64, False, None, [4]), "tiny has the blocks 0 to 3, and no block 4"),
    ):
        with refused(message):
            build_tssam(*arguments)
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\), not \(batch, 3, 128, 128\)"):
        tiny()(images(2, 64))


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # torch.save raises the second
def test_a_failed_write_leaves_the_file_before_it(tmp_path, monkeypatch, error):
    path, steps = tmp_path / "last.pt", []
    for name in ("fsync", "replace"):
        watched(monkeypatch, os, name, lambda *_, name=name: steps.append(name))
    tssam.write_atomically(path, lambda file: file.write_text("whole"))
    assert steps == ["fsync", "replace"]
    full = error("no space left\nat all")
    with refused(r"last.pt: cannot be written \(no space left\); the previous file is untouched$"):
        tssam.write_atomically(path, lambda file: (file.write_text("half"), fail_with(full)))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["whole"]
    # Temporary names have a fixed length.
    path, seen = tmp_path / ("b" * 251 + ".png"), []
    tssam.write_atomically(path, lambda file: (seen.append(file), file.touch()))
    assert len(seen[0].name) < 30 and seen[0].name.startswith(".") and path.exists()


def test_download(tmp_path, monkeypatch):
    """SAM's public URL replaced by a folder of this machine."""
    assert [f"{sam} {file} {sha256}" for sam, (file, sha256) in tssam.SAM_FILES.items()] == [
        "vit_b sam_vit_b_01ec64.pth ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        "vit_l sam_vit_l_0b3195.pth 3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        "vit_h sam_vit_h_4b8939.pth a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ]
    assert tssam.SAM_URL == "https://dl.fbaipublicfiles.com/segment_anything/"
    monkeypatch.setattr(tssam, "SAM_URL", f"{tmp_path.as_uri()}/")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(tssam, "SAM_FILES", {"vit_b": ("sam_b.pth", sha256)})
    path = tmp_path / "checkpoints" / "sam_b.pth"
    for content in (None, b"weightz"):  # no such file, a wrong hash
        if content:
            (tmp_path / "sam_b.pth").write_bytes(content)
        where = re.escape(f"; put the file at {path}")
        with refused(rf"sam_b.pth could not be downloaded \(.*\){where}$"):
            tssam.sam_weights("vit_b", path.parent)
        assert list(path.parent.iterdir()) == []
    (tmp_path / "sam_b.pth").write_bytes(b"weights")
    assert tssam.sam_weights("vit_b", path.parent).read_bytes() == b"weights"
    (tmp_path / "sam_b.pth").unlink()  # there already: not asked for again
    assert tssam.sam_weights("vit_b", path.parent) == path
    with refused("tiny: no weights are published for it"):
        tssam.sam_weights("tiny", path.parent)


# -------------------------------------------------------------------------------------------------
# Data, metrics and protocols

EXIF = {how: Image.Exif() for how in (1, 3, 6)}  # shown upright, half turned, turned
for orientation, exif in EXIF.items():
    exif[0x0112] = orientation
ON_ITS_SIDE, BROKEN_EXIF = EXIF[6], b"Exif\0\0" + bytes(range(60))


def make_pairs(root: Path, folders: str, stems="ab", side: int = 40, ending="") -> list[Pair]:
    """Pairs in root/<images> and root/<masks>, given as "a/b + c"; `ending` is in masks' names."""
    rng, (images, masks) = np.random.default_rng(0), (root / f for f in folders.split(" + "))
    pairs = [Pair(s, images / f"{s}.jpg", masks / f"{s}{ending}.png") for s in stems]
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for i, (_, image, mask) in enumerate(pairs):
        Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(image)
        pixels = np.zeros((side, side + 8), np.uint8)
        pixels[5 : 30 - i, 5:30] = 255
        Image.fromarray(pixels).save(mask)
    return pairs


def found_in(root: Path | str, splits: tuple = evaluate.TEST, **how) -> evaluate.ImageSet:
    (found,) = evaluate.find_sets([root], splits, **how)
    return found


def test_layouts(tmp_path):
    """A layout, folders of its train split if it has splits, its test sets, their folders."""
    for layout, train_folders, tests, folders in cases("""
        DUTS       | DUTS-TR/DUTS-TR-Image + DUTS-TR/DUTS-TR-Mask | DUTS-TE                    | DUTS-TE/DUTS-TE-Image + DUTS-TE/DUTS-TE-Mask
        ECSSD      |                                              | ECSSD                      | images + ground_truth_mask
        DUT-OMRON  |                                              | DUT-OMRON                  | DUT-OMRON-image + pixelwiseGT-new-PNG
        HKU-IS     |                                              | HKU-IS                     | imgs + gt
        PASCAL-S   |                                              | PASCAL-S                   | Imgs + masks
        Pascal_S   |                                              | Pascal_S                   | Image + gt
        COD        | TrainDataset/Imgs + TrainDataset/GT          | CAMO CHAMELEON COD10K NC4K | TestDataset/{}/Imgs + TestDataset/{}/GT
        older      | TrainDataset/Image + TrainDataset/GT         | CAMO                       | TestDataset/CAMO/Image + TestDataset/CAMO/GT
        ISTD       | train/train_A + train/train_B                | ISTD                       | test/test_A + test/test_B
        CAMO-V.1.0 | Images/Train + GT                            | CAMO-V.1.0                 | Images/Test + GT
        mine       |                                              | mine                       | My-IMAGES + my_Masks
        yolo       | images/train + masks/train                   | yolo                       | images/test + masks/test
        mmseg      | img_dir/Training + ann_dir/Training          | mmseg                      | img_dir/Test + ann_dir/Test
    """):
        above, root = tmp_path / f"above {layout}", tmp_path / f"above {layout}" / layout
        train_pairs = make_pairs(root, train_folders, "tu") if train_folders else []
        test_pairs = {n: make_pairs(root, folders.replace("{}", n)) for n in tests.split()}
        if layout == "ISTD":  # _C is the shadow-free image
            (root / "train/train_C").mkdir()
        for given in (root, above):
            found = evaluate.find_sets([given], evaluate.TEST)
            assert {s.name: s.pairs for s in found} == test_pairs, layout
            assert all(s.split == ("test" if train_pairs else None) for s in found), layout
        s = found_in(root, evaluate.TRAIN)
        assert s.pairs == (train_pairs or next(iter(test_pairs.values()))), layout
        if s.folder != str(root):  # the split's own folder, named
            assert found_in(s.folder)[::3] == (s.name, s.pairs), layout


def test_the_words_that_name_folders():
    words = dict(image=evaluate.IMAGE_FOLDERS, mask=evaluate.MASK_FOLDERS) | evaluate.SPLIT_FOLDERS
    expected = []
    for kind, some in cases("""
        image | im image images img img_dir imgs input jpegimages original shadowimages test_a train_a
        mask  | 1st_manual ann_dir annotation annotations ground_truth groundtruth gt gt_object gts label
        mask  | labels manual1 mask masks pixelwisegt_new_png segmentationclass shadowmasks test_b train_b
        train | tr train training traindataset trainingdataset
        val   | val valid validation
        test  | te test testing testdataset testingdataset
    """):
        for word in some.split():
            expected.append((kind, word))
            names = [word, word.upper(), word.replace("_", "-"), word.replace("_", " ")]
            names += [f"my-{word}", f"My_own {word.title()}", f"my{word}", f"{word}_2", f"{word}s2"]
            known = [evaluate.matches(Path(name), words[kind]) for name in names]
            assert known == [True] * 6 + [False] * 3, word
            if kind in evaluate.SPLIT_FOLDERS:
                assert evaluate.split_of(Path("data", f"X-{word.title()}")) == kind
                assert evaluate.name_of(Path("/data/X", word.title())) == "X"
    assert sorted(expected) == sorted((k, word) for k in words for word in words[k].split())
    assert evaluate.split_of(Path("train/latest")) is None
    assert evaluate.name_of(Path("/test")) == "data"  # no folder there has a name of its own


def test_which_folders_and_files_count(tmp_path, monkeypatch, capsys):
    """In a folder above several; with one more ending on all masks; but for what systems hide."""
    for val in ("val", "valid", "Validation"):
        for to in ("{}/Imgs + {}/GT", "images/{} + masks/{}", "Images/{} + masks"):
            root = tmp_path / val / to[:3]
            make_pairs(root, to.replace("{}", "train"), "abcd")
            pairs = {"val": make_pairs(root, to.replace("{}", val), "ef")}
            for split in ("val", "test"):  # without and with a test split
                pairs[split] = pairs.get(split) or make_pairs(root, to.replace("{}", "test"), "gh")
                for splits, taken in ((evaluate.VALIDATION, "val"), (evaluate.TEST, split)):
                    assert found_in(root, splits)[2:] == (taken, pairs[taken])
            assert [pair.name for pair in found_in(root, evaluate.TRAIN).pairs] == [*"abcd"]
    places = "all/A/train all/A/test all/B x/test/C/train zip/A zip/@eaDir zip/.x zip/__MACOSX"
    for place in places.split():
        make_pairs(tmp_path / place, "Imgs + GT")
    for splits, names in ((evaluate.VALIDATION, ["A", "B"]), (evaluate.TRAIN, ["A"])):
        assert [s.name for s in evaluate.find_sets([tmp_path / "all"], splits)] == names
    assert found_in(tmp_path / "x", evaluate.TRAIN)[::2] == ("C", "train")  # the inner name decides
    assert found_in(tmp_path / "zip").name == "A"
    for split, stems in (("train", "ab"), ("test", "cd")):  # masks of both in one folder
        pairs = make_pairs(tmp_path / "one", f"images/{split} + masks", stems, ending="_mask")
    assert found_in(tmp_path / "one").pairs == pairs
    pairs = make_pairs(tmp_path / "hidden", "Imgs + GT")
    image = pairs[0].image.rename(pairs[0].image.with_suffix(".JPG"))
    for hidden in (".Imgs", "@eaDir", "__MACOSX", "Imgs/.ipynb_checkpoints"):
        make_pairs(tmp_path / "hidden" / hidden, "Imgs + GT", "c")
    (tmp_path / "hidden/Imgs/._a.jpg").touch()
    assert found_in(tmp_path / "hidden").pairs == [pairs[0]._replace(image=image), pairs[1]]
    folder = tmp_path / "photos"
    make_pairs(tmp_path, "photos + elsewhere")
    Image.new("RGB", (9, 9)).save(folder / "c.tif")
    (folder / "d.heic").touch()
    (folder / "d.mpg").touch()
    files = sorted(folder.iterdir())
    for name in ("e.png", "lost+found"):
        (folder / name).mkdir()
    refuse = lambda folder: folder.name == "lost+found" and fail_with(PermissionError())  # noqa: E731
    watched(monkeypatch, Path, "iterdir", refuse)
    warning = "photos: skipped 2 files that are no images, such as d.heic"
    for roots in ([folder], files):  # a folder, or photos/*
        evaluate.warn.cache_clear()
        (s,) = evaluate.find_sets(roots, evaluate.TEST, need_masks=False)
        err = capsys.readouterr().err
        assert s.name == "photos" and warning in err
        assert ("lost+found: skipped, because it cannot be listed" in err) == (roots == [folder])
        assert [pair[1:] for pair in s.pairs] == [(file, None) for file in files[:3]]  # to c.tif
    with refused("photos: no image files there, but 1 others, such as d.heic; polygons"):
        found_in(folder / "d.heic")
    s = found_in(folder / "b.jpg", need_masks=False)
    assert str(s) == f"photos: 1 images in {folder}, no masks, no splits"


def test_data_that_cannot_be_used_is_one_error(tmp_path):
    places = "alone more twice several two/A two/B deep/1/2/3/4/5"
    for place in places.split():
        make_pairs(tmp_path / place, "Imgs + GT", "abc")
    make_pairs(tmp_path / "only", "D-TR/Imgs + D-TR/GT")
    make_pairs(tmp_path / "odd", "pictures + labels")
    make_pairs(tmp_path / "photos", "Imgs + elsewhere/GT")
    make_pairs(tmp_path / "orphan", "images/train + masks/train")
    for file in ("alone/GT/b.png", "more/Imgs/b.jpg", "orphan/images/train/b.jpg"):
        (tmp_path / file).unlink()
    (tmp_path / "twice/Imgs/a.bmp").touch()
    for folder in ("several/masks", "empty/Imgs"):
        (tmp_path / folder).mkdir(parents=True)
    for name, splits, message in cases(r"""
        more    | TRAIN | images without a partner: 0; partners without an image: 1 such as .*more/GT/b.png; names must agree but for words
        nowhere | TEST  | nowhere: no such file or folder; .* with --data
        alone   | TRAIN | images without a partner: 1 such as .*alone/Imgs/b.jpg; partners without an image: 0;
        twice   | TEST  | a.bmp and .*a.jpg: one name for two files; pass IMAGES,MASKS, or
        orphan  | TRAIN | images without a partner: 0; partners without an image: 1 such as .*/b
        several | TEST  | several: GT and masks: which. Name the two folders: --data IMAGES,MA
        only    | TEST  | only: no images beside masks for the test split .*pair up: .*D-TR/Imgs
        odd     | TEST  | odd: no images beside masks for the test split.*odd/pictures,.*odd/labels
        photos  | TRAIN | photos: no images beside masks.*photos/Imgs,.*photos/elsewhere/GT
        empty   | TEST  | Imgs: no image files there, but 0 others; polygons
    """):
        with refused(message) as error:
            evaluate.find_sets([str(tmp_path / name)], getattr(evaluate, splits))
        assert "\n" not in str(error.value)
    for splits in (evaluate.TRAIN, evaluate.TEST):
        assert [s.name for s in evaluate.find_sets([tmp_path / "two"], splits)] == ["A", "B"]
    assert found_in(tmp_path / "deep").name == "5"


def test_images_masks_and_maps_of_every_kind(tmp_path):
    disk = (np.hypot(*np.mgrid[-10:10, -15:15]) < 8).astype(np.uint8)
    white, edges, file = disk * 255, disk * 200, tmp_path / "mask.png"
    edges[:, 15:] = disk[:, 15:]
    palette = Image.fromarray(disk).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    masks = [(palette, white)] + [(Image.fromarray(white).convert(m), white) for m in ("1", "RGB")]
    masks += [(Image.fromarray(a), white) for a in (disk, disk * 128, np.uint16(disk) * 65535)]
    masks += [(Image.fromarray(a), a) for a in (edges, disk * 0)]  # grey levels stay
    for mask, expected in masks:
        mask.save(file)
        read = evaluate.read_mask(file)
        assert read.mode == "L" and np.array_equal(np.asarray(read), expected)
        resized = evaluate.foreground(read.resize((60, 60), 0), PAPER, 60)
        assert np.array_equal(resized[::3, ::2], expected > 0)
        assert np.array_equal(evaluate.foreground(read, FULL_SIZE, 60), expected > 128)
    photo = tmp_path / "photo.jpg"
    for exif, mask, height in cases("turned | | 30\n turned | mask.png | 20\n broken | | 20"):
        Image.fromarray(white).save(photo, exif=BROKEN_EXIF if exif == "broken" else ON_ITS_SIDE)
        pair = Pair("photo", photo, file if mask else None)  # masks: drawn on the pixels
        assert evaluate.read_sample(pair, 32, PAPER).size == (int(height), 50 - int(height))
    assert Image.MAX_IMAGE_PIXELS is None  # a large photograph is read
    # Maps are read as they are: floats of at most 1 are times 255; lossy ones keep their levels.
    levels = np.linspace(0, 255, 240, dtype=np.float32).reshape(12, 20)
    for values in (levels / 255, levels):
        Image.fromarray(values).save(tmp_path / "map.tif")
        read = np.asarray(evaluate.read_grey(tmp_path / "map.tif")[0])
        assert np.abs(read - levels).max() <= 1 and read.max() == 255
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "map.jpg")
    assert len(np.unique(evaluate.read_grey(tmp_path / "map.jpg")[0])) > 50
    # Masks in lossy files are cut at half of their maximum: whatever the colour, the area is right.
    disk = np.hypot(*np.mgrid[-60:60, -80:80]) < 40
    colours = [(v, v, v) for v in (1, 10, 100, 127, 128, 150, 255)]
    colours += [(255, 0, 0), (128, 0, 0), (0, 128, 0), (0, 0, 255), (0, 255, 0)]
    how = dict(tif=dict(compression="jpeg"), jp2=dict(irreversible=True, quality_layers=[20]))
    for ending in ("jpg", "webp", "tif", "jp2", "mpo", "avif"):
        for colour in colours:
            file, lossy = tmp_path / f"x.{ending}", dict(quality=60 if min(colour) >= 100 else 75)
            Image.fromarray(disk[..., None] * np.uint8(colour)).save(file, **how.get(ending, lossy))
            mask = np.asarray(evaluate.read_mask(file))
            if max(colour) >= 100 or ending in ("jpg", "tif", "mpo"):
                assert set(np.unique(mask)) == {0, 255}
                assert abs((mask > 0).sum() / disk.sum() - 1) < 0.04, (ending, colour)
                assert min(colour) < 100 or np.mean((mask > 0) != disk) < 0.02


def test_what_is_warned_of(tmp_path, capsys):
    pairs = make_pairs(tmp_path, "Imgs + GT", "abcd")

    def warned(pairs: list[Pair]) -> str:
        evaluate.warn.cache_clear()
        evaluate.check_files(evaluate.ImageSet("d", "d", None, pairs), 2, size=8)
        return capsys.readouterr().err

    photo, mask = (Image.open(file) for file in pairs[0][1:])
    grey, alpha, dot = mask.convert("RGB"), mask.convert("RGBA"), Image.new("L", mask.size)
    alpha.putalpha(mask)
    dot.putpixel((1, 1), 255)
    red = grey.point([*range(256), *[0] * 512])
    deep = Image.fromarray(np.full((40, 48), 1000, np.uint16))
    coloured = "masks or maps have colours or a varying alpha, and are read by brightness"
    turned = "files are turned by their EXIF, or their masks are; beside a mask it is ignored"
    bits = "files have more than 8 bits per channel; values above"
    files = [("mask.png", m, "", b"") for m in (mask, grey, *map(mask.convert, ("P", "RGBA")))]
    files += [("mask.png", m, coloured, b"") for m in (alpha, red)]
    files += [("mask.png", dot, "masks are empty once resized for the network", b"")]
    files += [("mask.png", mask, turned, EXIF[6]), ("photo.jpg", photo, turned, EXIF[6])]
    files += [("photo.jpg", photo, turned, EXIF[3]), ("photo.jpg", photo, "", EXIF[1])]
    files += [("photo.png", photo, "", BROKEN_EXIF), ("photo.png", deep, bits, b"")]
    files += [("photo.tif", deep.convert("F"), bits, b"")]
    for name, image, warning, exif in files:
        image.save(tmp_path / name, exif=exif)
        changed = {"mask" if name == "mask.png" else "image": tmp_path / name}
        err = warned([pairs[0]._replace(**changed), *pairs[1:]])
        assert err.startswith(f"warning: d: 1 of 4 {warning}") if warning else err == "", name
    # A border to be ignored, or an object in a darker colour; too small a one in one of four masks.
    text = "masks shrink by a fifth or more from above 0 (training, paper) to above 128 (full-size)"
    text = f"warning: d: 1 of 4 {text} (such as {pairs[2].image})\n"
    for border, expected in ((6, text), (4, "")):
        for i, pair in enumerate(pairs):
            rows = np.repeat(np.uint8([255, 100 * (i == 2), 0]), [20, border, 20 - border])
            Image.fromarray(np.tile(rows[:, None], 48)).save(pair.mask)
        assert warned(pairs) == expected
    for i, levels in enumerate(((0, 0), (1, 2), (5, 255))):  # empty, labels, under a veil
        Image.fromarray(np.resize(np.uint8(levels), (40, 48))).save(pairs[i].mask)
    few = f"warning: d: 1 of 4 masks are empty (such as {pairs[0].image})\nwarning: d: 2 of 4 masks have no"
    assert warned(pairs).startswith(few)
    for i, what in enumerate(("are empty", "have no background")):
        with refused(rf"d: 1 of 1 masks {what} \(such as .*[ab].jpg\); check how .*GT was made"):
            warned(pairs[i : i + 1])


def normalised(pixels: np.ndarray) -> np.ndarray:
    mean, deviation = np.float32([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (pixels / np.float32(255) - mean) / deviation


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_training_batches(tmp_path, recipe):
    pairs = make_pairs(tmp_path, "Imgs + GT", "abcd")
    args = argparse.Namespace(recipe=recipe, size=32, batch_size=2, micro_batch=2, seed=3)
    args.workers, args.device = 1, "cpu"
    rng = np.random.default_rng((3, 1))
    order, mirrored = rng.permutation(4), rng.random(4) < 0.5
    assert mirrored.any() and not mirrored.all()
    batches = list(train.micro_batches(pairs, args, 1))
    assert [(x.shape, m.shape) for x, m in batches] == [((2, 3, 32, 32), (2, 1, 32, 32))] * 2
    for x, m, place in zip(*(torch.cat(t) for t in zip(*batches, strict=True)), order, strict=True):
        pixels = normalised(np.asarray(Image.open(pairs[place].image).resize((32, 32), 2)))
        truth = np.asarray(Image.open(pairs[place].mask).resize((32, 32), 0)) / np.float32(255)
        if recipe == "released" and mirrored[place]:
            pixels, truth = pixels[:, ::-1].copy(), truth[:, ::-1].copy()
        assert same(x, torch.from_numpy(pixels).movedim(-1, 0), 1e-6)
        assert torch.equal(m[0], torch.from_numpy(truth)) and 0.2 < truth.mean() < 0.4


@pytest.mark.parametrize("count", [0, 3])
def test_in_threads(count):
    """In order, by so many threads, never far ahead; an error of one job arrives."""
    drawn, threads = [], set()
    jobs = (drawn.append(threading.current_thread()) or i for i in range(60))

    def work(i: int) -> int:
        threads.add(threading.current_thread().name)
        time.sleep(0.002 * (i % 3))
        return i * i

    for i, result in enumerate(evaluate.in_threads(work, jobs, count)):
        assert result == i * i and len(drawn) <= i + 1 + 2 * count
    assert i == 59 and len(threads) == max(1, count) and set(drawn) == {threading.main_thread()}
    with pytest.raises(ZeroDivisionError):
        list(evaluate.in_threads(lambda i: 1 // (5 - i), range(60), count))


def metrics_of(samples: list, task: str, protocol: str) -> dict[str, float]:
    """A dataset's columns, of predictions in [0, 1], in 8 bits for the full-size protocol."""
    samples = [(grey.astype(float) * 255, mask) for grey, mask in samples]
    if protocol == "full-size":
        samples = [(grey.round().astype(np.uint8), mask) for grey, mask in samples]
    rows = [evaluate.score(*sample, task, evaluate.PROTOCOLS[protocol]) for sample in samples]
    return evaluate.average(rows, evaluate.PROTOCOLS[protocol])


def by_the_toolbox(samples: list, task: str, protocol: str) -> dict[str, float]:
    """A dataset's columns: PySODMetrics stepped over all samples, BER from counted pixels."""
    p, errors = py_sod_metrics, []
    metrics = dict(sm=p.Smeasure(alpha=0.5), em=p.Emeasure(), mae=p.MAE(), fm=p.Fmeasure(beta=0.3))
    metrics |= dict(wfm=p.WeightedFmeasure(beta=0.3 if protocol == "paper" else 1))
    for prediction, mask in samples:
        grey = prediction if prediction.dtype == np.uint8 else prediction.astype(float) * 255
        grey = grey.astype(np.float32).round().astype(np.uint8) if protocol == "full-size" else grey
        for metric in metrics.values():
            metric.step(grey, mask.astype(np.uint8) * 255)
        found = grey > 125
        errors.append([(found & ~mask).sum(), (~mask).sum(), (~found & mask).sum(), mask.sum()])
    fp, negative, fn, positive = np.vstack([errors, np.sum(errors, 0)]).T
    ber = 50 * (fp / negative + fn / positive)
    sm, em, mae, fm, wfm = (metric.get_results()[name] for name, metric in metrics.items())
    e, f = em["curve"], fm["curve"]
    every = dict(S=sm, E=e.mean(), wF=wfm, MAE=mae, maxF=f.max(), adpF=fm["adp"], meanF=f.mean())
    every |= dict(maxE=e.max(), BER=ber[:-1].mean(), BER_pooled=ber[-1])
    names = ["BER", "BER_pooled"] if task == "shadow" else list(every)[:-2]
    return {n: every[n] for n in (names if protocol == "full-size" else names[: len(names) // 2])}


def soft_map(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A prediction (uint8) that is right in part, and its mask."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    cy, cx, r = rng.uniform([0.3, 0.3, 0.15], [0.7, 0.7, 0.3])
    mask = np.hypot(y - cy, x - cx) < r
    level = rng.uniform(0.7, 1.3) * r - np.hypot(y - cy - 0.05, x - cx)
    grey = 255 / (1 + np.exp(-rng.uniform(5, 30) * level)) + rng.normal(0, 8, mask.shape)
    return grey.clip(0, 255).astype(np.uint8), mask


@pytest.mark.filterwarnings("ignore:Mean of empty slice|invalid value")  # as evaluate.py does
@pytest.mark.parametrize("protocol, beta", [("paper", 0.3), ("full-size", 1)])
def test_metrics_by_hand(protocol, beta):
    """Weighted F by Margolin et al.'s definition: the object is found; a pixel 5 away from it is wrong. Its error
    weighs 2 - 0.5^(5/5) = 1.5, so that precision is 4 / (4 + 1.5) and recall 1."""
    mask = np.arange(10) < [[2], [2]]
    prediction, precision = mask.astype(np.float32), 4 / 5.5
    prediction[0, 6] = 1
    metrics = metrics_of([(prediction, mask)], "sod", protocol)
    assert metrics["wF"] == pytest.approx((1 + beta) * precision / (1 + beta * precision))
    assert metrics["MAE"] == pytest.approx(1 / 20)
    # Predictions are stretched to [0, 1] first; S of an empty mask is one less the mean.
    faint = np.array([[0.2, 0.6, 0.2, 0.2]], np.float32)
    metrics = metrics_of([(faint, np.zeros((1, 4), bool))], "sod", protocol)
    assert metrics["MAE"] == pytest.approx(0.25) and metrics["S"] == pytest.approx(0.75)
    # A metric that is nan counts 0.
    maps, masks = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
    samples = list(zip(maps, masks > 0.5, strict=True))
    whole = metrics_of(samples[:2], "sod", protocol)["S"]
    samples[2][1][:-1] = False  # all foreground in the last row
    assert metrics_of(samples, "sod", protocol)["S"] == pytest.approx(2 / 3 * whole)
    for height, width in ((1, 2), (2, 1)):
        for value in (False, True):
            sample = maps[0, :height, :width], np.full((height, width), value)
            assert all(0 <= m <= 2 for m in metrics_of([sample], "sod", protocol).values())
    # BER: nothing of a faint map reaches the threshold, stretched or not.
    mask = np.arange(10) < [[4]] * 10
    faint = np.full((10, 10), 0.3, np.float32)
    half = faint.copy()
    half[:, 4:] = 125 / 255 - 1e-6  # just below it
    half[:, :3] = 126 / 255  # 30 of 40 found
    half[:6, 9] = 0.9  # 6 of 60 wrongly found
    missed = {"BER": 50.0} if protocol == "paper" else {"BER": 50.0, "BER_pooled": 50.0}
    assert metrics_of([(faint, mask)], "shadow", protocol) == pytest.approx(missed)
    # The last: 30 of 40, nothing wrongly.
    samples = [(faint, mask), (half, mask), (half[:, :8], mask[:, :8])]
    metrics = metrics_of(samples, "shadow", protocol)
    assert metrics["BER"] == pytest.approx(100 * (0.5 + (10 / 40 + 6 / 60) / 2 + (10 / 40) / 2) / 3)
    if protocol == "full-size":
        assert metrics["BER_pooled"] == pytest.approx(100 * (60 / 120 + 6 / 160) / 2)
    # A class that an image does not have counts as missed.
    for value, expected in ((False, 50 + 100 * 36 / 100 / 2), (True, 50 + 100 * 64 / 100 / 2)):
        one_sided = [(half, np.full((10, 10), value))]
        assert metrics_of(one_sided, "shadow", protocol)["BER"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:This class will be removed")  # PySODMetrics, of Fmeasure
@pytest.mark.parametrize("name", ["paper", "full-size"])
@pytest.mark.parametrize("task", ["sod", "cod", "shadow"])
def test_from_files_to_the_toolboxs_numbers(tmp_path, task, name):
    """Of images of different sizes; a mask has another size than its image, one is of 0 and 1, one is faint."""
    model = nn.Linear(1, 1)  # stands in for a TSSAM, with logits from an image's brightness
    model.config, model.forward = {"image_size": 32}, lambda x: 2 * x.mean(1, True) + x[:, :1]
    pairs, made, rng = make_pairs(tmp_path, "Imgs + GT", "abcdef"), [], np.random.default_rng(0)
    for i, (_, image_file, mask_file) in enumerate(pairs):
        image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image.resize((30 + 7 * i, 60 - 5 * i)).save(image_file)
        mask = Image.new("L", (30 + 7 * i + (i == 2), 60 - 5 * i))
        for box, faint in (((5, 5, 25, 20), 128), ((15, 10, 25, 20), 129)):  # full-size: above 128
            ImageDraw.Draw(mask).ellipse(box, fill={3: 1, 4: faint}.get(i, 255))
        mask.save(mask_file)
        x = normalised(np.asarray(Image.open(image_file).resize((32, 32), 2)))
        logits, mask = torch.from_numpy(2 * x.mean(-1) + x[..., 0]), np.asarray(mask)
        if name == "paper":
            rows, columns = (((np.arange(32) + 0.5) * n / 32).astype(int) for n in mask.shape)
            mask = mask[rows][:, columns] > 0
        else:
            logits = F.interpolate(logits[None, None], mask.shape, mode="bilinear")[0, 0]
            mask = mask > (128 if mask.max() > 1 else 0)
        made.append((logits.sigmoid().numpy(), mask))
    expected, metrics = (of(made, task, name) for of in (by_the_toolbox, metrics_of))
    assert metrics == pytest.approx(expected, rel=1e-9)
    assert all(type(value) is float for value in metrics.values())
    # Several images: a mean of maxima is not the maximum of means, pooling is no mean.
    alone = [by_the_toolbox([sample], task, name) for sample in made]
    for column in {"maxF", "maxE", "BER_pooled"} & metrics.keys():
        assert abs(np.mean([row[column] for row in alone]) - metrics[column]) > 1e-3
    maps, protocol, results = tmp_path / "maps", evaluate.PROTOCOLS[name], []
    for how in (dict(batch_size=1, workers=0), dict(batch_size=4, workers=1, save=maps)):
        rows = list(evaluate.score_images(model, pairs, task, protocol, **how))
        results.append(evaluate.average(rows, protocol))
    assert results[0] == results[1] == pytest.approx(metrics, abs=1e-4)
    for i, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
        saved = pair._replace(image=maps / f"{pair.name}.png")
        with Image.open(pair.image) as image, Image.open(saved.image) as saved_map:
            assert saved_map.size == image.size and saved_map.mode == "L"
        if name == "full-size" and i != 2:  # the same from saved maps of the mask's size
            again = evaluate.score_map(saved, task, 1)
            assert all(np.array_equal(again[column], row[column]) for column in row)


# -------------------------------------------------------------------------------------------------
# The scripts


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folder a test runs in, with `data`: train and test pairs."""
    make_pairs(tmp_path / "data", "train/Imgs + train/GT", "abcde")
    make_pairs(tmp_path / "data", "test/Imgs + test/GT", "xyz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    def says(self, text: str = "") -> "Ended":
        assert self.code == 0 and text in self.out, self.err
        return self

    def refuses(self, message: str) -> "Ended":
        assert self.code == 2 and message in self.err, self.err
        return self


@pytest.fixture
def run(here, monkeypatch, capsys) -> Callable[[ModuleType, str], Ended]:
    """train.py or evaluate.py in this process: run(train, "--demo")."""

    def run(module: ModuleType, command: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *command.split()])
        monkeypatch.setattr(evaluate, "on_stop", lambda message: None)  # pytest's own handlers stay
        monkeypatch.setattr(torch.version, "cuda", None)  # no warning that there is no GPU
        evaluate.warn.cache_clear()
        try:
            code = evaluate.run(module.main) or 0
        except SystemExit as stop:
            code = stop.code
        return Ended(code, *capsys.readouterr())

    return run


TINY = "--sam tiny --sam-checkpoint random --size 64 --batch-size 2 --device cpu --workers 0"
SMALL = f"{TINY} --data data"
VARIABLES = {"PYTHONPATH": str(Path(tssam.__file__).parent), "OMP_NUM_THREADS": "1"}


def in_a_process(command: list[str], arguments: str = "") -> subprocess.CompletedProcess:
    command, environment = [sys.executable, *command, *arguments.split()], os.environ | VARIABLES
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def watched(patch: pytest.MonkeyPatch, owner, name: str, look=lambda *args: args) -> list:
    """What a function is called with, or what `look` sees of it, as it is called from now on."""
    seen, call = [], getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **how: (seen.append(look(*a)), call(*a, **how))[1])
    return seen


def weights_of(path: str) -> dict[str, torch.Tensor]:
    return load(path)["trained"]


def same_weights(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def is_statistic(name: str) -> bool:
    return re.search("running|num_batches", name) is not None


def read_rows(path: str) -> list[dict[str, str]]:
    return [*csv.DictReader(Path(path).read_text().splitlines())]


def numbers(path: str) -> list[dict[str, str]]:
    """The rows of a log.csv but for its times."""
    times = ("images_per_s", "peak_MB", "seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in read_rows(path)]


# What `train.py --data data` and `evaluate.py --ckpt a.pt` run with. Sources: the paper (III-A), the release, ours.
PAPERS = dict(sam="vit_h", lr=8e-4, epochs=80, batch_size=8, recipe="paper", csa_blocks=None)
RELEASE = dict(size=1024, mrm_blocks=None)
OURS = dict(task="sod", data=["data"], val=None, demo=False, sam_checkpoint=None, init=None, seed=0)
OURS |= dict(precision="fp32", out=Path("runs/sod-vit_h"), resume=None, accumulate=1, workers=8)
OURS |= dict(device="cpu", grad_checkpoint=False, micro_batch=8)
NEW = PAPERS | RELEASE | OURS
SCORE = dict(ckpt=["a.pt"], maps=None, sam_checkpoint=None, data=None, task="sod", csv=None)
SCORE |= dict(protocol=PAPER, precision="fp32", save=None, batch_size=2, workers=8, device="cpu")
SHADOW = dict(task="shadow", sam="vit_b", epochs=100, out=Path("runs/shadow-vit_b"))
SHADOW |= dict(accumulate=4, micro_batch=2, recipe="released")
BLOCKS = dict(csa_blocks=[2, 3], mrm_blocks=[1])
DEMO = NEW | dict(demo=True, out=Path("runs/demo"), data=["runs/demo/DUTS"], sam="tiny", size=256)
DEMO |= dict(sam_checkpoint="random", epochs=10, batch_size=4, micro_batch=4, lr=2e-3)
MAPS_ARE = dict(ckpt=None, maps=Path("data"), data=["data"], protocol=FULL_SIZE)
RUNS_WITH = {
    "train --data data": NEW,
    "train --data data --task cod": NEW | dict(task="cod", out=Path("runs/cod-vit_h")),
    "train --data data --task shadow --sam vit_b --accumulate 4 --recipe released": NEW | SHADOW,
    "train --data data --csa-blocks 2 3 --mrm-blocks 1": NEW | BLOCKS,
    "train --demo": DEMO,
    "train --demo --lr 1e-3 --epochs 3 --out d": DEMO
    | dict(lr=1e-3, epochs=3, out=Path("d"), data=["d/DUTS"]),
    "evaluate --ckpt a.pt": SCORE,
    "evaluate --ckpt a.pt --protocol full-size": SCORE | dict(protocol=FULL_SIZE),
    "evaluate --maps data --data data": SCORE | MAPS_ARE | dict(precision=None, device=None),
}
BEST = """ task | four epochs' scores | the epochs that are marked as the best so far
sod    | 0.5 0.7 0.7 0.6 | 1 2
cod    | 0.5 0.4 0.3 0.6 | 1 4
shadow | 5.0 3.0 3.0 4.0 | 1 2
shadow | 3.0 4.0 5.0 2.0 | 1 4"""
RECIPES = """ task | loss | optimizer | options
sod    | bce_iou      | Adam  |
shadow | balanced_bce | AdamW | --recipe released --seed 3
cod    | bce_iou      | Adam  | --accumulate 2 --grad-checkpoint"""
STOPPED = """import itertools, os, signal, sys  # train.py, which stops itself after a checkpoint
import evaluate, train, tssam
when, number = sys.argv.pop(1).split("-")
save, saved = tssam.save_checkpoint, itertools.count(1)
def stop_at(*args, **info):
    save(*args, **info)
    if next(saved) == int(number):
        os.kill(os.getpid(), getattr(signal, when))
tssam.save_checkpoint = stop_at
evaluate.run(train.main)"""
NOTEBOOK = """import io, sys, threading, evaluate, train
class OutStream(io.TextIOBase):  # as ipykernel's
    def write(self, text): return sys.__stdout__.write(text)
sys.stdout = OutStream()
threading.Thread(target=evaluate.run, args=(train.main,)).start()"""
CKPT = "--ckpt model.pt --device cpu --workers 0"
SETS = "--data CAMO ECSSD"
MAPS = "--maps maps --workers 0"


@pytest.fixture
def options(here, monkeypatch) -> Callable[[ModuleType, str], dict]:
    """A script's options from its command line, on a machine of 64 cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)

    def options(module: ModuleType, command: str) -> dict:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *command.split()])
        parsed = module.parse_arguments()
        return vars(parsed[0] if module is train else parsed)

    return options


def test_what_the_scripts_run_with(options, monkeypatch):
    Path("a.pt").touch()
    for command, expected in RUNS_WITH.items():
        script, flags = command.split(maxsplit=1)
        assert options(sys.modules[script], flags) == expected, command
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.empty(1))
    for has_bf16, precision in ((True, "bf16"), (False, "fp32")):
        emulated = lambda including_emulation=True, has=has_bf16: has or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
        chosen = options(train, "--data data")
        assert (chosen["device"], chosen["precision"]) == ("cuda", precision)
        assert options(evaluate, "--maps data --data data")["precision"] is None
        assert options(train, "--data data --device cpu")["precision"] == "fp32"


@pytest.mark.parametrize("task, scores, marked", cases(BEST)[1:])
def test_the_best_epoch(run, monkeypatch, task, scores, marked):
    """The best S, or the lowest BER; of equal ones the earlier. Also where the run was resumed."""
    metric, scores = "BER" if task == "shadow" else "S", [float(s) for s in scores.split()]
    made = iter([{metric: s, "E": 1 - s, "wF": 1 - s, "MAE": s} for s in scores])
    monkeypatch.setattr(train, "validate", lambda *_: next(made))
    texts = watched(monkeypatch, ImageDraw.ImageDraw, "text", lambda *args: args[2])
    with monkeypatch.context() as patch:
        stop_in_epoch_2(patch)
        stopped = run(train, f"{SMALL} --task {task} --epochs 4 --out run").refuses("stopped")
    ended = run(train, "--resume run --workers 0 --device cpu")
    every = re.findall("^epoch (.*)/4  .*  best  ", stopped.out + ended.out, re.M)
    assert every == marked.split()
    assert re.search("^epoch 4/4 .*  0:00:00 left$", ended.out, re.M)
    epoch, score = int(marked[-1]), scores[int(marked[-1]) - 1]
    best = load("run/best.pt")
    assert (best["epoch"], best["metrics"][metric]) == (epoch, score)
    assert f"best:  {metric} {score:.4f}, run/best.pt" in ended.out
    titles = [text for text in map(str, texts) if text.startswith(f"{metric}: ")]
    assert titles[-1] == f"{metric}: {score:.4g} in epoch {epoch}" and "epochs 1 to 4" in texts
    # The learning rate falls along a cosine.
    rates = [1e-7 + (8e-4 - 1e-7) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert [float(row["lr"]) for row in read_rows("run/log.csv")] == pytest.approx(rates, rel=1e-9)


def test_what_checkpoints_hold(here, run, monkeypatch):
    """All that evaluate.py, --resume and a reader need, with absolute paths; the encoder only if random."""
    asked, sam = [], sam_file(here / "sam.pth", 64)
    monkeypatch.setattr(tssam, "sam_weights", lambda name: (asked.append(name), sam)[1])
    pretrained = build_tssam("tiny", 64, sam_checkpoint=sam).image_encoder.state_dict()
    flags = f"{SMALL} --csa-blocks 2 3 --mrm-blocks 1 --task shadow --epochs 1"
    assert run(train, f"{flags} --out random").code == 0
    assert run(train, f"{flags} --out named --sam-checkpoint sam.pth").code == 0 and not asked
    flags = flags.replace("--sam-checkpoint random", "")  # SAM's published weights are the default
    ended = run(train, f"{flags} --out new")
    assert ended.code == 0 and not ended.err and set(asked) == {"tiny"}
    config = dict(sam="tiny", image_size=64, high_freq=True, **BLOCKS)
    about = dict(task="shadow", epoch=1, config=config, val=[str(here / "data/test")])
    for out in ("random", "named", "new"):
        given, file = ("random", None) if out == "random" else (None, str(sam))
        options = dict(data=[str(here / "data")], val=None, sam_checkpoint=given)
        for name in ("best.pt", "last.pt"):
            held = load(f"{out}/{name}")
            assert held == held | about and held["run"] == held["run"] | options
            model, info = load_checkpoint(f"{out}/{name}")
            encoder, state = held["encoder"], model.image_encoder.state_dict()
            assert encoder["sam_checkpoint"] == file and (encoder["weights"] is None) == bool(file)
            assert encoder["fingerprint"] == tssam.fingerprint(state)
            assert out == "random" or same_weights(state, pretrained)
            before = tssam.trained_part(model.state_dict())
            assert held["trained"].keys() == before.keys() and info["epoch"] == 1
            assert ("optimizer" in held) == (name == "last.pt")
        assert held["rows"][0]["epoch"] == 1
    # --init starts from them, and from the authors'.
    torch.save(under_released_names(model), "theirs.pth")
    for file, size in (("new/last.pt", 64), ("theirs.pth", 64), ("new/last.pt", 32)):
        out = f"{Path(file).stem}-{size}"
        ended = run(train, f"{flags} --lr 1e-9 --size {size} --init {file} --out {out}")
        assert ended.code == 0 and ended.err == ""
        tuned = weights_of(f"{out}/best.pt")
        assert tuned.keys() == before.keys()
        for n in filter(lambda n: not is_statistic(n), tuned):
            assert torch.allclose(tuned[n], before[n], atol=1e-7), n
    # SAM's file has moved: named again, on resume and in evaluation.
    sam.rename("moved.pth")
    assert run(train, "--resume named --sam-checkpoint moved.pth --workers 0").code == 0
    assert run(evaluate, "--ckpt named/best.pt --sam-checkpoint moved.pth --workers 0").code == 0
    assert load("named/last.pt")["encoder"]["sam_checkpoint"] == str(sam)  # nothing was left to do


def test_which_sets_are_used(here, run):
    splits = """ there are | validated on, and scored without --data | scored | folders
        train val test | val  | test | {}/Imgs + {}/GT
        train test     | test | test | {}/Imgs + {}/GT
        train val      | val  | val  | {}/Imgs + {}/GT
        train val test | val  | test | Imgs/{} + GT/{}"""
    for i, (there, validated, scored, folders) in enumerate(cases(splits)[1:]):
        images_in, masks_in = (f"d{i}/{folder}" for folder in folders.split(" + "))
        for split in there.split():
            make_pairs(here / f"d{i}", folders.replace("{}", split), (split, f"{split}2"))
        train_set = f"train: d{i}: 2 images in {images_in}, masks in {masks_in}, {{}} split"
        val = f"val:   d{i}: 2 images in {images_in.format(validated)}"
        ended = run(train, f"{TINY} --data d{i} --epochs 1 --out run{i}").says(val)
        ended.says(train_set.replace("{}", "train"))
        val_folder = here / f"d{i}" / ("" if folders.endswith("{}") else validated)
        assert load(f"run{i}/last.pt")["val"] == [str(val_folder)]
        ended = run(train, f"{TINY} --data data --val d{i} --epochs 1 --out other{i}").says(val)
        ended.says("train: data: 5 images in data/train/Imgs")
        ckpt = f"--ckpt run{i}/best.pt --workers 0"
        run(evaluate, ckpt).says(f"d{i}: 2 images in {here}/{images_in.format(validated)}")
        test_set = train_set[7:].replace("{}", scored)
        run(evaluate, f"{ckpt} --data d{i} --save m{i}").says(test_set)
        run(evaluate, f"--maps m{i} --data d{i} --workers 0").says(masks_in.format(scored))


def stop_in_epoch_2(patch: pytest.MonkeyPatch) -> None:
    """Runs are stopped at the end of epoch 2, before it is saved."""
    stop = lambda _, __, epoch: epoch == 2 and fail_with(InputError("stopped"))  # noqa: E731
    watched(patch, train, "check_finite", stop)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_is_in_effect(here, run, monkeypatch, precision):
    """The network runs under autocast with a stored encoder, everywhere; losses do not."""
    dtype = evaluate.PRECISIONS[precision]
    on, sam = precision != "fp32" and dtype, sam_file(here / "sam.pth", 64)
    cast = lambda: torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")  # noqa: E731
    passes = watched(monkeypatch, TSSAM, "forward", lambda model, x: (model.training, cast()))
    stored = watched(monkeypatch, Block, "forward", lambda block, x: block.mlp.lin1.weight.dtype)
    losses = watched(monkeypatch, train, "bce_iou", lambda x, masks: (cast(), x.dtype))
    flags = f"{SMALL} --sam-checkpoint {sam} --precision {precision} --epochs 2 --out run"
    assert run(train, flags).code == 0
    assert set(losses) == {(False, torch.float32)}
    assert set(passes) == {(True, on), (False, on)}
    passes.clear()
    assert run(evaluate, f"--ckpt run/best.pt --precision {precision} --workers 0").code == 0
    assert set(passes) == {(False, on)} and set(stored) == {dtype}
    last = load("run/last.pt")  # fp16: Adam sees gradients that are no longer scaled
    moments = [state["exp_avg"].norm().item() for state in last["optimizer"]["state"].values()]
    assert 1e-4 < max(moments) < 10
    assert precision != "fp16" or last["scaler"]["_growth_tracker"] >= 3  # of four steps


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """As in a terminal; a suite in the background is started with SIGINT ignored."""
    usual = (signal.default_int_handler, signal.SIG_DFL)
    before = [*map(signal.signal, (signal.SIGINT, signal.SIGTERM), usual)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_how_scripts_end(here, usual_signals, monkeypatch, capfd):
    """Ctrl-C and SIGTERM end a script at once with one line, which says how to go on."""
    codes, out = [], Path("a run")
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    monkeypatch.setattr(train, "LOCAL_WORLD", 4)  # of two machines
    for world, message in (
        (1, " before the first epoch was finished; start again with the same command"),
        (1, "; `python train.py --resume --out 'a run'` continues after the last"),
        (8, "; `torchrun --nproc_per_node 4 train.py --resume --out 'a run'` conti"),
    ):
        monkeypatch.setattr(train, "WORLD", world)
        evaluate.on_stop(functools.partial(train.how_to_continue, out))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.getsignal(number)(number, None)
            assert codes.pop() == 130
            assert capfd.readouterr().err.startswith(f"train.py: stopped{message}")
        out.mkdir(exist_ok=True)
        (out / "last.pt").touch()  # from now on
    # Errors that the user can mend are one line and exit code 2; others keep their traceback.
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a process alone waits"))
    memory = "too little memory ({}); lower --batch-size, or train with --grad-checkpoint, --acc"
    for error, said in (
        (InputError("--data: wrong"), "--data: wrong"),
        (FileNotFoundError(2, "No such file or directory", "x.jpg"), "x.jpg: No such file"),
        (MemoryError(), memory.format("MemoryError")),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), memory.format("CUDA out of memory.")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "too little memory"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate.run(functools.partial(fail_with, error))
        err = capfd.readouterr().err
        assert err.startswith(f"train.py: error: {said}") and err.count("\n") == 1, err
    for kind in (RuntimeError, OSError, ValueError, KeyError, ZeroDivisionError):
        with pytest.raises(kind):
            evaluate.run(functools.partial(fail_with, kind("a bug")))


@pytest.mark.parametrize("task, loss, optimizer, flags", cases(RECIPES)[1:])
def test_training_by_hand(here, run, monkeypatch, task, loss, optimizer, flags):
    loss_of, losses = getattr(train, loss), []
    passes = watched(monkeypatch, Block, "forward", lambda block, x: block.training)
    ended = run(train, f"{SMALL} --task {task} --epochs 2 --lr 1e-3 --out run {flags}")
    assert (ended.code, ended.out.count("\nepoch ")) == (0, 2), ended.err
    assert "warning: the encoder is random" in ended.err
    released, parts = "released" in flags, 2 if "accumulate" in flags else 1
    # Two epochs of two batches, four blocks; --grad-checkpoint runs three of them once more.
    assert sum(passes) == 2 * 2 * parts * (7 if "grad-checkpoint" in flags else 4)
    seed, decay = (3, 0.01) if released else (0, 0)
    torch.manual_seed(seed)
    model = build_tssam("tiny", 64, task == "shadow")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, optimizer)(parameters, weight_decay=decay)
    pairs = evaluate.find_sets([here / "data"], evaluate.TRAIN)[0].pairs
    rates = {1: 1e-3, 2: 1e-7 + (1e-3 - 1e-7) / 2}
    for epoch, rate in rates.items():
        optimizer.param_groups[0]["lr"] = rate
        rng = np.random.default_rng((seed, epoch))
        order, flips = rng.permutation(5), rng.random(5) < 0.5
        for batch in (order[:2], order[2:4]):  # the fifth image is left over
            optimizer.zero_grad()
            for part in np.split(batch, parts):
                samples = [evaluate.read_sample(pairs[i], 64, PAPER) for i in part]
                x = evaluate.to_input([sample.pixels for sample in samples])
                masks = torch.tensor(np.stack([sample.mask for sample in samples]))[:, None].float()
                mirror = torch.tensor(released & flips[part])[:, None, None, None]
                x, masks = (torch.where(mirror, t.flip(-1), t) for t in (x, masks))
                loss = loss_of(model(x), masks) / parts
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
    last = load("run/last.pt")
    assert same_weights(last["trained"], tssam.trained_part(model.state_dict()))
    (group,) = last["optimizer"]["param_groups"]
    adam = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    assert adam.items() <= group.items() and not (group["amsgrad"] or group["maximize"])
    logged = read_rows("run/log.csv")
    assert {int(row["epoch"]): float(row["lr"]) for row in logged} == rates
    for row in logged:
        assert float(row["images_per_s"]) * float(row["seconds"]) == pytest.approx(4)
        assert list(row)[:5] == ["epoch", "loss", "lr", "images_per_s", "seconds"]
    assert float(logged[1]["loss"]) == pytest.approx(sum(losses[2 * parts :]) / 2)
    files = [".lock", "best.pt", "curves.png", "data.png", "last.pt", "log.csv", "samples.png"]
    assert sorted(p.name for p in Path("run").iterdir()) == files
    # best.pt is the best epoch, and evaluate.py gives its numbers on the remembered data.
    column, better = ("BER", min) if task == "shadow" else ("S", max)
    best = load("run/best.pt")["metrics"]
    assert best[column] == better(float(row[column]) for row in logged)
    assert ended.out.splitlines()[-2] == f"best:  {column} {best[column]:.4f}, run/best.pt"
    assert run(evaluate, "--ckpt run/best.pt --csv t.csv --workers 0").code == 0
    (row,) = read_rows("t.csv")
    assert (row["dataset"], row["protocol"]) == ("data", "paper")
    assert best.keys() == ({"BER"} if task == "shadow" else {"S", "E", "wF", "MAE"})
    assert {n: float(cell) for n, cell in list(row.items())[4:-1] if cell} == pytest.approx(best)


def test_stopped_and_resumed_runs_are_as_if_they_had_not_been(here, run):
    new = f"{SMALL} --epochs 2 --lr 1e-3 --precision fp16 --out"
    assert run(train, f"{new} whole").code == 0
    killed = in_a_process(["-c", STOPPED, "SIGKILL-2"], f"{new} cut")  # after best.pt and last.pt
    assert killed.returncode == -signal.SIGKILL
    resume = "--resume --out cut --workers 2"
    stopped = in_a_process(["-c", STOPPED, "SIGTERM-1"], resume)  # between the two
    line = "stopped; `python train.py --resume --out cut` continues after the last whole epoch\n"
    assert stopped.returncode == 130 and stopped.stderr.endswith(line), stopped.stderr
    # A copy whose best score is never to be reached; one of last.pt alone: there the best starts anew.
    stored = load("cut/last.pt")
    assert stored["epoch"] == 1 and "S" in stored["rows"][0]
    for copied in ("unreached", "alone"):
        shutil.copytree("cut", copied)
    stored["rows"][0]["S"] = 2.0
    torch.save(stored, "alone/last.pt")
    torch.save(load("cut/best.pt") | {"metrics": {"S": 2.0}, "epoch": 0}, "unreached/best.pt")
    run(train, "--resume unreached --workers 0").says("best:  S 2.0000, unreached/best.pt")
    assert load("unreached/best.pt")["epoch"] == 0
    Path("alone/best.pt").unlink()
    ended = run(train, "--resume alone --workers 0").says("  best  ")
    ended.says("resume: alone has no best.pt; the next epoch is the best so far")
    score = load("alone/best.pt")["metrics"]["S"]
    ended.says(f"best:  S {score:.4f}, alone/best.pt")  # not that of the lost one
    assert load("alone/best.pt")["epoch"] == 2
    run(train, resume).says("resume: after epoch 1 of 2\n")
    assert numbers("whole/log.csv") == numbers("cut/log.csv")
    for file in ("last.pt", "best.pt"):
        assert same_weights(weights_of(f"whole/{file}"), weights_of(f"cut/{file}"))
    whole, cut = load("whole/last.pt"), load("cut/last.pt")
    adam, resumed = whole["optimizer"]["state"], cut["optimizer"]["state"]
    assert all(torch.equal(adam[i]["exp_avg_sq"], resumed[i]["exp_avg_sq"]) for i in adam)
    assert whole["scaler"] == cut["scaler"] != {} and [r["epoch"] for r in whole["rows"]] == [1, 2]
    # Where the data have moved.
    Path("data").rename("moved")
    run(train, resume).refuses("data: no such file or folder; pass the dataset with")
    assert run(train, f"{resume} --data moved --val moved/test").code == 0


def test_what_a_resumed_run_refuses(here, run, monkeypatch):
    """Other options and other data, but for the machine's; and what --init starts from."""
    opened = PermissionError("open in a spreadsheet")
    with monkeypatch.context() as patch:
        refuse = lambda source, target: target.name == "log.csv" and fail_with(opened)  # noqa: E731
        watched(patch, os, "replace", refuse)
        ended = run(train, f"{SMALL} --epochs 2 --out run").says()
    assert "warning: run/log.csv: cannot be written (open in a spreadsheet)" in ended.err
    assert Path("run/best.pt").exists() and not Path("run/log.csv").exists()
    make_pairs(here / "other", "Imgs + GT", "uvw")
    checkpoint(here / "model.pt", tiny(image_size=64))
    for flags, message in cases("""
        --lr 1e-4                     | lr 0.0001, but in this run 0.0008; start a new run, from its weights with --init
        --epochs 3                    | epochs 3, but in this run 2; start
        --task cod                    | task cod, but in this run sod
        --sam vit_b                   | sam vit_b, but in this run tiny
        --size 32                     | size 32, but in this run 64
        --batch-size 4 --accumulate 2 | batch size 4, but in this run 2
        --recipe released             | recipe released, but in this run paper
        --precision bf16              | precision bf16, but in this run fp32
        --seed 1                      | seed 1, but in this run 0
        --csa-blocks 1                | csa blocks [1], but in this run None
        --mrm-blocks 1 2              | mrm blocks [1, 2], but in this run None
        --demo                        | demo True, but in this run False
        --init run/best.pt            | init run/best.pt, but in this run None
        --accumulate 2                | micro batch 1, but in this run 2; choose processes x --accumulate so that it is
        --data data/test              | training images 3 (x.jpg to z.jpg), but in this run 5 (a.jpg to e.jpg)
        --val other                   | validation images 3 (u.jpg to w.jpg), but in this run 3 (x.jpg to z.jpg)
    """):
        run(train, f"--resume --out run --workers 0 {flags}").refuses(f"error: --resume: {message}")
    run(train, "--resume --out new").refuses("--data: new has no last.pt to resume; pass the")
    message = "model.pt: trained on another encoder, not the one loaded; pass it with --sam-"
    run(train, f"{SMALL} --init model.pt --out new").refuses(message)
    ended = run(train, "--data data --batch-size 2 --device cpu --init model.pt --out new")
    assert "downloading" not in ended.refuses("--init: model.pt belongs to --sam tiny").out
    task = f"{SMALL} --init run/best.pt --task shadow --out new"
    run(train, task).refuses("run/best.pt: Error(s) in loading state_dict for TSSAM: Missing key")
    flags = "--val other --accumulate 2 --grad-checkpoint --epochs 1 --out v"
    assert run(train, f"{SMALL} {flags}").code == 0
    assert run(train, "--resume v --workers 0").code == 0
    assert load("v/last.pt")["run"]["grad_checkpoint"]


def test_two_processes_take_the_step_of_one(here, run):
    make_pairs(here / "data", "train/Imgs + train/GT", "abcdefgh")
    flags = f"{SMALL} --batch-size 8 --epochs 1 --lr 1e-2"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = in_a_process([*torchrun, train.__file__], f"{flags} --accumulate 2 --out two")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epoch 1/1") == 1 and "2 x cpu" in ended.stdout  # said once
    assert run(train, f"{flags} --accumulate 4 --out one").code == 0
    one, two = weights_of("one/last.pt"), weights_of("two/last.pt")
    assert all(torch.allclose(one[n], two[n], atol=2e-5) for n in one if not is_statistic(n))
    losses = [float(numbers(f"{out}/log.csv")[0]["loss"]) for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Validation, shared between the two, gives the numbers of one process with the stored weights.
    model, info = load_checkpoint("two/best.pt")
    pairs = evaluate.find_sets([here / "data"], evaluate.TEST)[0].pairs
    metrics = evaluate.average([*evaluate.score_images(model, pairs, "sod", PAPER)], PAPER)
    assert metrics == pytest.approx(info["metrics"], rel=1e-5)
    # An error that both meet is said once.
    ended = in_a_process([*torchrun, train.__file__], f"{flags} --out two")
    assert ended.returncode != 0 and ended.stderr.count("two contains a run (last.pt)") == 1


def test_runs_are_kept_apart(here, run, monkeypatch):
    """A folder belongs to one run; one that ended before its first checkpoint leaves it free."""
    new = f"{SMALL} --epochs 1 --out run"
    with monkeypatch.context() as patch:
        other = lambda *_: sys.exit(in_a_process([train.__file__], new).stderr)  # noqa: E731
        patch.setattr(train, "train_epoch", other)
        assert "error: --out: run is in use by another run; pass another" in run(train, new).code
    Path("run/slurm-17.out").touch()
    assert run(train, new).code == 0
    for name in ("last.pt", "best.pt", "log.csv"):
        message = f"contains a run ({name}); pass --resume, or --out run-2"
        run(train, new).refuses(f"--out: run {message}")
        Path("run", name).unlink()
    assert Path("run/slurm-17.out").exists()


def test_what_is_validated_on(here, run):
    """Training images are, but with a warning, also under another spelling; of several sets for COD, CAMO alone."""
    for part in ("TrainDataset", "TestDataset/CAMO", "TestDataset/NC4K"):
        make_pairs(here / "COD", f"{part}/Imgs + {part}/GT")
    Path("link").symlink_to("data/train")
    table = f"""
        --data data --val link              | warning: some validation images are also training images | val:   none
        --data data --val {here}/data/train | warning: some validation images are also training images | val:   none
        --data data --val data/test         | val:   data: 3 images in data/test/ | also training images
        --data COD --task cod               | val:   CAMO: | NC4K
        --data COD                          | val:   NC4K: | also training images
        --data data/train                   | val:   none  | also training images
    """
    for i, (flags, said, unsaid) in enumerate(cases(table)):
        ended = run(train, f"{TINY} {flags} --epochs 1 --out {i}")
        assert ended.code == 0 and said in ended.out + ended.err, ended.err
        assert unsaid not in ended.out + ended.err
        assert Path(f"{i}/best.pt").exists() == (said != "val:   none")
    assert run(train, "--resume 5 --workers 0").code == 0  # without a validation set


def test_where_scripts_run(here, run, monkeypatch):
    """In a notebook's thread, beside another tool's WORLD_SIZE, with a closed standard output or none."""
    mask = np.zeros((40, 48), np.uint8)
    mask[-1] = 255  # S is nan, of which NumPy warns and the script does not
    Image.fromarray(mask).save("data/test/GT/x.png")
    monkeypatch.setenv("WORLD_SIZE", "4")
    ended = in_a_process(["-c", NOTEBOOK], f"{SMALL} --size 32 --epochs 1 --out run")
    assert ended.returncode == 0 and "epoch 1/1" in ended.stdout and Path("run/best.pt").exists()
    random = "warning: the encoder is random, not SAM's: results say nothing about TS-SAM\n"
    assert ended.stderr == random
    monkeypatch.setattr(sys.stdout, "write", functools.partial(fail_with, BrokenPipeError()))
    assert run(train, f"{SMALL} --epochs 1 --out closed").code == 0
    monkeypatch.setattr(sys, "stdout", None)
    assert run(train, f"{SMALL} --epochs 1 --out none").code == 0


@pytest.fixture
def score(here, run) -> Callable[[str], Ended]:
    """evaluate.py as a function, in a folder with a checkpoint and two datasets."""
    torch.manual_seed(3)
    model = build_tssam("tiny", 64)
    model.ffd.head.weight.data *= 600
    checkpoint(here / "model.pt", model, epoch=7)
    for name in ("CAMO", "ECSSD"):
        make_pairs(here / name, "Imgs + GT", "abc")
    return functools.partial(run, evaluate)


TABLES = """    images | TS-SAM_B, in Table I or II          | TS-SAM_H
CHAMELEON 76   | S 0.912 E 0.947 wF 0.849 MAE 0.023  | S 0.942 E 0.966 wF 0.900 MAE 0.017
CAMO      250  | S 0.826 E 0.862 wF 0.753 MAE 0.073  | S 0.887 E 0.925 wF 0.830 MAE 0.047
COD10K    2026 | S 0.863 E 0.909 wF 0.771 MAE 0.029  | S 0.914 E 0.950 wF 0.856 MAE 0.017
NC4K      4121 | S 0.866 E 0.900 wF 0.799 MAE 0.045  | S 0.905 E 0.933 wF 0.860 MAE 0.032
ISTD      540  | BER 1.11                            | BER 1.04
"""


@pytest.mark.parametrize("dataset, of_b, of_h", cases(TABLES)[1:])
def test_the_papers_rows(dataset, of_b, of_h, capsys):
    """Printed below a measured row of the whole dataset, under the paper's protocol."""
    name, images = dataset.lower().split()
    measured = {"new": 0.5} | dict.fromkeys(of_b.split()[::2], 0.12344)
    shown = re.sub(r"\d\.\d+", "0.1234", of_b)
    papers = [f"  TS-SAM_B in the paper:  {of_b}", f"  TS-SAM_H in the paper:  {of_h}"]
    for more, protocol, below in ((0, PAPER, papers), (-1, PAPER, []), (0, FULL_SIZE, [])):
        evaluate.print_metrics(f"{name}_Test", int(images) + more, measured, protocol)
        row, *rows = capsys.readouterr().out.splitlines()
        expected = f"{name}_Test {int(images) + more} images new 0.5000 {shown}"
        assert row.split() == expected.split() and rows == below


def test_tables_and_saved_maps(score, monkeypatch):
    monkeypatch.setattr(evaluate, "PUBLISHED", evaluate.PUBLISHED.replace(" 250 ", " 3 "))
    ended = score(f"{CKPT} {SETS}").says("\nmodel.pt: sod, tiny, epoch 7\n")
    assert ended.out.startswith("protocol: paper\nprecision: fp32\nCAMO: 3 images in")
    camo, paper_b, paper_h, ecssd = ended.out.splitlines()[-4:]
    for name, row in (("CAMO", camo), ("ECSSD", ecssd)):
        assert row.split()[:3] == [name, "3", "images"] and len(row) == len(camo)
        assert row.split()[3::2] == ["S", "E", "wF", "MAE"]
    assert "TS-SAM_B in the paper:  S 0.826 " in paper_b and "TS-SAM_H in the" in paper_h
    ended = score(f"{CKPT} {SETS} --protocol full-size --csv model.csv --save maps")
    assert "TS-SAM_B" not in ended.says("protocol: full-size").out
    assert {*os.listdir("maps")} == {"CAMO", "ECSSD", "overview-CAMO.png", "overview-ECSSD.png"}
    assert {*os.listdir("maps/CAMO")} == {"a.png", "b.png", "c.png"}
    shutil.copy("maps/CAMO/a.png", "maps/CAMO/of another image.png")
    score(f"{MAPS} {SETS} --csv maps.csv").says("CAMO: 3 images in maps/CAMO, masks in CAMO/GT, no")
    head = "model,dataset,images,protocol,S,E,wF,MAE,maxF,adpF,meanF,maxE,BER,BER_pooled,precision"
    table = Path("model.csv").read_text()
    assert table.startswith(f"{head}\nmodel.pt,CAMO,3,full-size,") and table.count("\n") == 3
    ours = table.replace("model.pt,", "maps,").replace(",fp32\n", ",\n")
    assert Path("maps.csv").read_text() == ours
    for row in read_rows("maps.csv"):
        assert float(row["meanF"]) < float(row["maxF"]) and float(row["E"]) < float(row["maxE"])
    # Images without masks are predicted, a single one too.
    for data, folder, count in (("ECSSD/Imgs", "all", 3), ("ECSSD/Imgs/b.jpg", "one", 1)):
        ended = score(f"{CKPT} --data {data} --save {folder} --protocol full-size")
        ended.says(f"Imgs: {count} maps in {folder}/Imgs\n")
        assert Path(f"{folder}/Imgs/b.png").read_bytes() == Path("maps/ECSSD/b.png").read_bytes()
    # Rows are appended to a table: other checkpoints', of another protocol, of another precision.
    shutil.copy("model.pt", "twin.pt")
    ended = score(f"--ckpt model.pt twin.pt --device cpu --workers 0 {SETS} --csv model.csv")
    assert (ended.code, ended.out.count("\nECSSD: "), ended.out.count("\nECSSD  ")) == (0, 1, 2)
    score(f"{CKPT} {SETS} --precision bf16 --csv model.csv").says("precision: bf16")
    rows = read_rows("model.csv")
    assert [row["model"] for row in rows] == ["model.pt"] * 4 + ["twin.pt"] * 2 + ["model.pt"] * 2
    assert [row["dataset"] for row in rows] == ["CAMO", "ECSSD"] * 4
    assert [row["protocol"] for row in rows] == ["full-size"] * 2 + ["paper"] * 6
    assert [row["precision"] for row in rows] == ["fp32"] * 6 + ["bf16"] * 2
    assert rows[2] == rows[4] | {"model": "model.pt"}
    assert 0 < abs(float(rows[6]["MAE"]) - float(rows[2]["MAE"])) < 0.02


def test_rows_are_appended_whole(tmp_path):
    """By several evaluations at once, none is lost."""
    path = tmp_path / "table.csv"
    append = lambda i: evaluate.append_csv(path, dict(model="m" * 500, dataset=i))  # noqa: E731
    append(0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(1, 200)))
    rows = sorted((int(row["dataset"]), row["model"]) for row in read_rows(path))
    assert rows == [(i, "m" * 500) for i in range(200)]


@pytest.mark.filterwarnings("ignore:This class will be removed")
@pytest.mark.parametrize("task", ["sod", "shadow"])
def test_maps_of_other_methods(score, task):
    """Maps in 8 bits, of another size, and of 0 and 1: their numbers, and what is said of them."""
    make_pairs(Path("d"), "Imgs + GT", "012")
    rng, samples = np.random.default_rng(3), dict(grey=[], small=[], ones=[], mixed=[])
    for name in samples:
        Path(name, ".ipynb_checkpoints").mkdir(parents=True)
    for i in range(3):
        grey, mask = soft_map(rng, 48, 64)
        Image.fromarray(mask.astype(np.uint8) * 255).save(f"d/GT/{i}.png")
        small, ones = Image.fromarray(grey // 2).resize((40, 30)), (grey > 100).astype(np.uint8)
        again = np.asarray(small.resize((64, 48), Image.Resampling.BILINEAR))
        mixed = grey if i else ones
        maps, scored = (grey, small, ones, mixed), (grey, again, ones * 255, mixed)
        for name, saved, prediction in zip(samples, maps, scored, strict=True):
            Image.fromarray(np.asarray(saved)).save(f"{name}/{i}.png")
            samples[name].append((prediction, mask))
    resized = "d: 3 of 3 files differ in size from their masks; both are resized indep"
    ones_are = "of 3 maps are nowhere above 1; only if all are, 1 counts as 255 (such as "
    all_are, one_is = f"d: 3 {ones_are}ones/0.png)", f"d: 1 {ones_are}mixed/0.png)"
    for name, warning in zip(samples, ("", resized, all_are, one_is), strict=True):
        ended = score(f"--maps {name} --data d --task {task} --csv {name}.csv --workers 0")
        assert ended.code == 0 and warning in ended.err and bool(warning) == bool(ended.err)
        (row,) = read_rows(f"{name}.csv")
        scored = {column: float(cell) for column, cell in list(row.items())[4:-1] if cell}
        assert scored == pytest.approx(by_the_toolbox(samples[name], task, "full-size"), rel=1e-9)


def test_what_the_scripts_refuse(score, monkeypatch):
    """In one line; nothing is saved or scored."""
    for _, _, mask in make_pairs(Path("black"), "Imgs + GT"):
        Image.new("L", (48, 40)).save(mask)
    for _, image, _ in make_pairs(Path("broken"), "Imgs + GT", "ab"):
        image.write_bytes(image.read_bytes()[:-500])
    Path("maps").mkdir()
    Path("maps/.DS_Store").touch()  # macOS's; the folder is empty
    assert score(f"{CKPT} {SETS} --save maps").code == 0
    Path("maps/ECSSD/b.png").unlink()
    Path("notes.csv").write_text("mine")
    model, _ = load_checkpoint("model.pt")
    model.ffd.head.weight.data.fill_(math.nan)
    checkpoint(Path("nan.pt"), model)
    new = f"{SMALL} --epochs 1 --out out"
    table = f"""
                                             | --data: pass the dataset to train on, or try --demo
        {new} --batch-size 8                 | --data: 5 images do not fill a batch of 8; lower --batch-size
        {new} --accumulate 3                 | 2 is no multiple of 1 (processes) x 3 (--accumulate)
        {new} --lr -1                        | argument --lr: invalid number value: '-1'
        {new} --seed -1                      | argument --seed: invalid number value: '-1'
        {new} --size 16000000                | too little memory (
        {new} --lr 1e9                       | the loss became nan or infinite; nothing is saved yet; try a lower --lr or --prec
        {new} --data black                   | black: 2 of 2 masks are empty (such as black/Imgs/a.jpg); check how black/GT was made
        {new} --device cuda:77               | --device: cuda:77 cannot be used here
        {new} --data broken --workers 2      | .jpg: cannot be read as an image (
        --demo --data data                   | argument --data: not allowed with argument --demo
        {new} --epoch 3                      | unrecognized arguments: --epoch 3 (--help lists the options)
        {MAPS} --data ECSSD                  | : images without a partner: 1 such as ECSSD/Imgs/b.jpg; partners without an image: 0;
        {MAPS} --data data/test              | : images without a partner: 3 such as data/test/Imgs/x.jpg; partners without an image: 7 such as maps/CAMO/a.png;
        --maps maps/ECSSD {SETS}             | maps/ECSSD/CAMO: no image files there
        {MAPS}                               | --data: pass the datasets that the maps belong to
        {MAPS} {SETS} --precision bf16       | --maps: goes without --save, --sam-checkpoint, --precision
        --ckpt nope.pt model.pt {SETS}       | nope.pt: cannot be read as a checkpoint (No such file or directory); pass a state
        --ckpt notes.csv {SETS}              | notes.csv: cannot be read as a checkpoint (UnpicklingError); pass a state_dict()
        {CKPT} {SETS} --save ECSSD/Imgs      | --save: ECSSD/Imgs is not empty; pass a new folder
        {CKPT} {SETS} --save maps            | --save: maps is not empty; pass a new folder
        --ckpt model.pt twin.pt --save both  | --save: takes the maps of one --ckpt
        {CKPT} {SETS} --csv notes.csv        | --csv: notes.csv was not written by this version of evaluate.py
        {CKPT} --data CAMO/Imgs              | CAMO/Imgs: no images beside masks for the test split (evaluate.py --save needs none); name both, as in --data IMAGES,MASKS or 'x/*.jpg,x/*_mask.png'
        {CKPT}                               | model.pt: trained without a validation set, or with a fraction held out; pass datasets
        {CKPT} {SETS} --batch-size 0         | argument --batch-size: invalid number value: '0'
        {CKPT} {SETS} --task sod             | --task: goes with --maps; a checkpoint knows its own
        {CKPT} --data CAMO ./CAMO            | --data: two datasets have one name, of ['CAMO', 'CAMO']; score them one at a time
        --ckpt nan.pt --device cpu {SETS}    | a.jpg: the network's output is not finite
    """
    for flags, message in cases(table):
        module = evaluate if re.search("--ckpt|--maps", flags) else train
        ended = score.func(module, flags).refuses(message)
        *warnings, error = ended.err.splitlines()
        assert error.startswith(f"{module.__name__}.py: error: ") and " 0." not in ended.out
        assert all("random" in text for text in warnings) and (module is train or not warnings)
    assert not Path("out/best.pt").exists()
    with refused("epoch 3: the weights became nan .*last.pt holds epoch 2"):
        train.check_finite("weights", [torch.tensor(1.0), torch.tensor([math.nan])], 3)
    monkeypatch.setattr(evaluate, "WORLD", 2)
    score(f"{CKPT} {SETS}").refuses("runs in one process; start it with python, not torchrun")


def test_what_reaches_loops_and_pictures(score, monkeypatch):
    """With workers the program stays one process, whose main thread computes with all its cores."""
    make_pairs(Path("eight"), "Imgs + GT", "abcdefgh")
    children = Path(f"/proc/self/task/{os.getpid()}/children")

    def look(*_) -> tuple[str, bool, int]:
        pool = any(t.name.startswith("ThreadPoolExecutor") for t in threading.enumerate())
        return children.read_text() if children.exists() else "", pool, torch.get_num_threads()

    seen, cores = watched(monkeypatch, train, "bce_iou", look), torch.get_num_threads()
    new = SMALL.replace("--workers 0", "--val eight --epochs 1 --out run")
    for module, flags, sizes in (
        (evaluate, "--ckpt model.pt --data ECSSD --device cpu --save maps --batch-size 3", {3}),
        (evaluate, "--maps maps --data ECSSD", set()),
        (train, new, {2}),
    ):
        counts = watched(monkeypatch, evaluate, "in_threads", lambda work, jobs, count: count)
        batches = watched(monkeypatch, TSSAM, "forward", lambda model, x: len(x))
        shown = watched(monkeypatch, evaluate, "draw_samples")
        assert score.func(module, f"{flags} --workers 3").code == 0
        assert set(counts) == {3} and set(batches) == sizes
    assert set(seen) == {("", True, cores)}
    # The first six pairs of training, and of validation with their predictions.
    (rows, data), (predicted, samples) = shown
    assert (data.name, samples.name) == ("data.png", "samples.png")
    assert [(title, prediction) for title, _, prediction in rows] == [(n, None) for n in "abcde"]
    assert [(title, s.pair.mask.stem) for title, s, _ in predicted] == [(n, n) for n in "abcdef"]
    model, _ = load_checkpoint("run/last.pt")
    (prediction,) = evaluate.predict(model, [predicted[2][1]], PAPER, 2, "fp32")
    assert np.array_equal(predicted[2][2], prediction.to_save)


@pytest.mark.parametrize("metric, names, values", [("S", "bca", "135"), ("BER", "acb", "531")])
def test_the_overview(tmp_path, monkeypatch, metric, names, values):
    """The worst, median and best image, not turned, with a title and the mask's outline; its mask; its map."""
    pairs = make_pairs(tmp_path, "Imgs + GT", "abcde")
    shown = watched(monkeypatch, evaluate, "draw_samples")
    (tmp_path / "d").mkdir()
    for name, image, _ in pairs:
        Image.open(image).save(image, exif=ON_ITS_SIDE, quality=95)  # ignored, as in training
        Image.new("L", (9, 9), 77).save(tmp_path / f"d/{name}.png")
    dataset = evaluate.ImageSet("d", "d", None, pairs)
    evaluate.save_overview(dataset, [{metric: value} for value in (5, 1, 3, 2, 4)], tmp_path)
    ranks = zip(("worst", "median", "best"), names, values, strict=True)
    titles = [f"{rank}: {name}, {metric} {value}" for rank, name, value in ranks]
    assert [title for title, *_ in shown[0][0]] == titles
    sheet = np.asarray(Image.open(tmp_path / "overview-d.png")).astype(int)
    assert sheet.shape == (600, 600, 3) and (sheet[:, 198:202] == 255).all()
    for strip, name in zip(np.vsplit(sheet, 3), names, strict=True):
        image, mask, drawn = (strip[2:198, x + 2 : x + 198] for x in (0, 200, 400))
        files = (tmp_path / f"Imgs/{name}.jpg", tmp_path / f"GT/{name}.png")
        upright, truth = (np.asarray(Image.open(file).resize((196, 196))) for file in files)
        assert np.abs(mask[..., 0] - truth).mean() < 8 and (drawn == 77).all()
        red = (image == [255, 0, 0]).all(-1)
        around = Image.fromarray(mask[..., 0].astype(np.uint8)).filter(ImageFilter.MaxFilter(5))
        assert 200 < red.sum() < 1500 and (np.asarray(around)[red] > 0).all()
        assert np.abs(image - upright)[~red].mean() < 12
        assert (image[:20] > 200).all(-1).sum() > 40  # the title


def test_the_demos_dataset(tmp_path):
    """Warm shapes on cold backgrounds, the same ones every time."""
    for name in "ab":
        train.draw_demo(tmp_path / name)
    splits = (evaluate.TRAIN, evaluate.TEST)
    drawn, tests = (evaluate.find_sets([tmp_path / "a"], split)[0].pairs for split in splits)
    assert (len(drawn), len(tests)) == (96, 24)
    a, b = (sorted((tmp_path / name).rglob("*.*g")) for name in "ab")
    assert len(a) == 240 and [f.read_bytes() for f in a] == [f.read_bytes() for f in b]
    areas = []
    for _, image, mask in drawn[:20]:
        red, _, blue = np.moveaxis(np.asarray(Image.open(image)).astype(int), -1, 0)
        truth = np.asarray(Image.open(mask)) > 0
        assert (red - blue)[truth].mean() > 50 > (red - blue)[~truth].mean()
        areas.append(truth.mean())
    assert 0.05 < np.mean(areas) < 0.4


# -------------------------------------------------------------------------------------------------
# Processes, a CUDA box without one, your own data, the README


def test_processes_their_devices_and_workers(options, monkeypatch, capsys):
    for machines, expected in cases("""
        ; WORLD_SIZE=4; RANK=0 WORLD_SIZE=1 LOCAL_RANK=0; RANK= WORLD_SIZE=; RANK=2 | 1 0 1 0
        RANK=7 WORLD_SIZE=8 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4                         | 8 7 4 3
        RANK=0 WORLD_SIZE=2                                                         | 2 0 1 0
        RANK=1 WORLD_SIZE=2 LOCAL_RANK=                                             | 2 1 1 0
    """):
        for variables in machines.split(";"):
            environment = dict(variable.split("=") for variable in variables.split())
            assert evaluate.launched_as(environment) == (*map(int, expected.split()),), variables
    dist, events = torch.distributed, []
    monkeypatch.setattr(dist, "init_process_group", lambda *to, **how: events.append((*to, how)))
    monkeypatch.setattr(dist, "rendezvous", lambda method: iter([("store", 1, 4)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda *prefixed: prefixed)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    for device, nccl, backend in (("cuda:1", 1, "nccl"), ("cuda:1", 0, "gloo"), ("cpu", 1, "gloo")):
        monkeypatch.setattr(dist, "is_nccl_available", lambda nccl=nccl: nccl)
        train.start_processes(device)
        how = dict(store=("2", "store"), rank=1, world_size=4)  # and default timeouts
        how["device_id"] = torch.device("cuda:1") if backend == "nccl" else None
        assert events.pop() == (backend, how)
    monkeypatch.setattr(dist, "barrier", events.append)
    monkeypatch.setattr(dist, "new_group", lambda **how: how)
    monkeypatch.setattr(train, "patient_group", train.patient_group.__wrapped__)
    others = dict(backend="gloo", timeout=train.timedelta(hours=3))
    for world, rank, expected in ((1, 0, ["work"]), (2, 0, ["work", others]), (2, 1, [others])):
        monkeypatch.setattr(train, "WORLD", world)
        monkeypatch.setattr(train, "RANK", rank)
        events.clear()
        train.first_process(lambda: events.append("work"))
        assert events == expected
    for cores, processes, expected in ((64, 1, 8), (64, 4, 8), (16, 4, 4), (2, 1, 2), (2, 4, 0)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(evaluate, "LOCAL_WORLD", processes)
        assert options(train, "--data data --device cpu")["workers"] == expected
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "zeros", lambda *_, device: (used.append(device), torch.empty(1))[1])
    for device, processes, rank, gpus, expected in cases("""
               | 1 | 0 | 0 | cpu
               | 1 | 0 | 1 | cuda
        cuda   | 1 | 0 | 4 | cuda
        cuda:1 | 1 | 0 | 4 | cuda:1
        cuda   | 4 | 3 | 4 | cuda:3
               | 4 | 3 | 4 | cuda:3
        cuda   | 4 | 3 | 1 | cuda:0
        cpu    | 4 | 3 | 4 | cpu
    """):
        monkeypatch.setattr(evaluate, "WORLD", int(processes))
        monkeypatch.setattr(evaluate, "LOCAL_RANK", int(rank))
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus != "0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: int(gpus))
        args = argparse.Namespace(device=device or None)
        evaluate.warn.cache_clear()
        used.clear()
        evaluate.check_device(args)
        assert args.device == expected and used == [expected] * (2 if ":" in expected else 1)
        warning = "no GPU is found, or its driver is too old for CUDA 13.0: running on the CPU"
        assert (warning in capsys.readouterr().err) == (gpus == "0")
    with refused("--device: each process takes a GPU of its own; leave out cuda:1"):
        evaluate.check_device(argparse.Namespace(device="cuda:1"))


def test_what_each_part_is_and_progress(monkeypatch, capsys):
    tssam.summarize("vit_b")
    table = capsys.readouterr().out
    assert table.startswith("TS-SAM_B: ") and "  14 CSA, Eq. 1-2          5,284,352\n" in table
    counts = "196,864 5,284,352 4,640,256 1,771,393 89,670,912 11,892,865"
    assert re.findall(r"\S+$", table, re.M)[1:] == counts.split()
    # A log file gets a line now and then.
    monkeypatch.setattr(evaluate, "tqdm", lambda items, *what, **how: {"items": items, **how})
    for terminal, when in ((True, None), (False, 300)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        shown = evaluate.progress(range(3), "epoch 1", 3)
        assert [shown.get(k) for k in ("items", "delay", "mininterval")] == [range(3), when, when]
    monkeypatch.setattr(evaluate, "RANK", 1)  # of torchrun's processes the first draws it
    assert evaluate.progress([], "", 0)["disable"] and not shown["disable"]
    values = dict(desc="epoch 1", n_fmt=5, total_fmt=9, elapsed="05:00", remaining="04:00")
    line = shown["bar_format"].format(**values, postfix=", loss=1")
    assert line == "epoch 1: 5 of 9, 05:00 elapsed, 04:00 left, loss=1\n"


@pytest.mark.parametrize("sam, calls", cases("vit_b | 12 16 36\n vit_h | 32 36 60"))
def test_chunks_on_a_gpu(monkeypatch, sam, calls):
    """At most 2**28 scores at once, over heads and images; windows whole."""
    spec, seen = tssam.ENCODERS[sam], []
    attend = lambda q, k, v, attn_mask: (seen.append(attn_mask.numel()), torch.empty_like(q))[1]  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for batch, expected in zip((1, 2, 8), calls.split(), strict=True):
        seen.clear()
        with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
            for block in range(spec.depth):
                window = 64 if block in spec.global_blocks else 14
                attention = Attention(spec.width, spec.heads, True, True, True, (window, window))
                attention.__class__ = tssam.ChunkedAttention
                count = batch * (1 if window == 64 else 25)
                attention(torch.empty(count, window, window, spec.width))
        assert len(seen) == int(expected) and max(seen) <= 2**28


def test_precisions_copies_and_memory(monkeypatch):
    # The same on every card, set where evaluate is imported; the FFD concatenates as autocast says.
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.cudnn_sdp_enabled()
    model, seen = tiny(), []
    for inject in (model.ffd.inject1, model.ffd.inject2):
        inject.stage2.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(images())
    model.double()(images().double())
    assert seen == [torch.bfloat16] * 2 + [torch.float64] * 2
    steps = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: (steps.append("pin"), t)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *to, **how: (steps.append((to, how)), t)[1])
    evaluate.to_device(np.zeros(3), "cuda:1")
    assert steps == ["pin", (("cuda:1",), {"non_blocking": True})]  # nothing waits for the copy
    evaluate.to_device(np.zeros(3), "cpu")
    assert "pin" not in steps[2:]


@pytest.mark.parametrize("factors", [(1, math.nan), (math.nan, 1, 1, 1, 1)])  # the last first
def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(run, monkeypatch, factors):
    """It is looked at one step late, the last one after the epoch."""
    loss_of, left = train.bce_iou, [*factors]
    monkeypatch.setattr(train, "bce_iou", lambda *batch: loss_of(*batch) * left.pop())
    message = "epoch 1: the loss became nan or infinite; nothing is"
    run(train, f"{SMALL} --batch-size 1 --data data/train --epochs 1 --out run").refuses(message)
    assert not left and not Path("run/last.pt").exists()
    spoil = lambda logits: logits.register_hook(lambda gradient: gradient * math.nan)  # noqa: E731
    monkeypatch.setattr(train, "bce_iou", lambda x, masks: (spoil(x), loss_of(x, masks))[1])
    run(train, f"{SMALL} --batch-size 5 --epochs 1 --out run").refuses("the weights became nan")


def test_two_folders_said_outright(tmp_path):
    """Paired by path and name, else by names without the words that all of a side share."""
    for image_names, mask_names, told in cases("""
        21_training.tif 22_training.tif                  | 21_manual1.gif 22_manual1.gif                 | DRIVE
        case_001_0000.png case_002_0000.png              | case_001.png case_002.png                     | nnU-Net
        a/a_000019_leftImg8bit.png b/b_000019_leftImg8bit.png | a/a_000019_gtFine_labelIds.png b/b_000019_gtFine_labelIds.png | Cityscapes
        ISIC_0000000.jpg ISIC_0000001.jpg                | ISIC_0000000_segmentation.png ISIC_0000001_segmentation.png | ISIC
        00087a6bd4dc_01.jpg 0d1a9caf4350_02.jpg          | 00087a6bd4dc_01_mask.gif 0d1a9caf4350_02_mask.gif | Carvana
        0001TP_006690.png Seq05VD_f00000.png             | 0001TP_006690_L.png Seq05VD_f00000_L.png      | CamVid
        train_1.bmp testA_2.bmp                          | train_1_anno.bmp testA_2_anno.bmp             | GlaS
        img_1.png img_2.png                              | mask_1.png mask_2.png                         | prefixes
        photo 1.png photo 2.png                          | photo 1 mask.png photo 2 mask.png             | blanks
        1.png 2.png                                      | 1.mask.png 2.mask.png                         | dots
        x/1.png y/1.png                                  | x/1.png y/1.png                               | folders below
        1.png 2.png 3.png                                | 10.png 20.png 30.png                          |
        x/1.png y/1.png                                  | 1.png 2.png                                   |
        a-1.png a_1.png b_2.png                          | m_a-1.png m_a_1.png m_b_2.png                 |
    """):
        place = tmp_path / f"{image_names} {mask_names}".replace("/", "_")
        folders = place / "Bilder", place / "mes masques"
        images = [folders[0] / name for name in re.split(r"(?<=\.\w{3}) ", image_names)]
        masks = [folders[1] / name for name in re.split(r"(?<=\.\w{3}) ", mask_names)]
        for file in images + masks:
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(file)
        root = "{},{}".format(*folders)
        if not told:
            with refused("images without a partner: .*; names must agree but for words that"):
                found_in(root, evaluate.TRAIN)
        for splits in (evaluate.TRAIN, evaluate.VALIDATION, evaluate.TEST) if told else ():
            s = found_in(root, splits)
            assert (s.name, s.folder, s.split) == (place.name, root, None)
            assert [pair[1:] for pair in s.pairs] == sorted(zip(images, masks, strict=True)), told


def test_two_folders_in_both_scripts(here, run):
    """As an unknown layout proposes; patterns tell images and masks in one folder apart."""
    make_pairs(here / "CVC", "Photos + nested/Truth", "abc", side=80)
    ended = run(train, f"{TINY} --data CVC")
    command = "these folders pair up: --data CVC/Photos,CVC/nested/Truth"
    assert ended.code == 2 and ended.err.endswith(f"{command}\n") and len(ended.err) < 160
    Path("CVC/nested").rename("CVC/my nested")
    run(train, f"{TINY} --data CVC").refuses("--data 'CVC/Photos,CVC/my nested/Truth'")
    shutil.rmtree("CVC/my nested")
    run(train, f"{TINY} --data CVC").refuses("as in --data IMAGES,MASKS")
    # Of two splits with the same names the pairs of one; nothing that mixes images and masks.
    for split in ("a", "b"):
        make_pairs(here / "two", f"{split}/Bilder + {split}/Masken", "abc")
    run(train, f"{TINY} --data two").refuses("--data two/b/Bilder,two/b/Masken")
    Path("CVC/a.json").touch()
    told = "polygons or boxes (.json, .xml, .txt) have to be drawn into images first"
    run(train, f"{TINY} --data CVC").refuses(told)
    message = f"CVC/a.json: no image files there, but 1 others, such as a.json; {told}"
    run(train, f"{TINY} --data CVC/Photos,CVC/a.json").refuses(message)
    make_pairs(here / "ab[1]", "photos + masques", "pqrstuvwxyz")
    make_pairs(here / "c", "x + y")
    make_pairs(here, "one + one", "abc", ending="_mask")
    flags = "--data ab[1]/photos,ab[1]/masques one/*.jpg,one/*_mask.png --val c/x,c/y --epochs 1"
    ended = run(train, f"{TINY} {flags} --out run")
    ended.says("train: ab[1]: 11 images in ab[1]/photos, masks in ab[1]/masques, no splits")
    ended.says("train: one: 3 images in one, masks in one, no splits")
    ended.says("val:   c: 2 images in c/x, masks in c/y, no splits")
    last = load("run/last.pt")
    assert last["val"] == [f"{here}/c/x,{here}/c/y"]
    assert last["run"]["data"][1] == f"{here}/one/*.jpg,{here}/one/*_mask.png"
    run(train, "--resume run --workers 0 --device cpu").says()
    for flags in ("", "--data c/x,c/y --save maps"):
        ended = run(evaluate, f"--ckpt run {flags} --workers 0 --device cpu")
        ended.says("run/best.pt: sod, tiny, epoch 1")
    run(evaluate, f"{MAPS} --data c/x,c/y").says()
    Path("run/best.pt").unlink()
    run(evaluate, "--ckpt run --workers 0 --device cpu").says("run/last.pt: sod")
    message = "one: images and masks are the same; name patterns"
    run(train, f"{TINY} --data one,one --epochs 1 --out other").refuses(message)


def test_what_is_validated_on_and_shown(here, run):
    """No test split without masks; a part that is held out."""
    make_pairs(here / "half", "train/images + train/masks", "abcd")
    make_pairs(here / "half", "test/images + elsewhere")
    ended = run(train, f"{TINY} --data half --epochs 1 --out run").says("val:   none")
    ended.says("look:  run/data.png shows training pairs")
    command = "next:  python evaluate.py --ckpt run --data PHOTOS --save predictions"
    assert ended.out.splitlines()[-1] == command
    for name in ("samples.png", "data.png"):
        picture = np.asarray(Image.open(f"run/{name}")).astype(int)
        assert picture.shape == (4 * 200, 600 if name == "samples.png" else 400, 3)
    red, green, blue = np.moveaxis(picture[:, :200], -1, 0)
    assert 0.003 < np.mean((red > 200) & (green < 30) & (blue < 30)) < 0.1  # the outlines
    message = "half/test: no images beside masks for the val split"
    run(train, f"{TINY} --data half --val half/test --epochs 1 --out other").refuses(message)
    make_pairs(here / "own", "images + masks", "abcdefghij")
    for seed in (0, 1):
        flags = f"{TINY} --data own --val 0.3 --seed {seed} --epochs 1 --out {seed}"
        ended = run(train, flags).says("val:   3 of these pairs, held out by --val 0.3")
        assert "training images" not in ended.err
    whole, other = (load(f"{seed}/last.pt") for seed in (0, 1))
    assert whole["run"]["training_images"].startswith("7 (") and "S" in whole["rows"][0]
    assert whole["run"]["validation_images"] != other["run"]["validation_images"]
    run(train, "--resume 0 --workers 0 --device cpu").says()
    message = "trained without a validation set, or with a fraction held out; pass datasets"
    run(evaluate, "--ckpt 0 --workers 0 --device cpu").refuses(message)
    run(train, f"{TINY} --data own --val .01 --epochs 1 --out few").says("val:   1 of these pairs")
    run(train, f"{TINY} --data own --val 1.5").refuses("1.5: no such file or folder")


def test_photographs_and_maps(score):
    """A folder is searched below, maps keep its folders, and a broken one does not stop the others."""
    make_pairs(Path("photos"), ". + ../elsewhere")
    make_pairs(Path("photos"), "2023/May + ../elsewhere", "a")
    Path("photos/aa.jpg").write_bytes(Path("photos/a.jpg").read_bytes()[:-500])
    ended = score(f"{CKPT} --data photos --save maps")
    ended.refuses("error: 1 photographs could not be read, see above; the others are pre")
    ended.refuses("warning: photos/aa.jpg: cannot be read as an image (")
    assert "photos: 3 maps in maps/photos" in ended.out
    written = sorted(str(file) for file in Path("maps").rglob("*.png"))
    assert written == [f"maps/photos/{name}.png" for name in ("2023/May/a", "a", "b")]
    Path("photos/aa.jpg").unlink()
    if sys.getfilesystemencoding() == "utf-8":  # macOS writes an accent as a character of its own
        composed, apart = "K\u00fcche", "Ku\u0308che"
        make_pairs(Path("d"), "Imgs + GT", (apart, "b"))
        Path(f"d/GT/{apart}.png").rename(f"d/GT/{composed}.png")
        score(f"{CKPT} --data d --save apart").says("2 maps in apart/d")
        Path(f"apart/d/{composed}.png").rename(f"apart/d/{apart}.png")
        score("--maps apart --data d --workers 0").says("d: 2 images")
    # Colours are scored by brightness, and that is said.
    told = "ECSSD: 3 of 3 masks or maps have colours or a varying alpha"
    assert told in score("--maps ECSSD/Imgs --data ECSSD --workers 0").err
    Path("photos/below").mkdir()
    os.chdir("photos/below")  # no name is ever ..
    score("--ckpt ../../model.pt --device cpu --data .. --save ../out --workers 0").says()
    assert Path("../out/photos/a.png").exists()


def test_a_run_starts_restarts_and_moves_to_another_machine(here, run, monkeypatch):
    """With one command; its rows have a GPU's peak memory; SAM's file and the data are elsewhere."""
    sam_file(here / "sam.pth", 64)
    flags = f"{SMALL} --sam-checkpoint sam.pth --epochs 2"
    run(train, f"{flags} --out whole").says()
    with monkeypatch.context() as patch:
        stop_in_epoch_2(patch)
        for said in ("run has no last.pt; a new run starts", "after epoch 1 of 2"):
            stopped = run(train, f"{flags} --out run --resume").refuses("stopped")
            assert f"resume: {said}" in stopped.out
    last = load("run/last.pt")
    last["rows"][0]["peak_MB"] = 5.0
    torch.save(last, "run/last.pt")
    Path("data").rename("moved")
    Path("sam.pth").rename("other.pth")
    resume = "--resume run --workers 0 --device cpu"
    run(train, resume).refuses("data: no such file or folder; pass the dataset")
    ended = run(train, f"{resume} --data moved --sam-checkpoint other.pth")
    ended.says("val:   moved: 3 images in moved/test/Imgs").says("resume: after epoch 1 of 2")
    assert [row["peak_MB"] for row in read_rows("run/log.csv")] == ["5.0", ""]
    assert same_weights(weights_of("run/last.pt"), weights_of("whole/last.pt"))
    run(train, "--resume run --out a").refuses("--out: --resume run continues in its own folder")
    last = load("run/last.pt")
    assert last["encoder"]["sam_checkpoint"] == str(here / "other.pth")
    assert last["run"]["data"] == [str(here / "moved")]
    model, info = load_checkpoint("run/last.pt")
    assert "encoder" not in info and "trained" not in info and info["config"] == model.config
    remembered = (OURS | PAPERS | RELEASE).keys() - {"workers", "device", "out", "resume"}
    assert last["run"].keys() == remembered | {"training_images", "validation_images"}
    older = {name: value for name, value in last.items() if name != "run"}
    for content in (load("run/best.pt"), under_released_names(model), older):  # of another kind
        torch.save(content, "run/last.pt")
        ended = run(train, "--resume run --workers 0")
        ended.refuses("run/last.pt is not of this version's train.py; start a ne")
        assert ended.err.count("\n") == 1


def test_handlers_are_put_back(usual_signals, monkeypatch):
    """In a notebook, under nohup and in a user's own program."""

    def handlers(run: Callable = lambda main: main()) -> list:
        during = []
        run(lambda: during.extend(signal.getsignal(number) for number in evaluate.STOP_SIGNALS))
        return during

    known = handlers()
    assert all(callable(handler) and handler not in known for handler in handlers(evaluate.run))
    # torchrun's others do not wait for Python.
    for name, left in (("evaluate.RANK", [signal.SIG_DFL] * 2), ("builtins.__IPYTHON__", known)):
        with monkeypatch.context() as patch:
            patch.setattr(name, 1, raising=False)
            assert handlers(evaluate.run) == left
    assert handlers() == known
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert handlers(evaluate.run)[0] == handlers()[0] == signal.SIG_IGN


def test_the_readme_names_what_there_is(monkeypatch, capsys):
    assert globals().keys() >= set(re.findall(r"`(test_\w+)`", README))
    for module in (train, evaluate):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", "--help"])
        with pytest.raises(SystemExit, match="0"):
            module.main()
    helps = capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--nproc_per_node", "--nproc"}
    assert len(flags) > 15
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", helps)]
    for file in re.findall(r"\]\(((?!http|#)[^)#]+)", README):
        assert Path(tssam.__file__).with_name(file.split("/")[0]).exists(), file
