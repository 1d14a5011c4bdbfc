# SPDX-License-Identifier: Apache-2.0
"""diffusers' `push_to_hub` with a card and without local paths, and the Hub's refusals as a part of a sentence."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from .portable import clean_settings, portable_files


ADVICE = {401: "log in with `hf auth login`, or set HF_TOKEN", 403: "the token has to be one that may do this"}


class PushMixin:
    """
    For components and pipelines: `save_pretrained` writes no path of this machine, and what diffusers pushes are
    [`portable_files`] with the card of the class. A card that the repository has already stays.
    """

    def build_model_card(self, repo_id: str) -> ModelCard:
        """The card of what is pushed to `repo_id`."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves to a folder; takes what diffusers' `save_pretrained` takes, such as `variant` and `push_to_hub`."""
        save: Any = super()
        save.save_pretrained(os.fspath(save_directory), *args, **kwargs)
        clean_settings(Path(save_directory))

    def _upload_folder(
        self, working_dir: str, repo_id: str, subfolder: str | None = None, **options: Any
    ) -> CommitInfo:
        """Last step of diffusers' `push_to_hub(...)` and `save_pretrained(..., push_to_hub=True)`."""
        api = HfApi(token=options.get("token"))
        files = portable_files(Path(working_dir))
        # diffusers has written its template into the folder, all of it to be filled in.
        files.pop("README.md", None)
        if subfolder is None and not api.file_exists(repo_id, "README.md"):
            files["README.md"] = str(self.build_model_card(repo_id)).encode()
        under = "" if subfolder is None else f"{subfolder}/"
        additions = [CommitOperationAdd(f"{under}{name}", content) for name, content in files.items()]
        message = options.get("commit_message") or f"Upload {type(self).__name__}"
        return api.create_commit(repo_id, additions, commit_message=message, create_pr=options.get("create_pr"))


def hub_reason(error: BaseException) -> str:
    """Why the Hub, or the way to it, refused: one line without a full stop."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = f" ({error.server_message.rstrip('.')})" if error.server_message else ""
        advice = f"; {ADVICE[status]}" if status in ADVICE else ""
        return f"it answers {status}{said}{advice}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
