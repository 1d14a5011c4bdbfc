# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of many families, with all their parts: random weights, made when they are asked for.

Each recipe is a stock pipeline of diffusers, the arguments of its call but for the prompts, and what its network is
given and says, from the family's paper or its pipeline's source.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from stock_pipelines import aura_flow, cogview4, flux, ltx, lumina2, mochi, qwen_image, sana, wan
from tiny_encoders import clip, gemma2, glm, letters, llama, qwen3, qwen3_vl, qwen25_vl, smollm3, t5, umt5
from tiny_text_to_image import clip_tokenizer, tiny_stable_diffusion_3


TIMES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "t": lambda t: t,
    "1000 t": lambda t: 1000 * t,
    "1 - t": lambda t: 1 - t,
    "1000 - 1000 t": lambda t: 1000 - 1000 * t,
}


@dataclass(frozen=True)
class Family:
    """A recipe.

    Args:
        name (`str`):
            Name in the tests' ids.
        pipeline (`DiffusionPipeline`):
            The tiny pipeline.
        call (`dict`):
            Arguments of its call that all samples share.
        time (`str`):
            Key of `TIMES`: what the network is given.
        sign (`str`):
            Sign of its output against noise - data.
        network (`str`, *optional*, defaults to `"transformer"`):
            Name of the network.
        own (`Callable`, *optional*):
            Arguments for some samples, by their number, besides prompts.
        neutral (`bool`, *optional*, defaults to `True`):
            Whether captions of different lengths leave each other alone in a batch.
        prompts (`bool`, *optional*, defaults to `True`):
            Whether the call takes prompts; otherwise `own` has all that differs.
    """

    name: str
    pipeline: DiffusionPipeline
    call: dict[str, Any]
    time: str
    sign: str = "+"
    network: str = "transformer"
    own: Callable[[list[int]], dict[str, Any]] = field(default=lambda samples: {})
    neutral: bool = True
    prompts: bool = True


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Small random numbers in place of layers of zeros."""
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=generator)
    return network.eval()


def network(name: str, seed: int = 0, **config: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return awake(getattr(diffusers, name)(**config))


def kl(latent_channels: int = 4, downs: int = 1, **config: Any) -> AutoencoderKL:
    """An autoencoder with a factor of 2 for each down."""
    torch.manual_seed(1)
    blocks = downs + 1
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=latent_channels,
        **{"shift_factor": 0.0609, "scaling_factor": 1.5035, **config},
    ).eval()


def kl_wan(z_dim: int = 4, **config: Any) -> AutoencoderKLWan:
    torch.manual_seed(1)
    numbers = torch.linspace(-1, 1, z_dim).tolist()
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=z_dim,
        **{
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            "latents_mean": numbers,
            "latents_std": [2 + number for number in numbers],
            **config,
        },
    ).eval()


def kl_qwen() -> AutoencoderKLQwenImage:
    return qwen_image()[0].pipeline.vae


def kl_hunyuan(latent_channels: int = 4) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(1)
    return AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.476986,
    ).eval()


def euler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def rows(shape: tuple[int, ...], samples: list[int], seed: int = 21) -> torch.Tensor:
    """Some rows of a random tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))[samples]


def images(samples: list[int], size: int = 16) -> torch.Tensor:
    """Some of two images with values in [0, 1]."""
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(22))[samples]


DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
SQUARE = {"height": 16, "width": 16}


def _parts(case: Any, **encoders: Any) -> dict[str, Any]:
    return {**case.pipeline.components, "scheduler": case.scheduler, **encoders}


def sd3() -> Family:
    pipeline = tiny_stable_diffusion_3()
    awake(pipeline.transformer)
    return Family("sd3", pipeline, {**SQUARE, "max_sequence_length": 16}, "1000 t")


def flux_text() -> Family:
    parts = _parts(
        flux()[0], text_encoder=clip(16), tokenizer=clip_tokenizer(), text_encoder_2=t5(16), tokenizer_2=letters()
    )
    call = {**SQUARE, "max_sequence_length": 48, "guidance_scale": 3.5}
    return Family("flux", diffusers.FluxPipeline(**parts), call, "t")


def flux2_klein() -> Family:
    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=1,
    ).eval()
    with torch.no_grad():
        vae.bn.running_mean.copy_(torch.linspace(-1, 1, 8))
        vae.bn.running_var.copy_(torch.linspace(0.5, 2, 8))
    pipeline = diffusers.Flux2KleinPipeline(
        transformer=network(
            "Flux2Transformer2DModel",
            patch_size=1,
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            axes_dims_rope=[4, 4, 4, 4],
            guidance_embeds=False,
        ),
        vae=vae,
        text_encoder=qwen3(16, causal=True),
        tokenizer=letters(),
        scheduler=euler(**DYNAMIC),
    )
    call = {"height": 8, "width": 8, "max_sequence_length": 48, "text_encoder_out_layers": (1,)}
    return Family("flux2-klein", pipeline, call, "t")


def qwen() -> Family:
    parts = _parts(qwen_image()[0], text_encoder=qwen25_vl(16), tokenizer=letters(end=False))
    return Family("qwen-image", diffusers.QwenImagePipeline(**parts), {**SQUARE, "max_sequence_length": 64}, "t")


def z_image() -> Family:
    transformer = network(
        "ZImageTransformer2DModel",
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipeline = diffusers.ZImagePipeline(
        transformer=transformer,
        vae=kl(4),
        scheduler=euler(**DYNAMIC),
        text_encoder=qwen3(16),
        tokenizer=letters(),
    )
    return Family("z-image", pipeline, {**SQUARE, "max_sequence_length": 48}, "1 - t", "-")


def sana_text() -> Family:
    parts = _parts(sana(), text_encoder=gemma2(8), tokenizer=letters())
    call = {
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "max_sequence_length": 48,
    }
    return Family("sana", diffusers.SanaPipeline(**parts), call, "1000 t")


def lumina2_text() -> Family:
    config = {key: value for key, value in lumina2().denoiser.config.items() if not key.startswith("_")}
    transformer = network("Lumina2Transformer2DModel", **{**config, "axes_lens": (300, 32, 32)})
    encoders = {"text_encoder": gemma2(16), "tokenizer": letters()}
    parts = _parts(lumina2(), vae=kl(4, 3), transformer=transformer, **encoders)
    call = {"height": 32, "width": 32, "max_sequence_length": 64, "system_prompt": "draw"}
    return Family("lumina2", diffusers.Lumina2Pipeline(**parts), call, "1 - t", "-")


def lumina() -> Family:
    pipeline = diffusers.LuminaPipeline(
        transformer=network(
            "LuminaNextDiT2DModel",
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=16,
            learn_sigma=True,
            qk_norm=True,
        ),
        vae=kl(4, 3, shift_factor=None),
        scheduler=euler(),
        text_encoder=gemma2(16),
        tokenizer=letters(),
    )
    return Family("lumina", pipeline, {"height": 32, "width": 32, "max_sequence_length": 48}, "1 - t", "-")


def aura() -> Family:
    parts = _parts(aura_flow(), text_encoder=umt5(16), tokenizer=letters())
    return Family("aura-flow", diffusers.AuraFlowPipeline(**parts), {**SQUARE, "max_sequence_length": 48}, "t")


def chroma() -> Family:
    pipeline = diffusers.ChromaPipeline(
        transformer=network(
            "ChromaTransformer2DModel",
            patch_size=1,
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=[4, 4, 8],
            approximator_hidden_dim=16,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
        vae=kl(2),
        scheduler=euler(**DYNAMIC),
        text_encoder=t5(16),
        tokenizer=letters(),
    )
    return Family("chroma", pipeline, {**SQUARE, "max_sequence_length": 48}, "t")


def cogview4_text() -> Family:
    parts = _parts(cogview4(), text_encoder=glm(16), tokenizer=letters("left"))
    call = {**SQUARE, "max_sequence_length": 64}
    return Family("cogview4", diffusers.CogView4Pipeline(**parts), call, "1000 t", neutral=False)


def hidream() -> Family:
    pipeline = diffusers.HiDreamImagePipeline(
        transformer=network(
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=32,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(16, 16),
            llama_layers=(0, 1),
            force_inference_output=True,  # in train mode, too
        ),
        vae=kl(4),
        scheduler=euler(**DYNAMIC),
        text_encoder=clip(16, True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(16, True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(16),
        tokenizer_3=letters(),
        text_encoder_4=llama(16, causal=True),
        tokenizer_4=letters(),
    )
    pipeline.default_sample_size = 16
    return Family("hidream", pipeline, {**SQUARE, "max_sequence_length": 16}, "1000 t", "-")


def krea2() -> Family:
    pipeline = diffusers.Krea2Pipeline(
        transformer=network(
            "Krea2Transformer2DModel",
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            timestep_embed_dim=8,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        vae=kl_qwen(),
        scheduler=euler(**DYNAMIC),
        text_encoder=qwen3_vl(16),
        tokenizer=letters(end=False),
        text_encoder_select_layers=(0, 1, 2),
    )
    return Family("krea2", pipeline, {**SQUARE, "max_sequence_length": 48}, "t")


def bria() -> Family:
    pipeline = diffusers.BriaPipeline(
        transformer=network(
            "BriaTransformer2DModel",
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=None,
            axes_dims_rope=[0, 4, 4],
        ),
        vae=kl(4, shift_factor=0.0),
        scheduler=euler(**DYNAMIC),
        text_encoder=t5(16),
        tokenizer=letters(),
        image_encoder=None,
        feature_extractor=None,
    )
    return Family("bria", pipeline, {**SQUARE, "max_sequence_length": 48}, "1000 t")


def bria_fibo() -> Family:
    pipeline = diffusers.BriaFiboPipeline(
        transformer=network(
            "BriaFiboTransformer2DModel",
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            text_encoder_dim=16,
            pooled_projection_dim=None,
            axes_dims_rope=[0, 4, 4],
        ),
        vae=kl_wan(16, scale_factor_spatial=16),
        scheduler=euler(**DYNAMIC),
        text_encoder=smollm3(16),
        tokenizer=letters(),
    )
    call = {"height": 32, "width": 32, "max_sequence_length": 64}
    return Family("bria-fibo", pipeline, call, "1000 t")


def prx() -> Family:
    pipeline = diffusers.PRXPipeline(
        transformer=network(
            "PRXTransformer2DModel",
            patch_size=1,
            in_channels=4,
            context_in_dim=16,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=1,
            axes_dim=[4, 4],
        ),
        vae=kl(4),
        scheduler=euler(),
        text_encoder=umt5(16),
        tokenizer=letters(),
    )
    pipeline.text_encoder, pipeline.tokenizer = None, None

    # Its cleaning of prompts needs a package that this project has no use for.
    def own(samples: list[int]) -> dict[str, Any]:
        mask = torch.ones(2, 6, dtype=torch.bool)[samples]
        return {"prompt_embeds": rows((2, 6, 16), samples), "prompt_attention_mask": mask}

    return Family("prx", pipeline, {**SQUARE, "use_resolution_binning": False}, "t", own=own, prompts=False)


def hunyuan_video() -> Family:
    pipeline = diffusers.HunyuanVideoPipeline(
        transformer=network(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ),
        vae=kl_hunyuan(),
        scheduler=euler(shift=7.0),
        text_encoder=llama(16),
        tokenizer=letters(),
        text_encoder_2=clip(8, length=77),
        tokenizer_2=clip_tokenizer(),
    )
    template = {"template": "{}", "crop_start": 0}
    call = {**SQUARE, "num_frames": 5, "max_sequence_length": 48, "prompt_template": template}
    return Family("hunyuan-video", pipeline, call, "1000 t")


def wan_text() -> Family:
    parts = _parts(wan(), text_encoder=umt5(16), tokenizer=letters())
    call = {**SQUARE, "num_frames": 5, "max_sequence_length": 48}
    return Family("wan", diffusers.WanPipeline(**parts), call, "1000 t")


def wan_transformer(seed: int, channels: int = 4, **config: Any) -> torch.nn.Module:
    return network(
        "WanTransformer3DModel",
        seed,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
        **config,
    )


@cache
def wan22() -> diffusers.WanPipeline:
    return diffusers.WanPipeline(
        transformer=wan_transformer(0),
        transformer_2=wan_transformer(1),
        boundary_ratio=0.875,
        vae=kl_wan(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=umt5(16),
        tokenizer=letters(),
    )


def wan22_high() -> Family:
    return Family("wan-2.2-high", wan22(), {**SQUARE, "num_frames": 5, "max_sequence_length": 48}, "1000 t")


def wan22_low() -> Family:
    call = {**SQUARE, "num_frames": 5, "max_sequence_length": 48}
    return Family("wan-2.2-low", wan22(), call, "1000 t", network="transformer_2")


def wan22_5b() -> Family:
    vae = kl_wan(
        8, in_channels=12, out_channels=12, is_residual=True, patch_size=2, scale_factor_spatial=16,
        scale_factor_temporal=4,
    )  # fmt: skip
    pipeline = diffusers.WanPipeline(
        transformer=wan_transformer(0, 8),
        transformer_2=None,
        expand_timesteps=True,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=umt5(16),
        tokenizer=letters(),
    )
    call = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 48}
    return Family("wan-2.2-5b", pipeline, call, "1000 t")


def ltx_text() -> Family:
    parts = _parts(ltx(), text_encoder=t5(16), tokenizer=letters())
    call = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 48}
    return Family("ltx", diffusers.LTXPipeline(**parts), call, "1000 t")


def mochi_text() -> Family:
    transformer = network("MochiTransformer3DModel", **{**mochi().denoiser.config, "max_sequence_length": 48})
    parts = _parts(mochi(), text_encoder=t5(16), tokenizer=letters(), transformer=transformer)
    call = {**SQUARE, "num_frames": 7, "max_sequence_length": 48}
    return Family("mochi", diffusers.MochiPipeline(**parts), call, "1000 - 1000 t", "-")


def ovis() -> Family:
    pipeline = diffusers.OvisImagePipeline(
        transformer=network(
            "OvisImageTransformer2DModel",
            patch_size=1,
            in_channels=8,
            out_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        vae=kl(2),
        scheduler=euler(**DYNAMIC),
        text_encoder=qwen3(16),
        tokenizer=letters(),
    )
    return Family("ovis-image", pipeline, {**SQUARE, "max_sequence_length": 48}, "t")


def skyreels() -> Family:
    config = {key: value for key, value in wan_transformer(0).config.items() if not key.startswith("_")}
    kept = set(diffusers.SkyReelsV2Transformer3DModel.__init__.__wrapped__.__annotations__)
    pipeline = diffusers.SkyReelsV2Pipeline(
        transformer=network("SkyReelsV2Transformer3DModel", **{k: v for k, v in config.items() if k in kept}),
        vae=kl_wan(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        text_encoder=None,
        tokenizer=None,
    )

    # Its cleaning of prompts needs a package that this project has no use for.
    def own(samples: list[int]) -> dict[str, Any]:
        return {"prompt_embeds": rows((2, 4, 16), samples)}

    return Family("skyreels-v2", pipeline, {**SQUARE, "num_frames": 5}, "1000 t", own=own, prompts=False)


def sana_video() -> Family:
    pipeline = diffusers.SanaVideoPipeline(
        transformer=network(
            "SanaVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=8,
            sample_size=8,
            patch_size=(1, 2, 2),
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        vae=kl_wan(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=gemma2(8),
        tokenizer=letters(),
    )
    call = {
        "height": 32,
        "width": 32,
        "frames": 5,
        "max_sequence_length": 48,
        "complex_human_instruction": [],
        "use_resolution_binning": False,
    }
    return Family("sana-video", pipeline, call, "1000 t")


def longcat_image() -> Family:
    pipeline = diffusers.LongCatImagePipeline(
        transformer=network(
            "LongCatImageTransformer2DModel",
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
        ),
        vae=kl(16),
        scheduler=euler(**DYNAMIC),
        text_encoder=qwen25_vl(16),
        tokenizer=letters(),
        text_processor=None,
    )
    pipeline.tokenizer_max_length = 48
    return Family("longcat-image", pipeline, {**SQUARE, "enable_prompt_rewrite": False}, "t")


FAMILIES = {
    recipe.__name__: cache(recipe)
    for recipe in (
        sd3, flux_text, flux2_klein, qwen, z_image, sana_text, lumina2_text, lumina, aura, chroma, cogview4_text,
        hidream, krea2, bria, bria_fibo, prx, hunyuan_video, wan_text, wan22_high, wan22_low, wan22_5b, ltx_text,
        mochi_text, ovis, skyreels, sana_video, longcat_image,
    )
}  # fmt: skip
