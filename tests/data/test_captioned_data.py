# SPDX-License-Identifier: Apache-2.0
"""Captions from every kind of data set, and batches of one size each in which no image is forgotten."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import png

from diffusers_fm.data.buckets import assign_buckets, make_buckets, parse_buckets
from diffusers_fm.data.images import CaptionColumn, ImageData, drop_captions
from diffusers_fm.data.order import BucketSampler
from diffusers_fm.data.sources import load_splits
from diffusers_fm.data.transforms import ImageTransform


def picture(width: int, height: int, value: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))


def captioned(captions: list, sizes: list[tuple[int, int]] | None = None) -> datasets.Dataset:
    images = [
        {"bytes": png(picture(*size, value=row)), "path": None}
        for row, size in enumerate(sizes or [(8, 8)] * len(captions))
    ]
    return datasets.Dataset.from_dict({"image": images, "text": captions}).cast_column("image", datasets.Image())


# Captions


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "webdataset", "webdataset json"])
def test_captions_of_every_kind_of_data_set(tmp_path: Path, kind: str) -> None:
    captions = [f"picture number {row}" for row in range(3)]
    columns = ("image", "text")
    if kind == "imagefolder":
        for row in range(3):
            picture(8, 8, row).save(tmp_path / f"{row}.png")
        lines = [json.dumps({"file_name": f"{row}.png", "text": text}) for row, text in enumerate(captions)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        splits = load_splits(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    elif kind == "parquet":
        captioned(captions).to_parquet(tmp_path / "train.parquet")
        splits = load_splits(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    else:
        as_json = kind.endswith("json")
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            for row, text in enumerate(captions):
                other = {"json": json.dumps({"caption": text}).encode()} if as_json else {"txt": text.encode()}
                for ending, content in {"png": png(picture(8, 8, row)), **other}.items():
                    info = tarfile.TarInfo(f"{row}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        columns = ("png", "json.caption" if as_json else "txt")
        splits = load_splits(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    data = ImageData(splits["train"], ImageTransform(8, 3), columns[0], caption_column=columns[1])
    batch = data[np.array([[0, 2], [0, 0]])]
    assert batch["captions"] == ["picture number 2", "picture number 0"]
    assert batch["images"][:, 0, 0, 0].tolist() == [2, 0]


def test_one_of_several_captions_for_each_visit_by_seed_epoch_and_row() -> None:
    lists = captioned([["a", "b", "c"], ["d"], ["e", "f"]])
    column = CaptionColumn(lists, "text", np.arange(3), seed=0)
    keys = np.array([[epoch, row] for epoch in range(600) for row in range(3)])
    drawn = column.draw(keys)
    # Alone, in any batch and in any process, a visit has the same caption.
    assert [column.draw(keys[i : i + 1])[0] for i in range(12)] == drawn[:12]
    assert CaptionColumn(lists, "text", np.arange(3), seed=1).draw(keys) != drawn
    counts = Counter(drawn)
    # 600 draws of three: 200 +- 5 standard deviations of 11.5; of two: 300 +- 5 * 12.2.
    assert all(abs(counts[caption] - 200) < 58 for caption in "abc")
    assert counts["d"] == 600
    assert all(abs(counts[caption] - 300) < 62 for caption in "ef")
    assert list(column.distinct()) == ["a", "b", "c", "d", "e", "f"]
    assert list(CaptionColumn(lists, "text", np.array([2, 1])).distinct()) == ["e", "f", "d"]


def test_dropped_captions_are_empty() -> None:
    assert drop_captions(["a", "b", "c"], torch.tensor([False, True, False])) == ["a", "", "c"]


def test_captions_that_are_missing_are_named() -> None:
    dataset = captioned(["a", None, "c"])
    with pytest.raises(ValueError, match=r"no caption column 'caption'; the columns are \['image', 'text'\]"):
        CaptionColumn(dataset, "caption", np.arange(3))
    with pytest.raises(ValueError, match=r"must hold strings or lists of strings, got Image"):
        CaptionColumn(dataset, "image", np.arange(3))
    with pytest.raises(ValueError, match=r"Row 1 has no caption: the column holds None there"):
        CaptionColumn(dataset, "text", np.arange(3)).draw(np.array([[0, 0], [0, 1]]))
    with pytest.raises(ValueError, match=r"Row 1 has no caption: the column holds \[\] there"):
        list(CaptionColumn(captioned([["a"], []]), "text", np.array([1])).distinct())


# Sizes


def test_buckets_have_about_the_area_of_the_square() -> None:
    buckets = make_buckets(1024, 64)
    assert (1024, 1024) in buckets
    assert len(buckets) == len(set(buckets))
    for height, width in buckets:
        assert height % 64 == width % 64 == 0
        assert (width, height) in buckets
        assert max(height, width) <= 2 * min(height, width)
        # At most one multiple short of the area, along the longer side.
        assert 0.93 * 1024**2 < height * width <= 1024**2
    assert make_buckets(8, 8) == [(8, 8)]
    with pytest.raises(ValueError, match="must be a multiple of 64 for buckets, got 1000"):
        make_buckets(1000, 64)
    with pytest.raises(ValueError, match="at least 1, got 0.5"):
        make_buckets(512, 64, 0.5)


def test_images_go_to_the_nearest_aspect_ratio() -> None:
    buckets = [(8, 8), (16, 8), (8, 16), (4, 4)]
    sizes = np.array([(100, 100), (200, 100), (100, 170), (100, 130), (5, 5)])
    assert assign_buckets(sizes, buckets).tolist() == [0, 1, 2, 0, 3]
    assert parse_buckets("16,8;8,16") == [(16, 8), (8, 16)]
    for text in ("", "16", "16,8;", "16x8", "0,8", "8,8,8"):
        with pytest.raises(ValueError, match="Buckets must read like"):
            parse_buckets(text)


def test_images_are_resized_to_cover_their_bucket_and_cropped() -> None:
    # Two columns left and right of a middle in another colour: the crop at the centre takes the middle.
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 4:20] = 200
    rows = [
        {"bytes": png(PIL.Image.fromarray(wide)), "path": None},
        {"bytes": png(picture(30, 62, 7)), "path": None},
    ]
    dataset = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    transform = ImageTransform(8, 3, center_crop=True, buckets=((16, 8), (8, 8), (8, 16)))
    for budget in (0, 2**20):
        data = ImageData(dataset, transform, memory_budget=budget)
        assert data.size(0) == (8, 16)
        assert data[np.array([[0, 0]])]["images"].shape == (1, 3, 8, 16)
        assert (data[np.array([[0, 0]])]["images"] == 200).all()
        assert data[np.array([[0, 1]])]["images"].shape == (1, 3, 16, 8)
        assert data.bucket_rows is not None
        assert [rows.tolist() for rows in data.bucket_rows] == [[1], [], [0]]


def test_photographs_that_lie_on_their_side_have_the_size_they_are_seen_in() -> None:
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    rows = [{"bytes": png(picture(32, 16), exif=exif), "path": None}]
    dataset = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    data = ImageData(dataset, ImageTransform(8, 3, buckets=((16, 8), (8, 16))))
    assert data.size(0) == (16, 8)
    assert data[np.array([[0, 0]])]["images"].shape == (1, 3, 16, 8)


# Streams of batches of one size each

ROWS = [np.arange(0, 13), np.arange(13, 14), np.arange(14, 14), np.arange(14, 34), np.arange(34, 37)]
BUCKET_OF = np.concatenate([np.full(len(rows), bucket) for bucket, rows in enumerate(ROWS)])


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (1, 2), (3, 1), (2, 2)])
def test_batches_hold_one_size_and_each_image_comes_once_an_epoch(accumulation: int, processes: int) -> None:
    num_steps = 240 // accumulation // processes
    ranks = [
        list(BucketSampler(ROWS, 7, 4, accumulation, processes, rank, num_steps=num_steps))
        for rank in range(processes)
    ]
    batches = [batch for step in zip(*ranks) for batch in step]
    assert len(batches) == 240
    for keys in batches:
        assert len(np.unique(BUCKET_OF[keys[:, 1]])) == 1
        assert len(keys) == 4
    visits = Counter(map(tuple, np.concatenate(batches).tolist()))
    assert set(visits.values()) == {1}
    # 960 samples are 25 epochs of 37 images and a bit; up to there every row has its visit in every epoch.
    for row in range(37):
        assert all((epoch, row) in visits for epoch in range(24))
    # One process sees what several together see.
    alone = list(BucketSampler(ROWS, 7, 4, num_steps=240))
    assert all(np.array_equal(one, other) for one, other in zip(alone, batches))
    assert not all(np.array_equal(one, other) for one, other in zip(alone, BucketSampler(ROWS, 8, 4, num_steps=240)))


def test_a_full_epoch_has_each_image_exactly_once_where_batches_divide_the_buckets() -> None:
    rows = [np.arange(0, 8), np.arange(8, 20)]
    batches = list(BucketSampler(rows, 0, 4, num_steps=10))
    for epoch in range(2):
        seen = np.concatenate(batches[5 * epoch : 5 * epoch + 5])
        assert sorted(seen[:, 1].tolist()) == list(range(20))
        assert set(seen[:, 0].tolist()) == {epoch}
    assert not np.array_equal(batches[0][:, 1], batches[5][:, 1])


@pytest.mark.parametrize("start", [0, 1, 9, 10, 31, 1000])
def test_a_stream_of_buckets_can_begin_anywhere(start: int) -> None:
    whole = list(BucketSampler(ROWS, 3, 4, 2, num_steps=start + 3))
    rest = list(BucketSampler(ROWS, 3, 4, 2, samples_seen=8 * start, num_steps=3))
    assert len(rest) == 6
    assert all(np.array_equal(one, other) for one, other in zip(whole[2 * start :], rest))
