# SPDX-License-Identifier: Apache-2.0
"""The network alone on captured arguments, against calls through the pipeline."""

import pytest
import torch
from stock_fields import TEXT, make, sample

from diffusers_fm.pipelines import CapturedCall, VelocityField, capture


@pytest.mark.parametrize("name", TEXT)
def test_replay_is_the_call_through_the_pipeline(name: str) -> None:
    field, x_t, own = make(name)
    singles = [capture(field, x_t[i : i + 1], **sample(own, i)) for i in range(2)]
    for t in (torch.tensor([0.2, 0.7]), torch.tensor([1.0, 0.0])):
        expected = field(x_t, t, **own)
        for call in (CapturedCall.join(singles), capture(field, x_t, **own)):
            torch.testing.assert_close(call(x_t, t), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert call(x_t, t).requires_grad


def test_what_cannot_be_replayed_is_refused() -> None:
    field, x_t, own = make("sd3-text")
    single = capture(field, x_t[:1], **sample(own, 0))
    longer = {key: torch.cat([value, value], 1) if value.ndim == 3 else value for key, value in sample(own, 1).items()}
    with pytest.raises(ValueError, match="differ in the shapes of their arguments"):
        CapturedCall.join([single, capture(field, x_t[1:], **longer)])
    guided = VelocityField(field.pipeline, guidance=True, **{**field.call, "guidance_scale": 3.0})
    negative = {f"negative_{key}": value for key, value in own.items()}
    with pytest.raises(ValueError, match="calls its network for guidance"):
        capture(guided, x_t, **own, **negative)


def test_more_than_the_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pipeline that squares its network's output has a velocity, but not by a map that a replay knows.
    field, x_t, own = make("sd3-text")
    step = type(field._scheduler).step
    monkeypatch.setattr(
        type(field._scheduler), "step", lambda self, output, *a, **k: step(self, output * output.abs(), *a, **k)
    )
    with pytest.raises(ValueError, match="after its network, does more than move, scale and offset numbers"):
        capture(field, x_t, **own)
