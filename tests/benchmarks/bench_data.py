# SPDX-License-Identifier: Apache-2.0
"""Time that `train_flow_matching.py` waits for data on this machine.

    python tests/benchmarks/bench_data.py

Folders of PNG (32 x 32) and JPEG (340 x 256, brought to 256 x 256) pictures of noise are trained on by small UNets,
which take less time for an image than any that would be trained in earnest, so that data is asked for faster. By row,
the small pictures are decoded once and kept, as they would be up to 175,000 of them; the large ones are too many for
that. Streams decode at each visit. Printed are images/s of the loader alone and of training, and the part of the
training's time that was spent waiting for batches, the first of them not counted.
"""

import argparse
import importlib.util
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from diffusers import UNet2DModel

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.order import StreamSampler, make_loader
from diffusers_fm.data.sources import load_splits, stream_splits
from diffusers_fm.data.streams import StreamBatches, StreamData, StreamPosition
from diffusers_fm.data.transforms import ImageTransform


ROOT = Path(__file__).parents[2]
# Side, file ending, size and number of the pictures, batch size, channels of the network.
CASES: dict[str, tuple[int, str, tuple[int, int], int, int, tuple[int, ...]]] = {
    "32 x 32 PNG": (32, "png", (32, 32), 2000, 32, (16, 32)),
    "256 x 256 JPEG": (256, "jpg", (340, 256), 2800, 4, (8, 16, 32)),
}
DISTINCT = 100


def write_pictures(folder: Path, ending: str, size: tuple[int, int], count: int) -> None:
    """Smooth noise: files as large as photographs of that size."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        file = folder / f"{number}.{ending}"
        if number >= DISTINCT:
            file.write_bytes((folder / f"{number % DISTINCT}.{ending}").read_bytes())
            continue
        coarse = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)
        image.save(file, **({"quality": 90} if ending == "jpg" else {}))


def save_pipeline(folder: Path, side: int, channels: tuple[int, ...]) -> None:
    """An untrained UNet."""
    count = len(channels)
    unet = UNet2DModel(
        sample_size=side,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * count,
        up_block_types=("UpBlock2D",) * count,
    )
    FlowMatchPipeline(FlowMatchScheduler(), unet=unet).save_pretrained(folder)


def loader_speed(pictures: Path, side: int, batch_size: int, workers: int, streaming: bool, num_batches: int) -> float:
    """Images/s of the loader alone."""
    transform = ImageTransform(side, 3, random_flip=True)
    if streaming:
        data = StreamData(stream_splits(train_data_dir=str(pictures))["train"], transform)
        position = StreamPosition(data, batch_size, 1, workers)
        loader = make_loader(StreamBatches(position, num_batches + 1), num_workers=workers)
    else:
        cache_dir = str(pictures.parent / "cache")
        rows = load_splits(train_data_dir=str(pictures), cache_dir=cache_dir)["train"]
        images = ImageData(rows, transform)
        loader = make_loader(images, StreamSampler(len(images), 0, batch_size, num_steps=num_batches + 1), workers)
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch["images"]) for batch in batches)
    return count / (time.perf_counter() - start)


def training_speed(
    script: Any, pipeline: Path, pictures: Path, batch_size: int, workers: int, streaming: bool, num_steps: int
) -> tuple[float, float]:
    """Images/s of training, and the part of its time that waits for data."""
    with tempfile.TemporaryDirectory() as folder:
        line = f"--pretrained_model_name_or_path={pipeline} --train_data_dir={pictures} --output_dir={folder} --seed=0"
        line += f" --cache_dir={pictures.parent / 'cache'} --dataloader_num_workers={workers} --random_flip"
        line += f" --train_batch_size={batch_size} --max_train_steps={num_steps} --num_validation_images=0"
        line += f" --logging_steps={max(1, num_steps // 4)} --checkpointing_steps=1000000 --report_to=none --use_cpu"
        # No search for a solver at the end.
        line += " --num_inference_steps=1"
        script.main(parse_arguments(script.ScriptArguments, [*line.split(), *["--streaming"] * streaming]))
        lines = [json.loads(each) for each in (Path(folder) / "log.jsonl").read_text().splitlines()]
    # The first lines hold the start of the workers.
    told = [each for each in lines if "time_share/data" in each][1:]
    speed = float(np.mean([each["images_per_second"] for each in told]))
    return speed, float(np.mean([each["time_share/data"] for each in told]))


def load_script() -> Any:
    """The training script as a module."""
    file = ROOT / "training_scripts" / "train_flow_matching.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="Which of them.")
    parser.add_argument("--num_steps", type=int, default=16, help="Training steps of each case.")
    parser.add_argument("--num_images", type=int, help="Pictures of each case, in place of its own number.")
    parser.add_argument("--train_batch_size", type=int, help="In place of each case's own.")
    parser.add_argument("--num_batches", type=int, help="Batches of the loader alone; by default of 400 pictures.")
    args = parser.parse_args()
    script = load_script()
    logging.disable(logging.WARNING)
    print(f"{'data':16} {'read':9} {'workers':>7} {'loader images/s':>15} {'training images/s':>17} {'waiting':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            side, ending, size, count, batch_size, channels = CASES[name]
            batch_size = args.train_batch_size or batch_size
            place = Path(folder) / name.replace(" ", "")
            write_pictures(place / "pictures", ending, size, args.num_images or count)
            save_pipeline(place / "pipeline", side, channels)
            for streaming in (False, True):
                for workers in (0, 1):
                    num_batches = args.num_batches or max(12, 400 // batch_size)
                    alone = loader_speed(place / "pictures", side, batch_size, workers, streaming, num_batches)
                    speed, waiting = training_speed(
                        script, place / "pipeline", place / "pictures", batch_size, workers, streaming, args.num_steps
                    )
                    read = "streaming" if streaming else "by row"
                    print(f"{name:16} {read:9} {workers:7} {alone:15.0f} {speed:17.1f} {waiting:8.1%}", flush=True)


if __name__ == "__main__":
    main()
