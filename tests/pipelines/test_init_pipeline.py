# SPDX-License-Identifier: Apache-2.0
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import KINDS, labels_of, tiny_pipeline, tiny_vae
from torch import nn

from diffusers_fm import FlowMatchPipeline, init_pipeline


def without_weights(folder: Path) -> Path:
    """The folder of a saved pipeline, its weights taken away."""
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def untrained(kind: str, folder: Path) -> Path:
    """A folder of configs."""
    tiny_pipeline(kind).save_pretrained(folder)
    return without_weights(folder)


def weights_of(pipeline: FlowMatchPipeline) -> dict[str, torch.Tensor]:
    """All weights of a pipeline by component and name."""
    return {
        f"{component}.{name}": weight
        for component in FlowMatchPipeline._optional_components
        if getattr(pipeline, component) is not None
        for name, weight in getattr(pipeline, component).state_dict().items()
    }


def same_weights(one: FlowMatchPipeline, other: FlowMatchPipeline) -> bool:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_built_from_configs_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    pipeline = init_pipeline(untrained(kind, tmp_path / "untrained"), seed=3)
    original = tiny_pipeline(kind)
    for name in ("scheduler", *FlowMatchPipeline._optional_components):
        assert type(getattr(pipeline, name)) is type(getattr(original, name))
    assert (pipeline.num_classes, pipeline.null_class) == (original.num_classes, original.null_class)
    assert not pipeline.denoiser.training
    pipeline.save_pretrained(tmp_path / "trained")
    assert same_weights(FlowMatchPipeline.from_pretrained(tmp_path / "trained"), pipeline)
    assert same_weights(init_pipeline(tmp_path / "trained", seed=4), pipeline)


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder = untrained("sd3", tmp_path)
    state = torch.get_rng_state()
    first, second, other = init_pipeline(folder, seed=3), init_pipeline(folder, seed=3), init_pipeline(folder, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(first, second)
    assert not same_weights(first, other)


def test_without_a_seed_the_global_generator_decides(tmp_path: Path) -> None:
    folder = untrained("sd3", tmp_path)
    torch.manual_seed(5)
    first, second = init_pipeline(folder), init_pipeline(folder)
    torch.manual_seed(5)
    assert same_weights(init_pipeline(folder), first)
    assert not same_weights(first, second)


@pytest.mark.parametrize("kind", ["unet", "unet-classes", "dit", "sd3"])
def test_first_prediction_is_zero_and_can_be_learned(kind: str, tmp_path: Path) -> None:
    pipeline = init_pipeline(untrained(kind, tmp_path), seed=0)
    labels = None if pipeline.num_classes == 0 else torch.tensor(labels_of(pipeline))
    x = torch.randn(3, *pipeline.sample_shape)
    prediction = pipeline.predict(x, torch.tensor([0.0, 500.0, 1000.0]), labels)
    assert prediction.abs().max() == 0
    (prediction - 1).square().sum().backward()
    # Only the zero output layer sees a gradient at the very first step; it is enough for the next.
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in pipeline.denoiser.parameters())


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_transformer_blocks_start_as_the_identity(kind: str, tmp_path: Path) -> None:
    pipeline = init_pipeline(untrained(kind, tmp_path), seed=0)
    image_tokens = []
    for block in pipeline.transformer.transformer_blocks:
        block.register_forward_hook(
            lambda module, args, kwargs, output: image_tokens.append(
                (args[0] if args else kwargs["hidden_states"], output if torch.is_tensor(output) else output[1])
            ),
            with_kwargs=True,
        )
    pipeline.predict(torch.randn(3, *pipeline.sample_shape), 500.0, torch.tensor([0, 1, 2]))
    assert len(image_tokens) == 2
    for given, returned in image_tokens:
        torch.testing.assert_close(returned, given, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_class_tables_start_with_unit_variance(kind: str, tmp_path: Path) -> None:
    pipeline = init_pipeline(untrained(kind, tmp_path), seed=0)
    tables = [
        module.weight
        for component in (pipeline.transformer, pipeline.class_embedder)
        if component is not None
        for module in component.modules()
        if isinstance(module, nn.Embedding)
    ]
    assert tables
    for table in tables:
        # The standard deviation of n normal values is known to 1 / sqrt(2 n); five of those.
        assert abs(table.std().item() - 1) < 5 / math.sqrt(2 * table.numel())


# Autoencoders


def test_random_autoencoder_is_said_and_a_given_one_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = untrained("dit-vae", tmp_path / "untrained")
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    with caplog.at_level(logging.WARNING, logger="diffusers_fm"):
        for given in (vae, tmp_path / "vae", str(tmp_path / "vae")):
            pipeline = init_pipeline(folder, seed=0, vae=given)
            assert torch.equal(pipeline.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)
        assert caplog.text == ""
        init_pipeline(folder, seed=0)
    assert f"The autoencoder of {folder} has random weights" in caplog.text


def test_weights_that_are_there_are_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A preset whose autoencoder was put into its folder: only the transformer starts at random.
    folder = untrained("dit-vae", tmp_path)
    vae = tiny_vae()
    vae.save_pretrained(folder / "vae")
    pipeline = init_pipeline(folder, seed=0)
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)
    assert pipeline.transformer.proj_out_2.weight.abs().max() == 0
    assert caplog.text == ""


def test_variant(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd3")
    pipeline.save_pretrained(tmp_path, variant="ema")
    assert same_weights(init_pipeline(tmp_path, variant="ema"), pipeline)


# Bad input


@pytest.mark.parametrize(
    ("kind", "names"),
    [("unet", "unet"), ("dit-vae", "transformer and vae"), ("sd3", "transformer and class_embedder")],
)
def test_from_pretrained_on_a_folder_without_weights(kind: str, names: str, tmp_path: Path) -> None:
    folder = untrained(kind, tmp_path)
    with pytest.raises(ValueError, match=f"holds no weights for {names}") as error:
        FlowMatchPipeline.from_pretrained(folder)
    assert f"`diffusers_fm.init_pipeline({str(folder)!r})`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [FlowMatchPipeline.from_pretrained, init_pipeline], ids=["from_pretrained", "init"])
@pytest.mark.parametrize(("networks", "given"), [([], "neither was"), (["unet", "transformer"], "both were")])
def test_folder_with_both_or_neither_network(load: object, networks: list[str], given: str, tmp_path: Path) -> None:
    folder = untrained("unet", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DModel"] if "unet" in networks else [None, None]
    index["transformer"] = ["diffusers", "DiTTransformer2DModel"] if "transformer" in networks else [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "unet")
    # Nothing could be loaded or built from this folder: the check comes first.
    with pytest.raises(ValueError, match=f"needs either `unet` or `transformer`, {given} given"):
        load(folder)


def test_autoencoder_for_a_pipeline_on_pixels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`vae` was given, but the pipeline .* works on pixels"):
        init_pipeline(untrained("unet", tmp_path), vae=tiny_vae())


@pytest.mark.parametrize("folder", ["pipelines/unet/digits", "/pipelines"])
def test_folder_that_is_not_there(folder: str) -> None:
    with pytest.raises(ValueError, match=f"'{folder}' is neither a folder nor the id of a repository on the Hub"):
        init_pipeline(folder)


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a pipeline: it holds no model_index.json"):
        init_pipeline(tmp_path)


@pytest.mark.parametrize("library", ["antigravity", "FluxPipeline", "flux.pipeline_flux", "np"])
def test_models_of_other_libraries_are_not_imported(library: str, tmp_path: Path) -> None:
    folder = untrained("unet", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = [library, "UNet2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=f"'{library}', which is not one of diffusers, diffusers_fm, transformers: import"
    ):
        init_pipeline(folder)


def test_stock_loader_on_a_folder_without_weights_fails(tmp_path: Path) -> None:
    # diffusers' own sentence; ours needs our class.
    with pytest.raises(OSError, match="no file named"):
        DiffusionPipeline.from_pretrained(untrained("unet", tmp_path))
