# SPDX-License-Identifier: Apache-2.0
"""Setup of text-to-image runs: the shift of equation 23, sizes, and arguments refused before any work."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from tiny_text_to_image import tiny_stable_diffusion_3

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.text_to_image.arguments import LoraTrainingArguments, TextToImageArguments, parse_call
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.text_to_image.setup import as_saved, choose_scheduler, choose_sizes, draw_class_images


REQUIRED = ["--pretrained_model_name_or_path=nowhere", "--dataset_name=nowhere"]


@pytest.mark.parametrize("sizes", [[(16, 16)], [(16, 24), (24, 16)], [(16, 24), (8, 8), (24, 24), (16, 16)]], ids=str)
@pytest.mark.parametrize("base", [8, 16, 40])
def test_the_shift_is_that_of_equation_23(sizes: list[tuple[int, int]], base: int) -> None:
    """`sqrt(m / n)` for the smallest and the largest size, in training and in the sampling of what is saved."""
    pipeline = tiny_stable_diffusion_3(t5=False)
    args = parse_arguments(TextToImageArguments, [*REQUIRED, "--shift_base_resolution", str(base)])
    field = TrainedField(pipeline, "transformer", {})
    choose_scheduler(field, args, sizes)
    saved = as_saved(pipeline)
    saved.set_progress_bar_config(disable=True)
    areas = sorted(height * width for height, width in sizes)
    for height, width in sizes:
        # Latents have half the side, and 2 x 2 of them are a token.
        shift = field.shift((height, width))
        exact = math.sqrt(height * width / base**2)
        if height * width in (areas[0], areas[-1]):
            assert shift == pytest.approx(exact, rel=1e-12)
        else:
            assert math.sqrt(areas[0]) / base < shift < math.sqrt(areas[-1]) / base
        saved(
            "red", height=height, width=width, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=4,
            output_type="latent",
        )  # fmt: skip
        # Stock's grid before the shift, and sigmas in float32.
        u, sigmas = torch.linspace(1, 1e-3, 4, dtype=torch.float64), saved.scheduler.sigmas.double()[:4]
        torch.testing.assert_close(sigmas, shift * u / (1 + (shift - 1) * u), rtol=1e-6, atol=0)


def test_one_area_fixes_the_shift_of_larger_images_too() -> None:
    pipeline = tiny_stable_diffusion_3(t5=False)
    args = parse_arguments(TextToImageArguments, [*REQUIRED, "--shift_base_resolution", "16"])
    field = TrainedField(pipeline, "transformer", {})
    choose_scheduler(field, args, [(8, 16), (16, 8)])
    assert field.shift((16, 32)) == pytest.approx(math.sqrt(16 * 32) / 16, rel=1e-12)


def test_a_given_shift_is_that_of_every_size() -> None:
    pipeline = tiny_stable_diffusion_3(t5=False)
    args = parse_arguments(TextToImageArguments, [*REQUIRED, "--shift", "2.5"])
    field = TrainedField(pipeline, "transformer", {})
    choose_scheduler(field, args, [(16, 24), (8, 8)])
    assert [field.shift((side, side)) for side in (8, 24)] == [2.5, 2.5]


def test_steps_that_were_fitted_to_the_network_are_left_behind() -> None:
    pipeline = tiny_stable_diffusion_3(t5=False)
    fitted = {"1": {"sigmas": [0.99], "keep": [1.0], "weights": [[-1.0]]}}
    calibrated = FlowMatchScheduler(
        solver="calibrated", sampling_path="angle", calibration=fitted, default_num_inference_steps=1
    )
    for words, spacing in (([], "trailing"), (["--save_stock"], "linspace")):
        pipeline.scheduler = calibrated
        args = parse_arguments(TextToImageArguments, [*REQUIRED, "--shift", "2.5", *words])
        config = choose_scheduler(TrainedField(pipeline, "transformer", {}), args, [(8, 8)]).config
        assert (config.solver, config.sampling_path, config.shift) == ("euler", "ot", 2.5)
        assert (config.calibration, config.default_num_inference_steps) == (None, None)
        assert config.timestep_spacing == spacing


def test_sizes_that_the_model_does_not_take_are_refused() -> None:
    field = TrainedField(tiny_stable_diffusion_3(t5=False), "transformer", {"max_sequence_length": 4})

    def sizes(*words: str) -> list[tuple[int, int]]:
        return choose_sizes(field, parse_arguments(TextToImageArguments, [*REQUIRED, *words]))

    assert (field.factor, field.multiple, sizes()) == (2, 4, [(16, 16)])
    assert sizes("--aspect_ratio_buckets", "16,24;48,16") == [(16, 24), (48, 16)]
    with pytest.raises(ValueError, match="takes no images of 52 x 52 pixels: .*`pos_embed_max_size`: 12"):
        sizes("--resolution", "52")
    with pytest.raises(ValueError, match="takes no images of 18 x 18 pixels: .*divisible by 4 but are 18 and 18"):
        sizes("--resolution", "18")
    with pytest.raises(ValueError, match=r"multiples of 4 for this model, got \[\(18, 16\)\]"):
        sizes("--aspect_ratio_buckets", "16,24;18,16")
    with pytest.raises(ValueError, match="takes no images of 16 x 52 pixels"):
        sizes("--aspect_ratio_buckets", "16,24;16,52")


@pytest.mark.parametrize("words", ["num_frames", "=1", "a b=1", "num_frames=one"])
def test_arguments_of_the_call_are_checked(words: str) -> None:
    with pytest.raises(ValueError, match="--call must read like num_frames=1"):
        parse_arguments(TextToImageArguments, [*REQUIRED, "--call", words])
    assert parse_call(["num_frames=1", 'negative_prompt="no"']) == {"num_frames": 1, "negative_prompt": "no"}


@pytest.mark.parametrize("arguments", [TextToImageArguments, LoraTrainingArguments])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--caption_dropout nan", r"--caption_dropout must be in \[0, 1\], got nan"),
        ("--caption_dropout -0.1", r"--caption_dropout must be in \[0, 1\], got -0.1"),
        ("--text_encoder_dropout nan", r"--text_encoder_dropout must be in \[0, 1\], got \[nan\]"),
        ("--text_encoder_dropout 0.1 0.2 1.5", r"--text_encoder_dropout must be in \[0, 1\], got \[0.1, 0.2, 1.5\]"),
        (
            "--text_encoder_dropout 0.1 0.2 0.3 0.4 0.5",
            r"one for each of up to 4 text encoders, got \[0.1, 0.2, 0.3, 0.4, 0.5\]",
        ),
        ("--max_sequence_length -1", "--max_sequence_length must be from 0 to 512, got -1"),
        ("--max_sequence_length 513", "--max_sequence_length must be from 0 to 512, got 513"),
        ("--aspect_ratio_buckets=", "Buckets must read like .*, got ''"),
        ("--aspect_ratio_buckets 16x24", "Buckets must read like .*, got '16x24'"),
        ("--aspect_ratio_buckets 16,24;0,8", "Buckets must read like .*, got '16,24;0,8'"),
        ("--aspect_ratio_buckets 16,24 --use_aspect_ratio_buckets", "one may be given"),
        ("--max_aspect_ratio 0.5", "--max_aspect_ratio must be at least 1, got 0.5"),
        (
            "--validation_prompts x --num_validation_images 0",
            "--validation_prompts has no effect with --num_validation_images 0",
        ),
        ("--max_aspect_ratio nan", "--max_aspect_ratio must be at least 1, got nan"),
        ("--shift_base_resolution 0", "--shift_base_resolution must be at least 1, got 0"),
        ("--shift_base_resolution 16 --shift 3", "--shift 3.0 .* --shift_base_resolution 16 .*: give one"),
        ("--shift nan", "--shift must be above 0, got nan"),
        ("--guidance_scale nan", "--guidance_scale must be at least 0, got nan"),
        ("--guidance_scale -1", "--guidance_scale must be at least 0, got -1.0"),
        ("--guidance_scale inf", "--guidance_scale must be at least 0, got inf"),
        ("--num_inference_steps 0", "--num_inference_steps must be at least 1, got 0"),
        ("--num_validation_images -1", "--num_validation_images must be at least 0, got -1"),
        ("--cache_text_embeddings --streaming", "--cache_text_embeddings does not go with --streaming"),
        ("--cache_latents", "--center_crop"),
    ],
)
def test_values_are_checked_before_any_work(arguments: type[TextToImageArguments], words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(arguments, [*REQUIRED, *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank 0", "--rank must be at least 1, got 0"),
        ("--lora_alpha nan", "--lora_alpha must be above 0, got nan"),
        ("--lora_alpha inf", "--lora_alpha must be above 0, got inf"),
        ("--lora_alpha 0", "--lora_alpha must be above 0, got 0.0"),
        ("--lora_dropout nan", r"--lora_dropout must be in \[0, 1\), got nan"),
        ("--lora_dropout -0.1", r"--lora_dropout must be in \[0, 1\), got -0.1"),
        ("--lora_layers=", "--lora_layers must read like .*, got ''"),
        ("--lora_layers to_q,,to_k", "--lora_layers must read like .*, got 'to_q,,to_k'"),
        ("--lora_blocks=", "--lora_blocks must read like .*, got ''"),
        ("--lora_blocks=-1", "--lora_blocks must read like .*, got '-1'"),
        ("--lora_blocks 0;1", "--lora_blocks must read like .*, got '0;1'"),
        ("--lora_blocks 1.5", "--lora_blocks must read like .*, got '1.5'"),
        ("--text_encoder_lr 1e-4", "--text_encoder_lr 0.0001 needs --train_text_encoder"),
        ("--train_text_encoder --text_encoder_lr nan", "--text_encoder_lr must be above 0, got nan"),
        ("--train_text_encoder --text_encoder_lr 0", "--text_encoder_lr must be above 0, got 0.0"),
        ("--train_text_encoder --text_encoder_lr 1e-3 --optimizer prodigy", "has one learning rate for all"),
        ("--train_text_encoder --use_dora", "--use_dora does not go with --train_text_encoder"),
        ("--train_text_encoder --offload", "--offload keeps text encoders on the CPU"),
        ("--use_ema --ema_profile power", "--ema_profile power"),
        ("--save_stock", "--save_stock is for the scheduler of a saved pipeline"),
    ],
)
def test_values_of_adapters_are_checked_before_any_work(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(LoraTrainingArguments, [*REQUIRED, *words.split()])


def test_drawn_images_of_a_class_take_no_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "class-00001.png").write_bytes(b"mine")
    words = ["--instance_prompt=a sks dog", "--class_prompt=a dog", f"--class_data_dir={tmp_path}"]
    args = parse_arguments(TextToImageArguments, [*REQUIRED, *words, "--num_class_images=4", "--eval_batch_size=2"])
    batches = []

    def draw(*given: Any) -> list[list[PIL.Image.Image]]:
        (generators,) = given[6]
        batches.append(len(generators))
        return [[PIL.Image.new("RGB", (8, 8)) for _ in generators]]

    monkeypatch.setattr("diffusers_fm.text_to_image.setup.sample_prompts", draw)
    run, field = SimpleNamespace(accelerator=Accelerator(cpu=True)), SimpleNamespace(pipeline=None)
    for _ in range(2):  # the second time nothing is missing
        draw_class_images(run, args, field, (8, 8))  # type: ignore[arg-type]
    assert batches == [2, 1]
    assert (tmp_path / "class-00001.png").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 4
