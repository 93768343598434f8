"""The models of train_dynasty.py: plain torch, of random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import train_lm_checkpoint
from train_dynasty_data import DataSet
from train_dynasty_options import Options

HEAD = 32  # width of an attention head
_LARGE = 64  # pixels from which on an image is ImageNet's kind


def build(options: Options, data: DataSet) -> nn.Module:
    """A model for the data's shape and classes; its weights come from torch's generator."""
    if options.model == "llama":
        return _llama(options, data)
    kind = Convnet if options.model == "cnn" else ResNet
    return kind(data.shape, data.classes, options.width, options.depth)


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """(N, classes): of every image, or of every byte of every context."""
    out = model(inputs)
    scores: Tensor = getattr(out, "logits", out)  # transformers' models answer with a record
    return scores.flatten(0, -2)


class Convnet(nn.Sequential):
    """`depth` convolutions of 3x3, each twice as wide as the one before, with ReLU and pooling; two linear layers."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        layers: list[nn.Module] = []
        channels, last = shape[0], width
        for number in range(depth):
            last = width << number
            layers += [nn.Conv2d(channels, last, 3, padding=1), nn.ReLU()]
            layers.append(nn.MaxPool2d(2) if number < depth - 1 else nn.AdaptiveMaxPool2d(3))
            channels = last
        layers += [nn.Flatten(), nn.Linear(9 * last, 4 * width), nn.ReLU(), nn.Linear(4 * width, classes)]
        super().__init__(*layers)


class ResNet(nn.Module):
    """Basic blocks of two convolutions (He et al. 2016).

    Small images: three stages after a convolution of 3x3, as for CIFAR. Large ones: four after a stem of 7x7 and
    pooling, as for ImageNet.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        super().__init__()
        large = min(shape[1:]) >= _LARGE
        first = nn.Conv2d(shape[0], width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU())
        if large:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(4 if large else 3):
            for number in range(depth):
                blocks.append(_Block(channels, width << stage, 2 if stage and not number else 1))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        found: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return found


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.aside: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.aside = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, width, H / stride, W / stride)."""
        return torch.relu(self.inner(images) + self.aside(images))


def _llama(options: Options, data: DataSet) -> Any:
    heads = options.width // HEAD
    sizes = {
        "hidden_size": options.width,
        "intermediate_size": -(-options.width * 8 // 24) * 8,
        "num_hidden_layers": options.depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": data.shape[0],
    }
    return train_lm_checkpoint.new_model(sizes, None, attention="sdpa")
