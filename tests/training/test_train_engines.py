# SPDX-License-Identifier: Apache-2.0
"""Two real processes, in whole weights and in shards, do what one process does."""

import os
import shutil
from pathlib import Path

import engines
import pytest
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import check_processes
from tiny_text_to_image import save_colours, tiny_stable_diffusion_3
from training_runs import (
    ROOT,
    SCRIPT,
    assert_same_weights,
    command_line,
    launch_arguments,
    load,
    load_script,
    make_dataset,
    read_log,
    run_script,
    save_untrained,
    train,
)


SD3_SCRIPT = ROOT / "training_scripts" / "train_text_to_image.py"

# Adam divides by the size of the gradient, and so makes noise of gradients that are zero but for rounding.
SMOOTH = {"adam_epsilon": 1e-2}


def by_server(line: list[str], config: str | None = None, file: Path = SCRIPT) -> None:
    """Train in processes that get the variables of accelerate's launcher and need not import anything."""
    args = launch_arguments(line, num_processes=2, file=file, config=config)
    variables = {name: value for name, value in prepare_multi_gpu_env(args).items() if os.environ.get(name) != value}
    ended = check_processes(file, line, 2, engines.prepare, **variables)
    engines.check_threads("".join(process.stderr for process in ended))


def pipeline_files(output_dir: Path) -> set[str]:
    """All that a run leaves but its checkpoints."""
    files = (path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if path.is_file())
    return {file for file in files if not file.startswith("checkpoint-")}


def assert_same_figures(one: Path, other: Path) -> None:
    for name in ("loss", "gradient_norm", "validation_loss"):
        for first, second in zip(read_log(one, name), read_log(other, name), strict=True):
            assert first == pytest.approx(second, rel=1e-5)
    for (_, first), (_, second) in zip(read_log(one, "loss_by_time"), read_log(other, "loss_by_time"), strict=True):
        # The times are stratified over both processes: the same ones, in the same bins.
        assert [value is None for value in first] == [value is None for value in second]
        assert [value or 0 for value in first] == pytest.approx([value or 0 for value in second], rel=1e-5)


def test_shards_are_trained_saved_and_resumed_as_whole_weights_are(tmp_path: Path) -> None:
    # Not every model's parts are called from inside of their blocks; this one's are not.
    data, folder = make_dataset(tmp_path / "data", side=16), save_untrained(tmp_path / "untrained", "dit-vae")
    options = {**SMOOTH, "use_ema": True, "num_validation_images": 1, "checkpointing_steps": 3, "max_train_steps": 5}
    options |= {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
    whole = train(folder, data, tmp_path / "whole", train_batch_size=4, **options)
    sharded, resumed = tmp_path / "sharded", tmp_path / "resumed"
    options |= {"train_batch_size": 2}
    by_server(command_line(folder, data, sharded, **options), "fsdp2.yaml")
    assert_same_weights(whole, sharded, atol=1e-6)
    assert_same_figures(whole, sharded)
    assert pipeline_files(sharded) == pipeline_files(whole)
    for checkpoint in ("model", "optimizer"):
        (folder_of_shards,) = (sharded / "checkpoint-3").glob(f"*{checkpoint}*")
        assert len(list(folder_of_shards.glob("*.distcp"))) == 2
    shutil.copytree(sharded / "checkpoint-3", resumed / "checkpoint-3")
    line = command_line(folder, data, resumed, resume_from_checkpoint="latest", **options)
    by_server(line, "fsdp2.yaml")
    assert_same_weights(sharded, resumed)
    assert read_log(resumed, "loss", "gradient_norm") == read_log(sharded, "loss", "gradient_norm")[1:]
    assert load(resumed)(class_labels=[0], num_inference_steps=1).images[0].size == (16, 16)
    message = "checkpoint-3 was written with FSDP and cannot be resumed with whole weights"
    with pytest.raises(ValueError, match=message):
        train(folder, data, sharded, resume_from_checkpoint="checkpoint-3", **options)


def test_text_to_image_in_shards(tmp_path: Path) -> None:
    data, model = save_colours(tmp_path / "data"), tmp_path / "model"
    tiny_stable_diffusion_3().save_pretrained(model)
    options = {**SMOOTH, "resolution": 16, "max_sequence_length": 16, "use_ema": True, "max_train_steps": 3}
    options |= {"num_validation_images": 1, "center_crop": True, "cache_latents": True, "cache_text_embeddings": True}
    prompts = ["--validation_prompts", "a red square"]
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    run_script(load_script(SD3_SCRIPT), command_line(model, data, whole, *prompts, train_batch_size=4, **options))
    line = command_line(model, data, sharded, *prompts, train_batch_size=2, **options)
    by_server(line, "fsdp2.yaml", SD3_SCRIPT)
    assert_same_weights(whole, sharded, atol=1e-6)
    assert_same_figures(whole, sharded)
    assert {file for file in pipeline_files(sharded) ^ pipeline_files(whole) if "precomputed" not in file} == set()


def test_noise_is_paired_over_processes_as_in_one_batch(tmp_path: Path) -> None:
    data, folder = make_dataset(tmp_path / "data"), save_untrained(tmp_path / "untrained", "unet-classes")
    options = {**SMOOTH, "coupling": "minibatch_ot", "num_validation_images": 0, "gradient_accumulation_steps": 2}
    one = train(folder, data, tmp_path / "one", train_batch_size=8, **options)
    two = tmp_path / "two"
    by_server(command_line(folder, data, two, train_batch_size=4, **options))
    assert_same_weights(one, two, atol=1e-6)
    assert_same_figures(one, two)
    # Within halves of the batch there is less to exchange: the same losses could not come of them.
    halves = {**options, "gradient_accumulation_steps": 4}
    apart = train(folder, data, tmp_path / "apart", train_batch_size=4, **halves)
    losses = [[loss for _, loss in read_log(run, "loss")] for run in (one, apart)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


# A model in a cycle, as runs have it, and works whose tensors their threads are the last to hold.
LET_GO = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from diffusers_fm.training.distributed import _let_go_of_process_groups

store = dist.HashStore()
for number in range(40):
    dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=0, world_size=1)
    groups = [dist.group.WORLD]
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]
    for _ in range(8):
        dist.all_reduce(torch.ones(3), async_op=True)
    dist.destroy_process_group()
    del model
    _let_go_of_process_groups(groups)
"""


def test_process_groups_are_let_go_without_waiting_for_their_threads_for_ever(tmp_path: Path) -> None:
    (tmp_path / "let_go.py").write_text(LET_GO)
    check_processes(tmp_path / "let_go.py", [])
