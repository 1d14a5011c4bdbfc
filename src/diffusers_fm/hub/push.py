# SPDX-License-Identifier: Apache-2.0
"""`push_to_hub` of diffusers, with a card that says something and nothing of the machine."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard

from .portable import portable_files


class PushMixin:
    """
    For components and pipelines: what diffusers saves and pushes goes out as [`portable_files`], with the card that
    the class writes. A card that the repository has already stays.
    """

    def build_model_card(self, repo_id: str) -> ModelCard:
        """
        The card of what is pushed.

        Args:
            repo_id (`str`):
                Where it goes.

        Returns:
            `ModelCard`: the card.
        """
        raise NotImplementedError

    def _upload_folder(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        """What `push_to_hub(...)` and `save_pretrained(..., push_to_hub=True)` of diffusers call at their end."""
        api = HfApi(token=token)
        files: dict[str, Any] = dict(portable_files(Path(working_dir)))
        # diffusers has written its template into the folder, all of it to be filled in.
        files.pop("README.md", None)
        if subfolder is None and not api.file_exists(repo_id, "README.md"):
            files["README.md"] = str(self.build_model_card(repo_id)).encode()
        return api.create_commit(
            repo_id,
            [
                CommitOperationAdd(name if subfolder is None else f"{subfolder}/{name}", content)
                for name, content in files.items()
            ],
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
        )
