# SPDX-License-Identifier: Apache-2.0
"""What the options that may make learning faster are worth: held-out loss, distance and accuracy by option and seed.

    python tests/benchmarks/training_options.py --config pipelines/dit-digits/training.json --output_dir runs/options
    python tests/benchmarks/training_options.py --config pipelines/dit-emoji/training.json --output_dir runs/options

Each row is a run of train_flow_matching.py with the recipe's network and one option. FD is the Frechet distance of
drawn to training images by the features of a small classifier, `read` the part of them that another classifier reads
as asked, a mean over the classes. REPA's teacher is a small vision transformer, trained to read the training images.
MixFlow is for some steps after training: its row has a quarter of the steps more, and the row `longer` beside it has
them without. A run that is there is not repeated.
"""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from emoji_quality import by_group, draw
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from diffusers_fm import init_pipeline
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.latents import normalize
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.evaluation.distances import frechet_distance
from diffusers_fm.evaluation.features import FeatureExtractor, classifier_features, train_classifier


SCRIPT = Path(__file__).parents[2] / "training_scripts" / "train_flow_matching.py"
AFTER = {"longer": [], "mixflow": ["--mixflow_slowing", 0.8, "--timestep_density", "beta", "--density_beta", 2]}
DATA_PREDICTION = {"data": [], "data, clipped": ["--weight_clip", 0.05]}


def options(teacher: Path, middle: int, semidiscrete_steps: int) -> dict[str, list[Any]]:
    """Arguments of each option; the self-alignment is of the block in the middle with the last but one."""
    repa = ["--repa_teacher", teacher, "--repa_width", 256]
    return {
        "none": [],
        "contrastive": ["--contrastive_weight", 0.05],
        "repa": repa,
        "irepa": [*repa[:2], "--repa_projector", "conv", "--repa_mean_share", 0.6],
        "second head": ["--internal_block", middle],
        "self-alignment": ["--self_block", max(1, middle - 1), "--self_teacher_block", middle + 1],
        "shift": ["--shift_base_dimension", 4096],
        "semidiscrete": ["--semidiscrete_ot", "--semidiscrete_steps", semidiscrete_steps],
    }


def train_teacher(data: ImageData, num_classes: int, side: int, folder: Path, num_steps: int = 400) -> None:
    """Save a small vision transformer that was trained to read the images."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=side,
        patch_size=side // 8 if side >= 16 else 2,
        num_labels=num_classes,
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(num_steps):
        generator = np.random.default_rng(step)
        rows = generator.integers(len(data), size=64)
        batch = data[np.stack([np.full(64, step), rows], axis=1)]
        down, across = generator.integers(-1, 2, size=2).tolist()
        images = torch.roll(normalize(batch["images"]), (down, across), (-2, -1))
        loss = functional.cross_entropy(model(images.expand(-1, 3, -1, -1)).logits, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.vit.save_pretrained(folder)


class Judge:
    """Figures of a pipeline's samples against the training images."""

    def __init__(self, data: ImageData, num_classes: int, file: Path) -> None:
        self.features = classifier_features(file, data, num_classes, torch.device("cpu"))
        reader = train_classifier(data, num_classes, seed=1)
        self.reader = FeatureExtractor("classifier", reader, torch.device("cpu"))
        rows = np.arange(len(data))
        batch = data[np.stack([np.zeros(len(data), dtype=np.int64), rows], axis=1)]
        self.reference = self.features(batch["images"])[0]

    def __call__(self, folder: Path, wanted: np.ndarray, num_inference_steps: int) -> dict[str, float]:
        """FD and the part that is read as asked."""
        drawn = torch.from_numpy(draw(folder, wanted, 1.0, num_inference_steps, batch_size=100))
        distance = frechet_distance(self.features(drawn)[0], self.reference)
        right = self.reader(drawn)[1].argmax(1) == wanted
        read = float(np.mean([*by_group(right, wanted).values()]))
        return {"fd": round(distance, 2), "read": round(read, 4)}


def train(script: dict[str, Any], args: argparse.Namespace, folder: Path, seed: int, words: list[Any]) -> list[float]:
    """Run the recipe, if it was not run, and return its held-out losses."""
    steps = args.max_train_steps
    common = ["--config", args.config, "--output_dir", folder, "--seed", seed, "--max_train_steps", steps]
    common += ["--validation_steps", max(1, steps // 3), "--num_validation_images", 0, "--report_to", "none"]
    common += [
        "--center_crop",
        "--solver",
        "abm3",
        "--num_inference_steps",
        args.num_inference_steps,
        "--checkpointing_steps",
        100_000,
    ]
    if not (folder / "model_index.json").is_file():
        script["main"](parse_arguments(script["ScriptArguments"], [*map(str, common), *map(str, words)]))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [round(line["validation_loss"], 4) for line in lines if line.get("validation_loss") is not None]


def main(args: argparse.Namespace) -> None:
    """Train each option with each seed, and print a line of JSON for each."""
    script, recipe = runpy.run_path(str(SCRIPT)), json.loads(args.config.read_text())
    source = Path(recipe["pretrained_model_name_or_path"])
    pipeline = init_pipeline(source, seed=0)
    side, channels = (pipeline.denoiser.config[name] for name in ("sample_size", "in_channels"))
    rows = datasets.load_dataset(recipe["dataset_name"], split="train")
    num_classes = rows.features["label"].num_classes
    transform = ImageTransform(side, channels, center_crop=True)
    data = ImageData(rows, transform, label_column="label", num_classes=num_classes)
    home = args.output_dir / source.name
    home.mkdir(parents=True, exist_ok=True)
    teacher, judge = home / "teacher", Judge(data, num_classes, home / "features.safetensors")
    if not teacher.is_dir():
        train_teacher(data, num_classes, side, teacher)
    middle = max(1, pipeline.denoiser.config["num_layers"] // 2)
    predicts_data = home / "predicts-data"
    pipeline.scheduler = pipeline.scheduler.with_settings(prediction_type="sample")
    pipeline.save_pretrained(predicts_data)
    counts = np.bincount(rows["label"], minlength=num_classes)
    classes = [label for label in range(num_classes) if counts[label] >= args.least_of_class]
    wanted = np.repeat(classes, args.num_images)

    every = {name: (words, None) for name, words in options(teacher, middle, args.semidiscrete_steps).items()}
    every |= {name: (words, predicts_data) for name, words in DATA_PREDICTION.items()}
    for seed in args.seeds:
        for name in [*every, *AFTER]:
            if args.options and name not in args.options:
                continue
            folder = home / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if name in AFTER:
                start = home / f"none-{seed}"
                words = [*AFTER[name], "--pretrained_model_name_or_path", start, "--learning_rate", args.after_rate]
                quarter = argparse.Namespace(**{**vars(args), "max_train_steps": args.max_train_steps // 4})
                losses = train(script, quarter, folder, seed, words)
            else:
                words, start = every[name]
                words = words + (["--pretrained_model_name_or_path", start] if start else [])
                losses = train(script, args, folder, seed, words)
            line = {"option": name, "seed": seed, "losses": losses}
            line |= judge(folder, wanted, args.num_inference_steps)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="Recipe of a class-conditional transformer.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--options", nargs="+", help="By default all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--after_rate", type=float, default=2e-4, help="Learning rate of the steps after training.")
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--semidiscrete_steps", type=int, default=1000, help="Of the fit of optimal transport.")
    parser.add_argument("--num_images", type=int, default=100, help="Of a class.")
    parser.add_argument("--least_of_class", type=int, default=50, help="Images that a class must have to be drawn.")
    main(parser.parse_args())
