# SPDX-License-Identifier: Apache-2.0
"""The emoji data set: what `data/emoji` holds, and what its script makes of two packages."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from training_runs import load_script

from diffusers_fm import init_pipeline
from diffusers_fm.data.sources import load_splits


EMOJI = Path(__file__).parents[2] / "data" / "emoji"
TONES = {"light", "medium-light", "medium", "medium-dark", "dark"}


def test_counts_sizes_and_captions() -> None:
    splits = load_splits(str(EMOJI))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3221, "validation": 365, "test": 200}
    rows = [row for split in splits.values() for row in split]
    assert sum(row["tone"] == "none" for row in rows) == 1911
    for row in rows:
        assert (row["image"].size, row["image"].mode, row["image"].format) == ((32, 32), "RGB", "PNG")
        assert 1 <= len(row["text"]) == len(set(row["text"])) <= 8
        assert row["text"][0].startswith(row["name"])
        tones = [] if row["tone"] == "none" else row["tone"].split(" and ")
        assert set(tones) <= TONES
        for caption in row["text"]:
            assert caption.endswith(" and ".join(f"{tone} skin tone" for tone in tones))
            assert ("skin tone" in caption) == bool(tones) or "skin tone" in row["name"]


def test_held_out_images_have_a_known_answer() -> None:
    train, validation, test = load_splits(str(EMOJI)).values()
    assert not set(validation["emoji"]) & {*train["emoji"], *test["emoji"]}
    known = {(emoji, tone) for emoji, tone in zip(train["emoji"], train["tone"])}
    for emoji, tone in zip(test["emoji"], test["tone"]):
        assert {(emoji, other) for other in TONES if other != tone} <= known
        assert (emoji, tone) not in known
    assert len(set(test["emoji"])) == 200
    shares = [np.bincount(split["label"], minlength=10) for split in (train, validation)]
    assert (shares[1] > 0).sum() == 9  # the tenth category, the skin tones themselves, has five images


def test_licences_are_beside_the_images() -> None:
    card, licences = (EMOJI / "README.md").read_text(), (EMOJI / "LICENSES.md").read_text()
    for source in ("Apache License 2.0", "MIT License", "Unicode License V3", "emoji-datasource-google", "CLDR 45"):
        assert source in card
    assert "Copyright (c) 2013 Cal Henderson" in licences and "UNICODE LICENSE V3" in licences


def pack(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Write an npm archive."""
    with tarfile.open(folder / f"{name}.tgz", "w:gz") as archive:
        for path, contents in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))


def test_script_composes_over_white_and_adds_tones_to_captions(tmp_path: Path) -> None:
    script = load_script(EMOJI / "make_emoji.py")
    picture = np.zeros((64, 64, 4), dtype=np.uint8)
    picture[:32] = (255, 0, 0, 255)  # the lower half is transparent black
    picture[:32, :32, 3] = 51
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    entry = {
        "name": "WAVING HAND SIGN",
        "unified": "1F44B",
        "image": "1f44b.png",
        "short_names": ["wave", "good-bye"],
        "category": "People & Body",
        "subcategory": "hand-fingers-open",
        "sort_order": 1,
        "skin_variations": {"1F3FF": {"image": "1f44b-1f3ff.png"}, "1F3FB-1F3FD": {"image": "1f44b.png"}},
    }
    images = {f"img/google/64/{name}.png": buffer.getvalue() for name in ("1f44b", "1f44b-1f3ff")}
    pack(tmp_path, "emoji-datasource-google-16.0.0", {"emoji.json": json.dumps([entry]).encode(), **images})
    annotations = {"annotations": {"annotations": {"👋": {"tts": ["waving hand"], "default": ["bye", "hello"]}}}}
    keywords = {"annotations/en/annotations.json": json.dumps(annotations).encode()}
    pack(tmp_path, "cldr-annotations-modern-45.0.0", keywords)
    plain, dark, two = script.rows(tmp_path, 32)
    assert plain["text"] == ["waving hand", "wave", "good bye", "bye, hello"]
    assert dark["text"][3] == "bye, hello, dark skin tone"
    assert (two["tone"], two["text"][0]) == (
        "light and medium",
        "waving hand, light skin tone and medium skin tone",
    )
    pixels = np.asarray(Image.open(io.BytesIO(plain["image"]["bytes"])))
    assert pixels.shape == (32, 32, 3)
    assert pixels[4, 4].tolist() == [255, 204, 204]  # a fifth of red over white
    assert pixels[4, 28].tolist() == [255, 0, 0]
    assert pixels[28, 4].tolist() == [255, 255, 255]
    pack(tmp_path, "emoji-datasource-google-16.0.0", {"other.json": b"{}"})
    with pytest.raises(ValueError, match=r"emoji-datasource-google-16\.0\.0\.tgz has no file package/emoji\.json"):
        list(script.rows(tmp_path, 32))


def test_text_encoders_are_trained_and_read_with_the_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script = load_script(EMOJI / "train_text_encoders.py")
    script.main(tmp_path / "words", tmp_path / "tones", num_steps=1, batch_size=8)
    assert "of 200 held-out captions find their image" in capsys.readouterr().out
    for split, rows in load_splits(str(tmp_path / "tones")).items():
        assert len(rows) == sum(tone != "none" for tone in load_splits(str(EMOJI))[split]["tone"])
        assert "none" not in rows["tone"]
    pipeline = init_pipeline(tmp_path / "words", seed=0, pipeline_class=StableDiffusion3Pipeline)
    pipeline.set_progress_bar_config(disable=True)
    captions = sorted({caption.lower() for row in load_splits(str(EMOJI))["test"] for caption in row["text"]})
    tokens = pipeline.tokenizer(captions).input_ids
    assert max(map(len, tokens)) <= pipeline.tokenizer_max_length
    assert len(set(map(tuple, tokens))) == len(captions)
    output = pipeline("waving hand, dark skin tone", num_inference_steps=1, max_sequence_length=0)
    assert output.images[0].size == (32, 32)
