# SPDX-License-Identifier: Apache-2.0
"""What `evaluate.py` measures: each function does its work through a [`ResultStore`] and returns figures by name."""

import logging
import math
from typing import Any

import numpy as np
import torch

from ..data.images import ImageData
from ..data.randomness import make_generator
from .distances import frechet_distance, inception_score, kernel_distance, nearest, precision_and_recall
from .features import FeatureExtractor
from .sampling import SOLVER_CHOICES, Sampler, SolverChoice, straightness, to_bytes, trajectories
from .store import ResultStore


logger = logging.getLogger(__name__)

# What figures are called when the features are Inception's, for which the names were made.
INCEPTION_NAMES = {"frechet_distance": "fid", "kernel_distance": "kid", "class_score": "inception_score"}

REFERENCE_TOLERANCE = 1e-6
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)


def _rows(numbers: range) -> np.ndarray:
    return np.stack([np.zeros(len(numbers), dtype=np.int64), np.array(numbers)], axis=1)


def measure_features(
    store: ResultStore, name: str, data: ImageData, extractor: FeatureExtractor, count: int, batch_size: int
) -> None:
    """Features and logits of the first `count` images of a data set, under `name`."""

    def work(numbers: range) -> dict[str, np.ndarray]:
        features, logits = extractor(data[_rows(numbers)]["images"])
        return {"features": features, "logits": logits}

    store.compute(name, count, batch_size, work)


def generate(
    store: ResultStore,
    name: str,
    sampler: Sampler,
    extractor: FeatureExtractor | None,
    count: int,
    batch_size: int,
    **options: Any,
) -> None:
    """Samples 0 to `count - 1` as uint8 `images`, and their features and logits, under `name`."""

    def work(numbers: range) -> dict[str, np.ndarray]:
        images = to_bytes(sampler.draw(numbers, **options).images)
        if extractor is None:
            return {"images": images}
        features, logits = extractor(torch.from_numpy(images))
        return {"images": images, "features": features, "logits": logits}

    store.compute(name, count, batch_size, work)


def quality(store: ResultStore, samples: str, reference: str, extractor: FeatureExtractor) -> dict[str, float]:
    """
    Distances of samples from data.

    Args:
        store ([`ResultStore`]):
            With features of both.
        samples (`str`):
            What the samples' results are called.
        reference (`str`):
            What the data's results are called.
        extractor ([`FeatureExtractor`]):
            Whose features they are.

    Returns:
        `dict[str, float]`: on Inception features `fid`, `kid`, `inception_score`; on a classifier's the same as
        `classifier_frechet_distance`, `classifier_kernel_distance`, `classifier_class_score`; with either, `precision`
        and `recall`, and standard deviations as `_std`.
    """
    features, against = store.read(samples, "features"), store.read(reference, "features")
    kernel, kernel_std = kernel_distance(features, against)
    parts = min(10, len(features))
    score, score_std = inception_score(store.read(samples, "logits"), num_splits=parts)
    number = min(len(features), len(against))
    precision, recall = precision_and_recall(features[:number], against[:number])
    figures = {
        "frechet_distance": frechet_distance(features, against),
        "kernel_distance": kernel,
        "kernel_distance_std": kernel_std,
        "class_score": score,
        "class_score_std": score_std,
        "precision": precision,
        "recall": recall,
    }
    return {_figure_name(name, extractor): value for name, value in figures.items()}


def _figure_name(name: str, extractor: FeatureExtractor) -> str:
    for stem, inception in INCEPTION_NAMES.items():
        if name.startswith(stem):
            return name.replace(stem, inception if extractor.name == "inception" else f"classifier_{stem}")
    return name


def accuracy(store: ResultStore, name: str, labels: list[int] | np.ndarray | None) -> float:
    """The part of the images that the classifier reads as their labels."""
    return float((store.read(name, "logits").argmax(1) == np.asarray(labels)).mean())


def likelihood(
    store: ResultStore,
    sampler: Sampler,
    data: ImageData,
    count: int,
    batch_size: int,
    num_draws: tuple[int, ...] = (1, 5, 20),
    levels: int = 256,
    **options: Any,
) -> dict[str, Any]:
    """
    Bits per dimension of held-out images by uniform dequantisation (arXiv 2210.02747, appendix E.1), for several
    numbers K of draws of the dequantisation noise, the smaller ones the first draws of the larger.

    Args:
        store ([`ResultStore`]):
            Where results are kept.
        sampler ([`Sampler`]):
            With the model and the seed.
        data ([`ImageData`]):
            Held-out images.
        count (`int`):
            How many of them.
        batch_size (`int`):
            Images at once.
        num_draws (`tuple[int, ...]`, *optional*, defaults to `(1, 5, 20)`):
            The numbers K.
        levels (`int`, *optional*, defaults to 256):
            Levels of a value; fewer than 256 for images that have only so many, evenly spread over 0 to 255.
        options:
            Arguments of `pipeline.log_likelihood`.

    Returns:
        `dict[str, Any]`: `bits_per_dim`, `bits_per_dim_standard_error` over the images, for each K as a list of
        objects, and `nfe`, the mean number of calls for a draw.
    """
    pipeline = sampler.pipeline
    pipeline.denoiser.eval()

    def work(numbers: range) -> dict[str, np.ndarray]:
        batch = data[_rows(numbers)]
        images = (batch["images"].float() * (levels - 1) / 255).round().to(torch.uint8)
        labels = batch.get("labels")
        log_probs, nfe = [], []
        for draw in range(max(num_draws)):
            result = pipeline.bits_per_dim(
                images,
                labels,
                levels=levels,
                generator=make_generator(sampler.seed, "dequantisation", numbers.start, draw),
                **options,
            )
            log_probs.append(result.log_prob.cpu().numpy())
            nfe.append(result.nfe.cpu().numpy())
        return {"log_probs": np.stack(log_probs, 1), "nfe": np.stack(nfe, 1)}

    store.compute("likelihood", count, batch_size, work)
    log_probs = store.read("likelihood", "log_probs")
    dims = math.prod(pipeline.sample_shape) * math.log(2)
    rows = []
    for draws in num_draws:
        bits = -(np.logaddexp.reduce(log_probs[:, :draws], axis=1) - math.log(draws)) / dims
        error = bits.std(ddof=1) / math.sqrt(len(bits)) if len(bits) > 1 else None
        rows.append({"K": draws, "bits_per_dim": float(bits.mean()), "standard_error": error})
    return {"by_draws": rows, "images": count, "levels": levels, "nfe": float(store.read("likelihood", "nfe").mean())}


def solvers(
    store: ResultStore,
    sampler: Sampler,
    extractor: FeatureExtractor | None,
    reference: str | None,
    count: int,
    batch_size: int,
    calls: tuple[int, ...],
    choices: tuple[SolverChoice, ...] = SOLVER_CHOICES,
) -> dict[str, Any]:
    """
    What solvers make of the same noise: the error against the exact flow, and the quality, by the calls they take.

    Args:
        store ([`ResultStore`]):
            Where results are kept.
        sampler ([`Sampler`]):
            Draws the samples.
        extractor ([`FeatureExtractor`], *optional*):
            For the distance from data; without it there is none.
        reference (`str`, *optional*):
            What the data's features are called.
        count (`int`):
            Samples of each setting.
        batch_size (`int`):
            Samples at once.
        calls (`tuple[int, ...]`):
            Numbers of calls of the network, at most, to sample with.
        choices (`tuple[SolverChoice, ...]`, *optional*, defaults to `SOLVER_CHOICES`):
            The solvers.

    Returns:
        `dict[str, Any]`: `fixed`, a row for each solver and number of calls with `nfe`, `relative_error` (the root
        mean square of the difference from the exact samples, over that of the exact samples) and the Frechet distance;
        and `adaptive`, the same for dopri5 at several tolerances, with the mean `nfe` of an image.
    """
    device = sampler.pipeline._execution_device

    def exact(numbers: range) -> dict[str, np.ndarray]:
        return _adaptive(sampler, numbers, REFERENCE_TOLERANCE, device)

    store.compute("solvers/exact", count, batch_size, exact)
    truth = store.read("solvers/exact", "samples")
    norm = math.sqrt(float(np.square(truth).mean()))
    rows, adaptive = [], []

    def row(name: str) -> dict[str, float]:
        difference = store.read(name, "samples") - truth
        figures = {"relative_error": math.sqrt(float(np.square(difference).mean())) / norm}
        if extractor is not None and reference is not None:
            distance = frechet_distance(store.read(name, "features"), store.read(reference, "features"))
            figures[_figure_name("frechet_distance", extractor)] = distance
        return figures

    for choice in choices:
        for limit in calls:
            steps = limit // choice.calls
            if steps < 1:
                continue
            name = f"solvers/{choice.name.replace(' ', '-')}-{limit}"

            def work(numbers: range, choice: SolverChoice = choice, steps: int = steps) -> dict[str, np.ndarray]:
                settings = {
                    "solver": choice.solver,
                    "sampling_path": choice.sampling_path,
                    "timestep_spacing": choice.timestep_spacing,
                }
                output = sampler.draw(numbers, settings, output_type="latent", num_inference_steps=steps)
                return _with_features(sampler, output.images, np.full(len(numbers), output.nfe), extractor)

            store.compute(name, count, batch_size, work)
            nfe = int(store.read(name, "nfe")[0])
            rows.append({"solver": choice.name, "nfe": nfe, **row(name)})
    for tolerance in TOLERANCES:
        name = f"solvers/adaptive-{tolerance:g}"

        def adapt(numbers: range, tolerance: float = tolerance) -> dict[str, np.ndarray]:
            return _adaptive(sampler, numbers, tolerance, device, extractor)

        store.compute(name, count, batch_size, adapt)
        nfe = store.read(name, "nfe")
        adaptive.append({"tolerance": tolerance, "nfe": float(nfe.mean()), "nfe_max": int(nfe.max()), **row(name)})
    return {"fixed": rows, "adaptive": adaptive, "samples": count}


def _adaptive(
    sampler: Sampler,
    numbers: range,
    tolerance: float,
    device: torch.device,
    extractor: FeatureExtractor | None = None,
) -> dict[str, np.ndarray]:
    """Samples by dopri5, each with its own steps, and the calls of each."""
    pipeline = sampler.pipeline
    labels = sampler.labels(numbers)
    solution = pipeline.transport(
        sampler.noise(numbers).to(device) * pipeline.scheduler.init_noise_sigma,
        1.0,
        0.0,
        () if labels is None else (torch.tensor(labels, device=device),),
        guidance_scale=sampler.guidance_scale,
        method="dopri5",
        num_steps=None,
        rtol=tolerance,
        atol=tolerance,
        step_control="per_sample",
    )
    return _with_features(sampler, solution.x.float(), solution.evaluations.cpu().numpy(), extractor)


def _with_features(
    sampler: Sampler, samples: torch.Tensor, nfe: np.ndarray, extractor: FeatureExtractor | None
) -> dict[str, np.ndarray]:
    results = {"samples": samples.cpu().numpy(), "nfe": nfe}
    if extractor is not None:
        images = to_bytes(sampler.pipeline.to_images(samples, "pt"))
        results["features"] = extractor(torch.from_numpy(images))[0]
    return results


def ways(store: ResultStore, sampler: Sampler, count: int, batch_size: int) -> dict[str, Any]:
    """
    How straight the ways from noise to data are, in the path's own coordinates.

    Args:
        store ([`ResultStore`]):
            Where results are kept; `points` of the ways are among them.
        sampler ([`Sampler`]):
            Gives noise and labels.
        count (`int`):
            Number of ways.
        batch_size (`int`):
            Ways at once.

    Returns:
        `dict[str, Any]`: the means and standard deviations over the samples of [`straightness`]'s figures.
    """

    def work(numbers: range) -> dict[str, np.ndarray]:
        times, points = trajectories(sampler.pipeline, sampler.noise(numbers), sampler.labels(numbers))
        figures = straightness(times, points)
        return {**figures, "points": points.swapaxes(0, 1).astype(np.float32)}

    store.compute("ways", count, batch_size, work)
    figures = {name: store.read("ways", name) for name in ("path_length_ratio", "curvature")}
    return {name: {"mean": float(values.mean()), "std": float(values.std())} for name, values in figures.items()} | {
        "samples": count
    }


def neighbours(
    store: ResultStore, samples: str, train_data: ImageData, held_out: ImageData | None, count: int
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """
    Are samples copies? Distances between images with values in [0, 1], from each sample to the nearest training image,
    beside those of held-out images: copies would lie nearer than held-out images do.

    Args:
        store ([`ResultStore`]):
            With the samples' `images`.
        samples (`str`):
            What they are called.
        train_data ([`ImageData`]):
            What the model was trained on.
        held_out ([`ImageData`], *optional*):
            What it was not trained on.
        count (`int`):
            Samples to look at.

    Returns:
        `tuple`: figures; the numbers of the eight nearest samples; and the training rows nearest to them.
    """
    reference = train_data[_rows(range(len(train_data)))]["images"].flatten(1).numpy().astype(np.float32) / 255
    drawn = store.read(samples, "images")[:count]
    distances, rows = nearest(drawn.reshape(len(drawn), -1).astype(np.float32) / 255, reference)
    figures = {"of_samples": _quantiles(distances)}
    if held_out is not None:
        images = held_out[_rows(range(len(held_out)))]["images"].flatten(1).numpy().astype(np.float32) / 255
        beside, _ = nearest(images, reference)
        figures["of_held_out"] = _quantiles(beside)
        figures["samples_nearer_than_5%_of_held_out"] = float((distances < np.quantile(beside, 0.05)).mean())
    closest = np.argsort(distances)[:8]
    return figures, closest, rows[closest]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{part}%": float(np.quantile(values, part / 100)) for part in (5, 50, 95)}
