# SPDX-License-Identifier: Apache-2.0
"""Evaluation: distances against independent formulas and closed forms; figures do not depend on how work is shared."""

import csv
import io
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import torch
from helpers import gaussian
from processes import check_processes
from tiny_pipelines import tiny_dit, tiny_pipeline
from tiny_text_to_image import save_colours, tiny_stable_diffusion_3
from training_runs import ROOT, load_script, make_dataset, run_script

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler, StockFlow
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.latents import normalize
from diffusers_fm.data.randomness import make_generator
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.evaluation import measures
from diffusers_fm.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_and_recall,
)
from diffusers_fm.evaluation.features import find_inception_weights, train_classifier
from diffusers_fm.evaluation.measures import batch_of, likelihood
from diffusers_fm.evaluation.report import flat_rows
from diffusers_fm.evaluation.sampling import Sampler, straightness, trajectories
from diffusers_fm.evaluation.stock import StockModel, StockSampler
from diffusers_fm.evaluation.store import ResultStore
from diffusers_fm.likelihood import bits_per_dim
from diffusers_fm.paths import OTPath


SCRIPT = ROOT / "training_scripts" / "evaluate.py"
SOUNDS = SCRIPT.parents[1] / "pipelines" / "unet-spoken-digits"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Distances


def test_frechet_distance_is_that_of_the_definition(rng: np.random.Generator) -> None:
    x = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 1.0
    y = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_distance(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_few_images(rng: np.random.Generator) -> None:
    # Fewer images than features: the images' own plane is all there is. tr (A B)^(1/2) is then the sum of the singular
    # values of the product of the centred images, up to their numbers.
    x, y = rng.normal(size=(10, 40)), rng.normal(size=(15, 40)) + 1
    a, b = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum() / math.sqrt(9 * 14)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() / 9 + np.square(b).sum() / 14 - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_normals(rng: np.random.Generator) -> None:
    # Whitened points have exactly the mean 0 and the covariance 1: N(m, s^2) against N(0, 1) is |m|^2 + d (s - 1)^2.
    x = rng.normal(size=(500, 8))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    assert frechet_distance(3 * x + 0.5, x) == pytest.approx(8 * 0.25 + 8 * 4, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_that_of_the_definition(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(120, 6)), rng.normal(size=(120, 6)) + 0.7

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (n * (n - 1)) for z in (x, y)]
    expected = sum(within) - 2 * kernel(x, y).mean()
    # A subset of all images is all images, in any order.
    mean, deviation = kernel_distance(x, y, subset_size=1000, num_subsets=3)
    assert mean == pytest.approx(expected, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, y, subset_size=50, seed=1) == kernel_distance(x, y, subset_size=50, seed=1)
    assert kernel_distance(x, y, subset_size=50, seed=1) != kernel_distance(x, y, subset_size=50, seed=2)


def test_inception_score_of_known_answers() -> None:
    # Certain and evenly spread answers score the number of classes; the same answer for all scores 1.
    certain = 100.0 * np.eye(5)[np.arange(1000) % 5]
    assert inception_score(certain, num_splits=1)[0] == pytest.approx(5, rel=1e-6)
    assert inception_score(np.tile(certain[:1], (1000, 1)))[0] == pytest.approx(1, rel=1e-6)


def test_precision_and_recall_of_known_sets(rng: np.random.Generator) -> None:
    data = rng.normal(size=(400, 2))
    assert precision_and_recall(data, data) == (1.0, 1.0)
    assert precision_and_recall(data + 100, data) == (0.0, 0.0)
    # Samples of one half of the data: all of them are good, and half of the data is missed.
    halves = np.concatenate([data[:200] - 50, data[200:] + 50])
    precision, recall = precision_and_recall(halves[:200] + 1e-9, halves)
    assert precision == 1.0
    assert recall == pytest.approx(0.5, abs=0.01)


def test_data_that_are_sorted_by_class_have_the_figures_of_shuffled_ones(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    def save(name: str, labels: np.ndarray) -> None:
        features = rng.normal(size=(len(labels), 4)) + 8 * np.eye(4)[labels]
        store.compute(name, len(labels), len(labels), lambda numbers: {"features": features, "logits": features})

    store, classes = ResultStore(tmp_path, fake_accelerator(), {}), np.repeat(np.arange(4), 100)
    save("samples", rng.permutation(classes)[:100])
    save("data", classes)
    found = measures.quality(store, "samples", "data", SimpleNamespace(name="classifier"))
    # Of samples and data of one distribution; the first hundred of the data are of one class.
    assert min(found["precision"], found["recall"]) > 0.6


def test_nearest_finds_the_nearest(rng: np.random.Generator) -> None:
    reference = rng.normal(size=(50, 7)).astype(np.float32)
    rows = rng.permutation(50)
    distances, found = nearest(reference[rows] + 1e-3, reference, block=16)
    assert (found == rows).all()
    assert distances == pytest.approx(math.sqrt(7) * 1e-3, rel=1e-2)


def test_sets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equally many features, got shapes \(4, 2\) and \(4, 3\)"):
        frechet_distance(np.zeros((4, 2)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="At least 4 images of each kind are needed, got 3 and 5"):
        precision_and_recall(np.zeros((3, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="no file of Inception weights 'nowhere.pth'"):
        find_inception_weights("nowhere.pth")


# Trajectories


def mild_pipeline(**scheduler: object) -> FlowMatchPipeline:
    """A random network of small velocities, which adaptive solvers follow in few steps."""
    pipeline = tiny_pipeline("unet-classes", **scheduler)
    with torch.no_grad():
        for parameter in pipeline.unet.conv_out.parameters():
            parameter.mul_(0.05)
    return pipeline


def test_straightness_of_known_trajectories() -> None:
    times = np.linspace(1, 0, 1001)
    line = times[:, None, None] * np.ones((1, 2, 3))
    figures = straightness(times, line)
    assert figures["path_length_ratio"] == pytest.approx(1)
    assert figures["curvature"] == pytest.approx(0, abs=1e-9)
    # A half circle at constant speed: length pi/2 of the diameter, and with |v| = pi/2 |mean v| a curvature of
    # (pi/2)^2 - 1. Chords are shorter than arcs by parts in a million.
    circle = np.stack([np.cos(np.pi * times), np.sin(np.pi * times)], -1)[:, None]
    figures = straightness(times, circle)
    assert figures["path_length_ratio"] == pytest.approx(math.pi / 2, rel=1e-5)
    assert figures["curvature"] == pytest.approx((math.pi / 2) ** 2 - 1, rel=1e-4)
    # Straight, but not at constant speed: x = t^2 has v = 2 t, and the mean of (2 t - 1)^2 is 1/3.
    figures = straightness(times, (times**2)[:, None, None])
    assert figures["path_length_ratio"] == pytest.approx(1)
    assert figures["curvature"] == pytest.approx(1 / 3, rel=1e-4)


@pytest.mark.parametrize("path", ["ot", "vp", "ve"])
def test_trajectories_end_where_sampling_ends(path: str) -> None:
    pipeline = mild_pipeline(path=path)
    sampler = Sampler(pipeline, np.array([1, 3]), seed=5)
    times, points = trajectories(pipeline, sampler.noise(range(2)), [1, 3], num_points=5, steps_between=8)
    assert (times[0], times[-1]) == (1.0, 0.0)
    exact = sampler.draw(range(2), output_type="latent", solver="dopri5").images
    assert torch.allclose(torch.from_numpy(points[-1]).float(), exact.flatten(1), atol=2e-3)


def test_samples_depend_on_their_number_alone() -> None:
    sampler = Sampler(tiny_pipeline("unet-classes"), np.array([0, 1, 2]), seed=3)
    together = sampler.draw(range(5), num_inference_steps=3).images
    apart = torch.cat([sampler.draw(range(i, i + 1), num_inference_steps=3).images for i in range(5)])
    assert torch.allclose(together, apart, atol=1e-6)
    assert sampler.labels(range(5)) == [0, 1, 2, 0, 1]
    other = Sampler(tiny_pipeline("unet-classes"), np.array([0, 1, 2]), seed=4)
    assert not torch.allclose(other.draw(range(5), num_inference_steps=3).images, together, atol=1e-2)


# Likelihood


@pytest.mark.parametrize(("levels", "grey"), [(2, False), (17, False), (256, False), (3, True), (17, True)])
def test_levels_are_those_that_training_sees(tmp_path: Path, levels: int, grey: bool) -> None:
    """With a velocity of zero the density of the data is that of the noise: bits per dimension are known."""
    pipeline = tiny_pipeline("unet")
    with torch.no_grad():
        for parameter in pipeline.unet.conv_out.parameters():
            parameter.zero_()
    # Black and white are -1 and 1 in training, and the level in the middle of an odd number of them is 0.
    images = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("grey" if grey else "black", "white")] * 8
    images = images[::2] * 2 if grey else images
    rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    data = ImageData(rows, ImageTransform(8, pipeline.image_channels, center_crop=True))
    batch = data[np.stack([np.zeros(16, dtype=int), np.arange(16)], axis=1)]["images"]
    assert normalize(batch).unique().tolist() == pytest.approx([0.0] if grey else [-1.0, 1.0], abs=0.51 / 127.5)
    store = ResultStore(tmp_path, fake_accelerator(), {})
    figures = likelihood(store, Sampler(pipeline, None), data, 8, (1,), levels, num_steps=2)
    # x = m + e, with e uniform over a level of width h: E x^2 = m^2 + h^2 / 12 and Var x^2 = m^2 h^2 / 3 + h^4 / 180.
    h, square = 2 / (levels - 1), 0 if grey else 1
    expected = (0.5 * math.log(2 * math.pi) + (square + h**2 / 12) / 2 - math.log(h)) / math.log(2)
    deviation = math.sqrt(square * h**2 / 3 + h**4 / 180) / 2 / math.sqrt(batch.numel()) / math.log(2)
    assert abs(figures["by_draws"][0]["bits_per_dim"] - expected) < 4 * deviation + 1e-6


def test_many_draws_give_the_probability_of_a_level_between_the_ends() -> None:
    # One dimension, five levels at -1, -1/2, ..., 1: the probability of a level is a difference of error functions.
    path, problem = OTPath(), gaussian((1,), mean=0.1, std=0.5)
    edges = (torch.arange(6, dtype=torch.float64) - 0.5) / 2 - 1
    cumulated = torch.special.ndtr((edges - 0.1) / 0.5)
    exact = (cumulated[1:] - cumulated[:-1]).log()
    result = bits_per_dim(
        problem.model(path),
        torch.arange(5)[:, None],
        path,
        num_samples=150,
        levels=5,
        spacing=0.5,
        dtype=torch.float64,
        num_steps=16,
        generator=torch.Generator().manual_seed(0),
    )
    # Over a level the density changes by a factor of at most e^2.3: its deviation is at most .65 of its mean.
    assert (result.log_prob - exact).abs().max() < 4 * 0.65 / math.sqrt(150)


# Results


def fake_accelerator(process_index: int = 0, num_processes: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        process_index=process_index,
        num_processes=num_processes,
        is_main_process=process_index == 0,
        wait_for_everyone=lambda: None,
        main_process_first=nullcontext,
    )


def test_results_are_kept_shared_and_in_order(tmp_path: Path) -> None:
    calls: list[int] = []

    def work(numbers: range) -> dict[str, np.ndarray]:
        calls.append(numbers.start)
        if numbers.start == 6 and len(calls) == 3:
            raise KeyboardInterrupt
        return {"squares": np.array(numbers) ** 2}

    store = ResultStore(tmp_path / "one", fake_accelerator(), {"seed": 0})
    with pytest.raises(KeyboardInterrupt):
        store.compute("some", 11, 3, work)
    ResultStore(tmp_path / "one", fake_accelerator(), {"seed": 0}).compute("some", 11, 3, work)
    # What was done is not done again.
    assert calls == [0, 3, 6, 6, 9]
    # What a killed process was writing is no result.
    (tmp_path / "one" / "some" / ".partial-1-000002.npz").write_bytes(b"half")
    assert (store.read("some", "squares") == np.arange(11) ** 2).all()
    (tmp_path / "one" / "some" / ".partial-1-000002.npz").unlink()

    # Two processes, one after the other, leave the same files.
    for process in (0, 1):
        shared = ResultStore(tmp_path / "two", fake_accelerator(process, 2), {"seed": 0})
        shared.compute("some", 11, 3, lambda numbers: {"squares": np.array(numbers) ** 2})
    for file in (tmp_path / "one").rglob("*.npz"):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    assert not list(tmp_path.rglob(".partial*"))
    with pytest.raises(ValueError, match=r"another evaluation \(seed was 0 and is 1\): choose another --output_dir"):
        ResultStore(tmp_path / "one", fake_accelerator(), {"seed": 1})


# The script


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random transformer, whose calls are quick, of small velocities."""
    folder = tmp_path_factory.mktemp("model")
    transformer = tiny_dit(in_channels=1, num_layers=1)
    with torch.no_grad():
        for parameter in transformer.proj_out_2.parameters():
            parameter.mul_(0.05)
    FlowMatchPipeline(scheduler=FlowMatchScheduler(), transformer=transformer).save_pretrained(folder)
    return folder


def test_labels_are_matched_by_name_with_those_of_the_model(model: Path, tmp_path: Path) -> None:
    pipeline = FlowMatchPipeline.from_pretrained(model)
    pipeline.register_to_config(id2label={str(label): name for label, name in enumerate("abcde")})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("edcba"))})
    rows = {"image": [PIL.Image.new("L", (8, 8), level) for level in range(5)], "label": [0, 1, 2, 3, 4]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    script = load_script(SCRIPT)
    args = script.ScriptArguments(
        pretrained_model_name_or_path=str(model), dataset_name=str(tmp_path), output_dir="x", features="classifier"
    )
    images, _, num_classes = script.load_data(args, 8, 1, pipeline)
    assert num_classes == 5
    assert images.labels.tolist() == [4, 3, 2, 1, 0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), num_train=40, num_test=12)


def command_line(model: Path, data: Path, output_dir: Path, **options: object) -> list[str]:
    values = {
        "pretrained_model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output_dir,
        "features": "classifier",
        "eval_batch_size": 8,
        "num_images": 20,
        "num_inference_steps": 3,
        "num_solver_images": 12,
        "num_calls": 6,
        "num_draws": 2,
        "likelihood_steps": 6,
        **options,
    }
    line = ["--use_cpu"]
    for name, value in values.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def train_classifier_briefly() -> None:
    """Steps of the classifier of features that are enough to tell images from noise."""
    train_classifier.__defaults__ = (0, 100, 64)


def test_two_processes_find_the_figures_of_one(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_classifier, "__defaults__", train_classifier.__defaults__)
    train_classifier_briefly()
    script = load_script(SCRIPT)
    run_script(script, command_line(model, data, tmp_path / "one"))
    # The classifier is trained in either run; the weights differ by rounding if threads do.
    line = command_line(model, data, tmp_path / "two")
    check_processes(SCRIPT, line, 2, train_classifier_briefly)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    rows, others = ({row["metric"]: row["value"] for row in flat_rows(metrics)} for metrics in (one, two))
    assert rows.keys() == others.keys()
    for name, value in rows.items():
        assert others[name] == (pytest.approx(value, rel=1e-5, abs=1e-7) if isinstance(value, float) else value), name
    for key in ("fixed", "adaptive"):
        for row, other in zip(one["solvers"][key], two["solvers"][key], strict=True):
            assert other.pop("solver", None) == row.pop("solver", None)
            assert other == pytest.approx(row, rel=1e-4, abs=1e-6)

    assert rows["quality/features"] == "classifier"
    # The name of the distance on Inception features is kept for it.
    assert not any("fid" in name for name in rows)
    assert rows["quality/classifier_frechet_distance"] > rows["quality_of_held_out_images/classifier_frechet_distance"]
    assert 0 <= rows["quality/read_as_asked"] <= 1
    assert [row["K"] for row in one["likelihood"]["by_draws"]] == [2]
    assert {row["nfe"] for row in one["solvers"]["fixed"]} <= {4, 6}
    calls, errors = zip(*((row["nfe"], row["relative_error"]) for row in one["solvers"]["adaptive"]))
    assert list(calls) == sorted(calls)
    # The field of a network with small velocities is nearly constant: every solver is near the truth.
    assert max(errors) < 1e-2
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files >= {
        "metrics.json", "metrics.csv", "solvers.csv", "likelihood.csv", "samples.png", "nearest.png",
        "trajectories.png", "error_by_calls.png", "quality_by_calls.png", "loss_by_time.png",
    }  # fmt: skip
    with (tmp_path / "one" / "metrics.csv").open() as lines:
        assert {row["metric"] for row in csv.DictReader(lines)} == rows.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "--num_images must be at least 1, got 0"),
        ({"num_calls": [4, 0]}, r"--num_calls must be at least 1, got \[4, 0\]"),
        ({"levels": 1}, "--levels must be from 2 to 256, got 1"),
        ({"num_images": 3}, "--num_images must be at least 4 for these --metrics, got 3"),
        ({"max_validation_samples": 2}, "--max_validation_samples must be at least 4 for these --metrics, got 2"),
        ({"num_solver_images": 1}, "--num_solver_images must be at least 2 for these --metrics, got 1"),
        ({"guidance_scale": "nan"}, "--guidance_scale must be .*, got nan"),
        ({"guidance_scale": "inf"}, "--guidance_scale must be .*, got inf"),
        ({"train_data_dir": "images"}, "Exactly one of --dataset_name and --train_data_dir must be given, got both"),
        ({"features": "inception"}, "No Inception weights were found"),
        ({"features": "inception", "inception_weights": "x.pth"}, "no file of Inception weights 'x.pth'"),
        ({"validation_split": "dev"}, "no split 'dev'"),
        ({"label_column": "kind"}, "no label column 'kind'"),
        ({"pretrained_model_name_or_path": SOUNDS}, "holds a FlowMatchAudioPipeline, which draws sounds"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(
    model: Path, data: Path, tmp_path: Path, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    # Of the model and the data nothing is needed to refuse a value.
    if not {"validation_split", "label_column"} & set(options):
        model = data = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=message):
        run_script(load_script(SCRIPT), command_line(model, data, tmp_path / "out", **options))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_images_that_cannot_be_read_do_not_end_an_evaluation(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, odd in {"train": b"no image", "test": b"\x89PNG\r\n"}.items():
        rows = []
        for _ in range(6):
            buffer = io.BytesIO()
            PIL.Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            rows.append(buffer.getvalue())
        images = [{"bytes": row, "path": None} for row in [*rows, odd]]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=5)})
        (tmp_path / "data").mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 3, 4, 0, 1]}, features)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    options = {"metrics": ["loss", "neighbours"], "num_images": 4, "num_inference_steps": 2}
    for limit in (0, 1):
        line = command_line(model, tmp_path / "data", tmp_path / "out", **options, max_unreadable_images=limit)
        with nullcontext() if limit else pytest.raises(ValueError, match="cannot be read"):
            run_script(load_script(SCRIPT), line)
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert math.isfinite(figures["loss"]["validation_loss"])
    assert figures["dataset_name"] == "data"


def test_samples_that_are_there_are_measured(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_classifier, "__defaults__", (0, 2, 8))
    run_script(load_script(SCRIPT), command_line(model, data, tmp_path, metrics="neighbours"))
    monkeypatch.setattr(Sampler, "draw", None)
    run_script(load_script(SCRIPT), command_line(model, data, tmp_path, metrics="quality"))
    figures = json.loads((tmp_path / "metrics.json").read_text())["quality"]
    assert math.isfinite(figures["classifier_frechet_distance"])
    assert 0 <= figures["read_as_asked"] <= 1


def test_of_a_flow_map_the_flow_within_it_is_measured(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "TOLERANCES", (1e-2,))
    monkeypatch.setattr(measures, "REFERENCE_TOLERANCE", 1e-3)
    pipeline = FlowMatchPipeline.from_pretrained(model)
    shared = {"flow_shift": 1.0, "num_inference_steps": 2}
    pipeline.scheduler = FlowMatchScheduler(solver="flow_map", shift=0.5, flow_map=shared)
    pipeline.save_pretrained(tmp_path / "map")
    options = {"metrics": ["likelihood", "solvers", "trajectories"], "features": "none", "num_solver_images": 2}
    options |= {"max_validation_samples": 4, "num_draws": 1, "likelihood_steps": 2}
    figures = []
    for folder in (model, tmp_path / "map"):
        run_script(load_script(SCRIPT), command_line(folder, data, tmp_path / "out" / folder.name, **options))
        figures.append(json.loads((tmp_path / "out" / folder.name / "metrics.json").read_text()))
    assert figures[0] == figures[1] | {"model": figures[0]["model"]}


def test_samples_are_in_the_precision_that_is_asked_for(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions, draw = [], Sampler.draw

    def watched(*words: object, **options: object) -> object:
        precisions.append(torch.is_autocast_enabled("cpu"))
        return draw(*words, **options)

    monkeypatch.setattr(Sampler, "draw", watched)
    options = {"metrics": "neighbours", "num_images": 8, "num_inference_steps": 1}
    run_script(load_script(SCRIPT), command_line(model, data, tmp_path / "out", **options, mixed_precision="bf16"))
    assert precisions == [True]
    with pytest.raises(ValueError, match=r"another evaluation \(mixed_precision was bf16 and is None\)"):
        run_script(load_script(SCRIPT), command_line(model, data, tmp_path / "out", **options))


# Stock pipelines


def test_samples_of_a_stock_pipeline_are_its_own() -> None:
    pipeline = tiny_stable_diffusion_3()
    pipeline.set_progress_bar_config(disable=True)
    prompts, call = ["a red square", "blue"], {"height": 16, "width": 16}
    model = StockModel(StockFlow(pipeline, max_sequence_length=16), prompts, call)
    for scale in (1.0, 3.0):
        sampler = StockSampler(model, seed=4, guidance_scale=scale)
        drawn = sampler.draw(range(2), num_inference_steps=3)
        options = {"num_inference_steps": 3, "guidance_scale": scale, "max_sequence_length": 16}
        expected = pipeline(prompts, latents=sampler.noise(range(2)), output_type="latent", **call, **options).images
        assert drawn.nfe == 3
        # In float32 at a scale of 3, over three steps.
        torch.testing.assert_close(drawn.images, expected, atol=2e-5, rtol=0)


def test_a_stock_pipeline_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tolerances that take few calls, which Euler's errors of some per cent do not need.
    monkeypatch.setattr(measures, "TOLERANCES", (1e-2,))
    monkeypatch.setattr(measures, "REFERENCE_TOLERANCE", 1e-3)
    pipeline, data = tiny_stable_diffusion_3(num_layers=1), save_colours(tmp_path / "data")
    pipeline.save_pretrained(tmp_path / "model")
    options = {"features": "none", "num_solver_images": 2, "num_calls": [2, 8], "likelihood_steps": 2}
    options |= {"max_validation_samples": 3, "metrics": ["likelihood", "solvers", "trajectories", "loss"]}
    line = command_line(tmp_path / "model", data, tmp_path / "out", **options, resolution=16)
    run_script(load_script(SCRIPT), line)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = {(row["solver"], row["nfe"]): row["relative_error"] for row in metrics["solvers"]["fixed"]}
    assert rows["euler ot trailing", 8] < rows["euler ot trailing", 2]
    assert metrics["trajectories"]["path_length_ratio"]["mean"] >= 1
    images = ImageData(
        datasets.load_dataset(str(data), split="test"), ImageTransform(16, 3), caption_column="text", max_samples=3
    )
    held_out = batch_of(images, range(3))
    flow = StockFlow(pipeline)
    probes = make_generator(0, "likelihood", 0)
    density = flow.log_likelihood(
        held_out["images"].float() / 255, held_out["captions"], num_steps=2, num_probes=1, generator=probes
    )
    expected = density.log_prob.mean().item() / (4 * 8 * 8)
    assert metrics["latent_likelihood"]["nats_per_dim"] == pytest.approx(expected, rel=1e-6)
    assert metrics["loss"]["validation_loss"] > 0
    assert (tmp_path / "out" / "error_by_calls.png").exists()
    # Of a flow map the flow within it is measured.
    shift = pipeline.scheduler.config.shift
    pipeline.scheduler = FlowMatchScheduler(solver="flow_map", shift=0.5, flow_map={"flow_shift": shift})
    pipeline.save_pretrained(tmp_path / "map")
    changed = options | {"metrics": "trajectories", "resolution": 16}
    run_script(load_script(SCRIPT), command_line(tmp_path / "map", data, tmp_path / "of-map", **changed))
    of_map = json.loads((tmp_path / "of-map" / "metrics.json").read_text())
    assert of_map["trajectories"] == metrics["trajectories"]
    line = command_line(tmp_path / "model", data, tmp_path / "no", **options | {"metrics": "neighbours"})
    with pytest.raises(ValueError, match="Of the stock StableDiffusion3Pipeline --metrics can be .*, got neighbours"):
        run_script(load_script(SCRIPT), line)
