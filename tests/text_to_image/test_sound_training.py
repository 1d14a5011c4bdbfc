# SPDX-License-Identifier: Apache-2.0
"""Training of pipelines of sounds: data as their decoders take them, and runs that the stock pipelines sample."""

import shutil
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from stock_fields import Decoded, stock_step, stop_at_decoder
from tiny_families_2 import longcat_audio
from tiny_sounds import SOUNDS, save_sounds
from tiny_text_to_image import train_text_to_image
from training_runs import ROOT, load_script, read_log

from diffusers_fm.data.randomness import make_generator
from diffusers_fm.models import encode_moments
from diffusers_fm.text_to_image import sounds
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.text_to_image.sounds import SECONDS
from diffusers_fm.training.validation import EVALUATION_SEED


PROMPT = "a low tone!"
SCRIPTS = ROOT / "training_scripts"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sounds(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, make in SOUNDS.items():
        make().pipeline.save_pretrained(folder / name)
    return folder


def train(model: Path, data: Path, output_dir: Path, script: str = "train_text_to_image", **options: Any) -> Path:
    """A short run on sounds of two seconds."""
    values = {"image_column": "audio", "audio_seconds": 2.0, "resolution": None, "max_sequence_length": None}
    values |= {"guidance_scale": 1.0, **options}
    return train_text_to_image(load_script(SCRIPTS / f"{script}.py"), model, data, output_dir, **values)


@pytest.mark.parametrize("name", SOUNDS)
def test_data_are_what_the_decoder_is_handed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = SOUNDS[name]().pipeline
    field = TrainedField(pipeline, "transformer", {})
    assert field.set_seconds(2.0) == (1, 2 * field.sounds.sampling_rate)
    vae = pipeline.vae
    shape = (2, field.sounds.channels, field.sounds.num_samples)
    waveforms = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    state = field.encode({"images": waveforms}, torch.device("cpu"))
    assert state.shape[1:] == field.state_shape(field.square)
    found = field.decode_map(field.square)
    with torch.no_grad():
        # The autoencoder's own way there and back draws nothing from a posterior.
        torch.testing.assert_close(found.decode(state), vae(waveforms).sample, atol=1e-5, rtol=0)
        encoded = vae.encode(waveforms, **({"sample_posterior": False} if name == "longcat_audio" else {}))
    expected = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
    torch.testing.assert_close(found.encode(waveforms), state, atol=1e-6, rtol=0)

    given = stop_at_decoder(monkeypatch, vae)
    for i in range(2):
        one = field._condition([PROMPT], field.square)
        with pytest.raises(Decoded):
            stock_step(
                pipeline, None, 0.0, **{**field.field.call, **one, "output_type": "pt"}, result=state[i : i + 1]
            )
        torch.testing.assert_close(given[i], expected[i : i + 1], atol=1e-5, rtol=0)


def test_posteriors_are_drawn_as_the_autoencoder_draws() -> None:
    pipeline: Any = SOUNDS["ace_step"]().pipeline
    field = TrainedField(pipeline, "transformer", {})
    field.set_seconds(2.0)
    waveforms = torch.rand(1, 2, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(waveforms).latent_dist.sample(torch.Generator().manual_seed(1))
    drawn = field.decode_map(field.square).encode(waveforms, sample=True, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, expected.transpose(1, 2), atol=1e-6, rtol=0)

    class Part:
        def sample_generators(self, purpose: str, device: torch.device) -> list[torch.Generator]:
            return [torch.Generator().manual_seed(1)]

    part: Any = Part()
    state = field.encode({"images": waveforms}, torch.device("cpu"), part)
    torch.testing.assert_close(state, expected.transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SOUNDS)
def test_a_run_is_sampled_by_the_stock_pipeline(name: str, models: Path, data: Path, tmp_path: Path) -> None:
    options = {"center_crop": True, "cache_latents": True, "use_ema": True, "max_train_steps": 3}
    # Padded captions of a batch change each other where the pipeline leaves out their mask.
    options |= {"cache_text_embeddings": name != "ace_step", "validation_prompts": PROMPT}
    run = train(models / name, data, tmp_path / "run", num_validation_images=2, **options)
    assert len(read_log(run, "loss")) == 3
    assert read_log(run, "validation_loss")[-1][1] > 0
    with PIL.Image.open(run / "grid.png") as grid:
        assert grid.width > 2 * 256
    stock: Any = DiffusionPipeline.from_pretrained(run)
    assert type(stock) is type(SOUNDS[name]().pipeline) and stock.scheduler.__module__.startswith("diffusers.")
    stock.set_progress_bar_config(disable=True)
    generators = [make_generator(EVALUATION_SEED, "grid", 0, number) for number in range(2)]
    seconds = next(key for key in SECONDS if key in TrainedField(stock, "transformer", {}).field.arguments)
    call = {seconds: 2.0, "guidance_scale": 1.0, "num_inference_steps": 2, "generator": generators}
    audios = stock([PROMPT] * 2, **call, output_type="np", **({"lyrics": [""] * 2} if name == "ace_step" else {}))[0]
    for number in range(2):
        drawn, rate = soundfile.read(run / f"sound_0_{number}.wav", dtype="float32", always_2d=True)
        assert rate == stock.vae.config.get("sampling_rate", stock.vae.config.get("sample_rate"))
        # Whole numbers of 16 bits.
        np.testing.assert_allclose(drawn.T, audios[number].clip(-1, 1), atol=2**-15 + 1e-5)
    card = (run / "README.md").read_text()
    assert "pipeline_tag: text-to-audio" in card and '<audio controls src="sound_0_0.wav"></audio>' in card
    assert f"{seconds}=2, num_inference_steps=2" in card and f'soundfile.write("sample.wav", audio.T, {rate})' in card


@pytest.mark.parametrize("name", SOUNDS)
def test_resumed_runs_are_bit_for_bit_those_without_a_stop(
    name: str, models: Path, data: Path, tmp_path: Path
) -> None:
    # Sounds are cut anywhere, at other places at each visit.
    whole = train(models / name, data, tmp_path / "whole", checkpointing_steps=2)
    shutil.copytree(whole, tmp_path / "resumed", ignore=shutil.ignore_patterns("checkpoint-4", "transformer"))
    resumed = train(models / name, data, tmp_path / "resumed", resume_from_checkpoint="checkpoint-2")
    weights = [load_file(run / "transformer" / "diffusion_pytorch_model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    before = load_file(models / name / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(tensor, weights[0][key]) for key, tensor in before.items())


def test_sounds_that_cannot_be_written_are_said_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "samples").write_text("the user's")
    made = sounds.Sounds(8000, 1, 2048)
    grid = sounds.write_sounds([[torch.zeros(1, 2048)]], made, tmp_path, "samples/step-1")
    assert grid.size[0] > sounds.PICTURE[0] and (tmp_path / "samples").read_text() == "the user's"
    assert "step-1_0_0.wav could not be written" in caplog.text


def test_adapters(models: Path, data: Path, tmp_path: Path) -> None:
    run = train(
        models / "ace_step", data, tmp_path / "run", "train_text_to_image_lora", rank=2, validation_prompts=PROMPT
    )
    stock: Any = DiffusionPipeline.from_pretrained(models / "ace_step")
    stock.set_progress_bar_config(disable=True)
    call = {"audio_duration": 2.0, "guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    drawn = []
    for load in (False, True):
        if load:
            stock.load_lora_weights(run)
        drawn.append(stock(PROMPT, **call, generator=torch.Generator().manual_seed(0)).audios)
    assert (drawn[1] - drawn[0]).abs().max() > 1e-4
    assert "base_model" not in (run / "README.md").read_text() and (run / "sound_0_0.wav").is_file()
    for name in ("stable_audio_3", "longcat_audio"):
        with pytest.raises(ValueError, match=r"diffusers has no adapters for the \w+ of \w+Pipeline: train it whole"):
            train(models / name, data, tmp_path / name, "train_text_to_image_lora")


def test_untrained_folders(models: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dry_run does not work for StableAudio3Pipeline: the length of its sounds"):
        train(models / "stable_audio_3", data, tmp_path / "dry", dry_run=True)
    folder = shutil.copytree(models / "ace_step", tmp_path / "untrained")
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    run = train(folder, data, tmp_path / "run", max_train_steps=1, streaming=True, num_validation_images=0)
    assert type(DiffusionPipeline.from_pretrained(run)) is diffusers.AceStepPipeline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio_seconds": None}, "StableAudio3Pipeline makes sounds: give their length by --audio_seconds"),
        ({"image_column": "picture"}, "The column 'picture' holds Image, and the pipeline learns from Audio"),
        ({"image_column": "sound"}, "There is no image column 'sound'; the columns are"),
        ({"random_flip": True}, "--random_flip True does not go with --audio_seconds: it is for images"),
        ({"resolution": 16}, "--resolution 16 does not go with --audio_seconds"),
        ({"num_frames": 5}, "--num_frames 5 does not go with --audio_seconds"),
        ({"audio_seconds": 0}, "--audio_seconds must be"),
        ({"calibrate_steps": 2}, "--calibrate_steps does not go with the grid that StableAudio3Pipeline gives"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, models: Path, data: Path, tmp_path: Path) -> None:
    if options.get("image_column") == "picture":
        cells = {"picture": [{"bytes": b"", "path": None}], "text": [PROMPT]}
        rows = datasets.Dataset.from_dict(cells).cast_column("picture", datasets.Image())
        data = tmp_path / "pictures"
        rows.to_parquet(data / "train-0.parquet")
    with pytest.raises((ValueError, SystemExit), match=message):
        train(models / "stable_audio_3", data, tmp_path / "run", **options)
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_other_pipelines_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="FluxPipeline makes no sounds: leave out --audio_seconds"):
        train(ROOT / "pipelines" / "flux-tiny", data, tmp_path / "flux")
    # A length that the pipeline cuts, and a factor that is not that of the autoencoder's layers.
    field = TrainedField(SOUNDS["longcat_audio"]().pipeline, "transformer", {})
    with pytest.raises(ValueError, match="LongCatAudioDiTPipeline makes sounds of 30 s, not of --audio_seconds 40"):
        field.set_seconds(40.0)
    field = TrainedField(longcat_audio().pipeline, "transformer", {})
    with pytest.raises(ValueError, match=r"LongCatAudioDiTPipeline makes sounds of 0\.004 s, not of"):
        field.set_seconds(0.002)
    # Data in another scale than the decoder's.
    monkeypatch.setattr(sounds, "encode_moments", lambda vae, waveforms: 2 * encode_moments(vae, waveforms))
    field = TrainedField(SOUNDS["stable_audio_3"]().pipeline, "transformer", {})
    with pytest.raises(
        ValueError, match="The AutoencoderSAME of StableAudio3Pipeline does not decode what it encodes"
    ):
        field.set_seconds(2.0)


@pytest.mark.parametrize("kind", ["Inpaint", "AudioToAudio"])
def test_pipelines_that_need_a_sound_are_refused(kind: str) -> None:
    parts = SOUNDS["stable_audio_3"]().pipeline.components
    field = TrainedField(getattr(diffusers, f"StableAudio3{kind}Pipeline")(**parts), "transformer", {})
    with pytest.raises(ValueError, match=f"StableAudio3{kind}Pipeline makes no sounds of 2 s: "):
        field.set_seconds(2.0)
