# SPDX-License-Identifier: Apache-2.0
"""Data sets of all kinds become the same batches, in an order that depends on the seed alone."""

import gc
import io
import re
import struct
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from training_runs import load_script, png

from diffusers_fm.data import cache
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.order import StreamSampler, make_loader
from diffusers_fm.data.sources import choose_split, class_names, held_out_split_name, load_splits
from diffusers_fm.data.streams import StreamData
from diffusers_fm.data.transforms import ImageTransform, image_size, open_image, to_pixels
from diffusers_fm.training.metrics import UnreadableImages


DIGITS = Path(__file__).parents[2] / "data" / "digits"
GREY = ImageTransform(8, 1)


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> PIL.Image.Image:
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return PIL.Image.fromarray(pixels.squeeze(), mode=mode) if channels == 1 else PIL.Image.fromarray(pixels)


def pictures(num_rows: int = 6, **columns: list) -> datasets.Dataset:
    images = [{"bytes": png(picture(row)), "path": None} for row in range(num_rows)]
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": images}, features=features)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def keys(num_rows: int, epoch: int = 0) -> np.ndarray:
    return np.stack([np.full(num_rows, epoch), np.arange(num_rows)], axis=1)


# The digits in the repository


def test_digits_are_those_of_scikit_learn() -> None:
    splits = load_splits(str(DIGITS))
    assert {name: len(split) for name, split in splits.items()} == {"train": 1500, "test": 297}
    stored = []
    for split in splits.values():
        assert split.features["label"].names == [str(digit) for digit in range(10)]
        counts = np.bincount(split["label"], minlength=10) / len(split)
        assert np.abs(counts - 0.1).max() < 0.01
        for image, label in zip(split["image"], split["label"]):
            assert (image.mode, image.size, image.format) == ("L", (8, 8), "PNG")
            levels = np.round(np.asarray(image, dtype=np.float64) * 16 / 255)
            stored.append((*levels.ravel().tolist(), label))
    original = load_digits()
    assert sorted(stored) == sorted(zip(*original.images.reshape(1797, 64).T.tolist(), original.target.tolist()))


def test_captions_name_the_digit_in_wordings_of_each_split() -> None:
    names = "zero one two three four five six seven eight nine".split()
    wordings = {}
    for name, split in load_splits(str(DIGITS)).items():
        wordings[name] = set()
        for label, captions in zip(split["label"], split["text"]):
            assert len(captions) == len(set(captions)) == 8
            for caption in captions:
                words = re.findall(r"\w+", caption)
                said = [word for word in words if word in names or word.isdigit()]
                assert said in ([names[label]], [str(label)])
                wordings[name].add(caption.replace(said[0], "{}").replace("an {}", "a {}"))
    assert [len(found) for found in wordings.values()] == [160, 8]
    assert not wordings["train"] & wordings["test"]


def test_restyled_digits(tmp_path: Path) -> None:
    load_script(DIGITS / "make_digits.py").main(tmp_path / "inverted", "inverted")
    original, inverted = load_splits(str(DIGITS)), load_splits(str(tmp_path / "inverted"), cache_dir=str(tmp_path))
    for name, split in original.items():
        assert split["text"][:] == inverted[name]["text"][:]
        for one, other in zip(split["image"], inverted[name]["image"]):
            levels = [np.round(np.asarray(image, dtype=np.float64) * 16 / 255) for image in (one, other)]
            assert np.array_equal(levels[0] + levels[1], np.full((8, 8), 16))


# Where data comes from


def test_folders_with_a_card_are_read_as_they_are_now(tmp_path: Path) -> None:
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train*\n"
    folders = (tmp_path / "one" / "data", tmp_path / "other" / "data", tmp_path / "one" / "data")
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(f"---\n{card}---\n")
        datasets.Dataset.from_dict({"number": [number]}).to_parquet(folder / "train.parquet")
        assert load_splits(str(folder), cache_dir=str(tmp_path / "cache"))["train"]["number"][:] == [number]


def test_every_kind_of_data_set_gives_the_same_batches(tmp_path: Path) -> None:
    dataset = (
        pictures()
        .add_column("label", [0, 1, 0, 1, 0, 1])
        .cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    )
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    dataset.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "disk_splits"))
    for row in range(6):
        folder = tmp_path / "folder" / ("cat", "dog")[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(row).save(folder / f"{row}.png")
    sources = [
        {"dataset_name": str(tmp_path / "parquet")},
        {"dataset_name": str(tmp_path / "disk")},
        {"dataset_name": str(tmp_path / "disk_splits")},
        {"train_data_dir": str(tmp_path / "folder")},
        {"dataset_name": str(tmp_path / "folder")},
    ]
    batches = []
    for source in sources:
        split = choose_split(load_splits(**source, cache_dir=str(tmp_path / "cache")), "train")
        assert class_names(split, "label") == {0: "cat", 1: "dog"}
        data = ImageData(split, ImageTransform(8, 3), label_column="label", num_classes=2)
        batch = data[keys(6)]
        # Folders are read class by class.
        order = np.lexsort(batch["images"].flatten(1).numpy().T)
        batches.append({name: values[order] for name, values in batch.items()})
    for batch in batches[1:]:
        assert torch.equal(batch["images"], batches[0]["images"])
        assert torch.equal(batch["labels"], batches[0]["labels"])


@pytest.mark.parametrize("kind", ["bytes", "struct", "path", "undecoded"])
def test_columns_that_are_nearly_images(kind: str, tmp_path: Path) -> None:
    files = [png(picture(row)) for row in range(3)]
    for row, file in enumerate(files):
        (tmp_path / f"{row}.png").write_bytes(file)
    if kind == "bytes":
        dataset = datasets.Dataset.from_dict({"image": files})
    elif kind == "struct":
        dataset = datasets.Dataset.from_dict({"image": [{"bytes": file, "path": None} for file in files]})
    elif kind == "path":
        dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / f"{row}.png") for row in range(3)]})
    else:
        dataset = pictures(3).cast_column("image", datasets.Image(decode=False))
    expected = ImageData(pictures(3), ImageTransform(8, 3))[keys(3)]["images"]
    assert torch.equal(ImageData(dataset, ImageTransform(8, 3))[keys(3)]["images"], expected)


def test_held_out_split_is_found() -> None:
    one = pictures(1)
    assert held_out_split_name(datasets.DatasetDict(train=one), "train") is None
    assert held_out_split_name(datasets.DatasetDict(train=one, test=one), "train") == "test"
    assert held_out_split_name(datasets.DatasetDict(train=one, test=one, validation=one), "train") == "validation"
    assert held_out_split_name(datasets.DatasetDict(train=one, test=one), "test") is None


# What becomes of an image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_become_grey_or_rgb(mode: str, channels: int) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    if mode == "I;16":
        image = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
        assert image.mode == "I;16"
    else:
        image = PIL.Image.fromarray(grey).convert(mode)
    pixels = to_pixels(image, (8, 8), channels)
    assert pixels.shape == (channels, 8, 8)
    assert pixels.dtype == np.uint8
    # One bit says only black or white, and a palette and four inks round.
    if mode != "1":
        assert np.abs(pixels.astype(int) - grey.astype(int)).max() <= (2 if mode in ("P", "CMYK") else 0)


def test_the_shorter_side_is_resized_without_aliasing() -> None:
    # A checkerboard of single pixels is grey from afar.
    board = PIL.Image.fromarray((np.indices((64, 128)).sum(0) % 2 * 255).astype(np.uint8))
    pixels = to_pixels(board, (16, 16), 1)
    assert pixels.shape == (1, 16, 32)
    assert np.abs(pixels[0, 2:-2, 2:-2].astype(int) - 127).max() <= 2
    assert to_pixels(board.resize((3, 9)), (16, 16), 1).shape == (1, 48, 16)
    assert np.array_equal(to_pixels(picture(0, mode="L"), (8, 8), 1)[0], np.asarray(picture(0, mode="L")))


def test_center_crop_and_random_crop() -> None:
    wide = picture(0, (20, 8), "L")
    dataset = datasets.Dataset.from_dict({"image": [png(wide)] * 50})
    pixels = torch.from_numpy(np.asarray(wide).copy())[None]
    centre = ImageData(dataset, ImageTransform(8, 1, center_crop=True))[keys(50)]["images"]
    assert torch.equal(centre, pixels[:, :, 6:14].expand(50, 1, 8, 8))
    crops = ImageData(dataset, GREY)[keys(50)]["images"]
    places = [x for crop in crops for x in range(13) if torch.equal(crop, pixels[:, :, x : x + 8])]
    # All are crops; of 13 places 50 draws miss one with probability 0.018, and three hardly ever.
    assert len(places) == 50
    assert len(set(places)) > 10


def test_random_flip_mirrors_half_of_the_visits() -> None:
    data = ImageData(pictures(64), ImageTransform(8, 3, random_flip=True))
    plain = ImageData(pictures(64), ImageTransform(8, 3))[keys(64)]["images"]
    flips = []
    for epoch in range(4):
        images = data[keys(64, epoch)]["images"]
        flipped = (images != plain).flatten(1).any(1)
        assert torch.equal(torch.where(flipped[:, None, None, None], plain.flip(-1), plain), images)
        flips.append(flipped)
    counts = torch.stack(flips).float()
    # 256 tosses of a coin: four standard deviations are 0.125.
    assert abs(counts.mean().item() - 0.5) < 0.125
    assert not torch.equal(flips[0], flips[1])


@pytest.mark.parametrize("size", [(8, 8), (13, 9)], ids=str)
def test_memory_and_disk_give_the_same_batches(size: tuple[int, int]) -> None:
    dataset = datasets.Dataset.from_dict({"image": [png(picture(row, size)) for row in range(10)]})
    transform = ImageTransform(8, 3, random_flip=True)
    kept = ImageData(dataset, transform, seed=3)
    decoded = ImageData(dataset, transform, seed=3, memory_budget=100)
    assert kept.in_memory
    assert not decoded.in_memory
    for epoch in range(3):
        assert torch.equal(kept[keys(10, epoch)]["images"], decoded[keys(10, epoch)]["images"])


def test_a_budget_that_only_squares_would_meet_is_kept() -> None:
    dataset = datasets.Dataset.from_dict({"image": [png(picture(row, (80, 8))) for row in range(10)]})
    assert not ImageData(dataset, ImageTransform(8, 3), memory_budget=10 * 8 * 8 * 3).in_memory


def test_max_samples_are_drawn_from_everywhere() -> None:
    dataset = pictures(40, label=list(range(40)))
    labels = ImageData(dataset, ImageTransform(8, 3), "image", "label", 40, seed=0, max_samples=10)[keys(10)]["labels"]
    assert len(set(labels.tolist())) == 10
    assert max(labels.tolist()) > 20
    other = ImageData(dataset, ImageTransform(8, 3), "image", "label", 40, seed=1, max_samples=10)[keys(10)]["labels"]
    assert not torch.equal(labels, other)
    assert len(ImageData(dataset, ImageTransform(8, 3), max_samples=100)) == 40


# Transparency, EXIF and odd shapes


def cut_out(mode: str) -> bytes:
    """A grey square of level 100, opaque on the left half alone; invisible pixels are 40, or what the mode needs."""
    grey = np.full((4, 4), 100, np.uint8)
    grey[:, 2:] = 40
    alpha = PIL.Image.fromarray(np.where(grey == 100, 255, 0).astype(np.uint8))
    image = PIL.Image.fromarray(grey)
    if mode in ("LA", "RGBA", "WEBP"):
        image = image.convert("L" if mode == "LA" else "RGB")
        image.putalpha(alpha)
    elif mode == "I;16":
        return png(PIL.Image.fromarray(grey.astype(np.uint16) * 257), transparency=40 * 257)
    elif mode in ("P", "GIF"):
        image = PIL.Image.fromarray((grey == 100).astype(np.uint8), "P")
        image.putpalette([40] * 3 + [100] * 3)
        if mode == "P":
            return png(image, transparency=0)
    else:
        return png(image.convert(mode), transparency=40 if mode == "L" else (40, 40, 40))
    buffer = io.BytesIO()
    options = {"WEBP": {"lossless": True, "exact": True}, "GIF": {"transparency": 0}}.get(mode, {})
    image.save(buffer, mode if options else "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16", "GIF", "WEBP"])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 20, 200)])
def test_transparent_images_are_composed_over_one_colour(mode: str, background: tuple[int, int, int]) -> None:
    file = cut_out(mode)
    assert open_image(file).has_transparency_data
    rows = datasets.Dataset.from_dict({"image": [file]})
    for channels, expected in (
        (3, background),
        (1, PIL.Image.new("RGB", (1, 1), background).convert("L").getpixel((0, 0))),
    ):
        transform = ImageTransform(4, channels, background=background)
        images = ImageData(rows, transform)[keys(1)]["images"]
        assert (images[0, :, :, :2] == 100).all()
        assert (images[0, :, :, 2:] == torch.tensor(expected).view(-1, 1, 1)).all()
        stream = StreamData(rows.to_iterable_dataset(), transform)
        streamed = stream.transform.decode(next(iter(stream._rows))["image"], (4, 4))
        assert np.array_equal(streamed, images[0].numpy())
    half = np.full((4, 4, 4), 100, np.uint8)
    half[..., 3] = 51
    mixed = to_pixels(PIL.Image.fromarray(half), (4, 4), 3, background=background)[:, 0, 0]
    # A fifth of 100 and four fifths of the background, rounded.
    assert np.abs(mixed - (20 + 0.8 * np.array(background))).max() <= 1


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of tags, kinds, counts and values, as nobody should write it."""
    body, table, end = b"", struct.pack("<H", len(entries)), 14 + 12 * len(entries)
    for tag, kind, count, value in entries:
        table += struct.pack("<HHI", tag, kind, count)
        table += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", end + len(body))
        body += value if len(value) > 4 else b""
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + bytes(4) + body


TURNED = (274, 3, 1, struct.pack("<H", 6))


@pytest.mark.parametrize(
    ("entries", "turned"),
    [
        ([TURNED], True),
        ([TURNED, (282, 2, 3, b"72\0")], True),
        ([(256, 5, 1, struct.pack("<II", 72, 1)), TURNED], True),
        ([TURNED, (282, 5, 1, struct.pack("<II", 72, 0))], True),
        ([(274, 2, 2, b"6\0")], False),
        ([(274, 3, 1, struct.pack("<H", 9))], False),
        ([(274, 3, 2, struct.pack("<HH", 6, 6))], True),
        ([(274, 4, 1, struct.pack("<I", 6))], True),
        ([(34665, 4, 1, struct.pack("<I", 2**32 - 1)), TURNED], True),
    ],
    ids=["whole", "text", "rational", "zero", "orientation text", "nine", "two", "long", "far"],
)
def test_images_are_turned_by_exif_that_is_otherwise_broken(entries: list, turned: bool) -> None:
    buffer = io.BytesIO()
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 200
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=100, exif=exif(*entries))
    seen = open_image(buffer.getvalue())
    assert image_size(buffer.getvalue()) == (seen.height, seen.width) == ((16, 8) if turned else (8, 16))
    upper, lower, left = (int(np.asarray(seen)[place]) for place in ((0, 4), (-1, 4), (4, 0)))
    assert (upper > 150, lower < 100 if turned else lower > 150, left > 150) == (True, True, True)
    rows = datasets.Dataset.from_dict({"image": [buffer.getvalue()]})
    assert ImageData(rows, GREY)[keys(1)].keys() == {"images"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_turned_image(kind: str, orientation: int) -> None:
    image, exif, buffer = picture(0, (24, 8)), PIL.Image.Exif(), io.BytesIO()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    image.save(buffer, kind, exif=exif)
    seen = open_image(buffer.getvalue())
    assert image_size(buffer.getvalue()) == (seen.height, seen.width) == ((24, 8) if orientation > 4 else (8, 24))
    if kind in ("PNG", "TIFF"):
        plain = picture(0, (24, 8))
        plain.getexif()[PIL.ExifTags.Base.Orientation] = orientation
        assert np.array_equal(np.asarray(seen), np.asarray(PIL.ImageOps.exif_transpose(plain)))


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (40000, 2)], ids=str)
@pytest.mark.parametrize("multiple", [1, 4])
def test_thin_images_keep_their_middle(size: tuple[int, int], multiple: int) -> None:
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[tuple(slice(side // 2 - 6, side // 2 + 6) if side > 9 else slice(None) for side in pixels.shape)] = 255
    covering = to_pixels(PIL.Image.fromarray(pixels), (16, 32), 1, multiple)
    assert covering.shape in ((1, 16, 256), (1, 128, 32))
    assert covering[0, covering.shape[1] // 2, covering.shape[2] // 2] == 255
    # Up to the limit an image is as long as it was.
    assert to_pixels(PIL.Image.new("L", (128, 16)), (16, 16), 1).shape == (1, 16, 128)
    assert to_pixels(PIL.Image.new("L", (1024, 16)), (16, 16), 1).shape == (1, 16, 128)


# Decoded once


def folder_of_images(folder: Path, num_rows: int = 6, size: tuple[int, int] = (8, 8)) -> datasets.Dataset:
    folder.mkdir()
    for row in range(num_rows):
        picture(row, size).save(folder / f"{row}.png")
    return load_splits(train_data_dir=str(folder))["train"]


@pytest.mark.parametrize("buckets", [(), ((8, 8), (8, 16))], ids=["square", "buckets"])
@pytest.mark.parametrize("size", [(8, 8), (20, 9)], ids=str)
def test_images_are_decoded_once_for_all_processes_and_runs(
    buckets: tuple, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = folder_of_images(tmp_path / "images", size=size)
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    transform = ImageTransform(8, 3, buckets=buckets)
    options = {"folder": tmp_path / "decoded", "max_unreadable": 1, "seed": 3}
    first = ImageData(rows, transform, **options)
    alone = ImageData(rows, transform, max_unreadable=1, seed=3)
    expected = [alone[keys(6, epoch)] for epoch in range(2)]
    shards = sorted((tmp_path / "decoded").rglob("*.safetensors"))
    assert len(shards) == (2 if buckets else 1)
    with monkeypatch.context() as patch:
        for name in ("image_size", "image_file"):
            patch.setattr(f"diffusers_fm.data.transforms.{name}", None)
        patch.setattr(ImageTransform, "decode", None)
        again = ImageData(load_splits(train_data_dir=str(tmp_path / "images"))["train"], transform, **options)
        for data in (first, again):
            assert data.in_memory
            for epoch, batch in enumerate(expected):
                found = data[keys(6, epoch)]
                assert torch.equal(found["images"], batch["images"])
                assert found.get("unreadable") == batch.get("unreadable")
    assert sorted((tmp_path / "decoded").rglob("*.safetensors")) == shards
    # Another file, other settings: decoded anew.
    picture(9, size).save(tmp_path / "images" / "3.png")
    assert ImageData(rows, transform, **{**options, "max_unreadable": 0}).unreadable == {}
    grey = ImageData(rows, replace(transform, channels=1), folder=tmp_path / "decoded")
    assert grey[keys(6)]["images"].shape[1] == 1
    more = ImageData(rows.select([5, 0]), transform, folder=tmp_path / "decoded")[keys(2)]["images"]
    assert torch.equal(more, ImageData(rows.select([5, 0]), transform)[keys(2)]["images"])
    # Of other images nothing is opened.
    opened = []
    monkeypatch.setattr(cache, "safe_open", lambda file, **how: opened.append(file) or safe_open(file, **how))
    ImageData(rows, replace(transform, channels=1), folder=tmp_path / "decoded")
    assert len(opened) == len(set(opened)) == len(shards)


def test_kept_images_are_those_of_the_files_that_rows_name_in_a_folder(tmp_path: Path) -> None:
    for name, level in (("own", 1), ("other", 9)):
        (tmp_path / name).mkdir()
        PIL.Image.new("L", (8, 8), level).save(tmp_path / name / "0.png")
    features = datasets.Features({"image": datasets.Image()})

    def levels(*folders: Path, path: str = "0.png") -> list[int]:
        rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": path}]}, features=features)
        data = ImageData(rows, replace(GREY, folders=folders), folder=tmp_path / "decoded", max_unreadable=1)
        return [] if data.unreadable else data[keys(1)]["images"].unique().tolist()

    assert levels(tmp_path / "own") == [1]
    PIL.Image.new("L", (8, 8), 200).save(tmp_path / "own" / "0.png")
    assert levels(tmp_path / "own") == [200]
    # What was out of bounds is read when its folder is named.
    other = str(tmp_path / "other" / "0.png")
    assert levels(tmp_path / "own", path=other) == []
    assert levels(tmp_path / "own", tmp_path / "other", path=other) == [9]


def test_prepared_rows_are_found_again_until_they_are_prepared_anew(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()

    def load(level: int) -> torch.Tensor:
        rows = load_splits(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))["train"]
        images = ImageData(rows, GREY, folder=tmp_path / "decoded")[keys(1)]["images"]
        assert (images == level).all()
        return images

    for level in (1, 1, 2):
        file = png(PIL.Image.new("L", (8, 8), level))
        if level == 2 or not list((tmp_path / "data").iterdir()):
            datasets.Dataset.from_dict({"image": [file]}).to_parquet(tmp_path / "data" / "train.parquet")
        load(level)
    assert len(list((tmp_path / "decoded").rglob("*.safetensors"))) == 2


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "decoded").write_text("a file")
    data = ImageData(pictures(), ImageTransform(8, 3), folder=tmp_path / "decoded")
    assert torch.equal(data[keys(6)]["images"], ImageData(pictures(), ImageTransform(8, 3))[keys(6)]["images"])
    assert "cannot be kept in" in caplog.text


def test_what_does_not_fit_is_not_decoded_again_to_find_that_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = folder_of_images(tmp_path / "images", size=(80, 8))
    options = {"memory_budget": 6 * 8 * 8 * 3, "folder": tmp_path / "decoded"}
    assert not ImageData(rows, ImageTransform(8, 3), **options).in_memory
    monkeypatch.setattr(ImageTransform, "decode", None)
    assert not ImageData(rows, ImageTransform(8, 3), **options).in_memory


# The stream


@pytest.mark.parametrize(("processes", "accumulation", "batch_size"), [(1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2)])
def test_the_stream_does_not_depend_on_who_reads_it(processes: int, accumulation: int, batch_size: int) -> None:
    def steps(rank: int) -> list[np.ndarray]:
        sampler = StreamSampler(21, 5, batch_size, accumulation, processes, rank, num_steps=6)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 6 * accumulation
        return batches

    whole = np.concatenate(list(StreamSampler(21, 5, 8, num_steps=6)))
    by_rank = [steps(rank) for rank in range(processes)]
    in_order = [by_rank[rank][i] for i in range(6 * accumulation) for rank in range(processes)]
    assert np.array_equal(np.concatenate(in_order), whole)
    # 48 samples are two epochs of 21 and the beginning of a third: nothing is dropped, nothing is repeated.
    for epoch in (0, 1):
        assert sorted(whole[whole[:, 0] == epoch, 1].tolist()) == list(range(21))
    assert (whole[:, 0] == 2).sum() == 6


def test_the_stream_can_begin_anywhere() -> None:
    whole = list(StreamSampler(21, 5, 8, num_steps=10))
    for start in (1, 4, 9):
        rest = list(StreamSampler(21, 5, 8, samples_seen=8 * start, num_steps=10 - start))
        assert all(np.array_equal(a, b) for a, b in zip(rest, whole[start:]))
        assert len(rest) == 10 - start


def test_workers_do_not_matter() -> None:
    data = ImageData(pictures(12), ImageTransform(8, 3, random_flip=True), memory_budget=0)
    sampler = StreamSampler(12, 0, 5, num_steps=6)
    alone, with_workers = (list(make_loader(data, sampler, workers)) for workers in (0, 2))
    assert len(alone) == 6
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(alone, with_workers))


# Bad input


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No data set can be read from"):
        load_splits(str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"No data set can be read from 'runs/nothing': Couldn't reach"):
            load_splits("runs/nothing")
    with pytest.raises(ValueError, match="got neither"):
        load_splits()
    with pytest.raises(ValueError, match="got both"):
        load_splits("a", train_data_dir="b")
    with pytest.raises(ValueError, match=r"no split 'valid'; its splits are \['train'\]"):
        choose_split(datasets.DatasetDict(train=pictures(1)), "valid")


def test_bad_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no image column 'img'; the columns are \['image', 'label'\]"):
        ImageData(pictures(2, label=[0, 1]), GREY, image_column="img")
    with pytest.raises(ValueError, match="'label' holds"):
        ImageData(pictures(2, label=[0, 1]), GREY, image_column="label")
    with pytest.raises(ValueError, match="has 3 classes, but there is no label column 'label'"):
        ImageData(pictures(2), GREY, label_column="label", num_classes=3)
    with pytest.raises(ValueError, match="must hold ClassLabel or integers"):
        ImageData(pictures(2, label=["a", "b"]), GREY, label_column="label", num_classes=3)
    with pytest.raises(ValueError, match="The label 3 of row 1 is out of range: the model's classes are 0 to 2"):
        ImageData(pictures(2, label=[0, 3]), GREY, label_column="label", num_classes=3)
    with pytest.raises(ValueError, match="Row 1 has no label"):
        ImageData(pictures(2, label=[0, None]), GREY, label_column="label", num_classes=3)
    with pytest.raises(ValueError, match="Row 0 has no label"):
        ImageData(pictures(2, label=[-1, 0]), GREY, label_column="label", num_classes=3)


def test_empty_data_and_unreadable_images_are_named() -> None:
    with pytest.raises(ValueError, match="The data set is empty"):
        ImageData(pictures(3).select([]), GREY)
    files = [png(picture(0)), b"no picture", png(picture(2))]
    with pytest.raises(ValueError, match="The image in row 1 of the data set cannot be read"):
        ImageData(datasets.Dataset.from_dict({"image": files}), GREY)
    files[1] = files[0][:60]
    with pytest.raises(ValueError, match="The image in row 1 of the data set cannot be read"):
        ImageData(datasets.Dataset.from_dict({"image": files}), GREY)
    files[1] = None
    with pytest.raises(ValueError, match="row 1 of the data set cannot be read: there is none"):
        ImageData(datasets.Dataset.from_dict({"image": files}), GREY)
    lazy = ImageData(datasets.Dataset.from_dict({"image": files}), GREY, memory_budget=0)
    batches = iter(make_loader(lazy, StreamSampler(3, 0, 3), num_workers=1))
    with pytest.raises(ValueError, match="row 1 of the data set"):
        next(batches)
    # In the cycle of the error the iterator would lose its queues first, and wait for the worker.
    gc.collect()
    del batches


@pytest.mark.parametrize("lacking", ["label", "caption"])
def test_rows_without_label_or_caption_are_replaced_up_to_the_limit(lacking: str) -> None:
    captions: list = [f"number {row}" for row in range(6)]
    labels: list = list(range(6))
    if lacking == "label":
        labels[2], labels[4] = None, -1
    else:
        captions[2], captions[4] = None, ""
        captions = [caption and [caption] for caption in captions]
        captions[4] = []
    dataset = pictures(6, label=labels, text=captions)
    columns = {"label_column": "label", "num_classes": 6, "caption_column": "text"}
    data = ImageData(dataset, ImageTransform(8, 3), max_unreadable=2, **columns)
    batch = data[keys(6)]
    assert sorted(batch["unreadable"]) == [2, 4]
    assert not {2, 4} & set(batch["labels"].tolist())
    assert batch["captions"] == [f"number {label}" for label in batch["labels"].tolist()]
    assert data.captions is not None
    expected = [f"number {row}" for row in range(6) if lacking == "label" or row not in (2, 4)]
    assert list(data.captions.distinct()) == expected
    with pytest.raises(ValueError, match=f"has no {lacking}"):
        ImageData(dataset, ImageTransform(8, 3), max_unreadable=1, **columns)[keys(6)]


def test_a_size_of_which_nothing_can_be_read_is_left_out() -> None:
    files = [png(picture(0, (8, 8))), png(picture(1, (16, 8))), b"no image"]
    # The head of the file says another size; the pixels are missing.
    files += [png(picture(2, (8, 16)))[:70]]
    transform = ImageTransform(8, 3, buckets=((16, 8), (8, 8), (8, 16)))
    for memory_budget in (0, 2**20):
        data = ImageData(
            datasets.Dataset.from_dict({"image": files}), transform, max_unreadable=2, memory_budget=memory_budget
        )
        assert data.size(3) == (16, 8)
        batch = data[np.array([[0, 3], [1, 3]])]
        assert batch["images"].shape in ((2, 3, 8, 8), (2, 3, 8, 16))
        assert 3 in batch["unreadable"]
    with pytest.raises(ValueError, match="None of the 1 images can be read"):
        ImageData(datasets.Dataset.from_dict({"image": files[2:3]}), transform, max_unreadable=2)[keys(1)]


def test_images_without_a_range_and_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="mode 'F' have no fixed range"):
        to_pixels(PIL.Image.new("F", (8, 8)), (8, 8), 1)
    with pytest.raises(ValueError, match="1 or 3 channels, but the model takes 4"):
        ImageTransform(8, 4)


@pytest.mark.parametrize("memory_budget", [0, 2**20], ids=["on the way", "in memory"])
def test_unreadable_images_are_replaced_by_the_same_ones(memory_budget: int) -> None:
    bad, num_rows = {3: b"no image", 7: None}, 12
    images = []
    for row in range(num_rows):
        file = bad.get(row, png(PIL.Image.new("L", (4, 4), 20 * row)))
        images.append(None if file is None else {"bytes": file, "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": images, "label": list(range(num_rows))}
    rows = datasets.Dataset.from_dict(columns, features=features)
    options = {"label_column": "label", "num_classes": num_rows, "memory_budget": memory_budget}
    keys = [np.array([[epoch, row] for row in range(num_rows)]) for epoch in range(3)]

    def visit(data: ImageData, epochs: list[int]) -> tuple[dict[int, list[int]], set[int]]:
        seen, told = {}, set()
        for epoch in epochs:
            batch = data[keys[epoch]]
            # Each image comes with its own label.
            assert (batch["images"].flatten(1)[:, 0] == 20 * batch["labels"]).all()
            seen[epoch] = batch["labels"].tolist()
            told |= set(batch.get("unreadable", {}))
        return seen, told

    transform = ImageTransform(4, 1)
    seen, told = visit(ImageData(rows, transform, max_unreadable=2, **options), [0, 1, 2])
    assert told == set(bad)
    for labels in seen.values():
        assert [label for row, label in enumerate(labels) if row not in bad] == [
            row for row in range(num_rows) if row not in bad
        ]
        assert not set(labels) & set(bad)
    # What was known before does not matter.
    later, _ = visit(ImageData(rows, transform, max_unreadable=2, **options), [2, 0])
    assert later == {epoch: seen[epoch] for epoch in (2, 0)}
    with pytest.raises(ValueError, match="The image in row 7 of the data set cannot be read: there is none"):
        visit(ImageData(rows, transform, max_unreadable=1, **options), [0])


def test_unreadable_images_are_told_once_and_limited(caplog: pytest.LogCaptureFixture) -> None:
    batches = [{"unreadable": {5: "broken"}}, {"unreadable": {5: "broken"}}, {}, {"unreadable": {9: "empty"}}]
    assert list(UnreadableImages(2).watch(iter([dict(batch) for batch in batches]))) == [{}] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "The image in row 5 cannot be read (broken); another takes its place.",
        "The image in row 9 cannot be read (empty); another takes its place.",
    ]
    with pytest.raises(ValueError, match=r"2 images cannot be read, and --max_unreadable_images is 1\. .* are 5, 9\."):
        list(UnreadableImages(1, rows=[5]).watch(iter(batches)))
