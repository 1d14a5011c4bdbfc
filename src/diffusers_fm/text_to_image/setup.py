# SPDX-License-Identifier: Apache-2.0
"""Setup of a text-to-image run: sizes, scheduler, frozen models, captioned data, caches and picture grids."""

import copy
import dataclasses
import inspect
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import offload_models
from torch import nn
from tqdm.auto import tqdm
from transformers import T5EncoderModel

from ..data.buckets import make_buckets, parse_buckets
from ..data.cache import DryAccelerator
from ..data.clips import ClipTransform
from ..data.folders import image_suffixes
from ..data.images import ImageData
from ..data.latents import cache_all_latents, precomputed_folder
from ..data.loading import make_datasets
from ..data.randomness import make_generator
from ..data.streams import StreamData
from ..data.transforms import ImageTransform
from ..files import written_aside
from ..hub.portable import clean_settings, components, read_settings
from ..pipelines.flow_map import with_flow_map
from ..pipelines.stock import with_stock_scheduler
from ..pipelines.velocity_field import guidance_call
from ..schedulers.recommendation import solver_settings
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..training.distributed import SHARDING, compiles
from ..training.run import TrainingRun
from ..training.sampler import find_sampler
from ..training.validation import EVALUATION_SEED, held_out_loss, make_grid
from .arguments import TextToImageArguments, parse_call, parse_columns
from .field import Size, TrainedField
from .images import held_out_rows, picture
from .sounds import check_seconds, load_captioned_sounds, write_sounds
from .text import cache_captions, warn_of_long_captions


logger = logging.getLogger(__name__)

# Sides of buckets are multiples of about this part of the resolution, as 64 of 1024.
BUCKET_STEPS = 16
# Samples by which a sampler is searched for, at most.
MAX_SEARCHED = 16


def open_pipeline(run: TrainingRun[Any], args: TextToImageArguments) -> DiffusionPipeline:
    """Pipeline of a run, refused where no text is read."""
    pipeline = run.init_pipeline(DiffusionPipeline, args.text_encoders_name_or_path)
    if not any(name.startswith("text_encoder") for name in pipeline.components):
        raise ValueError(
            f"{args.pretrained_model_name_or_path!r} holds a {type(pipeline).__name__}, which reads no text: train it"
            " with train_flow_matching.py."
        )
    return pipeline


def choose_network(pipeline: DiffusionPipeline, network: str) -> Any:
    """Component that is trained; a `ValueError` names the components that can be."""
    found = pipeline.components.get(network)
    if not isinstance(found, nn.Module):
        names = [name for name, component in pipeline.components.items() if isinstance(component, nn.Module)]
        raise ValueError(f"--network must be one of {', '.join(names)}, got {network!r}.")
    return found


def call_arguments(pipeline: DiffusionPipeline, args: TextToImageArguments) -> dict[str, Any]:
    """Arguments of the pipeline in training and in sampling: those of `--call`, and the number of tokens."""
    names = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    given = parse_call(args.call)
    if args.max_sequence_length is not None:
        if "max_sequence_length" not in names:
            raise ValueError(f"{type(pipeline).__name__} takes no --max_sequence_length.")
        given["max_sequence_length"] = args.max_sequence_length
    if args.num_frames > 1:
        given[frames_argument(pipeline)] = args.num_frames
    return given


def frames_argument(pipeline: DiffusionPipeline) -> str:
    """Argument of a pipeline's call for the number of frames; a `ValueError` where it makes no videos."""
    names = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    found = next((name for name in ("num_frames", "frames") if name in names), None)
    if found is None:
        raise ValueError(f"{type(pipeline).__name__} makes no videos: leave out --num_frames.")
    return found


def choose_sizes(field: TrainedField, args: TextToImageArguments) -> list[Size]:
    """
    Heights and widths of the images: a square, by default the pipeline's, or buckets.

    Raises:
        ValueError: if the pipeline does not take them.
    """
    if args.audio_seconds is not None:
        return [field.set_seconds(args.audio_seconds)]
    check_seconds(field.pipeline, None)
    square = field.default_size if args.resolution is None else (args.resolution, args.resolution)
    if args.num_frames > 1:
        field.set_frames(frames_argument(field.pipeline), args.num_frames, square)
    field.check_size(square)
    field.square = square
    multiple = field.multiple
    sizes = [square]
    if args.aspect_ratio_buckets is not None:
        sizes = parse_buckets(args.aspect_ratio_buckets)
    elif args.use_aspect_ratio_buckets:
        step = max(1, round(square[0] / BUCKET_STEPS / multiple)) * multiple
        while square[0] % step:
            step -= multiple
        sizes = make_buckets(square[0], step, args.max_aspect_ratio)
    refused = [size for size in sizes if any(side % multiple for side in size)]
    if refused:
        raise ValueError(f"The sides of buckets must be multiples of {multiple} for this model, got {refused}.")
    for size in {max(sizes), max(sizes, key=lambda size: size[::-1])}:
        field.check_size(size)
    return sizes


def ask_all(accelerator: Accelerator | DryAccelerator, field: TrainedField, sizes: Sequence[Size]) -> None:
    """Ask for all sizes beforehand where later processes would have to ask together, or by a compiled network."""
    if compiles(accelerator) or accelerator.distributed_type in SHARDING:
        for size in sizes:
            field.check_size(size)
            field.shift(size)


def choose_scheduler(
    field: TrainedField, args: TextToImageArguments, sizes: Sequence[Size], base_dimension: int | None = None
) -> FlowMatchScheduler:
    """
    Scheduler of training and of sampling after it; it replaces the pipeline's, and the field is trained for it.

    With `--shift`, times are shifted by it whatever the size. With `--shift_base_resolution`, they are shifted by
    `sqrt(m / n)` (arXiv 2403.03206, equation 23), where `m` are the pixels of an image and `n` those of the base. The
    scheduler does that by `use_dynamic_shifting`, in which the logarithm of the shift is linear in the tokens of the
    image: both agree for the smallest and the largest size, and between them training follows the scheduler, so that
    sampling agrees with it. With a `base_dimension`, `m` are the values of a sample and `n` that number (arXiv
    2510.11690). With none of them, the scheduler keeps its shift. With `--save_stock` it samples on the grid of
    diffusers' own.

    Args:
        field ([`TrainedField`]):
            The pipeline to train.
        args ([`TextToImageArguments`]):
            The script's arguments.
        sizes (`Sequence[tuple[int, int]]`):
            Heights and widths of the images, in pixels.

    Returns:
        [`FlowMatchScheduler`]: the scheduler.

    Raises:
        ValueError: if the scheduler cannot be trained, or diffusers has none like it for `--save_stock`.
    """
    pipeline = field.pipeline
    changes: dict[str, Any] = {}
    if args.shift is not None:
        changes = {"shift": args.shift, "use_dynamic_shifting": False}
    elif args.shift_base_resolution is not None or base_dimension is not None:
        base_area = (args.shift_base_resolution or 0) ** 2
        if base_dimension is not None:
            base_area = base_dimension * math.prod(sizes[0]) / math.prod(field.state_shape(sizes[0]))
        areas = sorted(height * width for height, width in sizes)
        # If all areas are equal, the line goes on to the doubled side.
        ends = (areas[0], areas[-1] if areas[-1] > areas[0] else 4 * areas[0])
        base, largest = (0.5 * math.log(area / base_area) for area in ends)
        area_of_token = field.multiple**2
        changes = {
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "base_shift": base,
            "max_shift": largest,
            "base_image_seq_len": ends[0] // area_of_token,
            "max_image_seq_len": ends[1] // area_of_token,
        }
    if args.save_stock:
        changes["timestep_spacing"] = "linspace"
    config = pipeline.scheduler.config
    if config.get("solver") == "calibrated":
        # Its steps were fitted to the network before this training, and leave with the solver.
        changes = {**solver_settings("euler"), **changes}
    if config.get("invert_sigmas") and not isinstance(pipeline.scheduler, FlowMatchScheduler):
        # The pipeline keeps its scheduler, whose time runs the other way; the field is that of noise - data.
        if changes:
            raise ValueError(f"The shift of {type(pipeline.scheduler).__name__} with `invert_sigmas` is its own.")
        for name in ("solver", "calibrate_steps"):
            if args.saved().get(name):
                raise ValueError(f"--{name} does not go with the pipeline's {type(pipeline.scheduler).__name__}.")
        return FlowMatchScheduler(num_train_timesteps=config.num_train_timesteps, shift=config.shift)
    scheduler: Any = FlowMatchScheduler.from_config(config, **changes)
    if args.save_stock:
        # Refuses, before any work, what diffusers' own scheduler cannot do.
        scheduler.to_stock()
    if scheduler.config.invert_sigmas:
        raise ValueError("A scheduler with `invert_sigmas` cannot be trained here: its time runs from noise to data.")
    if args.saved().get("calibrate_steps") and field.has_own_grid(sizes[0]):
        raise ValueError(
            f"--calibrate_steps does not go with the grid that {type(pipeline).__name__} gives its scheduler."
        )
    pipeline.scheduler = scheduler
    field.set_scheduler(scheduler)
    return scheduler


def freeze(
    accelerator: Accelerator | DryAccelerator, pipeline: DiffusionPipeline, network: str, adapters: bool = False
) -> None:
    """
    Freeze all models but the network, and for adapters the network too. The autoencoder stays in float32, and so do
    a T5's output layers, which overflow in float16; the others run in the precision of training. A network that is not
    to be sharded is on the device from now on, where it is asked.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    if accelerator.distributed_type not in SHARDING:
        pipeline.components[network].to(accelerator.device)
    for name, model in pipeline.components.items():
        if not isinstance(model, nn.Module) or (name == network and not adapters):
            continue
        model.requires_grad_(False)
        if name != network:
            model.eval()
        encodes = name == "vae" or name.startswith("text_encoder")
        if not encodes and type(model) is not type(pipeline.components[network]):
            # Called beside the network, such as a controlnet.
            model.to(accelerator.device)
        if name != "vae":
            # Not by diffusers' own `to`, which warns of layers to be kept in float32 where there are none.
            nn.Module.to(model, dtype)
        if dtype == torch.float16 and isinstance(model, T5EncoderModel):
            for layer, module in model.named_modules():
                if layer.endswith(".wo"):
                    module.float()


def load_captioned_data(
    args: TextToImageArguments, pipeline: DiffusionPipeline, sizes: Sequence[Size]
) -> tuple[ImageData | StreamData, ImageData | None]:
    """Captioned images to train on, and those held out, in the sizes of [`choose_sizes`]."""
    square = len(sizes) == 1 and sizes[0][0] == sizes[0][1]
    vae: Any = pipeline.components["vae"]
    make_transform: Callable[..., ImageTransform] = ImageTransform
    if args.num_frames > 1:
        make_transform = partial(ClipTransform, num_frames=args.num_frames, frame_stride=args.frame_stride)
    return make_datasets(
        args,
        vae.config.get("in_channels", 3) * args.num_frames,
        args.resolution or sizes[0][0],
        buckets=() if square else tuple(sizes),
        caption_column=args.caption_column,
        caption=args.instance_prompt,
        class_images=class_images(args),
        **({"condition_columns": parse_columns(args.call_columns)} if args.call_columns else {}),
        make_transform=make_transform,
        kind="videos" if args.num_frames > 1 else "images",
    )


def class_images(args: TextToImageArguments) -> tuple[str, str] | None:
    """Folder and caption of the images of a class that are learned beside those of an instance, if there are any."""
    folder = args.class_data_dir
    # A dry run draws none.
    if args.class_prompt is None or folder is None or not images_of(folder):
        return None
    return folder, args.class_prompt


def images_of(folder: str) -> list[Path]:
    """Images of a folder of class images."""
    return [file for file in Path(folder).expanduser().glob("*") if file.suffix.lower() in image_suffixes()]


def draw_class_images(run: TrainingRun[Any], args: TextToImageArguments, field: TrainedField, size: Size) -> None:
    """Draw the images of the class that its folder lacks, by the pipeline before its training; each has its seed."""
    if args.class_prompt is None or args.class_data_dir is None:
        return
    folder = Path(args.class_data_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)

    def file_of(number: int) -> Path:
        return folder / f"class-{number:05d}.png"

    count = len(images_of(args.class_data_dir))
    # A file that is there stays.
    free = (number for number in itertools.count(count) if not file_of(number).exists())
    missing = list(itertools.islice(free, max(args.num_class_images - count, 0)))
    starts = range(0, len(missing), args.eval_batch_size)
    for start in tqdm(starts, desc="Drawing class images", disable=not missing):
        numbers = missing[start : start + args.eval_batch_size]
        generators = [make_generator(args.seed or 0, "class image", number) for number in numbers]
        with run.accelerator.autocast(), torch.no_grad():
            (images,) = sample_prompts(
                field.pipeline, field, args, size, run.accelerator.device, [args.class_prompt], [generators], True
            )
        for number, image in zip(numbers, map(picture, images)):
            with written_aside(file_of(number)) as aside:
                image.save(aside, format="PNG")


def prepare_text(
    accelerator: Accelerator,
    args: TextToImageArguments,
    field: TrainedField,
    data: tuple[ImageData | StreamData, ImageData | None],
    folder: Path,
) -> None:
    """Text encoders on the device, or with `--cache_text_embeddings` a cache of all captions and prompts."""
    text = field.text
    text.offload = args.offload
    # Without contents nothing can be told apart, and nothing is dropped.
    kept = args.cache_text_embeddings and len(text.trained) > 0
    text.separable = (any(args.text_encoder_dropout) or kept) and not field.is_empty
    if accelerator.is_main_process:
        captions = data[0] if isinstance(data[0], StreamData) else data[0].captions
        if captions is not None:
            warn_of_long_captions(field.pipeline, captions, args.max_sequence_length)
    if args.cache_text_embeddings:
        columns = [each.captions.distinct() for each in data if each is not None and each.captions is not None]
        captions = itertools.chain(args.validation_prompts, *columns)
        cache_captions(
            accelerator, captions, text, field.encode_captions, field.compare_captions, folder / "text_embeddings"
        )
    elif not args.offload:
        for model in text.encoders:
            model.to(accelerator.device)


def prepare_latents(
    accelerator: Accelerator,
    args: TextToImageArguments,
    pipeline: DiffusionPipeline,
    data: Sequence[ImageData | StreamData | None],
    folder: Path,
) -> None:
    """Put the autoencoder on the device, or with `--cache_latents` have the data read a cache of latents."""
    vae: Any = pipeline.components["vae"]
    if args.cache_latents:
        cache_all_latents(accelerator, data, vae, folder, args.train_batch_size)
    if args.call_columns or not (args.cache_latents or args.offload):
        vae.to(accelerator.device)


def prepare_data(
    run: TrainingRun[Any], args: TextToImageArguments, field: TrainedField, sizes: Sequence[Size]
) -> tuple[ImageData | StreamData, ImageData | None]:
    """Captioned images to train on and those held out, with caches of what the frozen models compute of them."""
    folder = precomputed_folder(args, run.output_dir)
    read = parse_columns(args.call_columns).keys() & inspect.signature(field.pipeline.encode_prompt).parameters
    if args.cache_text_embeddings and read:
        raise ValueError(
            f"--cache_text_embeddings does not go with --call_columns {', '.join(sorted(read))}:"
            f" {type(field.pipeline).__name__} reads captions together with these images."
        )
    with run.accelerator.main_process_first():
        if run.accelerator.is_main_process and not field.is_empty:
            draw_class_images(run, args, field, sizes[0])
        if field.sounds is None:
            data = load_captioned_data(args, field.pipeline, sizes)
        else:
            data = load_captioned_sounds(args, field.sounds)
    prepare_latents(run.accelerator, args, field.pipeline, data, folder)
    prepare_text(run.accelerator, args, field, data, folder)
    return data


def as_saved(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Pipeline to save: with diffusers' own scheduler where that gives the same images, else with ours."""
    try:
        return with_stock_scheduler(pipeline)
    except ValueError as error:
        logger.info("The pipeline is saved with diffusers-fm's scheduler: %s", error)
        return pipeline


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """
    Save a trained pipeline. Its network has float32 weights, so that text encoders that ran in less must load so too:
    otherwise what they give would not fit the network.
    """
    pipeline.save_pretrained(folder)
    for path in (folder / name / "config.json" for name in components(folder)):
        settings = read_settings(path) if path.is_file() else {}
        if settings.get("dtype"):
            path.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    clean_settings(folder)


@torch.no_grad()
def sample_validation_prompts(
    pipeline: DiffusionPipeline,
    field: TrainedField,
    args: TextToImageArguments,
    size: Size,
    device: torch.device,
) -> list[list[Any]]:
    """
    Sample the validation prompts from fixed noise, a row for each prompt.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline to sample from, as it would be saved; it is left as it is.
        field ([`TrainedField`]):
            Its network in training.
        args ([`TextToImageArguments`]):
            With prompts, number of pictures, steps and guidance.
        size (`tuple[int, int]`):
            Height and width in pixels.
        device (`torch.device`):
            Device of the network.

    Returns:
        `list[list[Any]]`: images, videos or sounds, as the pipeline gives them.
    """
    prompts, numbers = args.validation_prompts, range(args.num_validation_images)
    generators = [[make_generator(EVALUATION_SEED, "grid", row, i) for i in numbers] for row in range(len(prompts))]
    offload = args.offload or args.cache_text_embeddings
    return sample_prompts(pipeline, field, args, size, device, prompts, generators, offload)


def sample_prompts(
    pipeline: DiffusionPipeline,
    field: TrainedField,
    args: TextToImageArguments,
    size: Size,
    device: torch.device,
    prompts: Sequence[str],
    generators: Sequence[list[torch.Generator]],
    offload: bool,
) -> list[list[Any]]:
    """Samples of each prompt, one for each of its generators; otherwise as [`sample_validation_prompts`]."""
    scheduler, rows = pipeline.scheduler, []
    with prompt_sampler(pipeline, field, args, size, device, offload) as draw:
        for prompt, own in zip(prompts, generators):
            rows.append(
                [*draw(type(scheduler).from_config(scheduler.config), args.num_inference_steps, [prompt], own)]
            )
    return rows


@contextmanager
def prompt_sampler(
    pipeline: DiffusionPipeline,
    field: TrainedField,
    args: TextToImageArguments,
    size: Size,
    device: torch.device,
    offload: bool,
) -> Iterator[Callable[..., Any]]:
    """
    Within this context there is `draw(scheduler, num_inference_steps, prompts, generators, **options)`: images of a
    pipeline in training by a scheduler of their own, one for each generator, for the prompts in turn.

    Args:
        pipeline, field, args, size, device:
            As for [`sample_validation_prompts`].
        offload (`bool`):
            Whether encoders and autoencoder are on the device for this time only.
    """
    network = pipeline.components[field.field.name]
    sampler: Any = copy.copy(pipeline)
    sampler.set_progress_bar_config(disable=True)
    was_training = network.training
    network.eval()
    models = [pipeline.components["vae"], *field.text.encoders]
    own = {**field.call, **guidance_call(pipeline, network, args.guidance_scale)}
    own |= field.size_arguments(size)

    def draw(
        scheduler: Any, steps: int, prompts: Sequence[str], generators: list[torch.Generator], **options: Any
    ) -> Any:
        count = len(generators)
        vars(sampler)["scheduler"] = scheduler
        if scheduler.config.get("solver") == "flow_map":
            with_flow_map(sampler, field.field.name)
        repeated = {name: [value] * count for name, value in own.items() if name == "negative_prompt"}
        prompt = [prompts[number % len(prompts)] for number in range(count)]
        repeated |= field.field.prompt_arguments(prompt)
        call = {**own, **repeated, **options, "num_inference_steps": steps}
        return sampler(generator=generators, **call)[0]

    try:
        with offload_models(*models, device=device, offload=offload):
            yield draw
    finally:
        network.train(was_training)


def choose_prompt_sampler(
    run: TrainingRun[Any], pipeline: DiffusionPipeline, field: TrainedField, size: Size
) -> dict[str, float]:
    """
    Solver and steps of `--solver` and `--calibrate_steps`, found by a search on the validation prompts (without them
    on the empty one) and put into the pipeline's scheduler; pictures and card have the steps too. The main process
    calls it, at the end of training.

    Returns:
        `dict[str, float]`: `sampling_error` and `euler_error`, or nothing without these arguments.
    """
    args = run.args
    if args.solver is None and not args.calibrate_steps:
        return {}
    prompts, count = args.validation_prompts or [""], min(args.eval_batch_size, MAX_SEARCHED)
    offload, device = args.offload or args.cache_text_embeddings, run.accelerator.device
    with prompt_sampler(pipeline, field, args, size, device, offload) as draw, run.accelerator.autocast():

        def sample(candidate: FlowMatchScheduler, steps: int, seed: int) -> None:
            generators = [make_generator(EVALUATION_SEED, "sampler", seed, number) for number in range(count)]
            draw(candidate, steps, prompts, generators, output_type="latent")

        pipeline.scheduler, figures = find_sampler(args, pipeline.scheduler, sample)
    run.args = dataclasses.replace(args, num_inference_steps=pipeline.scheduler.config.default_num_inference_steps)
    return figures


def validate_field(
    run: TrainingRun[Any],
    pipeline: DiffusionPipeline,
    field: TrainedField,
    scheduler: FlowMatchScheduler,
    held_out_data: ImageData | None,
    size: Size,
    step: int,
    grid_name: str | None,
) -> dict[str, Any]:
    """Held-out loss of a field, and pictures of the validation prompts by a pipeline as it would be saved."""
    args, device = run.args, run.accelerator.device
    figures: dict[str, Any] = {}
    if held_out_data is not None:
        figures = held_out_loss(
            run.accelerator,
            run.model,
            scheduler,
            held_out_data,
            args.eval_batch_size,
            lambda batch: (
                field.encode(batch, device),
                (batch["captions"], field.size_of(batch), None, field.call_images(batch)),
            ),
        )
    if args.validation_prompts and args.num_validation_images and run.accelerator.is_main_process:
        with run.accelerator.autocast():
            rows = sample_validation_prompts(pipeline, field, args, size, device)
        if field.sounds is None:
            grid = make_grid([[picture(image) for image in row] for row in rows])
        else:
            name = f"samples/step-{step}" if grid_name is None else "sound"
            grid = write_sounds(rows, field.sounds, run.output_dir, name)
        run.log.write_grid(step, grid, grid_name)
    if field.images is not None and held_out_data is not None and args.num_validation_images:
        if run.accelerator.is_main_process:
            with prompt_sampler(pipeline, field, args, size, device, args.cache_text_embeddings) as draw:
                with run.accelerator.autocast(), torch.no_grad():
                    rows = held_out_rows(draw, pipeline, field.images, args, held_out_data, size)
            run.log.write_grid(step, make_grid([[picture(image) for image in row] for row in rows]), grid_name)
    return figures
