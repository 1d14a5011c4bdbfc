# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight diffusers pipelines, and a recorder of what their denoiser is asked.

Every builder returns one `StockCase` or several: a pipeline of real diffusers classes with a few thousand weights, the
scheduler that the published checkpoints of that family carry, and the inputs of one call. Text encoders and tokenizers
are left out: prompt embeddings are handed over instead. Builders are cached, so the cases of one test session share
their weights; `record` sets the scheduler of the pipeline that it runs, so no case depends on the one before.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils import BaseOutput
from packaging.version import Version


# `FlowMatchScheduler` keeps the timesteps that it is given, as stock does since 0.42.
stock_keeps_timesteps = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"), reason="before 0.42 stock overwrites the timesteps it is given"
)

# The noise schedule that Stable Diffusion 1.x, 2.x and XL were trained with.
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class StockCase:
    """One call of one stock pipeline.

    Args:
        name (`str`):
            Name of the case in the tests' ids.
        pipeline (`DiffusionPipeline`):
            The tiny pipeline; the cases of one family share its networks.
        scheduler (`SchedulerMixin`):
            The stock scheduler, with the family's published settings.
        inputs (`dict`):
            Keyword arguments of the call; the generator and `output_type` are added by `record`.
    """

    name: str
    pipeline: DiffusionPipeline
    scheduler: SchedulerMixin
    inputs: dict[str, Any]

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that the scheduler's timesteps are given to."""
        components = self.pipeline.components
        return components["transformer"] if "transformer" in components else components["unet"]


@dataclass(frozen=True)
class Recording:
    """What one pipeline call showed: its images, and for each denoiser call the timestep, the input and the output."""

    images: torch.Tensor
    timesteps: list[torch.Tensor]
    samples: list[torch.Tensor]
    outputs: list[torch.Tensor]

    @property
    def calls(self) -> int:
        """Number of denoiser calls."""
        return len(self.timesteps)


def assert_same(actual: Recording, expected: Recording, atol: float = 1e-4) -> None:
    assert expected.calls > 0
    assert actual.calls == expected.calls
    for ours, stock in zip(actual.timesteps, expected.timesteps, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=atol)
    for ours, stock in zip(actual.samples, expected.samples, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=atol)
    torch.testing.assert_close(actual.images, expected.images, rtol=0, atol=atol)
    assert expected.images.isfinite().all()


def record(
    case: StockCase,
    scheduler: SchedulerMixin,
    seed: int = 0,
    **overrides: Any,
) -> Recording:
    """Run `case` with `scheduler` in its pipeline and record every call of the denoiser.

    The generator handed to the pipeline and torch's global one both start from `seed`: stock pipelines do not pass the
    generator on to `step`. `overrides` replace or add inputs of the call.
    """
    case.pipeline.scheduler = scheduler
    case.pipeline.set_progress_bar_config(disable=True)
    signature = inspect.signature(case.denoiser.forward)
    timesteps: list[torch.Tensor] = []
    samples: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def remember_input(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given = signature.bind(*args, **kwargs).arguments
        timesteps.append(torch.as_tensor(given["timestep"]).clone())
        samples.append(next(iter(given.values())).clone())

    def remember_output(module: torch.nn.Module, args: tuple, output: tuple | BaseOutput) -> None:
        outputs.append(output[0].clone())

    torch.manual_seed(seed)
    inputs = {"output_type": "pt"} | case.inputs | {"generator": torch.Generator().manual_seed(seed)} | overrides
    if isinstance(case.pipeline, (DiTPipeline, DDPMPipeline, DDIMPipeline)):
        inputs["output_type"] = "np"
    handles = (
        case.denoiser.register_forward_pre_hook(remember_input, with_kwargs=True),
        case.denoiser.register_forward_hook(remember_output),
    )
    try:
        images = case.pipeline(**inputs, return_dict=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else torch.as_tensor(images)
    return Recording(images, timesteps, samples, outputs)


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _image(size: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(7))


def _mask(size: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1.0
    return mask


def _kl_autoencoder(**settings: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
    }
    return AutoencoderKL(**(defaults | settings)).eval()


def _three_tasks(
    name: str, classes: tuple[type, type, type], components: dict[str, Any], inputs: dict[str, Any], size: int
) -> tuple[StockCase, StockCase, StockCase]:
    text, image, inpaint = (cls(**components) for cls in classes)
    scheduler = components["scheduler"]
    return (
        StockCase(f"{name}-text", text, scheduler, inputs),
        StockCase(f"{name}-image", image, scheduler, inputs | {"image": _image(size), "strength": 0.6}),
        StockCase(
            f"{name}-inpaint",
            inpaint,
            scheduler,
            inputs | {"image": _image(size), "mask_image": _mask(size), "strength": 0.6},
        ),
    )


@cache
def stable_diffusion_3() -> tuple[StockCase, ...]:
    """Stable Diffusion 3: the scheduler's own grid, shift 3, classifier-free guidance in one batch."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,  # the inpainting pipeline accepts nothing else
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=24,
    ).eval()
    components = {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": _kl_autoencoder(latent_channels=16, shift_factor=0.0609, scaling_factor=1.5305),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "pooled_prompt_embeds": _noise(1, 16, seed=4),
        "negative_pooled_prompt_embeds": _noise(1, 16, seed=5),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_inference_steps": 5,
    }
    classes = (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline)
    return _three_tasks("sd3", classes, components, inputs, 16)


@cache
def flux() -> tuple[StockCase, ...]:
    """Flux: sigmas from the pipeline, dynamic shift from the number of tokens."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    components = {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": _kl_autoencoder(latent_channels=2, shift_factor=0.1159, scaling_factor=0.3611),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "pooled_prompt_embeds": _noise(1, 16, seed=4),
        "guidance_scale": 3.5,
        "height": 16,
        "width": 16,
        "num_inference_steps": 5,
    }
    return _three_tasks("flux", (FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline), components, inputs, 16)


@cache
def qwen_image() -> tuple[StockCase, ...]:
    """Qwen-Image: dynamic shift, stretched to a terminal sigma, two calls a step for guidance."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.76, -0.71, -0.91, 0.11],
        latents_std=[2.8, 1.5, 2.3, 2.7],
    ).eval()
    components = {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
    }
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long),
        "negative_prompt_embeds": _noise(1, 3, 16, seed=3),
        "negative_prompt_embeds_mask": torch.ones(1, 3, dtype=torch.long),
        "true_cfg_scale": 2.0,
        "height": 16,
        "width": 16,
        "num_inference_steps": 5,
    }
    classes = (QwenImagePipeline, QwenImageImg2ImgPipeline, QwenImageInpaintPipeline)
    return _three_tasks("qwen", classes, components, inputs, 16)


@cache
def lumina2() -> StockCase:
    """Lumina-Image 2.0: model time runs the other way (1 - t), shift 6, sigmas from the pipeline."""
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=_kl_autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=None,
        tokenizer=None,
    )
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "prompt_attention_mask": torch.ones(1, 4, dtype=torch.long),
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "negative_prompt_attention_mask": torch.ones(1, 4, dtype=torch.long),
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
    }
    return StockCase("lumina2", pipeline, scheduler, inputs)


@cache
def sana() -> StockCase:
    """Sana over its deep-compression autoencoder: the scheduler's own grid, `eta` and `generator` by signature."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    ).eval()
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = SanaPipeline(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None)
    inputs = {
        "prompt_embeds": _noise(1, 4, 8, seed=2),
        "prompt_attention_mask": torch.ones(1, 4, dtype=torch.long),
        "negative_prompt": None,
        "negative_prompt_embeds": _noise(1, 4, 8, seed=3),
        "negative_prompt_attention_mask": torch.ones(1, 4, dtype=torch.long),
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
    }
    return StockCase("sana", pipeline, scheduler, inputs)


@cache
def aura_flow() -> StockCase:
    """AuraFlow: model time in [0, 1], shift 1.73."""
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pos_embed_max_size=64,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipeline = AuraFlowPipeline(
        transformer=transformer, scheduler=scheduler, vae=_kl_autoencoder(), text_encoder=None, tokenizer=None
    )
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "prompt_attention_mask": torch.ones(1, 4),
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "negative_prompt_attention_mask": torch.ones(1, 4),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
    }
    return StockCase("aura-flow", pipeline, scheduler, inputs)


@cache
def cogview4() -> StockCase:
    """CogView4: timesteps and sigmas both handed over, linear dynamic shift; sigmas read by the loop's index."""
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    pipeline = CogView4Pipeline(
        tokenizer=None, text_encoder=None, vae=_kl_autoencoder(), transformer=transformer, scheduler=scheduler
    )
    inputs = {
        "prompt_embeds": _noise(1, 16, 16, seed=2),
        "negative_prompt_embeds": _noise(1, 16, 16, seed=3),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
    }
    return StockCase("cogview4", pipeline, scheduler, inputs)


@cache
def mochi() -> StockCase:
    """Mochi: inverted sigmas, which rise from 0 (noise) to 1 (data)."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=4,
    ).eval()
    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipeline = MochiPipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool),
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "negative_prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_frames": 7,
        "num_inference_steps": 4,
    }
    return StockCase("mochi", pipeline, scheduler, inputs)


@cache
def ltx() -> StockCase:
    """LTX-Video: dynamic shift, stretched to a terminal sigma of 0.1."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipeline = LTXPipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool),
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "negative_prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool),
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 4,
    }
    return StockCase("ltx", pipeline, scheduler, inputs)


@cache
def wan() -> StockCase:
    """Wan 2.1 text-to-video: the scheduler's own grid, shift 5, two calls a step for guidance."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.76, -0.71, -0.91, 0.11],
        latents_std=[2.8, 1.5, 2.3, 2.7],
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline = WanPipeline(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None)
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": 4,
    }
    return StockCase("wan", pipeline, scheduler, inputs)


@cache
def flow_cases() -> dict[str, StockCase]:
    """Every flow matching case, by name: three tasks of three image families, one of each other family."""
    families = (*stable_diffusion_3(), *flux(), *qwen_image())
    singles = (lumina2(), sana(), aura_flow(), cogview4(), mochi(), ltx(), wan())
    return {case.name: case for case in (*families, *singles)}


@cache
def stable_diffusion() -> tuple[StockCase, ...]:
    """Stable Diffusion 1.5 with the DDIM scheduler of its checkpoint: a UNet that predicts epsilon."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
    ).eval()
    components = {
        "vae": _kl_autoencoder(scaling_factor=0.18215),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "scheduler": DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "guidance_scale": 3.0,
        "num_inference_steps": 5,
    }
    text, image, inpaint = _three_tasks(
        "sd",
        (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline),
        components,
        inputs,
        16,
    )
    # The image-to-image pipeline takes its size from the image; the other two from arguments.
    size = {"height": 16, "width": 16}
    return (
        StockCase(text.name, text.pipeline, text.scheduler, text.inputs | size),
        image,
        StockCase(inpaint.name, inpaint.pipeline, inpaint.scheduler, inpaint.inputs | size),
    )


@cache
def stable_diffusion_xl() -> tuple[StockCase, ...]:
    """Stable Diffusion XL, text-to-image and image-to-image, with a DDIM scheduler of its betas."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    ).eval()
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    components = {
        "vae": _kl_autoencoder(scaling_factor=0.13025),
        "text_encoder": None,
        "text_encoder_2": None,
        "tokenizer": None,
        "tokenizer_2": None,
        "unet": unet,
        "scheduler": scheduler,
        "add_watermarker": False,
    }
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "pooled_prompt_embeds": _noise(1, 16, seed=4),
        "negative_pooled_prompt_embeds": _noise(1, 16, seed=5),
        "guidance_scale": 3.0,
        "num_inference_steps": 5,
    }
    return (
        StockCase(
            "sdxl-text", StableDiffusionXLPipeline(**components), scheduler, inputs | {"height": 16, "width": 16}
        ),
        StockCase(
            "sdxl-image",
            StableDiffusionXLImg2ImgPipeline(**components),
            scheduler,
            inputs | {"image": _image(16), "strength": 0.6},
        ),
    )


@cache
def dit() -> StockCase:
    """DiT on latents, class-conditional, with learned sigmas in its output channels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=1000,  # the pipeline takes 1000 for the null class
    ).eval()
    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = DiTPipeline(transformer=transformer, vae=_kl_autoencoder(), scheduler=scheduler)
    return StockCase(
        "dit", pipeline, scheduler, {"class_labels": [1, 7], "guidance_scale": 2.0, "num_inference_steps": 4}
    )


@cache
def pixart() -> tuple[StockCase, ...]:
    """PixArt alpha and sigma: text-conditional DiT with learned sigmas in its output channels."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=16,
    ).eval()
    scheduler = DDIMScheduler(clip_sample=False)
    components = {
        "transformer": transformer,
        "vae": _kl_autoencoder(),
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": scheduler,
    }
    inputs = {
        "prompt_embeds": _noise(1, 4, 16, seed=2),
        "prompt_attention_mask": torch.ones(1, 4),
        "negative_prompt": None,
        "negative_prompt_embeds": _noise(1, 4, 16, seed=3),
        "negative_prompt_attention_mask": torch.ones(1, 4),
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
    }
    return (
        StockCase("pixart-alpha", PixArtAlphaPipeline(**components), scheduler, inputs),
        StockCase("pixart-sigma", PixArtSigmaPipeline(**components), scheduler, inputs),
    )


@cache
def pixel_unet() -> tuple[StockCase, ...]:
    """A pixel-space UNet under the unconditional DDPM and DDIM pipelines."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    ddpm, ddim = DDPMScheduler(), DDIMScheduler()
    return (
        StockCase("ddpm", DDPMPipeline(unet=unet, scheduler=ddpm), ddpm, {"batch_size": 2, "num_inference_steps": 5}),
        StockCase("ddim", DDIMPipeline(unet=unet, scheduler=ddim), ddim, {"batch_size": 2, "num_inference_steps": 5}),
    )


@cache
def diffusion_cases() -> dict[str, StockCase]:
    """Every case of a pipeline made for diffusion models, by name."""
    cases = (*stable_diffusion(), *stable_diffusion_xl(), dit(), *pixart(), *pixel_unet())
    return {case.name: case for case in cases}
