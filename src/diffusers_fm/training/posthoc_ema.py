# SPDX-License-Identifier: Apache-2.0
r"""Post-hoc EMA: averages of any width, from snapshots of two (arXiv 2312.02696, section 3.2 and appendix C).

A run with `--use_ema --ema_profile power` leaves snapshots in `ema_snapshots/`. From them

    python -m diffusers_fm.training.posthoc_ema runs/unet-digits \
      --sigma_rel 0.05 0.10 0.15

writes the weights of each width into the trained pipeline's folder, as a variant of diffusers:

    pipeline = FlowMatchPipeline.from_pretrained(
        "runs/unet-digits", variant="ema-0_100"
    )
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..arguments import Arguments, option, run_command
from ..files import replace_text, written_aside
from ..precision import to_float64
from .ema import AUXILIARY, SNAPSHOT_FOLDER, power_exponent, snapshot_files, width_name


WEIGHTS = "diffusion_pytorch_model"

# Error of a profile above which more snapshots are advised.
WARNED_ERROR = 0.01


def profile_product(
    time_1: np.ndarray | float,
    exponent_1: np.ndarray | float,
    time_2: np.ndarray | float,
    exponent_2: np.ndarray | float,
) -> np.ndarray:
    """
    Inner products of profiles that end at `time_i > 0` with exponents gamma_i: the integrals of `p_1(tau) p_2(tau)`,
    where `p_i(tau)` is `(gamma_i + 1) tau^gamma_i / t_i^(gamma_i + 1)` up to `t_i` and 0 after it. They broadcast.

    A tracked average is exactly its profile's integral over the weights, each of which holds for the unit of time that
    ends with its step. So nothing is lost by the continuous form.
    """
    later = np.maximum(time_1, time_2)
    # Powers of the ratio, which is at most 1, neither overflow nor lose digits.
    ratio = np.minimum(time_1, time_2) / later
    exponent = np.where(np.greater_equal(time_1, time_2), exponent_1, exponent_2)
    return (exponent_1 + 1) * (exponent_2 + 1) / (exponent_1 + exponent_2 + 1) * ratio**exponent / later


def posthoc_coefficients(
    times: np.ndarray, exponents: np.ndarray, time: float, exponent: float
) -> tuple[np.ndarray, float]:
    """
    Combination of tracked profiles, which end at `times` with `exponents`, nearest to the one that ends at `time` with
    `exponent`, among those whose coefficients sum to 1.

    Returns:
        `tuple[np.ndarray, float]`: the coefficients, of shape `(num_snapshots,)`, and the distance of their profile
        from the wanted one over the norm of that.
    """
    times = np.asarray(times, dtype=np.float64) / time
    exponents = np.asarray(exponents, dtype=np.float64)
    products = profile_product(times[:, None], exponents[:, None], times, exponents)
    wanted = profile_product(times, exponents, 1.0, exponent)
    norm = float(profile_product(1.0, exponent, 1.0, exponent))
    # Least squares with a Lagrange multiplier for the sum; a diagonal of ones makes the system well scaled.
    scale = 1 / np.sqrt(np.diag(products))
    size = len(times)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = products * scale[:, None] * scale
    system[:size, size] = system[size, :size] = scale
    solution = np.linalg.lstsq(system, np.append(wanted * scale, 1.0), rcond=None)[0]
    coefficients = solution[:size] * scale
    distance = norm - 2 * coefficients @ wanted + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(distance, 0.0) / norm))


@dataclass(frozen=True)
class Snapshot:
    """File of an average's weights, of width `sigma_rel` after `update` updates."""

    file: Path
    update: int
    sigma_rel: float


def find_snapshots(run: Path) -> list[Snapshot]:
    """Snapshots in a run's output folder, by update and width; a `ValueError` if there are none."""
    snapshots = []
    for file in snapshot_files(run):
        with safe_open(file, framework="pt") as reader:
            metadata = reader.metadata()
        snapshots.append(Snapshot(file, int(metadata["update"]), float(metadata["sigma_rel"])))
    if not snapshots:
        raise ValueError(
            f"There are no snapshots in {str(run / SNAPSHOT_FOLDER)!r}: train with --use_ema --ema_profile power."
        )
    return sorted(snapshots, key=lambda snapshot: (snapshot.update, snapshot.sigma_rel))


def posthoc_ema(
    snapshots: Sequence[Snapshot], sigma_rel: float, update: int | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """
    Average of a width in (0, 0.2887) from all snapshots of a run up to `update`, by default the last one's. One tensor
    of each is in memory at a time.

    Returns:
        `tuple[dict[str, torch.Tensor], float]`: the weights by name, float32, and the relative error of the profile.

    Raises:
        ValueError: if the width is out of range, there is no snapshot at the update, or weights are not finite.
    """
    exponent = power_exponent(sigma_rel)
    updates = sorted({snapshot.update for snapshot in snapshots})
    update = updates[-1] if update is None else update
    if update not in updates:
        raise ValueError(f"There is no snapshot at step {update}; there are snapshots at steps {updates}.")
    used = [snapshot for snapshot in snapshots if snapshot.update <= update]
    coefficients, error = posthoc_coefficients(
        np.array([snapshot.update for snapshot in used]),
        np.array([power_exponent(snapshot.sigma_rel) for snapshot in used]),
        update,
        exponent,
    )
    readers = [safe_open(snapshot.file, framework="pt") for snapshot in used]
    weights = {}
    # Auxiliary losses have no part in what is saved.
    for name in (name for name in readers[0].keys() if not name.startswith(f"{AUXILIARY}.")):
        total = torch.zeros((), dtype=torch.float64)
        for reader, coefficient in zip(readers, coefficients.tolist()):
            total = total + coefficient * to_float64(reader.get_tensor(name))
        weights[name] = total.float()
        if not weights[name].isfinite().all():
            raise ValueError(f"The snapshots up to step {update} hold weights that are not finite, such as {name!r}.")
    return weights, error


def _weight_files(run: Path) -> dict[str, list[Path]]:
    """Files of weights of each component of a saved pipeline, shards or one, none of a variant."""
    if not (run / "model_index.json").is_file():
        raise ValueError(f"There is no trained pipeline in {str(run)!r} yet, and so nothing to write the variant to.")
    components = {}
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        index = folder / f"{WEIGHTS}.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            components[folder.name] = [folder / name for name in sorted(names)]
        elif (folder / f"{WEIGHTS}.safetensors").is_file():
            components[folder.name] = [folder / f"{WEIGHTS}.safetensors"]
    return components


def _prefix(names: Iterable[str], keys: set[str]) -> str | None:
    """Prefix of a component's names in those of the trained model, if all names with it are the component's."""
    names = list(names)
    for prefix in ("", *sorted({f"{name.split('.')[0]}." for name in names})):
        group = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if set(group) <= keys:
            return prefix
    return None


def write_variant(run: Path, weights: dict[str, torch.Tensor], variant: str) -> list[Path]:
    """
    Write weights into a saved pipeline, as `from_pretrained(variant=...)` finds them; the files. What was not trained
    is copied, the dtype is that of the saved weights. Names are those of the model that was trained: a component's, or
    with `attribute.` before them. The variant has no dot.

    Raises:
        ValueError: if there is no pipeline, or weights that belong to none of its components.
    """
    left, plan = set(weights), []
    for files in _weight_files(run).values():
        keys: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as reader:
                keys.update(reader.keys())
        prefix = _prefix(sorted(left), keys)
        if prefix is not None and any(name.startswith(prefix) for name in left):
            plan.append((files, prefix))
            left -= {name for name in left if name.startswith(prefix)}
    if left:
        raise ValueError(f"No component in {str(run)!r} has the weights {sorted(left)[:3]} and {len(left)} in all.")
    return [file for files, prefix in plan for file in _write_component(files, weights, prefix, variant)]


def _write_component(files: list[Path], weights: dict[str, torch.Tensor], prefix: str, variant: str) -> list[Path]:
    written, weight_map, size = [], {}, 0
    for file in files:
        tensors = {}
        with safe_open(file, framework="pt") as reader:
            for key in reader.keys():
                saved: torch.Tensor = reader.get_tensor(key)
                weight = weights[prefix + key] if prefix + key in weights else saved
                tensors[key] = weight.to(saved.dtype).contiguous()
        target = file.with_name(file.name.replace(WEIGHTS, f"{WEIGHTS}.{variant}", 1))
        with written_aside(target) as aside:
            save_file(tensors, aside, metadata={"format": "pt"})
        written.append(target)
        weight_map.update(dict.fromkeys(tensors, target.name))
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = files[0].with_name(f"{WEIGHTS}.safetensors.index.{variant}.json")
        contents = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        replace_text(index, json.dumps(contents, indent=2) + "\n")
        written.append(index)
    return written


@dataclass(frozen=True, kw_only=True)
class VariantArguments(Arguments):
    """Run and averages."""

    _argument_group_name = "average"

    run: str = option(MISSING, "Output folder of a run with --use_ema --ema_profile power.")
    sigma_rel: list[float] = option(MISSING, "Relative widths, in (0, 0.2887).")
    step: int | None = option(None, "Step of the average; the last by default.")

    def check(self) -> None:
        for sigma_rel in self.sigma_rel:
            power_exponent(sigma_rel)


def write_variants(args: VariantArguments) -> None:
    """Write the weights of each width; a `ValueError` if there are no snapshots, or no pipeline."""
    run = Path(args.run).expanduser()
    snapshots = find_snapshots(run)
    for sigma_rel in args.sigma_rel:
        weights, error = posthoc_ema(snapshots, sigma_rel, args.step)
        variant = width_name(sigma_rel) + ("" if args.step is None else f"-step-{args.step}")
        files = write_variant(run, weights, variant)
        print(f"variant {variant}: {', '.join(str(file) for file in files)}; error of the profile {error:.2%}")
        if error > WARNED_ERROR:
            print(f"  {sigma_rel} is far from the tracked widths; more snapshots (--ema_snapshot_steps) would help.")


def main(argv: list[str] | None = None) -> int:
    """Write variants by a command line: 0 if it succeeded; 2, and a sentence, if not."""
    return run_command("posthoc_ema", write_variants, VariantArguments, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
