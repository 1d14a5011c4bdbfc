# SPDX-License-Identifier: Apache-2.0
"""A run's way to the Hub: in the background, retried, and never the end of the run."""

import argparse
import json
import logging
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..files import replace_text
from ..hub.cards import Evaluation, with_evaluation
from ..hub.portable import components, portable_files
from ..hub.reasons import hub_reason
from .arguments import saved_arguments


logger = logging.getLogger(__name__)

# Seconds before an upload is tried again. The client has then repeated its requests for some time already.
RETRY_WAITS = (5, 30)

# Answers of the Hub that another try may change.
PASSING = (408, 425, 429)

STAGING = ".hub"

# What is to be loaded, in the snippet of a card that was written before the repository was known.
LOADED = re.compile(r'((?:from_pretrained|load_lora_weights)\(")([^"]+)')


def save_arguments(args: argparse.Namespace, output_dir: Path) -> None:
    """
    Write `training_args.json`.

    Args:
        args (`argparse.Namespace`):
            Arguments of the script.
        output_dir (`Path`):
            Folder of the run.
    """
    text = json.dumps(saved_arguments(args), indent=2)
    replace_text(output_dir / "training_args.json", text + "\n")


class Publisher:
    """
    Uploads what a run saves. Only the main process has one.

    Mistakes that no waiting repairs (a wrong token, a forbidden name) are errors of [`start`], before any work. A Hub
    that cannot be reached is not: the run goes on, and at its end says how to upload the folder.

    Args:
        args (`argparse.Namespace`):
            With the arguments of `add_hub_arguments`, and `hub_strategy`.
        output_dir (`Path`):
            Folder of the run; its name is the default of `hub_model_id`.

    Attributes:
        repo_id (`str`):
            The repository; as far as it is known before the Hub has answered.
    """

    def __init__(self, args: argparse.Namespace, output_dir: Path) -> None:
        self._args, self._output_dir = args, output_dir
        self._api = HfApi(token=args.hub_token)
        self._is_ready = False
        self._uploads: list[tuple[Future, Path]] = []
        self.repo_id: str = args.hub_model_id or output_dir.resolve().name
        self._called = {self.repo_id, str(output_dir)}

    def start(self) -> None:
        """
        Creates the repository and asks whether it may be written to.

        Raises:
            ValueError: if the Hub refuses, or the arguments do not fit what is there.
        """
        if self._args.push_dry_run:
            return
        shutil.rmtree(self._output_dir / STAGING, ignore_errors=True)
        try:
            self._prepare()
        except Exception as error:
            if _is_refusal(error):
                raise ValueError(f"The Hub refuses {self.repo_id!r}: {self._reason(error)}.") from error
            logger.warning(
                "The Hub cannot be reached now (%s). The run goes on, and tries again when it has something to send.",
                self._reason(error),
            )

    def checkpoint_saved(self, step: int, export: Callable[[Path], None]) -> None:
        """
        Uploads the pipeline as it is now in the background, if the strategy is to.

        Args:
            step (`int`):
                Optimizer steps done.
            export (`Callable`):
                Writes the pipeline and its card to a folder; not called if nothing is to be uploaded.
        """
        if self._args.push_dry_run or self._args.hub_strategy == "end":
            return
        folder = self._output_dir / STAGING / f"step-{step}"
        try:
            folder.mkdir(parents=True)
            for name in ("training_args.json", "log.jsonl"):
                if (self._output_dir / name).is_file():
                    shutil.copy(self._output_dir / name, folder / name)
            grids = sorted((self._output_dir / "samples").glob("*.png"), key=lambda file: file.stat().st_mtime)
            for grid in grids[-1:] or [self._output_dir / "grid.png"]:
                if grid.is_file():
                    shutil.copy(grid, folder / "grid.png")
            export(folder)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("Step %d is not uploaded (%s); training goes on.", step, self._reason(error))
            return
        if self._args.hub_strategy == "newest_checkpoint":
            self.drop_waiting()
        self._uploads.append((self._api.run_as_future(self._upload_step, folder, step), folder))

    def drop_waiting(self) -> None:
        """Forgets the checkpoints whose upload has not begun."""
        for upload, folder in self._uploads:
            if upload.cancel():
                shutil.rmtree(folder, ignore_errors=True)
        self._uploads = [(upload, folder) for upload, folder in self._uploads if not upload.done()]

    def finish(self) -> bool:
        """
        Uploads the output folder, after the checkpoints that are still to go; with `--push_dry_run`, lists its files.

        Returns:
            `bool`: whether it has been done. If not, the log says why, and how to do it.
        """
        if self._args.push_dry_run:
            self._list_files()
            return True
        if self._args.hub_strategy == "newest_checkpoint":
            self.drop_waiting()
        try:
            url = self._api.run_as_future(self._send, self._output_dir, "Add the trained pipeline").result()
        except BaseException as error:
            logger.warning(
                "The run is complete and saved in %s, but it could not be uploaded (%s). Upload it with `%s`.",
                self._output_dir,
                self._reason(error),
                self._command(),
            )
            if isinstance(error, Exception):
                return False
            raise
        finally:
            shutil.rmtree(self._output_dir / STAGING, ignore_errors=True)
        logger.info("Uploaded to %s.", url)
        return True

    def _prepare(self) -> None:
        args = self._args
        private = True if args.hub_private_repo else None
        repo_id = self._api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
        info = self._api.model_info(repo_id)
        if private and info.private is False:
            raise _Refusal("it exists and is public, which --hub_private_repo does not change")
        self._api.auth_check(repo_id, write=True)
        if args.hub_revision is not None:
            self._api.create_branch(repo_id, branch=args.hub_revision, exist_ok=True)
        self.repo_id, self._is_ready = repo_id, True
        if any(file.rfilename != ".gitattributes" for file in info.siblings or ()):
            logger.info("%s exists; what this run uploads becomes its next commit.", repo_id)

    def _upload_step(self, folder: Path, step: int) -> None:
        try:
            with _without_progress_bars():
                self._send(folder, f"Step {step}")
        except Exception as error:
            logger.warning("Step %d could not be uploaded (%s); training goes on.", step, self._reason(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _send(self, folder: Path, message: str) -> str:
        """One commit; its address. What the Hub has already, from an earlier try too, is not sent again."""
        for wait in (*RETRY_WAITS, None):
            try:
                if not self._is_ready:
                    self._prepare()
                commit = self._api.create_commit(
                    self.repo_id, self._operations(folder), commit_message=message, revision=self._args.hub_revision
                )
                return commit.commit_url
            except Exception as error:
                if wait is None or _is_refusal(error):
                    raise
                logger.info("%s: %s. Next try in %d seconds.", message, self._reason(error), wait)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _operations(self, folder: Path) -> list[CommitOperationAdd | CommitOperationDelete]:
        """The files of a folder; what else is in the same components on the Hub goes, such as shards of before."""
        files = portable_files(folder)
        card = files.get("README.md")
        if isinstance(card, Path):
            known = self._called | {self._saved_output_dir(folder)}
            text = LOADED.sub(
                lambda found: found[1] + (self.repo_id if found[2] in known else found[2]),
                card.read_text(encoding="utf-8"),
            )
            evaluation = Evaluation.read(folder)
            if evaluation is not None:
                text = str(with_evaluation(ModelCard(text), evaluation))
            files["README.md"] = text.encode()
        owned = tuple(f"{name}/" for name in components(folder))
        present = self._api.list_repo_files(self.repo_id, revision=self._args.hub_revision)
        stale = [name for name in present if name.startswith(owned) and name not in files]
        return [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]

    def _saved_output_dir(self, folder: Path) -> str | None:
        file = folder / "training_args.json"
        return json.loads(file.read_text(encoding="utf-8")).get("output_dir") if file.is_file() else None

    def _list_files(self) -> None:
        files = portable_files(self._output_dir)
        sizes = {n: len(c) if isinstance(c, bytes) else c.stat().st_size for n, c in files.items()}
        lines = [f"  {name}  {size:,} bytes" for name, size in sizes.items()]
        logger.info(
            "An upload to %s would send %d files, %s bytes:\n%s",
            self.repo_id,
            len(files),
            f"{sum(sizes.values()):,}",
            "\n".join(lines),
        )

    def _command(self) -> str:
        words = ["python", "-m", "diffusers_fm.push_to_hub", str(self._output_dir), "--hub_model_id", self.repo_id]
        if self._args.hub_revision is not None:
            words += ["--hub_revision", self._args.hub_revision]
        return shlex.join(words + ["--hub_private_repo"] * self._args.hub_private_repo)

    def _reason(self, error: BaseException) -> str:
        """A sentence's part, without the token."""
        plain = isinstance(error, (_Refusal, HFValidationError))
        reason = " ".join(str(error).split()).rstrip(".") if plain else hub_reason(error)
        token = self._args.hub_token
        return reason.replace(token, "...") if token else reason


class _Refusal(ValueError):
    """What is asked of the Hub contradicts what is there."""


def _is_refusal(error: BaseException) -> bool:
    """Whether trying again is no use."""
    if isinstance(error, HfHubHTTPError):
        return 400 <= error.response.status_code < 500 and error.response.status_code not in PASSING
    return isinstance(error, (_Refusal, HFValidationError, LocalTokenNotFoundError))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Bars of uploads in the background would run over the one of the training."""
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
