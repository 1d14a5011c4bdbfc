# SPDX-License-Identifier: Apache-2.0
"""Local folders: each file is used, or counted and named; rows name no others; class names are the data's."""

import json
import logging
import os
import re
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from tiny_pipelines import tiny_pipeline
from training_runs import png

from diffusers_fm.data.arguments import rgb
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.loading import adopt_class_names, hold_out, with_labels_of_model
from diffusers_fm.data.sources import data_folders, first_rows, load_splits, stream_splits
from diffusers_fm.data.streams import StreamData
from diffusers_fm.data.transforms import ImageTransform, image_file


GREY = ImageTransform(8, 1)


def square(level: int) -> bytes:
    return png(PIL.Image.new("L", (8, 8), level))


def write(folder: Path, *names: str) -> Path:
    """Grey squares, each of its own level, under these names."""
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(square(level))
    return folder


def levels(split: datasets.Dataset, **options: object) -> list[int]:
    data = ImageData(split, GREY, **options)
    return data[np.array([[0, row] for row in range(len(data))])]["images"][:, 0, 0, 0].tolist()


def sizes(folder: Path) -> dict[str, int]:
    splits = load_splits(train_data_dir=str(folder))
    streams = stream_splits(train_data_dir=str(folder))
    assert {name: len(list(rows)) for name, rows in streams.items()} == {n: len(rows) for n, rows in splits.items()}
    return {name: len(split) for name, split in splits.items()}


# Names that are words for splits


@pytest.mark.parametrize(
    ("names", "expected", "labels"),
    [
        (["cat.png", "photo of a train.png", "test tubes.png", "eval.png", "val-1.png"], {"train": 5}, None),
        (["boat/0.png", "train/0.png", "plane/0.png"], {"train": 3}, ["boat", "plane", "train"]),
        (["steam-train/0.png", "test-tubes/0.png"], {"train": 2}, ["steam-train", "test-tubes"]),
        (["train/0.png", "train/1.png", "test/0.png"], {"train": 2, "test": 1}, None),
        (["Train/a/0.png", "Train/b/0.png", "val/a/1.png"], {"train": 2, "validation": 1}, ["a", "b"]),
        (["train2017/0.png", "val2017/0.png"], {"train": 1, "validation": 1}, None),
        (["data/train_images/0.png", "data/test_images/0.png"], {"train": 1, "test": 1}, None),
        (["a/train/0.png", "b/train/0.png", "a/test/0.png"], {"train": 2, "test": 1}, ["a", "b"]),
        (["0.png", "1.png", "test/0.png"], {"train": 2, "test": 1}, None),
        (["train/0.png", "train/1.png"], {"train": 2}, None),
        (["test/0.png", "test/1.png"], {"train": 2}, None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_splits_are_folders_named_so(
    names: list[str], expected: dict[str, int], labels: list[str] | None, tmp_path: Path
) -> None:
    assert sizes(write(tmp_path, *names)) == expected
    features = load_splits(train_data_dir=str(tmp_path))["train"].features
    assert (features["label"].names if "label" in features else None) == labels


def test_splits_beside_other_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train/0.png", "test/0.png", "masks/0.png")
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\] beside other folders .*\['masks'\]"):
        sizes(tmp_path)


def test_files_of_rows_are_all_read_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def rows(*names: str) -> dict[str, int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for level, name in enumerate(names):
            datasets.Dataset.from_dict({"image": [square(level)]}).to_parquet(folder / name)
        found = load_splits(str(folder), cache_dir=str(folder / "cache"))
        # The cache in the folder is no data of it, nor is the output of a run.
        write(folder / "out", "samples/0.png")
        (folder / "out" / "training_args.json").write_text("{}")
        again = load_splits(str(folder), cache_dir=str(folder / "cache"))
        assert [levels(split) for split in again.values()] == [levels(split) for split in found.values()]
        return {name: len(split) for name, split in found.items()}

    assert rows("cats.parquet", "photos of a train.parquet", "tests.parquet") == {"train": 3}
    assert rows("train-0.parquet", "train-1.parquet", "test.parquet") == {"train": 2, "test": 1}
    # As `datasets` writes them.
    assert rows("cats-train-00000-of-00002.parquet", "cats-train-00001-of-00002.parquet", "cats-test.parquet") == {
        "train": 2,
        "test": 1,
    }
    assert not [record for record in caplog.records if "left out" in record.getMessage()]
    assert rows("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "more.parquet") == {"train": 2}
    assert "2 files of" in caplog.text
    assert "1 are left out, as they are of no split, unlike the others: more.parquet." in caplog.text


# Files that are left out


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "photos", "0.png", "1.PNG", ".hidden.png", "__MACOSX/0.png", "old run/samples/0.png")
    PIL.Image.new("RGB", (16, 16)).save(folder / "2.avif")
    (folder / "old run" / "training_args.json").write_text("{}")
    for number in range(4):
        (folder / f"IMG_{number}.HEIC").write_bytes(bytes(100))
    (folder / "notes.txt").write_text("...")
    (folder / "linked").symlink_to(write(tmp_path / "other", "3.png"))
    (folder / "linked" / "back").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert sizes(folder) == {"train": 4}
    said = caplog.records[0].getMessage()
    assert said.startswith(f"4 images of '{folder}' are used. Left out: 4 .heic files, no images that Pillow can read")
    for part in ("IMG_0.HEIC, IMG_1.HEIC, IMG_2.HEIC, ...", "notes.txt", ".hidden.png", "linked/back", "gone.png"):
        assert part in said
    assert "2 folders that are hidden or the output of a run (__MACOSX, old run)" in said
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.heic").write_bytes(b"")
    with pytest.raises(ValueError, match="it contains no images that Pillow can read; left out are 1 .heic files"):
        sizes(tmp_path / "none")
    with pytest.raises(ValueError, match="is the output of a run"):
        sizes(folder / "old run")


def test_wildcards_in_paths(tmp_path: Path) -> None:
    folder = write(tmp_path / "shoot [2024-01] (1)*", "a[0].png", "b?.png")
    assert sizes(folder) == {"train": 2}
    assert levels(load_splits(str(folder))["train"]) == [0, 1]
    rows = tmp_path / "rows [1]"
    rows.mkdir()
    datasets.Dataset.from_dict({"image": [square(3)]}).to_parquet(rows / "a [0].parquet")
    assert levels(load_splits(str(rows), cache_dir=str(tmp_path / "cache"))["train"]) == [3]
    assert len(list(stream_splits(str(rows))["train"])) == 1


def test_archives_of_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.png", square(5))
    split = load_splits(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]
    assert levels(split) == [5]


# Metadata


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_in_several_encodings(kind: str, encoding: str, tmp_path: Path) -> None:
    write(tmp_path, "0.png", "sub/1.png")
    rows = [{"file_name": "sub/1.png", "text": "Bär"}, {"file_name": "0.png", "text": "l'été"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if kind == "csv":
        lines = ["file_name,text", *(",".join(row.values()) for row in rows)]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines), encoding=encoding)
    split = load_splits(train_data_dir=str(tmp_path))["train"]
    assert split["text"][:] == ["l'été", "Bär"]
    assert levels(split) == [0, 1]


def test_metadata_that_cannot_be_used_is_one_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "a", "0.png", "1.png", "2.png")
    file = folder / "metadata.csv"
    file.write_bytes("file_name,text\n0.png,Bär\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"metadata.csv' is not UTF-8 \(.* at byte 22\): save it as UTF-8\.$"):
        sizes(folder)
    (write(tmp_path / "b", "0.png") / "0.txt").write_bytes("Bär".encode("cp1252"))
    with pytest.raises(ValueError, match=r"0.txt' is not UTF-8 \(.* at byte 1\): save it as UTF-8\.$"):
        sizes(tmp_path / "b")
    file.write_text("file_name;text\n0.png;b\n")
    with pytest.raises(ValueError, match=r"has no column 'file_name'; its columns are \['file_name;text'\]"):
        sizes(folder)
    file.write_text("file_name,text\n9.png,b\n")
    with pytest.raises(ValueError, match="None of the rows of .* names an image"):
        sizes(folder)
    file.rename(folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": \n')
    with pytest.raises(ValueError, match=r"metadata.jsonl' cannot be read: JSON parse error"):
        sizes(folder)
    # Nothing outside of the folder is a row's image.
    write(tmp_path, "secret.png")
    lines = [{"file_name": name} for name in ("0.png", "../secret.png", str(tmp_path / "secret.png"), "9.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    caplog.clear()
    assert sizes(folder) == {"train": 1}
    assert "2 images without a row in the metadata (1.png, 2.png)" in caplog.text
    assert "3 rows of metadata without an image (9.png, None, None)" in caplog.text


def test_metadata_names_further_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "0.png", "1.png", "small/0.png")
    lines = [
        {"file_name": f"{row}.png", "small_file_name": f"small/{row}.png" if row == 0 else None} for row in (0, 1)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    split = load_splits(train_data_dir=str(tmp_path))["train"]
    assert levels(split.select([0]), image_column="small") == [2]
    assert split["small"][1] is None
    assert not caplog.records


# Files that rows name


@pytest.mark.parametrize("form", ["path", "file", "relative", "link", "zip"])
def test_rows_of_files_name_no_files_elsewhere(form: str, tmp_path: Path) -> None:
    write(tmp_path, "private/secret.png", "data/own.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "private" / "secret.png")
    with zipfile.ZipFile(tmp_path / "private" / "a.zip", "w") as archive:
        archive.writestr("secret.png", square(0))
    secret = tmp_path / "private" / "secret.png"
    named = {
        "path": str(secret),
        "file": f"file://{secret}",
        "relative": "../private/secret.png",
        "link": "link.png",
        "zip": f"zip://secret.png::{tmp_path / 'private' / 'a.zip'}",
    }[form]
    folders = data_folders(str(tmp_path / "data"), None, None)
    cells = [{"bytes": None, "path": path} for path in (named, "own.png", str(tmp_path / "data" / "own.png"))]
    with pytest.raises(ValueError, match="it names .* which is not in the folder of the data"):
        image_file(cells[0], folders)
    features = datasets.Features({"image": datasets.Image()})
    transform = ImageTransform(8, 1, folders=folders)
    key = np.array([[0, 0], [0, 1], [0, 2]])
    for column in (cells, [cell["path"] for cell in cells]):
        rows = datasets.Dataset.from_dict({"image": column}, features if column is cells else None)
        data = ImageData(rows, transform, max_unreadable=1)
        batch = data[key]
        assert set(batch["unreadable"]) == {0}
        assert batch["images"][:, 0, 0, 0].tolist() == [1, 1, 1]
        with pytest.raises(ValueError, match="The image in row 0 .* which is not in the folder of the data"):
            ImageData(rows, transform)
        stream = rows.to_iterable_dataset()
        held_out = first_rows(stream, "image", 3, folders)
        assert set(ImageData(held_out, transform, max_unreadable=1)[key]["unreadable"]) == {0}
        streamed = StreamData(stream, transform, max_unreadable=1)
        values = [row["image"] for row in streamed._rows]
        assert [streamed.transform.decode(value, (8, 8))[0, 0, 0] for value in values[1:]] == [1, 1]
        with pytest.raises(ValueError, match="which is not in the folder of the data"):
            streamed.transform.decode(values[0], (8, 8))


def test_rows_of_a_local_data_set_name_files_of_other_folders_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("pictures/one.png", "elsewhere/two.png"):
        write(tmp_path, name)
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("pictures/one.png", "elsewhere/two.png")]
    folders = data_folders(str(tmp_path / "data"), None, None, [str(tmp_path / "pictures")])
    assert image_file(cells[0], folders) == cells[0]["path"]
    with pytest.raises(ValueError, match="which is not in the folder of the data or of --image_folders"):
        image_file(cells[1], folders)
    with pytest.raises(ValueError, match="--image_folders .* is for a local --dataset_name"):
        data_folders("owner/name", None, None, [str(tmp_path / "pictures")])
    with pytest.raises(ValueError, match=r"--image_folders: there is no folder '.*none'"):
        data_folders(str(tmp_path / "data"), None, None, [str(tmp_path / "none")])


def test_rows_name_what_datasets_has_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a folder of images on the Hub; other places are no places of images.
    write(tmp_path, "downloads/extracted/0.png", "token")
    folders = data_folders("owner/name", None, str(tmp_path / "downloads"))
    cell = {"bytes": None, "path": str(tmp_path / "downloads" / "extracted" / "0.png")}
    assert image_file(cell, folders) == cell["path"]
    for path in (str(tmp_path / "token"), "git://x", "reference://a.json", f"simplecache::{cell['path']}"):
        with pytest.raises(ValueError, match="which is not in the folder of the data"):
            image_file({"bytes": None, "path": path}, folders)


def test_archives_that_are_streamed_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        write(tmp_path, "0.png")
        tar.add(tmp_path / "0.png", "0.png")
    cell = {"bytes": None, "path": f"tar://0.png::{tmp_path / 'a.tar'}"}
    assert image_file(cell, data_folders(str(tmp_path), None, None)) == square(0)


# Class names


@pytest.mark.parametrize(
    ("known", "names", "said"),
    [
        (None, ["bus", "car"], ""),
        (["bus", "car"], ["bus", "car"], ""),
        (["cat", "dog"], ["bus", "car"], r"\['cat', 'dog'\], are replaced by those of the data, \['bus', 'car'\]\.$"),
        (["cat", "dog"], ["dog", "cat"], r"\['dog', 'cat'\] are in both with other labels"),
        (["cat", "dog", "emu"], ["cat", "emu"], r"\['emu'\] are in both with other labels"),
        (["cat", "dog"], None, "replaced by those of the data, which has none"),
    ],
    ids=["new", "same", "other", "order", "part", "numbers"],
)
def test_class_names_are_those_of_the_data(
    known: list[str] | None, names: list[str] | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = tiny_pipeline("unet-classes")
    # As it comes from JSON.
    pipeline.register_to_config(id2label=known and {str(label): name for label, name in enumerate(known)})
    with caplog.at_level(logging.WARNING):
        adopt_class_names(pipeline, names and dict(enumerate(names)))
    found = pipeline.config.id2label
    assert (found and list(found.values())) == names
    assert len(caplog.records) == bool(said)
    if said:
        assert caplog.records[0].levelno == logging.WARNING
        assert re.search(said, caplog.text.strip())


def test_backgrounds_of_the_command_line() -> None:
    assert rgb("white") == (255, 255, 255)
    assert rgb("#0a141e") == rgb("rgb(10, 20, 30)") == (10, 20, 30)
    with pytest.raises(ValueError, match="--background must be a colour's name or #rrggbb, got 'whit'"):
        rgb("whit")


def test_folders_that_may_not_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "0.png", "locked/1.png")
    (tmp_path / "locked").chmod(0)
    try:
        if os.access(tmp_path / "locked", os.R_OK):
            # Root may read everything.
            assert sizes(tmp_path) == {"train": 2}
        else:
            assert sizes(tmp_path) == {"train": 1}
            assert "folders that may not be read (locked)" in caplog.text
    finally:
        (tmp_path / "locked").chmod(0o755)


def test_captions_in_text_files_beside_the_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "0.png", "1.png", "2.png")
    for name, text in (("0.txt", " a dog\n"), ("2.txt", "eine Kätzin"), ("notes.txt", "mine")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    split = load_splits(train_data_dir=str(tmp_path))["train"]
    assert split["text"] == ["a dog", None, "eine Kätzin"]
    assert "Left out: 1 .txt files" in caplog.text and "notes.txt" in caplog.text
    assert levels(split) == [0, 1, 2]


def test_labels_are_matched_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = load_splits(train_data_dir=str(write(tmp_path, "cat/0.png", "dog/1.png", "eel/2.png")))["train"]
    pipeline = tiny_pipeline("unet-classes")
    pipeline.register_to_config(id2label={"0": "eel", "1": "dog", "2": "cat"})
    assert with_labels_of_model(pipeline, split, "label")["label"] == [2, 1, 0]
    assert pipeline.config.id2label == {"0": "eel", "1": "dog", "2": "cat"}
    pipeline.register_to_config(id2label={"0": "eel", "1": "dog"})
    assert with_labels_of_model(pipeline, split, "label")["label"] == [0, 1, 2]
    assert with_labels_of_model(tiny_pipeline("unet"), split, "label") is split
    assert "The 3 classes of the data are not used" in caplog.text


def test_a_part_of_a_split_is_held_out(tmp_path: Path) -> None:
    split = load_splits(train_data_dir=str(write(tmp_path, *(f"{i}.png" for i in range(10)))))["train"]
    train, held_out = hold_out(split, 0.25)
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted(levels(train) + levels(held_out)) == list(range(10))
    assert levels(hold_out(split, 0.25)[1]) == levels(held_out)
    with pytest.raises(ValueError, match="--validation_fraction 0.01 of 10 samples would hold out 0 of them"):
        hold_out(split, 0.01)
