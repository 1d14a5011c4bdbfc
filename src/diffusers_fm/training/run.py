# SPDX-License-Identifier: Apache-2.0
"""Training run: accelerator, optimizer, average, checkpoints, logs, validation, export and signals of a script."""

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from ..data.loading import TrainingData
from ..data.order import BucketSampler, StreamSampler, make_loader
from ..data.randomness import BatchSlice, draw_noise, seed_layers
from ..data.streams import StreamBatches, StreamData, StreamPosition
from ..files import lock_folder, replace_contents, replace_text, unlock_folder
from ..hub.publisher import Publisher
from ..pipelines.init_pipeline import init_pipeline
from .arguments import TrainingArguments, warmup, warn_of_settings
from .checkpoints import CheckpointWriter, agree_on_checkpoint, find_checkpoint, handle_model_files, load_checkpoint
from .distributed import SHARDING, EvalWeights, StopSignal, failures, make_accelerator, with_compiled_network
from .ema import NUM_SNAPSHOTS, ConstantDecay, PowerFunction, make_ema, remove_later_snapshots
from .metrics import RunLog, RunMetrics, clip_gradients
from .optimizers import (
    kept_settings,
    make_lr_scheduler,
    make_optimizer,
    non_finite_parameters,
    restart_optimizer,
    schedule_free_weights,
)


logger = logging.getLogger(__name__)

A = TypeVar("A", bound=TrainingArguments)
PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)

# Touched in the output folder, it ends the run with a checkpoint.
STOP_FILE = "STOP"


class TrainingRun(Generic[A]):
    """
    Training run of a script, which reads

        run = TrainingRun(args)  # checks the output folder, finds a checkpoint
        ...  # pipeline and data
        model = run.begin(model, train_data, validate, export, "description")
        with run:
            for step in run.steps():  # between: logs, validation, checkpoints
                for part, batch in run.parts(step):
                    with run.accelerator.accumulate(model):
                        ...  # t, x_t, model, losses
                        run.backward(t, losses)
            run.finish()  # last validation, export, upload

    Args:
        args ([`~diffusers_fm.training.arguments.TrainingArguments`]):
            Arguments of the script.

    Attributes:
        args ([`~diffusers_fm.training.arguments.TrainingArguments`]):
            The same, with a seed and, after [`begin`], the number of steps.
        accelerator (`accelerate.Accelerator`), output_dir (`Path`), seed (`int`), log ([`RunLog`], after [`begin`]):
            Of the run.
        checkpoint (`Path`, *optional*), first_step (`int`), first_sample (`int`):
            Checkpoint that is resumed, and the optimizer steps and samples before it.
        max_train_steps (`int`, after [`begin`]), global_batch_size (`int`):
            Optimizer steps of the whole run, and samples in each, over processes and accumulation steps.
        model (`nn.Module`, after [`begin`]):
            Trained model as the accelerator wraps it.
        repo_id (`str`):
            Repository on the Hub that a card loads, or the output folder.

    Raises:
        ValueError: if the output folder holds another run, there is nothing to resume from, or the launch was amiss.
    """

    def __init__(self, args: A) -> None:
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
        seeds = [
            args.seed if args.seed is not None else self._manifest.get("seed", int.from_bytes(os.urandom(4), "little"))
        ]
        self.seed: int = broadcast_object_list(seeds)[0]
        self.args: A = dataclasses.replace(args, seed=self.seed)
        self._publisher: Publisher | None = None
        if is_main and (args.push_to_hub or args.push_dry_run):
            self._publisher = Publisher(args, self.output_dir)
            self._publisher.start()
        if is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            # A folder that was not there: another run may have made it meanwhile.
            if lock_folder(self.output_dir):
                find_checkpoint(self.output_dir, None)
        self.repo_id = str(self.output_dir) if self._publisher is None else self._publisher.repo_id
        torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
        self.global_batch_size: int = (
            args.train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        )
        self._checkpoints = CheckpointWriter(
            self.accelerator, self.output_dir, args.checkpoints_total_limit, self.checkpoint
        )
        self._metrics = RunMetrics(args, self.accelerator, self.global_batch_size, self._manifest)
        self._figures: dict[str, Any] = {}
        # Mean loss of the last line of the log, `None` if no loss was finite.
        self._loss: float | None = 0.0
        self._checkpoint_is_due = False

    def init_pipeline(self, pipeline_class: type[PipelineT], text_encoders: str | None = None) -> PipelineT:
        """Pipeline of the arguments, see [`~diffusers_fm.init_pipeline`]; empty in a dry run."""
        return init_pipeline(
            self.args.pretrained_model_name_or_path,
            seed=self.seed,
            vae=self.args.vae_name_or_path,
            revision=self.args.revision,
            variant=self.args.variant,
            pipeline_class=pipeline_class,
            text_encoders=text_encoders,
            empty=self.args.dry_run,
        )

    def begin(
        self,
        model: nn.Module,
        data: TrainingData,
        validate: Callable[[int, str | None], dict[str, Any]],
        export: Callable[[Path, dict[str, Any]], None],
        description: str,
        parameters: Iterable[dict] | None = None,
        restarts: Mapping[int, float] | None = None,
    ) -> nn.Module:
        """
        Make optimizer, schedule, average, batches and logs, and load the checkpoint that is resumed.

        Args:
            model (`nn.Module`):
                All that is trained: its parameters that require gradients.
            data ([`ImageData`], [`StreamData`] or [`ArrayData`]):
                Data to train on.
            validate (`Callable`):
                Called as `validate(step, grid_name)` by every process, with the averaged weights in the model, every
                `--validation_steps` and at the end: measures, draws a grid (`grid_name` is its file in the output
                folder, `None` for the one of a step), and returns the figures, which are logged.
            export (`Callable`):
                Called as `export(folder, figures)` by the main process, with the averaged weights in the model: writes
                the trained pipeline and its card to a folder, whose contents are moved to the output folder when it
                is whole.
            description (`str`):
                Model and data in a sentence, for the log.
            parameters (`Iterable[dict]`, *optional*):
                The trained parameters in groups, where some have settings of their own.
            restarts (`Mapping[int, float]`, *optional*):
                Steps at which training begins anew, from the averaged weights: learning-rate schedule, moments of the
                optimizer, average. Each with its share of the learning rate.

        Returns:
            `nn.Module`: the model to call, as the accelerator wraps it.

        Raises:
            ValueError: if a step is larger than the data set, the length of the run is not known, or arguments or data
                do not fit the resumed run.
        """
        self._validate, self._export, self._restarts = validate, export, restarts or {}
        self._num_samples = data.num_samples
        self._fingerprint = data.fingerprint()
        self.max_train_steps = self._length(data.num_samples)
        self.args = dataclasses.replace(self.args, max_train_steps=self.max_train_steps)
        args, accelerator = self.args, self.accelerator
        if args.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._weights = EvalWeights(accelerator, model)
        model = self._weights.trained
        trained = parameters or [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate = args.learning_rate * (self.global_batch_size if args.scale_lr else 1)
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = make_optimizer(trained, rate, args.optimizer, betas, args.adam_weight_decay, args.adam_epsilon)
        # Not prepared by accelerate, which would step it once for each process; here a step is an optimizer step.
        schedule = (args.lr_scheduler, warmup(args), args.lr_num_cycles, args.lr_power)
        self._lr_scheduler = make_lr_scheduler(optimizer, self.max_train_steps, self._restarts, *schedule)
        warn_of_settings(args, self.max_train_steps, data.num_samples, self.global_batch_size)
        self.model, self._optimizer = accelerator.prepare(with_compiled_network(accelerator, model), optimizer)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            self._metrics.throughput.watch_model(self.model, self._weights.bare)
        accelerator.register_for_checkpointing(self._lr_scheduler, self._metrics.losses, self._metrics.guard)
        self._ema, self._snapshot_steps = None, None
        if args.use_ema:
            constant = ConstantDecay(args.ema_max_decay, args.ema_inv_gamma, args.ema_power)
            powers = [PowerFunction(sigma_rel) for sigma_rel in args.ema_sigma_rel]
            profiles = powers if args.ema_profile == "power" else [constant]
            self._ema = make_ema(accelerator, self.model, profiles, args.offload_ema, self._restarts)
            self._weights.average = self._ema.averaged_weights
            if args.ema_profile == "power":
                self._snapshot_steps = args.ema_snapshot_steps or math.ceil(self.max_train_steps / NUM_SNAPSHOTS)
        elif args.optimizer == "schedule_free":
            self._weights.average = partial(schedule_free_weights, self._optimizer, self._parameters)
        # For optimizers that have a mode.
        self._optimizer.train()
        handle_model_files(accelerator)
        if self.checkpoint is not None:
            self._load_checkpoint(self.checkpoint)
        self._batches = self._make_batches(data)
        self._stop = StopSignal(accelerator, self.output_dir / STOP_FILE)
        hidden = not accelerator.is_local_main_process
        self._progress_bar = tqdm(
            total=self.max_train_steps, initial=self.first_step, desc="Steps", mininterval=1.0, disable=hidden
        )
        # Lines beyond the checkpoint go, when nothing is refused any more.
        self.log = RunLog(accelerator, self.output_dir, self.first_step, self._manifest.get("tracker_run_id"))
        self.log.start_trackers(args.tracker_project_name, args.saved())
        if accelerator.is_main_process:
            self._checkpoints.set_later_aside(self.first_step)
            remove_later_snapshots(self.output_dir, self.first_step)
            replace_text(self.output_dir / "training_args.json", json.dumps(args.saved(), indent=2) + "\n")
        trained, total = (sum(p.numel() for p in each) for each in (self._parameters, self.model.parameters()))
        logger.info("%s %.2f M parameters, %.2f M of them trained.", description, total / 1e6, trained / 1e6)
        logger.info(
            "Steps %d to %d, each of %d samples (%d processes x %d accumulation steps x %d), %s, seed %d%s.",
            self.first_step + 1,
            self.max_train_steps,
            self.global_batch_size,
            accelerator.num_processes,
            args.gradient_accumulation_steps,
            args.train_batch_size,
            accelerator.mixed_precision if accelerator.mixed_precision != "no" else "float32",
            self.seed,
            "" if self.checkpoint is None else f", resumed from {self.checkpoint}",
        )
        return self.model

    def _length(self, num_samples: int | None) -> int:
        """Optimizer steps of the whole run."""
        args = self.args
        if num_samples is not None and self.global_batch_size > num_samples:
            raise ValueError(
                f"An optimizer step of {self.global_batch_size} samples ({self.accelerator.num_processes} processes x"
                f" {args.gradient_accumulation_steps} accumulation steps x --train_batch_size"
                f" {args.train_batch_size}) is larger than the data set of {num_samples}."
            )
        length = args.max_train_steps
        if length is None:
            if num_samples is None:
                raise ValueError("It is not known how many samples the stream has: give --max_train_steps.")
            # A step may have had another number of samples before.
            left = args.num_train_epochs * num_samples - self.first_sample
            length = self.first_step + math.ceil(left / self.global_batch_size)
        if length < self.first_step:
            by_epochs = f"--num_train_epochs {args.num_train_epochs}, {length} steps,"
            given = by_epochs if args.max_train_steps is None else f"--max_train_steps {length}"
            raise ValueError(f"{given} is fewer than the {self.first_step} steps that {self.checkpoint} has done.")
        return length

    def _load_checkpoint(self, checkpoint: Path) -> None:
        """Load all that was prepared or registered. Sharded engines keep a format of their own."""
        kind = self.accelerator.distributed_type
        saved, now = self._manifest.get("engine"), kind.value if kind in SHARDING else None
        if saved != now:
            raise ValueError(
                f"{checkpoint} was written with {saved or 'whole weights'} and cannot be resumed with"
                f" {now or 'whole weights'}: launch with the configuration that the run began with."
            )
        changed = self.args.resume_changes(self._manifest["arguments"])
        # Checkpoints of earlier versions do not know their data.
        then, now = self._manifest.get("data", self._fingerprint), self._fingerprint
        differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        if differing and not self.args.allow_changed_data:
            changes = ", ".join(f"{name} ({then.get(name)} then, {now.get(name)} now)" for name in differing)
            raise ValueError(
                f"The data is not that of {checkpoint}: it differs in {changes}. Give --allow_changed_data to go on."
            )
        for change in changed:
            logger.warning("%s", change)
        with kept_settings(self._optimizer, self._lr_scheduler):
            load_checkpoint(self.accelerator, checkpoint)
        self._metrics.loaded()

    def _make_batches(self, data: TrainingData) -> Iterator[dict[str, Any]]:
        """This process's batches, one for each part of each step, from where the run begins."""
        args, accelerator = self.args, self.accelerator
        num_steps, workers = max(0, self.max_train_steps - self.first_step), args.dataloader_num_workers
        if isinstance(data, StreamData):
            state, number = self._manifest.get("stream"), num_steps * args.gradient_accumulation_steps
            position = StreamPosition(data, args.train_batch_size, accelerator.num_processes, workers, state)
            self._metrics.stream = position
            stream = StreamBatches(position, number, accelerator.process_index)
            batches = position.watch(iter(make_loader(stream, num_workers=workers)))
        else:
            place = (
                self.seed,
                args.train_batch_size,
                args.gradient_accumulation_steps,
                accelerator.num_processes,
                accelerator.process_index,
                self.first_sample,
                num_steps,
            )
            buckets = data.bucket_rows
            sampler = StreamSampler(len(data), *place) if buckets is None else BucketSampler(buckets, *place)
            batches = iter(make_loader(data, sampler, workers))
        return self._metrics.throughput.watch_data(self._metrics.unreadable.watch(batches))

    def __enter__(self) -> "TrainingRun[A]":
        """From here on a signal, or a file `STOP`, stops the run after the step that it meets."""
        self._stop.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        # Workers end here: those that the garbage collector finds are waited for, 5 s each.
        self._batches = iter(())
        self._progress_bar.close()
        self._stop.__exit__(*exception)
        unlock_folder(self.output_dir)

    def steps(self) -> Iterator[int]:
        """
        Optimizer steps, by number from 0. Schedule, average, log, validation, checkpoint and stop of a step are done
        before the next number comes.

        Yields:
            `int`: number of the step.

        Raises:
            ValueError: if too many gradients are not finite, see `--nan_policy`.
            RuntimeError: if validation failed; a checkpoint was saved then.
        """
        if self._manifest.get("validation_is_due"):
            self._run_validation(self.first_step)
        self._metrics.throughput.stopwatch.restart()
        for step in range(self.first_step, self.max_train_steps):
            if step and step in self._restarts:
                restart_optimizer(self._optimizer)
                if self._ema is not None:
                    self._ema.take()
            yield step
            learning_rate = self._lr_scheduler.get_last_lr()[0]
            self._lr_scheduler.step()
            if self._ema is not None:
                self._ema.step()
            self._metrics.throughput.stopwatch.mark("optimizer")
            self._metrics.throughput.step()
            self._after_step(step + 1, learning_rate)

    def parts(self, step: int) -> Iterator[tuple[BatchSlice, dict[str, Any]]]:
        """
        Accumulation steps of a step. Noise, times and dropped conditions are drawn for the whole global batch, and
        each part is cut from them.

        Args:
            step (`int`):
                Number of the step.

        Yields:
            `tuple[BatchSlice, dict[str, Any]]`: the part of the global batch with its random numbers, and its data, on
            the CPU; of one size, if the images are in buckets.
        """
        args, accelerator = self.args, self.accelerator
        for micro_step in range(args.gradient_accumulation_steps):
            offset = (micro_step * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
            batch = next(self._batches)
            seed_layers(self.seed, step, micro_step, accelerator.process_index, accelerator.device)
            yield BatchSlice(self.seed, step, offset, args.train_batch_size, self.global_batch_size), batch

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within this context the model has the weights of the average, of `--use_ema`."""
        if self._ema is None:
            raise ValueError("There is no average of the weights without --use_ema.")
        return self._ema.averaged_weights()

    def draw_noise(self, part: BatchSlice, data: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """
        Standard normal noise of a part of a batch, float32, of the shape of `data`, paired as `--coupling` says: see
        [`draw_noise`].

        Args:
            part ([`BatchSlice`]), data (`torch.Tensor` of shape `(batch_size, ...)`):
                Samples and step, and the clean samples.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Labels that the network is given, dropped ones as such.
        """
        if self.args.coupling != "independent":
            self._metrics.throughput.stopwatch.mark("model")
        noise = draw_noise(self.args.coupling, self.args.coupling_scope, self.accelerator, part, data, labels)
        if self.args.coupling != "independent":
            self._metrics.throughput.stopwatch.mark("coupling")
        return noise

    def backward(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """
        Backward pass of the mean loss of a part, and after the last part of a step the optimizer's step.

        Args:
            t (`torch.Tensor` of shape `(batch_size,)`):
                Times of the samples, 0 = data, 1 = noise, on the CPU; for the log.
            losses (`torch.Tensor` of shape `(batch_size,)`):
                Losses of the samples.
        """
        self._metrics.losses.add(t, losses)
        self.accelerator.backward(losses.mean())
        self._metrics.throughput.stopwatch.mark("model")
        if self.accelerator.sync_gradients:
            norm = clip_gradients(self.accelerator, self._parameters, self.args.max_grad_norm)
            self._metrics.gradient_norm = norm
            if self._metrics.guard.before_step(self._optimizer, norm):
                self._optimizer.step()
            self._optimizer.zero_grad()

    def finish(self) -> None:
        """Last validation, export and upload. A signal no longer interrupts."""
        self._progress_bar.close()
        done = self.max_train_steps
        summary = self._metrics.throughput.summary()
        if summary:
            self.log.write(done, {f"run/{name}": value for name, value in summary.items()})
            logger.info("Speed: %s.", ", ".join(f"{name} {value:g}" for name, value in summary.items()))
        self._refuse_non_finite(done)
        figures = self._run_validation(done, "grid.png")
        self._refuse_non_finite(done, figures.get("validation_loss", self._loss))
        error: Exception | None = None
        try:
            with self._weights.applied():
                if self.accelerator.is_main_process:
                    replace_contents(self.output_dir, lambda folder: self._export(folder, figures))
        except Exception as caught:
            error = caught
        self._end_if_failed("The trained pipeline could not be saved", error, done)
        loss = figures.get("validation_loss")
        logger.info(
            "What was trained is in %s%s.", self.output_dir, "" if loss is None else f"; held-out loss {loss:.4f}"
        )
        self._stop.settle()
        self.accelerator.end_training()
        if self._publisher is not None:
            self._publisher.finish()

    def _after_step(self, done: int, learning_rate: float) -> None:
        """Log, snapshot, validation, checkpoint and stop, after `done` optimizer steps. Every process calls it."""
        self._progress_bar.update()
        args, is_last = self.args, done == self.max_train_steps
        signum = self._stop.received()

        if done % args.logging_steps == 0 or is_last:
            self._end_if_not_finite(done)
            self._write_log(done, learning_rate)
        # From here on nothing counts as time of training.
        self._metrics.throughput.stopwatch.mark("other")

        if self._ema is not None and self._snapshot_steps and (done % self._snapshot_steps == 0 or is_last):
            self._ema.save_snapshots(self.accelerator, self.output_dir)

        validation_is_due = done % args.validation_steps == 0 and not is_last
        # There may not be time for both; the resumed run begins with the validation.
        if validation_is_due and not signum:
            self._run_validation(done)
            validation_is_due = False
            signum = self._stop.received(wait=True)

        self._checkpoint_is_due |= done % args.checkpointing_steps == 0
        saved = False
        if self._checkpoint_is_due or signum:
            self._end_if_not_finite(done)
            # Weights that gave no finite gradient may be spoilt: the checkpoint waits for one.
            if signum or not self._metrics.guard.in_a_row:
                saved = self._save_checkpoint(done, validation_is_due)
                self._checkpoint_is_due = False
            if saved and not signum and not is_last and self._publisher is not None:
                with self._weights.applied():
                    self._publisher.checkpoint_saved(done, lambda folder: self._export(folder, self._figures))

        self._metrics.throughput.stopwatch.restart()
        if signum and not is_last:
            self._leave(done, signum, saved)

    def _write_log(self, done: int, learning_rate: float) -> None:
        """Losses, speed and gradients since the last line. Every process calls it."""
        stream = self._metrics.stream
        epoch = None if stream is None else stream.epoch
        if self._num_samples is not None:
            epoch = self._samples_seen(done) / self._num_samples
        values = {"epoch": epoch, "learning_rate": learning_rate, **self._metrics.report()}
        self.log.write(done, values)
        self._loss = values["loss"]
        self._progress_bar.set_postfix(
            loss=values["loss"], lr=learning_rate, images_per_second=values["images_per_second"]
        )

    def _samples_seen(self, done: int) -> int:
        return self.first_sample + (done - self.first_step) * self.global_batch_size

    def _run_validation(self, done: int, grid_name: str | None = None) -> dict[str, Any]:
        """Validate and log the figures; if that fails in a process, end the run with a checkpoint."""
        figures: dict[str, Any] = {}
        error: Exception | None = None
        try:
            with self._weights.applied():
                figures = self._figures = self._validate(done, grid_name)
        except Exception as caught:
            error = caught
        self._end_if_failed("Validation failed", error, done, validation_is_due=grid_name is None)
        if figures:
            self.log.write(done, figures)
        return figures

    def _save_checkpoint(self, done: int, validation_is_due: bool = False) -> bool:
        """A checkpoint of everything that the next step needs, if there is none yet; whether it could be written."""
        if self._checkpoints.last == self.output_dir / f"checkpoint-{done}":
            return True
        self._refuse_non_finite(done)
        sharded = self.accelerator.distributed_type in SHARDING
        state = {
            "seed": self.seed,
            "samples_seen": self._samples_seen(done),
            "num_processes": self.accelerator.num_processes,
            "data": self._fingerprint,
            "engine": self.accelerator.distributed_type.value if sharded else None,
            **self._metrics.gather(),
            "validation_is_due": validation_is_due,
            "tracker_run_id": self.log.run_id,
            "arguments": self.args.saved(),
        }
        return self._checkpoints.save(done, state, rotate=not self._metrics.guard.in_a_row)

    def _end_if_not_finite(self, done: int) -> None:
        """End the run, if too many gradients were not finite."""
        fault = self._metrics.gradient_fault(done)
        if fault is not None:
            raise ValueError(f"{fault} The last good checkpoint is {self._checkpoints.last or 'none'}.")

    def _refuse_non_finite(self, done: int, loss: float | None = 0.0) -> None:
        """End the run without a checkpoint if trained weights or a loss (`None`: no finite one) are not finite."""
        error: Exception | None = None
        names = non_finite_parameters(self._weights.trained)
        if names:
            error = ValueError(f"{len(names)} trained parameters are not finite, such as {names[0]!r}")
        elif self.accelerator.is_main_process and (loss is None or not math.isfinite(loss)):
            error = ValueError(f"the loss of what was trained is {'not finite' if loss is None else loss}")
        faults = failures(self.accelerator, error)
        if faults:
            raise ValueError(
                f"Nothing is saved at step {done}: {'; '.join(faults)}. The last good checkpoint is"
                f" {self._checkpoints.last or 'none'}; a lower --learning_rate may help."
            )

    def _end_if_failed(self, what: str, error: Exception | None, done: int, validation_is_due: bool = False) -> None:
        """End the run with a checkpoint if a process failed: the steps until here were good."""
        faults = failures(self.accelerator, error)
        if not faults:
            return
        self._save_checkpoint(done, validation_is_due)
        raise RuntimeError(
            f"{what} after step {done}: {'; '.join(faults)}. The last good checkpoint is"
            f" {self._checkpoints.last or 'none'}; go on from it with --resume_from_checkpoint latest."
        ) from error

    def _leave(self, done: int, signum: int, saved: bool) -> None:
        """End the process, as it was asked to."""
        self._progress_bar.close()
        last = self._checkpoints.last
        logger.warning(
            "Stopped by %s after step %d. %s; go on with --resume_from_checkpoint latest.",
            f"the file {STOP_FILE}" if signum == StopSignal.STOP_FILE else f"signal {signum}",
            done,
            f"{last} is saved" if saved else f"No checkpoint could be saved, the last good one is {last or 'none'}",
        )
        if self._publisher is not None:
            self._publisher.drop_waiting()
        self._stop.settle()
        self.accelerator.end_training()
        sys.exit(0 if signum == StopSignal.STOP_FILE else 128 + signum)
