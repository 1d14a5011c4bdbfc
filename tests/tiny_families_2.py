# SPDX-License-Identifier: Apache-2.0
"""More tiny families: guiders, audio, and pipelines under conditions."""

import copy
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, AdaptiveProjectedMixGuidance
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.video_processor import VideoProcessor
from stock_pipelines import flux, ltx, qwen_image, sana
from tiny_encoders import clip, letters, qwen3, qwen25_vl, t5, umt5
from tiny_families import (
    DYNAMIC,
    FAMILIES,
    SQUARE,
    Family,
    awake,
    euler,
    flux2_klein,
    images,
    kl,
    kl_hunyuan,
    kl_wan,
    network,
    rows,
    wan_transformer,
    z_image,
)
from tiny_text_to_image import clip_tokenizer, tiny_stable_diffusion_3
from transformers import ByT5Tokenizer


# Guiders


def hunyuan_image() -> Family:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.476986,
    ).eval()
    torch.manual_seed(2)
    glyphs = t5(16)
    pipeline = diffusers.HunyuanImagePipeline(
        transformer=network(
            "HunyuanImageTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=16,
            text_embed_2_dim=16,
            rope_axes_dim=(4, 4),
        ),
        vae=vae,
        scheduler=euler(shift=7.0),
        text_encoder=qwen25_vl(16),
        tokenizer=letters(end=False),
        text_encoder_2=glyphs,
        tokenizer_2=ByT5Tokenizer(),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
        ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
    )
    pipeline.tokenizer_max_length = 64
    pipeline.tokenizer_2_max_length = 16
    return Family("hunyuan-image", pipeline, SQUARE, "1000 t")


def hunyuan_video_15() -> Family:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    pipeline = diffusers.HunyuanVideo15Pipeline(
        transformer=network(
            "HunyuanVideo15Transformer3DModel",
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ),
        vae=vae,
        scheduler=euler(shift=7.0),
        text_encoder=qwen25_vl(16).model.language_model,
        tokenizer=letters(end=False),
        text_encoder_2=t5(16),
        tokenizer_2=ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )
    pipeline.tokenizer_max_length = 64
    pipeline.tokenizer_2_max_length = 16
    return Family("hunyuan-video-1.5", pipeline, {**SQUARE, "num_frames": 5}, "1000 t")


def motif_video() -> Family:
    pipeline = diffusers.MotifVideoPipeline(
        transformer=network(
            "MotifVideoTransformer3DModel",
            in_channels=33,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            patch_size=1,
            text_embed_dim=16,
            rope_axes_dim=(4, 4, 4),
        ),
        vae=kl_wan(16),
        scheduler=euler(**DYNAMIC),
        text_encoder=umt5(16),
        tokenizer=letters(),
        guider=AdaptiveProjectedGuidance(),
        feature_extractor=None,
    )
    call = {**SQUARE, "num_frames": 5, "max_sequence_length": 48}
    return Family("motif-video", pipeline, call, "1000 t")


# Kandinsky 5


def _kandinsky(cls: type, vae: torch.nn.Module, **call: Any) -> Family:
    class Processor(type(letters())):  # type: ignore[misc]
        """A tokenizer that is offered pictures, too."""

        def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **options: Any) -> Any:
            return super().__call__(text, **options)

    tokenizer = letters(end=False)
    processor = Processor(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    pipeline = cls(
        transformer=network(
            "Kandinsky5Transformer3DModel",
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            patch_size=(1, 2, 2),
            model_dim=16,
            ff_dim=16,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(1, 1, 2),
        ),
        vae=vae,
        scheduler=euler(shift=5.0),
        text_encoder=qwen25_vl(16),
        tokenizer=processor,
        text_encoder_2=clip(16, length=77),
        tokenizer_2=clip_tokenizer(),
    )
    # The real template is longer than the limit of these letters.
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "draw {}", 5
    return Family("kandinsky", pipeline, {**call, "max_sequence_length": 64}, "1000 t", neutral=False)


def kandinsky5_video() -> Family:
    return _kandinsky(diffusers.Kandinsky5T2VPipeline, kl_hunyuan(), height=32, width=32, num_frames=5)


def kandinsky5_image() -> Family:
    family = _kandinsky(diffusers.Kandinsky5T2IPipeline, kl(4, 3), height=64, width=64)
    family.pipeline.resolutions = [(64, 64)]
    return family


# Text given as embeddings


def flux2() -> Family:
    pipeline = diffusers.Flux2Pipeline(
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
        ),
        vae=flux2_klein().pipeline.vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=euler(**DYNAMIC),
    )

    def own(samples: list[int]) -> dict[str, Any]:
        return {"prompt_embeds": rows((2, 4, 16), samples)}

    return Family("flux2", pipeline, {"height": 8, "width": 8}, "t", own=own, prompts=False)


def stable_audio_3() -> Family:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderSAME(
        audio_channels=2,
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    ).eval()
    embedder = diffusers.StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16)
    pipeline = diffusers.StableAudio3Pipeline(
        transformer=network(
            "StableAudio3DiTModel",
            io_channels=8,
            patch_size=1,
            embed_dim=32,
            depth=1,
            num_heads=2,
            cond_token_dim=16,
            global_cond_dim=16,
            local_add_cond_dim=5,
            timestep_features_dim=16,
            ff_mult=2,
            num_memory_tokens=3,
            use_differential_attention=False,
        ),
        vae=vae,
        scheduler=euler(num_train_timesteps=1, shift=1.0),
        text_encoder=None,
        tokenizer=None,
        duration_embedder=embedder.eval(),
    )

    def own(samples: list[int]) -> dict[str, Any]:
        mask = torch.ones(2, 6, dtype=torch.bool)[samples]
        return {"prompt_embeds": rows((2, 6, 16), samples), "encoder_attention_mask": mask}

    return Family("stable-audio-3", pipeline, {"duration": 1.0}, "t", own=own, prompts=False)


def longcat_audio() -> Family:
    torch.manual_seed(1)
    vae = diffusers.LongCatAudioDiTVae(
        in_channels=1,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=24000,
    ).eval()
    pipeline = diffusers.LongCatAudioDiTPipeline(
        transformer=network(
            "LongCatAudioDiTTransformer",
            dit_dim=32,
            dit_depth=1,
            dit_heads=2,
            dit_text_dim=16,
            latent_dim=8,
            text_conv=False,
        ),
        vae=vae,
        scheduler=euler(shift=1.0, invert_sigmas=True),
        text_encoder=umt5(16),
        tokenizer=letters(),
    )
    return Family("longcat-audio", pipeline, {"audio_duration_s": 0.002}, "1 - t", "-")


def ace_step() -> Family:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=16,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=8,
        audio_channels=2,
        sampling_rate=64,
    ).eval()
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(2)
    condition = AceStepConditionEncoder(
        **layers,
        head_dim=16,
        text_hidden_dim=16,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    transformer = network(
        "AceStepTransformer1DModel",
        **layers,
        head_dim=16,
        num_hidden_layers=1,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
    )
    pipeline = diffusers.AceStepPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=euler(num_train_timesteps=1, shift=1.0),
        text_encoder=qwen3(16),
        tokenizer=letters(),
        condition_encoder=awake(condition),
    )

    def own(samples: list[int]) -> dict[str, Any]:
        return {"lyrics": [""] * len(samples)}

    # Its call leaves out the mask of padded captions.
    return Family("ace-step", pipeline, {"audio_duration": 1.0}, "t", own=own, neutral=False)


def ernie_image() -> Family:
    pipeline = diffusers.ErnieImagePipeline(
        transformer=network(
            "ErnieImageTransformer2DModel",
            hidden_size=32,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=32,
            in_channels=8,
            out_channels=8,
            text_in_dim=16,
            rope_axes_dim=(4, 4, 8),
        ),
        vae=flux2_klein().pipeline.vae,
        scheduler=euler(**DYNAMIC),
        text_encoder=qwen3(16),
        tokenizer=letters(),
    )
    return Family("ernie-image", pipeline, {**SQUARE, "use_pe": False}, "1000 t")


# Conditions


def sd3_image() -> Family:
    parts = tiny_stable_diffusion_3().components
    awake(parts["transformer"])
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**parts)
    call = {**SQUARE, "max_sequence_length": 16, "strength": 0.6}
    return Family("sd3-image", pipeline, call, "1000 t", own=lambda samples: {"image": images(samples)})


def sd3_controlnet() -> Family:
    parts = tiny_stable_diffusion_3().components
    parts["vae"] = certain(parts["vae"])
    awake(parts["transformer"])
    config = {key: value for key, value in parts["transformer"].config.items() if not key.startswith("_")}
    names = diffusers.SD3ControlNetModel.__init__.__wrapped__.__annotations__
    controlnet = network("SD3ControlNetModel", 5, **{key: value for key, value in config.items() if key in names})
    pipeline = diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=controlnet)
    call = {**SQUARE, "max_sequence_length": 16, "controlnet_conditioning_scale": 0.7}
    return Family("sd3-controlnet", pipeline, call, "1000 t", own=lambda samples: {"control_image": images(samples)})


def certain(vae: torch.nn.Module) -> Any:
    """A copy of an autoencoder whose posterior has no width: pipelines draw their conditions from it anew."""
    vae = copy.deepcopy(vae)
    with torch.no_grad():
        last = vae.quant_conv if isinstance(vae, diffusers.AutoencoderKL) else vae.encoder.conv_out.conv
        rows = slice(last.out_channels // 2, None) if isinstance(vae, diffusers.AutoencoderKL) else slice(-1, None)
        last.weight[rows], last.bias[rows] = 0, -60
    return vae


def _flux(cls: type, in_channels: int, out_channels: int | None = 8) -> Any:
    config = {key: value for key, value in flux()[0].denoiser.config.items() if not key.startswith("_")}
    transformer = network(
        "FluxTransformer2DModel", **{**config, "in_channels": in_channels, "out_channels": out_channels}
    )
    return cls(
        transformer=transformer,
        vae=certain(flux()[0].pipeline.vae),
        scheduler=flux()[0].scheduler,
        text_encoder=clip(16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(16),
        tokenizer_2=letters(),
    )


FLUX_CALL = {**SQUARE, "max_sequence_length": 48, "guidance_scale": 3.5}


def flux_image() -> Family:
    pipeline = _flux(diffusers.FluxImg2ImgPipeline, 8)
    call = {**FLUX_CALL, "strength": 0.6}
    return Family("flux-image", pipeline, call, "t", own=lambda samples: {"image": images(samples)})


def flux_kontext() -> Family:
    pipeline = _flux(diffusers.FluxKontextPipeline, 8)
    call = {**FLUX_CALL, "max_area": 256, "_auto_resize": False}
    return Family("flux-kontext", pipeline, call, "t", own=lambda samples: {"image": images(samples)})


def flux_fill() -> Family:
    # Masked image and mask, whose side is the factor of the autoencoder, are joined to the channels.
    pipeline = _flux(diffusers.FluxFillPipeline, 8 + 8 + 4 * 2 * 2)

    def own(samples: list[int]) -> dict[str, Any]:
        mask = torch.zeros(2, 1, 16, 16)
        mask[:, :, :, 8:] = 1
        return {"image": images(samples), "mask_image": mask[samples]}

    return Family("flux-fill", pipeline, FLUX_CALL, "t", own=own)


def flux_control() -> Family:
    pipeline = _flux(diffusers.FluxControlPipeline, 16)
    return Family("flux-control", pipeline, FLUX_CALL, "t", own=lambda samples: {"control_image": images(samples)})


def qwen_to_image() -> Family:
    parts = {**qwen_image()[0].pipeline.components, "scheduler": qwen_image()[0].scheduler}
    pipeline = diffusers.QwenImageImg2ImgPipeline(
        **{**parts, "text_encoder": qwen25_vl(16), "tokenizer": letters(end=False)}
    )
    call = {**SQUARE, "max_sequence_length": 64, "strength": 0.6}
    return Family("qwen-image-image", pipeline, call, "t", own=lambda samples: {"image": images(samples)})


def z_to_image() -> Family:
    pipeline = diffusers.ZImageImg2ImgPipeline(**z_image().pipeline.components)
    call = {**SQUARE, "max_sequence_length": 48, "strength": 0.6}
    return Family("z-image-image", pipeline, call, "1 - t", "-", own=lambda samples: {"image": images(samples)})


def chroma_image() -> Family:
    parts = FAMILIES["chroma"]().pipeline.components
    call = {**SQUARE, "max_sequence_length": 48, "strength": 0.6}
    pipeline = diffusers.ChromaImg2ImgPipeline(**parts)
    return Family("chroma-image", pipeline, call, "t", own=lambda samples: {"image": images(samples)})


def wan_image() -> Family:
    config = {key: value for key, value in wan_transformer(0).config.items() if not key.startswith("_")}
    pipeline = diffusers.WanImageToVideoPipeline(
        transformer=network("WanTransformer3DModel", **{**config, "in_channels": 12}),
        vae=kl_wan(4),
        scheduler=euler(shift=5.0),
        text_encoder=None,
        tokenizer=None,
        image_processor=VideoProcessor(vae_scale_factor=8),
        image_encoder=None,
    )

    # One image for all samples is what this pipeline takes.
    def own(samples: list[int]) -> dict[str, Any]:
        return {"prompt_embeds": rows((2, 4, 16), samples), "image": images([0])}

    return Family("wan-image", pipeline, {**SQUARE, "num_frames": 5}, "1000 t", own=own, prompts=False)


def ltx_image() -> Family:
    parts = {**ltx().pipeline.components, "scheduler": ltx().scheduler, "vae": certain(ltx().pipeline.vae)}
    pipeline = diffusers.LTXImageToVideoPipeline(**{**parts, "text_encoder": t5(16), "tokenizer": letters()})
    call = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 48}
    return Family("ltx-image", pipeline, call, "1000 t", own=lambda samples: {"image": images(samples, 32)})


def sana_pag() -> Family:
    parts = {**sana().pipeline.components, "scheduler": sana().scheduler}
    parts |= {"text_encoder": FAMILIES["sana_text"]().pipeline.text_encoder, "tokenizer": letters()}
    call = {**FAMILIES["sana_text"]().call, "pag_scale": 0.0}
    return Family("sana-pag", diffusers.SanaPAGPipeline(**parts), call, "1000 t")


MORE = {
    recipe.__name__: cache(recipe)
    for recipe in (
        hunyuan_image, hunyuan_video_15, motif_video, kandinsky5_video, kandinsky5_image, flux2, stable_audio_3,
        longcat_audio, ace_step, ernie_image, sd3_image, sd3_controlnet, flux_image, flux_kontext, flux_fill,
        flux_control, qwen_to_image, z_to_image, chroma_image, wan_image, ltx_image, sana_pag,
    )
}  # fmt: skip
