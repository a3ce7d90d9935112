"""The tests of tssam.py, evaluate.py and train.py: `python -m pytest`. No data, weights, network or GPU needed."""

import copy
import csv
import functools
import gc
import hashlib
import http.server
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from segment_anything import sam_model_registry
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import train
import tssam
from tssam import CSA, FFD, MRM, TSSAM, InputError, build_tssam, load_checkpoint, load_released, released_name

SIZE = 128  # pixels: 8 x 8 patches, which the windows of `tiny` do not divide
torch.set_num_threads(1)  # faster at these sizes, and as in the processes that some tests start
README = Path(tssam.__file__).with_name("README.md").read_text()


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


def mrm_by_hand(m: MRM, f_vit: torch.Tensor, f_mrm: tuple) -> list[torch.Tensor]:
    result = []
    for k, (deconv, gate, before) in enumerate(((m.deconv1, m.gate1, f_mrm[0]), (m.deconv2, m.gate2, f_mrm[1])), 1):
        f = conv_norm_relu(f_vit, m.conv)
        for i in (0, 3) if k == 1 else (0,):
            f = norm_relu(F.conv_transpose2d(f, deconv[i].weight, deconv[i].bias, stride=2), deconv[i + 1])
        hidden = torch.einsum("oc,bchw->bohw", gate.w1.weight, f).clamp_min(0)
        result.append(torch.einsum("oc,bchw->bohw", gate.w2.weight, hidden).tanh() * f + before)
    return result


def ffd_by_hand(m: FFD, f_csa: torch.Tensor, f_mrm1: torch.Tensor, f_mrm2: torch.Tensor) -> torch.Tensor:
    x = conv_norm_relu(f_csa, m.conv_csa, 1)
    for inject, f_mrm in ((m.inject2, f_mrm2), (m.inject1, f_mrm1)):
        r = conv_norm_relu(f_mrm, inject.conv_mrm, 1)
        quads = torch.stack([r[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
        x = conv_norm_relu(torch.cat([x, quads.mean(0) + quads.amax(0)], 1), inject.stage1, 1)
        x = nn.UpsamplingBilinear2d(scale_factor=2)(x)  # corners aligned
        x = conv_norm_relu(torch.cat([x, f_mrm], 1), inject.stage2, 1)
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
    csa, mrm, f_mrm, received = iter(m.csa[1:]), iter(m.mrm), (0, 0), []
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
    logits = ffd_by_hand(m.ffd, f_csa, *f_mrm)
    return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False), received


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"high_freq": True}, {"csa_blocks": (0, 2), "mrm_blocks": (1,)}], ids=str)
@torch.no_grad()
def test_equations_1_to_10(training, arguments):
    model = tiny(**arguments).train(training)
    expected, received = tssam_by_hand(model, images())
    seen = []
    modules = [*model.image_encoder.blocks, model.image_encoder.neck]
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in modules]
    logits = model(images())
    for handle in handles:
        handle.remove()
    assert logits.shape == (2, 1, SIZE, SIZE) and same(logits, expected, 1e-4)
    # Write-back: what every block and the neck receive is the merged map, not the output of the block before.
    assert len(seen) == len(received) == 5
    assert all(same(a, b, 1e-4) for a, b in zip(seen, received, strict=True))


def test_high_pass():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")

    def wave(fx: int, fy: int) -> torch.Tensor:
        return torch.cos(2 * math.pi * (fx * x + fy * y) / 64).expand(1, 3, 64, 64)

    # The square spans the frequencies -16 ... 15 of -32 ... 31 in each direction.
    assert tssam.high_pass(wave(0, 0)).abs().max() < 1e-5 and tssam.high_pass(wave(15, 15)).abs().max() < 1e-4
    assert same(tssam.high_pass(wave(17, 0)), wave(17, 0).abs(), 1e-4)
    assert same(tssam.high_pass(wave(16, 0)), wave(16, 0).abs() / 2, 1e-4)  # -16 is removed, +16 is not
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tssam.high_pass(wave(2, 5) + wave(20, 1))
    assert mixed.dtype == torch.float32 and same(mixed, wave(20, 1).abs(), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The authors' numbers

# fmt: off
PARITY = {  # the released network in float64, ViT-B at 64 x 64, batch 2: some logits, the loss, gradients' norms
    False: dict(
        seed=31,
        loss=1.4989147499662112,
        eval_logits=[
            0.10507520960191347, -0.34816095926137935, 0.40816382066275614, 0.5747045321779736, 0.22499868521532218,
            0.10546180342416812, 0.003492072470261261, 0.46672755304788544, 0.13509447736229027, 0.29074432704596154,
            0.4357443761098373
        ],
        train_logits=[
            0.38091806224182856, -0.6855632680770801, 0.14713039480923573, 0.06318676032252235, 0.1149228509546421,
            -0.7093597663289728, -0.4310190047810222, -0.07746748307220355, 0.03837977431232462, 0.10705375593002253,
            -0.011778688021115275
        ],
        gradients={
            "image_encoder.csa_embedding.weight": 1.0527873790542046,
            "image_encoder.csa_blocks.0.conv1.weight": 0.6105652183858243,
            "image_encoder.csa_blocks.5.conv2.weight": 0.5626890931516142,
            "image_encoder.csa_blocks.13.bn1.weight": 0.0029125374240348014,
            "image_encoder.mrm_blocks.0.conv_in.0.weight": 0.4536017018961441,
            "image_encoder.mrm_blocks.3.fpn1.6.res_gate.0.weight": 0.08842795328242666,
            "image_encoder.mrm_blocks.12.fpn2.3.res_gate.2.weight": 0.03182463775030869,
            "image_encoder.mrm_blocks.7.fpn1.3.weight": 0.2612785577450426,
            "mask_decoder.conv1.0.weight": 0.14864426248408194,
            "mask_decoder.conv2.0.weight": 0.20818622120015176,
            "mask_decoder.conv12_1.0.weight": 0.3116222310972423,
            "mask_decoder.conv24_2.1.weight": 0.07476021783987123,
            "mask_decoder.conv1_1.weight": 0.88538343526778,
        },
    ),
    True: dict(
        seed=32,
        loss=0.2769969365752155,
        eval_logits=[
            -0.39931008569859383, -0.10191281324501773, -0.195622523988275, 0.06562470908718122, -0.3353982422872462,
            0.06754271061584509, -0.14986665770959445, -0.1029378844753932, -0.41216946906435065,
            -0.007803954062022219, 0.14850713643814847
        ],
        train_logits=[
            0.4779838523596703, 0.6629647094905116, 0.06953275134037311, 0.21878607131674435, 0.5654207336177945,
            0.45918221292917066, 0.9954114375156268, -0.8010876415190812, 0.5969642931391606, -0.12814133346182377,
            0.2710887948917101
        ],
        gradients={
            "image_encoder.csa_embedding.weight": 0.3757180515991604,
            "image_encoder.csa_blocks.0.conv1.weight": 0.22153671553879184,
            "image_encoder.csa_blocks.5.conv2.weight": 0.20132311835482075,
            "image_encoder.csa_blocks.13.bn1.weight": 0.000886666185141335,
            "image_encoder.mrm_blocks.0.conv_in.0.weight": 0.14576570742295317,
            "image_encoder.mrm_blocks.3.fpn1.6.res_gate.0.weight": 0.033196245214031306,
            "image_encoder.mrm_blocks.12.fpn2.3.res_gate.2.weight": 0.009679748256764726,
            "image_encoder.mrm_blocks.7.fpn1.3.weight": 0.09163368881397352,
            "mask_decoder.conv1.0.weight": 0.049429717003052175,
            "mask_decoder.conv2.0.weight": 0.061118217167562404,
            "mask_decoder.conv12_1.0.weight": 0.10014519940774934,
            "mask_decoder.conv24_2.1.weight": 0.01662419712740729,
            "mask_decoder.conv1_1.weight": 0.17218138174012296,
            "image_encoder.fft_embedding.proj.weight": 0.10538720545024455,
        },
    ),
}
# fmt: on


def seeded(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """What the authors' network was filled with: a released tensor's numbers follow from its name and a seed."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    x = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())])).standard_normal(shape)
    if name.endswith("running_var"):
        x = 1 + 0.2 * np.abs(x)
    elif name.endswith(("running_mean", ".bias")) or "pos" in name:
        x = 0.1 * x
    elif len(shape) == 1:  # a norm's scale
        x = 1 + 0.1 * x
    else:
        x = x * (0.3 if name.endswith(("attn.proj.weight", "mlp.lin2.weight")) else 1) / math.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.parametrize("high_freq", [False, True])
def test_float64_parity_with_the_release(high_freq, monkeypatch):
    expected = PARITY[high_freq]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = build_tssam("vit_b", 64, high_freq)
    shapes = {released_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    load_released(model, {name: seeded(name, shape, expected["seed"]) for name, shape in shapes.items()})
    rng = np.random.Generator(np.random.Philox(key=[expected["seed"], 0xDA7A]))
    coarse = np.kron(rng.standard_normal((2, 3, 4, 4)), np.ones((16, 16)))
    x = torch.from_numpy((coarse + 0.5 * rng.standard_normal((2, 3, 64, 64))).astype(np.float32)).double()
    row, column = np.mgrid[0:64, 0:64] / 64
    centre, radius = 0.3 + 0.4 * rng.random((2, 2)), 0.15 + 0.2 * rng.random(2)
    masks = [(row - c[0]) ** 2 + (column - c[1]) ** 2 < r * r for c, r in zip(centre, radius, strict=True)]
    model.double().eval()
    with torch.no_grad():
        eval_logits = model(x)
    train_logits = model.train()(x)
    loss_of = train.balanced_bce if high_freq else train.bce_iou
    loss = loss_of(train_logits, torch.from_numpy(np.stack(masks)[:, None]).double())
    loss.backward()
    assert eval_logits[..., ::16, ::16].flatten()[::3].tolist() == pytest.approx(
        expected["eval_logits"], rel=0, abs=1e-9
    )
    assert train_logits[..., ::16, ::16].flatten()[::3].tolist() == pytest.approx(
        expected["train_logits"], rel=0, abs=1e-9
    )
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    norms = {released_name(name): p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    assert {name: norms[name] for name in expected["gradients"]} == pytest.approx(expected["gradients"], rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize(
    "sam, csa, mrm, trained",
    [("vit_b", 14, 13, 11_892_865), ("vit_l", 26, 13, 20_403_073), ("vit_h", 34, 13, 29_437_569)],
)
def test_counts(sam, csa, mrm, trained):
    with torch.device("meta"):
        model, with_high_freq = build_tssam(sam), build_tssam(sam, high_freq=True)
        theirs = sam_model_registry[sam]().image_encoder
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, with_high_freq)]
    assert (len(model.csa), len(model.mrm), *counts) == (csa, mrm, trained, trained + 196_864)
    if sam == "vit_h":
        assert sum(p.numel() for p in model.parameters()) == 666_463_617  # the paper's 4.4 %
        assert model.config["mrm_blocks"] == list(range(20, 32))
    # The encoder is segment-anything's: layers, widths, the epsilon of the norms, windows.
    ours = model.image_encoder
    assert re.sub("EncoderBlock", "Block", str(ours)).replace("FusedAttention", "Attention") == str(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        assert (a.window_size, a.attn.num_heads, a.attn.windowed) == (
            b.window_size,
            b.attn.num_heads,
            b.window_size > 0,
        )


def test_initialisation():
    torch.manual_seed(0)
    model = TSSAM("vit_b", 64)
    up, down, compress = model.csa[3].up[0], model.csa[3].down[0], model.mrm[3].conv[0]
    for conv, fan_out in ((up, 768), (down, 256), (compress, 128)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
        assert not conv.bias.any()
    for linear in (model.mrm[3].gate1.w1, model.mrm[3].gate2.w2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and linear.bias is None


def test_taps_leave_nothing_behind():
    model = tiny()
    encoder, kept = model.image_encoder, []
    probe = encoder.blocks[2].mlp.register_forward_hook(lambda m, args, output: kept.append(weakref.ref(output)))
    first = model(images())
    del first
    gc.collect()
    assert kept[0]() is None  # freed with the graph
    probe.remove()

    def fail(module, args):
        raise RuntimeError("half-way")

    with encoder.blocks[1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="half-way"):
        model(images())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    twin = copy.deepcopy(model)  # taps its own encoder
    with torch.no_grad():
        alone = model.eval()(images())
        assert torch.equal(twin.eval()(images()), alone)
        for p in twin.parameters():
            p.zero_()
        assert not twin(images()).any() and torch.equal(model(images()), alone)


@pytest.mark.parametrize("high_freq", [False, True])
def test_one_step_and_grad_checkpoint(high_freq):
    """A step moves every trained tensor and nothing of the encoder; recomputing the blocks changes no number."""
    masks, stepped = (images(2, seed=1)[:, :1] > 0).float(), []
    for grad_checkpoint in (False, True):
        model = tiny(high_freq=high_freq)
        model.grad_checkpoint = grad_checkpoint
        calls = []
        model.image_encoder.blocks[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        train.bce_iou(model(images()), masks).backward()
        assert len(calls) == 1 + grad_checkpoint
        optimizer.step()
        stepped.append(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == name.startswith("image_encoder."), name
        assert all(p.grad is None for p in model.image_encoder.parameters())
    assert all(torch.equal(stepped[0][name], stepped[1][name]) for name in stepped[0])


def both_attentions(width: int, heads: int, sides: tuple[int, int], windowed: bool) -> tuple[Attention, Attention]:
    """SAM's own and ours with the same weights, relative positions and all, none of them zero."""
    torch.manual_seed(0)
    sam = Attention(width, heads, use_rel_pos=True, input_size=sides)
    for parameter in sam.parameters():
        nn.init.normal_(parameter, std=0.2)
    fused = copy.deepcopy(sam.requires_grad_(False))
    fused.__class__, fused.windowed = tssam.FusedAttention, windowed
    return sam, fused


def output_and_gradient(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = attention(x)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return output.detach(), x.grad


@pytest.mark.parametrize("high_freq", [False, True])
def test_no_tensor_is_left_on_the_cpu(high_freq):
    """Forward and loss with every tensor on a pretended GPU."""
    model = TSSAM("tiny", 64, high_freq)
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        fake = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                        tensors[name] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
        x, masks = torch.empty(2, 3, 64, 64, device="cuda"), torch.empty(2, 1, 64, 64, device="cuda")
        try:
            logits = model(x)
        except RuntimeError as error:
            if "CUDA driver" not in str(error):
                raise
            pytest.skip("this PyTorch asks the driver about a pretended GPU")
        assert {loss_of(logits, masks).device.type for loss_of in (train.bce_iou, train.balanced_bce)} == {"cuda"}


@pytest.mark.parametrize(
    "width, heads, sides, shape, windowed",
    [
        (768, 12, (14, 14), (3, 14, 14), True),  # ViT-B's windows, d = 64
        (1280, 16, (14, 14), (2, 14, 14), False),  # ViT-H's, d = 80
        (768, 12, (16, 16), (2, 16, 16), False),  # global at 256 x 256
        (1280, 16, (12, 20), (1, 12, 20), True),  # not square
        (64, 4, (8, 8), (2, 13, 9), False),  # maps for which SAM resamples the relative positions
    ],
)
def test_both_attentions_agree(width, heads, sides, shape, windowed):
    sam, fused = both_attentions(width, heads, sides, windowed)
    x = 0.3 * torch.randn(*shape, width)
    for ours, theirs in zip(output_and_gradient(fused, x), output_and_gradient(sam, x), strict=True):
        assert (ours - theirs).abs().max() <= 5e-6 * theirs.abs().max()


class Allocations(TorchDispatchMode):
    """The largest number of elements of a tensor that an operation within returned."""

    largest = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if torch.is_tensor(t)]
        self.largest = max([self.largest, *sizes])
        return result


def test_no_n_by_n_tensor_is_allocated():
    largest = []
    for attention in both_attentions(16, 2, (24, 24), False):  # N = 576
        with Allocations() as allocations:
            output_and_gradient(attention, torch.randn(1, 24, 24, 16))
        largest.append(allocations.largest)
    assert largest[0] >= 2 * 576 * 576 and largest[1] < 0.3 * 576 * 576


def test_the_encoder_stored_in_bf16_is_what_autocast_makes_of_it():
    model, stored = tiny().eval(), tiny().eval()
    stored.store_encoder(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
        assert torch.equal(logits, stored(images())) and logits.dtype == torch.float32
    assert stored.image_encoder.blocks[0].mlp.lin1.weight.dtype == torch.bfloat16
    assert stored.image_encoder.pos_embed.dtype == stored.csa_embedding.weight.dtype == torch.float32


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
def test_losses_of_one_sided_masks_are_finite_and_float32(loss_of, value, certain):
    logits = torch.full((2, 1, 4, 4), certain, dtype=torch.bfloat16, requires_grad=True)
    loss = loss_of(logits, torch.full((2, 1, 4, 4), value))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
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
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if size == SIZE or "pos" not in name)
    for mine, sams in zip(model.image_encoder.blocks, tiny(5).image_encoder.blocks, strict=True):
        span = grid if mine.window_size == 0 else 7
        rule = get_rel_pos(span, span, sams.attn.rel_pos_h)  # SAM's own, from its 8 x 8 grid
        assert torch.allclose(get_rel_pos(span, span, mine.attn.rel_pos_h), rule, atol=1e-6)
    # The position embedding keeps its picture: a map that rises along the rows still does, from about 0 to about 1.
    state = torch.load(path, weights_only=True)
    state["image_encoder.pos_embed"] = torch.linspace(0, 1, 8)[None, :, None, None].expand(1, 8, 8, 64).clone()
    torch.save(state, path)
    ramp = build_tssam("tiny", size, sam_checkpoint=path).image_encoder.pos_embed[0]
    assert ramp.shape == (grid, grid, 64) and torch.allclose(ramp, ramp[:, :1, :1].expand_as(ramp), atol=1e-6)
    assert (ramp[1:, 0, 0] > ramp[:-1, 0, 0]).all() and ramp.min() > -0.1 and ramp.max() < 1.1


@torch.no_grad()
def test_released_checkpoints(tmp_path):
    """All names together are held by the parity test; here: which model a file is, and what is wrong with it."""
    for high_freq, task in ((False, "sod or cod"), (True, "shadow")):
        source = tiny(1, high_freq=high_freq).eval()
        released = {released_name(name): tensor for name, tensor in source.state_dict().items()}
        torch.save(released, tmp_path / "theirs.pth")
        rebuilt, info = load_checkpoint(tmp_path / "theirs.pth")
        assert info == {"task": task} and rebuilt.config == source.config
        assert torch.equal(rebuilt.eval()(images()), source(images()))
    gate, target = "image_encoder.mrm_blocks.0.fpn1.6.res_gate.0.weight", tiny(2, high_freq=True).eval()
    before = target(images())
    for broken, message in (
        ({k: v for k, v in released.items() if k != gate}, f"{gate} is missing"),
        ({**released, "mask_decoder.extra": torch.zeros(1)}, "mask_decoder.extra is surplus"),
        ({**released, gate: torch.zeros(3, 16)}, f"{gate} is (3, 16), not (16, 16)"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            load_released(target, broken)
    assert torch.equal(target(images()), before)
    torch.save({"model": {f"module.{name}": t for name, t in released.items()}}, tmp_path / "wrapped.pth")
    assert torch.equal(load_checkpoint(tmp_path / "wrapped.pth")[0].eval()(images()), source(images()))


def checkpoint(path: Path, model: TSSAM, sam: Path | None = None, task: str = "sod", **info) -> Path:
    """A checkpoint as train.py writes it, of an encoder from SAM's file, or of a random one."""
    random = model.image_encoder.state_dict() if sam is None else None
    encoder = dict(fingerprint=tssam.fingerprint(model), sam_checkpoint=sam and str(sam), random=random)
    tssam.save_checkpoint(path, model, task=task, encoder=encoder, **info)
    return path


@torch.no_grad()
def test_checkpoints_hold_the_trained_part_and_rebuild_the_model(tmp_path):
    sam = sam_file(tmp_path / "sam.pth", 64)
    model = build_tssam("tiny", SIZE, True, sam, csa_blocks=[1, 3], mrm_blocks=(0, 2))
    model(images())  # the batch norms' statistics must come back too
    path = checkpoint(tmp_path / "best.pt", model, sam, task="shadow", epoch=3)
    stored = torch.load(path, weights_only=True)
    assert not any(name.startswith("image_encoder") for name in stored["trained"]) and not list(tmp_path.glob("*.tmp"))
    for given in (None, sam):  # remembered, and named
        rebuilt, info = load_checkpoint(path, given)
        assert (info["task"], info["epoch"], rebuilt.config) == ("shadow", 3, model.config)
        assert torch.equal(rebuilt.eval()(images()), model.eval()(images()))
    with pytest.raises(InputError, match="best.pt: trained on another encoder than .*other.pth"):
        load_checkpoint(path, sam_file(tmp_path / "other.pth", 64, seed=6))
    state = torch.load(sam, weights_only=True)
    state["image_encoder.blocks.3.mlp.lin2.bias"][0] += 1e-3  # as a LoRA that was merged
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match="best.pt: trained on another encoder than .*other.pth"):
        load_checkpoint(path, tmp_path / "other.pth")
    rebuilt, _ = load_checkpoint(checkpoint(tmp_path / "random.pt", model))
    assert torch.equal(rebuilt.eval()(images()), model(images()))
    del stored["trained"]["ffd.head.bias"]
    torch.save(stored, path)
    with pytest.raises(InputError, match="best.pt: ffd.head.bias is missing"):
        load_checkpoint(path)


def test_files_that_are_no_checkpoints_are_rejected(tmp_path):
    path = sam_file(tmp_path / "sam.pth", SIZE)
    with pytest.raises(InputError, match=r"sam.pth: holds tiny, not vit_b: --sam tiny"):
        build_tssam("vit_b", 64, sam_checkpoint=path)
    state = torch.load(path, weights_only=True)
    for wrapped in (
        {"model": state, "epoch": 3},
        {"model": "vit_b", "state_dict": {f"module.{n}": t for n, t in state.items()}},
    ):
        torch.save(wrapped, tmp_path / "wrapped.pth")
        assert torch.equal(
            build_tssam("tiny", SIZE, sam_checkpoint=tmp_path / "wrapped.pth").image_encoder.pos_embed,
            state["image_encoder.pos_embed"],
        )
    torch.save({f"vision_{name}": t for name, t in state.items()}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: holds no encoder of SAM's; its tensors are vision_image_enc"):
        build_tssam("tiny", 64, sam_checkpoint=tmp_path / "other.pth")
    del state["image_encoder.blocks.3.norm1.weight"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth, as SAM's tiny encoder: blocks.3.norm1.weight is missing"):
        build_tssam("tiny", 64, sam_checkpoint=tmp_path / "other.pth")
    for broken in (path.read_bytes()[:1000], b"<html>", b""):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="sam.pth: not a checkpoint, or not a whole one; torch.load says"):
            load_checkpoint(path)
    torch.save({"f": functools.partial(print)}, path)  # anything but tensors and plain values is refused unread
    with pytest.raises(InputError, match="sam.pth: not a checkpoint, .* says UnpicklingError"):
        load_checkpoint(path)
    for content, message in (
        ([1], "holds a list"),
        ({"a": 1}, "neither .* nor one of the authors' code .*; it holds a"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=f"sam.pth: {message}"):
            load_checkpoint(path)
    with pytest.raises(InputError, match="nowhere.pth: no such file"):
        load_checkpoint(tmp_path / "nowhere.pth")
    for arguments, message in (
        (("vit_x",), "no encoder is called 'vit_x'"),
        (("tiny", 100), "100 is not a positive multiple of 16"),
        (("tiny", 64, False, None, [4]), "tiny has the blocks 0 to 3, and no block 4"),
    ):
        with pytest.raises(InputError, match=message):
            build_tssam(*arguments)
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\), not \(batch, 3, 128, 128\)"):
        tiny()(images(2, 64))


def test_a_failed_write_leaves_the_file_before_it(tmp_path):
    (tmp_path / "last.pt").write_text("whole")

    def full_disk(file):
        file.write_text("half")
        raise OSError("no space left")

    with pytest.raises(InputError, match=r"cannot be written \(no space left\); what was there before is whole"):
        tssam.write(tmp_path / "last.pt", full_disk)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["whole"]


def test_download(tmp_path, monkeypatch):
    """SAM's public URL replaced by a folder of this machine, served over HTTP."""
    public, folder = tmp_path / "public", tmp_path / "checkpoints"
    public.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(public))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert tssam.SAM_URL == "https://dl.fbaipublicfiles.com/segment_anything/"
    monkeypatch.setattr(tssam, "SAM_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(tssam, "SAM_FILES", {"vit_b": ("sam_b.pth", hashlib.sha256(b"weights").hexdigest())})
    where = f"get {tssam.SAM_URL}sam_b.pth and put it at {folder / 'sam_b.pth'}"
    with pytest.raises(InputError, match=re.escape(where)):  # 404
        tssam.sam_weights("vit_b", folder)
    (public / "sam_b.pth").write_bytes(b"weightz")
    with pytest.raises(InputError, match=re.escape(where)):  # wrong hash
        tssam.sam_weights("vit_b", folder)
    assert list(folder.iterdir()) == []
    (public / "sam_b.pth").write_bytes(b"weights")
    assert tssam.sam_weights("vit_b", folder).read_bytes() == b"weights"
    server.shutdown()
    server.server_close()
    assert tssam.sam_weights("vit_b", folder) == folder / "sam_b.pth"  # there already: not asked for again
    with pytest.raises(InputError, match="tiny: no weights are published for it"):
        tssam.sam_weights("tiny", folder)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def make_pairs(root: Path, folders: str, stems: str = "ab", side: int = 40) -> list[tuple[Path, Path]]:
    """Pairs in root/<images> and root/<masks>, given as "a/b + c"."""
    rng, pairs = np.random.default_rng(0), []
    image_folder, mask_folder = (root / folder for folder in folders.split(" + "))
    for folder in (image_folder, mask_folder):
        folder.mkdir(parents=True, exist_ok=True)
    for i, stem in enumerate(stems):
        pairs.append((image_folder / f"{stem}.jpg", mask_folder / f"{stem}.png"))
        Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(pairs[-1][0])
        mask = np.zeros((side, side + 8), np.uint8)
        mask[5 : 30 - i, 5:30] = 255
        Image.fromarray(mask).save(pairs[-1][1])
    return pairs


COD_SETS = ("CAMO", "CHAMELEON", "COD10K", "NC4K")
LAYOUTS = {  # root: folders of the train split, or None where it has no splits, {test set's name: its folders}
    "DUTS": (
        "DUTS-TR/DUTS-TR-Image + DUTS-TR/DUTS-TR-Mask",
        {"DUTS-TE": "DUTS-TE/DUTS-TE-Image + DUTS-TE/DUTS-TE-Mask"},
    ),
    "ECSSD": (None, {"ECSSD": "images + ground_truth_mask"}),
    "DUT-OMRON": (None, {"DUT-OMRON": "DUT-OMRON-image + pixelwiseGT-new-PNG"}),
    "HKU-IS": (None, {"HKU-IS": "imgs + gt"}),
    "PASCAL-S": (None, {"PASCAL-S": "Imgs + masks"}),
    "Pascal_S": (None, {"Pascal_S": "Image + gt"}),
    "COD": ("TrainDataset/Imgs + TrainDataset/GT", {n: f"TestDataset/{n}/Imgs + TestDataset/{n}/GT" for n in COD_SETS}),
    "older": ("TrainDataset/Image + TrainDataset/GT", {"CAMO": "TestDataset/CAMO/Image + TestDataset/CAMO/GT"}),
    "ISTD": ("train/train_A + train/train_B", {"ISTD": "test/test_A + test/test_B"}),
    "mine": (None, {"mine": "My-IMAGES + my_Masks"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    root, (train_folders, tests) = tmp_path / layout, LAYOUTS[layout]
    train_pairs = make_pairs(root, train_folders, "tu") if train_folders else []
    test_pairs = {name: make_pairs(root, folders) for name, folders in tests.items()}
    if layout == "ISTD":  # _C is the shadow-free image
        (root / "train/train_C").mkdir()
    for given in (root, tmp_path):  # named, or by a folder above
        found = evaluate.find_sets([given], "test")
        assert {s.name: s.pairs for s in found} == test_pairs
        assert all(s.split == ("test" if train_pairs else None) for s in found)
    (s,) = evaluate.find_sets([root], "train")
    assert s.pairs == (train_pairs or next(iter(test_pairs.values())))
    (named,) = evaluate.find_sets([s.folder], "test")  # the split's own folder, named
    assert (named.name, named.pairs) == (s.name, s.pairs)


def test_data_that_cannot_be_used_is_one_error(tmp_path, capsys):
    make_pairs(tmp_path / "alone", "Imgs + GT", "abc")
    (tmp_path / "alone/GT/b.png").unlink()
    make_pairs(tmp_path / "twice", "Imgs + GT")
    (tmp_path / "twice/Imgs/a.bmp").touch()
    make_pairs(tmp_path / "several", "Imgs + GT")
    (tmp_path / "several/masks").mkdir()
    make_pairs(tmp_path / "two/A", "Imgs + GT")
    make_pairs(tmp_path / "two/B", "Imgs + GT")
    make_pairs(tmp_path / "only", "D-TR/Imgs + D-TR/GT")
    make_pairs(tmp_path / "odd", "pictures + labels")
    make_pairs(tmp_path / "photos", "Imgs + elsewhere/GT")
    (tmp_path / "empty/Imgs").mkdir(parents=True)
    make_pairs(tmp_path / "CAMO-V.1.0", "Images/Train + GT")
    (tmp_path / "CAMO-V.1.0/Images/Test").mkdir()
    for names, split, message in (
        (["nowhere"], "test", "nowhere: no such file or folder"),
        (["alone"], "train", "alone: 1 images without a mask and 0 masks without an image, such as b"),
        (["twice"], "test", "a.jpg: a.bmp has the same name but for its ending"),
        (["several"], "test", "several: several folders of one kind, GT and masks"),
        (["two"], "train", r"two: holds several datasets \(A, B\); name one"),
        (["two/A", "two/A"], "test", "A: named twice"),
        (
            ["only"],
            "test",
            "only: no dataset for the test split.*The folders there: D-TR.*images in im img.*in te test",
        ),
        (["odd"], "test", "odd: no dataset for the test split.*labels, pictures"),
        (["photos"], "train", "photos: no folder of masks; looked for gt gts"),
        (["empty"], "test", "Imgs: no image files in it, but nothing"),
        (
            ["CAMO-V.1.0"],
            "train",
            "Images: no image files in it, but Test, Train; CAMO is read as SINet's COD packs have it",
        ),
    ):
        with pytest.raises(InputError, match=message) as error:
            evaluate.find_sets([tmp_path / name for name in names], split)
        assert "\n" not in str(error.value)
    assert [s.name for s in evaluate.find_sets([tmp_path / "two"], "test")] == ["A", "B"]
    (s,) = evaluate.find_sets([tmp_path / "photos/Imgs"], "test")  # images alone
    assert [(image.name, mask) for image, mask in s.pairs] == [("a.jpg", None), ("b.jpg", None)]
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/Imgs/c.tif")
    (tmp_path / "photos/Imgs/d.heic").touch()
    (tmp_path / "photos/Imgs/d.mpg").touch()
    assert [image.name for image, _ in evaluate.find_sets([tmp_path / "photos/Imgs"], "test")[0].pairs][2] == "c.tif"
    assert "Imgs: skipped 2 files whose endings Pillow does not know, such as d.heic" in capsys.readouterr().err
    (s,) = evaluate.find_sets([tmp_path / "photos/Imgs/b.jpg"], "test")
    assert (s.name, len(s.pairs)) == ("b", 1)


def test_masks_of_every_kind(tmp_path):
    disk = (np.hypot(*np.mgrid[-10:10, -15:15]) < 8).astype(np.uint8)
    palette = Image.fromarray(disk).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    edges = disk * 200
    edges[:, 15:] //= 2
    for mask, expected in (
        (Image.fromarray(disk * 255).convert("1"), disk * 255),
        (Image.fromarray(disk * 255).convert("RGB"), disk * 255),
        (Image.fromarray(disk), disk * 255),  # of 0 and 1
        (palette, disk * 255),
        (Image.fromarray(edges), edges),  # grey levels stay
        (Image.fromarray(disk * 0), disk * 0),
    ):
        mask.save(tmp_path / "mask.png")
        read = evaluate.read_mask(tmp_path / "mask.png")
        assert read.mode == "L" and np.array_equal(np.asarray(read), expected)
        assert np.array_equal(evaluate.resize_mask(read.resize((60, 60), 0), 60)[::3, ::2], expected > 0)
    Image.fromarray(disk * 255).save(tmp_path / "mask.jpg", quality=60)
    assert len(np.unique(Image.open(tmp_path / "mask.jpg"))) > 10  # faint noise around the object
    assert np.array_equal(evaluate.read_mask(tmp_path / "mask.jpg"), disk * 255)
    deep = Image.fromarray(disk.astype(np.uint16) * 65535)
    deep.save(tmp_path / "mask.png")
    assert np.array_equal(evaluate.read_mask(tmp_path / "mask.png"), disk * 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone's photograph, on its side
    Image.fromarray(disk * 255).save(tmp_path / "photo.jpg", exif=exif)
    assert evaluate.read_image(tmp_path / "photo.jpg").size == (20, 30)
    assert evaluate.read_image(tmp_path / "photo.jpg", has_mask=True).size == (30, 20)  # masks are drawn on the pixels


def test_masks_that_say_nothing_are_counted(tmp_path, capsys):
    pairs, blank = make_pairs(tmp_path, "Imgs + GT", "abcd"), Image.new("L", (48, 40))
    blank.save(pairs[0][1])
    blank.point(lambda v: v + 1).save(pairs[1][1])  # labels 1 and 2
    Image.open(pairs[2][1]).point(lambda v: max(v, 5)).save(pairs[2][1])  # a veil, foreground in training
    assert evaluate.check_files("few", pairs) == 1
    assert capsys.readouterr().err == "warning: few: 1 of 4 masks are empty, 2 have no background\n"
    for number, message in ((0, "few: 1 of 1 masks are empty, 0"), (1, "few: 0 of 1 masks are empty, 1 have .*GT was")):
        with pytest.raises(InputError, match=message):
            evaluate.check_files("few", pairs[number : number + 1])
    Image.fromarray(np.full((40, 48), 1000, np.uint16)).save(tmp_path / "deep.png")
    assert evaluate.check_files("deep", [(tmp_path / "deep.png", pairs[3][1])]) == 0
    assert capsys.readouterr().err.startswith("warning: deep: 1 of 1 files have more than 8 bits, which are cut off")
    assert evaluate.check_files("good", pairs[3:]) == 0 and capsys.readouterr().err == ""


def test_training_batches(tmp_path):
    (pair, other) = make_pairs(tmp_path, "Imgs + GT")
    x, masks = evaluate.read_pairs([(*pair, False), (*pair, True), (*other, False)], 32)
    pixels = np.asarray(Image.open(pair[0]).resize((32, 32), Image.Resampling.BILINEAR)) / np.float32(255)
    by_hand = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    assert same(x[0], torch.from_numpy(by_hand).movedim(-1, 0)) and masks.shape == (3, 1, 32, 32)
    assert torch.equal(x[1], x[0].flip(-1)) and torch.equal(masks[1], masks[0].flip(-1)) and not same(x[2], x[0])
    assert masks.unique().tolist() == [0, 1] and 0.25 < masks[0].mean() < 0.4


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and protocols


def metrics_of(samples: list, task: str, protocol: str) -> dict[str, float]:
    sums: dict = {}
    for prediction, mask in samples:
        sums = evaluate.add(sums, evaluate.score(prediction, mask, task, protocol))
    return evaluate.average(sums, task, protocol)


def test_metrics_by_hand():
    """Weighted F by Margolin et al.'s definition: the object is found; a pixel 5 away from it is wrong. Its error
    weighs 2 - 0.5^(5/5) = 1.5, so that precision is 4 / (4 + 1.5) and recall 1."""
    mask = np.zeros((2, 10), bool)
    mask[:, :2] = True
    prediction = mask.astype(np.float32)
    prediction[0, 6] = 1
    precision = 4 / 5.5
    for protocol, beta in (("paper", 0.3), ("full-size", 1.0)):
        grey = prediction if protocol == "paper" else (prediction * 255).astype(np.uint8)
        metrics = metrics_of([(grey, mask)], "sod", protocol)
        assert metrics["wF"] == pytest.approx((1 + beta) * precision / (1 + beta * precision))
        assert metrics["MAE"] == pytest.approx(1 / 20)
    # Predictions are stretched to [0, 1] first; S of an empty mask is one less the mean.
    faint = np.array([[0.2, 0.6, 0.2, 0.2]], np.float32)
    metrics = metrics_of([(faint, np.zeros((1, 4), bool))], "sod", "paper")
    assert metrics["MAE"] == pytest.approx(0.25) and metrics["S"] == pytest.approx(0.75)


@pytest.mark.parametrize("protocol", ["paper", "full-size"])
def test_a_metric_that_is_nan_counts_zero(protocol):
    rng = np.random.default_rng(0)
    samples = [(rng.integers(0, 256, (16, 16), dtype=np.uint8), rng.random((16, 16)) > 0.5) for _ in range(3)]
    if protocol == "paper":
        samples = [(prediction / np.float32(255), mask) for prediction, mask in samples]
    whole = metrics_of(samples[:2], "sod", protocol)["S"]
    samples[2][1][:-1] = False  # all foreground in the last row
    with warnings.catch_warnings(record=True) as caught:
        assert metrics_of(samples, "sod", protocol)["S"] == pytest.approx(2 / 3 * whole)
    assert not caught
    for shape in ((1, 1), (1, 2), (2, 1)):
        for value in (False, True):
            metrics = metrics_of([(samples[0][0][: shape[0], : shape[1]], np.full(shape, value))], "sod", protocol)
            assert all(0 <= metric <= 2 for metric in metrics.values())


@pytest.mark.parametrize("protocol", ["paper", "full-size"])
def test_ber_by_hand(protocol):
    mask = np.zeros((10, 10), bool)
    mask[:, :4] = True
    faint = np.full((10, 10), 0.3, np.float32)  # nothing reaches the threshold, stretched or not
    half = faint.copy()
    half[:, 4:] = 125 / 255 - 1e-6  # just below it
    half[:, :3] = 126 / 255  # 30 of 40 found
    half[:6, 9] = 0.9  # 6 of 60 wrongly found
    samples = [(faint, mask), (half, mask), (half[:, :8], mask[:, :8])]  # the last: 30 of 40, nothing wrongly
    if protocol == "full-size":
        samples = [((prediction * 255).round().astype(np.uint8), m) for prediction, m in samples]
    assert metrics_of(samples[:1], "shadow", protocol) == pytest.approx(
        {"BER": 50.0} | ({"BER_pooled": 50.0} if protocol == "full-size" else {})
    )
    metrics = metrics_of(samples, "shadow", protocol)
    assert metrics["BER"] == pytest.approx(100 * (0.5 + (10 / 40 + 6 / 60) / 2 + (10 / 40) / 2) / 3)
    if protocol == "full-size":
        assert metrics["BER_pooled"] == pytest.approx(100 * (60 / 120 + 6 / 160) / 2)


class Brightness(nn.Module):
    """Stands in for a TSSAM: logits from an image's brightness, so that they can be made by hand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config, self.weight = {"image_size": size}, nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * images.mean(1, keepdim=True) + images[:, :1]


@pytest.fixture
def mixed_pairs(tmp_path) -> list[tuple[Path, Path]]:
    """Six pairs of different sizes; one mask has another size than its image, one is of 0 and 1, one is faint."""
    rng = np.random.default_rng(0)
    for folder in ("Imgs", "GT"):
        (tmp_path / "mixed" / folder).mkdir(parents=True)
    for i in range(6):
        width, height = 30 + 7 * i, 60 - 5 * i
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
        coarse.save(tmp_path / f"mixed/Imgs/{i}.jpg")
        mask = Image.new("L", (width + (i == 2), height))
        draw = ImageDraw.Draw(mask)
        draw.ellipse((5, 5, 25, 20), fill={3: 1, 4: 128}.get(i, 255))
        if i == 4:  # the full-size protocol's threshold is above 128
            draw.ellipse((15, 10, 25, 20), fill=129)
        mask.save(tmp_path / f"mixed/GT/{i}.png")
    return evaluate.find_sets([tmp_path / "mixed"], "test")[0].pairs


@pytest.mark.parametrize("protocol", ["paper", "full-size"])
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
            grey = np.round(255 * full.sigmoid().numpy()).astype(np.uint8)
            made.append((grey, mask > (128 if mask.max() > 1 else 0)))
    expected = metrics_of(made, task, protocol)
    maps = tmp_path / "maps"
    maps.mkdir()
    results = []
    for batch_size, workers, save in ((1, 0, None), (4, 1, maps)):
        rows = [*evaluate.evaluate(model, mixed_pairs, task, protocol, batch_size, workers, save)]
        results.append(evaluate.average(functools.reduce(evaluate.add, rows, {}), task, protocol))
    assert results[0] == results[1] == pytest.approx(expected, abs=1e-4)
    for image_file, _ in mixed_pairs:
        with Image.open(image_file) as image, Image.open(maps / f"{image_file.stem}.png") as saved:
            assert saved.size == image.size and saved.mode == "L"
    if protocol == "full-size":  # the same from saved maps, but for the mask that is not of its image's size
        same_size = [i for i in range(6) if i != 2]
        saved = [evaluate.finish_map((maps / f"{i}.png", mixed_pairs[i][1]), task) for i in same_size]
        again = [*evaluate.evaluate(model, [mixed_pairs[i] for i in same_size], task, protocol, 2, 0)]
        for a, b in zip(saved, again, strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in b)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folder a test runs in, with `data`: train and test pairs."""
    make_pairs(tmp_path / "data", "train/Imgs + train/GT", "abcde")
    make_pairs(tmp_path / "data", "test/Imgs + test/GT", "xyz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(monkeypatch, capsys, module, *arguments: object) -> tuple[int, str, str]:
    """Run train.py or evaluate.py in this process; (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    monkeypatch.setattr(evaluate, "on_stop", lambda message: None)  # pytest's own handlers stay
    evaluate.warn.cache_clear()
    code = 0
    try:
        evaluate.run(module.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


SMALL = ("--sam", "tiny", "--sam-checkpoint", "random", "--size", 64, "--batch-size", 2, "--device", "cpu")
SMALL += ("--workers", 0, "--data", "data")


def weights_of(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["trained"]


def same_weights(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def read_rows(path: str) -> list[dict[str, str]]:
    return [*csv.DictReader(Path(path).read_text().splitlines())]


def numbers(path: str) -> list[dict[str, str]]:
    """The rows of a log.csv but for its times."""
    times = ("images_per_s", "peak_MB", "seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in read_rows(path)]


@pytest.mark.parametrize(
    "task, loss_of, flags",
    [
        ("sod", train.bce_iou, ()),
        ("shadow", train.balanced_bce, ("--recipe", "released", "--seed", 3)),
        ("cod", train.bce_iou, ("--accumulate", 2, "--grad-checkpoint")),
    ],
)
def test_training_by_hand(here, monkeypatch, capsys, task, loss_of, flags):
    arguments = (*SMALL, "--task", task, "--epochs", 2, "--lr", "1e-3", "--out", "run", *flags)
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 0 and "warning: the encoder is random" in err and out.count("\nepoch ") == 2, err
    released, seed, parts = "released" in flags, 3 if 3 in flags else 0, 2 if "--accumulate" in flags else 1
    torch.manual_seed(seed)
    model = build_tssam("tiny", 64, task == "shadow")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01) if released else torch.optim.Adam(parameters)
    pairs, losses = evaluate.find_sets([here / "data"], "train")[0].pairs, []
    for epoch in (1, 2):
        optimizer.param_groups[0]["lr"] = {1: 1e-3, 2: 1e-7 + (1e-3 - 1e-7) / 2}[epoch]
        rng = np.random.default_rng((seed, epoch))
        order, flips = rng.permutation(5), rng.random(5)
        for batch in (order[:2], order[2:4]):  # the fifth image is left over
            optimizer.zero_grad()
            for part in np.split(batch, parts):
                items = [(*pairs[i], released and bool(flips[i] < 0.5)) for i in part]
                x, masks = evaluate.read_pairs(items, 64)
                loss = loss_of(model(x), masks) / parts
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
    trained = {name: t for name, t in model.state_dict().items() if not name.startswith("image_encoder")}
    assert same_weights(weights_of("run/last.pt"), trained)
    logged = numbers("run/log.csv")
    assert float(logged[1]["loss"]) == pytest.approx(sum(losses[2 * parts :]) / 2)
    files = ["best.pt", "curves.png", "last.pt", "log.csv", "samples.png"]
    assert sorted(p.name for p in Path("run").iterdir()) == files
    # best.pt is the best epoch, and evaluate.py gives its numbers on the remembered data.
    column, better = ("BER", min) if task == "shadow" else ("S", max)
    assert out.splitlines()[-1] == f"best:  {column} {better(float(row[column]) for row in logged):.4f}, run/best.pt"
    best = torch.load("run/best.pt", weights_only=True)
    assert best["metrics"][column] == better(float(row[column]) for row in logged)
    code, out, err = script(monkeypatch, capsys, evaluate, "--ckpt", "run/best.pt", "--csv", "t.csv", "--workers", 0)
    (row,) = read_rows("t.csv")
    assert code == 0 and (row["dataset"], row["protocol"]) == ("data", "paper")
    assert all(float(row[name]) == pytest.approx(value) for name, value in best["metrics"].items())


def test_init_starts_from_trained_weights(here, monkeypatch, capsys):
    sam, other = sam_file(here / "sam.pth", 64), sam_file(here / "other.pth", 64, seed=6)
    trained = build_tssam("tiny", 64, sam_checkpoint=sam)
    ours = checkpoint(here / "ours.pt", trained, sam)
    torch.save({released_name(name): t for name, t in trained.state_dict().items()}, here / "theirs.pth")
    for file, size in ((ours, 64), (here / "theirs.pth", 64), (ours, 32)):
        arguments = (*SMALL, "--epochs", 1, "--lr", "1e-9", "--sam-checkpoint", sam, "--size", size, "--init", file)
        code, out, err = script(monkeypatch, capsys, train, *arguments, "--out", f"{file.stem}-{size}")
        assert code == 0 and err == ""
        tuned, initial = weights_of(f"{file.stem}-{size}/best.pt"), trained.state_dict()
        assert tuned.keys() == {name for name in initial if not name.startswith("image_encoder.")}
        assert all(
            torch.allclose(t, initial[n], atol=1e-7) for n, t in tuned.items() if not re.search("running|num_", n)
        )
    for file, message in (
        (ours, "ours.pt: trained on another encoder than "),
        ("theirs.pth", "was trained on another encoder;"),
    ):
        arguments = (*SMALL, "--sam-checkpoint", other, "--init", file, "--out", "no")
        code, out, err = script(monkeypatch, capsys, train, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1
    arguments = (*SMALL, "--sam-checkpoint", sam, "--init", ours, "--task", "shadow", "--out", "no")
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 2 and "ours.pt and --task shadow: both or none must be of shadows" in err
    for file in (ours, "theirs.pth"):  # before SAM's weights are downloaded
        code, out, err = script(monkeypatch, capsys, train, "--data", "data", "--init", file, "--batch-size", 2)
        assert code == 2 and f"{file} belongs to tiny, not vit_h: --sam tiny" in err and "downloading" not in out


IN_A_PROCESS = """
import os, signal, sys, time
import evaluate, train, tssam
when, number = sys.argv[1].split("-")
save, left = tssam.save_checkpoint, int(number)
def stop_at(*args, **info):
    global left
    save(*args, **info)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), getattr(signal, when))
        time.sleep(60)
tssam.save_checkpoint = stop_at
sys.argv = ["train.py", *sys.argv[2:]]
evaluate.run(train.main)
"""


def in_a_process(command: list[str], *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(tssam.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_stopped_and_resumed_runs_are_as_if_they_had_not_been(here, monkeypatch, capsys):
    arguments = (*SMALL, "--epochs", 3, "--lr", "1e-3")
    assert script(monkeypatch, capsys, train, *arguments, "--out", "whole")[0] == 0
    killed = in_a_process(["-c", IN_A_PROCESS, "SIGKILL-1"], *arguments, "--out", "cut")  # before validation
    assert killed.returncode == -signal.SIGKILL and torch.load("cut/last.pt", weights_only=True)["epoch"] == 1
    arguments = ("--resume", "--out", "cut", "--workers", 0)
    stopped = in_a_process(["-c", IN_A_PROCESS, "SIGTERM-2"], *arguments)  # after validation
    line = "train.py: stopped; `python train.py --resume --out cut` goes on after epoch 1\n"
    assert stopped.returncode == 130 and stopped.stderr.endswith(line), stopped.stderr
    code, out, err = script(monkeypatch, capsys, train, *arguments)
    assert code == 0 and "resume: after epoch 1 of 3\n" in out, err
    assert numbers("whole/log.csv") == numbers("cut/log.csv")
    for file in ("last.pt", "best.pt"):
        assert same_weights(weights_of(f"whole/{file}"), weights_of(f"cut/{file}"))
    states = [torch.load(f"{run}/last.pt", weights_only=True)["optimizer"]["state"] for run in ("whole", "cut")]
    assert all(torch.equal(a["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i, a in states[0].items())
    for flags, message in (
        (("--lr", "1e-4"), "--lr 0.0001 would be another experiment; this one has 0.001"),
        (("--init", "cut/best.pt"), "--init cut/best.pt would be another experiment; this one has None"),
        (("--accumulate", 2), "the batch norms of this run saw 2 images at a time, not 1"),
        (("--data", "data/test"), "--data has 3 images; this run has 5"),
    ):
        code, out, err = script(monkeypatch, capsys, train, *arguments, *flags)
        assert code == 2 and message in err and err.count("\n") <= 2


def test_two_processes_take_the_step_of_one(here, monkeypatch, capsys):
    """torchrun's two processes step as one process that takes the batch in two parts."""
    arguments = (*SMALL, "--batch-size", 4, "--epochs", 1, "--lr", "1e-2")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = in_a_process([*torchrun, str(Path(train.__file__))], *arguments, "--out", "two")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epoch 1/1") == 1 and "2 x cpu" in ended.stdout  # the first process alone speaks
    assert script(monkeypatch, capsys, train, *arguments, "--accumulate", 2, "--out", "one")[0] == 0
    one, two = weights_of("one/last.pt"), weights_of("two/last.pt")
    assert all(
        torch.allclose(one[name], two[name], atol=2e-5) for name in one if not re.search("running|num_batches", name)
    )
    # Validation, shared between the two, gives the numbers of one process with the stored weights.
    model, _ = load_checkpoint("two/best.pt")
    rows = evaluate.evaluate(model, evaluate.find_sets([here / "data"], "test")[0].pairs, "sod", "paper", 2, 0)
    metrics = evaluate.average(functools.reduce(evaluate.add, rows, {}), "sod", "paper")
    assert metrics == pytest.approx(torch.load("two/best.pt", weights_only=True)["metrics"], rel=1e-5)


def test_what_training_refuses_and_says(here, monkeypatch, capsys):
    (here / "full").mkdir()
    (here / "full/photo.jpg").touch()
    for _, mask in make_pairs(here / "black", "Imgs + GT"):
        Image.new("L", (48, 40)).save(mask)
    (here / "broken/Imgs").mkdir(parents=True)
    make_pairs(here / "broken", "Imgs + GT", "ab")
    (here / "broken/Imgs/a.jpg").write_bytes((here / "broken/Imgs/a.jpg").read_bytes()[:-500])
    out = ("--epochs", 1, "--out", "out")
    for arguments, message in (
        ((), "--data: name the dataset to train on, or try --demo"),
        ((*SMALL, *out, "--out", "full"), "--out: full is not empty; continue its run with --resume"),
        ((*SMALL, *out, "--batch-size", 8), "--data: 5 images do not fill a batch of 8"),
        (
            (*SMALL, *out, "--accumulate", 3),
            "--batch-size: 2 cannot be cut into 1 (processes) x 3 (--accumulate) equal parts",
        ),
        ((*SMALL, *out, "--lr", 0), "--lr: 0.0 is not a number above zero"),
        ((*SMALL, *out, "--lr", "1e30"), "epoch 1, step 2: the loss is nan; last.pt holds epoch 0; try a lower --lr"),
        (
            (*SMALL, *out, "--data", "black"),
            "black: 2 of 2 masks are empty, 0 have no background; check how black/GT was",
        ),
        ((*SMALL, *out, "--device", "cuda:77"), "--device: cuda:77 cannot be used here"),
        ((*SMALL, *out, "--data", "broken", "--workers", 1), "a.jpg: cannot be read as an image ("),
        ((*SMALL, "--resume", "--out", "nowhere"), "nowhere/last.pt: no such file"),
        ((*SMALL, *out, "--size", 100), "100 is not a positive multiple of 16"),
        (("--demo", "--data", "data"), "--demo: draws its own dataset"),
        ((*SMALL, "--nonsense"), "unrecognized arguments: --nonsense (--help lists the options)"),
    ):
        code, _, err = script(monkeypatch, capsys, train, *arguments)
        assert code == 2 and message in err.splitlines()[-1] and err.startswith(("train.py: error", "warning:")), err
    assert not Path("out/best.pt").exists() and list((here / "full").iterdir()) == [here / "full/photo.jpg"]
    # The same with workers that are still alive at the end.
    ended = in_a_process([train.__file__], *SMALL, "--out", "many", "--data", "broken", "--workers", 2)
    assert ended.returncode == 2 and "a.jpg: cannot be read as an image (" in ended.stderr.splitlines()[-1]
    assert ended.stderr.count("\n") == 2  # that line, and the warning of a random encoder
    # A bug keeps its traceback.
    with pytest.raises(ZeroDivisionError):
        evaluate.run(lambda: 1 / 0)
    # Without a validation set; with several for COD, where CAMO alone is used.
    code, text, err = script(monkeypatch, capsys, train, *SMALL, "--data", "data/train", "--epochs", 1, "--out", "none")
    assert code == 0 and "val:   none" in text and not Path("none/best.pt").exists()
    for name in ("CAMO", "NC4K"):
        make_pairs(here / "COD", f"TestDataset/{name}/Imgs + TestDataset/{name}/GT")
    make_pairs(here / "COD", "TrainDataset/Imgs + TrainDataset/GT")
    code, text, err = script(
        monkeypatch, capsys, train, *SMALL, "--data", "COD", "--task", "cod", "--epochs", 1, "--out", "cod"
    )
    assert code == 0 and "val:   CAMO: " in text and "NC4K" not in text


CKPT = ("--ckpt", "model.pt", "--device", "cpu", "--workers", 0)
SETS = ("--data", "CAMO", "ECSSD")
MAPS = ("--maps", "maps", "--workers", 0)


@pytest.fixture
def score(here, monkeypatch, capsys):
    """evaluate.py as a function, in a folder with a checkpoint and two datasets."""
    torch.manual_seed(3)
    model = build_tssam("tiny", 64)
    model.ffd.head.weight.data *= 600
    checkpoint(here / "model.pt", model, epoch=7)
    for name in ("CAMO", "ECSSD"):
        make_pairs(here / name, "Imgs + GT", "abc")
    return functools.partial(script, monkeypatch, capsys, evaluate)


def test_tables_and_saved_maps(score):
    code, out, err = score(*CKPT, *SETS)
    assert code == 0 and out.startswith("model.pt: sod, tiny, epoch 7\nCAMO: CAMO/Imgs and GT, no split, 3 images\n")
    header, camo, paper_b, paper_h, ecssd = out.splitlines()[-5:]
    assert header.split() == ["dataset", "images", "S", "E", "wF", "MAE"] and ecssd.startswith("ECSSD")
    assert paper_b.split()[2:] == ["0.826", "0.862", "0.753", "0.073"] and paper_h.split()[2:][0] == "0.887"
    assert len({len(line) for line in out.splitlines()[-5:]}) == 1
    code, out, err = score(*CKPT, *SETS, "--protocol", "original", "--csv", "model.csv", "--save", "maps")
    assert code == 0 and "protocol: full-size" in out and "TS-SAM_B" not in out
    names = ["CAMO", "ECSSD", "checkpoint.txt", "overview-CAMO.png", "overview-ECSSD.png"]
    assert sorted(p.name for p in Path("maps").iterdir()) == names
    assert sorted(p.name for p in Path("maps/CAMO").iterdir()) == ["a.png", "b.png", "c.png"]
    Path("maps/CAMO").rename("maps/camo_Test")  # as others name it
    code, out, err = score(*MAPS, *SETS, "--csv", "maps.csv")
    columns = "model,dataset,images,protocol,S,E,wF,MAE,maxF,adpF,meanF,maxE,BER,BER_pooled,precision"
    assert Path("model.csv").read_text().startswith(f"{columns}\nmodel.pt,CAMO,3,full-size,"), err
    ours = Path("model.csv").read_text().replace("model.pt,", "maps,").replace(",fp32\n", ",\n")
    assert Path("maps.csv").read_text() == ours and ours.count("\n") == 3
    for row in read_rows("maps.csv"):
        assert float(row["meanF"]) < float(row["maxF"]) and float(row["E"]) < float(row["maxE"])
    # Images without masks are predicted, a single one too.
    code, out, err = score(*CKPT, "--data", "CAMO/Imgs", "ECSSD/Imgs/b.jpg", "--save", "new")
    assert code == 0 and "Imgs: no masks, so no metrics; 3 predictions in new/Imgs" in out
    assert Path("new/b.png").read_bytes() == Path("maps/ECSSD/b.png").read_bytes()
    # Of a set with an empty mask the paper's rows are not printed, since published tables leave such images out.
    Image.new("L", (48, 40)).save("CAMO/GT/b.png")
    code, out, err = score(*CKPT, *SETS)
    assert code == 0 and "warning: CAMO: 1 of 3 masks are empty, 0 have no background" in err and "TS-SAM_B" not in out


def test_checkpoints_compared(score):
    shutil.copy("model.pt", "twin.pt")
    assert score(*CKPT, *SETS, "--protocol", "full-size", "--csv", "table.csv")[0] == 0
    code, out, err = score("--ckpt", "model.pt", "twin.pt", *CKPT[2:], *SETS, "--csv", "table.csv")
    assert code == 0 and out.count("\nECSSD: ") == out.count("dataset ") == 1 and out.count("\nECSSD  ") == 2
    rows = read_rows("table.csv")
    assert [row["model"] for row in rows] == ["model.pt"] * 4 + ["twin.pt"] * 2
    assert [row["dataset"] for row in rows] == ["CAMO", "ECSSD"] * 3
    assert rows[2] == rows[4] | {"model": "model.pt"} and rows[2]["protocol"] == "paper" != rows[0]["protocol"]
    code, out, err = score(*CKPT, *SETS, "--precision", "bf16", "--csv", "table.csv")
    half = read_rows("table.csv")[6]
    assert code == 0 and "precision: bf16" in out and (half["precision"], rows[2]["precision"]) == ("bf16", "fp32")
    assert 0 < abs(float(half["MAE"]) - float(rows[2]["MAE"])) < 0.02


def test_maps_of_other_methods(score):
    for name, scale in (("ones", 1), ("dark", 90)):
        Path(name).mkdir()
        for file in Path("ECSSD/GT").iterdir():
            Image.open(file).point(lambda v, scale=scale: v // 255 * scale).save(f"{name}/{file.name}")
    shadow = ("--data", "ECSSD", "--task", "shadow", "--workers", 0)
    code, out, err = score("--maps", "ones", *shadow)  # of 0 and 1, read like masks
    assert code == 0 and out.splitlines()[-1].split()[2:] == ["0.00", "0.00"] and not err
    code, out, err = score("--maps", "dark", *shadow)
    assert code == 0 and "warning: ECSSD: no map is brighter than 90 of 255" in err
    for file in Path("ones").iterdir():  # of another size than the masks
        Image.open(file).resize((60, 60)).save(file)
    code, out, err = score("--maps", "ones", "--data", "ECSSD", "--workers", 0)
    assert (
        code == 0 and "warning: ECSSD: 3 of 3 files are not of their mask's size, such as a.png (60 x 60, mask" in err
    )


def test_what_evaluation_refuses(score):
    shutil.copy("model.pt", "twin.pt")
    assert score(*CKPT, *SETS, "--csv", "edited.csv", "--save", "maps")[0] == 0
    Path("maps/ECSSD/b.png").unlink()
    Path("notes.csv").write_text("mine")
    Path("edited.csv").write_text(Path("edited.csv").read_text().strip() + ",my remark\n")
    model, _ = load_checkpoint("model.pt")
    broken = {name: t * math.nan if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict(broken)
    checkpoint(Path("nan.pt"), model)
    for flags, message in (
        ((*MAPS, "--data", "ECSSD"), "ECSSD: 1 of 3 maps are missing, such as b.png; there are a.png, c.png"),
        ((*MAPS, "--data", "data/test"), "--maps: maps has no folder data, only CAMO, ECSSD"),
        (MAPS, "--data: name the datasets that the maps belong to"),
        ((*MAPS, *SETS, "--precision", "bf16"), "--maps: goes without --save, --sam-checkpoint, --precision"),
        (("--ckpt", "model.pt", "nope.pt", *SETS), "nope.pt: no such file"),
        ((*CKPT, *SETS, "--save", "ECSSD/Imgs"), "--save: ECSSD/Imgs holds other files than maps of model.pt"),
        (("--ckpt", "twin.pt", *SETS, "--save", "maps"), "--save: maps holds other files than maps of twin.pt"),
        (("--ckpt", "model.pt", "twin.pt", "--save", "both"), "--save: takes the maps of one --ckpt"),
        ((*CKPT, *SETS, "--csv", "notes.csv"), "--csv: notes.csv exists and is no table of this evaluate.py"),
        ((*CKPT, *SETS, "--csv", "edited.csv"), "--csv: edited.csv exists and is no table of this evaluate.py"),
        ((*CKPT, "--data", "CAMO/Imgs"), "no masks to score by"),
        (CKPT, "model.pt: trained without a validation set; name the data: --data"),
        ((*CKPT, *SETS, "--batch-size", 0), "--batch-size: 0 is not a number above zero"),
        ((*CKPT, *SETS, "--task", "sod"), "--task: goes with --maps; a checkpoint knows its own"),
        (("--ckpt", "nan.pt", *CKPT[2:], *SETS), "a.jpg: the network's output is not finite"),
    ):
        code, out, err = score(*flags)
        assert code == 2 and message in err and err.count("\n") == 1 and "0." not in out, err


def test_overview_shows_image_mask_and_prediction(tmp_path):
    (pair,) = make_pairs(tmp_path, "Imgs + GT", "a")
    Image.new("L", (48, 40), 77).save(tmp_path / "map.png")
    evaluate.save_overview([("title", *pair, tmp_path / "map.png")], tmp_path / "overview.png")
    pixels = np.asarray(Image.open(tmp_path / "overview.png").convert("L")).astype(float)
    panels = [pixels[40 : 40 + 160, 6 + x * 198 :][:, :192] for x in range(3)]
    truth = np.asarray(Image.open(pair[1]).resize((192, 160)))
    assert panels[0].std() > 30 and np.abs(panels[1] - truth).mean() < 1 and (panels[2] == 77).all()


# ---------------------------------------------------------------------------------------------------------------------
# README


def test_the_readme_names_what_there_is(monkeypatch, capsys):
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in globals(), name
    helps = ""
    for module in (train, evaluate):
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
