# SPDX-License-Identifier: Apache-2.0
"""LoRA of many families by one recipe: trained through the field, saved and loaded by the stock pipeline."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from test_families import RECIPES, conditions, make

from diffusers_fm.pipelines import VelocityField
from diffusers_fm.pipelines.families import lora_layers


# Pipelines with a loader of their own; PRX's is that of another network.
NAMES = [
    "sd3", "flux_text", "flux2_klein", "flux2", "qwen", "z_image", "sana_text", "lumina2_text", "aura", "chroma",
    "cogview4_text", "hidream", "krea2", "bria_fibo", "hunyuan_video", "wan_text", "ltx_text", "mochi_text",
    "skyreels", "sana_video", "kandinsky5_video", "ernie_image",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_lora_is_saved_loaded_and_fused(name: str, tmp_path: Path) -> None:
    family, _, x_t, t = make(name)
    both = conditions(family, [0, 1])
    stock = copy.copy(family.pipeline)
    vars(stock)["transformer"] = copy.deepcopy(family.pipeline.transformer)
    plain = copy.deepcopy(stock.transformer)
    layers = lora_layers(stock, stock.transformer)
    assert layers
    if name.startswith("flux2"):
        assert any("single_transformer_blocks" in layer for layer in layers)

    # 1. A few steps through the field
    network = stock.transformer
    network.requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=True)
    network.add_adapter(config)
    network.enable_gradient_checkpointing()
    network.train()
    field = VelocityField(stock, **family.call)
    before = field(x_t, t, **both).detach()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (field(x_t, t, **both) - 1).square().mean().backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        trained = field(x_t, t, **both)
    assert (trained - before).abs().max() > 1e-4

    # 2. Saved by the stock pipeline, loaded by a fresh one
    metadata = {"transformer_lora_adapter_metadata": config.to_dict()}
    stock.save_lora_weights(str(tmp_path), transformer_lora_layers=get_peft_model_state_dict(network), **metadata)
    fresh = copy.copy(family.pipeline)
    vars(fresh)["transformer"] = plain
    fresh.load_lora_weights(str(tmp_path))
    field = VelocityField(fresh, **family.call)
    scale = trained.abs().max()
    with torch.no_grad():
        assert (field(x_t, t, **both) - trained).abs().max() <= 1e-6 * scale
        fresh.fuse_lora(components=["transformer"])
        assert (field(x_t, t, **both) - trained).abs().max() <= 1e-6 * scale


def test_every_network_has_layers_to_adapt() -> None:
    for name, recipe in RECIPES.items():
        family = recipe()
        assert lora_layers(family.pipeline, family.pipeline.components[family.network]), name
