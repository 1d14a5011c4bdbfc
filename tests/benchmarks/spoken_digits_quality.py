# SPDX-License-Identifier: Apache-2.0
"""Quality of the clips that a pipeline of spoken digits draws: read by a classifier, loudness, and nearest real clips.

    python tests/benchmarks/spoken_digits_quality.py runs/unet-spoken-digits --output_dir runs/clips

The judge is a support vector machine on power spectra (scipy's, not those of the pipeline), trained on the real
training clips and their shifts in time by up to two frames. It reads held-out real clips, the same after a way to
spectrograms and back, and drawn clips. `--output_dir` gets a WAV file of each digit and a picture of spectrograms,
drawn ones above real ones.
"""

import argparse
import io
import json
import time
from pathlib import Path

import datasets
import numpy as np
import soundfile
import torch
from PIL import Image
from scipy.signal import stft
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

from diffusers_fm import FlowMatchAudioPipeline
from diffusers_fm.spectrograms import LogMel


DATA = Path(__file__).parents[2] / "data" / "spoken-digits"
RATE = 8000


def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Clips `(num_clips, num_samples)` with values in [-1, 1], and labels."""
    rows = datasets.load_dataset(str(DATA), split=split).cast_column("audio", datasets.Audio(decode=False))
    clips = [soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32")[0] for audio in rows["audio"]]
    return np.stack(clips), np.array(rows["label"])


def spectra(clips: np.ndarray) -> np.ndarray:
    """Logarithmic power in 32 bands of equal width, `(num_clips, 32, num_frames)`."""
    power = np.abs(stft(clips, RATE, nperseg=256, noverlap=128)[2][:, 1:]) ** 2
    return np.log10(power.reshape(len(clips), 32, 4, -1).mean(2) + 1e-7)


def flat(features: np.ndarray) -> np.ndarray:
    """Features of the judge, of order one."""
    return (features.reshape(len(features), -1) + 7) / 3


def picture(drawn: torch.Tensor, real: torch.Tensor) -> Image.Image:
    """Spectrograms `(10, 32, 32)` with values in [-1, 1], low frequencies at the bottom, four times as large."""
    rows = [
        torch.cat(list(torch.nn.functional.pad(each.flip(1), (1, 1, 1, 1), value=1.0)), 1) for each in (drawn, real)
    ]
    pixels = ((torch.cat(rows) + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize((4 * pixels.shape[1], 4 * pixels.shape[0]), Image.Resampling.NEAREST)


def measure(folder: str, num_clips: int, guidance_scale: float, output_dir: Path | None) -> dict[str, float]:
    """Figures by name; see the head of this file."""
    clips, labels = load_split("train")
    held_out, held_out_labels = load_split("test")
    shifted = np.concatenate([np.roll(spectra(clips), shift, axis=2) for shift in range(-2, 3)])
    judge = SVC(gamma=0.001, C=10.0).fit(flat(shifted), np.tile(labels, 5))

    pipeline = FlowMatchAudioPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    wanted = np.arange(num_clips) % 10
    start = time.perf_counter()
    output = pipeline(
        class_labels=wanted.tolist(),
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    seconds = time.perf_counter() - start
    drawn = output.audios[:, 0]
    log_mel: LogMel = pipeline.log_mel
    back = log_mel.decode(log_mel.encode(torch.from_numpy(held_out))).numpy()
    neighbors = NearestNeighbors(n_neighbors=1).fit(flat(spectra(clips)))
    distances = {
        name: neighbors.kneighbors(flat(spectra(each)))[0] for name, each in (("drawn", drawn), ("real", back))
    }
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        for digit, clip in enumerate(drawn[:10]):
            soundfile.write(output_dir / f"{digit}.wav", clip, pipeline.config.sampling_rate, subtype="PCM_16")
        first = [int(np.flatnonzero(held_out_labels == digit)[0]) for digit in range(10)]
        pair = [log_mel.encode(torch.from_numpy(each))[:, 0] for each in (drawn[:10], held_out[first])]
        picture(*pair).save(output_dir / "spectrograms.png")
    return {
        "real_held_out_read": float(judge.score(flat(spectra(held_out)), held_out_labels)),
        "real_there_and_back_read": float(judge.score(flat(spectra(back)), held_out_labels)),
        "drawn_read": float(judge.score(flat(spectra(drawn)), wanted)),
        "drawn_peak_median": float(np.median(np.abs(drawn).max(1))),
        "drawn_silent": int((np.abs(drawn).max(1) < 0.05).sum()),
        "drawn_clipped_samples": int((np.abs(drawn) >= 1).sum()),
        "nearest_real_clip_drawn": float(np.median(distances["drawn"])),
        "nearest_real_clip_held_out": float(np.median(distances["real"])),
        "calls": output.nfe,
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_clips", type=int, default=500)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    print(json.dumps(measure(args.folder, args.num_clips, args.guidance_scale, args.output_dir), indent=2))
