# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[evaluate]"]
# ///
r"""Measure a trained flow matching model: quality, likelihood, error against calls, straightness, memorisation.

A pipeline folder or Hub id and a data set go in; figures as JSON and CSV, plots, and pictures come out.

The digits, about five minutes on two CPU cores:

    accelerate launch training_scripts/evaluate.py \
      --pretrained_model_name_or_path runs/unet-digits --dataset_name data/digits \
      --output_dir runs/unet-digits/evaluation --features classifier --num_images 2000 --levels 17

A stock text-to-image pipeline of diffusers on captioned images, through its own call:

    accelerate launch training_scripts/evaluate.py \
      --pretrained_model_name_or_path runs/flux-tiny --dataset_name data/digits --resolution 8 \
      --output_dir runs/flux-tiny/evaluation --metrics solvers trajectories likelihood loss --features none

FID, KID, precision and recall of a model of photographs, on four GPUs:

    accelerate launch --multi_gpu --num_processes 4 training_scripts/evaluate.py \
      --pretrained_model_name_or_path runs/unet-imagenet64 --train_data_dir /data/imagenet/train \
      --output_dir evaluation --metrics quality --num_images 50000 --eval_batch_size 250

Interrupted, the same command goes on where it was. Every sample has a seed of its own, and figures depend neither on
the number of processes nor, but for rounding, on the batch size. Only the likelihood draws its noise and probes for a
batch: another --eval_batch_size gives another estimate of it.
"""

import copy
import logging
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from diffusers_fm import FlowMatchAudioPipeline, FlowMatchPipeline, StockFlow
from diffusers_fm.arguments import Arguments, Count, Free, ModuleArguments, NotNegative, Size, option, run_script
from diffusers_fm.data.arguments import rgb
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.loading import matched_by_name
from diffusers_fm.data.randomness import epoch_order
from diffusers_fm.data.sources import choose_split, data_folders, held_out_split_name, load_splits
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.evaluation.distances import import_torchmetrics
from diffusers_fm.evaluation.features import (
    FeatureExtractor,
    classifier_features,
    find_inception_weights,
    import_inception,
    inception_features,
)
from diffusers_fm.evaluation.measures import (
    accuracy,
    generate,
    likelihood,
    measure_features,
    measure_samples,
    neighbours,
    quality,
    solvers,
    trajectory_figures,
)
from diffusers_fm.evaluation.report import (
    flat_rows,
    picture_grid,
    plot_loss_by_time,
    plot_solvers,
    plot_trajectories,
    pyplot,
    write_metrics,
    write_table,
)
from diffusers_fm.evaluation.sampling import ModelArguments, Sampler
from diffusers_fm.evaluation.stock import StockModel, StockSampler, latent_likelihood
from diffusers_fm.evaluation.store import ResultStore
from diffusers_fm.files import checksum
from diffusers_fm.hub.portable import last_part
from diffusers_fm.objectives.flow_matching import TrainableModel
from diffusers_fm.pipelines.sampling import default_steps
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.training.distributed import make_accelerator
from diffusers_fm.training.validation import data_and_labels, held_out_loss


logger = logging.getLogger("diffusers_fm.evaluate")

METRICS = ("quality", "likelihood", "solvers", "trajectories", "loss", "neighbours")
# Of stock pipelines: the others compare images by their classes.
STOCK_METRICS = ("likelihood", "solvers", "trajectories", "loss")

# Precision and recall look at the third neighbour of an image.
MIN_IMAGES = 4

# Results do not depend on these.
FREE = ("output_dir", "metrics", "use_cpu", "cache_dir")


@dataclass(frozen=True, kw_only=True)
class MeasurementArguments(Arguments):
    """Output folder and what to measure."""

    _argument_group_name = "measurement"

    output_dir: str = option(MISSING, "Folder of the figures; results on the way are in its folder `results`.")
    metrics: list[str] = option(list(METRICS), "Figures to measure; by default all.", METRICS)
    seed: Size = option(0, "Seed of the samples' noise and of dequantisation.")
    eval_batch_size: Free[Count] = option(64, "Images of a process at once.")
    mixed_precision: str | None = option(
        None,
        "Precision of the network's arithmetic in samples and loss; likelihood, solvers and trajectories, which are"
        " of the exact flow, are in float32.",
        ["no", "fp16", "bf16"],
    )
    use_cpu: Free[bool] = option(False, "Use the CPU although there is an accelerator.")

    def check(self) -> None:
        if Path(self.output_dir).is_file():
            raise ValueError(f"The output folder {self.output_dir!r} is a file.")
        # Missing packages are found before any work.
        pyplot()


@dataclass(frozen=True, kw_only=True)
class ReferenceArguments(Arguments):
    """Data that samples are compared with."""

    _argument_group_name = "data"

    dataset_name: str | None = option(
        None, "Hub id, or a local folder of parquet, arrow or image files or of save_to_disk."
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    train_data_dir: str | None = option(None, "Folder of images instead, classes in subfolders.")
    image_folders: list[str] = option(
        [], "Other folders in which rows of a local --dataset_name may name image files."
    )
    train_split: str = option("train", "Split that the model was trained on: the reference of the samples.")
    validation_split: str | None = option(
        None, "Split held out; by default `validation`, else `test`, where there is one."
    )
    image_column: str = option("image", "Column of the images.")
    label_column: str = option("label", "Column of the labels.")
    caption_column: str = option("text", "Column of the captions, for a stock pipeline.")
    resolution: Count | None = option(None, "Side of the images, for a stock pipeline; by default its own.")
    max_train_samples: Count | None = option(None, "Compare with so many images of the training split.")
    max_unreadable_images: Size = option(100, "Go on if so many images cannot be read, at most.")
    max_validation_samples: Count = option(2048, "Use so many held-out images at most.")
    background: str = option("white", "Colour behind transparent images, as in training: a name, or #rrggbb.")
    cache_dir: Free[str | None] = option(None, "Where downloaded and prepared data is kept.")

    def check(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            given = "neither" if self.dataset_name is None else "both"
            raise ValueError(f"Exactly one of --dataset_name and --train_data_dir must be given, got {given}.")
        rgb(self.background)


@dataclass(frozen=True, kw_only=True)
class SampleArguments(Arguments):
    """Samples for quality."""

    _argument_group_name = "samples"

    num_images: Count = option(10_000, "Samples for quality; FID is customarily on 50,000.")
    num_inference_steps: Count | None = option(None, "Steps of the pipeline's own solver; by default its own number.")
    guidance_scale: NotNegative = option(1.0, "Scale of classifier-free guidance; 1 is off.")
    features: str | None = option(
        None,
        "By default Inception's, if weights are at hand; without, no quality.",
        ["inception", "classifier", "none"],
    )
    inception_weights: str | None = option(
        None, "torch-fidelity's file of weights; by default the one in torch's cache."
    )


@dataclass(frozen=True, kw_only=True)
class LikelihoodArguments(Arguments):
    """Likelihood of the held-out images."""

    _argument_group_name = "likelihood"

    num_draws: list[Count] = option([1, 5, 20], "Draws of dequantisation noise: the paper's K.")
    num_probes: Count = option(1, "Hutchinson probes of a draw.")
    levels: int = option(256, "Levels of a value, evenly spread over 0 to 255.")
    likelihood_steps: Count = option(32, "Steps of the integration.")

    def check(self) -> None:
        if not 2 <= self.levels <= 256:
            raise ValueError(f"--levels must be from 2 to 256, got {self.levels}.")


@dataclass(frozen=True, kw_only=True)
class SolverArguments(Arguments):
    """Error and quality by calls of the network."""

    _argument_group_name = "solvers and trajectories"

    num_solver_images: Count = option(256, "Samples of each solver, and trajectories looked at.")
    num_calls: list[Count] = option([6, 12, 24, 48], "Calls of the network to sample with.")


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(
    ModuleArguments,
    MeasurementArguments,
    ModelArguments,
    ReferenceArguments,
    SampleArguments,
    LikelihoodArguments,
    SolverArguments,
):
    """Arguments of this script."""

    def check(self) -> None:
        if self.features == "none" and "quality" in self.metrics:
            raise ValueError("--features none leaves nothing for the quality of --metrics: leave out either.")
        if {"quality", "solvers"} & set(self.metrics) and self.features != "none":
            import_torchmetrics()
            if self.features != "classifier":
                find_inception_weights(self.inception_weights)
                import_inception()
        least = {"num_solver_images": 2} if "solvers" in self.metrics else {}
        if "quality" in self.metrics:
            least |= dict.fromkeys(("num_images", "max_train_samples", "max_validation_samples"), MIN_IMAGES)
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ValueError(f"--{name} must be at least {number} for these --metrics, got {value}.")


def load_data(
    args: ScriptArguments, resolution: int, channels: int, model: FlowMatchPipeline | None = None
) -> tuple[ImageData, ImageData | None, int]:
    """Images to train on, those held out, and the number of classes of the data; without a model the captions."""
    splits = load_splits(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
    if model is not None and model.num_classes:
        splits = {name: matched_by_name(model, split, args.label_column) for name, split in splits.items()}
    train_split = choose_split(splits, args.train_split)
    feature = train_split.features.get(args.label_column)
    num_classes = 0 if model is None else getattr(feature, "num_classes", 0) or model.num_classes
    transform = ImageTransform(
        resolution,
        channels,
        center_crop=True,
        background=rgb(args.background),
        folders=data_folders(args.dataset_name, args.train_data_dir, args.cache_dir, args.image_folders),
    )
    columns = {
        "image_column": args.image_column,
        "label_column": args.label_column if num_classes else None,
        "num_classes": num_classes,
        "caption_column": args.caption_column if model is None else None,
        "max_unreadable": args.max_unreadable_images,
    }
    train_data = ImageData(train_split, transform, max_samples=args.max_train_samples, **columns)
    name = args.validation_split or held_out_split_name(splits, args.train_split)
    if name is None:
        return train_data, None, num_classes
    held_out = ImageData(choose_split(splits, name), transform, max_samples=args.max_validation_samples, **columns)
    return train_data, held_out, num_classes


def choose_features(
    args: ScriptArguments, train_data: ImageData, num_classes: int, store: ResultStore, accelerator: Any
) -> FeatureExtractor:
    """Inception's features where its weights are at hand; a classifier's where they are asked for."""
    if args.features != "classifier":
        return inception_features(find_inception_weights(args.inception_weights), accelerator.device)
    if num_classes < 2:
        raise ValueError(
            f"--features classifier needs labels, and the data set has no column {args.label_column!r} of classes."
        )
    with accelerator.main_process_first():
        return classifier_features(
            store.folder / "classifier.safetensors", train_data, num_classes, accelerator.device
        )


def weights_digest(folder: Path) -> dict[str, str]:
    """Checksums of a pipeline's weights and of its scheduler, on which all results depend."""
    files = sorted([*folder.glob("*/*.safetensors"), *folder.glob("scheduler/*.json")])
    return {file.relative_to(folder).as_posix(): checksum(file) for file in files}


def open_store(args: ScriptArguments, accelerator: Accelerator, folder: Path) -> ResultStore:
    """Results of this evaluation, bound to all that they depend on."""
    fingerprint = {name: value for name, value in args.saved().items() if name not in FREE}
    # Also a precision that the launcher sets; none was written in folders of earlier versions.
    precision = None if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    fingerprint |= {"mixed_precision": precision, "weights": weights_digest(folder)}
    return ResultStore(Path(args.output_dir) / "results", accelerator, fingerprint)


def flow_within(pipeline: Any) -> Any:
    """A pipeline, or of one that samples a flow map a copy that samples the flow within it."""
    scheduler = pipeline.scheduler
    if scheduler.config.get("solver") != "flow_map":
        return pipeline
    logger.info("The model is a flow map: likelihood, solvers and trajectories are those of the flow within it.")
    flow = copy.copy(pipeline)
    vars(flow)["scheduler"] = scheduler.with_settings(solver="euler")
    return flow


def write_neighbours(
    output_dir: Path, store: ResultStore, train_data: ImageData, closest: np.ndarray, rows: np.ndarray
) -> None:
    """The samples nearest to training images, above those."""
    drawn = store.read("samples", "images")[closest]
    near = train_data[np.stack([np.zeros_like(rows), rows], axis=1)]["images"].numpy()
    picture_grid(np.concatenate([drawn, near]), len(drawn)).save(output_dir / "nearest.png")


def write_files(output_dir: Path, store: ResultStore, metrics: dict[str, Any]) -> None:
    """Tables and pictures of what was measured."""
    write_table(output_dir / "metrics.csv", flat_rows(metrics))
    if "quality" in metrics:
        shown: list[np.ndarray] = []
        for images in store.batches("samples", "images"):
            shown.extend(images[: 100 - len(shown)])
            if len(shown) == 100:
                break
        picture_grid(np.stack(shown), 10).save(output_dir / "samples.png")
    if "likelihood" in metrics:
        write_table(output_dir / "likelihood.csv", metrics["likelihood"]["by_draws"])
    if "loss" in metrics:
        plot_loss_by_time(output_dir / "loss_by_time.png", metrics["loss"]["validation_loss_by_time"])
    if "trajectories" in metrics:
        plot_trajectories(output_dir / "trajectories.png", next(store.batches("trajectories", "points")))
    if "solvers" in metrics:
        fixed, adaptive = metrics["solvers"]["fixed"], metrics["solvers"]["adaptive"]
        rows = [*fixed, *({"solver": "dopri5, adaptive", **row} for row in adaptive)]
        write_table(output_dir / "solvers.csv", rows)
        plot_solvers(output_dir / "error_by_calls.png", rows, "relative_error", "relative error")
        for column in ("fid", "classifier_frechet_distance"):
            if column in rows[0]:
                plot_solvers(output_dir / "quality_by_calls.png", rows, column, column.replace("_", " "))


def check_held_out(held_out: ImageData | None, wanted: set[str]) -> None:
    """Refuse figures of held-out images where there are none."""
    if held_out is None and wanted & {"likelihood", "loss"}:
        raise ValueError(f"The data set has no split held out, which {' and '.join(sorted(wanted))} would need.")


def is_stock(name: str | None) -> bool:
    """Return whether a class of pipelines is diffusers' own."""
    pipeline = getattr(diffusers, str(name), None)
    return pipeline is not None and pipeline.__module__.startswith("diffusers.")


def measure_stock(args: ScriptArguments, accelerator: Accelerator, pipeline: DiffusionPipeline, folder: Path) -> None:
    """Measure a stock text-to-image pipeline."""
    wanted, batch_size, output_dir = set(args.metrics), args.eval_batch_size, Path(args.output_dir)
    refused = [name for name in args.metrics if name not in STOCK_METRICS]
    if refused:
        raise ValueError(
            f"Of the stock {type(pipeline).__name__} --metrics can be {', '.join(STOCK_METRICS)}, got"
            f" {', '.join(refused)}."
        )

    # 1. Flow and data
    flow, field = StockFlow(flow_within(pipeline)), TrainedField(pipeline, "transformer", {})
    side = args.resolution or field.default_size[0]
    field.check_size((side, side))
    with accelerator.main_process_first():
        channels = pipeline.components["vae"].config.in_channels
        train_data, held_out, _ = load_data(args, side, channels)
    check_held_out(held_out, wanted)
    store = open_store(args, accelerator, folder)
    metrics: dict[str, Any] = {
        "model": last_part(args.pretrained_model_name_or_path),
        "dataset_name": last_part(args.dataset_name or args.train_data_dir or ""),
        "seed": args.seed,
    }

    # 2. Measures. A prompt of the training images belongs to each sample
    count = args.num_solver_images
    rows = np.resize(epoch_order(args.seed, 0, len(train_data)), count)
    assert train_data.captions is not None
    prompts = train_data.captions.draw(np.stack([np.zeros_like(rows), rows], axis=1))
    model = StockModel(flow, prompts, {"height": side, "width": side})
    sampler = StockSampler(model, args.seed, args.guidance_scale)
    if "likelihood" in wanted:
        options = {"num_steps": args.likelihood_steps, "num_probes": args.num_probes}
        metrics["latent_likelihood"] = latent_likelihood(store, flow, held_out, batch_size, args.seed, **options)
    if "loss" in wanted:
        metrics["loss"] = held_out_loss(
            accelerator,
            field,
            flow.scheduler,
            held_out,
            batch_size,
            lambda batch: (field.encode(batch, accelerator.device), (batch["captions"], field.size_of(batch))),
        )
    if "solvers" in wanted:
        metrics["solvers"] = solvers(store, sampler, None, None, count, batch_size, tuple(args.num_calls))
    if "trajectories" in wanted:
        metrics["trajectories"] = trajectory_figures(store, sampler, count, batch_size)

    # 3. Files
    if accelerator.is_main_process:
        write_files(output_dir, store, metrics)
        logger.info("%s", write_metrics(output_dir, metrics).read_text(encoding="utf-8"))
        logger.info("The figures are in %s.", output_dir)


def main(args: ScriptArguments) -> None:
    """Measure."""
    output_dir = Path(args.output_dir)
    accelerator = make_accelerator(
        output_dir, mixed_precision=args.mixed_precision, report_to="none", use_cpu=args.use_cpu
    )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffusers_fm").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    wanted, batch_size = set(args.metrics), args.eval_batch_size

    # 1. Model and data
    source = args.pretrained_model_name_or_path
    with accelerator.main_process_first():
        if not Path(source).is_dir():
            source = DiffusionPipeline.download(source, revision=args.revision, variant=args.variant)
        name = DiffusionPipeline.load_config(source).get("_class_name")
        if name == FlowMatchAudioPipeline.__name__:
            raise ValueError(f"{source!r} holds a {name}, which draws sounds, and these are figures of images.")
        kind = DiffusionPipeline if is_stock(name) else FlowMatchPipeline
        pipeline = kind.from_pretrained(source, variant=args.variant).to(accelerator.device)
    if not isinstance(pipeline, FlowMatchPipeline):
        measure_stock(args, accelerator, pipeline, Path(source))
        accelerator.end_training()
        return
    with accelerator.main_process_first():
        side = pipeline.sample_shape[1] * pipeline.vae_scale_factor
        train_data, held_out, num_classes = load_data(args, side, pipeline.image_channels, pipeline)
    for data in (train_data, held_out):
        if "quality" in wanted and data is not None and len(data) < MIN_IMAGES:
            raise ValueError(f"Quality needs {MIN_IMAGES} images of each split, got {len(data)}.")
    check_held_out(held_out, wanted)
    if "likelihood" in wanted and pipeline.vae is not None:
        raise ValueError("A latent pipeline has no likelihood of pixels: leave `likelihood` out of --metrics.")

    # 2. Where results are kept, and what they depend on
    store = open_store(args, accelerator, Path(source))
    order = epoch_order(args.seed, 0, len(train_data))
    labels = train_data.labels[order] if pipeline.num_classes and train_data.labels is not None else None
    sampler = Sampler(pipeline, labels, args.seed, args.guidance_scale)
    flow_sampler = Sampler(flow_within(pipeline), labels, args.seed, args.guidance_scale)
    extractor = None
    if wanted & {"quality", "solvers"} and args.features != "none":
        extractor = choose_features(args, train_data, num_classes, store, accelerator)
        measure_features(store, "train", train_data, extractor, batch_size)
    data_name = last_part(args.dataset_name or args.train_data_dir or "")
    metrics: dict[str, Any] = {
        "model": last_part(args.pretrained_model_name_or_path),
        "dataset_name": data_name,
        "seed": args.seed,
    }

    num_steps = args.num_inference_steps or default_steps(pipeline.scheduler)

    # 3. Measures
    if wanted & {"quality", "neighbours"}:
        steps = {"num_inference_steps": num_steps}
        with accelerator.autocast():
            generate(store, "samples", sampler, args.num_images, batch_size, **steps)
    if "quality" in wanted and extractor is not None:
        measure_samples(store, "sample-features", "samples", extractor, args.num_images, batch_size)
        metrics["quality"] = quality(store, "sample-features", "train", extractor) | {
            "features": extractor.name,
            "images": args.num_images,
            "num_inference_steps": num_steps,
        }
        if held_out is not None:
            # Figures of other images of the same kind: no model need do better.
            measure_features(store, "held-out", held_out, extractor, batch_size)
            metrics["quality_of_held_out_images"] = quality(store, "held-out", "train", extractor)
        if extractor.name == "classifier" and pipeline.num_classes == num_classes:
            metrics["quality"]["read_as_asked"] = accuracy(store, "sample-features", "samples")
            if held_out is not None:
                metrics["quality"]["held_out_read_right"] = accuracy(store, "held-out")
    if "likelihood" in wanted:
        metrics["likelihood"] = likelihood(
            store,
            flow_sampler,
            held_out,
            batch_size,
            tuple(sorted(args.num_draws)),
            args.levels,
            num_steps=args.likelihood_steps,
            num_probes=args.num_probes,
        )
    if "loss" in wanted:
        metrics["loss"] = held_out_loss(
            accelerator,
            TrainableModel(pipeline),
            pipeline.scheduler,
            held_out,
            batch_size,
            lambda batch: data_and_labels(pipeline, batch, accelerator.device),
        )
    if "solvers" in wanted:
        count, calls = args.num_solver_images, tuple(args.num_calls)
        metrics["solvers"] = solvers(store, flow_sampler, extractor, "train", count, batch_size, calls)
    if "trajectories" in wanted:
        metrics["trajectories"] = trajectory_figures(store, flow_sampler, args.num_solver_images, batch_size)

    # 4. Files
    if accelerator.is_main_process:
        if "neighbours" in wanted:
            metrics["neighbours"], closest, rows = neighbours(store, "samples", train_data, held_out, args.num_images)
            write_neighbours(output_dir, store, train_data, closest, rows)
        write_files(output_dir, store, metrics)
        logger.info("%s", write_metrics(output_dir, metrics).read_text(encoding="utf-8"))
        logger.info("The figures are in %s.", output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
