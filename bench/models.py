"""Models in plain torch and with random weights, and their parameters' shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 1000


class ConvNeXtSize(NamedTuple):
    """Blocks of each of the four stages, and their channels."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]


class TransformerSize(NamedTuple):
    """Shape of a transformer: a decoder, or, where it is not causal, an encoder."""

    blocks: int
    width: int
    heads: int
    vocabulary: int
    context: int
    causal: bool = True


CONVNEXT = {
    "convnext_pico": ConvNeXtSize((2, 2, 6, 2), (32, 64, 128, 256)),
    "convnext_tiny": ConvNeXtSize((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_base": ConvNeXtSize((3, 3, 27, 3), (128, 256, 512, 1024)),
}
TRANSFORMER = {
    "transformer_pico": TransformerSize(4, 192, 6, 4096, 128),
    "transformer_1b": TransformerSize(16, 2048, 16, 50257, 1024),
    "bert_small": TransformerSize(4, 512, 8, 30522, 128, causal=False),
}
MOBILENET = "mobilenetv3_small"
MODELS = (*CONVNEXT, MOBILENET, *TRANSFORMER)

# MobileNetV3-Small (arXiv 1905.02244, table 2): kernel, stride, channels within a block, channels
# of its result, whether it has squeeze-and-excitation, whether its activation is hard swish.
MOBILENETV3_SMALL = (
    *((3, 2, 16, 16, True, False), (3, 2, 72, 24, False, False), (3, 1, 88, 24, False, False)),
    *((5, 2, 96, 40, True, True), (5, 1, 240, 40, True, True), (5, 1, 240, 40, True, True)),
    *((5, 1, 120, 48, True, True), (5, 1, 144, 48, True, True), (5, 2, 288, 96, True, True)),
    *((5, 1, 576, 96, True, True), (5, 1, 576, 96, True, True)),
)


def new_model(name: str) -> ConvNeXt | MobileNet | Transformer:
    """Return a model with new weights, on the default device."""
    if name in CONVNEXT:
        return ConvNeXt(CONVNEXT[name])
    return MobileNet() if name == MOBILENET else Transformer(TRANSFORMER[name])


def shapes_of(name: str) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters, of one of `MODELS`."""
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


class MobileNet(nn.Module):
    """MobileNetV3-Small (arXiv 1905.02244) with 1000 classes, whose many tensors are small."""

    def __init__(self) -> None:
        super().__init__()
        channels = 16
        layers: list[nn.Module] = [*with_batchnorm(3, channels, 3, stride=2), nn.Hardswish()]
        for shape in MOBILENETV3_SMALL:
            layers.append(MobileNetBlock(channels, shape))
            channels = shape[3]
        layers += [*with_batchnorm(channels, 576, 1), nn.Hardswish()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(576, 1024), nn.Hardswish(), nn.Linear(1024, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, 1000] of images [B, 3, H, W]."""
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


class MobileNetBlock(nn.Module):
    """Expand, depthwise convolution, squeeze-and-excitation, project; added where shapes allow."""

    def __init__(self, channels: int, shape: Sequence[int]) -> None:
        super().__init__()
        kernel, stride, within, result, excites, swish = shape
        activation = nn.Hardswish if swish else nn.ReLU
        layers: list[nn.Module] = []
        if within != channels:
            layers += [*with_batchnorm(channels, within, 1), activation()]
        layers += [*with_batchnorm(within, within, kernel, stride, groups=within), activation()]
        if excites:
            layers.append(Excitation(within))
        self.layers = nn.Sequential(*layers, *with_batchnorm(within, result, 1))
        self.adds = stride == 1 and channels == result

    def forward(self, x: Tensor) -> Tensor:
        """Return the result [B, C, H, W]."""
        result: Tensor = self.layers(x)
        return x + result if self.adds else result


class Excitation(nn.Module):
    """Squeeze-and-excitation: a factor for each channel, from the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        nearest = max(8, (channels // 4 + 4) // 8 * 8)
        squeezed = nearest if nearest >= 0.9 * channels / 4 else nearest + 8
        squeeze, excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.layers = nn.Sequential(squeeze, nn.ReLU(), excite, nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the factors."""
        return x * self.layers(x.mean((2, 3), keepdim=True))


class Transformer(nn.Module):
    """A transformer: GPT-2 with a head of its own weights, or BERT (arXiv 1810.04805)."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.causal = size.causal
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        wide = {"dim_feedforward": 4 * size.width, "activation": "gelu"}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                size.width,
                size.heads,
                dropout=0.0,
                batch_first=True,
                norm_first=size.causal,
                **wide,
            )
            for _ in range(size.blocks)
        )
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        if not size.causal:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, L, vocabulary] for tokens [B, L]; causal: of those that follow."""
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:length]
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(length, x.device, x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=self.causal)
        logits: Tensor = self.head(self.norm(x))
        return logits


def with_batchnorm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """Return a convolution without a bias and a batch normalization after it."""
    padding = kernel // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs)
