"""Reads the standard files of data sets. Nothing is downloaded: what is missing is an error that says how to get it."""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from tasp_coll.files import LARGEST, read_bytes
from train_dynasty_data import DataSet, ImageFiles, Images, contexts
from train_lm import sources

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_IDX_BYTES = 8  # the type of uint8 in an idx file
_RECORD = 2 + 3 * 32 * 32  # CIFAR-100's: coarse label, fine label, image
_NAMED = "and name the directory by --data DIR"
_TOLD = {
    "fashion-mnist": "apt-get install dataset-fashion-mnist, or put its four .gz files of "
    f"https://github.com/zalandoresearch/fashion-mnist into a directory {_NAMED}",
    "cifar-100": "put https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz, the *binary* version, unpacked or not, "
    f"into a directory {_NAMED}",
    "imagenet": "get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar at https://image-net.org/download-images (an "
    f"account is needed), unpack them as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, {_NAMED}",
}


class DataError(Exception):
    """A data set that is not there, or is no such data set; the message says how to get it."""


def load(name: str, directory: Path | None, seq_len: int = 128, side: int = 224) -> DataSet:
    """A data set of train_dynasty_options.DATA_SETS; DataError. seq_len: of contexts; side: of ImageNet's images."""
    try:
        if name == "text":
            return _text(directory, seq_len)
        if name == "imagenet":
            return _imagenet(directory, side)
        return _fashion(directory or DEBIAN) if name == "fashion-mnist" else _cifar(directory)
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"--data-set {name}: {error}") from error


# --- Fashion-MNIST: http://yann.lecun.com/exdb/mnist describes idx


def _fashion(directory: Path) -> DataSet:
    halves = {}
    for part in ("train", "t10k"):
        pixels = _idx(directory, f"{part}-images-idx3-ubyte.gz", dimensions=3)
        labels = _idx(directory, f"{part}-labels-idx1-ubyte.gz", dimensions=1)
        _check_labels(pixels, labels, 10)
        halves[part] = Images(pixels[:, None], labels, (0.2860,), (0.3530,), moved=False)
    shape = tuple(halves["train"].pixels.shape[1:])
    if tuple(halves["t10k"].pixels.shape[1:]) != shape:
        raise ValueError("images to train and to test on must have the same size")
    return DataSet("fashion-mnist", 10, shape, halves["train"], halves["t10k"])


def _idx(directory: Path, name: str, dimensions: int) -> Tensor:
    path = directory / name
    if not path.is_file():
        raise ValueError(f"there is no {path}: {_TOLD['fashion-mnist']}")
    with gzip.open(path) as file:
        held = file.read(LARGEST)
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(held[at : at + 4], "big") for at in range(4, start, 4)]
    if held[:4] != bytes((0, 0, _IDX_BYTES, dimensions)) or len(held) != start + math.prod(sizes) or not all(sizes):
        raise ValueError(f"{path} must be an idx file of bytes with {dimensions} dimensions, whole, and not empty")
    return _tensor(held[start:]).view(sizes)


# --- CIFAR-100: https://www.cs.toronto.edu/~kriz/cifar.html, "binary version"


def _cifar(directory: Path | None) -> DataSet:
    halves = []
    for part in ("train", "test"):
        held = _cifar_bytes(directory, f"{part}.bin")
        if not held or len(held) % _RECORD:
            raise ValueError(f"{part}.bin must have records of {_RECORD} bytes, got {len(held)} bytes")
        records = _tensor(held).view(-1, _RECORD)
        pixels, labels = records[:, 2:].reshape(-1, 3, 32, 32), records[:, 1]
        _check_labels(pixels, labels, 100)
        mean, deviation = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        halves.append(Images(pixels, labels, mean, deviation, moved=part == "train"))
    return DataSet("cifar-100", 100, (3, 32, 32), *halves)


def _cifar_bytes(directory: Path | None, name: str) -> bytes:
    if directory is None:
        raise ValueError(f"needs --data DIR: {_TOLD['cifar-100']}")
    for path in (directory / name, directory / "cifar-100-binary" / name):
        if path.is_file():
            return read_bytes(path)
    archive = directory / "cifar-100-binary.tar.gz"
    if not archive.is_file():
        raise ValueError(f"there is neither {directory / name} nor {archive}: {_TOLD['cifar-100']}")
    with tarfile.open(archive) as file:
        try:
            member = file.extractfile(f"cifar-100-binary/{name}")
        except KeyError:
            member = None
        if member is None:
            raise ValueError(f"{archive} has no file cifar-100-binary/{name}: {_TOLD['cifar-100']}")
        return member.read(LARGEST)


# --- ImageNet: folders of JPEGs by WordNet id


def _imagenet(directory: Path | None, side: int) -> DataSet:
    try:
        import PIL  # noqa: F401
    except ImportError as missing:
        raise ValueError(f"needs Pillow: pip install pillow ({missing})") from missing
    if directory is None:
        raise ValueError(f"needs --data DIR: {_TOLD['imagenet']}")
    classes = _folders(directory / "train")
    if strangers := [name for name in _folders(directory / "val") if name not in set(classes)]:
        raise ValueError(f"{directory / 'val' / strangers[0]} is no class of {directory / 'train'}")
    halves = []
    for part in ("train", "val"):
        found = [(path, label) for label, name in enumerate(classes) for path in _pictures(directory / part / name)]
        if not found:
            raise ValueError(f"there is no *.JPEG in the folders of {directory / part}: {_TOLD['imagenet']}")
        paths, labels = [path for path, _ in found], [label for _, label in found]
        halves.append(ImageFiles(paths, labels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), side))
    return DataSet("imagenet", len(classes), (3, side, side), *halves)


def _folders(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory}: {_TOLD['imagenet']}")
    return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())


def _pictures(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.JPEG"))


def _text(path: Path | None, seq_len: int) -> DataSet:
    held = b"".join(sources()) if path is None else read_bytes(path)
    try:
        train, test = contexts(held, seq_len)
    except ValueError as error:
        raise ValueError(f"{path or 'the text'} {error}") from error
    return DataSet("text", 256, (seq_len,), train, test)


def _check_labels(pixels: Tensor, labels: Tensor, classes: int) -> None:
    if len(pixels) != len(labels):
        raise ValueError(f"there must be a label for each image, got {len(labels)} for {len(pixels)}")
    if (highest := int(labels.max())) >= classes:
        raise ValueError(f"labels must be less than {classes}, got {highest}")


def _tensor(held: bytes) -> Tensor:
    return torch.frombuffer(bytearray(held), dtype=torch.uint8)
