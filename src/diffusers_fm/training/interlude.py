# SPDX-License-Identifier: Apache-2.0
"""What happens between the steps of a run: signals, log, validation, checkpoints, and the ways in which a run ends."""

import argparse
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..files import replace_contents
from .arguments import saved_arguments
from .checkpoints import CheckpointWriter
from .distributed import SHARDING, EvalWeights, StopSignal, failures
from .ema import NUM_SNAPSHOTS
from .logs import RunLog
from .meters import RunMeters
from .optimizers import non_finite_parameters
from .publishing import Publisher


logger = logging.getLogger(__name__)

# Touched in the output folder, it ends the run with a checkpoint.
STOP_FILE = "STOP"

# Figures of what would be saved now: held-out losses, and a picture grid in a file of the given name.
Validate = Callable[[int, str | None], dict[str, Any]]
# Writes the trained pipeline and its card to a folder, whose contents are moved to the output folder when they are
# whole. It is given the figures of the last validation.
Export = Callable[[Path, dict[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """
    Where a run begins in its steps and its data.

    Args:
        first_step (`int`), first_sample (`int`):
            Optimizer steps done and samples seen before.
        global_batch_size (`int`):
            Samples to an optimizer step.
        num_samples (`int`, *optional*):
            Samples in an epoch.
    """

    first_step: int
    first_sample: int
    global_batch_size: int
    num_samples: int | None

    def samples_seen(self, step: int) -> int:
        """Samples seen after so many optimizer steps."""
        return self.first_sample + (step - self.first_step) * self.global_batch_size


class Interlude:
    """
    Between two steps of a run, and after the last one. Every process calls each of its methods at the same steps.

    Used as a context: from its beginning on a wish to stop is answered after the step that it meets, be it a signal
    or a file `STOP`.

    Args:
        args (`argparse.Namespace`):
            Of the script.
        accelerator (`Accelerator`):
            Of the run.
        place ([`Place`]):
            Where the run begins.
        meters ([`RunMeters`]):
            What is told.
        weights ([`EvalWeights`]):
            What is validated and saved, with the averages.
        log ([`RunLog`]):
            Where it is told.
        checkpoints ([`CheckpointWriter`]):
            Where the run is kept.
        publisher ([`Publisher`], *optional*):
            Of the main process, if there is something to upload.
        validate (`Callable`), export (`Callable`):
            As [`TrainingRun.start`] takes them.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        place: Place,
        meters: RunMeters,
        weights: EvalWeights,
        log: RunLog,
        checkpoints: CheckpointWriter,
        publisher: Publisher | None,
        validate: Validate,
        export: Export,
    ) -> None:
        self._args, self._accelerator, self._place, self._meters = args, accelerator, place, meters
        self._weights, self._log, self._checkpoints, self._publisher = weights, log, checkpoints, publisher
        self._validate, self._export = validate, export
        self._output_dir = Path(args.output_dir).expanduser()
        self._figures: dict[str, Any] = {}
        # None if no loss of the last line of the log was finite.
        self._loss: float | None = 0.0
        self._checkpoint_is_due = False

    def __enter__(self) -> "Interlude":
        self._stop = StopSignal(self._accelerator, self._output_dir / STOP_FILE).__enter__()
        self._progress_bar = tqdm(
            total=self._args.max_train_steps,
            initial=self._place.first_step,
            desc="Steps",
            mininterval=1.0,
            disable=not self._accelerator.is_local_main_process,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress_bar.close()
        self._stop.__exit__(*exception)

    def after_step(self, done: int, learning_rate: float) -> None:
        """
        What is due after a step: log, snapshots, validation, checkpoint, and the end where it was asked for.

        Args:
            done (`int`):
                Optimizer steps done.
            learning_rate (`float`):
                Of the last one.

        Raises:
            ValueError: if too many gradients were not finite.
            RuntimeError: if validation failed; a checkpoint was saved then.
        """
        self._progress_bar.update()
        args = self._args
        is_last = done == args.max_train_steps
        signum = self._stop.received()
        if done % args.logging_steps == 0 or is_last:
            self._end_if_not_finite(done)
            self._write_log(done, learning_rate)
        # What comes now is no part of the speed of training.
        self._meters.throughput.stopwatch.mark("other")
        ema = self._weights.ema
        snapshot_steps = args.ema_snapshot_steps or math.ceil(args.max_train_steps / NUM_SNAPSHOTS)
        if ema is not None and args.ema_profile == "power" and (done % snapshot_steps == 0 or is_last):
            ema.save_snapshots(self._accelerator, self._output_dir)
        validation_is_due = done % args.validation_steps == 0 and not is_last
        # There may not be time for both; the resumed run begins with the validation.
        if validation_is_due and not signum:
            self.run_validation(done)
            validation_is_due = False
            signum = self._stop.received(wait=True)
        saved = self._save_if_due(done, signum, validation_is_due)
        self._meters.throughput.stopwatch.restart()
        if signum and not is_last:
            self._leave(done, signum, saved)

    def _save_if_due(self, done: int, signum: int, validation_is_due: bool) -> bool:
        """Whether there is a checkpoint of this step."""
        args = self._args
        self._checkpoint_is_due |= done % args.checkpointing_steps == 0
        if not self._checkpoint_is_due and not signum:
            return False
        self._end_if_not_finite(done)
        # Weights that gave no finite gradient may be spoilt: the checkpoint waits for one.
        if not signum and self._meters.guard.in_a_row:
            return False
        saved = self._save_checkpoint(done, validation_is_due)
        self._checkpoint_is_due = False
        if saved and not signum and done < args.max_train_steps and self._publisher is not None:
            with self._weights.applied():
                self._publisher.checkpoint_saved(done, lambda folder: self._export(folder, self._figures))
        return saved

    def run_validation(self, step: int, grid_name: str | None = None) -> dict[str, Any]:
        """
        Validate and tell the figures.

        Args:
            step (`int`):
                Optimizer steps done.
            grid_name (`str`, *optional*):
                File of the picture grid; by default that of the step.

        Returns:
            `dict[str, Any]`: the figures.

        Raises:
            RuntimeError: if it failed in a process; a checkpoint was saved then.
        """
        figures: dict[str, Any] = {}
        error: Exception | None = None
        try:
            with self._weights.applied():
                figures = self._figures = self._validate(step, grid_name)
        except Exception as caught:
            error = caught
        self._end_if_failed("Validation failed", error, step, validation_is_due=grid_name is None)
        if figures:
            self._log.write(step, figures)
        return figures

    def finish(self) -> None:
        """The last validation, the trained pipeline, its upload. A signal no longer interrupts."""
        self._progress_bar.close()
        done = self._args.max_train_steps
        summary = self._meters.throughput.summary()
        if summary:
            self._log.write(done, {f"run/{name}": value for name, value in summary.items()})
            logger.info("Speed: %s.", ", ".join(f"{name} {value:g}" for name, value in summary.items()))
        self._refuse_non_finite(done)
        figures = self.run_validation(done, "grid.png")
        self._refuse_non_finite(done, figures.get("validation_loss", self._loss))
        error: Exception | None = None
        try:
            with self._weights.applied():
                if self._accelerator.is_main_process:
                    replace_contents(self._output_dir, lambda folder: self._export(folder, figures))
        except Exception as caught:
            error = caught
        self._end_if_failed("The trained pipeline could not be saved", error, done)
        loss = figures.get("validation_loss")
        logger.info(
            "What was trained is in %s%s.", self._output_dir, "" if loss is None else f"; held-out loss {loss:.4f}"
        )
        self._stop.settle()
        self._accelerator.end_training()
        if self._publisher is not None:
            self._publisher.finish()

    def _refuse_non_finite(self, done: int, loss: float | None = 0.0) -> None:
        """End the run without a checkpoint if trained weights or a loss (`None`: no finite one) are not finite."""
        error: Exception | None = None
        names = non_finite_parameters(self._weights.trained)
        if names:
            error = ValueError(f"{len(names)} trained parameters are not finite, such as {names[0]!r}")
        elif self._accelerator.is_main_process and (loss is None or not math.isfinite(loss)):
            error = ValueError(f"the loss of what was trained is {'not finite' if loss is None else loss}")
        faults = failures(self._accelerator, error)
        if faults:
            raise ValueError(
                f"Nothing is saved at step {done}: {'; '.join(faults)}. The last good checkpoint is"
                f" {self._checkpoints.last or 'none'}; a lower --learning_rate may help."
            )

    def _epoch(self, done: int) -> float | None:
        """Epochs that were seen; of a stream of unknown length, the number of the one that is read."""
        if self._place.num_samples is not None:
            return self._place.samples_seen(done) / self._place.num_samples
        return None if self._meters.stream is None else self._meters.stream.epoch

    def _write_log(self, done: int, learning_rate: float) -> None:
        values = {"epoch": self._epoch(done), "learning_rate": learning_rate, **self._meters.report()}
        self._log.write(done, values)
        self._loss = values["loss"]
        self._progress_bar.set_postfix(
            loss=values["loss"], lr=learning_rate, images_per_second=values["images_per_second"]
        )

    def _save_checkpoint(self, step: int, validation_is_due: bool = False) -> bool:
        """A checkpoint of everything that the next step needs, if there is none yet; whether it could be written."""
        if self._checkpoints.last == self._output_dir / f"checkpoint-{step}":
            return True
        self._refuse_non_finite(step)
        self._meters.gather()
        sharded = self._accelerator.distributed_type in SHARDING
        state = {
            "seed": self._args.seed,
            "samples_seen": self._place.samples_seen(step),
            "num_processes": self._accelerator.num_processes,
            "engine": self._accelerator.distributed_type.value if sharded else None,
            "unreadable_rows": sorted(self._meters.unreadable.rows),
            **self._meters.gather_stream(),
            "validation_is_due": validation_is_due,
            "tracker_run_id": self._log.run_id,
            "arguments": saved_arguments(self._args),
        }
        return self._checkpoints.save(step, state, rotate=not self._meters.guard.in_a_row)

    def _end_if_not_finite(self, done: int) -> None:
        """If too many gradients were not finite, end the run."""
        fault = self._meters.look_at_gradients(done)
        if fault is not None:
            raise ValueError(f"{fault} The last good checkpoint is {self._checkpoints.last or 'none'}.")

    def _end_if_failed(self, what: str, error: Exception | None, step: int, validation_is_due: bool = False) -> None:
        """If a process failed, end the run with a checkpoint: the steps until here were good."""
        faults = failures(self._accelerator, error)
        if not faults:
            return
        self._save_checkpoint(step, validation_is_due)
        raise RuntimeError(
            f"{what} after step {step}: {'; '.join(faults)}. The last good checkpoint is"
            f" {self._checkpoints.last or 'none'}; go on from it with --resume_from_checkpoint latest."
        ) from error

    def _leave(self, done: int, signum: int, saved: bool) -> None:
        """End the process, as it was asked to."""
        self._progress_bar.close()
        logger.warning(
            "Stopped by %s after step %d. %s; go on with --resume_from_checkpoint latest.",
            f"the file {STOP_FILE}" if signum == StopSignal.STOP_FILE else f"signal {signum}",
            done,
            f"{self._checkpoints.last} is saved"
            if saved
            else f"No checkpoint could be saved, the last good one is {self._checkpoints.last or 'none'}",
        )
        if self._publisher is not None:
            self._publisher.drop_waiting()
        self._stop.settle()
        self._accelerator.end_training()
        sys.exit(0 if signum == StopSignal.STOP_FILE else 128 + signum)
