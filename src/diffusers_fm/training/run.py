# SPDX-License-Identifier: Apache-2.0
"""The dull half of a training script: what happens before its loop, between the steps, and after the last one."""

import argparse
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers.optimization import get_scheduler
from torch import nn

from ..data.images import ImageData
from ..data.order import BucketSampler, StreamSampler, make_loader
from ..data.randomness import BatchSlice, seed_layers
from ..data.streams import StreamBatches, StreamData, StreamPosition
from ..files import lock_folder, unlock_folder
from .arguments import compare_arguments, saved_arguments
from .checkpoints import CheckpointWriter, agree_on_checkpoint, find_checkpoint, handle_model_files, load_checkpoint
from .distributed import SHARDING, EvalWeights, make_accelerator
from .ema import ConstantDecay, PowerFunction, make_ema, remove_later_snapshots
from .interlude import Export, Interlude, Place, Validate
from .logs import RunLog
from .meters import RunMeters
from .objective import draw_noise
from .optimizers import clip_gradients, kept_settings, make_optimizer, schedule_free_weights
from .publishing import Publisher, save_arguments


logger = logging.getLogger(__name__)

# Arguments that must stay as they are when a run is resumed, and those that may change without a word.
FIXED_ON_RESUME = ("optimizer", "use_ema", "ema_profile", "ema_sigma_rel", "streaming")
FREE_ON_RESUME = (
    "resume_from_checkpoint output_dir max_train_steps checkpointing_steps checkpoints_total_limit logging_steps"
    " logging_dir report_to tracker_project_name dataloader_num_workers cache_dir max_skipped_steps offload_ema"
    " ema_snapshot_steps push_to_hub push_dry_run hub_model_id hub_private_repo hub_revision hub_strategy hub_license"
).split()


class TrainingRun:
    """
    One run of a training script: accelerator, optimizer, schedule, average, checkpoints, logs and signals.

    A script reads

        run = TrainingRun(args)              # the output folder is checked, and what is to be resumed found
        ...                                  # pipeline and data
        model = run.prepare(model, len(data))
        batches = run.batches(data)
        run.start(validate, export, "what is trained")
        with run:
            for step in run.steps():         # logs, validation, checkpoints and signals are between the steps
                for part in run.parts(step):
                    batch = next(batches)
                    with run.accelerator.accumulate(model):
                        ...                  # t, x_t, model, losses
                        run.backward(t, losses)
            run.finish()                     # last validation, export, upload

    Args:
        args (`argparse.Namespace`):
            With the arguments of `add_optimisation_arguments`, `add_average_arguments`, `add_validation_arguments` and
            `add_run_arguments`. `seed` and `max_train_steps` are filled in where they were left open.
        fixed_on_resume (`Collection[str]`, *optional*):
            Names of further arguments that must stay as they are when the run is resumed.

    Attributes:
        accelerator (`accelerate.Accelerator`):
            Of the run.
        output_dir (`Path`):
            Folder of the run.
        seed (`int`):
            Seed of everything.
        checkpoint (`Path`, *optional*):
            What is resumed.
        first_step (`int`), first_sample (`int`):
            Optimizer steps done and samples seen before.
        global_batch_size (`int`):
            Samples to an optimizer step, over processes and accumulation steps.
        log ([`RunLog`]):
            Where numbers and pictures go.
        repo_id (`str`):
            What a card says is to be loaded: the repository on the Hub, or the output folder.

    Raises:
        ValueError: if the output folder holds another run, there is nothing to resume from, or the launch was amiss.
    """

    def __init__(self, args: argparse.Namespace, fixed_on_resume: Collection[str] = ()) -> None:
        self.args = args
        self._fixed_on_resume = (*FIXED_ON_RESUME, *fixed_on_resume)
        self.output_dir = Path(args.output_dir).expanduser()
        self.accelerator = make_accelerator(
            self.output_dir,
            args.logging_dir,
            args.mixed_precision,
            args.gradient_accumulation_steps,
            args.report_to,
            args.use_cpu,
            args.torch_compile,
            args.train_batch_size,
        )
        is_main = self.accelerator.is_main_process
        logging.basicConfig(level=logging.WARNING if is_main else logging.ERROR, format="%(message)s")
        logging.getLogger("diffusers_fm").setLevel(logging.INFO if is_main else logging.ERROR)
        self.checkpoint, self._manifest = agree_on_checkpoint(
            self.accelerator, self.output_dir, args.resume_from_checkpoint
        )
        self.first_step: int = self._manifest.get("step", 0)
        self.first_sample: int = self._manifest.get("samples_seen", 0)
        self._publisher: Publisher | None = None
        if is_main:
            if args.push_to_hub or args.push_dry_run:
                self._publisher = Publisher(args, self.output_dir)
                self._publisher.start()
            self.output_dir.mkdir(parents=True, exist_ok=True)
            # A folder that was not there: another run may have made it meanwhile.
            if lock_folder(self.output_dir):
                find_checkpoint(self.output_dir, None)
        if args.seed is None:
            seeds = [self._manifest.get("seed", int.from_bytes(os.urandom(4), "little"))]
            args.seed = broadcast_object_list(seeds)[0]
        self.seed: int = args.seed
        torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
        self.global_batch_size: int = (
            args.train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        )
        self._checkpoints = CheckpointWriter(
            self.accelerator, self.output_dir, args.checkpoints_total_limit, self.checkpoint
        )
        self._meters = RunMeters(
            args, self.accelerator, self.global_batch_size, self._manifest.get("unreadable_rows", ())
        )

    @property
    def repo_id(self) -> str:
        return str(self.output_dir) if self._publisher is None else self._publisher.repo_id

    def prepare(
        self,
        model: nn.Module,
        num_samples: int | None,
        parameters: Iterable[nn.Parameter] | Iterable[dict] | None = None,
    ) -> nn.Module:
        """
        Makes optimizer, schedule and average for the model, and loads the checkpoint that is resumed.

        Args:
            model (`nn.Module`):
                All that is trained: its parameters that require gradients.
            num_samples (`int`, *optional*):
                Samples in an epoch, `None` where nobody knows.
            parameters (`Iterable`, *optional*):
                The same parameters in groups, as an optimizer takes them, where some have settings of their own.

        Returns:
            `nn.Module`: the model to call, as the accelerator wraps it.

        Raises:
            ValueError: if a step is larger than the data set, the length of the run is not known, or arguments do not
                fit the resumed run.
        """
        args, accelerator = self.args, self.accelerator
        if num_samples is None:
            if args.max_train_steps is None:
                raise ValueError("It is not known how many samples the stream has: give --max_train_steps.")
        elif self.global_batch_size > num_samples:
            raise ValueError(
                f"An optimizer step of {self.global_batch_size} samples ({accelerator.num_processes} processes x"
                f" {args.gradient_accumulation_steps} accumulation steps x --train_batch_size"
                f" {args.train_batch_size}) is larger than the data set of {num_samples}."
            )
        self._place = Place(self.first_step, self.first_sample, self.global_batch_size, num_samples)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if args.max_train_steps is None:
            args.max_train_steps = math.ceil(args.num_train_epochs * (num_samples or 0) / self.global_batch_size)
        if args.max_train_steps < self.first_step:
            raise ValueError(
                f"--max_train_steps {args.max_train_steps} is fewer than the {self.first_step} steps that"
                f" {self.checkpoint} has done."
            )
        self._weights = EvalWeights(accelerator, model)
        model = self._weights.for_training()
        optimizer = make_optimizer(
            parameters or [parameter for parameter in model.parameters() if parameter.requires_grad],
            args.learning_rate * (self.global_batch_size if args.scale_lr else 1),
            args.optimizer,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            epsilon=args.adam_epsilon,
        )
        # Not prepared by accelerate, which would step it once for each process; here a step is an optimizer step.
        self._lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=500 if args.lr_warmup_steps is None else args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            self._meters.throughput.watch_model(self.model, self._weights.bare)
        accelerator.register_for_checkpointing(self._lr_scheduler, self._meters.losses, self._meters.guard)
        if args.use_ema:
            constant = ConstantDecay(args.ema_max_decay, args.ema_inv_gamma, args.ema_power)
            powers = [PowerFunction(sigma_rel) for sigma_rel in args.ema_sigma_rel]
            profiles = powers if args.ema_profile == "power" else [constant]
            self._weights.ema = make_ema(accelerator, self.model, profiles, args.offload_ema)
            self._weights.average = self._weights.ema.averaged_weights
        elif args.optimizer == "schedule_free":
            self._weights.average = partial(schedule_free_weights, self._optimizer, self._parameters)
        # For those that have a mode.
        self._optimizer.train()
        handle_model_files(accelerator)
        if self.checkpoint is not None:
            self._check_engine()
            compare_arguments(args, self._manifest["arguments"], fixed=self._fixed_on_resume, free=FREE_ON_RESUME)
            with kept_settings(self._optimizer, self._lr_scheduler):
                load_checkpoint(accelerator, self.checkpoint)
            self._meters.loaded()
        if accelerator.is_main_process:
            remove_later_snapshots(self.output_dir, self.first_step)
        return self.model

    def _check_engine(self) -> None:
        """Sharded engines keep weights and optimizer in a format of their own."""
        kind = self.accelerator.distributed_type
        saved, now = self._manifest.get("engine"), kind.value if kind in SHARDING else None
        if saved != now:
            raise ValueError(
                f"{self.checkpoint} was written with {saved or 'whole weights'} and cannot be resumed with"
                f" {now or 'whole weights'}: launch with the configuration that the run began with."
            )

    def batches(self, data: ImageData | StreamData) -> Iterator[dict[str, Any]]:
        """
        This process's batches, one for each part of each step, from where the run begins.

        Args:
            data ([`ImageData`] or [`StreamData`]):
                What is trained on.

        Returns:
            `Iterator[dict[str, Any]]`: batches, on the CPU; each of one size, if the images are in buckets.

        Raises:
            ValueError: if a stream does not go on where the resumed run was in it.
        """
        if isinstance(data, StreamData):
            return self._meters.throughput.watch_data(self._meters.unreadable.watch(self._stream_batches(data)))
        place = (
            self.seed,
            self.args.train_batch_size,
            self.args.gradient_accumulation_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            self.first_sample,
            max(0, self.args.max_train_steps - self.first_step),
        )
        buckets = data.bucket_rows
        sampler = StreamSampler(len(data), *place) if buckets is None else BucketSampler(buckets, *place)
        loader = make_loader(data, sampler, self.args.dataloader_num_workers)
        return self._meters.throughput.watch_data(self._meters.unreadable.watch(iter(loader)))

    def _stream_batches(self, data: StreamData) -> Iterator[dict[str, Any]]:
        num_processes, num_workers = self.accelerator.num_processes, self.args.dataloader_num_workers
        batch_size, saved = self.args.train_batch_size, self._manifest.get("stream")
        position = StreamPosition(data, batch_size, num_processes, num_workers, saved)
        num_batches = max(0, self.args.max_train_steps - self.first_step) * self.args.gradient_accumulation_steps
        batches = StreamBatches(position, num_batches, self.accelerator.process_index)
        self._meters.stream = position
        return position.watch(iter(make_loader(batches, num_workers=num_workers)))

    def start(self, validate: Validate, export: Export, description: str) -> None:
        """
        Opens logs and trackers.

        Args:
            validate (`Callable`):
                Called as `validate(step, grid_name)` by every process, with the averaged weights in the model, every
                `--validation_steps` and at the end: measures, draws a grid (`grid_name` is its file in the output
                folder, `None` for the one of a step), and returns the figures, which are logged.
            export (`Callable`):
                Called as `export(folder, figures)` by the main process, with the averaged weights in the model: writes
                the trained pipeline and its card to a folder, which is not the output folder: what is in it is moved
                there when it is whole.
            description (`str`):
                What is trained on what, for the log.
        """
        args, accelerator = self.args, self.accelerator
        self.log = RunLog(accelerator, self.output_dir, self.first_step, self._manifest.get("tracker_run_id"))
        self.log.start_trackers(args.tracker_project_name, saved_arguments(args))
        self._interlude = Interlude(
            args,
            accelerator,
            self._place,
            self._meters,
            self._weights,
            self.log,
            self._checkpoints,
            self._publisher,
            validate,
            export,
        )
        if accelerator.is_main_process:
            save_arguments(args, self.output_dir)
        logger.info("%s", description)
        logger.info(
            "Steps %d to %d, each of %d samples (%d processes x %d accumulation steps x %d), %s, seed %d%s.",
            self.first_step + 1,
            args.max_train_steps,
            self.global_batch_size,
            accelerator.num_processes,
            args.gradient_accumulation_steps,
            args.train_batch_size,
            accelerator.mixed_precision if accelerator.mixed_precision != "no" else "float32",
            args.seed,
            "" if self.checkpoint is None else f", resumed from {self.checkpoint}",
        )

    def __enter__(self) -> "TrainingRun":
        """From here on a wish to stop is answered after the step that it meets: a signal, or a file `STOP`."""
        self._interlude.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._interlude.__exit__(*exception)
        unlock_folder(self.output_dir)

    def steps(self) -> Iterator[int]:
        """
        The numbers of the optimizer steps, from 0. What is due after a step is done before the next number comes:
        schedule, average, log, validation, checkpoint, and the end of the process where a signal asked for it.

        Yields:
            `int`: the number of the step.

        Raises:
            ValueError: if a gradient is not finite, see `--nan_policy`.
        """
        if self._manifest.get("validation_is_due"):
            self._interlude.run_validation(self.first_step)
        self._meters.throughput.stopwatch.restart()
        for step in range(self.first_step, self.args.max_train_steps):
            yield step
            learning_rate = self._lr_scheduler.get_last_lr()[0]
            self._lr_scheduler.step()
            if self._weights.ema is not None:
                self._weights.ema.step()
            self._meters.throughput.stopwatch.mark("optimizer")
            self._meters.throughput.step()
            self._interlude.after_step(step + 1, learning_rate)

    def parts(self, step: int) -> Iterator[BatchSlice]:
        """
        The accumulation steps of a step. Noise, times and dropped conditions are drawn for the whole global batch, and
        each part is cut from them.

        Args:
            step (`int`):
                Number of the step.

        Yields:
            [`BatchSlice`]: which part of the global batch comes next, and its random numbers.
        """
        args, accelerator = self.args, self.accelerator
        for micro_step in range(args.gradient_accumulation_steps):
            offset = (micro_step * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
            seed_layers(self.seed, step, micro_step, accelerator.process_index, accelerator.device)
            yield BatchSlice(self.seed, step, offset, args.train_batch_size, self.global_batch_size)

    def backward(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """
        The gradient of the mean loss of a part, and after the last part of a step the optimizer's step.

        Args:
            t (`torch.Tensor` of shape `(batch_size,)`):
                Times of the samples, 0 = data, 1 = noise, on the CPU; for the log.
            losses (`torch.Tensor` of shape `(batch_size,)`):
                Their losses.
        """
        self._meters.losses.add(t, losses)
        self.accelerator.backward(losses.mean())
        self._meters.throughput.stopwatch.mark("model")
        if self.accelerator.sync_gradients:
            norm = clip_gradients(self.accelerator, self._parameters, self.args.max_grad_norm)
            if self._meters.before_step(self._optimizer, norm):
                self._optimizer.step()
            self._optimizer.zero_grad()

    def draw_noise(self, part: BatchSlice, data: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """
        Noise for a part of a batch, paired with its data as `--coupling` says, see [`draw_noise`]. The time that the
        pairing takes is noted.

        Args:
            part ([`BatchSlice`]):
                Which samples of which step.
            data (`torch.Tensor` of shape `(batch_size, ...)`):
                The clean samples.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                What the network is told of them, dropped labels as such.

        Returns:
            `torch.Tensor` of the shape of `data`: standard normal, float32.
        """
        if self.args.coupling == "independent":
            return draw_noise(self.args, self.accelerator, part, data)
        self._meters.throughput.stopwatch.mark("model")
        noise = draw_noise(self.args, self.accelerator, part, data, labels)
        self._meters.throughput.stopwatch.mark("coupling")
        return noise

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within this context the model has the weights that would be saved now."""
        return self._weights.applied()

    def finish(self) -> None:
        """The last validation, the trained pipeline, its upload. A signal no longer interrupts."""
        self._interlude.finish()
