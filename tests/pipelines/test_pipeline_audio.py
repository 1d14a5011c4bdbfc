# SPDX-License-Identifier: Apache-2.0
"""The pipeline of sounds: what it gives and takes, and that its folder loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AudioPipelineOutput, DiffusionPipeline
from tiny_pipelines import NUM_CLASSES, generators, tiny_unet, tiny_vae

from diffusers_fm import FlowMatchAudioPipeline, FlowMatchPipeline, FlowMatchScheduler, init_pipeline


# The search for phases magnifies roundings, most on the noise that a network without training draws.
PHASES = 0.02


def audio_pipeline(vae: Any = None, **config: Any) -> FlowMatchAudioPipeline:
    """Sounds of 0.128 s in 8 bands: 8 frames of 128 samples at 8 kHz."""
    channels = 1 if vae is None else 4
    unet = tiny_unet(num_class_embeds=NUM_CLASSES + 1, in_channels=channels, out_channels=channels)
    pipeline = FlowMatchAudioPipeline(FlowMatchScheduler(), unet=unet, vae=vae, num_classes=NUM_CLASSES, **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sounds_of_a_call() -> None:
    pipeline = audio_pipeline()
    output = pipeline([1, 4], num_inference_steps=3, guidance_scale=2.0, generator=generators(0, 1))
    assert isinstance(output, AudioPipelineOutput)
    assert (output.audios.shape, output.audios.dtype, output.nfe) == ((2, 1, 1024), np.float32, 3)
    assert np.abs(output.audios).max() <= 1
    alone, nfe = pipeline(4, num_inference_steps=3, guidance_scale=2.0, generator=generators(1), return_dict=False)
    assert nfe == 3
    np.testing.assert_allclose(alone[0], output.audios[1], atol=PHASES)


def test_output_types_are_one_spectrogram() -> None:
    pipeline = audio_pipeline()
    outputs = {
        kind: pipeline(2, num_inference_steps=2, generator=generators(0), output_type=kind).audios
        for kind in ("np", "pt", "pil", "latent")
    }
    spectrogram = outputs["latent"].clamp(-1, 1)
    torch.testing.assert_close(outputs["pt"], pipeline.log_mel.decode(spectrogram)[:, None], atol=PHASES, rtol=0)
    np.testing.assert_allclose(outputs["np"], outputs["pt"].numpy(), atol=PHASES)
    # Low frequencies are at the bottom of the picture.
    levels = np.asarray(outputs["pil"][0])[::-1]
    np.testing.assert_allclose(levels, (spectrogram[0, 0].numpy() + 1) * 127.5, atol=0.51)


def test_length() -> None:
    pipeline = audio_pipeline()
    # 1,500 samples are 11.7 frames, and a UNet of two levels takes 12.
    assert pipeline(0, audio_length_in_s=0.1875, num_inference_steps=1).audios.shape == (1, 1, 1500)
    latents = pipeline(0, audio_length_in_s=0.1875, num_inference_steps=1, output_type="latent").audios
    assert latents.shape == (1, 1, 8, 12)


def test_flow_in_both_directions_takes_and_gives_sounds() -> None:
    pipeline = audio_pipeline()
    sounds = 0.8 * torch.rand(2, 1, 1000, generator=torch.Generator().manual_seed(0)) - 0.4
    data = pipeline.to_data(sounds)
    assert data.shape == (2, 1, 8, 8)
    torch.testing.assert_close(data, pipeline.to_data(sounds[:, 0].numpy()))
    images = FlowMatchPipeline.from_pipe(pipeline)
    images.set_progress_bar_config(disable=True)
    noise = pipeline.encode(sounds, [0, 3], num_inference_steps=4)
    torch.testing.assert_close(noise, images.encode((data + 1) / 2, [0, 3], num_inference_steps=4))
    again = pipeline.decode(noise, [0, 3], num_inference_steps=4, output_type="latent")
    torch.testing.assert_close(again, images.decode(noise, [0, 3], num_inference_steps=4, output_type="latent"))
    assert pipeline.decode(noise, [0, 3], num_inference_steps=2, output_type="np").shape == (2, 1, 1024)
    assert pipeline.log_likelihood(sounds, [0, 3], num_steps=2).log_prob.shape == (2,)


def test_spectrograms_may_be_latents() -> None:
    pipeline = audio_pipeline(tiny_vae("kl", in_channels=1, out_channels=1, latent_channels=4))
    assert pipeline.log_mel.num_bands == 16
    assert pipeline(0, num_inference_steps=1).audios.shape == (1, 1, 2048)
    assert pipeline.to_data(torch.zeros(1, 2048)).shape == (1, 4, 8, 8)


def test_folder(tmp_path: Path) -> None:
    pipeline = audio_pipeline(sampling_rate=16000, hop_length=64)
    pipeline.save_pretrained(tmp_path)
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), init_pipeline(tmp_path)):
        assert isinstance(loaded, FlowMatchAudioPipeline)
        assert (loaded.config.sampling_rate, loaded.config.hop_length, loaded.config.range_db) == (16000, 64, 60.0)
        loaded.set_progress_bar_config(disable=True)
        sounds = [each(1, num_inference_steps=1, generator=generators(0)).audios for each in (pipeline, loaded)]
        np.testing.assert_allclose(*sounds, atol=PHASES)
    card = str(pipeline.build_model_card("me/sounds"))
    assert "pipeline_tag: text-to-audio" in card
    assert 'soundfile.write("sample.wav", audios[0, 0], pipeline.config.sampling_rate)' in card
    assert "A class-conditional generator of sounds" in card
    assert "image" not in card.split("## Model")[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(0, audio_length_in_s=-1), "`audio_length_in_s` must be a number above 0, got -1"),
        (lambda p: p(0, output_type="mp3"), "`output_type` must be one of .* got 'mp3'"),
        (lambda p: p.to_data(torch.zeros(2, 2, 1024)), r"must have the shape .* got \(2, 2, 1024\)"),
        (lambda p: p.to_data(torch.full((1, 1024), 2.0)), r"values in \[-1, 1\]"),
        (lambda p: p.encode(np.zeros((1, 0)), 0), r"must have the shape .* got \(1, 0\)"),
    ],
)
def test_bad_input_is_one_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(audio_pipeline())


def test_bad_components_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="A spectrogram has 1 channel, but the network's images have 3"):
        FlowMatchAudioPipeline(FlowMatchScheduler(), unet=tiny_unet(in_channels=3, out_channels=3))
    with pytest.raises(ValueError, match="`hop_length` must be at most half of `window_length` 512, .* got 400"):
        audio_pipeline(hop_length=400)
