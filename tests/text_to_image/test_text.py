# SPDX-License-Identifier: Apache-2.0
"""Text encoders in training: captions become what the pipeline gives, and encoders are dropped, kept or counted."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_families import flux_text
from tiny_text_to_image import colours, tiny_stable_diffusion_3

from diffusers_fm.data.cache import TensorCache
from diffusers_fm.data.images import CaptionColumn
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.text_to_image.text import TextEncoders, cache_captions, choose_encoder_dropout, warn_of_long_captions


CAPTIONS = ["a red square", "", "blue", "", "a very long caption with more letters than fit"]


def encode(text: TextEncoders, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and pooled embeddings, asked for as the pipeline asks."""
    tokens, _, pooled, _ = text(
        prompt=captions,
        prompt_2=None,
        prompt_3=None,
        device=torch.device("cpu"),
        do_classifier_free_guidance=False,
        max_sequence_length=length,
    )
    return tokens, pooled


@pytest.mark.parametrize(("t5", "length"), [(True, 12), (False, 5), (False, 0)])
def test_embeddings_are_those_of_the_pipeline(t5: bool, length: int, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_stable_diffusion_3(t5)
    text = TextEncoders(pipeline)
    with caplog.at_level(logging.WARNING):
        encode(text, CAPTIONS, length)  # transformers warns once of each tokenizer
        caplog.clear()
        tokens, pooled = encode(text, CAPTIONS, length)
    # One warning, elsewhere, counts all captions that are cut.
    assert caplog.text == ""
    assert tokens.shape == (5, 16 + length, 24)
    for row, caption in enumerate(CAPTIONS):
        one = pipeline.encode_prompt(
            caption, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
        )
        # Batched matrix products round otherwise than single ones.
        torch.testing.assert_close(tokens[row : row + 1], one[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(pooled[row : row + 1], one[2], rtol=0, atol=2e-6)


def test_a_dropped_encoder_gives_zeros_as_a_pipeline_without_it() -> None:
    text = TextEncoders(tiny_stable_diffusion_3())
    text.separable = True
    captions = ["red", "green", "blue"]
    embeds = encode(text, captions, 6)
    with text.dropping(torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)):
        tokens, pooled = encode(text, captions, 6)
    without = encode(TextEncoders(tiny_stable_diffusion_3(t5=False)), ["red"], 6)
    torch.testing.assert_close(tokens[:1], without[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(pooled[:1], without[1], rtol=0, atol=2e-6)
    # CLIP-L: the first 8 of each CLIP token and of the pooled vector; CLIP-G: the next 12.
    for row, (start, end) in enumerate([(0, 8), (8, 20)], 1):
        kept_tokens, kept_pooled = embeds[0][row].clone(), embeds[1][row].clone()
        kept_tokens[:16, start:end] = 0
        kept_pooled[start:end] = 0
        assert torch.equal(tokens[row], kept_tokens)
        assert torch.equal(pooled[row], kept_pooled)
    assert (embeds[0][0, 16:] != 0).any()
    # Outside of the context nothing is dropped.
    assert torch.equal(encode(text, captions, 6)[0], embeds[0])


def test_kept_captions_are_those_of_the_encoders_and_are_found_again(accelerator: Accelerator, tmp_path: Path) -> None:
    x_t = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = (x_t, torch.full((5,), 300.0), CAPTIONS, (16, 16))
    expected = TrainedField(tiny_stable_diffusion_3(), "transformer", {"max_sequence_length": 6})(*arguments)
    answers = []
    for _ in range(2):
        field = TrainedField(tiny_stable_diffusion_3(), "transformer", {"max_sequence_length": 6})
        cache_captions(
            accelerator, CAPTIONS, field.text, field.encode_captions, field.compare_captions, tmp_path / "cache"
        )
        # Nothing is encoded any more.
        for name in field.text.names:
            setattr(field.pipeline, name, None)
        answers.append(field(*arguments))
        torch.testing.assert_close(answers[-1], expected, rtol=0, atol=1e-5)
    assert torch.equal(*answers)
    description = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert len(TensorCache(tmp_path / "cache", description)) == len(set(CAPTIONS))
    other = tiny_stable_diffusion_3()
    torch.nn.init.zeros_(other.text_encoder_2.text_projection.weight)
    field = TrainedField(other, "transformer", {"max_sequence_length": 6})
    with pytest.raises(ValueError, match="does not match this run: it was made with text encoders"):
        cache_captions(
            accelerator, CAPTIONS, field.text, field.encode_captions, field.compare_captions, tmp_path / "cache"
        )


def test_captions_that_are_too_long_are_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_stable_diffusion_3()
    column = CaptionColumn(colours(6), "text", np.arange(6))
    with caplog.at_level(logging.WARNING):
        warn_of_long_captions(pipeline, column, 10)
    assert [record.getMessage() for record in caplog.records] == [
        "Of 6 different captions, 3 are longer than the 10 tokens of tokenizer_3; what is beyond is not read."
    ]
    caplog.clear()
    long = colours(2).remove_columns("text").add_column("text", ["abcdefghijklmno", "ab"])
    warn_of_long_captions(pipeline, CaptionColumn(long, "text", np.arange(2)), 30)
    # CLIP: 14 letters and two ends fit 16 tokens.
    (record,) = caplog.records
    assert "1 are longer than the 16 tokens of tokenizer, 1 are longer than the 16 tokens of tokenizer_2" in (
        record.getMessage()
    )


def test_encoders_that_are_not_there_are_refused() -> None:
    with_t5, without = (TextEncoders(tiny_stable_diffusion_3(t5)) for t5 in (True, False))
    assert choose_encoder_dropout(with_t5, [0.4]) == [0.4, 0.4, 0.4]
    assert choose_encoder_dropout(without, [0.4]) == [0.4, 0.4]
    assert choose_encoder_dropout(with_t5, [0.1, 0.2, 0.3]) == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"one for each of the 2 text encoders, got \[0.1, 0.2, 0.3\]"):
        choose_encoder_dropout(without, [0.1, 0.2, 0.3])
    pipeline = tiny_stable_diffusion_3()
    pipeline.text_encoder = pipeline.text_encoder_2 = pipeline.text_encoder_3 = None
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline has no text encoder"):
        TextEncoders(pipeline)


def test_encoders_of_another_family_are_dropped_alike() -> None:
    """FLUX reads a CLIP's pooled vector and a T5's tokens: one is zero without the other."""
    pipeline = flux_text().pipeline
    field = TrainedField(pipeline, "transformer", {"max_sequence_length": 8})
    field.text.separable = True
    options = {"prompt": ["a", "b"], "prompt_2": None, "device": "cpu", "max_sequence_length": 8}
    plain = field.text(**options)
    with field.text.dropping(torch.tensor([[1, 0], [0, 1]], dtype=torch.bool)):
        tokens, pooled, _ = field.text(**options)
    assert not pooled[0].any() and torch.equal(tokens[0], plain[0][0])
    assert torch.equal(pooled[1], plain[1][1]) and not tokens[1].any()
