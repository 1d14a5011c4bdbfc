# SPDX-License-Identifier: Apache-2.0
"""One command makes a pipeline that is guided by a weaker network of the same run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_auxiliary import pipeline_of
from training_runs import load, make_dataset, train

from diffusers_fm.autoguidance import main
from diffusers_fm.training.posthoc_ema import find_snapshots, posthoc_ema


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pipeline_of("dit").save_pretrained(folder / "pipeline")
    options = {"use_ema": True, "ema_profile": "power", "ema_snapshot_steps": 1, "checkpointing_steps": 1}
    data = make_dataset(folder / "data")
    return train(folder / "pipeline", data, folder / "run", **options, max_train_steps=3, internal_block=2)


@pytest.mark.parametrize(
    "words",
    [["--checkpoint=checkpoint-1"], ["--sigma_rel=0.1", "--step=2"], ["--network", "INTERNAL"]],
    ids=lambda words: words[0],
)
def test_the_weaker_network_guides_the_saved_pipeline(words: list[str], run: Path, tmp_path: Path) -> None:
    words = [str(run / "internal_network") if word == "INTERNAL" else word for word in words]
    assert main([str(run), "--output_dir", str(tmp_path / "guided"), "--guidance_scale=3", *words]) == 0
    guided, plain = load(tmp_path / "guided"), load(run)
    weaker = guided.guiding_network
    if words[0].startswith("--checkpoint"):
        state = load_file(run / "checkpoint-1" / "model.safetensors")
        assert all(torch.equal(value, state[f"denoiser.{name}"]) for name, value in weaker.state_dict().items())
    elif words[0].startswith("--sigma_rel"):
        state, _ = posthoc_ema(find_snapshots(run), 0.1, 2)
        assert not any(name.startswith("auxiliary") for name in state)
        assert all(torch.equal(p, state[f"denoiser.{name}"]) for name, p in weaker.named_parameters())
    else:
        assert len(weaker.transformer_blocks) == 2
    # One Euler step from noise to data is x - v, with v of both networks.
    options = {"class_labels": [0, 3], "num_inference_steps": 1, "output_type": "latent", "solver": "euler"}
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    time, labels = torch.full((2,), 1000.0), torch.tensor([0, 3])
    with torch.no_grad():
        strong, weak = (network(noise, time, labels).sample for network in (plain.transformer, weaker))
    expected = noise - (weak + 3 * (strong - weak))
    torch.testing.assert_close(guided(latents=noise, **options).images, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(latents=noise, **options).images, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Exactly one of --checkpoint, --sigma_rel and --network must be given."),
        (["--checkpoint=checkpoint-9"], "is no checkpoint with whole weights"),
        (["--sigma_rel=0.1", "--step=9"], "There is no snapshot at step 9"),
        (["--checkpoint=checkpoint-1", "--output_dir=RUN"], "holds a pipeline: choose another --output_dir"),
    ],
)
def test_refusals_are_one_sentence(
    words: list[str], sentence: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *(word.replace("RUN", str(run)) for word in words)]) == 2
    assert sentence in capsys.readouterr().err
