"""Data sets of train_dynasty.py: standard files as they are published, made small; what is missing or wrong is told."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_dynasty_data
import train_dynasty_sets
from train_dynasty_sets import DataError, load


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for part, count in (("train", 12), ("t10k", 5)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


def test_fashion_mnist(fashion: Path) -> None:
    data = load("fashion-mnist", fashion)
    assert (data.classes, data.shape, len(data.train), len(data.test)) == (10, (1, 28, 28), 12, 5)
    images, labels = data.train.batch([11, 0], np.random.default_rng(0))
    assert labels.tolist() == [1, 0]
    assert (images.shape, images.dtype) == ((2, 1, 28, 28), torch.float32)
    with gzip.open(fashion / "train-images-idx3-ubyte.gz") as file:
        first = np.frombuffer(file.read(), np.uint8)[16 : 16 + 784].reshape(28, 28)
    np.testing.assert_allclose(images[1, 0].numpy() * 0.3530 + 0.2860, first / 255, atol=1e-6)


def test_fashion_mnist_that_is_wrong(fashion: Path) -> None:
    labels = fashion / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for content, told in (
        (whole[:-12], "end-of-stream|CRC|ended"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "idx file of bytes"),
        (b"no gzip", "gzip"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DataError, match=told):
            load("fashion-mnist", fashion)
    write_idx(labels, np.arange(4))
    with pytest.raises(DataError, match="a label for each image, got 4 for 5"):
        load("fashion-mnist", fashion)
    write_idx(labels, np.arange(5) + 9)
    with pytest.raises(DataError, match="less than 10, got 13"):
        load("fashion-mnist", fashion)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_100_is_read_unpacked_or_not(packed: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    records = {"train.bin": rng.integers(0, 100, (6, 3074)), "test.bin": rng.integers(0, 100, (3, 3074))}
    if packed:
        with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as archive:
            for name, values in records.items():
                held = values.astype(np.uint8).tobytes()
                member = tarfile.TarInfo(f"cifar-100-binary/{name}")
                member.size = len(held)
                archive.addfile(member, io.BytesIO(held))
    else:
        for name, values in records.items():
            (tmp_path / name).write_bytes(values.astype(np.uint8).tobytes())
    data = load("cifar-100", tmp_path)
    assert (data.classes, data.shape, len(data.train), len(data.test)) == (100, (3, 32, 32), 6, 3)
    images, labels = data.test.batch([2, 1], np.random.default_rng(0))
    assert labels.tolist() == records["test.bin"][[2, 1], 1].tolist(), "the fine labels"
    red = records["test.bin"][2, 2 : 2 + 1024].reshape(32, 32)
    np.testing.assert_allclose(images[0, 0].numpy() * 0.2673 + 0.5071, red / 255, atol=1e-6)


def test_training_images_are_moved_and_mirrored(tmp_path: Path) -> None:
    pixels = torch.arange(32, dtype=torch.uint8).repeat(64, 3, 32, 1)  # each pixel tells its column
    half = train_dynasty_data.Images(pixels, torch.zeros(64), (0, 0, 0), (1, 1, 1), moved=True)
    images, _ = half.batch(range(64), np.random.default_rng(3))
    again, _ = half.batch(range(64), np.random.default_rng(3))
    assert torch.equal(images, again), "the same from the same seed"
    columns = (images * 255).round()[:, 0, 16]
    steps = (columns[:, 16] - columns[:, 15]).tolist()
    assert {1.0, -1.0} == set(steps)
    firsts = {row[4].item() if step > 0 else row[-5].item() for row, step in zip(columns, steps, strict=True)}
    assert firsts == set(map(float, range(9))), "by up to 4 pixels either way"
    assert torch.equal(half.batch(range(64), None)[0], train_dynasty_data.normalised(pixels, (0, 0, 0), (1, 1, 1)))


def test_imagenet_is_decoded_when_it_is_asked_for(tmp_path: Path) -> None:
    for part, wnid, colour in (("train", "n01", "red"), ("train", "n02", "blue"), ("val", "n02", "blue")):
        folder = tmp_path / part / wnid
        folder.mkdir(parents=True)
        Image.new("L" if part == "val" else "RGB", (40, 30), 200 if part == "val" else colour).save(
            folder / "a.JPEG", "JPEG"
        )
    data = load("imagenet", tmp_path, side=16)
    assert (data.classes, data.shape, len(data.train), len(data.test)) == (2, (3, 16, 16), 2, 1)
    images, labels = data.train.batch([1, 0], np.random.default_rng(0))
    assert (images.shape, labels.tolist()) == ((2, 3, 16, 16), [1, 0])
    assert images[0, 2].mean() > 2
    assert images[1, 0].mean() > 2
    grey, label = data.test.batch([0], None)
    assert (grey.shape, label.tolist()) == ((1, 3, 16, 16), [1])
    (tmp_path / "val" / "n03").mkdir()
    with pytest.raises(DataError, match="n03 is no class"):
        load("imagenet", tmp_path)


def test_text_is_held_out_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    data = load("text", path, seq_len=9)
    assert (data.classes, data.shape) == (256, (9,))
    assert (len(data.train), len(data.test)) == (19, 2), "180 bytes, and 20"
    inputs, targets = data.train.batch([18], None)
    assert inputs.tolist() == [list(range(162, 171))]
    assert targets.tolist() == [list(range(163, 172))]
    assert data.test.batch([0], None)[0][0, 0] == 180
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="must have 100 bytes at least, for contexts of 9, got 5"):
        load("text", path, seq_len=9)
    assert len(load("text", None).test) > 100, "the standard library's sources"


@pytest.mark.parametrize(
    "name, told",
    [
        ("fashion-mnist", "apt-get install dataset-fashion-mnist"),
        ("cifar-100", "cifar-100-binary.tar.gz"),
        ("imagenet", "ILSVRC2012_img_train.tar"),
        ("text", "No such file"),
    ],
)
def test_what_is_missing_is_told_with_how_to_get_it(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"--data-set {name}: .*{told}"):
        load(name, tmp_path / "none")


def test_a_part_is_spread_over_the_whole() -> None:
    assert train_dynasty_data.spread(10, 4).tolist() == [0, 2, 5, 7]
    assert train_dynasty_data.spread(3, 9).tolist() == train_dynasty_data.spread(3, None).tolist() == [0, 1, 2]


def test_debian_s_files_where_they_are_installed() -> None:
    if not train_dynasty_sets.DEBIAN.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    data = load("fashion-mnist", None)
    assert (len(data.train), len(data.test), data.shape) == (60_000, 10_000, (1, 28, 28))
