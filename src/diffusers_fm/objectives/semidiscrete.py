# SPDX-License-Identifier: Apache-2.0
"""Semidiscrete coupling in training: each noise goes with the sample in whose cell it lies."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from tqdm.auto import tqdm

from ..arguments import Arguments, Count, Needs, option
from ..couplings import cell_masses, fit_semidiscrete, semidiscrete_assignment, share_variance
from ..data.arrays import ArrayData
from ..data.cache import DryAccelerator
from ..data.images import ImageData
from ..data.loading import num_in_memory, read_samples, rows_by_label
from ..data.randomness import make_generator
from ..training.arguments import ObjectiveArguments
from ..training.run import TrainingRun


logger = logging.getLogger(__name__)

# Noise for each sample by which the fit is measured.
MEASURED = 20


@dataclass(frozen=True, kw_only=True)
class SemidiscreteArguments(Arguments):
    """Semidiscrete coupling of noise to all data."""

    _argument_group_name = "semidiscrete coupling"

    semidiscrete_ot: bool = option(
        False, "Pair noise with the data by optimal transport to the whole, small data set (arXiv 2509.25519)."
    )
    semidiscrete_steps: Annotated[Count, Needs("semidiscrete_ot", True)] = option(1000, "Steps of its fit.")

    def check(self) -> None:
        if not (self.semidiscrete_ot and isinstance(self, ObjectiveArguments)):
            return
        for name in ("random_flip", "streaming", "noise_column", "repa_teacher"):
            if getattr(self, name, None):
                raise ValueError(
                    f"--semidiscrete_ot takes samples of the whole data set as they are: leave out --{name}."
                )
        if self.coupling != "independent":
            raise ValueError(f"--coupling {self.coupling} does not go with --semidiscrete_ot.")


class SemidiscreteCoupling:
    """
    Coupling of standard normal noise to a finite data set (arXiv 2509.25519), within a label where there are labels:
    otherwise the noise of a label would not be normal any more.

    Args:
        data (`torch.Tensor` of shape `(num_samples, ...)`):
            All data, float32.
        labels (`torch.Tensor` of shape `(num_samples,)`, *optional*):
            Their labels.
        null_class (`int`, *optional*):
            Label of dropped labels, for which noise is paired with all data.
        seed (`int`), num_steps (`int`):
            Of the fit.
        hidden (`bool`, *optional*, defaults to `False`):
            Show no progress of the fit, which takes `num_steps` products of noise and data for each label.
    """

    def __init__(
        self,
        data: torch.Tensor,
        labels: torch.Tensor | None,
        null_class: int | None,
        seed: int,
        num_steps: int,
        hidden: bool = False,
    ) -> None:
        self._data = data
        self._rows = rows_by_label(data, labels, null_class)
        self._potentials: dict[int | None, torch.Tensor] = {}
        worst = 0.0
        for label, members in tqdm(self._rows.items(), desc="Semidiscrete coupling", unit="label", disable=hidden):
            generator = make_generator(seed, "semidiscrete", str(label), device=data.device)
            self._potentials[label] = fit_semidiscrete(data[members], generator, num_steps)
            count = MEASURED * len(members)
            worst = max(worst, cell_masses(data[members], self._potentials[label], count, generator)[1])
        self.variance = worst
        self._counts = torch.zeros(len(data), dtype=torch.int64, device=data.device)

    def pair(self, noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """
        Data that go with noise.

        Args:
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Labels that the network is given, dropped ones as such.

        Returns:
            `torch.Tensor` of the shape of `noise`.
        """
        chosen = torch.empty(len(noise), dtype=torch.int64, device=noise.device)
        for label in [None] if labels is None else labels.unique().tolist():
            own = torch.ones_like(chosen, dtype=torch.bool) if label is None else labels == label
            members = self._rows[label]
            found = semidiscrete_assignment(self._data[members], noise[own], self._potentials[label])
            chosen[own] = members[found]
        self._counts += chosen.bincount(minlength=len(self._counts))
        return self._data[chosen]

    def figures(self) -> dict[str, float]:
        """`coupling_variance`: [`~couplings.share_variance`] of the shares in training, once there are some."""
        return {"coupling_variance": share_variance(self._counts)} if self._counts.any() else {}


def couple_to_all(
    run: TrainingRun[Any],
    data: Any,
    encode: Callable[[dict[str, Any]], torch.Tensor],
    null_class: int | None,
) -> SemidiscreteCoupling | None:
    """
    [`SemidiscreteCoupling`] to the data set of a run, or `None` without `--semidiscrete_ot` and in a dry run.

    Args:
        run ([`TrainingRun`]):
            With the arguments.
        data ([`ImageData`] or [`ArrayData`]):
            Data set, whose samples are the same at each visit.
        encode (`Callable`):
            Called as `encode(batch)`: data as the flow sees it, of shape `(batch_size, ...)`.
        null_class (`int`, *optional*):
            Label of dropped labels.

    Raises:
        ValueError: if images are cropped anywhere, or there are too many data.
    """
    if not run.args.semidiscrete_ot or isinstance(run.accelerator, DryAccelerator):
        return None
    if isinstance(data, ImageData) and not data.transform.center_crop:
        raise ValueError("--semidiscrete_ot needs images that are always cropped alike: give --center_crop.")
    if not isinstance(data, (ImageData, ArrayData)):
        raise ValueError(f"--semidiscrete_ot needs a finite data set, got a {type(data).__name__}.")
    if len(data) > num_in_memory(data, encode):
        raise ValueError(f"--semidiscrete_ot keeps all data in memory, and {len(data)} samples are too many for it.")
    coupling = SemidiscreteCoupling(
        *read_samples(data, encode, len(data), run.args.eval_batch_size),
        null_class,
        run.seed,
        run.args.semidiscrete_steps,
        hidden=not run.accelerator.is_local_main_process,
    )
    logger.info(
        "Semidiscrete coupling: the samples' shares of the noise have a variance of %.2g beyond that of chance.",
        coupling.variance,
    )
    return coupling
