# SPDX-License-Identifier: Apache-2.0
"""How good a trained flow is: distances from data, likelihood, error against calls, straightness, memorisation."""

from .distances import frechet_distance, inception_score, kernel_distance, nearest, precision_and_recall
from .features import (
    FeatureExtractor,
    SmallClassifier,
    classifier_features,
    find_inception_weights,
    inception_features,
    train_classifier,
)
from .measures import accuracy, generate, likelihood, measure_features, neighbours, quality, solvers, ways
from .report import (
    METRICS_FILE,
    flat_rows,
    picture_grid,
    plot_loss_by_time,
    plot_solvers,
    plot_ways,
    pyplot,
    write_metrics,
    write_table,
)
from .sampling import SOLVER_CHOICES, Sampler, SolverChoice, straightness, trajectories
from .store import ResultStore


__all__ = [
    "METRICS_FILE",
    "SOLVER_CHOICES",
    "FeatureExtractor",
    "ResultStore",
    "Sampler",
    "SmallClassifier",
    "SolverChoice",
    "accuracy",
    "classifier_features",
    "find_inception_weights",
    "flat_rows",
    "frechet_distance",
    "generate",
    "inception_features",
    "inception_score",
    "kernel_distance",
    "likelihood",
    "measure_features",
    "nearest",
    "neighbours",
    "picture_grid",
    "plot_loss_by_time",
    "plot_solvers",
    "plot_ways",
    "precision_and_recall",
    "pyplot",
    "quality",
    "solvers",
    "straightness",
    "train_classifier",
    "trajectories",
    "ways",
    "write_metrics",
    "write_table",
]
