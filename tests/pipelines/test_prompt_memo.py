# SPDX-License-Identifier: Apache-2.0
"""Captions encoded once, against the text encoders."""

import pytest
import torch
from tiny_text_to_image import tiny_stable_diffusion_3

from diffusers_fm.pipelines import VelocityField


CAPTIONS = ["red", "a longer caption of a blue circle"]


def test_kept_text_is_the_encoders() -> None:
    pipeline = tiny_stable_diffusion_3()
    field = VelocityField(pipeline, height=16, width=16, max_sequence_length=16)
    x_t = torch.randn(field.state_shape(prompt=CAPTIONS), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.7])
    expected = field(x_t, t, prompt=CAPTIONS)
    memo = field.keep_text()
    calls: list[int] = []
    pipeline.text_encoder_3.register_forward_hook(lambda *args: calls.append(1))
    for _ in range(3):
        torch.testing.assert_close(field(x_t, t, prompt=CAPTIONS), expected, atol=1e-6, rtol=0)
    # Each caption once, and one of them twice, to see how answers grow with the batch.
    assert len(calls) == 3
    assert len(memo.kept) == 2
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"):
        setattr(pipeline, name, None)
    torch.testing.assert_close(field(x_t, t, prompt=CAPTIONS), expected, atol=1e-6, rtol=0)
    turned = field(x_t.flip(0), t.flip(0), prompt=CAPTIONS[::-1]).flip(0)
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="'green' was not kept before StableDiffusion3Pipeline lost its encoders"):
        field(x_t, t, prompt=["red", "green"])
