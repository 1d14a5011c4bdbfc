# SPDX-License-Identifier: Apache-2.0
"""
Sampling plan: a grid of times and a solver as numbers, one row for each turn of the loop.

All of it is computed once, in float64 on the CPU, before the loop begins; a turn is then a sum of tensors with scalar
weights, whatever the path, the prediction type and the solver.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch

from ..coordinates import Coordinates, Row
from ..paths import ConditionalPath, OTPath
from ..solvers import ADAMS, TABLEAUX, ButcherTableau
from .multistep import CalibratedSteps, adams_increments


RUNGE_KUTTA = ("euler", "midpoint", "heun", "rk4", "dopri5")
SOLVERS = (*RUNGE_KUTTA, *ADAMS, "dpmpp_2m", "calibrated", "euler_maruyama", "flow_map")
DIFFUSION_FORMS = ("sigma", "sigma_squared", "constant")

STRAIGHT = OTPath()
# Where a stage of the path's own ODE is put that would lie at t = 0, if the path's rates are infinite there.
LEAST_NATIVE_TIME = 1e-7

# Steps of DPM-Solver++(2M) are of order 2 unless they are longer, in log-SNR, than the one before by more than this.
MAX_LOG_SNR_GROWTH = 3.0


@cache
def runge_kutta_tableau(solver: str) -> ButcherTableau:
    """The tableau of a solver in a sampling loop."""
    return TABLEAUX[solver if solver in RUNGE_KUTTA else "euler"].without_error_estimate()


class Stage(NamedTuple):
    """
    One turn of the loop: a call of the network at `x` and what becomes of its answer.

    The derivative is `on_sample * x + on_output * model_output`. The turn's result is `keep` times the point at which
    the step began, plus the latest `len(weights)` derivatives, each by its weight, plus `noise` times fresh noise. It
    is the input of the step's next stage or, after the last stage, the step's end. Points are in the path's own
    coordinates, derivatives in those of the integration.

    Args:
        t (`float`):
            The path's time, 0 = data, 1 = noise.
        ratio (`float`):
            The straight time, `sigma / (alpha + sigma)`.
        on_sample (`float`):
            Weight of `x` in the derivative.
        on_output (`float`):
            Weight of the network's answer in the derivative.
        keep (`float`):
            Weight of the step's beginning in the result.
        weights (`tuple[float, ...]`):
            Weights of the latest derivatives in the result, this stage's last.
        first (`bool`):
            Whether the stage begins a step.
        last (`bool`):
            Whether the stage ends a step.
        end (`tuple[float, float]`):
            `alpha` and `sigma` where the step ends.
        noise (`float`):
            Standard deviation of the noise that is added.
        retain (`int`):
            How many of the latest derivatives later stages still need.
        estimates (`tuple[float, ...]`, *optional*):
            Where the data estimate is clipped: the weights of `x` and the answer in it, those in the noise estimate,
            and of both estimates in the result.
    """

    t: float
    ratio: float
    on_sample: float
    on_output: float
    keep: float
    weights: tuple[float, ...]
    first: bool
    last: bool
    end: tuple[float, float]
    noise: float = 0.0
    retain: int = 0
    estimates: tuple[float, ...] | None = None


def stage_table(stages: Sequence[Stage]) -> torch.Tensor:
    """The numbers of all stages, a row each, for compiled steps: their columns are read by `SamplingLoop`."""
    longest = max(len(stage.weights) for stage in stages)
    rows = [
        (stage.on_sample, stage.on_output, stage.keep, stage.noise, float(stage.first), *(stage.estimates or ()))
        + (0.0,) * (longest - len(stage.weights))
        + stage.weights
        for stage in stages
    ]
    return torch.tensor(rows, dtype=torch.float64)


def end_point(path: ConditionalPath, ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`alpha` and `sigma` at straight times; below the path's own end, those of clean data."""
    t = path.time_at(ratios)
    beyond = ratios < path.ratio_min
    alpha, sigma = path.alpha(t), path.sigma(t)
    return torch.where(beyond, torch.ones_like(alpha), alpha), torch.where(beyond, torch.zeros_like(sigma), sigma)


@dataclass(frozen=True)
class SamplingPlan:
    """
    What is fixed before a grid is known: the path, the network's answer and the way of sampling.

    Args:
        path (`ConditionalPath`):
            The path.
        prediction_type (`str`):
            What the network answers.
        solver (`str`):
            A name in `SOLVERS`.
        sampling_path (`str`):
            The coordinates, a name in `SAMPLING_PATHS`.
        sigma_data (`float`):
            The standard deviation of the data, for `angle`.
        eta (`float`):
            Of the noise, the share that a step replaces by fresh noise, in units of the ancestral step; infinite
            replaces all of it.
        churn (`tuple[float, float, float, float]`):
            `s_churn`, `s_tmin`, `s_tmax`, `s_noise` of EDM (arXiv 2206.00364, algorithm 2), on `sigma / alpha`.
        diffusion (`tuple[str, float]`):
            Form and scale of the diffusion coefficient of `euler_maruyama`.
        calibrated_steps (`tuple[CalibratedSteps, ...]`):
            What `calibrated` was fitted to.
        clips (`bool`):
            Whether the data estimate is clipped.
    """

    path: ConditionalPath
    prediction_type: str
    solver: str
    sampling_path: str
    sigma_data: float
    eta: float
    churn: tuple[float, float, float, float]
    diffusion: tuple[str, float]
    calibrated_steps: tuple[CalibratedSteps, ...] = ()
    clips: bool = False

    def stages(self, ratios: torch.Tensor) -> list[Stage]:
        """
        Lay out the solver over a grid.

        Where the last step of a Runge-Kutta method leads beyond the path's own end (`ratio_min` above 0), or the
        answer at its last stage determines no estimate of the noise, it is one straight Euler step to the data.

        Args:
            ratios (`torch.Tensor` of shape `(steps + 1,)`):
                Straight times in float64, descending, the end included.

        Returns:
            `list[Stage]`: The turns of the loop.

        Raises:
            ValueError: If the derivative is undefined where the grid begins.
        """
        # The coordinates of the plain OT path are the straight ones, and need no conversions.
        plain = self.sampling_path != "angle" and self.path == STRAIGHT
        coordinates = Coordinates(self.path, "native" if plain else self.sampling_path, self.sigma_data)
        if self.solver == "euler_maruyama":
            return self._euler_maruyama(coordinates, ratios)
        if self.eta > 0 or self.clips:
            return self._renoised(ratios)
        if self.solver == "dpmpp_2m":
            return _with_retention(self._dpmpp_2m(ratios))
        euler = self.solver in ("euler", "flow_map") and self.churn[0] == 0
        if plain and euler and self.prediction_type == "flow_prediction":
            # The commonest loop, in half the time: x + (next - now) * answer.
            pairs = pairwise(ratios.tolist())
            return [Stage(now, now, 0.0, 1.0, 1.0, (end - now,), True, True, (1 - end, end)) for now, end in pairs]

        starts, ends = self._churned(ratios), ratios[1:]
        tableau = runge_kutta_tableau(self.solver)
        if self.solver == "calibrated":
            return _with_retention(self._calibrated(coordinates, ratios))
        if self.solver in ADAMS:
            # Its calls all lie before the end: only the path's own time, which stops there, cannot lead beyond.
            jumps = ratios[-1].item() < self.path.ratio_min and self.sampling_path == "native"
            body = self._adams(coordinates, ratios[:-1] if jumps else ratios)
        else:
            jumps = self._jumps(tableau, ratios[-1].item())
            steps = len(ends) - jumps
            body = self._runge_kutta(coordinates, tableau, starts[:steps], ends[:steps])
        if jumps:
            straight = Coordinates(self.path, "ot", self.sigma_data)
            body += self._runge_kutta(straight, TABLEAUX["euler"], starts[-1:], ends[-1:])
        if self.churn[0] > 0:
            body = self._with_churn(body, starts, ratios)
        return _with_retention(body)

    def _coefficients(self, t: torch.Tensor, target: str | Row) -> Row:
        return self.path.coefficients(t, self.prediction_type, target)

    def _jumps(self, tableau: ButcherTableau, end: float) -> bool:
        """Return whether the last step leaves the path, or has a stage where the answer determines no derivative."""
        if end < self.path.ratio_min or end > 0.0 or max(tableau.c) < 1.0:
            return end < self.path.ratio_min
        zero = torch.zeros((), dtype=torch.float64)
        straight = Coordinates(self.path, "ot", self.sigma_data)
        return not bool(self.path.determines(zero, self.prediction_type, straight.derivative(zero)))

    def _runge_kutta(
        self, coordinates: Coordinates, tableau: ButcherTableau, starts: torch.Tensor, ends: torch.Tensor
    ) -> list[Stage]:
        u = coordinates.node(starts)
        steps = coordinates.node(ends) - u
        t = coordinates.time(u[:, None] + steps[:, None] * u.new_tensor(tableau.c))
        if self.sampling_path == "native" and not math.isfinite(self.path.d_sigma(t.new_zeros(())).item()):
            # The rates of VP are infinite at t = 0, where its flow is smooth: its last stage lies beside that.
            t = t.clamp(min=LEAST_NATIVE_TIME)
        scale = coordinates.scale_at(t)
        on_sample, on_output = coordinates.coefficients(t, self.prediction_type)
        end_alpha, end_sigma = end_point(self.path, ends)
        # Stage j leads to stage j + 1, the last one to the end of the step.
        arrival = torch.cat([scale[:, 1:], coordinates.scale(end_alpha, end_sigma)[:, None]], dim=1)
        keep = _exact_one(arrival / scale[:, :1])
        increments = arrival * steps[:, None]

        rows = [_without_leading_zeros(row) for row in (*tableau.a[1:], tableau.b)]
        table = torch.stack([t, self.path.ratio(t), on_sample, on_output, keep], dim=2).tolist()
        points = list(zip(end_alpha.tolist(), end_sigma.tolist()))
        return [
            Stage(t, s, on_x, on_output, kept, tuple([size * w for w in rows[j]]), j == 0, j == len(rows) - 1, end)
            for stages, sizes, end in zip(table, increments.tolist(), points)
            for j, ((t, s, on_x, on_output, kept), size) in enumerate(zip(stages, sizes))
        ]

    def _adams(self, coordinates: Coordinates, ratios: torch.Tensor) -> list[Stage]:
        """
        Adams-Bashforth with variable steps; with the Moulton corrector, each call also corrects the steps that led to
        it: one, and in the angle, where derivatives change little in a step, as many as lie between its derivatives.
        """
        order, corrector = ADAMS[self.solver]
        corrected = (order - 1 if self.sampling_path == "angle" else 1) if corrector else 0
        nodes = coordinates.node(ratios).tolist()
        return self._multistep(
            coordinates, ratios, adams_increments(nodes[0], nodes[:-1], nodes[-1], order, corrected)
        )

    def _calibrated(self, coordinates: Coordinates, ratios: torch.Tensor) -> list[Stage]:
        """
        Steps by weights that were fitted to a network; on any other grid, such as the rest of a loop that is entered
        later, the predictor-corrector of order 3.
        """
        for steps in self.calibrated_steps:
            if len(steps.sigmas) == len(ratios) - 1 and torch.allclose(
                ratios[:-1], ratios.new_tensor(steps.sigmas), rtol=0.0, atol=1e-6
            ):
                return self._multistep(coordinates, ratios, steps.weights, steps.keep)
        return replace(self, solver="abm3")._adams(coordinates, ratios)

    def _multistep(
        self,
        coordinates: Coordinates,
        ratios: torch.Tensor,
        increments: Sequence[Sequence[float]],
        fitted_keep: Sequence[float] | None = None,
    ) -> list[Stage]:
        """
        Steps that add the latest derivatives, each by its weight, to the sample at hand.

        Fitted steps also weigh the sample. Their first call is given noise as it is at t = 1, at a time before that:
        in the angle it would differ by a factor from a point of the path only, and the steps begin at t = 1.
        """
        t = coordinates.time(coordinates.node(ratios[:-1]))
        scale = coordinates.scale_at(t)
        arrival = coordinates.scale(*end_point(self.path, ratios[1:]))
        weights = [tuple(factor * part for part in parts) for factor, parts in zip(arrival.tolist(), increments)]
        keep = torch.ones_like(scale)
        if fitted_keep is not None:
            one = torch.ones((), dtype=torch.float64)
            scale = torch.cat([coordinates.scale_at(one)[None], scale[1:]])
            keep = keep.new_tensor(fitted_keep)
        return self._single_stages(ratios, t, coordinates.derivative(t), keep * (arrival / scale), weights)

    def _dpmpp_2m(self, ratios: torch.Tensor) -> list[Stage]:
        """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), with no logarithm at either end."""
        t = self.path.time_at(ratios[:-1])
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        end_alpha, end_sigma = end_point(self.path, ratios[1:])
        keep = torch.where(sigma > 0, end_sigma / sigma, torch.ones_like(sigma))
        gain = end_alpha - alpha * keep
        log_snr = torch.log(torch.cat([alpha, end_alpha[-1:]]) / torch.cat([sigma, end_sigma[-1:]]))
        steps = log_snr.diff()
        weights: list[tuple[float, ...]] = [(gain[0].item(),)]
        for i in range(1, len(t)):
            # From pure noise, where the grid stands still, and towards data that are clean or nearly so, the older
            # estimate has no say: it would be continued over a step many times as long as the one it was made in.
            growth = (steps[i] / steps[i - 1]).item()
            older = growth / 2 if growth <= MAX_LOG_SNR_GROWTH else 0.0
            weights.append((-gain[i].item() * older, gain[i].item() * (1 + older)))
        return self._single_stages(ratios, t, "sample", keep, weights)

    def _renoised(self, ratios: torch.Tensor) -> list[Stage]:
        """
        To the data estimate with part of the noise estimate replaced by fresh noise: DDIM's family (arXiv 2010.02502,
        equation 12) on any path. `eta` 0 is the ODE's Euler step, 1 the ancestral step of DDPM.
        """
        t = self.path.time_at(ratios[:-1])
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        end_alpha, end_sigma = end_point(self.path, ratios[1:])
        if math.isinf(self.eta):
            fresh = end_sigma
        else:
            kept = torch.where(sigma > 0, alpha * end_sigma / (end_alpha * sigma), torch.ones_like(sigma))
            fresh = self.eta * end_sigma * torch.sqrt((1 - kept.square()).clamp(min=0))
        noise = torch.sqrt((end_sigma.square() - fresh.square()).clamp(min=0))
        data_sample, data_output = self._coefficients(t, "sample")
        noise_sample, noise_output = self._coefficients(t, "epsilon")
        keep = end_alpha * data_sample + noise * noise_sample
        weights = [(weight,) for weight in (end_alpha * data_output + noise * noise_output).tolist()]
        stages = self._single_stages(ratios, t, self.prediction_type, keep, weights, fresh)
        if self.clips:
            columns = (data_sample, data_output, noise_sample, noise_output, end_alpha, noise)
            estimates = torch.stack(columns, dim=1).tolist()
            stages = [stage._replace(estimates=tuple(row)) for stage, row in zip(stages, estimates)]
        return stages

    def _euler_maruyama(self, coordinates: Coordinates, ratios: torch.Tensor) -> list[Stage]:
        """
        Euler-Maruyama of the SDE with the ODE's marginals, `dX = (dX/du - w / 2 score) du + sqrt(w) dW` (arXiv
        2401.08740, equation 4), backwards in `u`. The last step is the ODE's.
        """
        u = coordinates.node(ratios)
        h = -u.diff()
        t = coordinates.time(u[:-1])
        scale = coordinates.scale_at(t)
        level = self.path.sigma(t) / scale
        arrival = coordinates.scale(*end_point(self.path, ratios[1:]))
        form, size = self.diffusion
        w = size * level ** {"sigma": 1, "sigma_squared": 2, "constant": 0}[form]
        w = torch.cat([w[:-1], w.new_zeros(1)])
        slope_sample, slope_output = coordinates.coefficients(t, self.prediction_type)
        noise_sample, noise_output = self._coefficients(t, "epsilon")
        # The score in these coordinates is minus the noise estimate over its level.
        drift = torch.where(w > 0, h * w / (2 * level), torch.zeros_like(w))
        keep = arrival * (1 / scale - h * slope_sample - drift * noise_sample)
        weights = [(weight,) for weight in (arrival * (-h * slope_output - drift * noise_output)).tolist()]
        return self._single_stages(ratios, t, self.prediction_type, keep, weights, arrival * torch.sqrt(w * h))

    def _single_stages(
        self,
        ratios: torch.Tensor,
        t: torch.Tensor,
        derivative: str | Row,
        keep: torch.Tensor,
        weights: list[tuple[float, ...]],
        noise: torch.Tensor | None = None,
    ) -> list[Stage]:
        on_sample, on_output = self._coefficients(t, derivative)
        noise = torch.zeros_like(t) if noise is None else noise
        ends = torch.stack(end_point(self.path, ratios[1:]), dim=1).tolist()
        table = torch.stack([t, self.path.ratio(t), on_sample, on_output, _exact_one(keep)], dim=1).tolist()
        return [
            Stage(*row, weights=weight, first=True, last=True, end=(end[0], end[1]), noise=level)
            for row, weight, end, level in zip(table, weights, ends, noise.tolist())
        ]

    def _churned(self, ratios: torch.Tensor) -> torch.Tensor:
        """Starts of the steps after noise was added: `sigma / alpha` times `1 + gamma`, from the second step on."""
        starts = ratios[:-1]
        s_churn, s_tmin, s_tmax, _ = self.churn
        if s_churn == 0:
            return starts
        level = starts / (1 - starts)
        gamma = min(s_churn / len(starts), math.sqrt(2) - 1)
        churned = torch.where((level >= s_tmin) & (level <= s_tmax), level * (1 + gamma), level)
        churned[0] = level[0]
        return torch.where(starts < 1, churned / (1 + churned), starts).clamp(max=self.path.ratio_max)

    def _with_churn(self, stages: list[Stage], starts: torch.Tensor, ratios: torch.Tensor) -> list[Stage]:
        """Add to the end of each step the noise that lifts it to where the next one begins."""
        alpha, sigma = end_point(self.path, ratios[1:-1])
        up_alpha, up_sigma = end_point(self.path, starts[1:])
        lift = up_alpha / alpha
        noise = torch.sqrt((up_sigma.square() - (lift * sigma).square()).clamp(min=0)) * self.churn[3]
        churn = iter(zip(lift.tolist(), noise.tolist()))
        return [
            stage._replace(
                keep=stage.keep * factor,
                weights=tuple(factor * weight for weight in stage.weights),
                noise=level,
            )
            for stage in stages
            for factor, level in [next(churn, (1.0, 0.0)) if stage.last else (1.0, 0.0)]
        ]


def _exact_one(keep: torch.Tensor) -> torch.Tensor:
    """Ones that are ones but for rounding, so that a turn can leave out a multiplication."""
    return torch.where((keep - 1).abs() < 1e-14, 1.0, keep)


def _without_leading_zeros(row: tuple[float, ...]) -> tuple[float, ...]:
    first = next(i for i, weight in enumerate(row) if weight != 0.0)
    return row[first:]


def _with_retention(stages: list[Stage]) -> list[Stage]:
    """Note for each stage how many derivatives those after it look back on."""
    if all(len(stage.weights) == 1 for stage in stages):
        return stages
    retain = 0
    counted: list[Stage] = []
    for stage in reversed(stages):
        counted.append(stage._replace(retain=retain))
        retain = max(len(stage.weights) - 1, retain - 1, 0)
    return counted[::-1]
