"""The photos scene: a masked image model with an L1 and an SSIM task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import skimage
import torch
from numpy.typing import NDArray
from skimage.color import gray2rgb, rgba2rgb
from skimage.io import imread
from skimage.transform import resize
from skimage.util import img_as_float32
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_shuffle, pixel_unshuffle

from .scenes import Batch, InputError, Supervised

Item = TypeVar("Item")

CROP = 64
WIDTH = 5 * CROP  # every image is resized to this width …
SPLIT = 4 * CROP  # … and what is right of this column, its right fifth, is for validation
PATCH = 4
MASK_RATIO = 0.75
MICRO_BATCH = 4
MAX_IMAGES = 100
MAX_VALIDATION_CROPS = 96
FILL_SIGMA = 2.0

# Files inside the scikit-image wheel; `skimage.data` would download some that are not.
BUNDLED = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Photos(Supervised):
    """Reconstruct a 64×64 crop of which 75 % of the 4×4 patches are hidden.

    The images are [3, H, 320] uint8 with H ≥ 64; the losses are over the whole crop, hidden or not.
    """

    name = "photos"
    title = "Masked image model"
    tasks: ClassVar[dict[str, float]] = {"L1": 0.85, "SSIM": 0.15}
    loss_labels: ClassVar[dict[str, str]] = {"L1": "L1 (z-normalised units)", "SSIM": "1 − SSIM"}
    score_labels: ClassVar[dict[str, str]] = {"L1": "L1", "SSIM": "1-SSIM"}
    score_in_percent = False
    accumulation_steps = 4
    steps = 240
    learning_rate = 3e-3
    step_cost = 110.0

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.training = [image[:, :, :SPLIT] for image in images]
        mean, std = channel_statistics(self.training)
        self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)
        self.held_out, self.held_out_images = validation_crops(images)
        # A seed of its own: the validation masks are the same whatever --seed is.
        masks = patch_masks(len(self.held_out), torch.Generator().manual_seed(0))
        self.validation = self._batch(self.held_out, masks)
        self.validation_note = (
            f"{len(self.held_out)} crops from the right fifth of the images, which no training "
            "crop touches"
        )

    def new_model(self) -> nn.Module:
        """Return a small U-Net."""
        return UNet()

    def micro_batch(self, generator: torch.Generator) -> Batch:
        """Return random crops, half of them mirrored, with random masks."""

        def below(bound: int) -> int:
            return int(torch.randint(bound, (), generator=generator))

        crops = []
        for _ in range(MICRO_BATCH):
            region = self.training[below(len(self.training))]
            y = below(region.shape[1] - CROP + 1)
            x = below(region.shape[2] - CROP + 1)
            crop = region[:, y : y + CROP, x : x + CROP]
            crops.append(crop.flip(2) if below(2) else crop)
        return self._batch(torch.stack(crops), patch_masks(MICRO_BATCH, generator))

    def loss(self, task: str, output: Tensor, targets: Tensor) -> Tensor:
        """Return L1 in z-normalised space, or 1 − SSIM in [0, 1]."""
        if task == "L1":
            return (output - targets).abs().mean((1, 2, 3))
        return 1.0 - ssim(self.denormalise(output), self.denormalise(targets))

    def denormalise(self, images: Tensor) -> Tensor:
        """Return images of z-normalised space in [0, 1]."""
        std, mean = self.std.to(images.device), self.mean.to(images.device)
        return (images * std + mean).clamp(0.0, 1.0)

    def _batch(self, crops: Tensor, masks: Tensor) -> Batch:
        targets = (crops.float() / 255.0 - self.mean) / self.std
        return Batch(torch.cat([fill_in(targets, masks), masks], 1), targets)


class UNet(nn.Module):
    """From the filled-in image and its mask [B, 4, H, W] to the image [B, 3, H, W].

    It predicts a correction of the filled-in image, and works at half resolution and below:
    both because it has only a few hundred steps on a CPU.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        inner = list(pairwise(widths))
        self.stem = nn.Conv2d(4 * 4, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList([ResidualBlock(width) for width in widths])
        self.down = nn.ModuleList([nn.Conv2d(w, v, 2, stride=2) for w, v in inner])
        self.up = nn.ModuleList([nn.ConvTranspose2d(v, w, 2, stride=2) for w, v in inner])
        self.decoder = nn.ModuleList([ResidualBlock(width) for width in widths[:-1]])
        self.head = nn.Conv2d(widths[0], 3 * 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)  # start from the filled-in image as it is
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the reconstruction, in z-normalised space."""
        x = self.encoder[0](self.stem(pixel_unshuffle(inputs, 2)))
        skips = []
        for down, block in zip(self.down, self.encoder[1:], strict=True):
            skips.append(x)
            x = block(down(x))
        levels = list(zip(self.up, self.decoder, skips, strict=True))
        for up, block, skip in reversed(levels):
            x = block(up(x) + skip)
        return inputs[:, :3] + pixel_shuffle(self.head(x), 2)


class ResidualBlock(nn.Module):
    """x plus two convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape as x."""
        return x + self.layers(x)


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Return [B] structural similarity of images [B, C, H, W] in [0, 1], without padding."""
    channels = a.shape[1]
    maps = torch.cat([a, b, a * a, b * b, a * b], 1)
    kernel = maps.new_full((5 * channels, 1, window, window), 1.0 / window**2)
    means = conv2d(maps, kernel, groups=5 * channels)
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = means.chunk(5, 1)
    variances = mean_aa - mean_a**2 + mean_bb - mean_b**2
    covariance = mean_ab - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2.0 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2.0 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def patch_masks(count: int, generator: torch.Generator) -> Tensor:
    """Return [count, 1, 64, 64], 1 where hidden: a random 75 % of each image's patches."""
    side = CROP // PATCH
    order = torch.rand(count, side * side, generator=generator).argsort(1)
    hidden = (order < round(MASK_RATIO * side * side)).float().view(count, 1, side, side)
    return hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def fill_in(images: Tensor, masks: Tensor) -> Tensor:
    """Fill hidden pixels with a Gaussian-weighted mean of the visible ones around them."""
    visible = 1.0 - masks
    positions = torch.arange(CROP, dtype=images.dtype)
    weights = torch.exp(-0.5 * ((positions[:, None] - positions) / FILL_SIGMA) ** 2)
    sums = weights @ torch.cat([images * visible, visible], 1) @ weights
    # Where nothing visible is near: 0, the mean of the training data.
    mean = sums[:, :3] / (sums[:, 3:] + 1e-30)
    return images * visible + mean * masks


def channel_statistics(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel in [0, 1], over all pixels."""
    count = sum(image[0].numel() for image in images)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for image in images:
        pixels = image.flatten(1).double() / 255.0
        sums += torch.stack([pixels.sum(1), (pixels**2).sum(1)])
    mean, square = sums / count
    # The bound keeps images of a single colour from being divided by zero.
    return mean.float(), (square - mean**2).clamp(min=1e-4).sqrt().float()


def validation_crops(images: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return [B, 3, 64, 64] uint8 crops of the right fifth of each image, and their images."""
    places = [
        (index, y)
        for index, image in enumerate(images)
        for y in range(0, image.shape[1] - CROP + 1, CROP)
    ]
    places = evenly(places, MAX_VALIDATION_CROPS)
    crops = [images[index][:, y : y + CROP, SPLIT:] for index, y in places]
    return torch.stack(crops), [index for index, _ in places]


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most so many of the items, at even distances."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


def bundled_files() -> list[Path]:
    """Return the photographs and micrographs that scikit-image was installed with."""
    folder = Path(skimage.__file__).parent / "data"
    files = [folder / name for name in BUNDLED if (folder / name).is_file()]
    if not files:
        raise InputError(f"scikit-image has no images in {folder}: use --images FOLDER")
    return files


def files_in(folder: Path) -> list[Path]:
    """Return image files in a folder, not below it; some at even distances of too many."""
    if not folder.is_dir():
        raise InputError(f"--images {folder}: there is no such folder")
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise InputError(f"--images {folder}: {error.strerror}") from error
    return evenly(files, MAX_IMAGES)


def read_images(files: Sequence[Path]) -> tuple[list[Tensor], list[Path]]:
    """Return the images that could be read, [3, H, 320] uint8, and the files that could not."""
    images, unreadable = [], []
    for path in files:
        try:
            images.append(read_image(path))
        except Exception:  # noqa: PERF203  # whatever the many libraries behind imread raise for a broken file
            unreadable.append(path)
    return images, unreadable


def read_image(path: Path) -> Tensor:
    """Return one image in RGB, [3, H, 320] uint8 with H ≥ 64, resized to the width of all."""
    image = to_rgb(np.asarray(imread(path)))
    height, width = image.shape[:2]
    # The middle of what is very tall or very wide.
    tall, wide = min(height, 2 * width), min(width, 5 * height)
    top, left = (height - tall) // 2, (width - wide) // 2
    # Every k-th pixel is plenty for a camera's image, and saves memory in the smoothing.
    k = max(1, min(wide // (4 * WIDTH), tall // (4 * CROP)))
    image = image[top : top + tall : k, left : left + wide : k]
    shape = max(CROP, round(tall * WIDTH / wide)), WIDTH
    image = resize(image, shape, anti_aliasing=image.shape[1] > WIDTH)
    pixels = np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_rgb(image: NDArray[Any]) -> NDArray[np.float32]:
    """Return [H, W, 3] in [0, 1], from grey, RGB or either with alpha, of any number type."""
    values: NDArray[np.float32] = img_as_float32(image)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("not finite")
    if low < 0.0 or high > 1.0:  # floating point of some other range
        values = (values - low) / (high - low)
    channels = values.shape[2] if values.ndim == 3 else 1 if values.ndim == 2 else 0
    if channels not in (1, 2, 3, 4):
        raise ValueError(f"shape {values.shape}")
    if channels < 3:  # grey, without or with alpha
        return gray2rgb(values.reshape(*values.shape[:2], -1)[:, :, 0])
    return rgba2rgb(values) if channels == 4 else values
