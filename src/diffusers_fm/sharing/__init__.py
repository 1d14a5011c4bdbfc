# SPDX-License-Identifier: Apache-2.0
from .cards import CardContent, Evaluation, Picture, model_card, with_evaluation
from .portable import portable_files, without_local_paths
from .push import PushMixin


__all__ = [
    "CardContent",
    "Evaluation",
    "Picture",
    "PushMixin",
    "model_card",
    "portable_files",
    "with_evaluation",
    "without_local_paths",
]
