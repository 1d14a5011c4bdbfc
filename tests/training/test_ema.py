# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights: their profiles, where they live, and other widths made of them afterwards."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from processes import check_processes
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_pipeline
from training_runs import ROOT, make_dataset, save_untrained, train, weights

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.training.ema import EMA, ConstantDecay, PowerFunction, power_exponent, snapshot_files, width_name
from diffusers_fm.training.posthoc_ema import (
    Snapshot,
    find_snapshots,
    main,
    posthoc_coefficients,
    posthoc_ema,
    profile_product,
    write_variant,
)


pytestmark = pytest.mark.usefixtures("networks_of_one_level")


def random_walk(model: torch.nn.Module, num_steps: int) -> list[list[torch.Tensor]]:
    """Weights as an optimizer might leave them after each step."""
    generator = torch.Generator().manual_seed(0)
    walk, weight = [], [p.detach().clone() for p in model.parameters()]
    for _ in range(num_steps):
        weight = [w + torch.randn(w.shape, generator=generator) for w in weight]
        walk.append(weight)
    return walk


def track(ema: EMA, model: torch.nn.Module, walk: list[list[torch.Tensor]]) -> None:
    for values in walk:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values):
                parameter.copy_(value)
        ema.step()


def test_constant_decay_is_that_of_diffusers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    stock = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, inv_gamma=2.0, power=0.8)
    ema = EMA(model, [ConstantDecay(0.9, 2.0, 0.8)])
    for values in random_walk(model, 40):
        track(ema, model, [values])
        stock.step(model.parameters())
    # 40 roundings of float32, of numbers below 20.
    for average, shadow in zip(ema.average().values(), stock.shadow_params):
        torch.testing.assert_close(average, shadow, rtol=0, atol=40 * 2**-24 * 20)
    assert ConstantDecay(0.9, 2.0, 0.8).decay(40) == stock.get_decay(40) == 0.9


@pytest.mark.parametrize("resumed_at", [None, 9, 21])
def test_averages_that_begin_anew_know_nothing_of_before(
    resumed_at: int | None, tmp_path: Path, accelerator: Accelerator
) -> None:
    model = torch.nn.Linear(3, 4)
    walk, profiles = random_walk(model, 30), [ConstantDecay(0.9), PowerFunction(0.1)]
    ema = EMA(model, profiles, restarts=[3, 12])
    for done, values in enumerate(walk, 1):
        track(ema, model, [values])
        ema.save_snapshots(accelerator, tmp_path)
        if done == resumed_at:
            state = ema.state_dict()
            ema = EMA(model, profiles, restarts=[3, 12])
            ema.load_state_dict(state)
    later = EMA(model, profiles)
    track(later, model, walk[12:])
    for number in range(2):
        for one, other in zip(ema.average(number).values(), later.average(number).values()):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    snapshots = find_snapshots(tmp_path)
    assert [snapshot.update for snapshot in snapshots] == list(range(1, 19))
    assert min(snapshot_files(tmp_path).values()) == 13
    assert ConstantDecay(0.9).decay(1) == PowerFunction(0.1).decay(1) == 0


@pytest.mark.parametrize(("sigma_rel", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(sigma_rel: float, exponent: float) -> None:
    assert power_exponent(sigma_rel) == pytest.approx(exponent, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25, 0.2886])
def test_a_power_function_is_as_wide_as_it_is_called(sigma_rel: float) -> None:
    # The weight of each step in the average, by tracking its indicator.
    num_steps = 2000
    profile = np.zeros(num_steps)
    for n in range(1, num_steps + 1):
        decay = PowerFunction(sigma_rel).decay(n)
        profile *= decay
        profile[n - 1] += 1 - decay
    assert profile.sum() == pytest.approx(1, abs=1e-12)
    # Exactly the continuous profile's integral over the unit of time before each step.
    edges = (np.arange(num_steps + 1) / num_steps) ** (power_exponent(sigma_rel) + 1)
    np.testing.assert_allclose(profile, np.diff(edges), atol=1e-12)
    times = (np.arange(num_steps) + 0.5) / num_steps
    mean = (profile * times).sum()
    # Within the widths of a step, 1/2000.
    assert math.sqrt((profile * (times - mean) ** 2).sum()) == pytest.approx(sigma_rel, abs=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, math.nan])
def test_widths_that_no_power_function_has_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 0.2887\)"):
        PowerFunction(sigma_rel)


def test_inner_products_of_profiles() -> None:
    generator = np.random.default_rng(0)
    grid = (np.arange(200_000) + 0.5) / 20_000
    for _ in range(20):
        (one, two), (first, second) = generator.uniform(1, 9, 2), generator.uniform(0, 20, 2)
        profiles = [(g + 1) * grid**g / t ** (g + 1) * (grid <= t) for t, g in ((one, first), (two, second))]
        expected = (profiles[0] * profiles[1]).sum() / 20_000
        # The midpoint rule, with a jump inside a cell.
        assert profile_product(one, first, two, second) == pytest.approx(expected, rel=5e-3)
        assert profile_product(one, first, two, second) == profile_product(two, second, one, first)
    # Exponents of narrow profiles overflow as plain powers of steps.
    assert np.isfinite(profile_product(1e6, power_exponent(0.005), 2e6, power_exponent(0.01)))


def test_coefficients_are_the_best_and_their_error_is_told() -> None:
    num_snapshots, generator = 12, np.random.default_rng(0)
    times = np.repeat(np.arange(1, num_snapshots + 1) * 100.0, 2)
    exponents = np.tile([power_exponent(0.05), power_exponent(0.1)], num_snapshots)
    # What was tracked comes out as it is.
    coefficients, error = posthoc_coefficients(times, exponents, 1200.0, power_exponent(0.1))
    np.testing.assert_allclose(coefficients, np.eye(24)[-1], atol=1e-8)
    assert error < 1e-6
    grid = (np.arange(60_000) + 0.5) / 60_000 * 1200
    profiles = (exponents[:, None] + 1) / times[:, None] * (grid / times[:, None]) ** exponents[:, None]
    profiles *= grid <= times[:, None]
    for sigma_rel in (0.03, 0.07, 0.15, 0.2):
        exponent = power_exponent(sigma_rel)
        wanted = (exponent + 1) / 1200 * (grid / 1200) ** exponent
        coefficients, error = posthoc_coefficients(times, exponents, 1200.0, exponent)

        def distance(combination: np.ndarray, wanted: np.ndarray = wanted) -> float:
            return math.sqrt(((combination @ profiles - wanted) ** 2).sum() / (wanted**2).sum())

        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        assert error == pytest.approx(distance(coefficients), rel=0.02)
        for _ in range(10):
            change = generator.normal(size=24) * 0.01
            assert distance(coefficients + change - change.mean()) > error


def test_only_what_is_trained_is_averaged_in_float32_and_lent_for_a_while() -> None:
    frozen, trained = torch.nn.Linear(2, 2).bfloat16().requires_grad_(False), torch.nn.Linear(2, 2).bfloat16()
    model = torch.nn.Sequential(frozen, trained)
    for offload in (False, True):
        ema = EMA(model, [ConstantDecay(), PowerFunction(0.1)], offload=offload)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            trained.weight += 1
        ema.step()
        with torch.no_grad():
            trained.weight += 1
        ema.step()
        after = [parameter.detach().clone() for parameter in model.parameters()]
        average = ema.average()
        assert list(average) == ["1.weight", "1.bias"]
        assert all(tensor.dtype == torch.float32 for tensor in average.values())
        decay = ConstantDecay().decay(2)
        expected = decay * (before[2] + 1).float() + (1 - decay) * after[2].float()
        torch.testing.assert_close(average["1.weight"], expected, rtol=1e-2, atol=0)
        with ema.averaged_weights():
            assert torch.equal(trained.weight, average["1.weight"].bfloat16())
        # An error in between does not leave the average in the model.
        with pytest.raises(RuntimeError, match="shape"), ema.averaged_weights(track=1):
            model(torch.zeros(3).bfloat16())
        assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), after))


def test_another_models_averages_are_refused() -> None:
    state = EMA(torch.nn.Linear(2, 2), [PowerFunction(0.1)]).state_dict()
    with pytest.raises(ValueError, match="differ in 1 parameters, such as 'bias'"):
        EMA(torch.nn.Linear(2, 2, bias=False), [PowerFunction(0.1)]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"holds averages \['ema-0_100'\], the run has \['constant'\]"):
        EMA(torch.nn.Linear(2, 2), [ConstantDecay()]).load_state_dict(state)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tracks two widths for later and, to compare with, two more."""
    folder = tmp_path_factory.mktemp("power")
    data = make_dataset(folder / "data")
    pipeline = save_untrained(folder / "untrained", "unet")
    return train(
        pipeline,
        data,
        folder / "run",
        "--ema_sigma_rel",
        *(0.05, 0.1, 0.07, 0.13),
        max_train_steps=192,
        checkpointing_steps=96,
        learning_rate=5e-3,
        logging_steps=50,
        use_ema=True,
        ema_profile="power",
    )


def tracked(run: Path, *widths: float) -> list[Snapshot]:
    return [snapshot for snapshot in find_snapshots(run) if snapshot.sigma_rel in widths]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum((one[name] - other[name]).square().sum().item() for name in one))


@pytest.mark.parametrize("sigma_rel", [0.07, 0.13])
@pytest.mark.parametrize("update", [None, 96])
def test_an_average_made_afterwards_is_the_one_that_was_tracked(
    run: Path, sigma_rel: float, update: int | None
) -> None:
    made, _ = posthoc_ema(tracked(run, 0.05, 0.1), sigma_rel, update)
    (directly,) = (load_file(s.file) for s in tracked(run, sigma_rel) if s.update == (update or 192))
    narrow, wide = (load_file(s.file) for s in tracked(run, 0.05, 0.13) if s.update == (update or 192))
    error = distance(made, directly)
    assert error < 1e-2 * math.sqrt(sum(tensor.square().sum().item() for tensor in directly.values()))
    # The scale on which averages differ at all is smaller.
    assert error < 2e-2 * distance(narrow, wide)


def test_a_variant_is_loaded_as_diffusers_loads_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--sigma_rel", "0.1", "0.125"]) == 0
    assert "variant ema-0_100: " in capsys.readouterr().out
    # The first width is what was saved; the variants are others.
    saved, variant = (
        FlowMatchPipeline.from_pretrained(run, variant=name).unet.state_dict() for name in (None, width_name(0.1))
    )
    assert not torch.equal(saved["conv_in.weight"], variant["conv_in.weight"])
    last = {s.sigma_rel: load_file(s.file) for s in tracked(run, 0.05, 0.1) if s.update == 192}
    for name, tensor in variant.items():
        torch.testing.assert_close(tensor, last[0.1]["denoiser." + name], rtol=1e-5, atol=1e-6)
        assert torch.equal(saved[name], last[0.05]["denoiser." + name])
    loaded = DiffusionPipeline.from_pretrained(run, variant="ema-0_125").unet.state_dict()
    made, _ = posthoc_ema(find_snapshots(run), 0.125)
    assert all(torch.equal(tensor, made["denoiser." + name]) for name, tensor in loaded.items())
    assert sorted(path.name for path in (run / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.ema-0_100.safetensors",
        "diffusion_pytorch_model.ema-0_125.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_resumed_run_leaves_the_same_snapshots(run: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    stray = resumed / "ema_snapshots" / "step-97.ema-0_050.safetensors"
    mine = [resumed / "ema_snapshots" / name for name in ("mine.safetensors", "step-best.safetensors", "step-999.bak")]
    for file in (stray, *mine):
        shutil.copy(tracked(run, 0.05)[0].file, file)
    shutil.rmtree(resumed / "checkpoint-192")
    (resumed / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    arguments = {"config": resumed / "training_args.json", "resume_from_checkpoint": "latest"}
    unset = dict.fromkeys("seed train_batch_size max_train_steps learning_rate logging_steps".split())
    folder = run.parent
    train(folder / "untrained", folder / "data", resumed, **arguments, **unset)
    assert not stray.exists()
    assert all(file.exists() for file in mine)
    for snapshot in find_snapshots(run):
        again = load_file(resumed / "ema_snapshots" / snapshot.file.name)
        assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(snapshot.file).items())
    first, second = weights(run), weights(resumed)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_shards_and_embedders_are_written_too(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd3")
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    models = {"denoiser": pipeline.transformer, "class_embedder": pipeline.class_embedder}
    changed = {
        f"{attribute}.{name}": parameter.detach() + 1
        for attribute, model in models.items()
        for name, parameter in model.named_parameters()
    }
    write_variant(tmp_path, changed, "ema-0_100")
    loaded = FlowMatchPipeline.from_pretrained(tmp_path, variant="ema-0_100")
    for attribute, model in {"denoiser": loaded.transformer, "class_embedder": loaded.class_embedder}.items():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, changed[f"{attribute}.{name}"])
    # A model that is a component itself, or that was trained in part.
    write_variant(tmp_path, {"pos_embed.proj.bias": torch.full((pipeline.transformer.inner_dim,), 3.0)}, "other")
    loaded = FlowMatchPipeline.from_pretrained(tmp_path, variant="other").transformer.state_dict()
    assert (loaded.pop("pos_embed.proj.bias") == 3).all()
    assert all(torch.equal(tensor, pipeline.transformer.state_dict()[name]) for name, tensor in loaded.items())


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Sentence of a command that is refused."""
    assert main(words) == 2
    return capsys.readouterr().err


def test_weights_that_are_not_finite_make_no_variant(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = shutil.copytree(run, tmp_path / "run")
    files = sorted(path.name for path in (spoilt / "unet").iterdir())
    file = tracked(spoilt, 0.05)[3].file
    tensors = load_file(file)
    tensors["denoiser.conv_in.bias"][0] = math.nan
    save_file(tensors, file, {"update": str(tracked(run, 0.05)[3].update), "sigma_rel": "0.05"})
    told = refusal([str(spoilt), "--sigma_rel", "0.12"], capsys)
    assert "up to step 192 hold weights that are not finite, such as 'denoiser" in told
    assert sorted(path.name for path in (spoilt / "unet").iterdir()) == files


def test_what_cannot_be_made_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal([str(tmp_path), "--sigma_rel", "0.1"], capsys)
    assert re.search("There are no snapshots in .*: train with --use_ema --ema_profile power", told)
    with pytest.raises(ValueError, match="There is no snapshot at step 5; there are snapshots at steps"):
        posthoc_ema(find_snapshots(run), 0.1, update=5)
    assert "must be in (0, 0.2887), got 0.5" in refusal([str(run), "--sigma_rel", "0.1", "0.5"], capsys)
    with pytest.raises(ValueError, match="There is no trained pipeline in"):
        write_variant(tmp_path, {}, "ema-0_100")
    with pytest.raises(ValueError, match=r"No component in .* has the weights \['lora.weight'\] and 1 in all"):
        write_variant(run, {"lora.weight": torch.zeros(1)}, "ema-0_100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_profile": "power"}, "--ema_profile power needs --use_ema"),
        ({"ema_sigma_rel": 0.3}, r"--ema_sigma_rel must be in \(0, 0.2887\), got 0.3"),
        ({"ema_max_decay": 1.5}, r"--ema_max_decay must be in \[0, 1\], got 1.5"),
        ({"ema_snapshot_steps": 0}, "--ema_snapshot_steps must be at least 1, got 0"),
    ],
)
def test_arguments_are_refused_before_any_work(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tmp_path, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_shards_of_fsdp2_are_averaged_as_the_whole(tmp_path: Path) -> None:
    ended = check_processes(ROOT / "tests" / "sharded_ema.py", [tmp_path], num_processes=2)
    assert [process.stdout.strip() for process in ended] == ["same", "same"]
