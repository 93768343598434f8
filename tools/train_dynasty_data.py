"""What train_dynasty.py trains and tests on: examples by number, the same for all rows of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CROPPED = 4  # pixels by which a small image is moved at most


class Examples(Protocol):
    """Half of a data set."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """Inputs and targets. rng: of what is changed at random in training; None: nothing is."""


@dataclass(frozen=True)
class DataSet:
    """shape: of an image, (channels, height, width), or of a context, (bytes,)."""

    name: str
    classes: int
    shape: tuple[int, ...]
    train: Examples
    test: Examples


@dataclass(frozen=True)
class Images:
    """Small images in memory: pixels (N, C, H, W) and labels (N,), both uint8.

    moved: in training they are cut out of a border of zeros at random, and every other one is mirrored.
    """

    pixels: Tensor
    labels: Tensor
    mean: Sequence[float]
    deviation: Sequence[float]
    moved: bool

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float32 of mean 0 and deviation 1, and (B,) int64."""
        chosen = torch.as_tensor(np.asarray(indices))
        images = normalised(self.pixels[chosen], self.mean, self.deviation)
        if rng is not None and self.moved:
            images = _moved(images, rng)
        return images, self.labels[chosen].long()


@dataclass(frozen=True)
class ImageFiles:
    """Images that are decoded when they are asked for; labels are numbers of classes."""

    paths: Sequence[Path]
    labels: Sequence[int]
    mean: Sequence[float]
    deviation: Sequence[float]
    side: int

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """(B, 3, side, side) float32, and (B,) int64."""
        images = [torch.from_numpy(_decoded(self.paths[index], self.side, rng)) for index in indices]
        pixels = torch.stack(images).permute(0, 3, 1, 2)
        return normalised(pixels, self.mean, self.deviation), torch.tensor([self.labels[index] for index in indices])


@dataclass(frozen=True)
class Contexts:
    """Pieces of a text, uint8: example i begins at `starts[i]` and is predicted byte by byte."""

    text: Tensor
    starts: NDArray[np.int64]
    length: int

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """(B, length) int64, and each one's next byte, of the same shape."""
        starts = self.starts[np.asarray(indices)]
        whole = torch.stack([self.text[start : start + self.length + 1] for start in starts.tolist()]).long()
        return whole[:, :-1], whole[:, 1:]


def contexts(text: bytes, length: int) -> tuple[Contexts, Contexts]:
    """To train and to test on: pieces side by side, these of the last tenth of the text.

    ValueError where it is too short for one of each.
    """
    held = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    border = len(text) - len(text) // 10
    halves = [np.arange(low, high - length, length) for low, high in ((0, border), (border, len(text)))]
    if not all(len(half) for half in halves):
        raise ValueError(f"must have {10 * (length + 1)} bytes at least, for contexts of {length}, got {len(text)}")
    train, test = (Contexts(held, half, length) for half in halves)
    return train, test


def spread(count: int, wanted: int | None) -> NDArray[np.int64]:
    """Numbers of `wanted` examples out of `count`, evenly spread; all if None or if there are not so many."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.arange(wanted) * count // wanted


def normalised(pixels: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """(B, C, H, W) uint8 as float32."""
    shape = (1, -1, 1, 1)
    return (pixels.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(deviation).view(shape)


def _moved(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Each cut out of its border at a place of its own, and half of them mirrored."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (CROPPED,) * 4)
    down, right = (torch.from_numpy(rng.integers(0, 2 * CROPPED, count, endpoint=True)) for _ in range(2))
    rows = (down[:, None] + torch.arange(height))[:, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, :]
    cut = padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    mirrored = torch.from_numpy(rng.random(count) < 0.5)[:, None, None, None]
    return torch.where(mirrored, cut.flip(3), cut)


def _decoded(path: Path, side: int, rng: np.random.Generator | None) -> NDArray[np.uint8]:
    """(side, side, 3): in training a random part, perhaps mirrored; else the middle of the image 8/7 as large."""
    from PIL import Image

    with Image.open(path) as file:
        image: Any = file.convert("RGB")
    if rng is None:
        scale = side * 8 / 7 / min(image.size)
        width, height = side / scale, side / scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
    else:
        left, top, width, height = _part(image.width, image.height, rng)
    box = (left, top, left + width, top + height)
    image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    if rng is not None and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def _part(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, width and height of 8 % to 100 % of an image, at ratios from 3:4 to 4:3 (Szegedy et al. 2015)."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        wide, high = float(np.sqrt(area * ratio)), float(np.sqrt(area / ratio))
        if wide <= width and high <= height:
            return rng.uniform(0, width - wide), rng.uniform(0, height - high), wide, high
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side, side
