"""Models in plain torch and with random weights, and their parameters' shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 1000


class ConvNeXtSize(NamedTuple):
    """Blocks of each of the four stages, and their channels."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]


class TransformerSize(NamedTuple):
    """Shape of a decoder-only transformer."""

    blocks: int
    width: int
    heads: int
    vocabulary: int
    context: int


CONVNEXT = {
    "convnext_pico": ConvNeXtSize((2, 2, 6, 2), (32, 64, 128, 256)),
    "convnext_tiny": ConvNeXtSize((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_base": ConvNeXtSize((3, 3, 27, 3), (128, 256, 512, 1024)),
}
TRANSFORMER = {
    "transformer_pico": TransformerSize(4, 192, 6, 4096, 128),
    "transformer_1b": TransformerSize(16, 2048, 16, 50257, 1024),
}
MODELS = (*CONVNEXT, *TRANSFORMER)

# MobileNetV3-Small (arXiv 1905.02244, table 2): kernel, channels within a block, channels of its
# result, whether it has squeeze-and-excitation.
MOBILENETV3_SMALL = (
    *((3, 16, 16, True), (3, 72, 24, False), (3, 88, 24, False)),
    *((5, 96, 40, True), (5, 240, 40, True), (5, 240, 40, True), (5, 120, 48, True)),
    *((5, 144, 48, True), (5, 288, 96, True), (5, 576, 96, True), (5, 576, 96, True)),
)


def new_model(name: str) -> ConvNeXt | Transformer:
    """Return a model with new weights, on the default device."""
    if name in CONVNEXT:
        return ConvNeXt(CONVNEXT[name])
    return Transformer(TRANSFORMER[name])


def shapes_of(name: str) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters, one of `MODELS` or "mobilenetv3_small"."""
    if name == "mobilenetv3_small":
        return mobilenet_shapes()
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in new_model(name).parameters()]


class ConvNeXt(nn.Module):
    """ConvNeXt (arXiv 2201.03545) with its head of 1000 classes, without stochastic depth."""

    def __init__(self, size: ConvNeXtSize) -> None:
        super().__init__()
        widths = size.widths
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0])]
        for stage, (depth, width) in enumerate(zip(size.depths, widths, strict=True)):
            if stage > 0:
                before = widths[stage - 1]
                layers += [ChannelNorm(before), nn.Conv2d(before, width, 2, 2)]
            layers += [ConvNeXtBlock(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, 1000] of images [B, 3, H, W], of sides that 32 divides."""
        logits: Tensor = self.head(self.norm(self.features(images).mean((2, 3))))
        return logits


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, LayerNorm, and an MLP of four times the width, added by a scale a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        layers = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(*layers)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the correction, [B, C, H, W]."""
        last = self.depthwise(x).permute(0, 2, 3, 1)
        added: Tensor = self.scale * self.mlp(self.norm(last))
        return x + added.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalized at each pixel."""
        last: Tensor = super().forward(x.permute(0, 2, 3, 1))
        return last.permute(0, 3, 1, 2)


class Transformer(nn.Module):
    """A decoder-only transformer in the manner of GPT-2, with a head of its own weights."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        wide = {"dim_feedforward": 4 * size.width, "activation": "gelu"}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                size.width, size.heads, dropout=0.0, batch_first=True, norm_first=True, **wide
            )
            for _ in range(size.blocks)
        )
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, L, vocabulary] of the tokens that follow tokens [B, L]."""
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device, x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


def mobilenet_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of MobileNetV3-Small with 1000 classes, whose many tensors are small."""
    channels = 16
    shapes = with_batchnorm(channels, 3, 3)
    for kernel, within, result, excites in MOBILENETV3_SMALL:
        if within != channels:
            shapes += with_batchnorm(within, channels, 1)
        shapes += with_batchnorm(within, 1, kernel)
        if excites:
            nearest = max(8, (within // 4 + 4) // 8 * 8)
            squeezed = nearest if nearest >= 0.9 * within / 4 else nearest + 8
            shapes += [(squeezed, within, 1, 1), (squeezed,), (within, squeezed, 1, 1), (within,)]
        shapes += with_batchnorm(result, within, 1)
        channels = result
    shapes += with_batchnorm(576, channels, 1)
    return [*shapes, (1024, 576), (1024,), (CLASSES, 1024), (CLASSES,)]


def with_batchnorm(outputs: int, inputs: int, kernel: int) -> list[tuple[int, ...]]:
    """Return the shapes of a convolution without a bias and a batch normalization after it."""
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]
