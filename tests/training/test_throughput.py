# SPDX-License-Identifier: Apache-2.0
"""What a run says of its speed, and that it asks nothing of the device in a step."""

import json
import re
import time
import traceback
from pathlib import Path

import pytest
import torch
from tiny_pipelines import KINDS, labels_of, tiny_pipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from training_runs import (
    ROOT,
    assert_same_weights,
    load_script,
    make_dataset,
    read_log,
    save_untrained,
    script,
    train,
)

from diffusers_fm.models.costs import forward_flops, with_backward
from diffusers_fm.objectives.flow_matching import TrainableModel
from diffusers_fm.training.metrics import (
    FIRST_STEPS,
    GPUS,
    Stopwatch,
    Throughput,
    find_gpu,
    peak_flops,
)
from diffusers_fm.training.run import TrainingRun


pytestmark = pytest.mark.usefixtures("networks_of_one_level")


def test_operations_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    forward = 2 * 4 * (3 * 5 + 5 * 7)
    assert with_backward(model, forward_flops(model, (torch.zeros(4, 3),))) == 3 * forward
    # Without gradients of most weights; the gradient of inputs is needed all the same.
    model[1].requires_grad_(False)
    assert with_backward(model, forward_flops(model, (torch.zeros(4, 3),))) == round(forward * (2 + 20 / 62))
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_real_models(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    model, labels = TrainableModel(pipeline).train(), labels_of(pipeline)
    labels = None if labels is None else torch.tensor(labels)
    x_t, timestep = torch.randn(3, *pipeline.sample_shape), torch.full((3,), 500.0)
    with FlopCounterMode(display=False) as counter:
        model(x_t, timestep, labels).square().mean().backward()
    # The first layers have no gradient of their input to compute.
    assert 1 <= with_backward(model, forward_flops(model, (x_t, timestep, labels))) / counter.get_total_flops() < 1.2


def test_peaks_are_found_by_the_most_telling_name() -> None:
    def peak(device_name: str, mixed_precision: str, allow_tf32: bool) -> float | None:
        gpu = find_gpu(device_name)
        return None if gpu is None else peak_flops(gpu, mixed_precision, allow_tf32)

    assert peak("NVIDIA H100 80GB HBM3", "bf16", True) == 989e12
    assert peak("NVIDIA H100 PCIe", "bf16", True) == 756e12
    assert peak("NVIDIA A100-SXM4-80GB", "no", False) == 19.5e12
    assert peak("NVIDIA A10G", "no", True) == 35e12
    assert peak("NVIDIA L40S", "fp16", False) == 362e12
    assert peak("Some other card", "bf16", True) is None
    for name, gpu in GPUS.items():
        assert peak(f"NVIDIA {name}", "bf16", True) == 1e12 * gpu.half


def test_time_goes_to_the_section_that_ends() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    for section, seconds in (("data", 0.02), ("model", 0.04), ("data", 0.02)):
        time.sleep(seconds)
        stopwatch.mark(section)
    time.sleep(0.05)
    stopwatch.restart()
    seconds = stopwatch.read()
    assert seconds.keys() == {"data", "model"}
    assert 0.04 <= seconds["data"] < 0.06
    assert 0.04 <= seconds["model"] < 0.06
    assert stopwatch.read() == {}


def test_slow_data_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "diffusers_fm")

    def slow():
        for number in range(FIRST_STEPS):
            time.sleep(0.02)
            yield number

    throughput = Throughput(torch.device("cpu"), samples_per_step=6, calls_per_step=1)
    throughput.flops_per_call = 10**9
    for _ in throughput.watch_data(slow()):
        throughput.stopwatch.mark("model")
        throughput.step()
    said = re.search(r"([\d.]+) steps a second in the first 10: 1,000 in", caplog.text)
    assert said is not None and float(said[1]) == pytest.approx(1 / 0.02, rel=0.3)
    figures = throughput.report()
    assert figures["time_share/data"] > 0.8
    assert figures["images_per_second"] == pytest.approx(6 / 0.02, rel=0.3)
    assert figures["tflops_per_second"] == pytest.approx(1e-3 / 0.02, rel=0.3)
    assert figures["peak_memory_gib"] > 0.05
    assert throughput.summary() == figures


class Questions(TorchDispatchMode):
    """
    Counts what reads a number of a tensor, which on a GPU waits for all that was asked of it. Paths are asked for
    times, and data sets for rows, which are on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            frames = [
                frame for frame in traceback.extract_stack(limit=8)[:-1] if "torch" not in Path(frame.filename).parts
            ]
            asking = {Path(frame.filename).name for frame in frames[-2:]}
            # A step on the CPU, where there is nothing to wait for, reads the norm.
            on_cpu = frames[-1].line == "return math.isfinite(norm)"
            self.count += not on_cpu and not {"paths.py", "images.py"} & asking
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["unet", "sd3-vae"])
def test_a_step_asks_nothing_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    counts = []

    class Counted(TrainingRun):
        def steps(self):
            steps = super().steps()
            while True:
                with Questions() as questions:
                    step = next(steps, None)
                    if step is None:
                        return
                    yield step
                    counts.append(questions.count)

    data, pipeline = make_dataset(tmp_path / "data"), save_untrained(tmp_path / "untrained", kind)
    monkeypatch.setattr(script, "TrainingRun", Counted)
    options = {"use_ema": True, "max_train_steps": 6, "logging_steps": 4, "random_flip": True}
    train(pipeline, data, tmp_path / "run", **options)
    # From the end of a step's bookkeeping to the end of the next one's loop body; the fourth step is logged.
    assert counts[1:4] == [0, 0, 0]


def test_the_log_says_what_the_time_went_into(tmp_path: Path) -> None:
    data, pipeline = make_dataset(tmp_path / "data"), save_untrained(tmp_path / "untrained", "unet")
    run = train(pipeline, data, tmp_path / "run", gradient_accumulation_steps=2)
    shares = [f"time_share/{section}" for section in ("data", "model", "optimizer", "other")]
    lines = read_log(run, *shares, "images_per_second", "peak_memory_gib", "tflops_per_second")
    assert [line[0] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert sum(line[1:5]) == pytest.approx(1, abs=3e-4)
        assert min(line[1:]) >= 0
    assert len(read_log(run, "run/images_per_second", "run/time_share/data", "run/peak_memory_gib")) == 1


def test_memory_format_does_not_change_the_run(tmp_path: Path) -> None:
    data, pipeline = make_dataset(tmp_path / "data"), save_untrained(tmp_path / "untrained", "unet")
    options = {"use_ema": True, "learning_rate": 1e-4}
    runs = [train(pipeline, data, tmp_path / str(last), channels_last=last, **options) for last in (False, True)]
    # Sums in another order; AdamW turns the sign of a tiny gradient into a step, at most the learning rate.
    assert_same_weights(*runs, atol=4e-4)


def test_the_benchmark_of_full_size_models_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load_script(ROOT / "tests" / "benchmarks" / "bench_throughput.py")
    file = tmp_path / "rows.json"
    words = ["--tiny", "--use_cpu", "--compile=off", "--num_steps=1", "--num_warmup_steps=0", "--train_batch_size=2"]
    benchmark.main([*words, f"--json={file}"])
    rows = json.loads(file.read_text())
    assert [(row["model"], row["compile"]) for row in rows] == [("dit-xl", False), ("sd3-medium", False)]
    assert all(row["images_per_second"] > 0 and row["tflops_per_second"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| dit-xl | False |") == 1


def test_a_step_of_the_digits_visits_few_files(tmp_path: Path) -> None:
    benchmark = load_script(ROOT / "tests" / "benchmarks" / "step_files.py")
    files = benchmark.files_of_recipe("unet-digits", tmp_path)
    assert {"training/run.py", "losses.py", "paths/gaussian.py"} <= set(files)
    assert len(files) <= 16


def test_a_step_of_stable_diffusion_3_visits_few_files(tmp_path: Path) -> None:
    benchmark = load_script(ROOT / "tests" / "benchmarks" / "step_files.py")
    files = benchmark.files_of_recipe("sd3-tiny", tmp_path)
    assert {"training/run.py", "text_to_image/field.py", "pipelines/one_step.py"} <= set(files)
    assert len(files) <= 18
