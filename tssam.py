"""TS-SAM: two-stream fine-tuning of the Segment Anything Model, in one file.

Paper: "TS-SAM: Fine-Tuning Segment-Anything Model for Downstream Tasks" (ICME 2024). The classes follow its Section II:

    CSA    Convolutional Side Adapter     Eq. 1-2     the side stream beside SAM's image encoder
    MRM    Multi-scale Refinement Module  Eq. 3-5     fine detail taken out of the encoder's blocks
    FFD    Feature Fusion Decoder         Eq. 6-10    joins the two streams into one mask
    TSSAM  the whole network              Fig. 2 (a)  taps the frozen encoder with forward hooks

                                 MRM -------- MRM ----- ... ----- MRM --------- MRM ----> f_mrm --+
                                  ^            ^                   ^             ^                |
    images --> patches ------> block 0 ---> block 1 --> ... --> block L-1 ----> neck             FFD --> logits
                  |       |      v ^          v ^                 v ^            v                |
               F_csa^0 > CSA 0 - CSA 1 ------ CSA 2 --- ... ----- CSA L ------- CSA L+1 -> f_csa -+

    Middle: SAM's encoder, frozen. Up: a block's own output feeds an MRM (in ViT-L and ViT-H that of the last 12
    blocks). Down: a CSA merges it with f_csa, and the merged map comes back up (^) in place of the block's output.

The encoder is the `ImageEncoderViT` of the `segment-anything` package, unmodified but for the way its attention is
computed (`FusedAttention`: the same numbers in less memory; `attention="sam"` leaves it as it is). Notation: C the
encoder's width (768 in ViT-B), C1 the side stream's and C2 that of MRM and FFD, the paper's letters (256 and 128 are
the release's); S the image's side in pixels (the paper's H and W) and g = S/16 its side in patches, ours. Feature maps
are (B, channels, height, width), in float32 or autocast's precision; only inside the encoder they are (B, g, g, C).
"Source" in a docstring says where a decision comes from: the paper, the authors' released code where the paper is
silent or differs, or ours.

After the network come the files it is kept in: SAM's published weights, the authors' released checkpoints, and our
own, which hold the trained part alone. `python tssam.py` measures speed and memory.
"""

import argparse
import hashlib
import http.client
import inspect
import itertools
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

try:
    import resource
except ImportError:  # Windows
    resource = None

PATCH = 16  # pixels on a side of the encoder's patches

# SAM's three published encoders, and `tiny`: the same class, small enough to train on two CPU cores in a minute or two.
# `side` (C1) and `hidden` (C2) are the widths of our trained parts beside that encoder.
_SAM = dict(window=14, neck=256, side=256, hidden=128)
ENCODERS = {
    "vit_b": dict(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11), **_SAM),
    "vit_l": dict(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23), **_SAM),
    "vit_h": dict(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31), **_SAM),
    "tiny": dict(width=64, depth=4, heads=4, global_blocks=(1, 3), window=7, neck=32, side=32, hidden=16),
}


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, which file or flag, what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# II-B. Convolutional Side Adapter


def conv1x1(c_in: int, c_out: int) -> nn.Sequential:
    """The paper's conv_1x1: 1x1 convolution, batch norm, ReLU. (B, c_in, h, w) -> (B, c_out, h, w).

    Initialised with N(0, 2 / fan_out) and zero bias (source: release).
    """
    conv = nn.Conv2d(c_in, c_out, 1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class CSA(nn.Module):
    """Convolutional Side Adapter, Eq. 1-2 (source: paper).

        Eq. 1   merged = F_vit + conv1x1_up(F_csa)      C1 -> C
        Eq. 2   F_csa' = conv1x1_down(merged)           C -> C1

    Args:
        width: C, channels of the encoder's map (the neck's for the last CSA).
        side: C1, channels of the side stream.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.up = conv1x1(side, width)
        self.down = conv1x1(width, side)

    def forward(self, f_csa: Tensor, f_vit: Tensor) -> tuple[Tensor, Tensor]:
        """f_csa (B, C1, g, g), f_vit (B, C, g, g) -> the next f_csa (B, C1, g, g), merged (B, C, g, g)."""
        merged = f_vit + self.up(f_csa)
        return self.down(merged), merged


# ---------------------------------------------------------------------------------------------------------------------
# II-C. Multi-scale Refinement Module


def deconv(channels: int) -> list[nn.Module]:
    """One step of the paper's deconv: transposed convolution to twice the height and width, batch norm, ReLU.

    (B, channels, h, w) -> (B, channels, 2h, 2w). Source: release; the paper names the module only.
    """
    up = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
    return [up, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class Gate(nn.Sequential):
    """Gating unit, Eq. 4: tanh(W2 relu(W1 F)) * F, pixel by pixel; (B, C2, h, w) -> the same shape.

    W1 and W2 are linear maps over the channels without bias, initialised with a truncated normal of standard
    deviation 0.02 (source: release). Backward computes the gate a second time from F (source: ours): its maps,
    at S/4 in 13 MRM, are cheap to compute and much to keep.
    """

    def __init__(self, channels: int) -> None:
        linears = [nn.Linear(channels, channels, bias=False) for _ in range(2)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
        super().__init__(linears[0], nn.ReLU(inplace=True), linears[1], nn.Tanh())

    def forward(self, f: Tensor) -> Tensor:
        return checkpoint(self.gated, f, use_reentrant=False, preserve_rng_state=False)

    def gated(self, f: Tensor) -> Tensor:
        return super().forward(f.movedim(1, -1)).movedim(-1, 1) * f


class MRM(nn.Module):
    """Multi-scale Refinement Module, Eq. 3-5 (source: paper), for the two scales k = 1 (S/4) and k = 2 (S/8).

        Eq. 3   F^k = deconv_k(conv1x1(F_vit))          conv1x1: C -> C2; deconv_1: two steps, deconv_2: one
        Eq. 4   G^k = tanh(W2 relu(W1 F^k)) * F^k       the gate
        Eq. 5   F_mrm^k' = G^k + F_mrm^k                the first MRM has nothing to add to

    k counts as in the release. The paper's II-D injects the S/8 map first and calls the finer one F^2, so its k seems
    to count the other way round.

    Args:
        width: C, channels of the encoder's map (the neck's for the last MRM).
        hidden: C2, channels of both outputs.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.compress = conv1x1(width, hidden)
        self.deconv = nn.ModuleDict(
            {"1": nn.Sequential(*deconv(hidden), *deconv(hidden)), "2": nn.Sequential(*deconv(hidden))}
        )
        self.gate = nn.ModuleDict({"1": Gate(hidden), "2": Gate(hidden)})

    def forward(self, f_vit: Tensor, f_mrm: dict[int, Tensor] | None = None) -> dict[int, Tensor]:
        """f_vit (B, C, g, g), the previous MRM's output or None -> {1: (B, C2, 4g, 4g), 2: (B, C2, 2g, 2g)}."""
        compressed = self.compress(f_vit)
        gated = {k: self.gate[str(k)](self.deconv[str(k)](compressed)) for k in (1, 2)}
        return gated if f_mrm is None else {k: gated[k] + f_mrm[k] for k in (1, 2)}


# ---------------------------------------------------------------------------------------------------------------------
# II-D. Feature Fusion Decoder


def conv3x3(c_in: int, c_out: int) -> nn.Sequential:
    """The paper's conv_3x3: 3x3 convolution, batch norm, ReLU. (B, c_in, h, w) -> (B, c_out, h, w).

    No bias, PyTorch's initialisation (source: release).
    """
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class FFD(nn.Module):
    """Feature Fusion Decoder, Eq. 6-10: injects F_mrm^2 (S/8), then F_mrm^1 (S/4) into F_csa, each in two stages.

                x = conv(F_csa)                                           C1 -> C2
        for k = 2, then k = 1:
        Eq. 6   F_in = conv(F_mrm^k)
        Eq. 7   key = avgpool(F_in) + maxpool(F_in)                       2x2 kernels; the paper's GAP and GMP
        Eq. 8   x = conv3x3([x, key])                                     stage 1: the key features
        Eq. 9   x = upsample(x)                                           2x, bilinear, corners aligned
        Eq. 10  x = conv3x3([x, F_mrm^k])                                 stage 2: the whole features

    x is the paper's F_in,csa, then F_stage1,csa, that upsampled, and F_stage2,csa; F_in is F_in,mrm and key F_key,mrm.
    Source: paper; `conv` is 3x3 as in the release, where the paper writes 1x1 (Eq. 6 and the sentence before it): only
    3x3 gives the paper's 29.44 M trained parameters. The 1x1 convolution to one channel and the upsampling's corners
    are the release's.
    """

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        self.conv_csa = conv3x3(side, hidden)
        # In the order of their use: k = 2, then k = 1.
        self.conv_mrm = nn.ModuleDict({k: conv3x3(hidden, hidden) for k in "21"})
        self.stage1 = nn.ModuleDict({k: conv3x3(2 * hidden, hidden) for k in "21"})
        self.stage2 = nn.ModuleDict({k: conv3x3(2 * hidden, hidden) for k in "21"})
        self.head = nn.Conv2d(hidden, 1, 1)

    def forward(self, f_csa: Tensor, f_mrm: dict[int, Tensor]) -> Tensor:
        """f_csa (B, C1, g, g), f_mrm {1: (B, C2, 4g, 4g), 2: (B, C2, 2g, 2g)} -> logits (B, 1, 4g, 4g)."""
        x = self.conv_csa(f_csa)
        for k in (2, 1):
            f_in = self.conv_mrm[str(k)](f_mrm[k])
            key = F.avg_pool2d(f_in, 2) + F.max_pool2d(f_in, 2)
            x = self.stage1[str(k)](torch.cat([x, key], dim=1))
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = self.stage2[str(k)](torch.cat([x, f_mrm[k]], dim=1))
        return self.head(x)


# ---------------------------------------------------------------------------------------------------------------------
# SAM's attention in less memory. Not of the paper: read on at II-A


class FusedAttention(Attention):
    """SAM's attention without its N x N matrix (source: ours); the same numbers, up to rounding, and gradients.

    To the score of query q and key k SAM adds rel_h[q, row of k] + rel_w[q, column of k], and so builds a matrix of
    N x N scores for each head: at 1024 x 1024, N = 4096, most of the encoder's memory. The sum is an inner product:

        q' = [q / sqrt(d), rel_w[q], rel_h[q]]      k' = [k, one-hot column of k, one-hot row of k]      v' = [v, 0, 0]

    so plain attention of q', k' and v' is SAM's, and `scaled_dot_product_attention` has kernels for it that never hold
    all scores. They want q', k' and v' equally wide, CUDA's a multiple of 8, hence the zeros.

    An `Attention` of the encoder becomes one by its `__class__`: its weights and their names stay as they are.
    """

    windowed = False  # in windows it is cheap enough to be computed again in backward, rather than kept
    made_for: tuple[int, int] | None = None  # the maps that the tables are for

    def make_tables(self, h: int, w: int) -> None:
        """What is constant for maps of h x w: the relative positions (h, h + pad, d) and (w, w, d), and the keys'
        one-hot columns and rows (h * w, w + h + pad)."""
        with torch.inference_mode(False), torch.no_grad():  # they may be used in training later
            table_h, table_w = get_rel_pos(h, h, self.rel_pos_h), get_rel_pos(w, w, self.rel_pos_w)
            pad = -(table_h.shape[-1] + h + w) % 8
            columns, rows = torch.eye(w).repeat(h, 1), torch.eye(h, h + pad).repeat_interleave(w, dim=0)
            self.register_buffer("table_h", F.pad(table_h, (0, 0, 0, pad)), persistent=False)
            self.register_buffer("table_w", table_w, persistent=False)
            self.register_buffer("one_hot", torch.cat([columns, rows], dim=1).to(table_h), persistent=False)
        self.made_for = h, w

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.made_for = None  # the tables are of the older weights

    def forward(self, x: Tensor) -> Tensor:
        """x (B, h, w, C) -> the same shape."""
        if self.made_for != x.shape[1:3]:
            self.make_tables(*x.shape[1:3])
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, h, w, 3, heads, d)
        attend = self.attend
        if self.windowed:
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        return self.proj(attend(qkv))

    def attend(self, qkv: Tensor) -> Tensor:
        """qkv (B, h, w, 3, heads, d) -> (B, h, w, C)."""
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)  # each (B, heads, h, w, d)
        batch, heads, h, w, d = q.shape
        rel_h = torch.einsum("bnhwd,hkd->bnhwk", q, self.table_h)
        rel_w = torch.einsum("bnhwd,wkd->bnhwk", q, self.table_w)
        q = torch.cat([q * self.scale, rel_w, rel_h], dim=-1).flatten(2, 3)
        one_hot = self.one_hot.to(k.dtype).expand(batch, heads, -1, -1)
        k = torch.cat([k.flatten(2, 3), one_hot], dim=-1)
        v = F.pad(v.flatten(2, 3), (0, one_hot.shape[-1]))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]
        return out.transpose(1, 2).reshape(batch, h, w, heads * d)


ATTENTIONS = {"fused": FusedAttention, "sam": Attention}


# ---------------------------------------------------------------------------------------------------------------------
# II-A. The two streams


def high_pass(images: Tensor) -> Tensor:
    """Absolute value of the images' high-frequency part (shadow detection; source: release, after SAM-Adapter).

    The middle square of the centred spectrum, S/2 wide, is set to zero. Always in float32.

    Args:
        images: (B, 3, S, S) normalised images.

    Returns:
        (B, 3, S, S) float32, not negative.
    """
    side = images.shape[-1]
    centre, half = side // 2, side // 4  # half the square's side; the release: floor(sqrt(S * S * 0.25) / 2)
    with torch.autocast(images.device.type, enabled=False):
        spectrum = torch.fft.fftshift(torch.fft.fft2(images.float()), dim=(-2, -1))
        spectrum[..., centre - half : centre + half, centre - half : centre + half] = 0
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.abs()


@contextmanager
def recomputed(block: nn.Module) -> Iterator[None]:
    """Within it an encoder block keeps nothing for backward, which computes it a second time (less memory, more time).

    The block alone: the hooks around it, and so the batch norms' statistics, run once.
    """
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        del block.forward  # the instance's; the class's is back


class TSSAM(nn.Module):
    """Two-Stream SAM, Fig. 2 (a): the frozen encoder, the CSA and MRM streams beside it, the FFD behind them.

    With L encoder blocks there are L + 2 CSA (one for the embedded patches, one a block, one for the neck) and one MRM
    for each of the last 12 blocks and the neck: 14 and 13 in TS-SAM_B, 34 and 13 in TS-SAM_H (the counts are the
    paper's, where they sit is the release's).

    The merged map of Eq. 1 is what the next block (or the neck) receives, so gradients flow through the frozen blocks:
    the encoder cannot run under `no_grad` in training. The encoder's own parameters never get a gradient.

    Args:
        sam: a name of `ENCODERS`.
        image_size: S, a multiple of 16.
        high_freq: add the high-frequency embedding to the side stream's input (shadow detection).
        csa_blocks: encoder blocks that get a CSA; None: all. The patches and the neck always have theirs.
        mrm_blocks: encoder blocks that feed an MRM; None: the last 12. The neck always does.
        attention: `fused`, or `sam` for the package's own (see `FusedAttention`).

    Set `grad_checkpoint` to train in less memory: the encoder's blocks are computed again in backward.

    Raises:
        InputError: an unknown `sam` or `attention`, an `image_size` or a block that the encoder cannot have.
    """

    def __init__(
        self,
        sam: str = "vit_h",
        image_size: int = 1024,
        high_freq: bool = False,
        csa_blocks: Iterable[int] | None = None,
        mrm_blocks: Iterable[int] | None = None,
        attention: str = "fused",
    ) -> None:
        super().__init__()
        self.grad_checkpoint = False
        if sam not in ENCODERS:
            raise InputError(f"sam: no encoder is called {sam!r}; there are {', '.join(ENCODERS)}")
        if image_size <= 0 or image_size % PATCH:
            raise InputError(f"image size: {image_size} is not a positive multiple of {PATCH}")
        spec = ENCODERS[sam]
        width, depth, neck, side, hidden = (spec[k] for k in ("width", "depth", "neck", "side", "hidden"))
        csa_blocks = range(depth) if csa_blocks is None else csa_blocks
        mrm_blocks = range(max(0, depth - 12), depth) if mrm_blocks is None else mrm_blocks
        csa_blocks, mrm_blocks = (sorted({int(i) for i in blocks}) for blocks in (csa_blocks, mrm_blocks))
        for name, blocks in (("csa_blocks", csa_blocks), ("mrm_blocks", mrm_blocks)):
            if any(i not in range(depth) for i in blocks):
                raise InputError(f"{name}: {blocks} is not within the {depth} blocks of {sam}, 0 to {depth - 1}")
        # What it takes to build this model again: the arguments of build_tssam, as plain values a file can hold.
        self.config = dict(
            sam=sam,
            image_size=int(image_size),
            high_freq=bool(high_freq),
            csa_blocks=csa_blocks,
            mrm_blocks=mrm_blocks,
        )

        self.image_encoder = ImageEncoderViT(  # first, so that a seed gives the same random encoder to every model
            img_size=image_size,
            patch_size=PATCH,
            embed_dim=width,
            depth=depth,
            num_heads=spec["heads"],
            out_chans=neck,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=spec["window"],
            global_attn_indexes=spec["global_blocks"],
        ).requires_grad_(False)
        self.use_attention(attention)

        self.csa_embedding = nn.Linear(width, side)
        self.high_freq_embedding = nn.Conv2d(3, side, PATCH, stride=PATCH) if high_freq else None
        self.csa = nn.ModuleList(CSA(width, side) for _ in range(1 + len(csa_blocks)))
        self.csa.append(CSA(neck, side))
        self.mrm = nn.ModuleList(MRM(width, hidden) for _ in mrm_blocks)
        self.mrm.append(MRM(neck, hidden))
        self.ffd = FFD(side, hidden)

    def use_attention(self, attention: str) -> None:
        """Have the encoder's blocks compute their attention by one of `ATTENTIONS`."""
        if attention not in ATTENTIONS:
            raise InputError(f"attention: none is called {attention!r}; there are {', '.join(ATTENTIONS)}")
        for block in self.image_encoder.blocks:
            block.attn.__class__ = ATTENTIONS[attention]
            block.attn.windowed = block.window_size > 0

    def store_encoder(self, dtype: torch.dtype) -> None:
        """Keep the encoder's matrices and convolutions in the `dtype` of the autocast that the model is to run in.

        Autocast would cast them in every step, and autograd keep the copies until backward. The numbers are the same.
        """
        for module in self.image_encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Args: images (B, 3, S, S), /255 and normalised with ImageNet's mean and std. Returns: logits (B, 1, S, S).

        Raises:
            ValueError: images of another shape.
        """
        size = self.config["image_size"]
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images are {tuple(images.shape)}, not (batch, 3, {size}, {size})")
        encoder = self.image_encoder
        csa_of = {block: self.csa[i] for i, block in enumerate(self.config["csa_blocks"], start=1)}
        mrm_of = {block: self.mrm[i] for i, block in enumerate(self.config["mrm_blocks"])}
        f_csa, f_mrm = None, None  # the two streams; each tap moves them on

        # The encoder's own maps are (B, g, g, C) up to the neck, ours (B, C, g, g).
        def tap_patches(module: nn.Module, args: tuple, patches: Tensor) -> None:
            """Patch embedding, before the position embedding: the side stream's first input F_csa^0.

            The release reads the (B, g, g, C) numbers as (B, C, g, g) without moving the channels: F_csa^0 is no
            picture of the image but a fixed shuffle of it. It looks like a slip, but the released checkpoints are
            trained with it (source: release; found by trying what makes our outputs equal to its, without its code).
            """
            nonlocal f_csa
            batch, g, _, width = patches.shape
            shuffled = patches.reshape(batch, width, g, g)
            # contiguous: with the channels last in memory, the CPU's kernels round differently from the release's run.
            f_csa = self.csa_embedding(shuffled.movedim(1, -1)).movedim(-1, 1).contiguous()
            if self.high_freq_embedding is not None:
                f_csa = f_csa + self.high_freq_embedding(high_pass(images))

        def tap_first_input(module: nn.Module, args: tuple) -> None:
            """Patch + position embedding, the input of block 0: CSA 0 merges it, nothing is written back."""
            nonlocal f_csa
            f_csa, _ = self.csa[0](f_csa, args[0].movedim(-1, 1))

        def tap_block(i: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            """Output of block i: feeds the MRM as it is, then the CSA; the merged map replaces it (Eq. 1)."""
            nonlocal f_csa, f_mrm
            f_vit = output.movedim(-1, 1)
            if i in mrm_of:
                f_mrm = mrm_of[i](f_vit, f_mrm)
            if i in csa_of:
                f_csa, merged = csa_of[i](f_csa, f_vit)
                return merged.movedim(1, -1)  # a hook that returns a tensor replaces the module's output

        def tap_neck(module: nn.Module, args: tuple, f_vit: Tensor) -> None:
            """Output of the neck: the last MRM and the last CSA."""
            nonlocal f_csa, f_mrm
            f_mrm = self.mrm[-1](f_vit, f_mrm)
            f_csa, _ = self.csa[-1](f_csa, f_vit)

        # The hooks live for this one forward: nothing they saw outlives it, and a copied model taps its own encoder.
        with ExitStack() as taps:
            taps.enter_context(encoder.patch_embed.register_forward_hook(tap_patches))
            taps.enter_context(encoder.blocks[0].register_forward_pre_hook(tap_first_input))
            for i, block in enumerate(encoder.blocks):
                taps.enter_context(block.register_forward_hook(partial(tap_block, i)))
                if self.grad_checkpoint and torch.is_grad_enabled():
                    taps.enter_context(recomputed(block))
            taps.enter_context(encoder.neck.register_forward_hook(tap_neck))
            encoder(images)

        logits = self.ffd(f_csa, f_mrm)  # at S/4; here, unlike in the FFD, corners are not aligned (source: release)
        return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


def build_tssam(
    sam: str = "vit_h",
    image_size: int = 1024,
    high_freq: bool = False,
    sam_checkpoint: str | os.PathLike | None = None,
    csa_blocks: Iterable[int] | None = None,
    mrm_blocks: Iterable[int] | None = None,
    attention: str = "fused",
) -> TSSAM:
    """Build a TSSAM on the CPU (or the current default device), its encoder filled from SAM's published weights.

    It comes in training mode, as every new module: call `.eval()` to predict.

    Args:
        sam: `vit_b`, `vit_l`, `vit_h`, or `tiny` (no published weights: for demo and tests).
        image_size: S, a multiple of 16; SAM's weights, made for 1024, are resampled to it.
        high_freq: with the high-frequency embedding (shadow detection).
        sam_checkpoint: SAM's weights for `sam`, as published; None leaves the encoder randomly initialised.
        csa_blocks, mrm_blocks: the encoder blocks with a CSA, an MRM; None: as in the paper (see `TSSAM`).
        attention: `fused`, or `sam` for the package's own: the same numbers in more memory.

    Raises:
        InputError: an argument no model can have, or a file that does not hold this encoder.
    """
    model = TSSAM(sam, image_size, high_freq, csa_blocks, mrm_blocks, attention)
    if sam_checkpoint is not None:
        load_sam(model, sam_checkpoint)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Files: SAM's published weights, the authors' checkpoints, ours

SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {  # published file, sha256
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
}


def sam_weights(sam: str, folder: str | os.PathLike = "checkpoints") -> Path:
    """Path of SAM's published weights in `folder`, downloaded there (progress bar, sha256 checked) if it has none.

    Raises:
        InputError: no weights are published for `sam`, or the download failed.
    """
    if sam not in SAM_FILES:
        raise InputError(f"{sam}: no weights are published for it; --sam-checkpoint random trains on a random encoder")
    name, sha256 = SAM_FILES[sam]
    path = Path(folder) / name
    if not path.exists():
        print(f"downloading {SAM_URL}{name} to {path}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # To a temporary name beside `path`, which it gets only if the hash is right.
            torch.hub.download_url_to_file(SAM_URL + name, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise InputError(
                f"SAM's weights could not be downloaded ({one_line(error)}): get {SAM_URL}{name} and put it at {path},"
                " or name the file with --sam-checkpoint"
            ) from error
    return path


def load_sam(model: TSSAM, path: str | os.PathLike) -> None:
    """Fill the encoder from SAM's published weights, resampled where the model's image size is not SAM's 1024.

    The position embedding is resampled bicubically, antialiased (ours); the relative positions of the global blocks
    linearly, as SAM's `get_rel_pos` does at run time.

    Raises:
        InputError: an unreadable file, or tensors that are not this encoder's.
    """
    prefix = "image_encoder."
    state = {k[len(prefix) :]: v for k, v in load_file(path).items() if str(k).startswith(prefix)}
    for name, parameter in model.image_encoder.named_parameters():
        tensor = state.get(name)
        if not isinstance(tensor, Tensor) or tensor.ndim != parameter.ndim or tensor.shape == parameter.shape:
            continue  # fits already, or cannot: _load_strictly says so
        if name == "pos_embed":
            grid = parameter.shape[1:3]
            resized = F.interpolate(tensor.movedim(-1, 1).float(), grid, mode="bicubic", antialias=True)
            state[name] = resized.movedim(1, -1)
        elif name.endswith(("rel_pos_h", "rel_pos_w")):
            state[name] = F.interpolate(tensor.T[None].float(), len(parameter), mode="linear")[0].T
    _load_strictly(model.image_encoder, state, f"{path}, as SAM's {model.config['sam']} encoder")


# Our names -> the released code's, whose checkpoints are one flat state dict, SAM's encoder and all.
_RELEASED_NAMES = [
    (r"^csa_embedding\.", r"image_encoder.csa_embedding."),
    (r"^high_freq_embedding\.", r"image_encoder.fft_embedding.proj."),
    (r"^csa\.(\d+)\.up\.0\.", r"image_encoder.csa_blocks.\1.conv1."),
    (r"^csa\.(\d+)\.up\.1\.", r"image_encoder.csa_blocks.\1.bn1."),
    (r"^csa\.(\d+)\.down\.0\.", r"image_encoder.csa_blocks.\1.conv2."),
    (r"^csa\.(\d+)\.down\.1\.", r"image_encoder.csa_blocks.\1.bn2."),
    (r"^mrm\.(\d+)\.compress\.", r"image_encoder.mrm_blocks.\1.conv_in."),
    (r"^mrm\.(\d+)\.deconv\.", r"image_encoder.mrm_blocks.\1.fpn"),
    (r"^mrm\.(\d+)\.gate\.1\.", r"image_encoder.mrm_blocks.\1.fpn1.6.res_gate."),
    (r"^mrm\.(\d+)\.gate\.2\.", r"image_encoder.mrm_blocks.\1.fpn2.3.res_gate."),
    (r"^ffd\.conv_csa\.", r"mask_decoder.conv1."),
    (r"^ffd\.conv_mrm\.2\.", r"mask_decoder.conv2."),
    (r"^ffd\.conv_mrm\.1\.", r"mask_decoder.conv4."),
    (r"^ffd\.stage([12])\.2\.", r"mask_decoder.conv12_\1."),
    (r"^ffd\.stage([12])\.1\.", r"mask_decoder.conv24_\1."),
    (r"^ffd\.head\.", r"mask_decoder.conv1_1."),
]


def released_name(name: str) -> str:
    """The authors' name of one of our tensors: `csa.0.up.0.weight` -> `image_encoder.csa_blocks.0.conv1.weight`."""
    for pattern, replacement in _RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_released(model: TSSAM, path_or_state_dict: str | os.PathLike | Mapping[str, Tensor]) -> None:
    """Fill a model, encoder and all, from a checkpoint of the authors' code.

    Raises:
        InputError: an unreadable file; a missing, surplus or wrongly shaped tensor, which is named. The model is then
            as it was.
    """
    if isinstance(path_or_state_dict, Mapping):
        state, where = path_or_state_dict, "released state dict"
    else:
        state, where = load_file(path_or_state_dict), str(path_or_state_dict)
    _load_strictly(model, state, where, rename=released_name)


def fingerprint(model: TSSAM) -> str:
    """sha256 of the frozen encoder's weights: a trained part works with no other encoder.

    Positions are left out: resampled to the image size, their last bits may differ from machine to machine.
    """
    digest = hashlib.sha256()
    for name, tensor in model.image_encoder.state_dict().items():
        if "pos" not in name:
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def save_checkpoint(
    path: str | os.PathLike,
    model: TSSAM,
    *,
    task: str,
    encoder: str,
    sam_checkpoint: str | None = None,
    encoder_seed: int | None = None,
    **info,
) -> None:
    """Write the trained part of a model and what it takes to build it again; an older file stays until this is whole.

    Args:
        task: `sod`, `cod` or `shadow`.
        encoder: the model's `fingerprint`.
        sam_checkpoint: path of the encoder's weights.
        encoder_seed: seed that a random encoder was drawn from, first thing after `torch.manual_seed`.
        info: more plain values to keep.
    """
    trained = {k: v.cpu() for k, v in model.state_dict().items() if not k.startswith("image_encoder.")}
    content = dict(
        config=model.config,
        trained=trained,
        task=task,
        encoder=encoder,
        sam_checkpoint=sam_checkpoint,
        encoder_seed=encoder_seed,
        **info,
    )
    write(Path(path), lambda file: torch.save(content, file))


def load_checkpoint(path: str | os.PathLike, sam_checkpoint: str | os.PathLike | None = None) -> tuple[TSSAM, dict]:
    """Build the model of a file that `save_checkpoint` or the authors' code wrote; their tensors' names tell which.

    Args:
        path: the checkpoint.
        sam_checkpoint: SAM's weights; None: the file used in training if it is still there, else `sam_weights`. The
            authors' checkpoints hold SAM's weights themselves.

    Returns:
        The model, on the CPU and in training mode, and a dict of what else `save_checkpoint` was given: `task`,
        `encoder`, `sam_checkpoint`, `encoder_seed`, and from train.py `val`, `args`, `epoch` and (best.pt) `metrics`.
        For an authors' checkpoint only `task`, which is `shadow` or stands for both others: `sod`.

    Raises:
        InputError: not such a file, or an encoder other than the one it was trained on.
    """
    info = load_file(path)
    if "image_encoder.csa_embedding.weight" in info:
        return _build_released(info, path, sam_checkpoint)
    if not {"config", "trained", "task", "encoder", "sam_checkpoint", "encoder_seed"} <= info.keys():
        raise InputError(f"{path}: neither a checkpoint written by train.py nor one of the authors' code")
    config, trained = info.pop("config"), info.pop("trained")
    known = inspect.signature(TSSAM).parameters
    if not (isinstance(config, dict) and isinstance(trained, dict) and config.keys() <= known.keys()):
        raise InputError(f"{path}: not written by this train.py; its config or weights are unknown here")
    if sam_checkpoint is None and info["encoder_seed"] is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(info["encoder_seed"])
            model = build_tssam(**config)
        source = f"the random one of seed {info['encoder_seed']} and torch {torch.__version__}"
    else:
        remembered = info["sam_checkpoint"]
        if sam_checkpoint is None and remembered is not None and Path(remembered).exists():
            sam_checkpoint = remembered
        sam_checkpoint = sam_checkpoint or sam_weights(config["sam"])
        model = build_tssam(**config, sam_checkpoint=sam_checkpoint)
        source = str(sam_checkpoint)
    if fingerprint(model) != info["encoder"]:
        raise InputError(
            f"{path}: trained on another {config['sam']} encoder than {source}; name the right one: --sam-checkpoint"
        )
    # The encoder's own tensors go in beside the stored ones, so that anything else missing or surplus is an error.
    encoder = {k: v for k, v in model.state_dict().items() if k.startswith("image_encoder.")}
    _load_strictly(model, {**trained, **encoder}, str(path))
    return model, info


def _build_released(state: Mapping[str, Tensor], path: str | os.PathLike, sam_checkpoint) -> tuple[TSSAM, dict]:
    """`load_checkpoint` for the authors' checkpoints: which model it is, its tensors' names and shapes say."""
    if sam_checkpoint is not None:
        raise InputError(
            f"{path}: a checkpoint of the authors' code, with SAM's weights inside; leave out --sam-checkpoint"
        )
    positions = state.get("image_encoder.pos_embed")
    if not isinstance(positions, Tensor) or positions.ndim != 4:
        raise InputError(f"{path}: image_encoder.pos_embed is missing, or not (1, g, g, C)")
    depth = len({name.split(".")[2] for name in state if name.startswith("image_encoder.blocks.")})
    _, g, _, width = positions.shape
    sam = next((sam for sam, spec in ENCODERS.items() if (spec["width"], spec["depth"]) == (width, depth)), None)
    if sam is None:
        raise InputError(f"{path}: no encoder of SAM is {width} wide and {depth} blocks deep")
    high_freq = "image_encoder.fft_embedding.proj.weight" in state
    model = build_tssam(sam, g * PATCH, high_freq)
    _load_strictly(model, state, str(path), rename=released_name)
    return model, {"task": "shadow" if high_freq else "sod"}


def load_file(path: str | os.PathLike) -> dict:
    """The dict in a file of `torch.save`, tensors on the CPU; read with `weights_only=True`.

    Raises:
        InputError: no such file, or not such a dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(
            f"{path}: no such file" if not Path(path).is_dir() else f"{path}: a folder; name a file"
        ) from error
    except Exception as error:  # what a broken or foreign file raises is anyone's guess
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise InputError(f"{path}: not a checkpoint, or not a whole one; torch.load says {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def _load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str, rename=lambda name: name) -> None:
    """load_state_dict that names what is missing, surplus or wrongly shaped (under `rename`d names) on one line."""
    wanted = {rename(name): (name, tensor) for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) if isinstance(tensor, Tensor) else None for name, tensor in state.items()}
    wrong = [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is surplus" for name in state if name not in wanted]
    wrong += [
        f"{name} is {shapes[name] or 'no tensor'}, not {tuple(tensor.shape)}"
        for name, (_, tensor) in wanted.items()
        if name in state and shapes[name] != tuple(tensor.shape)
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{where}: {'; '.join(wrong[:3])}{more}")
    module.load_state_dict({name: state[theirs] for theirs, (name, _) in wanted.items()})


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Have `save` write a file under a temporary name beside it, then rename it: a file is whole or not there.

    Raises:
        InputError: it could not be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the older one's place
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: cannot be written ({one_line(error)}); what was there before is whole") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name: for the inside of an InputError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory: python tssam.py


def peak_memory(device: torch.device) -> float:
    """MB this process has held at most: of the GPU's memory, or on a CPU of the machine's (Windows: nan)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class SDPACalls(TorchDispatchMode):
    """Within it, `served` notes which kernel `scaled_dot_product_attention` chose: {"4096 x 192": "flash", ...}."""

    def __init__(self) -> None:
        super().__init__()
        self.served: dict[str, str] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = re.fullmatch(r"aten\._scaled_dot_product_(?:fused_)?(\w+?)_attention\w*\.default", str(operator))
        if name is not None:
            self.served[" x ".join(map(str, args[0].shape[-2:]))] = name[1]
        return operator(*args, **(kwargs or {}))


def measure(
    step: bool, sam: str, size: int, batch_size: int, precision: str, attention: str, grad_checkpoint: str
) -> tuple[float, float, dict[str, str]]:
    """(seconds, peak MB, SDPA's kernels) of a forward, or of a training step: forward, BCE, backward, Adam.

    Seconds are the median of at least three runs after one to warm up; memory is this process's, so each case is to
    have its own.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        model = build_tssam(sam, size, attention=attention).train(step)
        images, masks = torch.randn(batch_size, 3, size, size), torch.rand(batch_size, 1, size, size).round()
    model.grad_checkpoint = grad_checkpoint == "yes"
    dtype = PRECISIONS[precision]
    model.store_encoder(dtype)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(step):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            if step:
                scaler.scale(F.binary_cross_entropy_with_logits(logits.float(), masks)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with SDPACalls() as sdpa:
        run()
    seconds = [run()]
    while len(seconds) < 3 or (sum(seconds) < 5 and len(seconds) < 50):
        seconds.append(run())
    return statistics.median(seconds), peak_memory(device), sdpa.served


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows a script's docstring as it is and whose errors are one line (exit code 2)."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def main() -> None:
    """Print the parameters of models, and a row of measurements for each combination of the options."""
    parser = Parser(
        "Seconds and peak memory of TS-SAM with random weights, a process for each figure; comma lists give rows.\n"
        "On a GPU memory is what PyTorch allocated there, on a CPU the process's peak RSS."
    )

    def choices(*known: str) -> Callable[[str], list[str]]:
        """An argument that is a comma list of `known`."""

        def parse(text: str) -> list[str]:
            for name in text.split(","):
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            return text.split(",")

        return parse

    def numbers(text: str) -> list[int]:
        """An argument that is a comma list of whole numbers."""
        if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
            raise argparse.ArgumentTypeError(f"{text!r} is no comma list of whole numbers above zero")
        return [int(number) for number in text.split(",")]

    options = {
        "sam": (choices(*ENCODERS), ["vit_b"], ", ".join(ENCODERS)),
        "size": (numbers, [1024], "image sides, multiples of 16"),
        "batch_size": (numbers, [1], "images at a time"),
        "precision": (choices(*PRECISIONS), ["fp32"], ", ".join(PRECISIONS)),
        "attention": (choices(*ATTENTIONS), ["fused"], "fused, sam (the package's own)"),
        "grad_checkpoint": (choices("no", "yes"), ["no"], "no, yes (blocks computed again in backward)"),
    }
    for name, (kind, default, values) in options.items():
        text = f"comma list of {values} (default {default[0]})"
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="LIST", type=kind, default=default, help=text)
    args = vars(parser.parse_args())

    for sam, size in itertools.product(args["sam"], args["size"]):
        try:
            with torch.device("meta"):
                model = build_tssam(sam, size)
        except InputError as error:
            parser.error(str(error))
        if size != args["size"][0]:
            continue
        print(f"{sam}: parameters")
        for name, module in model.named_children():
            of_module = [(p.numel(), p.requires_grad) for p in module.parameters()]
            kind = f"{len(module)} of them" if isinstance(module, nn.ModuleList) else ""
            print(
                f"  {name:<15}{sum(n for n, _ in of_module):>13,}  {'trained' if of_module[0][1] else 'frozen'}  {kind}"
            )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"  {trained:,} of {sum(p.numel() for p in model.parameters()):,} are trained")

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"on {where}, torch {torch.__version__}")
    columns = [*options, "forward s", "images/s", "MB", "step s", "images/s", "MB", "attention's kernels"]
    print(" | ".join(columns))
    for values in itertools.product(*args.values()):
        case, cells = dict(zip(args, values, strict=True)), []
        for step in (False, True):
            # A fresh process, whose peak memory is this figure's alone
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                try:
                    seconds, megabytes, served = pool.submit(measure, step, **case).result()
                except (torch.OutOfMemoryError, BrokenProcessPool):
                    cells += ["out of memory", "", ""]
                else:
                    cells += [f"{seconds:.3f}", f"{case['batch_size'] / seconds:.2f}", f"{megabytes:.0f}"]
        kernels = ", ".join(f"{shape}: {kernel}" for shape, kernel in served.items()) or "none"
        print(
            " | ".join(f"{cell!s:>{len(c)}}" for c, cell in zip(columns, [*values, *cells, kernels], strict=True)),
            flush=True,
        )


if __name__ == "__main__":
    main()
