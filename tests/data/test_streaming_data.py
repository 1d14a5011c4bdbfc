# SPDX-License-Identifier: Apache-2.0
"""Streams: every row once an epoch whoever reads it, and after an interruption exactly where training was in them."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import PIL.Image
import pytest
import torch
from fake_hub import File, fake_hub
from processes import check_processes
from tiny_text_to_image import tiny_stable_diffusion_3
from training_runs import (
    SCRIPT,
    assert_same_weights,
    command_line,
    load,
    load_script,
    make_dataset,
    png,
    read_log,
    run_script,
    save_untrained,
    train,
)

from diffusers_fm.data import streams
from diffusers_fm.data.buckets import assign_buckets
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.order import make_loader
from diffusers_fm.data.sources import first_rows, load_splits, stream_splits
from diffusers_fm.data.streams import StreamBatches, StreamData, StreamedRow, StreamPosition
from diffusers_fm.data.transforms import ImageTransform


NUM_ROWS = 30
KINDS = ("parquet", "webdataset", "classes", "captions", "disk")
GREY = ImageTransform(8, 1)
FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.Value("int64"), "text": datasets.Value("string")}
)


def save(folder: Path, kind: str, num_shards: int = 3, num_rows: int = NUM_ROWS) -> dict[str, Any]:
    """Grey squares, as bright as the row's number, labelled and captioned by it; returns how to load and read them."""
    folder.mkdir(parents=True)
    files = [png(PIL.Image.new("L", (8, 8), row)) for row in range(num_rows)]
    images = [{"bytes": file, "path": None} for file in files]
    columns = {"image": images, "label": [row % 2 for row in range(num_rows)], "text": list(map(str, range(num_rows)))}
    rows = datasets.Dataset.from_dict(columns, features=FEATURES)
    shards = [rows.shard(num_shards, shard) for shard in range(num_shards)]
    if kind == "parquet":
        for number, shard in enumerate(shards):
            shard.to_parquet(folder / f"train-{number:05d}-of-{num_shards:05d}.parquet")
    elif kind == "disk":
        rows.save_to_disk(str(folder))
    elif kind == "webdataset":
        for number, shard in enumerate(shards):
            with tarfile.open(folder / f"train-{number}.tar", "w") as tar:
                for row in map(int, shard["text"]):
                    meta = json.dumps({"caption": str(row)}).encode()
                    for ending, content in (("png", files[row]), ("cls", str(row % 2).encode()), ("json", meta)):
                        info = tarfile.TarInfo(f"{row:03d}.{ending}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        names = {"image_column": "png", "label_column": "cls", "caption_column": "json.caption"}
        return {"dataset_name": str(folder), "columns": names}
    else:
        for row, file in enumerate(files):
            place = folder / ("ab"[row % 2] if kind == "classes" else "")
            place.mkdir(exist_ok=True)
            (place / f"{row}.png").write_bytes(file)
        if kind == "captions":
            lines = [json.dumps({"file_name": f"{row}.png", "text": str(row)}) for row in range(num_rows)]
            (folder / "metadata.jsonl").write_text("\n".join(lines))
        names = {"label_column": "label"} if kind == "classes" else {"caption_column": "text"}
        return {"train_data_dir": str(folder), "columns": names}
    return {"dataset_name": str(folder), "columns": {"label_column": "label", "caption_column": "text"}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sources")
    return {kind: save(folder / kind, kind) for kind in KINDS}


def stream(source: dict[str, Any], transform: ImageTransform = GREY, **options: Any) -> StreamData:
    place = {name: value for name, value in source.items() if name != "columns"}
    split = stream_splits(**place)["train"]
    return StreamData(split, transform, **{"num_classes": 2, "buffer_size": 8, **source["columns"], **options})


def read(
    data: StreamData,
    num_batches: int,
    batch_size: int = 3,
    num_processes: int = 1,
    num_workers: int = 0,
    saved: dict[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Batches of all processes in the order of the steps, and where they leave the stream, as a checkpoint has it."""
    by_process, known = [], {} if saved is None else saved["readers"]
    positions: dict[str, Any] = {"readers": dict(known)}
    for process in range(num_processes):
        position = StreamPosition(data, batch_size, num_processes, num_workers, saved)
        loader = make_loader(StreamBatches(position, num_batches, process), num_workers=num_workers)
        by_process.append(list(position.watch(iter(loader))))
        left = json.loads(json.dumps(position.gather(num_processes=1)))
        own = {reader: place for reader, place in left["readers"].items() if known.get(reader) != place}
        positions = {**left, "readers": {**positions["readers"], **own}}
    return [batch for batches in zip(*by_process) for batch in batches], positions


def rows_of(batches: list[dict[str, Any]]) -> list[int]:
    return [row for batch in batches for row in batch["images"][:, 0, 0, 0].tolist()]


def assert_same_batches(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others):
        assert one.keys() == other.keys()
        assert torch.equal(one["images"], other["images"])
        assert one.get("captions") == other.get("captions")


# Every kind of data set


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_the_rows_of_the_data_set(kind: str, sources: dict, tmp_path: Path) -> None:
    source = sources[kind]
    data = stream(source)
    batches, _ = read(data, NUM_ROWS // 3)
    place = {name: value for name, value in source.items() if name != "columns"}
    whole = ImageData(load_splits(**place, cache_dir=str(tmp_path))["train"], GREY, num_classes=2, **source["columns"])
    expected = whole[np.stack([np.zeros(NUM_ROWS, int), np.arange(NUM_ROWS)], axis=1)]
    order = rows_of(batches)
    assert sorted(order) == list(range(NUM_ROWS))
    # Not the order of the files.
    assert order != rows_of([expected])
    back = {row: place for place, row in enumerate(rows_of([expected]))}
    places = [back[row] for row in order]
    for name in expected:
        found = [value for batch in batches for value in batch[name]]
        for value, place in zip(found, places, strict=True):
            assert np.array_equal(value, expected[name][place]), name
    assert "streamed from" in data.description


def test_crops_and_mirrorings_depend_on_the_visit_alone(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 8, 12), dtype=np.uint8)
    images = [{"bytes": png(PIL.Image.fromarray(image)), "path": None} for image in pixels]
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": images}, features=features)
    transform = ImageTransform(8, 1, random_flip=True)
    by_readers = []
    for readers in (1, 4):
        data = StreamData(rows.to_iterable_dataset(num_shards=4), transform, seed=5, buffer_size=8)
        batches, _ = read(data, 3 * NUM_ROWS // readers, 1, readers)
        found: dict[bytes, int] = Counter(image.numpy().tobytes() for batch in batches for image in batch["images"])
        by_readers.append(found)
    # The epochs are not over at the same time for all; but a visit looks alike whoever makes it.
    assert sum((by_readers[0] & by_readers[1]).values()) > 2.5 * NUM_ROWS
    # Five places and two sides: three visits of a row are seldom alike.
    assert len(by_readers[0]) > 2 * NUM_ROWS


@pytest.mark.parametrize("kind", ["bytes", "struct", "path", "json"])
def test_columns_that_are_nearly_images(kind: str, tmp_path: Path) -> None:
    files = [png(PIL.Image.new("L", (8, 8), row)) for row in range(4)]
    for row, file in enumerate(files):
        (tmp_path / f"{row}.png").write_bytes(file)
    paths = [str(tmp_path / f"{row}.png") for row in range(4)]
    values: dict[str, list] = {
        "bytes": files,
        "struct": [{"bytes": file, "path": None} for file in files],
        "path": paths,
    }
    if kind == "json":
        # Such files do not say beforehand what they hold.
        (tmp_path / "data").mkdir()
        lines = [json.dumps({"image": path}) for path in paths]
        (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
        split = stream_splits(str(tmp_path / "data"))["train"]
    else:
        split = datasets.Dataset.from_dict({"image": values[kind]}).to_iterable_dataset()
    assert sorted(rows_of(read(StreamData(split, GREY), 2, 2)[0])) == [0, 1, 2, 3]


def test_held_out_rows_of_a_stream_are_fetched(tmp_path: Path) -> None:
    paths = []
    for row in range(3):
        paths.append(f"memory://held-out/{row}.png")
        with fsspec.open(paths[-1], "wb") as file:
            file.write(png(PIL.Image.new("L", (8, 8), row)))
    (tmp_path / "3.png").write_bytes(png(PIL.Image.new("L", (8, 8), 3)))
    paths += [str(tmp_path / "3.png"), "memory://held-out/gone.png"]
    images = [*({"bytes": None, "path": path} for path in paths), None]
    features = datasets.Features({"image": datasets.Image()})
    split = datasets.Dataset.from_dict({"image": images}, features=features).to_iterable_dataset()
    rows = first_rows(split, "image", 10)
    assert len(rows) == 6
    batch = ImageData(rows, ImageTransform(8, 1), max_unreadable=2)[np.array([[0, row] for row in range(4)])]
    assert rows_of([batch]) == [0, 1, 2, 3]
    assert sorted(batch["unreadable"]) == [4, 5]
    assert len(first_rows(split, "image", 2)) == 2


# Whoever reads


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (1, 2), (4, 0)])
@pytest.mark.parametrize("kind", ["parquet", "captions"])
def test_every_row_once_an_epoch(kind: str, num_processes: int, num_workers: int, sources: dict) -> None:
    # Three shards, and one; more readers than shards, too.
    data = stream(sources[kind], seed=1)
    position = StreamPosition(data, 1, num_processes, num_workers)
    by_epoch: dict[int, list[int]] = {}
    for process in range(num_processes):
        num_batches = 4 * NUM_ROWS // num_processes
        batches = StreamBatches(position, num_batches, process)
        for batch in make_loader(batches, num_workers=num_workers):
            by_epoch.setdefault(batch["position"]["epoch"], []).extend(rows_of([batch]))
    for epoch in range(2):
        assert sorted(by_epoch[epoch]) == list(range(NUM_ROWS)), epoch
    assert by_epoch[0] != by_epoch[1]
    for rows in by_epoch.values():
        assert max(Counter(rows).values()) == 1


def test_another_seed_is_another_order(sources: dict) -> None:
    orders = [rows_of(read(stream(sources["parquet"], seed=seed), 10)[0]) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_rows_are_shuffled_among_those_of_the_buffer(tmp_path: Path) -> None:
    source = save(tmp_path / "data", "parquet", num_shards=1, num_rows=200)
    whole = rows_of(read(stream(source, buffer_size=400), 200, 1)[0])
    assert sorted(whole) == list(range(200))
    # A shuffled rank and the place are hardly correlated: 0.07 is a standard deviation.
    assert abs(np.corrcoef(whole, range(200))[0, 1]) < 0.3
    half = rows_of(read(stream(source, buffer_size=100), 200, 1)[0])
    assert [sorted(half[start : start + 50]) for start in (0, 50, 100, 150)] == [
        list(range(start, start + 50)) for start in (0, 50, 100, 150)
    ]
    # Each block, and each epoch, has an order of its own.
    twice = rows_of(read(stream(source, buffer_size=100), 400, 1)[0])
    assert len({tuple(row % 50 for row in twice[start : start + 50]) for start in range(0, 400, 50)}) == 8
    assert rows_of(read(stream(source, buffer_size=1), 200, 1)[0]) == list(range(200))


# After an interruption


@pytest.mark.parametrize(
    ("kind", "num_processes", "num_workers"),
    [*((kind, 1, 0) for kind in KINDS), ("parquet", 2, 1), ("webdataset", 1, 2)],
)
def test_a_stream_goes_on_where_training_was(kind: str, num_processes: int, num_workers: int, sources: dict) -> None:
    data = stream(sources[kind], ImageTransform(8, 1, random_flip=True))
    readers = {"num_processes": num_processes, "num_workers": num_workers}
    whole, end = read(data, 24, **readers)
    for stop in (1, 7, 16) if num_workers == 0 else (7,):
        first, saved = read(data, stop, **readers)
        assert_same_batches(first, whole[: stop * num_processes])
        rest, left = read(data, 24 - stop, **readers, saved=saved)
        assert_same_batches(rest, whole[stop * num_processes :])
        assert left == end


def test_the_position_is_that_of_the_batches_taken(sources: dict) -> None:
    data = stream(sources["parquet"])
    position = StreamPosition(data, 3, 1, 2)
    loader = make_loader(StreamBatches(position, 30), num_workers=2)
    taken = []
    # The workers are ahead of what is taken here.
    for batch in position.watch(iter(loader)):
        taken.append(batch)
        if len(taken) == 5:
            break
    rest, _ = read(data, 6, num_workers=2, saved=position.gather(num_processes=1))
    assert_same_batches(taken + rest, read(data, 11, num_workers=2)[0])


def test_other_workers_go_on_if_they_divide_the_readers(sources: dict) -> None:
    data = stream(sources["parquet"])
    _, saved = read(data, 7, 1, num_processes=2, num_workers=2)
    expected, _ = read(data, 18, 1, 2, 2, saved)
    for num_processes, num_workers in ((1, 0), (1, 2), (4, 0)):
        rest, _ = read(data, 36 // num_processes, 1, num_processes, num_workers, saved)
        assert_same_batches(rest, expected)
    with pytest.raises(ValueError, match=r"reads its stream with 4 readers: .* must divide that, got 3 x 0\."):
        StreamPosition(data, 1, 3, 0, saved)
    with pytest.raises(ValueError, match="had buffer_size 8 and has 9 now"):
        StreamPosition(stream(sources["parquet"], buffer_size=9), 1, 2, 2, saved)
    with pytest.raises(ValueError, match="had num_shards 3 and has 30 now"):
        StreamPosition(stream(sources["classes"]), 1, 2, 2, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_is_read_on_from_any_row(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # More rows than are read at once, and files that are no multiple of that, two to a shard.
    monkeypatch.setattr(streams, "MAX_SHARDS", 2)
    data = stream(save(tmp_path / "data", kind, num_shards=4, num_rows=90))
    rows = [(shard, *row) for shard in range(data.num_shards) for row in data.read(shard)]
    assert len(rows) == 90
    for place, (shard, number, _, state) in enumerate(rows):
        rest = data.read(shard, number, json.loads(json.dumps(state)))
        assert [row[:2] for row in rest] == [row[1:3] for row in rows[place:] if row[0] == shard]


def test_a_position_of_another_version_is_refused(sources: dict) -> None:
    data = stream(sources["parquet"])
    lanes = {"num_lanes": 1, "num_shards": 3, "buffer_size": 8, "batch_size": None, "num_batches": 2}
    for saved in ({**lanes, "lanes": {"0": [0, 0, 2, []]}}, {}):
        with pytest.raises(ValueError, match="position in its stream .* is that of another version of diffusers_fm"):
            StreamPosition(data, 3, 1, 0, saved)


# Images of several sizes

BUCKETS = ((16, 4), (8, 8), (4, 16))


def shapes(num_rows: int = NUM_ROWS, num_shards: int = 3, **damaged: bytes) -> datasets.IterableDataset:
    """Squares, upright and lying pictures at random, as bright as the row's number."""
    rng = np.random.default_rng(0)
    sizes = rng.choice([[8, 8], [5, 20], [24, 6]], num_rows, p=[0.6, 0.3, 0.1]).tolist()
    files = [png(PIL.Image.new("L", tuple(size), row)) for row, size in enumerate(sizes)]
    images = [{"bytes": damaged.get(f"row_{row}", file), "path": None} for row, file in enumerate(files)]
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": images}, features=features).to_iterable_dataset(num_shards=num_shards)


@pytest.mark.parametrize("buffer_size", [6, 40, 64])
def test_batches_of_a_stream_in_buckets_have_one_size_each(buffer_size: int) -> None:
    data = StreamData(shapes(), ImageTransform(8, 1, buckets=BUCKETS), buffer_size=buffer_size)
    batches, end = read(data, 4 * NUM_ROWS // 4, 4)
    rows = rows_of(batches)
    for epoch in range(3):
        # At the end of an epoch less than a batch waits for the next.
        seen = Counter(rows[: (epoch + 1) * NUM_ROWS])
        assert sum(abs(seen[row] - epoch - 1) for row in range(NUM_ROWS)) <= 2 * 3
    found = {tuple(batch["images"].shape[2:]) for batch in batches}
    assert found <= set(BUCKETS)
    if buffer_size >= 40:
        # In larger blocks fewer rows are brought to another size than that of their shape.
        sizes = {}
        for shard in range(3):
            for row, values, _ in data.read(shard):
                sizes[10 * shard + row] = data.image_size(StreamedRow(0, shard, row, values, {}))
        fitting = [
            BUCKETS[assign_buckets(np.array([sizes[row]]), BUCKETS)[0]] == tuple(batch["images"].shape[2:])
            for batch in batches
            for row in rows_of([batch])
        ]
        assert np.mean(fitting) > 0.6
        if buffer_size == 64:
            # A block holds an epoch: the three lying pictures are in the middle of a batch together, and of a block's
            # eight batches two at most hold what is left over.
            assert found == set(BUCKETS)
            assert np.mean(fitting) > 0.75
    for stop in (1, 5, 9, 20):
        first, saved = read(data, stop, 4)
        assert_same_batches(first, batches[:stop])
        rest, left = read(data, len(batches) - stop, 4, saved=saved)
        assert_same_batches(rest, batches[stop:])
        assert left == end
    with pytest.raises(ValueError, match="had batch_size 4 and has 5 now"):
        StreamPosition(data, 5, 1, 0, end)


def test_a_stream_in_buckets_in_several_processes() -> None:
    data = StreamData(shapes(), ImageTransform(8, 1, buckets=BUCKETS), buffer_size=8)
    whole, end = read(data, 12, 2, num_processes=2, num_workers=1)
    first, saved = read(data, 5, 2, num_processes=2, num_workers=1)
    rest, left = read(data, 7, 2, num_processes=2, num_workers=1, saved=saved)
    assert_same_batches(first + rest, whole)
    assert left == end


def test_unreadable_images_in_buckets_are_replaced_within_their_batch() -> None:
    damaged = {"row_4": b"no image", "row_17": png(PIL.Image.new("L", (24, 6), 17))[:50]}
    data = StreamData(shapes(**damaged), ImageTransform(8, 1, buckets=BUCKETS), max_unreadable=100, buffer_size=40)
    batches, _ = read(data, 14, 4)
    assert {len(batch["images"]) for batch in batches} == {4}
    assert set(rows_of(batches)) == set(range(NUM_ROWS)) - {4, 17}
    assert {name for batch in batches for name in batch.get("unreadable", ())} == {"4 of shard 0", "7 of shard 1"}


# What is wrong with rows


def test_unreadable_images_are_passed_over_and_limited() -> None:
    files: list[Any] = [png(PIL.Image.new("L", (8, 8), row)) for row in range(NUM_ROWS)]
    files[4], files[17], files[20] = b"no image", files[17][:50], None
    images = [None if file is None else {"bytes": file, "path": None} for file in files]
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": images}, features=features).to_iterable_dataset(num_shards=3)
    data = StreamData(rows, GREY, max_unreadable=3, buffer_size=8)
    whole, _ = read(data, 9)
    assert sorted(rows_of(whole)) == [row for row in range(NUM_ROWS) if row not in (4, 17, 20)]
    told = [batch["unreadable"] for batch in whole if "unreadable" in batch]
    assert sorted(name for batch in told for name in batch) == ["0 of shard 2", "4 of shard 0", "7 of shard 1"]
    for stop in range(1, 9):
        first, saved = read(data, stop)
        assert_same_batches(first + read(data, 9 - stop, saved=saved)[0], whole)
    with pytest.raises(ValueError, match=r"The image in row . of shard . of the data set cannot be read"):
        read(StreamData(rows, GREY, max_unreadable=2, buffer_size=8), 9)


def broken_images(folder: Path) -> dict[type[Exception], dict[str, Any]]:
    """Images by what their decoder raises, which is no OSError and no ValueError."""
    (folder / "no.zip").write_bytes(b"no archive")
    # A PNG that says it has 60,000 x 60,000 pixels.
    content = bytearray(png(PIL.Image.new("L", (8, 8))))
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return {
        PIL.Image.DecompressionBombError: {"bytes": bytes(content), "path": None},
        zipfile.BadZipFile: {"bytes": None, "path": f"zip://0.png::{folder / 'no.zip'}"},
    }


@pytest.mark.parametrize("error", [PIL.Image.DecompressionBombError, zipfile.BadZipFile])
@pytest.mark.parametrize("buckets", [(), ((8, 8),)], ids=["square", "buckets"])
def test_whatever_a_decoder_raises_the_row_is_passed_over(
    error: type[Exception], buckets: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    images: list[Any] = [{"bytes": png(PIL.Image.new("L", (8, 8), row)), "path": None} for row in range(6)]
    images[2] = broken_images(tmp_path)[error]
    with pytest.raises(error, match=r"\w"):
        datasets.Image().decode_example(images[2])
    rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    transform = ImageTransform(8, 1, buckets=buckets)
    for memory_budget in (0, 2**20):
        data = ImageData(rows, transform, max_unreadable=1, memory_budget=memory_budget)
        batch = data[np.array([[0, row] for row in range(6)])]
        assert set(batch["unreadable"]) == {2}
        assert [row for row in rows_of([batch]) if row in (0, 1, 3, 4, 5)] == rows_of([batch])
    stream = StreamData(rows.to_iterable_dataset(), transform, max_unreadable=1, buffer_size=12)
    batches, _ = read(stream, 2, 3)
    assert set(rows_of(batches)) <= {0, 1, 3, 4, 5}
    assert [list(batch["unreadable"]) for batch in batches if "unreadable" in batch] == [["2 of shard 0"]]
    with pytest.raises(ValueError, match="The image in row 2 of shard 0 of the data set cannot be read: .*[a-z]"):
        read(StreamData(rows.to_iterable_dataset(), transform), 2, 3)


def test_rows_without_label_or_caption_are_passed_over() -> None:
    columns = {
        "image": [{"bytes": png(PIL.Image.new("L", (8, 8), row)), "path": None} for row in range(NUM_ROWS)],
        "label": [{3: None, 8: -1, 14: 7}.get(row, row % 2) for row in range(NUM_ROWS)],
        "text": [None if row == 25 else str(row) for row in range(NUM_ROWS)],
    }
    rows = datasets.Dataset.from_dict(columns, features=FEATURES).to_iterable_dataset(num_shards=3)
    options = {"label_column": "label", "num_classes": 2, "caption_column": "text", "buffer_size": 8}
    data = StreamData(rows, GREY, max_unreadable=4, **options)
    assert list(data.captions.distinct()) == [str(row) for row in range(NUM_ROWS) if row != 25]
    whole, _ = read(data, 26, 1)
    assert sorted(rows_of(whole)) == [row for row in range(NUM_ROWS) if row not in (3, 8, 14, 25)]
    for batch in whole:
        assert batch["captions"] == [str(row) for row in rows_of([batch])]
        assert batch["labels"].tolist() == [row % 2 for row in rows_of([batch])]
    reasons = {name: reason for batch in whole for name, reason in batch.get("unreadable", {}).items()}
    assert reasons == {
        "3 of shard 0": "Row 3 of shard 0 has no label in the column 'label'",
        "8 of shard 0": "Row 8 of shard 0 has no label in the column 'label'",
        "4 of shard 1": "The label 7 of row 4 of shard 1 is out of range: the model's classes are 0 to 1",
        "5 of shard 2": "Row 5 of shard 2 has no caption: the column holds None there",
    }
    for stop in (3, 11, 20):
        first, saved = read(data, stop, 1)
        assert_same_batches(first + read(data, 26 - stop, 1, saved=saved)[0], whole)
    with pytest.raises(ValueError, match="of the data set cannot be read: "):
        read(StreamData(rows, GREY, max_unreadable=3, **options), 26, 1)


def test_a_row_that_cannot_be_read_counts_once_for_all_epochs() -> None:
    files = [b"no image" if row == 1 else png(PIL.Image.new("L", (8, 8), row)) for row in range(4)]
    rows = datasets.Dataset.from_dict({"image": files}).to_iterable_dataset()
    batches, _ = read(StreamData(rows, GREY, max_unreadable=1), 10, 3)
    assert Counter(rows_of(batches)) == {0: 10, 2: 10, 3: 10}
    rows = datasets.Dataset.from_dict({"image": [b"no image"] * 2}).to_iterable_dataset()
    with pytest.raises(ValueError, match="The image in row . of shard 0 of the data set cannot be read"):
        read(StreamData(rows, GREY, max_unreadable=2), 1, 1)


def test_rows_that_lack_something_are_named() -> None:
    image = {"bytes": png(PIL.Image.new("L", (8, 8))), "path": None}

    def one(label: int | None, text: str | None) -> datasets.IterableDataset:
        columns = {"image": [image], "label": [label], "text": [text]}
        return datasets.Dataset.from_dict(columns, features=FEATURES).to_iterable_dataset()

    for label, message in ((None, "has no label in the column 'label'"), (3, "out of range: the model's classes are")):
        with pytest.raises(ValueError, match=f"ow 0 of shard 0 .*{message}"):
            read(StreamData(one(label, "a"), GREY, label_column="label", num_classes=3), 1, 1)
    with pytest.raises(ValueError, match="Row 0 has no caption"):
        list(StreamData(one(0, None), GREY, caption_column="text").captions.distinct())
    with pytest.raises(ValueError, match="Row 0 of shard 0 has no caption"):
        read(StreamData(one(0, None), GREY, caption_column="text"), 1, 1)
    with pytest.raises(ValueError, match=r"no image column 'img'; the columns are \['image', 'label', 'text'\]"):
        StreamData(one(0, "a"), GREY, "img")
    with pytest.raises(ValueError, match="no label column 'class'"):
        StreamData(one(0, "a"), GREY, label_column="class", num_classes=3)
    with pytest.raises(ValueError, match="no caption column 'caption'"):
        StreamData(one(0, "a"), GREY, caption_column="caption")
    for features in (FEATURES, None):
        empty = datasets.IterableDataset.from_generator(lambda: iter(()), features=features)
        with pytest.raises(ValueError, match="The data set is empty"):
            StreamData(empty, GREY)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    source = save(tmp_path / "data", "webdataset")
    shard = tmp_path / "data" / "train-1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(
        ValueError, match="Shard 1 of the data set cannot be read from row 0 on: unexpected end of data"
    ):
        read(stream(source), 10)


# Through the scripts

OPTIONS = {
    "streaming": True,
    "shuffle_buffer_size": 8,
    "random_flip": True,
    "max_train_steps": 7,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 3,
}


def test_a_stream_is_trained_on_and_resumed(tmp_path: Path) -> None:
    model, data = save_untrained(tmp_path / "untrained", "unet-classes"), make_dataset(tmp_path / "data")
    whole = train(model, data, tmp_path / "whole", dataloader_num_workers=2, **OPTIONS)
    output_dir = train(model, data, tmp_path / "run", dataloader_num_workers=2, **{**OPTIONS, "max_train_steps": 3})
    manifest = json.loads((output_dir / "checkpoint-3" / "checkpoint.json").read_text())
    assert manifest["stream"]["num_batches"] == 6
    assert len(manifest["stream"]["readers"]) == 2
    for workers in (1, 2):
        # With one worker, to the step that the checkpoint is made at; with two again, to the end.
        options = {**OPTIONS, "max_train_steps": 6 if workers == 1 else 7, "dataloader_num_workers": workers}
        train(model, data, output_dir, resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, output_dir)
    for names in (("loss", "epoch"), ("validation_loss",)):
        assert read_log(output_dir, *names)[-1] == read_log(whole, *names)[-1]
    assert load(output_dir).config.id2label["0"] == "class 0"
    with pytest.raises(ValueError, match="--streaming was True in the run that is resumed and cannot be False now"):
        train(model, data, output_dir, resume_from_checkpoint="latest", **{**OPTIONS, "streaming": False})


def test_a_stream_from_the_hub_is_that_of_the_files(tmp_path: Path) -> None:
    model, data = save_untrained(tmp_path / "untrained", "unet-classes"), make_dataset(tmp_path / "data")
    local = train(model, data, tmp_path / "local", **OPTIONS)
    with fake_hub() as hub:
        hub.create("ada/blobs")
        files = {file.name: File(file.read_bytes(), is_lfs=True) for file in data.iterdir()}
        hub.commit("ada/blobs", "main", "Blobs", files)
        line = command_line(model, Path("ada/blobs"), tmp_path / "remote", dataloader_num_workers=1, **OPTIONS)
        check_processes(SCRIPT, line, HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"))
    assert_same_weights(local, tmp_path / "remote")
    # Nothing was kept but what the client remembers of the repository.
    assert not [file for file in (tmp_path / "home").rglob("*") if file.suffix in (".parquet", ".arrow")]


def test_two_processes_stream_and_resume(tmp_path: Path) -> None:
    model, data = save_untrained(tmp_path / "untrained", "unet"), save(tmp_path / "data", "webdataset", num_shards=4)
    options = {**OPTIONS, "image_column": "png", "dataloader_num_workers": 2, "gradient_accumulation_steps": 1}
    for name, resumed in (("whole", None), ("run", tmp_path / "whole" / "checkpoint-3")):
        place = (model, Path(data["dataset_name"]), tmp_path / name)
        line = command_line(*place, resume_from_checkpoint=resumed, **options)
        check_processes(SCRIPT, line, num_processes=2)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    assert read_log(tmp_path / "run", "loss") == read_log(tmp_path / "whole", "loss")[3:]
    manifest = json.loads((tmp_path / "whole" / "checkpoint-6" / "checkpoint.json").read_text())
    assert sorted(manifest["stream"]["readers"]) == ["0", "1", "2", "3"]
    assert manifest["stream"]["num_batches"] == 12


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "captions"])
def test_text_to_image_on_every_kind_of_data(kind: str, sources: dict, tmp_path: Path) -> None:
    script = load_script(Path(__file__).parents[2] / "training_scripts" / "train_text_to_image.py")
    tiny_stable_diffusion_3(t5=False).save_pretrained(tmp_path / "model")
    source = {name: value for name, value in sources[kind].items() if name != "columns"}
    names = {name: value for name, value in sources[kind]["columns"].items() if name != "label_column"}
    losses = []
    for streaming, buckets in ((False, False), (True, False), (True, True)):
        values = {
            "dataset_name": None,
            "resolution": 16,
            "max_train_steps": 2,
            "train_batch_size": 4,
            **source,
            **names,
        }
        values |= {
            "streaming": streaming,
            "use_aspect_ratio_buckets": buckets,
            "cache_dir": tmp_path / "cache",
            "max_sequence_length": 16,
        }
        output_dir = tmp_path / f"{streaming} {buckets}"
        run_script(script, command_line(tmp_path / "model", Path("."), output_dir, **values))
        losses.append(read_log(output_dir, "loss"))
    assert all(np.isfinite(loss) for run in losses for _, loss in run)
    # The same noise and times on other images.
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_samples": 5}, "--max_train_samples 5 does not go with --streaming"),
        ({"max_train_steps": None}, "not known how many samples the stream has: give --max_train_steps"),
        ({"cache_latents": True, "center_crop": True}, "--cache_latents does not go with --streaming"),
        ({"shuffle_buffer_size": 0}, "--shuffle_buffer_size must be at least 1, got 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    model, data = save_untrained(tmp_path / "untrained", "unet"), make_dataset(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        train(model, data, tmp_path / "run", **{**OPTIONS, **options})
    assert not list((tmp_path / "run").glob("checkpoint-*")) and os.path.isdir(model)


@pytest.mark.parametrize(
    ("ending", "good", "broken", "column"),
    [
        ("json", b'{"caption": "a"}', b'{"caption": "a', "json.caption"),
        ("txt", b"a", b"\xff\xfe\xfa", "txt"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_in_a_tar_ends_no_run(
    tmp_path: Path, streaming: bool, ending: str, good: bytes, broken: bytes, column: str
) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for row in range(12):
            for name, contents in (
                ("png", png(PIL.Image.new("L", (8, 8), row))),
                (ending, broken if row == 7 else good),
            ):
                member = tarfile.TarInfo(f"{row:02}.{name}")
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
    arguments = {"image_column": "png", "caption_column": column, "max_unreadable": 1}
    if streaming:
        rows = stream_splits(str(tmp_path))["train"]
        batches, _ = read(StreamData(rows, GREY, buffer_size=4, **arguments), 6, 4)
        captions = [caption for batch in batches for caption in batch["captions"]]
        assert {name for batch in batches for name in batch.get("unreadable", ())} == {"7 of shard 0"}
        assert captions == ["a"] * 24
        with pytest.raises(ValueError, match=r"row 7 of shard 0.*has no caption|caption.*row 7 of shard 0"):
            read(StreamData(rows, GREY, buffer_size=4, **arguments | {"max_unreadable": 0}), 6, 4)
    else:
        rows = load_splits(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]
        batch = ImageData(rows, GREY, **arguments)[np.array([[0, row] for row in range(12)])]
        assert list(batch["unreadable"]) == [7]
        assert batch["captions"] == ["a"] * 12
