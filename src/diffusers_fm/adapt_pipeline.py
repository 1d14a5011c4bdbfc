# SPDX-License-Identifier: Apache-2.0
r"""Make an untrained pipeline for a folder of your own images: their classes, their size, and a recipe to train it.

    python -m diffusers_fm.adapt_pipeline pipelines/unet-images32 \
      --train_data_dir photos --classes auto --output my-pipeline

Then `training_scripts/train_flow_matching.py --config my-pipeline/training.json` trains it.
"""

import json
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import datasets

from .arguments import Arguments, Count, option, run_command
from .data.sources import choose_split, class_names, load_splits
from .pipelines import FlowMatchPipeline, init_pipeline
from .pipelines.components import has_weights


RECIPE = "training.json"


@dataclass(frozen=True, kw_only=True)
class AdaptArguments(Arguments):
    """Pipeline, data and output."""

    _argument_group_name = "adapt"

    pretrained_model_name_or_path: str = option(
        MISSING, "Folder of an untrained pipeline, such as those of pipelines/."
    )
    output: str = option(MISSING, "Folder to write; it must not exist.")
    train_data_dir: str | None = option(None, "Folder of images, classes in subfolders.")
    dataset_name: str | None = option(None, "Hub id or local folder of a data set instead.")
    train_split: str = option("train", "Split whose classes are counted.")
    label_column: str = option("label", "Column of the labels.")
    classes: str = option("auto", "auto for those of the data, none, or their number.")
    resolution: Count | None = option(None, "Side of the images; by default the pipeline's.")

    def check(self) -> None:
        if self.classes not in ("auto", "none") and not (self.classes.isdecimal() and int(self.classes) > 0):
            raise ValueError(f"--classes must be auto, none or a number of at least 1, got {self.classes!r}.")
        if self.classes == "auto" and (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("--classes auto needs exactly one of --train_data_dir and --dataset_name.")
        if Path(self.output).exists():
            raise ValueError(f"{self.output!r} exists already: give a new folder.")


def find_classes(args: AdaptArguments) -> dict[int, str] | int:
    """
    Classes of the data by label, or their number where they have no names.

    Raises:
        ValueError: if there are none in the data and `--classes auto` asks for them.
    """
    if args.classes != "auto":
        return 0 if args.classes == "none" else int(args.classes)
    split: Any = choose_split(load_splits(args.dataset_name, None, args.train_data_dir), args.train_split)
    feature = split.features.get(args.label_column)
    if isinstance(feature, datasets.ClassLabel):
        return class_names(split, args.label_column) or 0
    if feature is None:
        raise ValueError(
            f"The images of {args.train_data_dir or args.dataset_name!r} have no classes: put those of each class into"
            " a subfolder of its name, or give --classes none."
        )
    return max(split[args.label_column]) + 1


def with_classes(components: dict[str, dict[str, Any]], num_classes: int) -> int | None:
    """Put a number of classes and a null class into configurations of components; `num_classes` of the pipeline."""
    network = components.get("unet") or components["transformer"]
    if "class_embedder" in components:
        components["class_embedder"]["num_classes"] = num_classes
    elif network["_class_name"] == "DiTTransformer2DModel":
        network["num_embeds_ada_norm"] = num_classes
    else:
        network["num_class_embeds"] = num_classes + 1 if num_classes else None
        return num_classes or None
    return None


def adapt(args: AdaptArguments) -> None:
    """
    Write an untrained pipeline for the data, and its recipe.

    Raises:
        ValueError: if the pipeline is trained, is no [`FlowMatchPipeline`], or does not take such images.
    """
    source = Path(args.pretrained_model_name_or_path)
    if not (source / "model_index.json").is_file():
        raise ValueError(f"The folder {str(source)!r} is no pipeline: it holds no model_index.json.")
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    declared = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    network = "unet" if "unet" in declared else "transformer"
    if index["_class_name"] != FlowMatchPipeline.__name__ or network not in declared:
        raise ValueError(f"{str(source)!r} must hold a FlowMatchPipeline, got a {index['_class_name']}.")
    if has_weights(source / network):
        raise ValueError(f"{str(source)!r} is trained: only an untrained pipeline gets another number of classes.")
    configs = {name: next((source / name).glob("*config.json")) for name in declared}
    components = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in configs.items()}

    classes = find_classes(args)
    count = classes if isinstance(classes, int) else len(classes)
    index |= {"num_classes": with_classes(components, count), "id2label": None if classes == count else classes}
    if args.resolution is not None:
        untrained: FlowMatchPipeline = init_pipeline(source, empty=True)
        components[network]["sample_size"] = untrained.latent_shape(args.resolution, args.resolution)[-1]

    recipe: dict[str, Any] = {}
    if (source / RECIPE).is_file():
        recipe = json.loads((source / RECIPE).read_text(encoding="utf-8"))
    data = {"train_data_dir": args.train_data_dir, "dataset_name": args.dataset_name, "train_split": args.train_split}
    recipe = {name: value for name, value in recipe.items() if name not in data and name != "resolution"}
    recipe |= {"pretrained_model_name_or_path": args.output, "label_column": args.label_column}
    recipe |= {name: value for name, value in data.items() if value is not None}
    output = Path(args.output)
    files = {f"{name}/{file.name}": components[name] for name, file in configs.items()}
    for name, values in {**files, "model_index.json": index, RECIPE: recipe}.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    pipeline = init_pipeline(output, empty=True, pipeline_class=FlowMatchPipeline)
    size = " x ".join(map(str, pipeline.latent_shape()))
    names = "" if isinstance(classes, int) else f" ({', '.join(classes.values())})"
    parameters = sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
    print(f"{output}: {count or 'no'} classes{names}, samples of {size}, {parameters / 1e6:.1f} M parameters.")


def main(argv: list[str] | None = None) -> int:
    """Adapt a pipeline by a command line: 0 if it succeeded; 2, and a sentence, if not."""
    return run_command("adapt_pipeline", adapt, AdaptArguments, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
