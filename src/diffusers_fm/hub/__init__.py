# SPDX-License-Identifier: Apache-2.0
"""Model cards, the files that go to the Hub, and their upload."""

from .cards import CardContent, Evaluation, Picture, model_card


__all__ = ["CardContent", "Evaluation", "Picture", "model_card"]
