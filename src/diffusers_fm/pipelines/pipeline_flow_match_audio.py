# SPDX-License-Identifier: Apache-2.0
"""Sound generation with a flow matching model of log-mel spectrograms, unconditional or by class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AudioPipelineOutput,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    ModelMixin,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DModel,
)
from diffusers.guiders import BaseGuidance

from ..hub.cards import CardContent
from ..models.autoencoding import encode_latents
from ..models.class_embedder import ClassEmbedder
from ..models.interval import IntervalEmbedding
from ..spectrograms import LogMel
from .cards import audio_content
from .checks import Labels, is_number
from .pipeline_flow_match import FlowMatchPipeline


@dataclass
class FlowMatchAudioPipelineOutput(AudioPipelineOutput):
    """
    Output of [`FlowMatchAudioPipeline`].

    Args:
        audios (`np.ndarray`, `torch.Tensor` or `list[PIL.Image.Image]`):
            Sounds of shape `(batch_size, 1, num_samples)` with values in [-1, 1]; pictures of their spectrograms; or
            what the flow ended in.
        nfe (`int`):
            Number of calls of the network. A guided call evaluates twice the batch and counts once.
    """

    audios: np.ndarray | torch.Tensor | list[PIL.Image.Image]
    nfe: int


class FlowMatchAudioPipeline(FlowMatchPipeline):
    r"""
    Generates sounds: a [`FlowMatchPipeline`] whose images are log-mel spectrograms ([`~spectrograms.LogMel`]), low
    bands first, and whose methods take sounds and give sounds.

    A spectrogram has as many bands as the network's images have rows, and a frame for each column. Phases are not in
    it: [`~spectrograms.LogMel.decode`] finds some that fit.

    Args:
        scheduler, unet, transformer, vae, class_embedder, num_classes, id2label, interval_embedding, guider,
        guiding_network, guidance_space, guidance_interval:
            As in [`FlowMatchPipeline`], for images of one channel.
        sampling_rate (`int`, *optional*, defaults to 8000):
            Samples a second.
        window_length, hop_length, range_db (*optional*, default to 512, 128 and 60.0):
            Of the spectrograms.

    Raises:
        ValueError: If the components do not fit together, images have more than one channel, or no spectrogram has
            such settings.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | None = None,
        transformer: DiTTransformer2DModel | SD3Transformer2DModel | None = None,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        class_embedder: ClassEmbedder | None = None,
        num_classes: int | None = None,
        id2label: dict | None = None,
        interval_embedding: IntervalEmbedding | None = None,
        guider: BaseGuidance | None = None,
        guiding_network: ModelMixin | None = None,
        guidance_space: str | None = None,
        guidance_interval: Sequence[float] | None = None,
        sampling_rate: int = 8000,
        window_length: int = 512,
        hop_length: int = 128,
        range_db: float = 60.0,
    ) -> None:
        super().__init__(
            *(scheduler, unet, transformer, vae, class_embedder, num_classes, id2label, interval_embedding),
            *(guider, guiding_network, guidance_space, guidance_interval),
        )
        self.register_to_config(
            sampling_rate=sampling_rate, window_length=window_length, hop_length=hop_length, range_db=range_db
        )
        if self.image_channels != 1:
            raise ValueError(f"A spectrogram has 1 channel, but the network's images have {self.image_channels}.")
        self.log_mel  # noqa: B018  Its checks.

    @property
    def log_mel(self) -> LogMel:
        """The spectrograms that the network draws."""
        config = self.config
        num_bands = self.sample_shape[1] * self.vae_scale_factor
        return LogMel(config.sampling_rate, num_bands, config.window_length, config.hop_length, config.range_db)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        batch_size: int | None = None,
        audio_length_in_s: float | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        **options: Any,
    ) -> FlowMatchAudioPipelineOutput | tuple[Any, int]:
        """
        Generates sounds.

        Args:
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                What to draw, as for [`FlowMatchPipeline`].
            batch_size (`int`, *optional*):
                Number of sounds, likewise.
            audio_length_in_s (`float`, *optional*):
                Length of the sounds in seconds; defaults to what the network was configured for. Only a UNet takes
                another one.
            output_type (`str`, *optional*, defaults to `"np"`):
                `"np"` or `"pt"` for sounds of shape `(batch_size, 1, num_samples)`, `"pil"` for pictures of their
                spectrograms, low frequencies at the bottom, or `"latent"` for what the integration ends with.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`FlowMatchAudioPipelineOutput`] or a tuple `(audios, nfe)`.
            options:
                `guidance_scale`, `num_inference_steps`, `sigmas`, `timesteps`, `mu`, `solver`, `rtol`, `atol`,
                `generator`, `latents` and the callbacks of [`FlowMatchPipeline`].

        Returns:
            [`FlowMatchAudioPipelineOutput`] or `tuple`: The sounds and the number of calls of the network.

        Raises:
            ValueError: For arguments that do not fit the pipeline, before any work.
        """
        num_samples = None
        if audio_length_in_s is not None:
            if not (is_number(audio_length_in_s) and audio_length_in_s > 0):
                raise ValueError(f"`audio_length_in_s` must be a number above 0, got {audio_length_in_s!r}.")
            num_samples = max(1, round(audio_length_in_s * self.config.sampling_rate))
            options["width"] = self._num_frames(num_samples)
        audios, nfe = super().__call__(class_labels, batch_size, output_type=output_type, return_dict=False, **options)
        if output_type in ("np", "pt"):
            audios = audios[..., :num_samples]
        return FlowMatchAudioPipelineOutput(audios=audios, nfe=nfe) if return_dict else (audios, nfe)

    def _num_frames(self, num_samples: int) -> int:
        """Frames of a spectrogram of at least so many samples that the network takes."""
        return self.size_multiple * math.ceil(num_samples / (self.config.hop_length * self.size_multiple))

    @torch.no_grad()
    def to_data(self, audios: np.ndarray | torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """
        Sounds as the flow sees them: spectrograms in [-1, 1], or their latents.

        Args:
            audios (`np.ndarray` or `torch.Tensor` of shape `(batch_size, 1, num_samples)`):
                Samples in [-1, 1]; the axis of length 1 may be missing. Silence follows up to the next length that the
                network takes.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: In float32, on the pipeline's device.

        Raises:
            ValueError: If the shape, the values or the length do not fit the pipeline.
        """
        waveforms = torch.as_tensor(audios).to(self._execution_device)
        if waveforms.ndim == 3 and waveforms.shape[1] == 1:
            waveforms = waveforms[:, 0]
        if waveforms.ndim != 2 or not waveforms.numel():
            raise ValueError(
                f"Sounds must have the shape (batch_size, 1, num_samples) or (batch_size, num_samples), got"
                f" {tuple(waveforms.shape)}."
            )
        missing = self._num_frames(waveforms.shape[1]) * self.config.hop_length - waveforms.shape[1]
        spectrograms = self.log_mel.encode(torch.nn.functional.pad(waveforms, (0, missing)))
        self.latent_shape(*spectrograms.shape[2:])
        return spectrograms if self.vae is None else encode_latents(self.vae, spectrograms, sample=False)

    @torch.no_grad()
    def to_images(self, data: torch.Tensor, output_type: str = "np", size: tuple[int, int] | None = None) -> Any:
        """
        What the flow ends in, as sounds: the way back of [`to_data`], but for the phases.

        Args:
            data (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Spectrograms in about [-1, 1], or latents.
            output_type (`str`, *optional*, defaults to `"np"`):
                As for a call.
            size (`tuple[int, int]`, *optional*):
                Bands and frames, where they are cut from something larger.

        Returns:
            Sounds `(batch_size, 1, num_samples)`, PIL pictures of spectrograms, or `data`.
        """
        if output_type == "latent":
            return data
        spectrograms = super().to_images(data, "pt", size)
        if output_type == "pil":
            return self.image_processor.postprocess(2 * spectrograms.flip(2) - 1, output_type)
        audios = self.log_mel.decode(2 * spectrograms - 1)[:, None]
        return audios.cpu().numpy() if output_type == "np" else audios

    def card_content(
        self, repo_id: str, num_inference_steps: int | None = None, guidance_scale: float = 1.0
    ) -> CardContent:
        """Content of a model card, see [`FlowMatchPipeline`]."""
        return audio_content(super().card_content(repo_id, num_inference_steps, guidance_scale), repo_id)
