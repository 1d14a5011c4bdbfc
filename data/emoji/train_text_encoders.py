# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "diffusers", "tokenizers", "transformers"]
# ///
"""Write `pipelines/sd3-emoji` with tokenizers and text encoders that know the words of its captions, and its rows.

    python data/emoji/train_text_encoders.py --output_dir runs/emoji-words

The first CLIP is trained on captions and images of the training split by the contrastive loss of CLIP (Radford et al.,
arXiv 2103.00020, figure 3), against a linear map of the images' principal components. The second is random, its tokens
nearly the words' vectors, as in `pipelines/sd3-tiny`. The rows are the emoji with a skin tone, which the network then
trains on.
"""

import argparse
import runpy
import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection


ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "pipelines" / "sd3-emoji"
NUM_COMPONENTS = 256
SIDE = 16


def load_split(split: str) -> datasets.Dataset:
    """Rows of the emoji."""
    return datasets.load_dataset(str(Path(__file__).parent), split=split)


def pixels(rows: datasets.Dataset) -> torch.Tensor:
    """Images of side 16 as vectors with values in [0, 1]."""
    images = [np.asarray(image.resize((SIDE, SIDE))) for image in rows["image"]]
    return torch.from_numpy(np.stack(images)).flatten(1).float() / 255


def text_encoder(name: str) -> CLIPTextModelWithProjection:
    """An untrained text encoder of the pipeline."""
    return CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(PIPELINE / name))


def main(output_dir: Path, data_dir: Path, num_steps: int, batch_size: int) -> None:
    """Train, say how many held-out captions find their image, and write both folders."""
    torch.manual_seed(0)
    rows, held_out = load_split("train"), load_split("test")
    captions = list(rows["text"])
    words = sorted({caption for several in captions for caption in several})
    tokenizer = runpy.run_path(str(ROOT / "data" / "digits" / "make_tokenizers.py"))["clip_tokenizer"](words)
    text = text_encoder("text_encoder").train()
    tokenizer.model_max_length = text.config.max_position_embeddings

    def read(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    counts = [len(several) for several in captions]
    tokens = read([caption for several in captions for caption in several]).split(counts)
    images = pixels(rows)
    mean = images.mean(0)
    _, scale, components = torch.linalg.svd(images - mean, full_matrices=False)
    basis = components[:NUM_COMPONENTS].T / scale[:NUM_COMPONENTS] * len(images) ** 0.5
    basis *= (scale[:NUM_COMPONENTS] / scale[0]).sqrt()
    points = (images - mean) @ basis

    tower = nn.Linear(points.shape[1], text.config.projection_dim)
    log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07)))
    parameters = [*text.parameters(), *tower.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_steps, pct_start=0.1)
    for step in range(num_steps):
        chosen = torch.randperm(len(rows))[:batch_size].tolist()
        batch = torch.stack([tokens[i][torch.randint(len(tokens[i]), ())] for i in chosen])
        left = functional.normalize(text(batch).text_embeds, dim=1)
        right = functional.normalize(tower(points[chosen]), dim=1)
        logits = log_scale.exp().clamp(max=100) * left @ right.T
        target = torch.arange(len(chosen))
        loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    text.eval()
    with torch.no_grad():
        left = functional.normalize(text(read([several[0] for several in held_out["text"]])).text_embeds, dim=1)
        right = functional.normalize(tower((pixels(held_out) - mean) @ basis), dim=1)
    found = (left @ right.T).argmax(1) == torch.arange(len(held_out))
    print(f"{found.double().mean():.1%} of {len(held_out)} held-out captions find their image among all of them")

    shutil.copytree(PIPELINE, output_dir, dirs_exist_ok=True)
    text.save_pretrained(output_dir / "text_encoder")
    text_encoder("text_encoder_2").save_pretrained(output_dir / "text_encoder_2")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(output_dir / name)
    for split in ("train", "test"):
        with_tone = load_split(split).filter(lambda tone: tone != "none", input_columns="tone")
        with_tone.to_parquet(data_dir / f"{split}.parquet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Pipeline folder to write.")
    parser.add_argument("--data_dir", type=Path, default=Path("runs/emoji-tones"), help="Folder of the rows to write.")
    parser.add_argument("--num_steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=256)
    main(**vars(parser.parse_args()))
