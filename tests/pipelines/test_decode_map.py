# SPDX-License-Identifier: Apache-2.0
"""Data as states of stock pipelines, against their image-to-image siblings and what their decoders are given."""

from typing import Any

import pytest
import torch
from stock_fields import TEXT, Decoded, make, sample, stock_step, stop_at_decoder
from stock_pipelines import flow_cases

from diffusers_fm.pipelines import DecodeMap
from diffusers_fm.pipelines.one_step import Rearrangement


# The tiny autoencoder of Lumina 2 has another factor than the 8 that its pipeline takes for granted.
NAMES = [name for name in TEXT if name != "lumina2"]


def images_for(call: dict[str, Any], batch_size: int) -> torch.Tensor:
    frames = (call["num_frames"],) if "num_frames" in call else ()
    shape = (batch_size, 3, *frames, call["height"], call["width"])
    return torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_is_given_what_the_encoder_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field, _, own = make(name)
    pipeline, one = field.pipeline, sample(own, 0)
    decode_map = DecodeMap(field, **one)
    images = images_for(field.call, 2)
    data = decode_map.encode(images)
    assert data.shape[1:] == field.state_shape(**one)[1:]

    vae = pipeline.vae
    encoded = vae.encode(images.unsqueeze(2) if images.ndim == 4 and "Qwen" in type(vae).__name__ else images)
    expected = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
    # At time 0 the stock step of length 0 leaves the state as it is.
    given = stop_at_decoder(monkeypatch, vae)
    for i in range(2):
        with pytest.raises(Decoded):
            stock_step(pipeline, data[i : i + 1], 0.0, **{**field.call, **one, "output_type": "pt"})
        torch.testing.assert_close(given[i], expected[i : i + 1], atol=1e-5, rtol=0)
    monkeypatch.undo()
    torch.testing.assert_close(decode_map.decode(data)[:1], decode_map.decode(data[:1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_encoded_data_is_that_of_image_to_image(name: str) -> None:
    field, _, own = make(f"{name}-text")
    one = sample(own, 0)
    images = images_for(field.call, 1)
    case = flow_cases()[f"{name}-image"]
    case.pipeline.scheduler = case.scheduler
    call = {**field.call, **one, "image": (images + 1) / 2, "strength": 1.0}
    _, state, _ = stock_step(case.pipeline, None, 0.5, **call)
    encoded = DecodeMap(field, **one).encode(images, sample=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoded, state, atol=1e-5, rtol=0)


def test_other_sizes_and_pipelines_that_do_more_are_refused() -> None:
    field, _, own = make("flux-text")
    decode_map = DecodeMap(field, **sample(own, 0))
    with pytest.raises(ValueError, match=r"latents of shape \(2, 8, 8\) for each sample, got \(2, 8, 16\)"):
        decode_map.encode(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match="must be those of one sample, got those of 2"):
        DecodeMap(field, **own)
    case = flow_cases()["sd3-inpaint"]
    field, _, own = make("sd3-inpaint")
    with pytest.raises(ValueError, match="between its loop and its decoder, does more than move, scale and offset"):
        DecodeMap(field, **sample(own, 0))
    assert case.pipeline.vae is field.pipeline.vae


def test_rearrangement_of_more_numbers_than_float32_has_places() -> None:
    # 4096^2 numbers are told apart by two digits; a permutation of 2^16 shows that the second one counts.
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(2**16, generator=torch.Generator().manual_seed(1)) + 0.5

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1)[:, order] * scale - 3).reshape(1, 256, 256)

    found = Rearrangement.ask(function, (4, 128, 128), "The function")
    x = torch.randn(3, 4, 128, 128, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found(x), torch.cat([function(each[None]) for each in x]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.inverse(found(x)), x, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="The function makes 32768 numbers of 65536"):
        Rearrangement.ask(lambda x: function(x)[:, ::2], (4, 128, 128), "The function")
    with pytest.raises(ValueError, match="does more than move, scale and offset"):
        Rearrangement.ask(torch.sin, (4, 4), "The function")
