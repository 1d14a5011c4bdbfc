# SPDX-License-Identifier: Apache-2.0
"""What is computed once is found again by content, survives being killed, and is checked when it is read."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from tiny_text_to_image import colours, tiny_stable_diffusion_3
from training_runs import make_dataset, read_log, save_untrained, train

from diffusers_fm.data.cache import TensorCache, model_fingerprint
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.latents import cache_latents, normalize
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.models import encode_latents, encode_moments, latents_of_moments


SIZES = ((16, 16), (24, 16))


def image_data(num_rows: int = 7, **transform: object) -> ImageData:
    options = {"center_crop": True, "buckets": SIZES, **transform}
    return ImageData(colours(num_rows, sizes=SIZES), ImageTransform(16, 3, **options), caption_column="text")


# The cache itself


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    records = {
        f"key {dtype}": [torch.randn(3, 2, generator=generator).to(dtype), torch.randn((), generator=generator)]
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    cache = TensorCache(tmp_path / "cache", {"what": "tests"})
    with cache.writer() as writer:
        writer.add(list(records), list(records.values()))
    assert len(cache) == 0
    cache.refresh()
    for found in (cache, TensorCache(tmp_path / "cache", {"what": "tests"})):
        assert len(found) == 3
        for key, tensors in records.items():
            assert key in found
            for one, other in zip(found.read(key), tensors, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
    assert "other" not in cache
    # A writer that had nothing to write leaves nothing.
    with cache.writer():
        pass
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_was_whole_when_the_process_was_killed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shard for each record; the third was being written, and a fourth record was in memory.
    monkeypatch.setattr("diffusers_fm.data.cache.SHARD_BYTES", 16)
    cache = TensorCache(tmp_path, {"what": "tests"})
    writer = cache.writer()
    for number in range(2):
        writer.add([str(number)], [[torch.full((4,), number)]])
    whole = sorted(tmp_path.glob("*.safetensors"))
    assert len(whole) == 2
    (tmp_path / f".partial-{whole[0].name}").write_bytes(whole[0].read_bytes()[:-5])
    again = TensorCache(tmp_path, {"what": "tests"})
    assert [str(number) in again for number in range(3)] == [True, True, False]
    with again.writer() as writer:
        writer.add(["2"], [[torch.full((4,), 2)]])
    again.refresh()
    assert [int(again.read(str(number))[0][0]) for number in range(3)] == [0, 1, 2]


def test_a_killed_process_loses_no_more_than_half_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("diffusers_fm.data.cache.time.monotonic", lambda: now)
    writer = TensorCache(tmp_path, {"what": "tests"}).writer()
    for number, time in enumerate((100.0, 120.0, 131.0, 135.0)):
        now = time
        writer.add([str(number)], [[torch.full((4,), number)]])
    assert sorted(TensorCache(tmp_path, {"what": "tests"})._records) == ["0", "1", "2"]


def test_records_are_read_by_memory_map_and_from_workers(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, {"what": "tests"})
    with cache.writer() as writer:
        writer.add(["a"], [[torch.arange(8)]])
    cache.refresh()
    # A mapping of its own: what one reader writes into it no other sees.
    cache.read("a")[0][0] = 1
    other = pickle.loads(pickle.dumps(cache))
    assert torch.equal(other.read("a")[0], torch.arange(8))
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(next(tmp_path.glob("*.safetensors"))) in mapped.read_text()


def test_damage_and_other_contents_are_clear_errors(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, {"what": "latents", "autoencoder": "one"})
    with cache.writer() as writer:
        writer.add(["a", "b"], [[torch.zeros(4)], [torch.ones(4)]])
    cache.refresh()
    with pytest.raises(ValueError, match="does not match this run: it was made with autoencoder one and not other"):
        TensorCache(tmp_path, {"what": "latents", "autoencoder": "other"})
    with pytest.raises(ValueError, match="with what latents and not text, autoencoder one and not None"):
        TensorCache(tmp_path, {"what": "text"})
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    cache = TensorCache(tmp_path, {"what": "latents", "autoencoder": "one"})
    assert torch.equal(cache.read("a")[0], torch.zeros(4))
    with pytest.raises(ValueError, match=r"\.safetensors' is damaged: remove it to compute what it held anew"):
        cache.read("b")
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        TensorCache(tmp_path, {"what": "latents", "autoencoder": "one"})


def test_models_are_known_by_config_weights_and_precision() -> None:
    pipelines = [tiny_stable_diffusion_3(), tiny_stable_diffusion_3()]
    for name in ("vae", "text_encoder", "text_encoder_3"):
        one, other = (getattr(pipeline, name) for pipeline in pipelines)
        fingerprint = model_fingerprint(one)
        assert model_fingerprint(other) == fingerprint
        parameter = next(other.parameters())
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-6
        assert model_fingerprint(other) != fingerprint
        assert model_fingerprint(one.to(torch.bfloat16)) != fingerprint


# Latents


def test_moments_give_the_latents_of_the_autoencoder() -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = tiny_stable_diffusion_3().vae
    with torch.no_grad():
        moments = encode_moments(vae, images)
        for sample in (True, False):
            one, other = (torch.Generator().manual_seed(1) for _ in range(2))
            expected = encode_latents(vae, images, one, sample)
            assert torch.equal(latents_of_moments(vae, moments, other, sample), expected)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), scaling_factor=2.0,
        )  # fmt: skip
        assert torch.equal(latents_of_moments(tiny, encode_moments(tiny, images)), encode_latents(tiny, images))


def test_cached_latents_are_those_of_the_images(tmp_path: Path, accelerator: Accelerator) -> None:
    vae = tiny_stable_diffusion_3().vae
    on_the_fly, cached = image_data(random_flip=True), image_data(random_flip=True)
    cache = cache_latents(accelerator, cached, vae, tmp_path, batch_size=3)
    assert len(cache) == 14
    for rows in on_the_fly.groups(4):
        for epoch in range(3):
            keys = np.stack([np.full_like(rows, epoch), rows], axis=1)
            batch = cached[keys]
            assert "images" not in batch
            assert batch["captions"] == on_the_fly[keys]["captions"]
            with torch.no_grad():
                expected = encode_moments(vae, normalize(on_the_fly[keys]["images"]))
            # Convolutions may round otherwise in batches of another size.
            torch.testing.assert_close(batch["moments"], expected, rtol=0, atol=1e-5)


def test_latents_are_computed_once_for_each_content(tmp_path: Path, accelerator: Accelerator) -> None:
    vae = tiny_stable_diffusion_3().vae
    files = lambda: {file: file.read_bytes() for file in tmp_path.iterdir()}  # noqa: E731
    cache_latents(accelerator, image_data(5), vae, tmp_path, batch_size=3)
    first = files()
    # Nothing new: nothing written. More rows: only those. Three of them in another size: beside the others.
    assert len(cache_latents(accelerator, image_data(5), vae, tmp_path, batch_size=3)) == 5
    assert files() == first
    assert len(cache_latents(accelerator, image_data(7), vae, tmp_path, batch_size=3)) == 7
    added = set(files()) - set(first)
    assert sum(len(load_file(file)) for file in added) == 2
    assert len(cache_latents(accelerator, image_data(7, buckets=()), vae, tmp_path, batch_size=3)) == 10
    # Rows with equal images share a record.
    twice = colours(3)
    data = ImageData(twice.select([0, 1, 0, 2, 1]), ImageTransform(16, 3, center_crop=True))
    assert len(cache_latents(accelerator, data, vae, tmp_path / "twice", batch_size=3)) == 3

    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="does not match this run: it was made with autoencoder .* and not .*"):
        cache_latents(accelerator, image_data(5), vae, tmp_path, batch_size=3)
    with pytest.raises(ValueError, match="always cropped alike: give --center_crop"):
        cache_latents(accelerator, image_data(5, center_crop=False), vae, tmp_path, batch_size=3)


def test_unreadable_images_are_not_asked_for(tmp_path: Path, accelerator: Accelerator) -> None:
    images = colours(8).cast_column("image", datasets.Image(decode=False))["image"][:]
    # Two of them are the same file, such as a page of errors that was saved twice.
    images[2]["bytes"], images[5], images[7]["bytes"] = b"no image", None, b"no image"
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))
    vae = tiny_stable_diffusion_3().vae
    keys = np.stack([np.zeros(8, int), np.arange(8)], axis=1)
    for memory_budget in (0, 0, 2**20):
        options = {"memory_budget": memory_budget, "max_unreadable": 3}
        on_the_fly, cached = (ImageData(rows, ImageTransform(16, 3, center_crop=True), **options) for _ in range(2))
        assert len(cache_latents(accelerator, cached, vae, tmp_path, batch_size=3)) == 5
        batch = cached[keys]
        assert sorted(batch["unreadable"]) == [2, 5, 7]
        with torch.no_grad():
            expected = encode_moments(vae, normalize(on_the_fly[keys]["images"]))
        torch.testing.assert_close(batch["moments"], expected, rtol=0, atol=1e-5)
    data = ImageData(rows, ImageTransform(16, 3, center_crop=True), memory_budget=0, max_unreadable=2)
    with pytest.raises(ValueError, match="The image in row . of the data set cannot be read"):
        cache_latents(accelerator, data, vae, tmp_path / "other", batch_size=3)


def test_an_interrupted_cache_goes_on(tmp_path: Path, accelerator: Accelerator) -> None:
    vae = tiny_stable_diffusion_3().vae
    calls = 0
    encode = vae.encode

    def interrupted(images: torch.Tensor) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode(images)

    vae.encode = interrupted
    with pytest.raises(KeyboardInterrupt):
        cache_latents(accelerator, image_data(), vae, tmp_path, batch_size=2)
    assert sum(len(load_file(file)) for file in tmp_path.glob("*.safetensors")) == 4
    assert len(cache_latents(accelerator, image_data(), vae, tmp_path, batch_size=2)) == 7
    # Four images in two batches before, the other three in two.
    assert calls == 3 + 2


# In training


def test_training_on_cached_latents_has_the_same_losses(tmp_path: Path) -> None:
    folder, data = save_untrained(tmp_path / "untrained", "dit-vae"), make_dataset(tmp_path / "data", side=16)
    options = {"center_crop": True, "random_flip": True, "validation_steps": 3, "train_batch_size": 4}
    plain = train(folder, data, tmp_path / "plain", **options)
    cached = train(folder, data, tmp_path / "cached", cache_latents=True, **options)
    files = sorted((cached / "precomputed" / "latents").iterdir())
    # 20 images and their mirror images, and 7 that are held out.
    assert sum(len(load_file(file)) for file in files if file.suffix == ".safetensors") == 47
    for name in ("loss", "validation_loss"):
        (steps, losses), (other_steps, others) = (zip(*read_log(run, name)) for run in (plain, cached))
        assert steps == other_steps
        # Convolutions may round otherwise in batches of another size.
        np.testing.assert_allclose(others, losses, rtol=2e-5)
    precomputed = {"precomputed_dir": cached / "precomputed", "cache_latents": True}
    again = train(folder, data, tmp_path / "again", **precomputed, **options)
    assert sorted((cached / "precomputed" / "latents").iterdir()) == files
    assert not (again / "precomputed").exists()
    assert read_log(again, "loss") == read_log(cached, "loss")
    with pytest.raises(ValueError, match="always cropped alike: give --center_crop"):
        train(folder, data, tmp_path / "refused", cache_latents=True)
    pixels = save_untrained(tmp_path / "pixels", "unet")
    with pytest.raises(ValueError, match="--cache_latents needs an autoencoder, and '.*' has none"):
        train(pixels, data, tmp_path / "refused", cache_latents=True, center_crop=True)
