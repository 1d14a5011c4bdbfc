# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "pillow"]
# ///
"""Write the three parquet files of this folder from two npm packages: Google's emoji images and Unicode's keywords.

    python data/emoji/make_emoji.py
    python data/emoji/make_emoji.py --size 64 --output_dir runs/emoji-64

The packages are fetched by `npm pack` into a temporary folder; `--packages` names a folder that has them already. The
64 x 64 images are composed over white and reduced by Lanczos' filter. Skin tones, splits and captions are described in
README.md.
"""

import argparse
import io
import json
import random
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage


IMAGES, KEYWORDS = "emoji-datasource-google@16.0.0", "cldr-annotations-modern@45.0.0"
SEED = 0
NUM_TEST = 200
VALIDATION_SHARE = 0.1
CAPTIONS_OF_IMAGE = 8

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
OPENINGS = ("", "an emoji of ", "a picture of ", "a small drawing of ", "the icon ")


def unpack(packages: Path, name: str, member: str) -> tarfile.TarFile:
    """Archive of an npm package, which is fetched where the folder lacks it.

    Raises:
        `ValueError`: The archive has no file `member`.
    """
    archive = packages / f"{name.replace('@', '-')}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", name], cwd=packages, check=True)
    package = tarfile.open(archive)
    if member not in package.getnames():
        raise ValueError(f"{archive} has no file {member}.")
    return package


def rows(packages: Path, size: int) -> Iterator[dict]:
    """Rows of the table, one for each image; `text` holds the descriptions without openings."""
    keyword_file = "package/annotations/en/annotations.json"
    with unpack(packages, KEYWORDS, keyword_file) as package:
        annotations = json.load(package.extractfile(keyword_file))["annotations"]["annotations"]
    with unpack(packages, IMAGES, "package/emoji.json") as package:
        images = {}
        emoji = []
        for member in package:
            if member.name == "package/emoji.json":
                emoji = json.load(package.extractfile(member))
            elif member.name.startswith("package/img/google/64/"):
                images[Path(member.name).name] = to_png(package.extractfile(member).read(), size)
    for entry in sorted(emoji, key=lambda entry: entry["sort_order"]):
        annotation = annotations.get(characters(entry["unified"].replace("-FE0F", "")), {})
        name = annotation.get("tts", [entry["name"].lower()])[0]
        common = {
            "emoji": characters(entry["unified"]),
            "name": name,
            "label": entry["category"],
            "subcategory": entry["subcategory"],
        }
        descriptions = [name, *(short.replace("_", " ").replace("-", " ") for short in entry["short_names"])]
        keywords = [word for word in annotation.get("default", []) if word != name]
        if len(keywords) > 1:
            descriptions.append(", ".join(keywords))
        for codes, variation in [("", entry), *entry.get("skin_variations", {}).items()]:
            tones = [TONES[code] for code in codes.split("-")] if codes else []
            yield common | {
                "image": {"bytes": images[variation["image"]], "path": None},
                "tone": " and ".join(tones) or "none",
                "text": [with_tones(description, tones) for description in dict.fromkeys(descriptions)],
            }


def characters(codes: str) -> str:
    """Characters of hexadecimal code points that are joined by `-`."""
    return "".join(chr(int(code, 16)) for code in codes.split("-"))


def with_tones(description: str, tones: list[str]) -> str:
    """Description with the skin tones of one person or of two."""
    return f"{description}, {' and '.join(f'{tone} skin tone' for tone in tones)}" if tones else description


def to_png(contents: bytes, size: int) -> bytes:
    """PNG file of an image that is composed over white and reduced to `size` pixels."""
    image = PILImage.open(io.BytesIO(contents)).convert("RGBA")
    image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.resize((size, size), PILImage.Resampling.LANCZOS).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def splits(table: list[dict]) -> dict[str, list[dict]]:
    """Train, validation (emoji that are in no other split) and test (pairs of emoji and skin tone)."""
    generator = random.Random(SEED)
    toned = {row["emoji"] for row in table if row["tone"] in TONES.values()}
    variations = Counter(row["emoji"] for row in table)
    by_category: dict[str, list[str]] = {}
    for row in table:
        if row["tone"] == "none":
            by_category.setdefault(row["label"], []).append(row["emoji"])
    unseen = {
        emoji
        for category in by_category.values()
        for emoji in generator.sample(category, round(VALIDATION_SHARE * len(category)))
    }
    candidates = sorted(emoji for emoji in toned - unseen if variations[emoji] == 6)
    pairs = {(emoji, generator.choice([*TONES.values()])) for emoji in generator.sample(candidates, NUM_TEST)}
    result: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for row in table:
        held_out = (row["emoji"], row["tone"]) in pairs
        result["validation" if row["emoji"] in unseen else "test" if held_out else "train"].append(row)
    return result


def captions(row: dict, generator: random.Random) -> list[str]:
    """Captions of one image: the plain descriptions first, then openings before them, drawn by seed."""
    opened = [opening + description for description in row["text"] for opening in OPENINGS[1:]]
    plain = row["text"][:CAPTIONS_OF_IMAGE]
    return plain + generator.sample(opened, min(len(opened), CAPTIONS_OF_IMAGE - len(plain)))


def main(output_dir: Path, size: int, packages: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        table = [*rows(packages or Path(temporary), size)]
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=sorted({row["label"] for row in table})),
            "subcategory": ClassLabel(names=sorted({row["subcategory"] for row in table})),
            "emoji": Value("string"),
            "name": Value("string"),
            "tone": Value("string"),
            "text": List(Value("string")),
        }
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, chosen in splits(table).items():
        generator = random.Random(SEED)
        dataset = Dataset.from_list([row | {"text": captions(row, generator)} for row in chosen], features=features)
        dataset.to_parquet(output_dir / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(chosen)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--size", type=int, default=32, help="Height and width in pixels, at most 64.")
    parser.add_argument("--packages", type=Path, help="Folder with the two npm packages as `NAME-VERSION.tgz`.")
    main(**vars(parser.parse_args()))
