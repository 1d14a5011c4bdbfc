# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "scipy", "soundfile"]
# ///
"""Write the two parquet files of this folder: ten words by the voices of espeak-ng, a program that speaks.

    apt-get install espeak-ng
    python data/spoken-digits/make_spoken_digits.py

Accent, voice, pitch and speed of each clip are drawn by seed. The words are resampled to 8 kHz, cut out of their
silence, brought to one peak, and stored as FLAC of 10 significant bits; README.md describes them.
"""

import argparse
import io
import random
import subprocess
from pathlib import Path

import numpy as np
import soundfile
from datasets import Audio, ClassLabel, Dataset, Features, Value
from scipy.signal import resample_poly


SEED = 0
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLIPS_OF_WORD = {"train": 90, "test": 20}

SAMPLING_RATE, ESPEAK_RATE = 8000, 22050
NUM_SAMPLES = 4096  # 0.512 s
SILENCE_BEFORE = 160
FADE = 40
PEAK = 0.8
LEVELS = 2**9

ACCENTS = (
    *("en-gb", "en-us", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029", "en-us-nyc"),
)
# Variants that sound like people; robots, whispers and jokes are left out.
VOICES = (
    *("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "klatt", "klatt2", "klatt3"),
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Hugo", "Lee", "Marco", "Mario"),
    *("Michael", "Mike", "adam", "anika", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david"),
    *("ed", "edward", "grandma", "grandpa", "john", "linda", "max", "michel", "norbert", "pablo", "paul", "rob"),
    *("sandro", "shelby", "steph", "victor", "zac"),
)


def speak(word: str, accent: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    """A word as espeak-ng says it, resampled to 8 kHz, without the silence around it."""
    command = ["espeak-ng", "-v", f"{accent}+{voice}", "-p", str(pitch), "-s", str(speed), "--stdout", word]
    samples, rate = soundfile.read(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout))
    if rate != ESPEAK_RATE:
        raise ValueError(f"espeak-ng was expected to speak at {ESPEAK_RATE} Hz, got {rate}.")
    samples = resample_poly(samples, SAMPLING_RATE // 50, ESPEAK_RATE // 50)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    ramp = np.linspace(0, 1, FADE)
    samples[:FADE] *= ramp
    samples[-FADE:] *= ramp[::-1]
    return PEAK * samples / np.abs(samples).max()


def clips(word: str, count: int, generator: random.Random) -> list[dict]:
    """Rows of one word. A word that is too long for a clip is drawn again."""
    rows = []
    while len(rows) < count:
        accent, voice = generator.choice(ACCENTS), generator.choice(VOICES)
        pitch, speed = generator.randint(35, 65), generator.randint(170, 230)
        spoken = speak(word, accent, voice, pitch, speed)
        room = NUM_SAMPLES - SILENCE_BEFORE - len(spoken)
        if room < 0:
            continue
        samples = np.pad(np.round(spoken * LEVELS) / LEVELS, (SILENCE_BEFORE, room))
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        rows.append(
            {
                "audio": {"bytes": file.getvalue(), "path": None},
                "label": word,
                "accent": accent,
                "voice": voice,
                "pitch": pitch,
                "speed": speed,
            }
        )
    return rows


def main(output_dir: Path) -> None:
    features = Features(
        {
            # Encoding would ask for torchcodec, and the files are there already.
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "label": ClassLabel(names=[*WORDS]),
            "accent": Value("string"),
            "voice": Value("string"),
            "pitch": Value("int32"),
            "speed": Value("int32"),
        }
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    generator = random.Random(SEED)
    for split, count in CLIPS_OF_WORD.items():
        rows = [row for word in WORDS for row in clips(word, count, generator)]
        generator.shuffle(rows)
        dataset = Dataset.from_list(rows, features=features).cast_column("audio", Audio(SAMPLING_RATE, decode=False))
        dataset.to_parquet(output_dir / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(rows)} clips")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    main(**vars(parser.parse_args()))
