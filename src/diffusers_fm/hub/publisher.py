# SPDX-License-Identifier: Apache-2.0
"""Uploads to the Hub in the background, retried, and never the end of a run; and their arguments."""

import json
import logging
import shlex
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..arguments import Arguments, Free, option
from .cards import Evaluation, with_evaluation
from .portable import components, portable_card, portable_files, read_settings
from .push import hub_reason


logger = logging.getLogger(__name__)

# When a run uploads. With `newest_checkpoint` one that waits for the upload of another is dropped for a newer one.
HUB_STRATEGIES = ("end", "checkpoint", "newest_checkpoint")

# Seconds before an upload is tried again. The client has then repeated its requests for some time already.
RETRY_WAITS = (5, 30)

# Answers of the Hub that another try may change.
PASSING = (408, 425, 429)

STAGING = ".hub"


@dataclass(frozen=True, kw_only=True)
class HubArguments(Arguments):
    """Upload to the Hub."""

    _argument_group_name = "hub"

    push_to_hub: Free[bool] = option(False, "Upload the trained pipeline.")
    push_dry_run: Free[bool] = option(False, "Only list, at the end, the files that an upload would send.")
    hub_strategy: Free[str] = option("end", "Upload at the end, or at checkpoints too.", HUB_STRATEGIES)
    hub_model_id: Free[str | None] = option(None, "The repository; by default named like the output folder.")
    hub_token: Free[str | None] = option(None, "Token of the Hub; by default the one you logged in with.")
    hub_private_repo: Free[bool] = option(False, "Make the repository private.")
    hub_revision: Free[str | None] = option(None, "Branch to upload to; it is created if need be. By default main.")
    hub_license: Free[str | None] = option(
        None, "Licence of the model, by the Hub's identifier, such as apache-2.0; for its card."
    )


class Publisher:
    """
    Uploads of a run, by its main process.

    Mistakes that no waiting repairs (a wrong token, a forbidden name) are errors of [`start`], before any work. A Hub
    that cannot be reached is not: the run goes on, and at its end says how to upload the folder.
    """

    def __init__(self, args: HubArguments, output_dir: Path) -> None:
        self._args, self._output_dir = args, output_dir
        self._api = HfApi(token=args.hub_token)
        self._repo_id: str = args.hub_model_id or output_dir.resolve().name
        self._is_ready = False
        self._uploads: list[tuple[Future, Path]] = []

    @property
    def repo_id(self) -> str:
        """Name for the card's example: the repository, or the output folder until the Hub has named the repository."""
        return self._repo_id if self._is_ready else str(self._output_dir)

    def start(self) -> None:
        """Create the repository; a `ValueError` if the Hub refuses, or the arguments do not fit what is there."""
        if self._args.push_dry_run:
            return
        shutil.rmtree(self._output_dir / STAGING, ignore_errors=True)
        try:
            self._prepare()
        except Exception as error:
            if _is_refusal(error):
                raise ValueError(f"The Hub refuses {self._repo_id!r}: {self._reason(error)}.") from error
            logger.warning(
                "The Hub cannot be reached now (%s). The run goes on, and tries again when it has something to send.",
                self._reason(error),
            )

    def checkpoint_saved(self, step: int, export: Callable[[Path], None]) -> None:
        """Upload a checkpoint, which `export` writes to a folder, in the background, if the strategy is to."""
        if self._args.push_dry_run or self._args.hub_strategy == "end":
            return
        folder = self._output_dir / STAGING / f"step-{step}"
        try:
            folder.mkdir(parents=True)
            grids = sorted((self._output_dir / "samples").glob("*.png"), key=lambda file: file.stat().st_mtime)
            grid = grids[-1] if grids else self._output_dir / "grid.png"
            for name, file in {"grid.png": grid, "training_args.json": None, "log.jsonl": None}.items():
                file = file or self._output_dir / name
                if file.is_file():
                    shutil.copy(file, folder / name)
            export(folder)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("Step %d is not uploaded (%s); training goes on.", step, self._reason(error))
            return
        if self._args.hub_strategy == "newest_checkpoint":
            self.drop_waiting()
        self._uploads.append((self._api.run_as_future(self._upload_step, folder, step), folder))

    def drop_waiting(self) -> None:
        """Forget the checkpoints whose upload has not begun."""
        for upload, folder in self._uploads:
            if upload.cancel():
                shutil.rmtree(folder, ignore_errors=True)
        self._uploads = [(upload, folder) for upload, folder in self._uploads if not upload.done()]

    def finish(self) -> bool:
        """Upload the output folder after the waiting checkpoints; whether it succeeded. A dry run lists its files."""
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
        if args.hub_license is not None:
            # Of the Hub, before the training and not with the card at its end.
            try:
                ModelCard(f"---\nlicense: {json.dumps(args.hub_license)}\n---\n").validate()
            except ValueError as error:
                raise _Refusal(
                    f"--hub_license {args.hub_license!r} is no licence by its identifiers, such as apache-2.0"
                ) from error
        private = True if args.hub_private_repo else None
        repo_id = self._api.create_repo(self._repo_id, private=private, exist_ok=True).repo_id
        info = self._api.model_info(repo_id)
        if private and info.private is False:
            raise _Refusal("it exists and is public, which --hub_private_repo does not change")
        self._api.auth_check(repo_id, write=True)
        if args.hub_revision is not None:
            self._api.create_branch(repo_id, branch=args.hub_revision, exist_ok=True)
        self._repo_id, self._is_ready = repo_id, True
        if any(file.rfilename != ".gitattributes" for file in info.siblings or ()):
            logger.info("%s exists; what this run uploads becomes its next commit.", repo_id)

    def _upload_step(self, folder: Path, step: int) -> None:
        # Bars of uploads in the background would run over the one of the training.
        shown = not are_progress_bars_disabled()
        if shown:
            disable_progress_bars()
        try:
            self._send(folder, f"Step {step}")
        except Exception as error:
            logger.warning("Step %d could not be uploaded (%s); training goes on.", step, self._reason(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if shown:
                enable_progress_bars()

    def _send(self, folder: Path, message: str) -> str:
        """Make one commit and return its address. Files that the Hub has already are not sent again."""
        revision, waits = self._args.hub_revision, list(RETRY_WAITS)
        while True:
            try:
                if not self._is_ready:
                    self._prepare()
                files = self._operations(folder)
                return self._api.create_commit(
                    self._repo_id, files, commit_message=message, revision=revision
                ).commit_url
            except Exception as error:
                if not waits or _is_refusal(error):
                    raise
                logger.info("%s: %s. Next try in %d seconds.", message, self._reason(error), waits[0])
                time.sleep(waits.pop(0))

    def files(self, folder: Path) -> dict[str, Path | bytes]:
        """Files to upload, with the repository and measured figures in the card."""
        files = portable_files(folder)
        card = files.get("README.md")
        if isinstance(card, Path):
            arguments = folder / "training_args.json"
            saved = read_settings(arguments) if arguments.is_file() else {}
            own = {str(self._output_dir), saved.get("output_dir")}
            text = portable_card(card.read_text(encoding="utf-8"), self._repo_id, own)
            evaluation = Evaluation.read(folder)
            if evaluation is not None:
                text = str(with_evaluation(ModelCard(text), evaluation))
            files["README.md"] = text.encode()
        return files

    def _operations(self, folder: Path) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Additions of the files, and deletions of other files in the same components, such as former shards."""
        files = self.files(folder)
        owned = tuple(f"{name}/" for name in components(folder))
        present = self._api.list_repo_files(self._repo_id, revision=self._args.hub_revision)
        stale = [name for name in present if name.startswith(owned) and name not in files]
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        return [*additions, *(CommitOperationDelete(name) for name in stale)]

    def _list_files(self) -> None:
        files = self.files(self._output_dir).items()
        sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files}
        total, lines = sum(sizes.values()), "\n".join(f"  {name}  {size:,} bytes" for name, size in sizes.items())
        logger.info(f"An upload to %s would send %d files, {total:,} bytes:\n%s", self._repo_id, len(sizes), lines)

    def _command(self) -> str:
        words = ["python", "-m", "diffusers_fm.push_to_hub", str(self._output_dir), "--hub_model_id", self._repo_id]
        if self._args.hub_revision is not None:
            words += ["--hub_revision", self._args.hub_revision]
        return shlex.join(words + ["--hub_private_repo"] * self._args.hub_private_repo)

    def _reason(self, error: BaseException) -> str:
        """Part of a sentence, without the token."""
        plain = isinstance(error, (_Refusal, HFValidationError))
        reason = " ".join(str(error).split()).rstrip(".") if plain else hub_reason(error)
        token = self._args.hub_token
        return reason.replace(token, "...") if token else reason


class _Refusal(ValueError):
    """A request that contradicts what is on the Hub."""


def _is_refusal(error: BaseException) -> bool:
    """Return whether a retry is useless."""
    if isinstance(error, HfHubHTTPError):
        return 400 <= error.response.status_code < 500 and error.response.status_code not in PASSING
    return isinstance(error, (_Refusal, HFValidationError, LocalTokenNotFoundError))
