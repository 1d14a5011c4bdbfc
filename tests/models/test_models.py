# SPDX-License-Identifier: Apache-2.0
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin, VQModel
from tiny_pipelines import generators, tiny_sd3, tiny_vae

from diffusers_fm import ClassEmbedder, decode_latents, encode_latents
from diffusers_fm.models import spatial_scale_factor


# ClassEmbedder


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_class_embedder_gives_what_the_transformer_takes(num_tokens: int) -> None:
    embedder = ClassEmbedder(num_classes=5, joint_attention_dim=12, pooled_projection_dim=20, num_tokens=num_tokens)
    tokens, pooled = embedder(torch.tensor([0, 5]))
    assert tokens.shape == (2, num_tokens, 12)
    assert pooled.shape == (2, 20)
    output = tiny_sd3()(
        hidden_states=torch.randn(2, 4, 8, 8),
        timestep=torch.tensor([0.0, 1000.0]),
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
    )
    assert output.sample.shape == (2, 4, 8, 8)


def test_class_embedder_tells_classes_and_the_null_class_apart() -> None:
    embedder = ClassEmbedder(num_classes=5, joint_attention_dim=12, pooled_projection_dim=20)
    tokens, pooled = embedder(torch.arange(6))
    assert torch.unique(tokens, dim=0).shape[0] == torch.unique(pooled, dim=0).shape[0] == 6


def test_class_embedder_starts_with_unit_variance() -> None:
    embedder = ClassEmbedder(num_classes=99, joint_attention_dim=100, pooled_projection_dim=100)
    for table in embedder.parameters():
        # The standard deviation of n normal values is known to 1 / sqrt(2 n); five of those.
        assert abs(table.std().item() - 1) < 5 / math.sqrt(2 * table.numel())


def test_class_embedder_without_classes_has_the_null_class() -> None:
    tokens, pooled = ClassEmbedder(num_classes=0, joint_attention_dim=12, pooled_projection_dim=20)(torch.tensor([0]))
    assert tokens.shape == (1, 1, 12)
    assert pooled.shape == (1, 20)


def test_class_embedder_is_saved_and_loaded(tmp_path: Path) -> None:
    embedder = ClassEmbedder(num_classes=5, joint_attention_dim=12, pooled_projection_dim=20, num_tokens=2)
    embedder.save_pretrained(tmp_path)
    loaded = ClassEmbedder.from_pretrained(tmp_path)
    assert {**loaded.config, "_name_or_path": None} == {**embedder.config, "_name_or_path": None}
    for got, expected in zip(loaded(torch.arange(6)), embedder(torch.arange(6))):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("name", "value"), [("num_classes", -1), ("num_tokens", 0)])
def test_class_embedder_refuses(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be .* or more, got {value}"):
        ClassEmbedder(**{name: value})


# Latents

FACTORS = [
    {},
    {"scaling_factor": 0.5},
    {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    {"scaling_factor": None, "shift_factor": None},
    {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 4.0]},
    {"scaling_factor": 1.0, "shift_factor": 9.0, "latents_mean": [0.1, -0.2, 0.3, 0.0]},
]


def stock_factors(vae: ModelMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and divisor of raw latents, written out from the config."""
    scale = torch.full((4, 1, 1), vae.config.scaling_factor or 1.0)
    shift = torch.full((4, 1, 1), vae.config.get("shift_factor") or 0.0)
    if vae.config.get("latents_mean"):
        shift = torch.tensor(vae.config.latents_mean)[:, None, None]
    if vae.config.get("latents_std"):
        scale = scale / torch.tensor(vae.config.latents_std)[:, None, None]
    return shift, scale


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_factors_of_the_latents(factors: dict) -> None:
    vae = tiny_vae("kl", **factors)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    shift, scale = stock_factors(vae)
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mode()
        latents = encode_latents(vae, images, sample=False)
        torch.testing.assert_close(latents, (raw - shift) * scale)
        torch.testing.assert_close(decode_latents(vae, latents), vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tiny", "dc"])
@pytest.mark.parametrize("factor", [1.0, 0.41407])
def test_deterministic_autoencoders(kind: str, factor: float) -> None:
    vae = tiny_vae(kind, scaling_factor=factor)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        encoded = vae.encode(images, return_dict=False)[0]
        latents = encode_latents(vae, images)
        torch.testing.assert_close(latents, encoded * factor)
        torch.testing.assert_close(decode_latents(vae, latents), vae.decode(encoded).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
def test_scale_factor_is_that_of_the_shapes(kind: str) -> None:
    vae = tiny_vae(kind)
    with torch.no_grad():
        latents = encode_latents(vae, torch.zeros(1, 3, 16, 32))
    factor = spatial_scale_factor(vae)
    assert latents.shape == (1, 4, 16 // factor, 32 // factor)


def test_posterior_is_sampled_by_the_generators_given() -> None:
    vae = tiny_vae("kl")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        together = encode_latents(vae, images, generator=generators(3, 4))
        alone = encode_latents(vae, images[1:], generator=generators(4))
        mode = encode_latents(vae, images, sample=False)
        # Convolutions over other batch sizes may sum in another order, hence not equal to the bit.
        torch.testing.assert_close(together[1:], alone)
    assert not torch.allclose(together, mode)


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
def test_latents_and_images_are_float32_whatever_the_autoencoder_runs_in(kind: str) -> None:
    vae = tiny_vae(kind).to(torch.bfloat16)
    with torch.no_grad():
        latents = encode_latents(vae, torch.zeros(1, 3, 16, 16))
        images = decode_latents(vae, latents)
    assert latents.dtype == images.dtype == torch.float32


def test_unknown_kind_of_autoencoder_is_refused() -> None:
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ValueError, match="VQModel.encode returned VQEncoderOutput; the autoencoders that can be used"):
        encode_latents(vae, torch.zeros(1, 3, 8, 8))


# Autoencoders that overflow in float16


def overflowing_vae(**config: object) -> ModelMixin:
    """An autoencoder whose first activations, in either half, are beyond 65504, before a norm brings them back."""
    vae = tiny_vae("kl", **config)
    with torch.no_grad():
        for layer in (vae.encoder.conv_in, vae.decoder.conv_in):
            for parameter in layer.parameters():
                parameter.mul_(3e4)
    return vae


def test_float16_is_upcast_where_the_config_says_so_in_both_directions() -> None:
    vae = overflowing_vae()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    half = overflowing_vae().to(torch.float16)
    weights = {name: weight.clone() for name, weight in half.named_parameters()}
    vae.to(torch.float16).to(torch.float32)  # weights as float16 has them
    with torch.no_grad():
        latents = encode_latents(vae, images, sample=False)
        torch.testing.assert_close(encode_latents(half, images, sample=False), latents)
        torch.testing.assert_close(decode_latents(half, latents), decode_latents(vae, latents))
    # The autoencoder itself stays as it is.
    assert half.dtype == torch.float16
    for name, weight in half.named_parameters():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, weights[name])


def test_gradients_pass_an_upcast_decoder_after_its_call() -> None:
    half = overflowing_vae().to(torch.float16)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = decode_latents(half, latents)
    decode_latents(half, latents.detach())
    (slope,) = torch.autograd.grad(images.square().sum(), latents)
    reference = overflowing_vae().to(torch.float16).to(torch.float32)
    (expected,) = torch.autograd.grad(decode_latents(reference, latents).square().sum(), latents)
    torch.testing.assert_close(slope, expected)


def test_threads_share_an_upcast_autoencoder() -> None:
    half = overflowing_vae().to(torch.float16)
    batches = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.no_grad():
        alone = [decode_latents(half, batch) for batch in batches]

    def decode(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return [decode_latents(half, batch) for _ in range(5)][-1]

    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(decode, batches)), alone)


@pytest.mark.parametrize(("dtype", "force"), [(torch.bfloat16, True), (torch.float16, False)])
def test_nothing_is_upcast_without_need(dtype: torch.dtype, force: bool) -> None:
    vae = tiny_vae("kl", force_upcast=force).to(dtype)
    seen = []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad():
        decode_latents(vae, torch.zeros(1, 4, 8, 8))
    assert seen == [dtype]


def test_images_of_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="`images` must be floating-point with values in .-1, 1., got torch.uint8"):
        encode_latents(tiny_vae("kl"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
