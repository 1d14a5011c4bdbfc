# SPDX-License-Identifier: Apache-2.0
"""Videos as data: frames of files, of animated pictures and of folders, and what is refused."""

import importlib.util
import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import load_dataset

from diffusers_fm.data.clips import ClipTransform, read_frames
from diffusers_fm.data.folders import read_image_folder
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.loading import make_datasets
from diffusers_fm.data.streams import StreamData
from diffusers_fm.text_to_image.arguments import TextToImageArguments


LEVELS = [20, 60, 100, 140, 180, 220, 250]


def pictures(count: int = 7) -> list[PIL.Image.Image]:
    """Pictures of 16 x 24 pixels, each of one grey level."""
    return [PIL.Image.new("RGB", (24, 16), (level,) * 3) for level in LEVELS[:count]]


def animated(kind: str, count: int = 7) -> bytes:
    file = io.BytesIO()
    first, *others = pictures(count)
    first.save(file, kind, save_all=True, append_images=others)
    return file.getvalue()


def write_frames(folder: Path, count: int = 7) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures(count)):
        picture.save(folder / f"{number:03}.png")


def write_video(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        for picture in pictures():
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def levels(frames: list[PIL.Image.Image]) -> list[float]:
    return [float(np.asarray(frame.convert("L")).mean()) for frame in frames]


def test_frames_come_from_the_middle_of_every_kind_of_video(tmp_path: Path) -> None:
    write_frames(tmp_path / "frames")
    write_video(tmp_path / "a.mp4")
    sources = [animated("PNG"), str(tmp_path / "frames"), str(tmp_path / "a.mp4"), (tmp_path / "a.mp4").read_bytes()]
    for source in sources:
        # A lossy video of even colours is off by a level or two.
        np.testing.assert_allclose(levels(read_frames(source, 3)), LEVELS[2:5], atol=3)
        np.testing.assert_allclose(levels(read_frames(source, 3, stride=3)), LEVELS[::3], atol=3)
        with pytest.raises(ValueError, match="it has 7 frames, of which 8 are wanted"):
            read_frames(source, 8)


def test_a_missing_reader_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "av" else find(name, *a))
    args = TextToImageArguments(
        pretrained_model_name_or_path="a", train_data_dir=str(tmp_path), output_dir=str(tmp_path / "run"), num_frames=3
    )
    with pytest.raises(ValueError, match=r"PyAV is not installed: video files need .*\[video\]"):
        make_datasets(args, 9, 16, kind="videos", make_transform=lambda *a, **k: ClipTransform(*a, num_frames=3, **k))


def test_a_folder_of_videos_and_of_folders_of_frames(tmp_path: Path) -> None:
    write_frames(tmp_path / "train" / "one")
    write_video(tmp_path / "train" / "two.mp4")
    (tmp_path / "train" / "three.gif").write_bytes(animated("GIF"))
    write_frames(tmp_path / "test" / "four", count=2)
    rows = "".join(
        f'{{"file_name": "{name}", "text": "{name}"}}\n' for name in ("train/one", "train/two.mp4", "train/three.gif")
    )
    (tmp_path / "metadata.jsonl").write_text(rows + '{"file_name": "test/four", "text": "short"}\n')
    splits = read_image_folder(str(tmp_path), kind="videos")
    assert sorted(splits["train"]["text"]) == ["train/one", "train/three.gif", "train/two.mp4"]
    transform = ClipTransform(16, 9, center_crop=True, num_frames=3)
    data = ImageData(splits["train"], transform, caption_column="text")
    batch = data[np.array([[0, 0], [0, 1], [0, 2]])]
    assert batch["images"].shape == (3, 3, 3, 16, 16)
    np.testing.assert_allclose(batch["images"].float().mean((1, 3, 4)), np.array([LEVELS[2:5]] * 3), atol=3)
    # A video that is too short counts as unreadable.
    with pytest.raises(ValueError, match="it has 2 frames, of which 3 are wanted"):
        ImageData(splits["test"], transform)


def test_clips_are_cropped_and_mirrored_as_one_and_streamed_alike() -> None:
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
    frames = [PIL.Image.fromarray(ramp + number) for number in range(4)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    rows = datasets.Dataset.from_dict({"image": [file.getvalue()] * 4})
    transform = ClipTransform(16, 4, random_flip=True, num_frames=4)
    kept = ImageData(rows, transform, seed=3)
    visited = ImageData(rows, transform, seed=3, memory_budget=0)
    keys = np.array([[epoch, row] for epoch in range(2) for row in range(4)])
    images = kept[keys]["images"]
    assert torch.equal(visited[keys]["images"], images)
    # Frames differ by one level everywhere, so each is cut and mirrored as the first.
    steps = images.int().diff(dim=2)
    assert images.shape == (8, 1, 4, 16, 16) and bool((steps == 1).all())
    assert len({image[0, 0, 0, 0].item() for image in images}) > 2
    stream = StreamData(rows.to_iterable_dataset(), transform, seed=3)
    (batch,) = stream.spread_batches(2, 2)
    assert batch["images"].shape == (2, 1, 4, 16, 16) and bool((batch["images"].int().diff(dim=2) == 1).all())


def test_a_column_of_videos_of_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"clip": [{"bytes": animated("PNG"), "path": None}] * 2})
    rows = rows.cast_column("clip", datasets.Video(decode=False))
    rows.to_parquet(tmp_path / "train.parquet")
    data = ImageData(
        load_dataset(str(tmp_path), split="train"), ClipTransform(16, 6, num_frames=2), image_column="clip"
    )
    assert data[np.array([[0, 1]])]["images"].shape == (1, 3, 2, 16, 16)
