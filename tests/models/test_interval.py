# SPDX-License-Identifier: Apache-2.0
"""Conditioning of diffusers' networks on the end of an interval: the flow at r = t, another network elsewhere."""

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    BriaTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LongCatImageTransformer2DModel,
    ModelMixin,
)
from stock_pipelines import (
    StockCase,
    aura_flow,
    cogview4,
    flux,
    ltx,
    lumina2,
    pixart,
    qwen_image,
    record,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    wan,
)
from tiny_pipelines import tiny_dit, tiny_sd3, tiny_unet

from diffusers_fm.flow_maps import OBJECTIVES, flow_map_loss
from diffusers_fm.models.interval import TRANSFORMERS, UNETS, IntervalConditioning, IntervalEmbedding


Call = tuple[ModelMixin, dict[str, Any]]


def of_pipeline(case: StockCase, **config: int) -> Call:
    """A deeper network of the case's class, and a call of it, as the stock pipeline makes it."""
    calls: list[dict[str, Any]] = []

    def remember(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = ["hidden_states" if case.denoiser.__class__.__name__ not in UNETS else "sample", "timestep"]
        calls.append({**dict(zip(names, args)), **kwargs, "return_dict": False})

    hook = case.denoiser.register_forward_pre_hook(remember, with_kwargs=True)
    record(case, case.scheduler, num_inference_steps=4)
    hook.remove()
    torch.manual_seed(0)
    call = {**calls[1], "timestep": calls[1]["timestep"].float()}
    return case.denoiser.from_config({**case.denoiser.config, **config}).eval(), call


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def dit() -> Call:
    inputs = {"hidden_states": random(3, 4, 8, 8), "class_labels": torch.tensor([0, 1, 2])}
    return tiny_dit(num_layers=4), {**inputs, "timestep": torch.tensor([900.0, 500.0, 250.5]), "return_dict": False}


def like_flux(model: ModelMixin, **inputs: Any) -> Call:
    tokens = {"hidden_states": random(2, 4, 4), "encoder_hidden_states": random(2, 3, 16)}
    positions = {"img_ids": random(4, 3).abs(), "txt_ids": torch.zeros(3, 3)}
    return model.eval(), {**tokens, **positions, **inputs, "return_dict": False}


def bria() -> Call:
    torch.manual_seed(0)
    model = BriaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    return like_flux(model, timestep=torch.tensor([900.0, 400.0]))


def longcat() -> Call:
    torch.manual_seed(0)
    model = LongCatImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    return like_flux(model, timestep=torch.tensor([0.9, 0.4]))


def guided_flux() -> Call:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    extra = {"pooled_projections": random(2, 8), "guidance": torch.tensor([3.5, 3.5])}
    return like_flux(model, timestep=torch.tensor([0.9, 0.4]), **extra)


def hunyuan_video() -> Call:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 8),
    ).eval()
    inputs = {"hidden_states": random(2, 4, 1, 4, 4), "encoder_hidden_states": random(2, 3, 16)}
    inputs |= {"encoder_attention_mask": torch.ones(2, 3), "pooled_projections": random(2, 8)}
    inputs |= {"timestep": torch.tensor([900.0, 400.0]), "guidance": torch.tensor([6000.0, 6000.0])}
    return model, {**inputs, "return_dict": False}


CALLS: dict[str, Callable[[], Call]] = {
    "AuraFlowTransformer2DModel": lambda: of_pipeline(aura_flow(), num_mmdit_layers=2),
    "BriaTransformer2DModel": bria,
    "CogView4Transformer2DModel": lambda: of_pipeline(cogview4(), num_layers=2),
    "DiTTransformer2DModel": dit,
    "FluxTransformer2DModel": lambda: of_pipeline(flux()[0], num_single_layers=2),
    "FluxTransformer2DModel, guidance": guided_flux,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "LTXVideoTransformer3DModel": lambda: of_pipeline(ltx(), num_layers=2),
    "LongCatImageTransformer2DModel": longcat,
    "PixArtTransformer2DModel": lambda: of_pipeline(pixart()[0], num_layers=2),
    "QwenImageTransformer2DModel": lambda: of_pipeline(qwen_image()[0], num_layers=2),
    "SD3Transformer2DModel": lambda: of_pipeline(stable_diffusion_3()[0], num_layers=3),
    "SanaTransformer2DModel": lambda: of_pipeline(sana(), num_layers=2),
    "WanTransformer3DModel": lambda: of_pipeline(wan(), num_layers=2),
}


def awaken(model: ModelMixin) -> None:
    """Random weights where a new network has zeros: its gates and its last layer."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@cache
def call_of(name: str) -> Call:
    model, inputs = CALLS[name]()
    awaken(model)
    return model, inputs


@torch.no_grad()
def answer(model: ModelMixin, inputs: dict[str, Any], **changed: Any) -> torch.Tensor:
    return model(**{**inputs, **changed})[0]


def test_every_transformer_of_the_table_is_tested() -> None:
    assert {name.split(",")[0] for name in CALLS} == set(TRANSFORMERS)


@pytest.mark.parametrize("name", CALLS)
def test_last_blocks_get_the_end(name: str) -> None:
    model, inputs = call_of(name)
    assert model.__class__.__name__ == name.split(",")[0]
    start = inputs["timestep"]
    flow, earlier = answer(model, inputs), answer(model, inputs, timestep=start / 2)
    conditioning = IntervalConditioning(model, first_block=1)
    assert torch.equal(answer(model, inputs), flow)
    conditioning.end = start.clone()
    assert torch.equal(answer(model, inputs), flow)
    conditioning.end = start / 2
    moved = answer(model, inputs)
    assert (moved - flow).abs().max() > 1e-5 and (moved - earlier).abs().max() > 1e-5
    # What the blocks get is exactly what they would get at that time.
    seen: list[torch.Tensor] = []
    family = TRANSFORMERS[model.__class__.__name__]
    last = list(model.get_submodule(family.lists[-1]).children())[-1]
    position = list(last.forward.__code__.co_varnames).index(family.argument) - 1

    def remember(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs[family.argument] if family.argument in kwargs else args[position])

    hook = last.register_forward_pre_hook(remember, with_kwargs=True)
    answer(model, inputs)
    conditioning.end = None
    answer(model, inputs, timestep=start / 2)
    hook.remove()
    assert torch.equal(*seen)
    # A function of the timestep does the same as its values, and one value serves all rows.
    conditioning.end = lambda timestep: timestep / 2
    assert torch.equal(answer(model, inputs), moved)
    conditioning.end = torch.tensor(0.25)
    one = answer(model, inputs)
    conditioning.end = torch.full_like(start, 0.25)
    assert torch.equal(answer(model, inputs), one)
    conditioning.remove()
    assert torch.equal(answer(model, inputs), flow)


def test_first_block_is_a_number_of_the_configuration() -> None:
    model, inputs = call_of("DiTTransformer2DModel")
    answers = []
    for first_block in (1, 2, 3, None):
        conditioning = IntervalConditioning(model, first_block)
        conditioning.end = torch.zeros(3)
        answers.append(answer(model, inputs))
        conditioning.remove()
        assert json.loads(json.dumps(conditioning.first_block)) == (first_block or 2)
    assert torch.equal(answers[3], answers[1])
    assert all((answers[i] - answers[i + 1]).abs().max() > 1e-5 for i in range(2))


def test_saved_network_is_the_stock_one(tmp_path: Any) -> None:
    model, inputs = call_of("SD3Transformer2DModel")
    conditioning = IntervalConditioning(model, first_block=1)
    names = set(model.state_dict())
    model.save_pretrained(tmp_path)
    conditioning.remove()
    again = type(model).from_pretrained(tmp_path)
    assert set(again.state_dict()) == names
    assert torch.equal(answer(again, inputs), answer(model, inputs))


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "SD3Transformer2DModel"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, objective: str) -> None:
    """The blocks run again in the backward pass, with the end of the last call."""
    model = copy.deepcopy(call_of(name)[0]).train()
    inputs = {"class_labels": torch.arange(4)}
    if name == "SD3Transformer2DModel":
        inputs = {"encoder_hidden_states": random(4, 3, model.config.joint_attention_dim)}
        inputs |= {"pooled_projections": random(4, model.config.pooled_projection_dim)}
    conditioning = IntervalConditioning(model, first_block=1)

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        conditioning.end = 1000 * r.float()
        given = {key: value[rows] for key, value in inputs.items()}
        return model(x, timestep=1000 * t.float(), return_dict=False, **given)[0][:, : x.shape[1]]

    size, channels = model.config.sample_size, model.config.in_channels
    x, velocity = random(2, 4, channels, size, size)
    r, t = torch.tensor([0.2, 0.7, 0.0, 0.1]).double(), torch.tensor([0.9, 0.7, 1.0, 0.3]).double()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)  # the dropout of labels
        model.zero_grad()
        flow_map_loss(u, x, r, t, velocity, objective, args=(torch.arange(4),)).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    model.disable_gradient_checkpointing()
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_derivative_in_the_end_passes_through_the_hooks(name: str) -> None:
    model, inputs = call_of(name)
    conditioning = IntervalConditioning(model, first_block=1)
    scale = 1.0 if name == "FluxTransformer2DModel" else 1000.0

    def u(r: torch.Tensor) -> torch.Tensor:
        conditioning.end = scale * r
        return model(**inputs)[0]

    r = torch.full(inputs["timestep"].shape, 0.3)
    step = 1e-4
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = torch.func.jvp(u, (r,), (torch.ones_like(r),))[1]
        difference = (u(r + step) - u(r - step)) / (2 * step)
    conditioning.remove()
    # float32: rounding of 1e-6 over the step, and its second order.
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(difference, exact, rtol=0.05, atol=0.02)


def test_copy_of_a_network_has_its_own_conditioning() -> None:
    model, inputs = call_of("SD3Transformer2DModel")
    conditioning = IntervalConditioning(model, first_block=1)
    conditioning.end = inputs["timestep"] / 2
    moved = answer(model, inputs)
    again = copy.deepcopy(model)
    conditioning.end = None
    assert torch.equal(answer(again, inputs), moved)
    assert not torch.equal(answer(model, inputs), moved)
    conditioning.remove()


@pytest.mark.parametrize("kind", UNETS)
def test_unet_starts_as_the_flow(kind: str) -> None:
    if kind == "UNet2DModel":
        model, inputs = tiny_unet(), {"sample": random(2, 1, 8, 8), "timestep": torch.tensor([900.0, 500.0])}
    else:
        model, inputs = of_pipeline(stable_diffusion()[0])
    inputs = {**inputs, "return_dict": False}
    width = model.time_embedding.linear_2.out_features
    embedding = IntervalEmbedding(time_embed_dim=width, num_channels=32)
    flow = answer(model, inputs)
    conditioning = IntervalConditioning(model, embedding=embedding)
    for end in (None, torch.tensor(100.0), inputs["timestep"]):
        conditioning.end = end
        assert torch.equal(answer(model, inputs), flow)
    conditioning.end = inputs["timestep"] / 2
    model(**inputs)[0].square().mean().backward()
    assert embedding.time_embedding.linear_2.weight.grad.abs().max() > 0
    awaken(embedding)
    assert (answer(model, inputs) - flow).abs().max() > 1e-5
    conditioning.end = inputs["timestep"].clone()
    assert torch.equal(answer(model, inputs), flow)
    conditioning.remove()


def test_unets_embedding_is_saved_as_a_model(tmp_path: Any) -> None:
    embedding = IntervalEmbedding(time_embed_dim=16, num_channels=8)
    awaken(embedding)
    embedding.save_pretrained(tmp_path)
    again = IntervalEmbedding.from_pretrained(tmp_path)
    times = torch.tensor([3.0, 500.0]), torch.tensor([0.0, 500.0])
    assert torch.equal(again(*times), embedding(*times))
    assert embedding(*times)[0].abs().max() > 0 and not embedding(*times)[1].any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Lumina2Transformer2DModel cannot be conditioned.*SD3Transformer2DModel"):
        IntervalConditioning(lumina2().denoiser)
    with pytest.raises(ValueError, match="UNet2DModel needs an `embedding`"):
        IntervalConditioning(tiny_unet())
    with pytest.raises(ValueError, match="DiTTransformer2DModel needs no `embedding`"):
        IntervalConditioning(tiny_dit(), embedding=IntervalEmbedding())
    for first_block in (0, 2, -1, True, 1.5):
        with pytest.raises(ValueError, match="`first_block` must be an integer from 1 to 1 for this SD3"):
            IntervalConditioning(tiny_sd3(), first_block)
    conditioning = IntervalConditioning(tiny_dit())
    model, inputs = dit()
    conditioning = IntervalConditioning(model)
    conditioning.end = torch.zeros(2)
    with pytest.raises(ValueError, match=r"`end` must have one value or the shape \(3,\) of `timestep`"):
        answer(model, inputs)
