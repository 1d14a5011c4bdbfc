# SPDX-License-Identifier: Apache-2.0
"""Features by which images are compared: the Inception network's, or those of a small classifier of the data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..arguments import install
from ..data.images import ImageData
from ..data.latents import normalize
from ..data.order import StreamSampler, make_loader
from ..data.randomness import make_generator
from ..files import written_aside


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
MAX_SHIFT = 1


class SmallClassifier(nn.Module):
    """Convolutional classifier of small images: the substitute where no Inception weights are at hand."""

    def __init__(self, channels: int, num_classes: int, num_features: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of images in [-1, 1]."""
        features = self.body(images)
        return features, self.head(features)


def train_classifier(
    data: ImageData, num_classes: int, seed: int = 0, num_steps: int = 1500, batch_size: int = 64
) -> SmallClassifier:
    """Train a [`SmallClassifier`] on the labels of a data set, its images moved by up to a pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = SmallClassifier(data.transform.channels, num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    loader = make_loader(data, StreamSampler(len(data), seed, batch_size, num_steps=num_steps))
    for step, batch in enumerate(tqdm(loader, desc="classifier")):
        down, across = torch.randint(
            -MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=make_generator(seed, "classifier", step)
        ).tolist()
        images = torch.roll(normalize(batch["images"]), (down, across), (-2, -1))
        loss = functional.cross_entropy(model(images)[1], batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@dataclass
class FeatureExtractor:
    """Features and logits by a network on a device; `name`, `"inception"` or `"classifier"`, names the figures."""

    name: str
    network: nn.Module
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Features and logits, float32 with a row for each uint8 image of `(batch_size, channels, height, width)`."""
        images = images.to(self.device)
        if self.name == "inception":
            images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
            features, logits = self.network(images)
        else:
            features, logits = self.network(normalize(images))
        return features.float().cpu().numpy(), logits.float().cpu().numpy()


def find_inception_weights(path: str | None) -> Path:
    """File of Inception weights: `path` where it is given, else torch-fidelity's in torch's cache."""
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"There is no file of Inception weights {path!r}.")
        return Path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not cached.is_file():
        raise ValueError(
            "No Inception weights were found in torch's cache: give their file with --inception_weights, or compare by"
            " the features of a small classifier of this data set with --features classifier."
        )
    return cached


def import_inception() -> Any:
    """torch-fidelity's class of the Inception network; a `ValueError` if it is not installed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ValueError(
            f"torch-fidelity is not installed: Inception features need {install('inception')}."
        ) from error
    return FeatureExtractorInceptionV3


def inception_features(weights: Path, device: torch.device) -> FeatureExtractor:
    """The 2048 features that FID and KID are defined on, by torch-fidelity and its file of weights."""
    network = import_inception()(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    return FeatureExtractor("inception", network.to(device).eval(), device)


def classifier_features(file: Path, data: ImageData, num_classes: int, device: torch.device) -> FeatureExtractor:
    """The 64 features of a classifier in a file of safetensors, which is trained now and written if there is none."""
    if file.is_file():
        network = SmallClassifier(data.transform.channels, num_classes)
        network.load_state_dict(load_file(file))
    else:
        network = train_classifier(data, num_classes)
        with written_aside(file) as aside:
            save_file(network.state_dict(), aside)
    return FeatureExtractor("classifier", network.to(device).eval(), device)
