# SPDX-License-Identifier: Apache-2.0
"""Map between data and the state of a pipeline's loop, measured at its decoder and inverted."""

from typing import Any

import torch

from ..models.autoencoding import without_draw
from .one_step import Rearrangement, StandIn, map_tensors, precise_encoder
from .velocity_field import VelocityField


class _DecoderReached(Exception):
    def __init__(self, latents: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.latents, self.others, self.kwargs = latents, args, kwargs


def _stop(latents: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """End the pipeline's call at its decoder."""
    raise _DecoderReached(latents, args, kwargs)


def _unused(arguments: dict[str, Any]) -> None:
    raise ValueError("The pipeline calls its autoencoder as a whole, not `vae.decode`.")


class DecodeMap:
    """
    Data as the state of a pipeline's loop, and back.

    Between its loop and its decoder, a pipeline scales, shifts, normalises, unpacks or unpatchifies its latents. The
    decoder's input for zeros, ones and place numbers gives this map; another one verifies it; its inverse makes states
    of what the encoder says.

    ```python
    decode_map = DecodeMap(field, prompt=[""])
    data = decode_map.encode(images)
    x_t = (1 - t) * data + t * noise
    ```

    Args:
        field ([`VelocityField`]):
            Velocity field of the pipeline, with the size among its arguments.
        call:
            Further arguments of the pipeline's call, for one sample.

    Raises:
        ValueError: If the map cannot be found or has no inverse.
    """

    def __init__(self, field: VelocityField, **call: Any) -> None:
        if "vae" not in field.pipeline.components:
            raise ValueError(f"{type(field.pipeline).__name__} has no autoencoder: its states are the data.")
        self.vae = field.pipeline.components["vae"]
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        shape = field.state_shape(**call)
        if shape[0] != 1:
            raise ValueError(f"The arguments must be those of one sample, got those of {shape[0]}.")
        device = next(field.network.parameters()).device
        # In float32, so that place numbers stay exact.
        encode = precise_encoder(self.vae).encode
        vae = StandIn(self.vae, _unused, decode=_stop, encode=encode, dtype=torch.float32)

        def ask(state: torch.Tensor) -> torch.Tensor:
            try:
                field.finish(state.to(device), {"vae": vae}, **call)
            except _DecoderReached as reached:
                self._args, self._kwargs = reached.others, reached.kwargs
                return reached.latents
            raise ValueError(f"{type(field.pipeline).__name__} does not decode its latents by `vae.decode`.")

        name = f"{type(field.pipeline).__name__}, between its loop and its decoder,"
        self.map = Rearrangement.ask(ask, tuple(shape[1:]), name)

    @torch.no_grad()
    def encode(
        self, images: torch.Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """
        States of the pipeline's loop for data.

        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`, or with frames before the height):
                Images or videos in [-1, 1], at the size of the field's arguments. Autoencoders of videos take an image
                as a video of one frame. Or waveforms of shape `(batch_size, channels, num_samples)`.
            sample (`bool`, *optional*, defaults to `False`):
                Whether to draw from the posterior; its mode by default.
            generator (`torch.Generator`, *optional*):
                Source of the draw.

        Returns:
            `torch.Tensor` of shape `(batch_size, ...)`: States, in float32.

        Raises:
            ValueError: If the size is another one than the field's.
        """
        if images.ndim == 4 and len(self.map.y_shape) == 4:
            images = images.unsqueeze(2)
        options = without_draw(self.vae) and {"sample_posterior": sample, "generator": generator}
        output = self.vae.encode(images.to(self.vae.device, self.vae.dtype), **options)
        if "latent_dist" in output:
            posterior = output.latent_dist
            latents = posterior.sample(generator) if sample else posterior.mode()
        else:
            latents = output[0]
        return self.from_latents(latents.float())

    def from_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        States for what the encoder says, unscaled.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, channels, ...)`):
                Latents.
        """
        if latents.shape[1:] != self.map.y_shape:
            raise ValueError(
                f"The field is asked for latents of shape {self.map.y_shape} for each sample, got"
                f" {tuple(latents.shape[1:])}: data must have the size of its arguments."
            )
        return self.map.inverse(latents)

    def decode(self, state: torch.Tensor) -> torch.Tensor:
        """
        Data for states, as the autoencoder gives them; differentiable.

        Args:
            state (`torch.Tensor` of shape `(batch_size, ...)`):
                States at time 0.

        Returns:
            `torch.Tensor`: Images or videos in about [-1, 1].
        """
        kwargs = map_tensors(lambda tensor: tensor.expand(len(state), *tensor.shape[1:]), self._kwargs)
        latents = self.map(state).to(self.vae.device, self.vae.dtype)
        return self.vae.decode(latents, *self._args, **{**kwargs, "return_dict": False})[0]
