# SPDX-License-Identifier: Apache-2.0
"""Data: handwritten digits of 8 x 8 pixels, and the checkerboard in the plane."""

from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from torch.nn import functional

from diffusers_fm.data.images import ImageData
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.evaluation.distances import frechet_distance
from diffusers_fm.evaluation.features import FeatureExtractor, classifier_features


ROOT = Path(__file__).parents[1]
LEVELS = 17
TIME_FEATURES = 64


class Perceptron(nn.Module):
    """
    A perceptron of points and times, with residual layers.

    Args:
        dims (`int`):
            Values of a point.
        width (`int`):
            Values of a layer.
        depth (`int`, *optional*, defaults to 3):
            Residual layers.
    """

    def __init__(self, dims: int, width: int, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(dims + TIME_FEATURES, width)
        self.residual = nn.ModuleList(nn.Linear(width + TIME_FEATURES, width) for _ in range(depth))
        self.last = nn.Linear(width, dims)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The answer at points `(batch_size, ...)` and times from 0 to 1000."""
        # Frequencies up to 100: faster ones would only make the field rough in time, and adaptive solvers slow.
        times = get_timestep_embedding(timesteps, TIME_FEATURES, scale=0.1).to(x)
        hidden = self.first(torch.cat([x.flatten(1), times], 1))
        for layer in self.residual:
            hidden = hidden + layer(torch.cat([functional.silu(hidden), times], 1))
        return self.last(functional.silu(hidden)).reshape(x.shape)


class Digits:
    """
    1,500 digits to learn and 297 held out, of 17 levels, scaled to [-1, 1] with uniform dequantisation.

    Args:
        folder (`Path`):
            Where the classifier is kept whose features the samples are compared by.
    """

    name = "digits"
    shape = (1, 8, 8)

    @staticmethod
    def network() -> nn.Module:
        """The same for every objective."""
        return Perceptron(64, 256)

    def __init__(self, folder: Path) -> None:
        self.classifier = folder / "classifier.safetensors"

    @staticmethod
    def load(split: str) -> torch.Tensor:
        """Levels `(num_images, 1, 8, 8)` from 0 to 16, int64."""
        images = datasets.load_dataset(str(ROOT / "data" / "digits"), split=split)["image"]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None]
        return (pixels.float() * (LEVELS - 1) / 255).round().long()

    @cached_property
    def levels(self) -> torch.Tensor:
        """Those to learn."""
        return self.load("train")

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Training images with fresh dequantisation noise, so that there is a density to learn."""
        chosen = self.levels[torch.randint(len(self.levels), (count,), generator=generator)]
        return (chosen + torch.rand(chosen.shape, generator=generator)) * (2 / LEVELS) - 1

    @staticmethod
    def to_pixels(samples: torch.Tensor) -> torch.Tensor:
        """Samples in [-1, 1] as uint8 images of 17 levels, as the data has them."""
        levels = ((samples + 1) * (LEVELS / 2)).floor().clamp(0, LEVELS - 1)
        return (levels * 255 / (LEVELS - 1)).round().to(torch.uint8)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The features of a small classifier, trained on the labels and kept in a file."""
        split = datasets.load_dataset(str(ROOT / "data" / "digits"), split="train")
        data = ImageData(split, ImageTransform(8, 1), label_column="label", num_classes=10)
        return classifier_features(self.classifier, data, 10, torch.device("cpu"))

    @cached_property
    def reference(self) -> np.ndarray:
        """Features of the images to learn."""
        return self.extractor((self.levels * 255 / (LEVELS - 1)).round().to(torch.uint8))[0]

    def distance(self, samples: torch.Tensor) -> float:
        """Frechet distance of samples from the images to learn, on the classifier's features. It is no FID."""
        return frechet_distance(self.extractor(self.to_pixels(samples))[0], self.reference)


class Checkerboard:
    """Points that are spread evenly over the eight dark fields of a board of 4 x 4 fields of side 1."""

    name = "checkerboard"
    shape = (2,)

    @staticmethod
    def network() -> nn.Module:
        """The same for every objective."""
        return Perceptron(2, 192)

    # Cells of the histogram that samples are compared by: sixteen to a field.
    cells = 16

    def __init__(self, folder: Path) -> None:
        del folder

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> torch.Tensor:
        """Points `(count, 2)` in [-2, 2]."""
        column = torch.randint(4, (count,), generator=generator)
        row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
        corner = torch.stack([column, row], 1) - 2
        return corner + torch.rand(count, 2, generator=generator)

    def histogram(self, samples: torch.Tensor) -> np.ndarray:
        """The part of the samples in each cell of the board, `(cells, cells)`; what is outside is in none."""
        points = samples.double().numpy()
        edges = np.linspace(-2, 2, self.cells + 1)
        return np.histogram2d(points[:, 0], points[:, 1], bins=(edges, edges))[0] / len(points)

    def distance(self, samples: torch.Tensor) -> float:
        """Total variation between the histogram of samples and the board, from 0 to 1."""
        field = np.kron((np.add.outer(np.arange(4), np.arange(4)) % 2 == 0), np.ones((self.cells // 4,) * 2))
        found = self.histogram(samples)
        outside = 1 - found.sum()
        return float((np.abs(found - field / field.sum()).sum() + outside) / 2)


PROBLEMS = {problem.name: problem for problem in (Digits, Checkerboard)}
