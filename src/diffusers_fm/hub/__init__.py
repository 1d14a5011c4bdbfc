# SPDX-License-Identifier: Apache-2.0
from .cards import CardContent, Evaluation, Picture, model_card, with_evaluation
from .portable import portable_files, without_local_paths
from .push import PushMixin
from .reasons import hub_reason


__all__ = [
    "CardContent",
    "Evaluation",
    "Picture",
    "PushMixin",
    "hub_reason",
    "model_card",
    "portable_files",
    "with_evaluation",
    "without_local_paths",
]
