"""TS-SAM: two-stream fine-tuning of the Segment Anything Model, in one file.

Paper: "TS-SAM: Fine-Tuning Segment-Anything Model for Downstream Tasks" (ICME 2024). The classes
follow its Section II:

    CSA    Convolutional Side Adapter     Eq. 1-2     the side stream beside SAM's image encoder
    MRM    Multi-scale Refinement Module  Eq. 3-5     fine detail taken from the encoder's blocks
    FFD    Feature Fusion Decoder         Eq. 6-10    fuses both into one mask
    TSSAM  the whole network              Fig. 2 (a)  runs them beside the frozen encoder

The method, for block i of the encoder:

    y = block_i(x)                        frozen; x is the block's input
    f_mrm += gate(deconv(compress(y)))    Eq. 3-5, MRM: two maps of detail, at 1/8 and 1/4 of the image
    x = y + expand(f_csa)                 Eq. 1, CSA: merged with the side stream; block i + 1 gets this
    f_csa = compress(x)                   Eq. 2: compressed again, the side stream's next state

                                         MRM ------- MRM ----- ... ------ MRM ------- MRM ---> f_mrm -+
                                          ^           ^                    ^           ^              |
    images -> patches -> + positions -> block 0 --> block 1 --> ... --> block L-1 --> neck           FFD -> logits
                 |            |           v ^         v ^                  v ^         v              |
              F_csa^0 ----- CSA 0 ------ CSA 1 ----- CSA 2 --- ... ------ CSA L ----- CSA L+1 -> f_csa -+

    Above a block: its output y feeds an MRM (in ViT-L and ViT-H, those of the last 12 blocks).
    Below it: its CSA takes y (v) and gives back the merged map (^), which replaces y.

Vocabulary:

    two streams  the paper's: SAM's frozen encoder, and the side stream f_csa beside it
    tap          a forward hook on a module of the encoder; it reads or replaces the module's output
    neck         the encoder's last layers, two convolutions down to 256 channels
    L, C         the encoder's number of blocks and width: 12 and 768 in ViT-B, 32 and 1280 in ViT-H
    C1, C2       the widths of f_csa and of f_mrm (source: release): 256 and 128
    S, g         the image's side in pixels (the paper's H and W), and in patches: g = S / 16
    k            a scale of the MRM: 1 is S/8, 2 is S/4
    logits       the mask before the sigmoid
    release      the authors' code

Feature maps are (B, channels, height, width); inside the encoder they are (B, g, g, C). "Source"
says where a decision comes from: the paper, the release where the paper is silent or differs, or
ours. A deviation from the paper is marked where it is made.

After the network comes what makes it fit into memory, then the files: SAM's published weights, the
release's checkpoints, and ours, which hold the trained part alone. `python tssam.py` prints each
part's equations and parameters.
"""

import argparse
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, get_rel_pos
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# -------------------------------------------------------------------------------------------------
# II-B. Convolutional Side Adapter


def conv1x1(c_in: int, c_out: int) -> nn.Sequential:
    """The paper's conv_1x1: 1x1 convolution, batch norm, ReLU. (B, c_in, h, w) -> (B, c_out, h, w).

    Which activation, the initialisation from N(0, 2 / fan_out) and the zero bias: release.
    """
    conv = nn.Conv2d(c_in, c_out, 1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class CSA(nn.Module):
    """Convolutional Side Adapter, Eq. 1-2 (source: paper): one step of the side stream.

    Args:
        width: C, channels of the encoder's map (of the neck's for the last CSA).
        csa_width: C1, channels of the side stream.
    """

    def __init__(self, width: int, csa_width: int) -> None:
        super().__init__()
        self.expand = conv1x1(csa_width, width)
        self.compress = conv1x1(width, csa_width)

    def forward(self, f_csa: Tensor, f_vit: Tensor) -> tuple[Tensor, Tensor]:
        """f_csa (B, C1, g, g), f_vit (B, C, g, g) -> next f_csa (B, C1, g, g), merged (B, C, g, g)."""
        merged = f_vit + self.expand(f_csa)  # Eq. 1
        return self.compress(merged), merged  # Eq. 2


# -------------------------------------------------------------------------------------------------
# II-C. Multi-scale Refinement Module


def deconv2x(channels: int) -> nn.Sequential:
    """One step of the paper's deconv: transposed convolution, batch norm, ReLU (source: release).

    (B, c, h, w) -> (B, c, 2h, 2w)
    """
    deconv = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
    return nn.Sequential(deconv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Gate(nn.Module):
    """Gating unit, Eq. 4: tanh(W2 relu(W1 F)) * F at every pixel. (B, C2, h, w) -> the same shape.

    W1 and W2 are linear maps over the channels without bias, initialised from a truncated normal
    with standard deviation 0.02 (source: release).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(channels, channels, bias=False)
        self.w2 = nn.Linear(channels, channels, bias=False)
        nn.init.trunc_normal_(self.w1.weight, std=0.02)
        nn.init.trunc_normal_(self.w2.weight, std=0.02)

    def forward(self, f: Tensor) -> Tensor:
        hidden = F.relu(self.w1(f.movedim(1, -1)), inplace=True)
        weight = torch.tanh(self.w2(hidden))
        return weight.movedim(-1, 1) * f


class MRM(nn.Module):
    """Multi-scale Refinement Module, Eq. 3-5 (source: paper), for two scales: k = 1 is S/8, 2 is S/4.

    Args:
        width: C, channels of the encoder's map (of the neck's for the last MRM).
        mrm_width: C2, channels of both outputs.
    """

    def __init__(self, width: int, mrm_width: int) -> None:
        super().__init__()
        self.compress = conv1x1(width, mrm_width)
        self.deconv1 = deconv2x(mrm_width)
        self.deconv2 = nn.Sequential(*deconv2x(mrm_width), *deconv2x(mrm_width))
        self.gate1 = Gate(mrm_width)
        self.gate2 = Gate(mrm_width)

    def forward(
        self, f_vit: Tensor, f_mrm1: Tensor | float, f_mrm2: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """f_vit (B, C, g, g), f_mrm1 (B, C2, 2g, 2g), f_mrm2 (B, C2, 4g, 4g) -> next f_mrm1, f_mrm2.

        In the first MRM, f_mrm1 and f_mrm2 are 0.
        """
        compressed = self.compress(f_vit)
        f1 = self.deconv1(compressed)  # Eq. 3, k = 1
        f2 = self.deconv2(compressed)  # Eq. 3, k = 2
        # Eq. 4, with activation checkpointing (see `recompute`): a gate is cheap, its maps are large.
        gated1 = recompute(self.gate1, f1)
        gated2 = recompute(self.gate2, f2)
        return gated1 + f_mrm1, gated2 + f_mrm2  # Eq. 5


# -------------------------------------------------------------------------------------------------
# II-D. Feature Fusion Decoder


def conv3x3(c_in: int, c_out: int) -> nn.Sequential:
    """The paper's conv_3x3: 3x3 convolution, batch norm, ReLU. (B, c_in, h, w) -> (B, c_out, h, w).

    The paper names the convolution only; batch norm, ReLU, no bias and PyTorch's default
    initialisation come from the release.
    """
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class Injection(nn.Module):
    """Injects the MRM's map of one scale into the decoder's map in two stages, Eq. 6-10.

    Source: paper, except for `conv_mrm`. GAP and GMP, despite their names ("global"), pool over 2x2
    windows (source: paper).
    """

    def __init__(self, mrm_width: int) -> None:
        super().__init__()
        # 1x1 in the paper's Eq. 6; 3x3 in the release, and only 3x3 gives the paper's 29.44 M.
        self.conv_mrm = conv3x3(mrm_width, mrm_width)
        self.stage1 = conv3x3(2 * mrm_width, mrm_width)
        self.stage2 = conv3x3(2 * mrm_width, mrm_width)

    def forward(self, x: Tensor, f_mrm: Tensor) -> Tensor:
        """x (B, C2, h, w), F_in,csa or the last injection's; f_mrm (B, C2, 2h, 2w) -> F_stage2,csa, f_mrm's shape."""
        f_in_mrm = self.conv_mrm(f_mrm)  # Eq. 6
        f_key = F.avg_pool2d(f_in_mrm, 2) + F.max_pool2d(f_in_mrm, 2)  # Eq. 7, (B, C2, h, w)
        x = self.stage1(torch.cat([x, f_key], dim=1))  # Eq. 8
        # Eq. 9 (bilinear with aligned corners: release)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        # CUDA's autocast interpolates in float32, and cat would then promote f_mrm too.
        x = x.to(f_mrm.dtype)
        return self.stage2(torch.cat([x, f_mrm], dim=1))  # Eq. 10, with f_mrm itself


class FFD(nn.Module):
    """Feature Fusion Decoder, Fig. 3 (source: paper): injects F_mrm^1 (S/8), then F_mrm^2 (S/4)."""

    def __init__(self, csa_width: int, mrm_width: int) -> None:
        super().__init__()
        self.conv_csa = conv3x3(csa_width, mrm_width)  # 1x1 in the paper, see `Injection`
        self.inject1 = Injection(mrm_width)
        self.inject2 = Injection(mrm_width)
        self.head = nn.Conv2d(mrm_width, 1, 1)  # to one channel (source: release)

    def forward(self, f_csa: Tensor, f_mrm1: Tensor, f_mrm2: Tensor) -> Tensor:
        """f_csa (B, C1, g, g), f_mrm1 (B, C2, 2g, 2g), f_mrm2 (B, C2, 4g, 4g) -> logits (B, 1, 4g, 4g)."""
        x = self.conv_csa(f_csa)  # F_in,csa
        x = self.inject1(x, f_mrm1)
        x = self.inject2(x, f_mrm2)
        return self.head(x)


# -------------------------------------------------------------------------------------------------
# II-A. The whole network

PATCH = 16  # pixels on a side of the encoder's patches


class EncoderSpec(NamedTuple):
    """One of SAM's image encoders, and the widths of what runs beside it."""

    width: int  # C
    depth: int  # L
    heads: int
    global_blocks: tuple[int, ...]  # the others attend within windows
    window: int = 14
    neck: int = 256
    csa_width: int = 256  # C1
    mrm_width: int = 128  # C2


ENCODERS = {
    "vit_b": EncoderSpec(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": EncoderSpec(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": EncoderSpec(1280, 32, 16, (7, 15, 23, 31)),
    # Not SAM's: small enough to train on a CPU in minutes.
    "tiny": EncoderSpec(64, 4, 4, (1, 3), window=7, neck=32, csa_width=32, mrm_width=16),
}


def high_pass(images: Tensor) -> Tensor:
    """Absolute value of the images' high frequencies, for shadow detection, III-A.

    The middle square of the centred spectrum, S/2 wide, is set to zero (details: release, after
    SAM-Adapter). (B, 3, S, S) -> the same shape and dtype.
    """
    size = images.shape[-1]
    low = slice(size // 2 - size // 4, size // 2 + size // 4)
    with torch.autocast(images.device.type, enabled=False):
        spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
        spectrum[..., low, low] = 0
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.abs()


class TSSAM(nn.Module):
    """Two-Stream SAM, Fig. 2 (a): CSAs and MRMs beside the frozen encoder, followed by the FFD.

    An encoder of L blocks has L + 2 CSAs (one for the embedded patches, one per block, one for the
    neck) and one MRM for each of its last 12 blocks and the neck: 14 and 13 in TS-SAM_B, 34 and 13
    in TS-SAM_H. The paper gives these counts; the places come from the release.

    The encoder is `segment_anything`'s, and its parameters never get a gradient. But the merged map
    of Eq. 1 is what the next block receives, so gradients flow through the frozen blocks: in
    training these cannot run under `no_grad`.

    Args:
        sam: a name in `ENCODERS`.
        image_size: S, a multiple of 16.
        high_freq: add the high-frequency embedding to the side stream's input (shadow detection).
        csa_blocks: encoder blocks with a CSA, counted from 0; None: all. The patches and the neck
            always have one.
        mrm_blocks: encoder blocks that feed an MRM; None: the last 12. The neck always does.
    """

    def __init__(
        self,
        sam: str = "vit_h",
        image_size: int = 1024,
        high_freq: bool = False,
        csa_blocks: Iterable[int] | None = None,
        mrm_blocks: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        if sam not in ENCODERS:
            raise InputError(f"sam: no encoder is called {sam!r}; there are {', '.join(ENCODERS)}")
        if image_size <= 0 or image_size % PATCH:
            raise InputError(f"image size: {image_size} is not a positive multiple of {PATCH}")
        spec = ENCODERS[sam]
        blocks = range(spec.depth)
        csa_blocks = sorted(set(blocks if csa_blocks is None else csa_blocks))
        mrm_blocks = sorted(set(blocks[-12:] if mrm_blocks is None else mrm_blocks))
        for block in (*csa_blocks, *mrm_blocks):
            if block not in blocks:
                raise InputError(
                    f"{sam} has the blocks 0 to {spec.depth - 1}, and no block {block}"
                )
        # The arguments that build this model again, as plain values for a checkpoint.
        self.config = dict(
            sam=sam,
            image_size=image_size,
            high_freq=high_freq,
            csa_blocks=csa_blocks,
            mrm_blocks=mrm_blocks,
        )
        self.image_encoder = ImageEncoderViT(
            img_size=image_size,
            patch_size=PATCH,
            embed_dim=spec.width,
            depth=spec.depth,
            num_heads=spec.heads,
            out_chans=spec.neck,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=spec.window,
            global_attn_indexes=spec.global_blocks,
        ).requires_grad_(False)
        for block in self.image_encoder.blocks:  # SAM's classes with a leaner forward, see below
            block.__class__ = EncoderBlock
            block.attn.__class__ = ChunkedAttention

        # Not in the paper, but in its 29.44 M: the trained embedding of F_csa^0 (source: release).
        self.csa_embedding = nn.Linear(spec.width, spec.csa_width)
        self.high_freq_embedding = None
        if high_freq:
            self.high_freq_embedding = nn.Conv2d(3, spec.csa_width, PATCH, stride=PATCH)
        # CSA 0 takes the patches, the last one the neck; likewise the last MRM.
        csa_widths = [spec.width] * (1 + len(csa_blocks)) + [spec.neck]
        mrm_widths = [spec.width] * len(mrm_blocks) + [spec.neck]
        self.csa = nn.ModuleList(CSA(width, spec.csa_width) for width in csa_widths)
        self.mrm = nn.ModuleList(MRM(width, spec.mrm_width) for width in mrm_widths)
        self.ffd = FFD(spec.csa_width, spec.mrm_width)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S), normalised with ImageNet's mean and std -> logits (B, 1, S, S).

        Logits are float32, or float64 in a float64 model.
        """
        size = self.config["image_size"]
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images are {tuple(images.shape)}, not (batch, 3, {size}, {size})")
        encoder = self.image_encoder
        csa_of_block = dict(zip(self.config["csa_blocks"], self.csa[1:-1], strict=True))
        mrm_of_block = dict(zip(self.config["mrm_blocks"], self.mrm[:-1], strict=True))
        f_csa = None  # the side stream, and the MRM's two maps; each tap updates them
        f_mrm = (0.0, 0.0)

        def tap_patches(module: nn.Module, args: tuple, patches: Tensor) -> None:
            """patches (B, g, g, C): embeds them as F_csa^0; CSA 0 merges patches + positions."""
            nonlocal f_csa
            # The release reads the (B, g, g, C) numbers as (B, C, g, g) without moving the
            # channels, so what is embedded is a fixed permutation, not a spatial map. A slip, it
            # seems, but its checkpoints need it.
            batch, g, _, width = patches.shape
            shuffled = patches.reshape(batch, width, g, g).movedim(1, -1)
            f_csa = self.csa_embedding(shuffled).movedim(-1, 1)
            if self.high_freq_embedding is not None:
                f_csa = f_csa + self.high_freq_embedding(high_pass(images))
            f_vit = (patches + encoder.pos_embed).movedim(-1, 1)
            f_csa, _ = self.csa[0](f_csa, f_vit)  # unlike Eq. 1, not written back (release)

        def tap_block(i: int, module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
            """y (B, g, g, C), block i's output: the MRM reads it; the CSA merges it; the merged map
            replaces it."""
            nonlocal f_csa, f_mrm
            f_vit = y.movedim(-1, 1)
            if i in mrm_of_block:
                f_mrm = mrm_of_block[i](f_vit, *f_mrm)
            if i in csa_of_block:
                f_csa, merged = csa_of_block[i](f_csa, f_vit)
                return merged.movedim(1, -1)  # a forward hook's result replaces the output
            return None

        def tap_neck(module: nn.Module, args: tuple, f_vit: Tensor) -> None:
            """f_vit (B, neck channels, g, g), the neck's output: the last MRM and CSA."""
            nonlocal f_csa, f_mrm
            f_mrm = self.mrm[-1](f_vit, *f_mrm)
            f_csa, _ = self.csa[-1](f_csa, f_vit)

        # The hooks live for one forward pass: no activation outlives it, and a copied model taps
        # its own encoder. Threads that share a model would trigger each other's hooks, so forward
        # passes take turns.
        with forward_lock, ExitStack() as taps:
            taps.enter_context(encoder.patch_embed.register_forward_hook(tap_patches))
            for i, block in enumerate(encoder.blocks):
                taps.enter_context(block.register_forward_hook(partial(tap_block, i)))
            taps.enter_context(encoder.neck.register_forward_hook(tap_neck))
            encoder(images)  # runs the patches, blocks and neck, and each one's tap after it

        logits = self.ffd(f_csa, *f_mrm)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # From S/4 to S (source: release). Unlike Eq. 9's, this upsampling does not align corners.
        return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Train in less memory: backward recomputes the encoder's blocks."""
        for block in self.image_encoder.blocks:
            block.grad_checkpointing = enable

    def store_encoder(self, dtype: torch.dtype) -> None:
        """Cast the encoder's linear and convolution layers to autocast's `dtype` ahead of time.

        Autocast would cast them in every step, and autograd would keep the copies until backward.
        No number changes.
        """
        for module in self.image_encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)


# -------------------------------------------------------------------------------------------------
# How it fits into memory (source: ours; no number changes by more than rounding)

forward_lock = threading.Lock()  # see TSSAM.forward

# recompute(f, x) is f(x), but stores no intermediate activations; backward recomputes them.
recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class EncoderBlock(Block):
    """SAM's block with optional activation checkpointing.

    The taps are outside, so their batch norms see each batch once.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """x (B, g, g, C) -> the same shape."""
        return recompute(super().forward, x) if self.grad_checkpointing else super().forward(x)


class ChunkedAttention(Attention):
    """SAM's attention, for a chunk of the queries at a time: rows of the map.

    SAM computes softmax(q k^T / sqrt(d) + rel_h + rel_w) v, with biases by the row and the column
    of query and key. The N x N scores of each head (N = h * w, 4096 at 1024 x 1024)
    would take most of the encoder's memory. Here `scaled_dot_product_attention` gets the bias of a
    chunk as its mask, and backward recomputes it.
    """

    # CPU: head by head; 2**18 scores fit its cache, 2**20 do not. GPU: all images and heads at
    # once; smaller chunks would leave most of it idle.
    SCORES_PER_CHUNK = {"cpu": 2**18, "cuda": 2**28}

    def forward(self, x: Tensor) -> Tensor:
        """x (B, h, w, C) -> the same shape."""
        h, w = x.shape[1:3]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, h, w, 3, heads, d)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)  # each (B, heads, h, w, d)
        k = k.flatten(2, 3)
        v = v.flatten(2, 3)
        with x.device:  # get_rel_pos makes its index there; one on the CPU would stall a GPU
            table_h = get_rel_pos(h, h, self.rel_pos_h)  # (h, h, d)
            table_w = get_rel_pos(w, w, self.rel_pos_w)  # (w, w, d)
        on_gpu = x.device.type == "cuda"
        scores = self.SCORES_PER_CHUNK["cuda" if on_gpu else "cpu"]
        scores_per_row = w * h * w * (len(x) * self.num_heads if on_gpu else 1)
        rows = max(1, scores // scores_per_row)
        chunks = [
            recompute(self.attend, q_rows, k, v, table_rows, table_w)
            for q_rows, table_rows in zip(q.split(rows, dim=2), table_h.split(rows), strict=True)
        ]
        return self.proj(torch.cat(chunks, dim=2).permute(0, 2, 3, 1, 4).flatten(3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor) -> Tensor:
        """r rows of queries q (B, heads, r, w, d), all k and v (B, heads, N, d) -> the shape of q."""
        # einsum returns permuted tensors, and their sum would have to be copied once more.
        rel_h = torch.einsum("bnrwd,rkd->bnrwk", q, table_h).contiguous()  # (B, heads, r, w, h)
        rel_w = torch.einsum("bnrwd,wkd->bnrwk", q, table_w).contiguous()  # (B, heads, r, w, w)
        bias = rel_h[..., :, None] + rel_w[..., None, :]  # (B, heads, r, w, h, w)
        bias = bias.flatten(2, 3).flatten(3)  # (B, heads, r * w, N)
        return F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=bias).view_as(q)


# -------------------------------------------------------------------------------------------------
# Files: SAM's published weights, the release's checkpoints, ours


AnyPath = str | os.PathLike
StateDict = Mapping[str, Tensor]


class InputError(ValueError):
    """Bad input from the user. One line: what is wrong, which file or flag, what to do."""


SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {  # published file, sha256
    "vit_b": (
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": (
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": (
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}


def build_tssam(
    sam: str = "vit_h",
    image_size: int = 1024,
    high_freq: bool = False,
    sam_checkpoint: AnyPath | None = None,
    csa_blocks: Iterable[int] | None = None,
    mrm_blocks: Iterable[int] | None = None,
) -> TSSAM:
    """A `TSSAM` in training mode; SAM's published weights fill its encoder if a file is given."""
    model = TSSAM(sam, image_size, high_freq, csa_blocks, mrm_blocks)
    if sam_checkpoint is not None:
        load_sam(model, sam_checkpoint)
    return model


def sam_weights(sam: str, folder: AnyPath = "checkpoints") -> Path:
    """Path of SAM's published weights in `folder`, downloaded if missing (sha256 checked)."""
    if sam not in SAM_FILES:
        raise InputError(
            f"{sam}: no weights are published for it; pass a file, or `random`, with --sam-checkpoint"
        )
    name, sha256 = SAM_FILES[sam]
    path = Path(folder) / name
    if not path.exists():
        print(f"downloading {SAM_URL}{name} to {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(SAM_URL + name, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{SAM_URL}{name} could not be downloaded ({one_line(error)}); put the file at {path}"
            ) from error
    return path


def load_sam(model: TSSAM, path: AnyPath) -> None:
    """Fill the encoder from SAM's published weights, made for images of 1024 x 1024.

    For other sizes the position embedding is resampled bicubically with antialiasing (ours), the
    relative positions of the global blocks linearly, as SAM's `get_rel_pos` does at run time.
    """
    state = encoder_part(load_file(path))
    targets = model.image_encoder.state_dict()
    for name in state.keys() & targets.keys():
        given = state[name]
        target = targets[name]
        if name == "pos_embed" and given.shape != target.shape:
            grid = given.movedim(-1, 1).float()
            grid = F.interpolate(grid, target.shape[1:3], mode="bicubic", antialias=True)
            state[name] = grid.movedim(1, -1)
        elif "rel_pos" in name and len(given) != len(target):
            table = F.interpolate(given.T[None].float(), len(target), mode="linear")
            state[name] = table[0].T
    fill(model.image_encoder, state, f"{path}, as the encoder of --sam {model.config['sam']}")


def encoder_part(state: StateDict) -> StateDict:
    """The frozen encoder's tensors in a state dict, under the encoder's own names."""
    prefix = "image_encoder."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def trained_part(state: StateDict) -> StateDict:
    """Everything in a state dict but the frozen encoder."""
    return {n: t for n, t in state.items() if not n.startswith("image_encoder.")}


# Our names, and the names in the authors' checkpoints, flat state dicts that include SAM's encoder.
# The release numbers the scales the other way round: its fpn1 is S/4 (k = 2), its fpn2 S/8 (k = 1).
RELEASED_NAMES = r"""
^csa_embedding                image_encoder.csa_embedding
^high_freq_embedding          image_encoder.fft_embedding.proj
^csa\.(\d+)\.expand\.0        image_encoder.csa_blocks.\1.conv1
^csa\.(\d+)\.expand\.1        image_encoder.csa_blocks.\1.bn1
^csa\.(\d+)\.compress\.0      image_encoder.csa_blocks.\1.conv2
^csa\.(\d+)\.compress\.1      image_encoder.csa_blocks.\1.bn2
^mrm\.(\d+)\.compress         image_encoder.mrm_blocks.\1.conv_in
^mrm\.(\d+)\.deconv1          image_encoder.mrm_blocks.\1.fpn2
^mrm\.(\d+)\.gate1\.w1        image_encoder.mrm_blocks.\1.fpn2.3.res_gate.0
^mrm\.(\d+)\.gate1\.w2        image_encoder.mrm_blocks.\1.fpn2.3.res_gate.2
^mrm\.(\d+)\.deconv2          image_encoder.mrm_blocks.\1.fpn1
^mrm\.(\d+)\.gate2\.w1        image_encoder.mrm_blocks.\1.fpn1.6.res_gate.0
^mrm\.(\d+)\.gate2\.w2        image_encoder.mrm_blocks.\1.fpn1.6.res_gate.2
^ffd\.conv_csa               mask_decoder.conv1
^ffd\.inject1\.conv_mrm      mask_decoder.conv2
^ffd\.inject1\.stage         mask_decoder.conv12_
^ffd\.inject2\.conv_mrm      mask_decoder.conv4
^ffd\.inject2\.stage         mask_decoder.conv24_
^ffd\.head                   mask_decoder.conv1_1
"""


def released_name(name: str) -> str:
    """The authors' name of one of our tensors: ffd.head.bias -> mask_decoder.conv1_1.bias."""
    for line in RELEASED_NAMES.strip().splitlines():
        name = re.sub(*line.split(), name)
    return name


def load_released(model: TSSAM, file: AnyPath | StateDict) -> None:
    """Fill a model, encoder and all, from a checkpoint of the authors' code, or its state dict."""
    state = load_file(file) if isinstance(file, AnyPath) else file
    fill(model, under_our_names(state, model), "released checkpoint")


def under_our_names(state: StateDict, model: TSSAM) -> StateDict:
    """A released checkpoint's state dict under the names that `model` has for the same tensors."""
    our_names = {released_name(name): name for name in model.state_dict()}
    return {our_names.get(name, name): tensor for name, tensor in state.items()}


def fingerprint(encoder: StateDict) -> str:
    """sha256 of an encoder's state dict: a trained part works with no other encoder.

    Positions are left out, because their last bits after resampling may differ between machines.
    """
    digest = hashlib.sha256()
    for name in sorted(encoder):
        if "pos" not in name:
            digest.update(name.encode())
            # In float32, as a model holds it: a released file may be in another precision.
            digest.update(encoder[name].float().cpu().contiguous().numpy())
    return digest.hexdigest()


def save_checkpoint(path: AnyPath, model: TSSAM, *, task: str, encoder: dict, **info) -> None:
    """Write a model's trained part, the arguments to rebuild it, and `info`, more plain values.

    `encoder` holds the encoder's `fingerprint` as it was loaded, `sam_checkpoint` (the path of
    SAM's weights) and `weights`: None, or the state dict of a random encoder, which no file
    contains. `task` is sod, cod or shadow.
    """
    trained = {name: t.cpu() for name, t in trained_part(model.state_dict()).items()}
    content = dict(config=model.config, trained=trained, task=task, encoder=encoder, **info)
    write_atomically(Path(path), lambda file: torch.save(content, file))


def read_checkpoint(path: AnyPath) -> dict:
    """What `save_checkpoint` wrote to a file; a released checkpoint is put into the same form."""
    content = load_file(path)
    if {"config", "trained", "task", "encoder"} <= content.keys():
        return content
    if not {"image_encoder.csa_embedding.weight", "image_encoder.pos_embed"} <= content.keys():
        raise InputError(
            f"{path}: no checkpoint of train.py or the authors (SAM's weights go with --sam-checkpoint)"
        )
    high_freq = "image_encoder.fft_embedding.proj.weight" in content
    _, grid, _, width = content["image_encoder.pos_embed"].shape
    sam = next((name for name, spec in ENCODERS.items() if spec.width == width), f"{width} wide")
    config = dict(sam=sam, image_size=grid * PATCH, high_freq=high_freq)
    with torch.device("meta"):  # for its names alone
        state = under_our_names(content, TSSAM(**config))
    encoder = encoder_part(state)
    return dict(
        config=config,
        trained=trained_part(state),
        task="shadow" if high_freq else "sod or cod",
        encoder=dict(fingerprint=fingerprint(encoder), sam_checkpoint=None, weights=encoder),
    )


def load_checkpoint(path: AnyPath, sam_checkpoint: AnyPath | None = None) -> tuple[TSSAM, dict]:
    """The model of a checkpoint, train.py's or a released one, on the CPU in eval mode; and the rest.

    SAM's weights come from `sam_checkpoint`, else from the file used in training if it is still
    there, else from `sam_weights`; a released checkpoint contains them. The rest is `config`,
    `task` (of a released checkpoint "shadow" or "sod or cod") and train.py's values.
    """
    content = read_checkpoint(path)
    model = TSSAM(**content["config"])
    encoder = content["encoder"]
    file = sam_checkpoint or encoder["sam_checkpoint"]
    if file is None:
        fill(model.image_encoder, encoder["weights"], f"{path}, its encoder")
    else:
        if sam_checkpoint is None and not os.path.exists(file):
            file = sam_weights(model.config["sam"])
        load_sam(model, file)
    load_trained(model, content, path)
    del content["encoder"], content["trained"]
    return model.eval(), content


def load_trained(model: TSSAM, content: dict, path: AnyPath) -> None:
    """Fill a model's trained part from `read_checkpoint(path)`; the encoder must be the same.

    The image size may differ.
    """
    encoder = model.image_encoder.state_dict()
    if content["encoder"]["fingerprint"] != fingerprint(encoder):
        raise InputError(
            f"{path}: trained on another encoder, not the one loaded; pass it with --sam-checkpoint (random: --seed)"
        )
    frozen = {f"image_encoder.{name}": tensor for name, tensor in encoder.items()}
    fill(model, frozen | content["trained"], path)


def load_file(path: AnyPath) -> dict:
    """The dict in a file of `torch.save`, on the CPU; only tensors and plain values are unpickled.

    Wrappers are taken off: an entry `model` or `state_dict`, the prefix `module.` of names.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken and foreign files raise anything
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as a checkpoint ({reason}); pass a state_dict() saved with torch.save"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise InputError(f"{path}: contains a {type(content).__name__}, not a checkpoint")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def fill(module: nn.Module, state: StateDict, where: AnyPath) -> None:
    """Load a whole state dict; what does not fit is one line of PyTorch's words, and the rest is loaded."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{where}: {' '.join(str(error).split())[:300]}") from error


def write_atomically(path: Path, save: Callable[[Path], None]) -> None:
    """Have `save` write a file under a temporary name, then rename it: no file is ever half-written."""
    # Of a fixed length, because a long name has no room for an ending.
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()
    temporary = path.with_name(f".{name[:16]}.tmp")
    try:
        save(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the older one's place
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot be written ({one_line(error)}); the previous file is untouched"
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name: for the inside of an InputError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -------------------------------------------------------------------------------------------------
# What each part is: python tssam.py


def summarize(sam: str) -> None:
    """Print the parts of a TSSAM, their equations and parameters."""
    with torch.device("meta"):  # shapes, not numbers
        model = TSSAM(sam)
    print(f"TS-SAM_{sam[-1].upper()}: parameters")
    for title, part in (
        ("embedding of F_csa^0", model.csa_embedding),
        (f"{len(model.csa)} CSA, Eq. 1-2", model.csa),
        (f"{len(model.mrm)} MRM, Eq. 3-5", model.mrm),
        ("FFD, Eq. 6-10", model.ffd),
        ("SAM's encoder, frozen", model.image_encoder),
    ):
        print(f"  {title:<22}{sum(p.numel() for p in part.parameters()):>12,}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"  {'trained':<22}{trained:>12,}")


if __name__ == "__main__":
    argparse.ArgumentParser(description="Print the parts of TS-SAM_B, L and H.").parse_args()
    for name in ("vit_b", "vit_l", "vit_h"):
        summarize(name)
    print("Shadow detection adds the high-frequency embedding: 196,864 trained parameters.")
