# SPDX-License-Identifier: Apache-2.0
"""Figures of `evaluate.py`: each function keeps its work in a [`ResultStore`] and returns figures by name."""

import math
from typing import Any

import numpy as np
import torch

from ..data.images import ImageData
from ..data.randomness import epoch_order, make_generator
from .distances import frechet_distance, inception_score, kernel_distance, nearest, precision_and_recall
from .features import FeatureExtractor
from .sampling import SOLVER_CHOICES, Sampler, SolverChoice, straightness, to_bytes, trajectories
from .store import ResultStore


# Names of figures on Inception's features, for which they were made.
INCEPTION_NAMES = {"frechet_distance": "fid", "kernel_distance": "kid", "class_score": "inception_score"}

REFERENCE_TOLERANCE = 1e-6
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)


def batch_of(data: ImageData, numbers: range) -> dict[str, Any]:
    """Batch of samples of a data set, by their numbers, as in the first epoch."""
    return data[np.stack([np.zeros(len(numbers), dtype=np.int64), np.array(numbers)], axis=1)]


def measure_features(
    store: ResultStore, name: str, data: ImageData, extractor: FeatureExtractor, batch_size: int
) -> None:
    """Compute features, logits and labels of a data set, under `name`."""

    def work(numbers: range) -> dict[str, np.ndarray]:
        batch = batch_of(data, numbers)
        features, logits = extractor(batch["images"])
        # A label is that of the image that was read, which may stand in for one that cannot be.
        labels = {} if "labels" not in batch else {"labels": batch["labels"].numpy()}
        return {"features": features, "logits": logits, **labels}

    store.compute(name, len(data), batch_size, work)


def generate(store: ResultStore, name: str, sampler: Sampler, count: int, batch_size: int, **options: Any) -> None:
    """Draw samples 0 to `count - 1` as uint8 `images`, with labels, under `name`."""

    def work(numbers: range) -> dict[str, np.ndarray]:
        labels, images = sampler.labels(numbers), to_bytes(sampler.draw(numbers, **options).images)
        return {"images": images} if labels is None else {"images": images, "labels": np.array(labels)}

    store.compute(name, count, batch_size, work)


def measure_samples(
    store: ResultStore, name: str, samples: str, extractor: FeatureExtractor, count: int, batch_size: int
) -> None:
    """Compute features and logits of what [`generate`] has drawn under `samples`, under `name`."""

    def work(numbers: range) -> dict[str, np.ndarray]:
        images = store.batch(samples, "images", numbers.start // batch_size)
        features, logits = extractor(torch.from_numpy(images))
        return {"features": features, "logits": logits}

    store.compute(name, count, batch_size, work)


def quality(store: ResultStore, samples: str, reference: str, extractor: FeatureExtractor) -> dict[str, float]:
    """
    Distances of samples from data, by the names of their results: on Inception features `fid`, `kid`,
    `inception_score`; on a classifier's the same as `classifier_frechet_distance`, `classifier_kernel_distance`,
    `classifier_class_score`; with either, `precision` and `recall`, and standard deviations as `_std`.
    """
    features, against = store.read(samples, "features"), store.read(reference, "features")
    kernel, kernel_std = kernel_distance(features, against)
    score, score_std = inception_score(store.read(samples, "logits"), num_splits=min(10, len(features)))
    # As many of either, chosen at random: data sets are sorted by class.
    number = min(len(features), len(against))
    some, others = (each[epoch_order(0, 0, len(each))[:number]] for each in (features, against))
    precision, recall = precision_and_recall(some, others)
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


def accuracy(store: ResultStore, name: str, images: str | None = None) -> float:
    """Share of the images that the classifier reads as their labels, which stand with the images or the logits."""
    return float((store.read(name, "logits").argmax(1) == store.read(images or name, "labels")).mean())


def likelihood(
    store: ResultStore,
    sampler: Sampler,
    data: ImageData,
    batch_size: int,
    num_draws: tuple[int, ...] = (1, 5, 20),
    levels: int = 256,
    **options: Any,
) -> dict[str, Any]:
    """
    Bits per dimension of held-out images by uniform dequantisation (arXiv 2210.02747, appendix E.1).

    Args:
        store ([`ResultStore`]), sampler ([`Sampler`]):
            Results, and the model with its seed.
        data ([`ImageData`]):
            Held-out images.
        batch_size (`int`):
            Images at once.
        num_draws (`tuple[int, ...]`, *optional*, defaults to `(1, 5, 20)`):
            Numbers K of draws of the dequantisation noise; smaller ones are the first draws of larger ones.
        levels (`int`, *optional*, defaults to 256):
            Levels of a value, evenly spread over 0 to 255.
        options:
            Arguments of `pipeline.bits_per_dim`.

    Returns:
        `dict[str, Any]`: for each K `bits_per_dim` and its standard error over the images, and `nfe`, the mean number
        of calls for a draw.
    """
    pipeline = sampler.pipeline
    pipeline.denoiser.eval()

    def work(numbers: range) -> dict[str, np.ndarray]:
        batch = batch_of(data, numbers)
        images = (batch["images"].float() * (levels - 1) / 255).round().to(torch.uint8)
        results = [
            pipeline.bits_per_dim(
                images,
                batch.get("labels"),
                levels=levels,
                generator=make_generator(sampler.seed, "dequantisation", numbers.start, draw),
                **options,
            )
            for draw in range(max(num_draws))
        ]
        log_probs, nfe = (torch.stack([getattr(r, name) for r in results], 1) for name in ("log_prob", "nfe"))
        return {"log_probs": log_probs.cpu().numpy(), "nfe": nfe.cpu().numpy()}

    store.compute("likelihood", len(data), batch_size, work)
    log_probs = store.read("likelihood", "log_probs")
    dims = math.prod(pipeline.sample_shape) * math.log(2)
    rows = []
    for draws in num_draws:
        bits = -(np.logaddexp.reduce(log_probs[:, :draws], axis=1) - math.log(draws)) / dims
        error = bits.std(ddof=1) / math.sqrt(len(bits)) if len(bits) > 1 else None
        rows.append({"K": draws, "bits_per_dim": float(bits.mean()), "standard_error": error})
    nfe = float(store.read("likelihood", "nfe").mean())
    return {"by_draws": rows, "images": len(data), "levels": levels, "nfe": nfe}


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
    Error against the exact flow and distance from data of the samples of several solvers from the same noise.

    Args:
        store ([`ResultStore`]), sampler ([`Sampler`]):
            Results, and the model with its seed.
        extractor ([`FeatureExtractor`], *optional*), reference (`str`, *optional*):
            Features, and the name of the data's results; without them there is no distance from data.
        count (`int`), batch_size (`int`):
            Samples of each setting, and samples at once.
        calls (`tuple[int, ...]`):
            Numbers of calls of the network, at most, to sample with.
        choices (`tuple[SolverChoice, ...]`, *optional*, defaults to `SOLVER_CHOICES`):
            The solvers.

    Returns:
        `dict[str, Any]`: `fixed`, a row for each solver and number of calls with `nfe`, `relative_error` (the root
        mean square of the difference from the exact samples, over that of the exact samples) and the Frechet distance;
        and `adaptive`, the same for dopri5 at several tolerances, with the mean `nfe` of an image.
    """

    def adapt(numbers: range, tolerance: float, features: FeatureExtractor | None) -> dict[str, np.ndarray]:
        samples, nfe = sampler.draw_adaptive(numbers, tolerance)
        return _with_features(sampler, samples, nfe, features)

    store.compute("solvers/exact", count, batch_size, lambda numbers: adapt(numbers, REFERENCE_TOLERANCE, None))
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
                output = sampler.draw(numbers, choice.settings, output_type="latent", num_inference_steps=steps)
                return _with_features(sampler, output.images, np.full(len(numbers), output.nfe), extractor)

            store.compute(name, count, batch_size, work)
            rows.append({"solver": choice.name, "nfe": int(store.read(name, "nfe")[0]), **row(name)})
    for tolerance in TOLERANCES:
        name = f"solvers/adaptive-{tolerance:g}"
        store.compute(name, count, batch_size, lambda numbers, rtol=tolerance: adapt(numbers, rtol, extractor))
        nfe = store.read(name, "nfe")
        adaptive.append({"tolerance": tolerance, "nfe": float(nfe.mean()), "nfe_max": int(nfe.max()), **row(name)})
    return {"fixed": rows, "adaptive": adaptive, "samples": count}


def _with_features(
    sampler: Sampler, samples: torch.Tensor, nfe: np.ndarray, extractor: FeatureExtractor | None
) -> dict[str, np.ndarray]:
    results = {"samples": samples.cpu().numpy(), "nfe": nfe}
    if extractor is not None:
        images = to_bytes(sampler.pipeline.to_images(samples, "pt"))
        results["features"] = extractor(torch.from_numpy(images))[0]
    return results


def trajectory_figures(store: ResultStore, sampler: Sampler, count: int, batch_size: int) -> dict[str, Any]:
    """Mean and standard deviation of [`straightness`] over samples, in the path's own coordinates; keeps `points`."""

    def work(numbers: range) -> dict[str, np.ndarray]:
        times, points = trajectories(sampler.pipeline, sampler.noise(numbers), sampler.labels(numbers))
        return {**straightness(times, points), "points": points.swapaxes(0, 1).astype(np.float32)}

    store.compute("trajectories", count, batch_size, work)
    figures = {name: store.read("trajectories", name) for name in ("path_length_ratio", "curvature")}
    means = {name: {"mean": float(values.mean()), "std": float(values.std())} for name, values in figures.items()}
    return {**means, "samples": count}


def neighbours(
    store: ResultStore, samples: str, train_data: ImageData, held_out: ImageData | None, count: int
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """
    Quantiles of the distance from samples, and from held-out images, to the nearest training image: copies would lie
    nearer than held-out images do. Values are in [0, 1]. Also the numbers of the eight nearest samples, and the
    training rows nearest to them.
    """

    def flat(data: ImageData) -> np.ndarray:
        return batch_of(data, range(len(data)))["images"].flatten(1).numpy().astype(np.float32) / 255

    reference = flat(train_data)
    drawn = store.read(samples, "images")[:count]
    distances, rows = nearest(drawn.reshape(len(drawn), -1).astype(np.float32) / 255, reference)
    figures = {"of_samples": _quantiles(distances)}
    if held_out is not None:
        others, _ = nearest(flat(held_out), reference)
        figures["of_held_out"] = _quantiles(others)
        figures["samples_nearer_than_5%_of_held_out"] = float((distances < np.quantile(others, 0.05)).mean())
    closest = np.argsort(distances)[:8]
    return figures, closest, rows[closest]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{part}%": float(np.quantile(values, part / 100)) for part in (5, 50, 95)}
