# SPDX-License-Identifier: Apache-2.0
"""What a user does with models of the Hub, each in a function. Run as a script, in a process with an empty cache.

    python pull_client.py FOLDER

Sampled images go to `FOLDER/NAME.pt`, and `FOLDER/results.json` says of each function `null`, or what it raised.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, StableDiffusion3Pipeline, UNet2DModel
from huggingface_hub import HfApi, ModelCard
from tiny_pipelines import generators, labels_of, tiny_pipeline

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler, with_flow_map


FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
TOKEN = "secret-token"
PROMPT = "a red square"


def sample(pipeline: FlowMatchPipeline, num_inference_steps: int | None = 3) -> torch.Tensor:
    """Three images of a pipeline of ours."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        class_labels=labels_of(pipeline),
        batch_size=None if pipeline.num_classes else 3,
        num_inference_steps=num_inference_steps,
        generator=generators(0, 1, 2),
        output_type="pt",
    ).images


def draw(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
    """An image of a text-to-image pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "max_sequence_length": 16, "generator": generator, "output_type": "pt"}
    return pipeline(PROMPT, **size, **options).images


def must_fail(call: Callable[[], object], *said: str) -> None:
    """An error that says what is wrong."""
    with pytest.raises(Exception, match=r"\A.*" + ".*".join(map(re.escape, said))) as caught:
        call()
    if isinstance(caught.value, OSError) and "cannot be loaded from the Hub" in str(caught.value):
        assert len(str(caught.value).splitlines()) == 1


def own_class() -> torch.Tensor:
    return sample(FlowMatchPipeline.from_pretrained("someone/unet-classes"))


def generic_class() -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained("someone/dit-vae")
    assert type(pipeline) is FlowMatchPipeline
    return sample(pipeline)


def class_embedder() -> torch.Tensor:
    return sample(DiffusionPipeline.from_pretrained("someone/sd3-vae"))


def from_the_cache() -> torch.Tensor:
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    return sample(FlowMatchPipeline.from_pretrained("someone/unet-classes", local_files_only=True))


def not_in_the_cache() -> None:
    must_fail(lambda: FlowMatchPipeline.from_pretrained("someone/unet", local_files_only=True), "cache")


def sharded() -> torch.Tensor:
    return sample(FlowMatchPipeline.from_pretrained("someone/sharded"))


def variant() -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained("someone/variants", variant="fp16", torch_dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16
    return sample(pipeline.to(torch.float32))


def no_variant() -> None:
    must_fail(lambda: FlowMatchPipeline.from_pretrained("someone/unet-classes", variant="fp16"), "fp16")


def revision() -> torch.Tensor:
    return sample(FlowMatchPipeline.from_pretrained("someone/unet-classes", revision="experiment"))


def no_revision() -> None:
    must_fail(
        lambda: FlowMatchPipeline.from_pretrained("someone/unet-classes", revision="none"),
        "it answers 404 (Invalid rev id: none)",
    )


def device_map() -> torch.Tensor:
    return sample(FlowMatchPipeline.from_pretrained("someone/dit-vae", device_map="cpu"))


def private() -> torch.Tensor:
    must_fail(lambda: FlowMatchPipeline.from_pretrained("our/private"), "'our/private'", "cannot be loaded", "401")
    must_fail(
        lambda: FlowMatchPipeline.from_pretrained("our/private", token="visitor-token"),
        "'our/private'",
        "cannot be loaded",
        "404",
    )
    must_fail(
        lambda: FlowMatchPipeline.from_pretrained("our/private", token="wrong"),
        "answers 401 (Invalid credentials",
        "hf auth login",
    )
    return sample(FlowMatchPipeline.from_pretrained("our/private", token=TOKEN))


def no_repository() -> None:
    must_fail(
        lambda: FlowMatchPipeline.from_pretrained("someone/nothing"),
        "'someone/nothing' is no folder here and cannot be loaded from the Hub: it answers 401",
    )


def bad_day() -> torch.Tensor:
    """The server fails in the middle of a pull; the next one goes on."""
    must_fail(
        lambda: FlowMatchPipeline.from_pretrained("our/flaky"),
        "'our/flaky' is no folder here and cannot be loaded",
        "503",
    )
    return sample(FlowMatchPipeline.from_pretrained("our/flaky"))


def components() -> None:
    unet = UNet2DModel.from_pretrained("someone/unet-classes", subfolder="unet")
    assert unet.config.num_class_embeds == 6
    assert isinstance(
        DiTTransformer2DModel.from_pretrained("someone/dit-vae", subfolder="transformer"), torch.nn.Module
    )
    assert AutoencoderKL.from_pretrained("someone/dit-vae", subfolder="vae").config.latent_channels == 4
    scheduler = FlowMatchScheduler.from_pretrained("someone/vp", subfolder="scheduler")
    assert scheduler.config.path == "vp"


def stock_schedulers() -> None:
    scheduler = FlowMatchScheduler.from_pretrained("our/stock-sd3", subfolder="scheduler")
    assert (scheduler.config.path, scheduler.config.shift, scheduler.config.timestep_spacing) == (
        "ot",
        3.0,
        "linspace",
    )
    scheduler = FlowMatchScheduler.from_pretrained("our/stock-sd15", subfolder="scheduler")
    assert scheduler.config.path == "vp_discrete"
    assert scheduler.config.path_kwargs["beta_schedule"] == "scaled_linear"


def pickles() -> torch.Tensor:
    must_fail(lambda: FlowMatchPipeline.from_pretrained("our/pickles"), "safetensors")
    must_fail(lambda: DiffusionPipeline.from_pretrained("our/pickles", use_safetensors=True), "safetensors")
    return sample(FlowMatchPipeline.from_pretrained("our/pickles", use_safetensors=False))


def text_to_image() -> torch.Tensor:
    return draw(StableDiffusion3Pipeline.from_pretrained("someone/sd3"))


def text_to_image_with_our_scheduler() -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained("someone/sd3-ours")
    assert isinstance(pipeline.scheduler, FlowMatchScheduler)
    return draw(pipeline)


def few_steps() -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained("someone/few-steps")
    assert "2 by default" in ModelCard.load("someone/few-steps").text
    return sample(pipeline, num_inference_steps=None)


def few_steps_text_to_image() -> torch.Tensor:
    return draw(with_flow_map(StableDiffusion3Pipeline.from_pretrained("someone/sd3-few-steps")))


def lora() -> torch.Tensor:
    pipeline = StableDiffusion3Pipeline.from_pretrained("someone/sd3")
    pipeline.load_lora_weights("someone/lora")
    return draw(pipeline)


def snippets() -> None:
    """The snippet of each card, as a reader would paste it."""
    cards = (
        "someone/unet-classes",
        "someone/dit-vae",
        "someone/sd3-vae",
        "someone/vp",
        "someone/pushed",
        "someone/unet",
    )
    for repo_id in (*cards, "someone/scheduler"):
        card = ModelCard.load(repo_id)
        assert repo_id in card.text, repo_id
        (code,) = (block.split("```")[0] for block in card.text.split("```python\n")[1:])
        names: dict = {}
        exec(code.replace("num_inference_steps=50", "num_inference_steps=2"), names)
        assert ("images" in names and len(names["images"]) > 1) or "scheduler" in names, repo_id


def pushes() -> torch.Tensor:
    """`push_to_hub` of pipelines and components; what was pushed has a card, which a second push leaves alone."""
    pipeline = tiny_pipeline("unet-classes", path="cosine", prediction_type="v_prediction")
    pipeline.push_to_hub("pushed", token=TOKEN, private=False)
    pipeline.save_pretrained(FOLDER / "saved", push_to_hub=True, repo_id="someone/unet", token=TOKEN)
    pipeline.scheduler.push_to_hub("scheduler", token=TOKEN)
    pipeline.push_to_hub("our/in-a-folder", token=TOKEN, subfolder="nested", variant="fp16")
    api = HfApi(token=TOKEN)
    card = ModelCard.load("someone/pushed")
    assert "automatically generated" not in card.text and "More Information" not in card.text
    card.text += "\nMine."
    card.push_to_hub("someone/pushed", token=TOKEN)
    pipeline.push_to_hub("pushed", token=TOKEN)
    assert ModelCard.load("someone/pushed").text.endswith("Mine.")
    assert FlowMatchScheduler.from_pretrained("someone/scheduler").config.path == "cosine"
    assert "nested/unet/diffusion_pytorch_model.fp16.safetensors" in api.list_repo_files("our/in-a-folder")
    return sample(FlowMatchPipeline.from_pretrained("someone/pushed"))


CHECKS = (
    own_class,
    generic_class,
    class_embedder,
    from_the_cache,
    not_in_the_cache,
    sharded,
    variant,
    no_variant,
    revision,
    no_revision,
    device_map,
    private,
    no_repository,
    bad_day,
    components,
    stock_schedulers,
    pickles,
    text_to_image,
    text_to_image_with_our_scheduler,
    few_steps,
    few_steps_text_to_image,
    lora,
    pushes,
    snippets,
)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(FOLDER)
    results = {}
    for check in CHECKS:
        try:
            images = check()
            if images is not None:
                torch.save(images, FOLDER / f"{check.__name__}.pt")
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
    (FOLDER / "results.json").write_text(json.dumps(results))
