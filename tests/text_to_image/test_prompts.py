# SPDX-License-Identifier: Apache-2.0
"""Captions become what `StableDiffusion3Pipeline.encode_prompt` gives, and encoders can be left out."""

import logging

import numpy as np
import pytest
import torch
from tiny_text_to_image import colours, tiny_stable_diffusion_3

from diffusers_fm.data.captions import CaptionColumn
from diffusers_fm.text_to_image.prompts import PromptEncoder
from diffusers_fm.text_to_image.setup import choose_encoder_dropout, warn_of_long_captions


CAPTIONS = ["a red square", "", "blue", "", "a very long caption with more letters than fit"]


def reference(pipeline, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each caption alone, as a user of the pipeline would encode it."""
    with torch.no_grad():
        encoded = [
            pipeline.encode_prompt(
                caption, None, None, device=torch.device("cpu"), do_classifier_free_guidance=False,
                max_sequence_length=length,
            )
            for caption in captions
        ]  # fmt: skip
    return torch.cat([tokens for tokens, *_ in encoded]), torch.cat([pooled for *_, pooled, _ in encoded])


@pytest.mark.parametrize(("t5", "length"), [(True, 12), (False, 5), (False, 0)])
def test_embeddings_are_those_of_the_pipeline(t5: bool, length: int, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_stable_diffusion_3(t5)
    encoder = PromptEncoder(pipeline, length)
    expected = reference(pipeline, CAPTIONS, length)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        tokens, pooled = encoder(CAPTIONS)
    # One warning, elsewhere, counts all captions that are cut.
    assert caplog.text == ""
    assert tokens.shape == (5, 16 + length, 24)
    # Batched matrix products round otherwise than single ones.
    torch.testing.assert_close(tokens, expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(pooled, expected[1], rtol=0, atol=2e-6)
    assert torch.equal(tokens[1], tokens[3])
    again = encoder.unpack(encoder.pack((tokens, pooled)))
    assert torch.equal(again[0], tokens)
    assert torch.equal(again[1], pooled)


def test_a_dropped_encoder_gives_zeros_as_a_pipeline_without_it() -> None:
    with_t5, without = tiny_stable_diffusion_3(), tiny_stable_diffusion_3(t5=False)
    encoder = PromptEncoder(with_t5, 6)
    embeds = encoder(["red", "green", "blue"])
    dropped = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    tokens, pooled = encoder.drop(embeds, dropped)
    expected = PromptEncoder(without, 6)(["red"])
    torch.testing.assert_close(tokens[:1], expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(pooled[:1], expected[1], rtol=0, atol=2e-6)
    # CLIP-L: the first 8 of each CLIP token and of the pooled vector; CLIP-G: the next 12.
    for row, (start, end) in enumerate([(0, 8), (8, 20)], 1):
        kept_tokens, kept_pooled = embeds[0][row].clone(), embeds[1][row].clone()
        kept_tokens[:16, start:end] = 0
        kept_pooled[start:end] = 0
        assert torch.equal(tokens[row], kept_tokens)
        assert torch.equal(pooled[row], kept_pooled)
    assert (embeds[0][0, 16:] != 0).any()


def test_captions_that_are_too_long_are_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_stable_diffusion_3()
    captions = ["abcdefghijklmn", "abcdefghijklmno", "ab", "abcdefghijklmnopqrstuvw"]
    # CLIP: 14 letters and two ends fit 16 tokens; T5: a leading blank and an end.
    assert PromptEncoder(pipeline, 10).count_too_long(captions) == (2, 3)
    assert PromptEncoder(pipeline, 25).count_too_long(captions) == (2, 0)
    assert PromptEncoder(tiny_stable_diffusion_3(t5=False), 1).count_too_long(captions) == (2, 0)
    column = CaptionColumn(colours(6), "text", np.arange(6))
    with caplog.at_level(logging.WARNING):
        warn_of_long_captions(PromptEncoder(pipeline, 10), column)
    assert [record.getMessage() for record in caplog.records] == [
        "Of 6 different captions, 0 are longer than the 16 tokens of the CLIPs, and 3 than the 10 of the T5"
        " (--max_sequence_length); what is beyond is not read."
    ]


def test_captions_are_known_by_what_the_encoders_see_of_them() -> None:
    encoder = PromptEncoder(tiny_stable_diffusion_3(), 6)
    keys = encoder.keys(["Red", "red", "blue", "abcdefghijklmnopq", "abcdefghijklmnopqrs"])
    assert keys[0] != keys[2]
    # Beyond what is read, captions may differ.
    assert keys[3] == keys[4]
    assert PromptEncoder(tiny_stable_diffusion_3(), 7).keys(["blue"]) != keys[2:3]


def test_what_does_not_fit_is_refused() -> None:
    pipeline = tiny_stable_diffusion_3()
    pipeline.text_encoder_2 = None
    with pytest.raises(ValueError, match="two CLIPs, but the pipeline has no text_encoder_2"):
        PromptEncoder(pipeline, 6)
    with pytest.raises(ValueError, match=r"20 wide together, but the transformer takes 16 \(`joint_attention_dim`\)"):
        PromptEncoder(tiny_stable_diffusion_3(t5=False, joint_attention_dim=16), 6)
    with pytest.raises(ValueError, match=r"takes 24 \(`pooled_projection_dim`\)"):
        PromptEncoder(tiny_stable_diffusion_3(pooled_projection_dim=24), 6)
    with_t5 = PromptEncoder(tiny_stable_diffusion_3(), 6)
    without = PromptEncoder(tiny_stable_diffusion_3(t5=False), 6)
    assert choose_encoder_dropout(with_t5, [0.4]) == [0.4, 0.4, 0.4]
    assert choose_encoder_dropout(without, [0.4]) == [0.4, 0.4, 0.0]
    assert choose_encoder_dropout(with_t5, [0.1, 0.2, 0.3]) == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"one for each of the 2 text encoders, got \[0.1, 0.2, 0.3\]"):
        choose_encoder_dropout(without, [0.1, 0.2, 0.3])
