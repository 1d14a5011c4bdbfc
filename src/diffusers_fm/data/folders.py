# SPDX-License-Identifier: Apache-2.0
"""Folder of images as data set: every file is used, or counted and named as left out."""

import codecs
import io
import logging
import os
import posixpath
from collections import defaultdict
from pathlib import Path

import datasets
import pandas as pd
import PIL.features
import PIL.Image
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet


logger = logging.getLogger(__name__)

# Files of sounds that libsndfile reads.
SOUND_SUFFIXES = {".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"}

# Videos, and pictures that may have frames, each of which is a video where videos are read.
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
ANIMATED_SUFFIXES = {".apng", ".gif"}

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Files that make a folder the output of a run or of an evaluation.
_OUTPUT_FILES = ("training_args.json", "model_index.json", "fingerprint.json")

# Formats that Pillow knows by name alone, or reads with another program.
_UNREAD_FORMATS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

_SPLIT_WORDS = {
    "train": ("training", "train"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("testing", "test", "evaluation", "eval"),
}
_SEPARATORS = "-_.0123456789"

_IMAGES, _SOUNDS = "images that Pillow can read", "sounds that libsndfile can read"
# What a folder lacks that has none of a kind of data, and what its other files are not.
_READ = {"images": _IMAGES, "videos": "videos", "sounds": _SOUNDS}
_OTHERS = {"images": _IMAGES, "videos": _IMAGES, "sounds": _SOUNDS}


def image_suffixes() -> set[str]:
    """Suffixes of the images that Pillow reads here, those of its plugins included."""
    unread = {*_UNREAD_FORMATS, *(name for name in ("AVIF", "WEBP") if not PIL.features.check(name.lower()))}
    formats = PIL.Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in PIL.Image.OPEN and name not in unread}


def suffixes_of(kind: str) -> set[str]:
    """Suffixes of the files of a kind of data: `images`, `videos` or `sounds`."""
    if kind == "sounds":
        return SOUND_SUFFIXES
    return image_suffixes() | (VIDEO_SUFFIXES if kind == "videos" else set())


def read_image_folder(folder: str, kind: str = "images") -> dict[str, datasets.Dataset]:
    """
    Splits of a folder of images, each with the columns of its metadata files, or with labels by class folders and with
    captions, the column `text`, of `.txt` files of the images' names.

    Splits are folders of one depth named `train` and `test` or `validation`, perhaps all with the same addition
    (`train2017`, `val2017`); without them all images are for training. Files that are not used are logged.

    Args:
        folder (`str`):
            The folder. Links are followed.
        kind (`str`, *optional*, defaults to `"images"`):
            `"videos"`: files of them, animated pictures, and folders of frames, each of which is one; or `"sounds"`,
            which stand in the place of the images.

    Returns:
        `dict[str, datasets.Dataset]`: the splits by name, rows in the order of the paths, images as paths.

    Raises:
        FileNotFoundError: if there are no images.
        ValueError: if splits stand beside other folders, or metadata cannot be read.
    """
    root, left_out = Path(folder).expanduser(), defaultdict[str, list[str]](list)
    images, metadata = _walk(root, left_out, kind)
    if kind == "videos":
        # Pictures that stand in a folder are its frames, unless they have frames themselves.
        whole = {*VIDEO_SUFFIXES, *ANIMATED_SUFFIXES}
        kept = (path if _suffix(path) in whole else posixpath.dirname(path) for path in images)
        images = sorted({path for path in kept if path})
    if not images:
        named = _describe(left_out)
        raise FileNotFoundError(f"it contains no {_READ[kind]}; left out are {named or 'no files'}")
    split_of, class_of = _splits_and_classes(folder, images, left_out)
    if metadata:
        table = _with_metadata(root, metadata, split_of, left_out)
    else:
        table = pa.table({"image": list(split_of)})
    paths = table["image"].to_pylist()
    captions = {} if metadata else _captions(root, paths, left_out, kind)
    if captions:
        table = table.append_column("text", pa.array([captions.get(path) for path in paths], type=pa.string()))
    features = datasets.Features.from_arrow_schema(table.schema)
    for name in [name for name in table.column_names if name == "image" or name.endswith("_file_name")]:
        cells = [
            None if path is None else {"bytes": None, "path": str(root / path)} for path in table[name].to_pylist()
        ]
        place, short = table.column_names.index(name), name.removesuffix("_file_name")
        table = table.set_column(place, short, pa.array(cells, type=datasets.Image().pa_type))
        features = datasets.Features({short if old == name else old: value for old, value in features.items()})
        features[short] = datasets.Audio() if kind == "sounds" else datasets.Image()
    if class_of and not metadata:
        names = sorted(set(class_of.values()))
        features["label"] = datasets.ClassLabel(names=names)
        table = table.append_column("label", pa.array([names.index(class_of[path]) for path in paths]))
    rows = datasets.Dataset(datasets.table.InMemoryTable(table.cast(features.arrow_schema)))
    splits: dict[str, list[int]] = defaultdict(list)
    for row, path in enumerate(paths):
        splits[split_of[path]].append(row)
    if left_out:
        logger.warning("%d images of %r are used. Left out: %s.", len(paths), folder, _describe(left_out))
    return {name: rows.select(splits[name]) for name in _SPLIT_WORDS if splits[name]}


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _walk(root: Path, left_out: dict[str, list[str]], kind: str) -> tuple[list[str], list[str]]:
    """Paths below the root, in order, of images and of metadata files."""
    images, metadata, suffixes = [], [], suffixes_of(kind)
    if any((root / name).is_file() for name in _OUTPUT_FILES):
        raise ValueError(f"The folder of images {str(root)!r} is the output of a run: keep these apart.")
    folders, seen = [""], {os.path.realpath(root)}
    while folders:
        place = folders.pop()
        try:
            entries = list(os.scandir(root / place))
        except PermissionError:
            left_out["folders that may not be read"].append(place)
            continue
        for entry in entries:
            path, suffix = posixpath.join(place, entry.name), _suffix(entry.name)
            if entry.is_dir():
                if not is_data_folder(entry.path):
                    left_out["folders that are hidden or the output of a run"].append(path)
                elif (real := os.path.realpath(entry.path)) in seen:
                    left_out["links to folders that are read already"].append(path)
                else:
                    seen.add(real)
                    folders.append(path)
            elif entry.name in METADATA_FILES:
                metadata.append(path)
            elif not entry.is_file():
                left_out["links to nothing"].append(path)
            elif entry.name.startswith(".") and suffix in suffixes:
                left_out["hidden images"].append(path)
            elif suffix in suffixes:
                images.append(path)
            elif not entry.name.startswith("."):
                left_out[f"{suffix or 'other'} files, no {_OTHERS[kind]}"].append(path)
    return sorted(images), sorted(metadata)


def _captions(root: Path, images: list[str], left_out: dict[str, list[str]], kind: str) -> dict[str, str]:
    """Captions in text files that have the names of images, which are then no longer left out."""
    reason = f".txt files, no {_OTHERS[kind]}"
    texts = set(left_out[reason])
    files = {path: f"{os.path.splitext(path)[0]}.txt" for path in images}
    captions = {path: _read_text(root / file).strip() for path, file in files.items() if file in texts}
    left_out[reason] = sorted(texts - {files[path] for path in captions})
    if not left_out[reason]:
        del left_out[reason]
    return captions


def _splits_and_classes(
    folder: str, images: list[str], left_out: dict[str, list[str]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Split of each used image, and its class if class folders stand at one depth."""
    parents = {path: path.split("/")[:-1] for path in images}
    loose = [path for path in images if not parents[path]]
    in_folders = [parts for parts in parents.values() if parts]
    split_of = dict.fromkeys(images, "train")
    depth = min(map(len, in_folders), default=0)
    for level in range(min(depth, 1) if loose else depth):
        names = {parts[level] for parts in in_folders}
        words = {name: word for name in names if (word := split_of_name(name)) is not None}
        splits = {name: split for name, (split, _) in words.items()}
        exact = {name: split for name, (split, addition) in words.items() if not addition}
        # As many splits as folders, and the same addition to all of their words.
        alike = len(set(splits.values())) == len(names) and len({addition for _, addition in words.values()}) == 1
        if alike and ("train" in splits.values() or loose):
            if "train" in splits.values():
                left_out["images beside the folders of splits"] += loose
                images = [path for path in images if parents[path]]
            split_of = {path: splits[parents[path][level]] if parents[path] else "train" for path in images}
            parents = {path: parents[path][:level] + parents[path][level + 1 :] for path in images}
            break
        if "train" in exact.values() and len(set(exact.values())) > 1:
            raise ValueError(
                f"The folder {folder!r} has the splits {sorted(exact)} beside other folders of images,"
                f" {sorted(names - set(exact))}: give the folder of one split, or move the others."
            )
    depths, classes = {len(parts) for parts in parents.values()}, {parts[-1] for parts in parents.values() if parts}
    if len(depths) > 1 and len(classes) > 1:
        logger.warning("Images of %r stand at several depths of folders: these are taken for no classes.", folder)
    if len(depths) > 1 or len(classes) < 2:
        return split_of, {}
    return split_of, {path: parts[-1] for path, parts in parents.items()}


def split_of_name(name: str) -> tuple[str, str] | None:
    """The split whose word a name is, begins or ends with, and what the name adds to the word."""
    lower = name.lower()
    for split, word in ((split, word) for split, words in _SPLIT_WORDS.items() for word in words):
        after, before = lower.removeprefix(word), lower.removesuffix(word)
        if lower == word or (after != lower and after[0] in _SEPARATORS):
            return split, after
        if before != lower and before[-1] in _SEPARATORS:
            return split, before
    return None


def is_data_folder(path: str) -> bool:
    """Return whether a folder is neither hidden nor the output of a run or of an evaluation."""
    hidden = os.path.basename(path).startswith((".", "__"))
    return not hidden and not any(os.path.isfile(os.path.join(path, name)) for name in _OUTPUT_FILES)


def _with_metadata(
    root: Path, metadata: list[str], split_of: dict[str, str], left_out: dict[str, list[str]]
) -> pa.Table:
    """Rows of metadata files, paths in their column `image` and in those that end in `_file_name`."""
    tables, mentioned = [], set()
    for file in metadata:
        table = _read_metadata(root / file).replace_schema_metadata(None)
        if "file_name" not in table.column_names:
            raise ValueError(f"{str(root / file)!r} has no column 'file_name'; its columns are {table.column_names}.")
        for name in [name for name in table.column_names if name == "file_name" or name.endswith("_file_name")]:
            values = [value and str(value).replace("\\", "/") for value in table[name].to_pylist()]
            paths = [value and posixpath.normpath(posixpath.join(posixpath.dirname(file), value)) for value in values]
            # Nothing outside of the folder is read.
            paths = [None if path is None or path.startswith(("/", "../")) else path for path in paths]
            mentioned |= set(paths)
            table = table.set_column(table.column_names.index(name), name, pa.array(paths, type=pa.string()))
        tables.append(table.rename_columns(["image" if name == "file_name" else name for name in table.column_names]))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"The metadata files {metadata} of {str(root)!r} differ in their columns: {error}") from error
    paths = table["image"].to_pylist()
    left_out["rows of metadata without an image"] += [str(path) for path in paths if path not in split_of]
    left_out["images without a row in the metadata"] += [path for path in split_of if path not in mentioned]
    for reason in [reason for reason, names in left_out.items() if not names]:
        del left_out[reason]
    order = sorted((path, row) for row, path in enumerate(paths) if path in split_of)
    if not order:
        raise ValueError(f"None of the rows of {metadata} in {str(root)!r} names an image, such as {paths[:1]}.")
    return table.take(pa.array([row for _, row in order], type=pa.int64()))


def _read_text(file: Path) -> str:
    """A text in UTF-8, or in UTF-16 with its mark; a `ValueError` names the file."""
    content = file.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(file)!r} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error


def _read_metadata(file: Path) -> pa.Table:
    text = "" if file.suffix == ".parquet" else _read_text(file)
    try:
        if file.suffix == ".parquet":
            return pyarrow.parquet.read_table(file)
        if file.suffix == ".csv":
            return pa.Table.from_pandas(pd.read_csv(io.StringIO(text)), preserve_index=False)
        # A block holds whole rows.
        content = text.encode()
        options = pyarrow.json.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1))
        return pyarrow.json.read_json(io.BytesIO(content), read_options=options)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {' '.join(str(error).split())}") from error


def _describe(left_out: dict[str, list[str]]) -> str:
    """Reasons, counts and the first names."""
    parts = []
    for reason, names in sorted(left_out.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(names) > 3 else ""
        parts.append(f"{len(names)} {reason} ({', '.join(sorted(names)[:3])}{more})")
    return "; ".join(parts)
