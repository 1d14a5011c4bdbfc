# SPDX-License-Identifier: Apache-2.0
"""The training of flow maps: what comes out, what does not matter, what is refused, and what every argument does."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from processes import check_processes, run_stock
from safetensors.torch import load_file
from tiny_pipelines import tiny_dit, tiny_pipeline
from training_runs import (
    ROOT,
    assert_same_weights,
    command_line,
    load,
    load_script,
    make_dataset,
    run_script,
    weights,
)

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler
from diffusers_fm.data.randomness import BatchSlice, make_generator
from diffusers_fm.flow_maps import OBJECTIVES, AverageVelocity, average_velocity, sample_flow_map
from diffusers_fm.models.interval import IntervalConditioning
from diffusers_fm.objectives import moment_matching
from diffusers_fm.objectives.flow_maps import IntervalModel, Trajectories, choose_flow_map, draw_intervals
from diffusers_fm.objectives.flow_matching import choose_shift
from diffusers_fm.objectives.moment_matching import MomentMatching
from diffusers_fm.paths import ConditionalPath, OTPath, VPPath, lift
from diffusers_fm.timesteps import shift_time
from diffusers_fm.training.checkpoints import MODEL_FILE


SCRIPT = ROOT / "training_scripts" / "train_flow_map.py"
script = load_script(SCRIPT)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained transformer, as far as training a map is concerned."""
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), transformer=tiny_dit(in_channels=1, num_layers=3))
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    pipeline.save_pretrained(folder)
    return folder


def train(pipeline: Path, data: Path, output_dir: Path, *words: object, **options: object) -> Path:
    run_script(script, command_line(pipeline, data, output_dir, *words, **options))
    return output_dir


def test_a_run_leaves_a_pipeline_that_samples_in_its_own_calls(folder: Path, data: Path, tmp_path: Path) -> None:
    output_dir = train(folder, data, tmp_path / "run", use_ema=True, num_validation_images=2, num_inference_steps=3)
    pipeline = load(output_dir)
    config = pipeline.scheduler.config
    assert config.solver == "flow_map"
    assert config.flow_map == {"first_block": 2, "num_inference_steps": 3, "guidance_scale": 1.0, "flow_shift": 1.0}
    assert (output_dir / "grid.png").is_file()
    options = {"class_labels": [0, 1], "output_type": "np"}
    output = pipeline(**options, generator=torch.Generator().manual_seed(0))
    assert output.nfe == 3
    card = ModelCard.load(output_dir / "README.md").text
    assert "progressive self-distillation (arXiv 2505.18825)" in card
    assert "3 by default" in card
    assert "`abm3`" not in card
    # In a process that has done nothing else.
    code = f"""
import torch, diffusers_fm
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(output_dir)!r})
output = pipeline(class_labels=[0, 1], output_type="np", generator=torch.Generator().manual_seed(0))
assert output.nfe == 3
print(output.images.astype("float64").sum())
"""
    python = run_stock(code)
    assert float(python.stdout.strip().splitlines()[-1]) == output.images.astype("float64").sum()


def test_the_flow_is_the_start_bit_for_bit(folder: Path, data: Path, tmp_path: Path) -> None:
    """With a learning rate of (nearly) zero, r = t draws what the trained flow drew."""
    output_dir = train(folder, data, tmp_path / "run", learning_rate=1e-30, adam_weight_decay=0.0)
    flow, trained = load(folder), load(output_dir)
    draw = {"class_labels": [0, 1], "output_type": "np", "num_inference_steps": 4}
    before = flow(**draw, generator=torch.Generator().manual_seed(0)).images
    after = trained(**draw, solver="euler", generator=torch.Generator().manual_seed(0)).images
    assert (before == after).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["unet-classes", "dit", "sd3"])
def test_every_loss_trains_every_kind_of_network(objective: str, kind: str, data: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(kind)
    network = pipeline.denoiser
    config = {**network.config, "in_channels": 1, "out_channels": 1}
    if kind != "unet-classes":
        config["num_layers"] = 2
    name = "unet" if pipeline.unet is not None else "transformer"
    components = {**pipeline.components, name: type(network).from_config(config)}
    FlowMatchPipeline(**components, num_classes=pipeline.config.num_classes).save_pretrained(tmp_path / "start")
    output_dir = train(tmp_path / "start", data, tmp_path / "run", objective=objective, interval_warmup_steps=0)
    before, after = weights(tmp_path / "start"), weights(output_dir)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    if kind == "unet-classes":
        second = after["interval_embedding.time_embedding.linear_2.weight"]
        assert second.abs().max() > 0
    pipeline = load(output_dir)
    assert pipeline(class_labels=[0], output_type="np").nfe == 2


@pytest.mark.parametrize("kind", ["dit", "unet", "trajectories", "matching"])
def test_a_resumed_run_is_an_uninterrupted_one(kind: str, folder: Path, data: Path, tmp_path: Path) -> None:
    if kind == "unet":
        pipeline = tiny_pipeline("unet-classes")
        pipeline.save_pretrained(tmp_path / "start")
        folder = tmp_path / "start"
    options = {"use_ema": True, "ema_teacher": True, "interval_warmup_steps": 3, "flow_teacher": True}
    # The teacher of the run's own first step is in the checkpoint, the trajectories are drawn again.
    options |= {"num_trajectories": 20, "flow_steps": 1} if kind == "trajectories" else {}
    # So is the map as it was before its comparison with data.
    options |= (
        {"flow_steps": 1, "matching_steps": 3, "matching_group": 4, "matching_known": 8} if kind == "matching" else {}
    )
    whole = train(folder, data, tmp_path / "whole", **options, checkpointing_steps=2)
    part = tmp_path / "part"
    part.mkdir()
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    train(folder, data, part, **options, resume_from_checkpoint="latest")
    assert_same_weights(whole, part)


def test_training_begins_anew_with_the_map(folder: Path, data: Path, tmp_path: Path) -> None:
    rate = 1e-3
    options = {"use_ema": True, "flow_teacher": True, "flow_steps": 3, "adam_weight_decay": 0.0, "learning_rate": rate}
    run = train(folder, data, tmp_path / "run", **options, checkpointing_steps=1)
    # One step of four is the map's: its weights are the average.
    last = load_file(run / "checkpoint-4" / MODEL_FILE)
    for name, average in weights(run).items():
        assert torch.equal(average, last[name.replace("transformer.", "denoiser.")])
    # It is the first one of an optimizer without moments, which moves each weight of the flow's average by its rate.
    states = [torch.load(file, weights_only=False) for file in (run / "checkpoint-3").glob("custom_checkpoint_*.pkl")]
    (flow,) = (state["averages"]["constant"] for state in states if "averages" in state)
    moves = torch.cat([(last[name] - flow[name]).abs().flatten() for name in flow])
    assert moves.max() <= 1.01 * rate
    assert moves.median() >= 0.99 * rate
    # Resumed where the map begins, and after it, the run ends as it did.
    for step in (3, 2):
        again = tmp_path / f"from-{step}"
        again.mkdir()
        shutil.copytree(run / f"checkpoint-{step}", again / f"checkpoint-{step}")
        train(folder, data, again, **options, checkpointing_steps=1, resume_from_checkpoint="latest")
        assert_same_weights(run, again)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"num_trajectories": 20, "flow_teacher": True, "flow_steps": 1, "use_ema": True},
        {"matching_steps": 4, "matching_group": 4, "matching_groups": 2, "matching_calls": 2, "matching_known": 8},
    ],
    ids=["own", "teacher", "matching"],
)
def test_two_processes_are_one(kind: dict, folder: Path, data: Path, tmp_path: Path) -> None:
    options = {"adam_epsilon": 1e-2, "interval_warmup_steps": 0, **kind}
    options |= {} if "matching_steps" in kind else {"learned_guidance_scale": 2.0}
    one = train(folder, data, tmp_path / "one", **options)
    options |= {"matching_groups": 1} if "matching_groups" in kind else {}
    line = command_line(folder, data, tmp_path / "two", **options, train_batch_size=4)
    check_processes(SCRIPT, line, num_processes=2)
    assert_same_weights(one, tmp_path / "two", atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"first_block": 1},
        {"equal_share": 0.0},
        {"noise_share": 1.0},
        {"data_share": 1.0},
        {"interval_warmup_steps": 0},
        {"middle_fraction": True},
        {"loss_power": 1.0},
        {"flow_teacher": True},
        {"flow_teacher": True, "flow_steps": 2},
        {"flow_teacher": True, "num_trajectories": 20},
        {"num_trajectories": 20, "trajectory_steps": 2},
        {"num_trajectories": 20, "huber_width": 0.0},
        {"matching_steps": 2},
        {"matching_steps": 2, "matching_group": 4},
        {"matching_steps": 2, "matching_groups": 2},
        {"matching_steps": 2, "matching_calls": 2},
        {"matching_steps": 2, "matching_rate": 1.0},
        {"matching_steps": 2, "matching_known": 9},
        {"ema_teacher": True},
        {"learned_guidance_scale": 3.0},
        {"flow_teacher": True, "learned_guidance_scale": 3.0},
        {"objective": "mean_flow", "derivative": "jvp"},
        {"objective": "mean_flow", "derivative_step": 0.1},
        {"shift": 3.0},
    ],
)
def test_every_argument_changes_the_run(options: dict, folder: Path, data: Path, tmp_path: Path) -> None:
    base = {"use_ema": True, "ema_max_decay": 0.5, "interval_warmup_steps": 8}
    base |= {"objective": options["objective"]} if "objective" in options else {}
    base |= (
        {"flow_teacher": True, "num_trajectories": 20} if {"trajectory_steps", "huber_width"} & set(options) else {}
    )
    base |= (
        {"matching_steps": 2, "matching_known": 8}
        if [name for name in options if name.startswith("matching_")][1:]
        else {}
    )
    plain = train(folder, data, tmp_path / "plain", **base)
    other = train(folder, data, tmp_path / "other", **{**base, **options})
    first, second = weights(plain), weights(other)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting_scheme": "min_snr"}, "--weighting_scheme must be none for a flow map, got min_snr"),
        ({"ema_teacher": True}, "--ema_teacher needs --use_ema"),
        ({"flow_steps": 2, "flow_teacher": True}, "--flow_steps 2 needs --use_ema"),
        (
            {"flow_steps": 4, "flow_teacher": True, "use_ema": True},
            "--flow_steps must be below --max_train_steps 4, got 4",
        ),
        ({"matching_steps": 5}, "--matching_steps 5 need --max_train_steps of as many, got 4"),
        (
            {"matching_steps": 4, "learned_guidance_scale": 2.0},
            "--learned_guidance_scale does not go with --matching_steps",
        ),
        ({"first_block": 3}, "`first_block` must be an integer from 1 to 2"),
        ({"cache_latents": True, "center_crop": True}, "--cache_latents needs an autoencoder"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: dict, message: str, folder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(folder, data, tmp_path / "run", **options)


def test_networks_without_classes_have_no_guidance_and_unets_no_blocks(data: Path, tmp_path: Path) -> None:
    tiny_pipeline("unet").save_pretrained(tmp_path / "unet")
    for options, message in (
        ({"learned_guidance_scale": 2.0}, "--learned_guidance_scale 2 needs a model with classes and a null class"),
        ({"first_block": 1}, "--first_block 1 needs a transformer, and the model is a UNet2DModel"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            train(tmp_path / "unet", data, tmp_path / "run", **options)


def test_a_dry_run_counts_and_writes_nothing(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"use_ema": True, "ema_teacher": True, "learned_guidance_scale": 2.0}
    options |= {"flow_teacher": True, "flow_steps": 2, "num_trajectories": 20}
    for each in (options, {"matching_steps": 4}):
        train(folder, data, tmp_path / "run", dry_run=True, **each)
        assert "at the worst moment" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_intervals_of_two_parts_are_those_of_the_whole() -> None:
    args = script.ScriptArguments(
        pretrained_model_name_or_path="x", dataset_name="x", interval_warmup_steps=10, equal_share=0.25
    )
    path = OTPath()
    whole = draw_intervals(args, path, BatchSlice(0, 4, 0, 16, 16), 1.0, 4)
    parts = [draw_intervals(args, path, BatchSlice(0, 4, offset, 8, 16), 1.0, 4) for offset in (0, 8)]
    for all_of_them, halves in zip(whole, zip(*parts)):
        assert torch.equal(all_of_them, torch.cat(halves))
    _, r, t = whole
    assert (r == t).sum() == 4
    # The fifth step of ten: half as long.
    assert (t - r).max() <= 0.5
    _, r, t = draw_intervals(args, path, BatchSlice(0, 4, 0, 16, 16), 1.0, 40)
    assert (t - r).max() > 0.5


def gaussian_map(std: float) -> AverageVelocity:
    """Average velocity of a Gaussian with a mean for each row, whose map keeps (x - mean) / std."""

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, mean_of: torch.Tensor) -> torch.Tensor:
        start, end = (((1 - s) ** 2 * std**2 + s**2).sqrt()[:, None].to(x) for s in (t, r))
        t, r, mean_of = t[:, None].to(x), r[:, None].to(x), mean_of[:, None].to(x)
        slope = ((t + r) * (1 + std**2) - 2 * std**2) / (start + end)
        return -mean_of + slope / start * (x - (1 - t) * mean_of)

    return u


def test_few_steps_make_good_trajectories() -> None:
    """Their times differ from batch to batch, which abm3 on equally spread ones takes ill (0.013)."""
    std, u = 0.1, gaussian_map(0.1)
    noise = torch.randn(96, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Trajectories(
        lambda t, x, c: u(x, t, t, c), OTPath(), noise, [torch.full((96,), 0.7)], 14, 0, 8, torch.device("cpu")
    )
    exact = 0.7 + std * noise
    assert (drawn.points[:, -1] - exact).norm() < 0.006 * exact.norm()


@pytest.mark.parametrize("path", [OTPath(), VPPath()], ids=["ot", "vp"])
def test_trajectories_are_those_of_the_map(path: ConditionalPath) -> None:
    """An average velocity that is the map's has no loss, another one has."""
    mean, size = 0.7, 16
    u = gaussian_map(0.4)

    def field(t: torch.Tensor, x: torch.Tensor, mean_of: torch.Tensor) -> torch.Tensor:
        return u(x, t, t, mean_of)

    noise, means = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), mean * torch.arange(1, 41)
    trajectories = Trajectories(field, path, noise, [means], 40, 0, 24, torch.device("cpu"))
    part = BatchSlice(0, 4, 0, size, size)
    args = script.ScriptArguments(pretrained_model_name_or_path="x", dataset_name="x", interval_warmup_steps=0)
    _, r, t = draw_intervals(args, path, part, 1.0, 4)
    own, labels = torch.randn(size, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(size)
    assert trajectories.losses(part, u, own, r, t, [labels]).max() < 1e-5
    wrong = trajectories.losses(part, lambda x, r, t, c: u(x, t, t, c), own, r, t, [labels])
    assert torch.equal(wrong < 1e-9, r == t)


@pytest.mark.parametrize("name", ["ot", "vp"])
def test_matching_is_least_for_a_map_that_draws_data_of_the_label(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FlowMatchPipeline(FlowMatchScheduler(path=name), transformer=tiny_dit(in_channels=1, num_layers=2))
    path = pipeline.scheduler.path
    words = {"pretrained_model_name_or_path": "x", "dataset_name": "x", "max_train_steps": 4}
    args = script.ScriptArguments(**words, matching_steps=4, matching_group=32, matching_groups=2)
    choose_flow_map(pipeline, args, 0, 1.0)
    before = IntervalModel(pipeline).requires_grad_(False).eval()

    def velocity_of(model: IntervalModel) -> AverageVelocity:
        return average_velocity(lambda x, r, t, labels: model(x, t, labels, r), path, time_scale=1000)

    generator = torch.Generator().manual_seed(0)
    # Two classes of grey images, a dark and a light one.
    labels = torch.arange(40) % 2
    data = (labels - 0.5)[:, None, None, None] + 0.1 * torch.randn(40, 1, 8, 8, generator=generator)
    made = (args, before, velocity_of, pipeline.scheduler, data, labels, pipeline.null_class, 0.0, torch.device("cpu"))
    matching = MomentMatching(*made)
    part = BatchSlice(0, 4, 0, 8, 8)

    def draws(level: float, spread: float) -> AverageVelocity:
        """Samples of a grey, around that of their label or the other one."""

        def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
            drawn = level * (labels - 0.5)[:, None, None, None] + spread * noise
            return (x - drawn) / lift(t - r, x).to(x)

        return u

    start, right = matching.losses(part, *[draws(1.0, 0.1)] * 2)
    assert right.shape == (64,)
    torch.testing.assert_close(start, path.time_at(torch.full((64,), path.ratio_max, dtype=torch.float64)))
    for wrong in (draws(-1.0, 0.1), draws(1.0, 0.0), draws(1.0, 0.3), draws(0.7, 0.1)):
        assert matching.losses(part, wrong, wrong)[1].mean() > right.mean() + 0.5
    # Of sets that are drawn in two calls the second one learns, from where the map itself comes to with the first.
    two = MomentMatching(dataclasses.replace(args, matching_calls=2), *made[1:])
    calls = []

    def halves(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append((x, r, t))
        return torch.where(lift(r, x) > path.ratio_min, 0.5 * x, draws(1.0, 0.1)(x, r, t, labels))

    times, losses = two.losses(part, halves, halves)
    (noise, middle, first), (x, r, t) = calls
    torch.testing.assert_close(times, path.time_at(t))
    torch.testing.assert_close(t[32:], middle)
    torch.testing.assert_close(t, torch.cat([first, middle]))
    # The grid is the scheduler's: equal steps, shifted by a half.
    torch.testing.assert_close(middle, shift_time((first + path.ratio_min) / 2, 0.5))
    assert (r == path.ratio_min).all()
    torch.testing.assert_close(x[32:], noise - 0.5 * lift(first - middle, noise).to(noise) * noise)
    torch.testing.assert_close(noise.std(), noise.new_tensor(path.ratio_max), rtol=0.1, atol=0)
    assert losses.shape == (64,)
    # The next step has them the other way round.
    assert torch.equal(two.losses(BatchSlice(0, 5, 0, 8, 8), halves, halves)[0], times.flip(0))
    # The map as it was draws, in as many calls, what stands beside the samples, and more of their label.
    same, sets = velocity_of(before), []
    monkeypatch.setattr(moment_matching, "moment_matching_losses", lambda *some: sets.append(some) or losses[:32])
    two.losses(part, same, same)
    (one_call, _, two_calls, _), label = sets, int(two._draw_labels(BatchSlice(0, 4, 0, 2, 2))[1])
    for drawn, _, own, known in (one_call, two_calls):
        assert torch.equal(drawn, own)
        torch.testing.assert_close(known.std(), drawn.std(), rtol=0.1, atol=0)
    noise = make_generator(args.seed, "known samples", label, 3)
    x = path.ratio_max * torch.randn(1024, 1, 8, 8, generator=noise)
    grid = [first[0].item(), middle[0].item(), path.ratio_min]
    with torch.no_grad():
        expected = sample_flow_map(same, x, grid, args=[torch.full((1024,), label)])
    torch.testing.assert_close(two_calls[3], expected)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_matching_compares_what_the_pipeline_draws(final: str) -> None:
    """Also on VE, whose points at the end of the path are not straight ones."""
    scheduler = FlowMatchScheduler(path="ve", final_sigmas_type=final)
    pipeline = FlowMatchPipeline(scheduler, transformer=tiny_dit(in_channels=1, num_layers=2))
    pipeline.set_progress_bar_config(disable=True)
    words = {"pretrained_model_name_or_path": "x", "dataset_name": "x", "max_train_steps": 4}
    args = script.ScriptArguments(**words, matching_steps=4, matching_known=4, matching_calls=2)
    choose_flow_map(pipeline, args, 0, 1.0)
    scheduler, device = pipeline.scheduler, torch.device("cpu")
    path, before = scheduler.path, IntervalModel(pipeline).requires_grad_(False).eval()

    def velocity_of(model: IntervalModel) -> AverageVelocity:
        return average_velocity(lambda x, r, t, labels: model(x, t, labels, r), path, time_scale=1000)

    data, labels = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    matching = MomentMatching(args, before, velocity_of, scheduler, data, labels, pipeline.null_class, 0.0, device)
    for grid in matching._grids:
        noise = torch.randn(4, 1, 8, 8, generator=make_generator(args.seed, "known samples", 0, len(grid)))
        # The pipeline starts from noise and data.
        latents = path.sigma(torch.ones(())) / scheduler.init_noise_sigma * noise
        options = {"class_labels": [0] * 4, "output_type": "latent", "latents": latents}
        expected = pipeline(**options, num_inference_steps=len(grid) - 1).images
        torch.testing.assert_close(matching._known_samples(0, grid)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_map_that_is_trained_on_keeps_its_blocks(folder: Path, data: Path, tmp_path: Path) -> None:
    first = train(folder, data, tmp_path / "first", first_block=1)
    second = train(first, data, tmp_path / "second")
    pipeline = DiffusionPipeline.from_pretrained(second)
    assert pipeline.scheduler.config.flow_map["first_block"] == 1
    # Calls are shifted towards data, its flow and what trains it on are not.
    for run in (first, second):
        scheduler = FlowMatchScheduler.from_pretrained(run, subfolder="scheduler")
        scheduler.set_timesteps(2)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 1 / 3, 0.0]))
        assert choose_shift(load(run), None) == 1.0
        assert scheduler.with_settings(solver="euler").config.shift == 1.0
        assert scheduler.with_settings(solver="euler", shift=2.0).config.shift == 2.0
        pipeline = load(run)
        assert choose_shift(pipeline, 3.0) == choose_shift(pipeline, None) == 3.0
        assert pipeline.scheduler.config.shift == 0.5
        assert pipeline.scheduler.with_settings(solver="euler").config.shift == 3.0
        pipeline.scheduler = scheduler.with_settings(solver="euler", shift=2.0)
        assert choose_shift(pipeline, None) == 2.0
    shifted = train(folder, data, tmp_path / "shifted", shift=3.0, sampling_shift=1.0)
    scheduler = FlowMatchScheduler.from_pretrained(shifted, subfolder="scheduler")
    assert (scheduler.config.shift, choose_shift(load(shifted), None)) == (1.0, 3.0)
    scheduler.set_shift(2.0)
    assert scheduler.with_settings(solver="heun").config.shift == 3.0
    assert IntervalConditioning.of(pipeline.transformer) is None
