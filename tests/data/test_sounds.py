# SPDX-License-Identifier: Apache-2.0
"""Sounds: the spoken digits of the repository, sound files as spectrograms, and training from an `Audio` column."""

import io
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from tiny_pipelines import NUM_CLASSES, tiny_unet
from training_runs import command_line, load, run_script, script

from diffusers_fm import FlowMatchAudioPipeline, FlowMatchScheduler, init_pipeline
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.sounds import SoundTransform, WaveformTransform, read_sound
from diffusers_fm.data.sources import load_splits
from diffusers_fm.spectrograms import LogMel


SPOKEN_DIGITS = Path(__file__).parents[2] / "data" / "spoken-digits"
MEL = LogMel(8000, 8)


def sound_file(samples: np.ndarray, rate: int = 8000, kind: str = "WAV") -> bytes:
    """The file of a sound."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


def test_spoken_digits() -> None:
    splits = load_splits(str(SPOKEN_DIGITS))
    assert {name: len(split) for name, split in splits.items()} == {"train": 900, "test": 200}
    keys = set()
    for name, split in splits.items():
        assert split.features["label"].names[7] == "seven"
        assert np.bincount(split["label"]).tolist() == [{"train": 90, "test": 20}[name]] * 10
        for row in split:
            keys.add((row["label"], row["accent"], row["voice"], row["pitch"], row["speed"]))
            info = soundfile.info(io.BytesIO(row["audio"]["bytes"]))
            facts = (info.format, info.subtype, info.samplerate, info.channels, info.frames)
            assert facts == ("FLAC", "PCM_16", 8000, 1, 4096)
            samples = read_sound(row["audio"]["bytes"], 8000)[0]
            # Silence first, one peak, 10 bits, nothing clipped, and a word that lasts 0.1 s at least.
            assert not samples[:160].any()
            assert np.abs(samples).max() == pytest.approx(0.8, abs=1 / 512)
            assert np.array_equal(np.round(samples * 512), samples * 512)
            assert (np.abs(samples) > 0.01).sum() > 400
    # Hardly any clip of the two splits is said twice by one voice in one way.
    assert len(keys) > 1090


def test_source_and_licence_are_beside_the_sounds() -> None:
    card = (SPOKEN_DIGITS / "README.md").read_text()
    for word in (
        "espeak-ng",
        "GNU General Public License",
        "version 3",
        "make_spoken_digits.py",
        "license: apache-2.0",
    ):
        assert word in card


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_sound_files_are_averaged_and_resampled(kind: str) -> None:
    time = np.arange(22050 // 2) / 22050
    tone = 0.5 * np.sin(2 * math.pi * 440 * time)
    samples = read_sound(sound_file(np.stack([tone, 0.5 * tone], axis=1), 22050, kind), 8000)[0]
    assert samples.dtype == np.float32
    assert len(samples) == 4000
    expected = 0.375 * np.sin(2 * math.pi * 440 * np.arange(4000) / 8000)
    # Vorbis loses some; the filter of the resampling reaches past both ends.
    np.testing.assert_allclose(samples[100:-100], expected[100:-100], atol=0.02 if kind == "OGG" else 2e-3)


def test_short_sounds_are_followed_by_silence_and_long_ones_are_cut() -> None:
    transform = SoundTransform(8, 1, log_mel=MEL)
    tone = 0.5 * np.sin(2 * math.pi * 1000 * np.arange(4096) / 8000)
    short = transform.decode({"bytes": sound_file(tone[:300]), "path": None}, (8, 8))
    assert (short.shape, short.dtype) == ((1, 8, 8), np.uint8)
    assert short[0, :, 0].max() > 128
    assert not short[0, :, 5:].any()
    long = transform.decode({"bytes": sound_file(tone), "path": None}, (8, 8))
    assert long.shape == (1, 8, 32)
    expected = MEL.encode(torch.from_numpy(tone[None]).float())[0]
    np.testing.assert_allclose(long / 127.5 - 1, expected, atol=1 / 255 + 1e-3)
    assert np.array_equal(transform.crop(long, (8, 8), np.array([0.0, 0.5])), long[:, :, 12:20])
    with pytest.raises(ValueError, match="--random_flip mirrors images: sounds would run backwards"):
        SoundTransform(8, 1, random_flip=True, log_mel=MEL)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones, a pitch for each class, and one file that is no sound, in an `Audio` column."""
    folder = tmp_path_factory.mktemp("sounds")
    for split, count in (("train", 20), ("test", 6)):
        labels = [row % NUM_CLASSES for row in range(count)]
        tones = [0.5 * np.sin(2 * math.pi * 300 * (1 + label) * np.arange(1024) / 8000) for label in labels]
        files = [sound_file(tone, kind="FLAC") for tone in tones]
        files[3] = b"no sound" if split == "train" else files[3]
        audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        dataset = datasets.Dataset.from_dict(
            {"audio": [{"bytes": file, "path": None} for file in files], "label": labels},
            features=datasets.Features({"audio": audio, "label": datasets.Value("int64")}),
        )
        file = folder / f"{split}-00000-of-00001.parquet"
        dataset.cast_column("audio", datasets.Audio(8000)).to_parquet(file)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    unet = tiny_unet(num_class_embeds=NUM_CLASSES + 1)
    FlowMatchAudioPipeline(FlowMatchScheduler(), unet=unet, num_classes=NUM_CLASSES).save_pretrained(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_training_from_an_audio_column(sounds: Path, untrained: Path, tmp_path: Path, streaming: bool) -> None:
    line = command_line(
        untrained, sounds, tmp_path / "run", image_column="audio", num_validation_images=1, streaming=streaming
    )
    run_script(script, line)
    trained = FlowMatchAudioPipeline.from_pretrained(tmp_path / "run")
    trained.set_progress_bar_config(disable=True)
    assert trained(3, num_inference_steps=1).audios.shape == (1, 1, 1024)
    assert (tmp_path / "run" / "grid.png").is_file()
    assert type(load(tmp_path / "run")).__name__ == "FlowMatchPipeline"


def test_training_from_a_folder_of_sound_files(untrained: Path, tmp_path: Path) -> None:
    for label in range(NUM_CLASSES):
        folder = tmp_path / "data" / f"pitch {label}"
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.wav").write_bytes(sound_file(tone(1024)))
    options = {"dataset_name": None, "train_data_dir": tmp_path / "data", "train_batch_size": 2, "max_train_steps": 1}
    run_script(script, command_line(untrained, tmp_path / "data", tmp_path / "run", **options))
    assert FlowMatchAudioPipeline.from_pretrained(tmp_path / "run").config.id2label["0"] == "pitch 0"


def test_columns_of_another_kind_are_refused(sounds: Path, untrained: Path, tmp_path: Path) -> None:
    for pipeline, data, column, message in (
        (Path("pipelines/unet-digits"), sounds, "audio", "'audio' holds Audio, and the pipeline learns from Image"),
        (untrained, Path("data/digits"), "image", "'image' holds Image, and the pipeline learns from Audio"),
    ):
        pipeline, data = (Path(__file__).parents[2] / path for path in (pipeline, data))
        with pytest.raises(ValueError, match=message):
            run_script(script, command_line(pipeline, data, tmp_path / "no", image_column=column))


def test_recipe_of_the_spoken_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SPOKEN_DIGITS.parents[1])
    args = parse_arguments(script.ScriptArguments, ["--config", "pipelines/unet-spoken-digits/training.json"])
    pipeline = init_pipeline(args.pretrained_model_name_or_path, seed=0)
    assert isinstance(pipeline, FlowMatchAudioPipeline)
    assert (args.dataset_name, args.image_column) == ("data/spoken-digits", "audio")
    count = f"{sum(weight.numel() for weight in pipeline.unet.parameters()):,}"
    assert f"| `unet` | `UNet2DModel` | {count} |" in Path("pipelines/unet-spoken-digits/README.md").read_text()
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([7], guidance_scale=2.0, num_inference_steps=1).audios.shape == (1, 1, 4096)


def tone(num_samples: int, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (num_samples, channels)).astype(np.float32)
    return np.round(samples * 32768) / 32768


@pytest.mark.parametrize(("has", "wanted"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3)])
def test_waveforms_have_the_channels_and_the_length_of_the_autoencoder(has: int, wanted: int) -> None:
    samples = tone(100, has)
    expected = {1: samples.mean(1, keepdims=True), has: samples}.get(wanted, samples.repeat(wanted, 1)).T
    cell = {"bytes": sound_file(samples), "path": None}
    for num_samples in (100, 60, 130):
        data = waveforms([cell], num_samples, wanted, center_crop=True)
        batch = data[np.array([[0, 0]])]["images"]
        assert batch.shape == (1, wanted, num_samples) and batch.dtype == torch.float32
        first = max(0, (100 - num_samples) // 2)
        part = np.pad(expected[:, first : first + num_samples], ((0, 0), (0, max(0, num_samples - 100))))
        np.testing.assert_allclose(batch[0], part, atol=1e-7)


def waveforms(cells: list[dict[str, Any]], num_samples: int, channels: int, **options: Any) -> ImageData:
    rows = datasets.Dataset.from_dict({"audio": cells}).cast_column("audio", datasets.Audio())
    return ImageData(rows, WaveformTransform(num_samples, channels, sampling_rate=8000, **options), "audio")


def test_long_sounds_are_cut_anywhere_anew_at_each_visit() -> None:
    samples = tone(100)
    data = waveforms([{"bytes": sound_file(samples), "path": None}], 60, 1)
    starts = set()
    for epoch in range(300):
        batch = data[np.array([[epoch, 0]])]["images"][0, 0].numpy()
        (found,) = [start for start in range(41) if np.allclose(batch, samples[start : start + 60, 0], atol=1e-7)]
        starts.add(found)
    # Of 41 places in 300 visits, one is missed with a probability of 41 (40 / 41)^300 = .025; the seed is fixed.
    assert len(starts) >= 40
    again = data[np.array([[0, 0]])]["images"]
    assert torch.equal(again, data[np.array([[0, 0]])]["images"])


def test_other_channels_and_mirrored_sounds_are_refused() -> None:
    with pytest.raises(ValueError, match="it has 3 channels, of which 2 are wanted"):
        waveforms([{"bytes": sound_file(tone(100, 3)), "path": None}], 100, 2)
    with pytest.raises(ValueError, match="sounds would run backwards"):
        WaveformTransform(100, 1, random_flip=True, sampling_rate=8000)


def test_a_folder_of_sounds_with_captions(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.wav").write_bytes(sound_file(tone(100 + number)))
        (tmp_path / f"{number}.txt").write_text(f"sound {number}")
    (tmp_path / "cover.png").write_bytes(b"")
    (rows,) = load_splits(train_data_dir=str(tmp_path), kind="sounds").values()
    assert rows["text"][:] == ["sound 0", "sound 1"] and isinstance(rows.features["image"], datasets.Audio)
    assert rows.select_columns(["text"]).num_rows == 2
    data = ImageData(rows, WaveformTransform(100, 1, center_crop=True, sampling_rate=8000), "image")
    np.testing.assert_allclose(data[np.array([[0, 0]])]["images"][0, 0], tone(100)[:, 0], atol=1e-7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it contains no sounds that libsndfile can read"):
        load_splits(train_data_dir=str(tmp_path / "empty"), kind="sounds")
