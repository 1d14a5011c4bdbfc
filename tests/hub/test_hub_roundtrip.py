# SPDX-License-Identifier: Apache-2.0
"""Trained, pushed, and pulled by a process with an empty cache, through the real client: the same images."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from fake_hub import FakeHub, File, fake_hub
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from processes import check_processes, run_stock
from pull_client import CHECKS, PROMPT, TOKEN, draw, sample
from tiny_pipelines import tiny_pipeline
from tiny_text_to_image import tiny_stable_diffusion_3
from training_runs import ROOT, command_line, load_script, make_dataset, run_script, save_untrained, script

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler, with_flow_map, with_stock_scheduler
from diffusers_fm.push_to_hub import main as push


TESTS = Path(__file__).parents[1]
FLOW_MAP = load_script(ROOT / "training_scripts" / "train_flow_map.py")


class Hub:
    """A Hub with models on it, and the images that they made before they were pushed."""

    def __init__(self, server: FakeHub, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.images: dict[str, torch.Tensor] = {}
        self.client: dict[str, str | None] = {}
        self.answers = folder / "client"
        self.answers.mkdir()

    def push(self, pipeline: DiffusionPipeline, repo_id: str, *words: str, **options: Any) -> Path:
        """Save a pipeline and push the folder."""
        folder = self.folder / repo_id
        pipeline.save_pretrained(str(folder), **options)
        assert push([str(folder), "--hub_model_id", repo_id, "--hub_token", TOKEN, *words]) == 0
        return folder

    def environment(self, home: str) -> dict[str, str]:
        """Variables of a client with a cache of its own."""
        return {
            "HF_ENDPOINT": self.server.endpoint,
            "HF_HOME": str(self.folder / home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


def train_and_push(
    hub: Hub, kind: str, name: str, script: ModuleType = script, calls: int | None = 3, **options: Any
) -> torch.Tensor:
    """A run of two steps that uploads; returns its images."""
    inputs = hub.folder / f"inputs-{name}"
    data = make_dataset(inputs / "data", side=16 if kind.endswith("vae") else 8)
    scheduler = options.pop("scheduler", {})
    options = {"max_train_steps": 2, "push_to_hub": True, "hub_token": TOKEN, "num_validation_images": 1, **options}
    untrained = save_untrained(inputs / "untrained", kind, **scheduler)
    run_script(script, command_line(untrained, data, hub.folder / name, **options))
    return sample(FlowMatchPipeline.from_pretrained(hub.folder / name), calls)


def lora_of(pipeline: StableDiffusion3Pipeline, folder: Path) -> torch.Tensor:
    """Random LoRA weights of a pipeline; returns the images that they give."""
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v"]
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))
    layers = get_peft_model_state_dict(pipeline.transformer)
    StableDiffusion3Pipeline.save_lora_weights(str(folder), transformer_lora_layers=layers)
    return draw(pipeline)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with fake_hub() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        hub = Hub(server, tmp_path_factory.mktemp("hub"))
        server.part_size = 30_000
        images = hub.images

        images["own_class"] = images["from_the_cache"] = train_and_push(hub, "unet-classes", "unet-classes")
        images["generic_class"] = images["device_map"] = train_and_push(hub, "dit-vae", "dit-vae")
        images["class_embedder"] = train_and_push(hub, "sd3-vae", "sd3-vae", hub_license="mit")
        options = {"max_train_steps": 4, "learning_rate": 3e-2, "interval_warmup_steps": 0}
        images["few_steps"] = train_and_push(hub, "unet-classes", "few-steps", FLOW_MAP, None, **options)
        train_and_push(hub, "unet", "vp", scheduler={"path": "vp", "prediction_type": "epsilon"})

        pipeline = tiny_pipeline("unet-classes", path="cosine", prediction_type="v_prediction")
        images["pushes"] = images["revision"] = images["sharded"] = images["private"] = sample(pipeline)
        images["bad_day"] = images["pushes"]
        hub.push(pipeline, "our/flaky")
        hub.push(pipeline, "someone/unet-classes", "--hub_revision", "experiment")
        hub.push(pipeline, "someone/sharded", max_shard_size="40KB")
        hub.push(pipeline, "our/private", "--hub_private_repo")
        half = FlowMatchPipeline.from_pretrained(hub.folder / "our/private", torch_dtype=torch.float16)
        hub.push(half, "someone/variants", variant="fp16")
        images["variant"] = sample(half.to(torch.float32))
        hub.push(pipeline, "someone/variants")

        # A repository of others, whose weights are a pickle: nothing of ours pushes one.
        pipeline.save_pretrained(hub.folder / "pickles", safe_serialization=False)
        images["pickles"] = images["pushes"]
        put(server, "our/pickles", hub.folder / "pickles")
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(str(hub.folder / "stock-sd3" / "scheduler"))
        put(server, "our/stock-sd3", hub.folder / "stock-sd3")
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
            str(hub.folder / "stock-sd15" / "scheduler")
        )
        put(server, "our/stock-sd15", hub.folder / "stock-sd15")

        ours = tiny_stable_diffusion_3(scheduler=FlowMatchScheduler(shift=3.0, timestep_spacing="linspace"))
        images["text_to_image"] = images["text_to_image_with_our_scheduler"] = images["stock"] = draw(ours)
        hub.push(with_stock_scheduler(ours), "someone/sd3")
        hub.push(ours, "someone/sd3-ours")
        scheduler = FlowMatchScheduler(solver="flow_map", flow_map={"first_block": 1})
        few_steps = tiny_stable_diffusion_3(scheduler=scheduler)
        hub.push(few_steps, "someone/sd3-few-steps")
        images["few_steps_text_to_image"] = draw(with_flow_map(few_steps))
        assert not torch.equal(images["few_steps_text_to_image"], images["stock"])
        images["lora"] = lora_of(ours, hub.folder / "lora")
        assert push([str(hub.folder / "lora"), "--hub_model_id", "someone/lora", "--hub_token", TOKEN]) == 0

        # Answers break off and connections drop: the client asks again.
        for how in ("half", "drop"):
            server.fail("GET /someone/.*/resolve/.*safetensors", how, 2)
        server.fail("GET /our/flaky/resolve/.*safetensors", 503)
        check_processes(TESTS / "pull_client.py", [hub.answers], **hub.environment("cache"))
        hub.client = json.loads((hub.answers / "results.json").read_text())
        yield hub


def put(server: FakeHub, repo_id: str, folder: Path) -> None:
    """A repository with the files of a folder."""
    server.create(repo_id)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): path for path in paths}
    contents = {name: File(path.read_bytes(), is_lfs="model" in path.stem) for name, path in files.items()}
    server.commit(repo_id, "main", "All", contents)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_a_fresh_process_pulls(hub: Hub, name: str) -> None:
    assert hub.client[name] is None, hub.client[name]
    if name in hub.images:
        pulled = torch.load(hub.answers / f"{name}.pt")
        # The same weights, grid and noise: the same arithmetic.
        torch.testing.assert_close(pulled, hub.images[name], rtol=0, atol=1e-6)
        assert pulled.std() > 0.01


def test_different_models_give_different_images(hub: Hub) -> None:
    """The comparison above would notice the wrong weights."""
    assert (hub.images["lora"] - hub.images["text_to_image"]).abs().max() > 0.01
    assert (hub.images["own_class"] - hub.images["revision"]).abs().max() > 0.01
    flow = FlowMatchPipeline.from_pretrained(hub.folder / "few-steps")
    flow.scheduler = flow.scheduler.with_settings(solver="euler")
    assert (hub.images["few_steps"] - sample(flow, 2)).abs().max() > 1e-3


STOCK_READER = """
import sys
sys.modules["diffusers_fm"] = None  # an import of it is an error
import torch
from diffusers import StableDiffusion3Pipeline
pipeline = StableDiffusion3Pipeline.from_pretrained("someone/sd3")
options = {"height": 16, "width": 16, "num_inference_steps": 3, "max_sequence_length": 16, "output_type": "pt"}
torch.save(pipeline(sys.argv[1], generator=torch.Generator().manual_seed(0), **options).images, sys.argv[2])
"""


def test_a_reader_without_this_package_pulls_stock_class_names(hub: Hub) -> None:
    file = hub.answers / "stock.pt"
    run_stock(STOCK_READER, PROMPT, file, **hub.environment("other-cache"))
    assert list((hub.folder / "other-cache").rglob("model_index.json"))
    torch.testing.assert_close(torch.load(file), hub.images["stock"], rtol=0, atol=1e-4)


def test_every_card_is_valid(hub: Hub) -> None:
    for repo_id, repository in hub.server.repos.items():
        for branch in repository.branches:
            card = hub.server.files(repo_id, branch).get("README.md")
            if card is not None:
                data = ModelCard(card.decode()).data
                data.to_yaml()
                ModelCard(card.decode()).validate()
                assert data.library_name == "diffusers", repo_id


def test_nothing_of_the_machine_is_on_the_hub(hub: Hub) -> None:
    for repo_id in set(hub.server.repos) - {"our/pickles"}:
        for name, content in hub.server.files(repo_id).items():
            assert not name.endswith((".bin", ".pt", ".pkl", ".ckpt", ".py", ".parquet")), (repo_id, name)
            for secret in (TOKEN, str(hub.folder), str(Path.home())):
                assert secret.encode() not in content, (repo_id, name, secret)
