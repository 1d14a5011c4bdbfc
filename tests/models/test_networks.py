# SPDX-License-Identifier: Apache-2.0
"""Networks of one's own: sequences, volumes and images, labels and tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from tiny_pipelines import NUM_CLASSES, tiny_class_embedder, tiny_pipeline

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler, init_pipeline, register_network


STD = 0.5


class OfGaussian(ModelMixin, ConfigMixin):
    """The velocity of normal data of standard deviation `STD`, plus nothing."""

    @register_to_config
    def __init__(self, in_channels: int = 2, sample_size: Any = (6,)) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        t = (timestep / 1000).reshape(-1, *[1] * (sample.ndim - 1))
        return (sample * (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) + self.nothing,)


class Images(ModelMixin, ConfigMixin):
    """A `UNet2DModel` by another name."""

    @register_to_config
    def __init__(
        self, settings: dict, in_channels: int = 1, sample_size: int = 8, num_class_embeds: int | None = None
    ) -> None:
        super().__init__()
        self.network = UNet2DModel(**settings)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None) -> Any:
        return self.network(x, timestep, class_labels)


class Tokens(ModelMixin, ConfigMixin):
    """A network that reads tokens of classes."""

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: Any = (6,)) -> None:
        super().__init__()
        self.scale = torch.nn.Linear(12, 1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return sample * self.scale(encoder_hidden_states).mean(1, keepdim=True)


@pytest.fixture(autouse=True)
def registered() -> None:
    for network in (OfGaussian, Images, Tokens):
        assert register_network(network) is network


@pytest.mark.parametrize("size", [(6,), (4, 2, 3), (3, 5)], ids=str)
def test_samples_and_densities_of_any_rank(size: tuple[int, ...]) -> None:
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), transformer=OfGaussian(sample_size=size))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    samples = pipeline(latents=noise, num_inference_steps=100, solver="rk4", output_type="latent").images
    # The flow of a Gaussian to a Gaussian is a scale; a Runge-Kutta solution of order 4 in 100 steps is as good.
    torch.testing.assert_close(samples, STD * noise, rtol=1e-4, atol=1e-5)
    if len(size) != 2:
        torch.testing.assert_close(pipeline.encode(samples), noise, rtol=1e-2, atol=1e-2)
        density = pipeline.log_likelihood(samples, num_steps=100, divergence="exact").log_prob
        exact = torch.distributions.Normal(0, STD).log_prob(samples).flatten(1).sum(1)
        torch.testing.assert_close(density.float(), exact, rtol=1e-3, atol=1e-2)
        with pytest.raises(ValueError, match="are no images: `output_type` must be latent, got 'pil'"):
            pipeline()
        with pytest.raises(ValueError, match="`images` must have the shape"):
            pipeline.encode(samples[:, :1])


def test_the_same_network_by_another_name(tmp_path: Path) -> None:
    stock = tiny_pipeline("unet-classes")
    config = {k: v for k, v in stock.unet.config.items() if not k.startswith("_")}
    network = Images(config, num_class_embeds=config["num_class_embeds"]).eval()
    network.network.load_state_dict(stock.unet.state_dict())
    own = FlowMatchPipeline(stock.scheduler, unet=network, num_classes=stock.config.num_classes)
    own.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == [__name__, "Images"]
    images = []
    for pipeline in (stock, own, FlowMatchPipeline.from_pretrained(tmp_path)):
        pipeline.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
        images += [pipeline([0, 1], generator=torch.Generator().manual_seed(0), **call).images]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_tokens_of_classes() -> None:
    embedder = tiny_class_embedder()
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), transformer=Tokens(), class_embedder=embedder)
    assert (pipeline.num_classes, pipeline.null_class) == (NUM_CLASSES, NUM_CLASSES)
    x, labels = torch.randn(2, 1, 6), torch.tensor([0, 3])
    expected = x * pipeline.transformer.scale(embedder(labels)[0]).mean(1, keepdim=True)
    torch.testing.assert_close(pipeline.predict(x, 500.0, labels), expected)
    with pytest.raises(ValueError, match="`class_embedder` belongs to a network with `encoder_hidden_states`"):
        FlowMatchPipeline(FlowMatchScheduler(), transformer=Tokens())


def test_an_untrained_folder(tmp_path: Path) -> None:
    FlowMatchPipeline(FlowMatchScheduler(), transformer=OfGaussian()).save_pretrained(tmp_path)
    next(tmp_path.glob("transformer/*.safetensors")).unlink()
    assert isinstance(init_pipeline(tmp_path).transformer, OfGaussian)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace(__name__, "their_network"))
    with pytest.raises(ValueError, match="'their_network', which is not one of .*: import the module that calls"):
        init_pipeline(tmp_path)
    with pytest.raises(ValueError, match="OfGaussian from the module 'their_network', which is not imported"):
        FlowMatchPipeline.from_pretrained(tmp_path)


class NoTime(ModelMixin, ConfigMixin):
    def __init__(self, in_channels: int, sample_size: int) -> None: ...

    def forward(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...  # pyright: ignore[reportReturnType]


class NeedsMore(NoTime):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: str) -> torch.Tensor: ...  # pyright: ignore


class NoSize(OfGaussian):
    def __init__(self, in_channels: int = 2) -> None: ...


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (NoTime, r"must take the sample first, `timestep`.*got \['sample', 't'\]"),
        (NeedsMore, r"got \['sample', 'timestep', 'text'\]"),
        (NoSize, "must have the keys `in_channels` and `sample_size`"),
        (torch.nn.Linear, "must be a subclass of diffusers' ModelMixin"),
        (3, "must be a subclass of diffusers' ModelMixin and ConfigMixin, got 3"),
    ],
)
def test_what_is_no_network_is_refused(network: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        register_network(network)
    with pytest.raises(
        ValueError, match="an SD3Transformer2DModel, got Linear; a network of your own is registered first"
    ):
        FlowMatchPipeline(FlowMatchScheduler(), transformer=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
