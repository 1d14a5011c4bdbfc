# SPDX-License-Identifier: Apache-2.0
"""Videos as clips of some frames: from animated pictures, folders of frames, and files that PyAV decodes."""

import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch

from ..arguments import install
from .cache import content_key
from .transforms import ImageTransform, image_file, open_image, to_pixels


def check_video_reader() -> None:
    """Refuse video files where PyAV is not installed."""
    if importlib.util.find_spec("av") is None:
        raise ValueError(f"PyAV is not installed: video files need {install('video')}.")


def check_first(value: dict[str, Any] | None, folders: Sequence[Path] | None) -> None:
    """Refuse a video that needs PyAV where that is not installed; what cannot be read is left to its reader."""
    try:
        file = image_file(value, folders)
        if isinstance(file, bytes) or not os.path.isdir(file):
            PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file).close()
    except PIL.UnidentifiedImageError:
        check_video_reader()
    except (OSError, ValueError):
        pass


def read_frames(file: bytes | str, num_frames: int, stride: int = 1) -> list[PIL.Image.Image]:
    """
    Frames from the middle of a video.

    Args:
        file (`bytes` or `str`):
            Contents or path of a video or an animated picture, or path of a folder of frames in the order of their
            names.
        num_frames (`int`):
            How many.
        stride (`int`, *optional*, defaults to 1):
            Every so many frames one is taken.

    Returns:
        `list[PIL.Image.Image]`: the frames.

    Raises:
        ValueError: if there are fewer, or PyAV is needed and not installed.
    """
    if isinstance(file, str) and os.path.isdir(file):
        paths = frame_files(file)
        return [open_image(str(paths[number])) for number in _middle(len(paths), num_frames, stride)]
    try:
        image = PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except PIL.UnidentifiedImageError:
        return _decode(file, num_frames, stride)
    if image.format == "MPEG":
        # Pillow knows its name alone.
        return _decode(file, num_frames, stride)
    with image:
        frames = []
        for number in _middle(getattr(image, "n_frames", 1), num_frames, stride):
            image.seek(number)
            frames.append(image.copy())
        return frames


def frame_files(folder: str) -> list[Path]:
    """Files of a folder of frames, in the order of their names."""
    return sorted(path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith("."))


def file_key(file: bytes | str) -> str:
    """Digest of the contents of a file, or of the files of a folder of frames."""
    if isinstance(file, bytes):
        return content_key(file)
    return content_key(*(path.read_bytes() for path in (frame_files(file) if os.path.isdir(file) else [Path(file)])))


def _middle(count: int, num_frames: int, stride: int) -> range:
    span = (num_frames - 1) * stride + 1
    if count < span:
        raise ValueError(f"it has {count} frames, of which {span} are wanted")
    first = (count - span) // 2
    return range(first, first + span, stride)


def _decode(file: bytes | str, num_frames: int, stride: int) -> list[PIL.Image.Image]:
    """Frames of a video file by PyAV."""
    check_video_reader()
    count = sum(1 for _ in _frames(file))
    wanted = _middle(count, num_frames, stride)
    chosen = (frame for number, frame in enumerate(_frames(file)) if number in wanted)
    return [frame.to_image() for _, frame in zip(wanted, chosen)]


def _frames(file: bytes | str) -> Iterator[Any]:
    import av

    with av.open(io.BytesIO(file) if isinstance(file, bytes) else file) as container:
        yield from container.decode(video=0)


@dataclass(frozen=True)
class ClipTransform(ImageTransform):
    """
    What is done to each video: its middle frames, each as an [`ImageTransform`] treats an image, all alike.

    On their way the frames of a video are the channels of an image, frame by frame; [`as_batch`] makes a video of it.

    Args:
        channels (`int`):
            Those of all frames together.
        num_frames (`int`, *optional*, defaults to 1):
            Frames of a clip.
        frame_stride (`int`, *optional*, defaults to 1):
            Every so many frames of the video one is taken.
    """

    num_frames: int = 1
    frame_stride: int = 1
    is_image: ClassVar[bool] = False

    @property
    def colours(self) -> int:
        """Channels of a frame."""
        return self.channels // self.num_frames

    @property
    def settings(self) -> tuple[Any, ...]:
        return *super().settings, self.num_frames, self.frame_stride

    def decode(self, value: dict[str, Any] | None, size: tuple[int, int]) -> np.ndarray:
        """Pixels of a cell of a video column, uint8 of shape `(channels, height, width)`, covering a size."""
        frames = read_frames(image_file(value, self.folders), self.num_frames, self.frame_stride)
        if len({frame.size for frame in frames}) > 1:
            raise ValueError("its frames are of several sizes")
        return np.concatenate(
            [to_pixels(frame, size, self.colours, self.multiple, self.background) for frame in frames]
        )

    def size_of(self, value: dict[str, Any] | None) -> tuple[int, int]:
        """Height and width of a cell of a video column."""
        (frame,) = read_frames(image_file(value, self.folders), 1)
        return frame.height, frame.width

    def as_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Videos of shape `(batch_size, channels, frames, height, width)`."""
        return images.unflatten(1, (self.num_frames, self.colours)).transpose(1, 2)
