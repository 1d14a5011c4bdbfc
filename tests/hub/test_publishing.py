# SPDX-License-Identifier: Apache-2.0
"""Runs that upload what they trained: what goes out, when, and what happens when the Hub does not play along."""

import json
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, File, fake_hub
from tiny_pipelines import NUM_CLASSES, tiny_pipeline
from training_runs import command_line, make_dataset, save_untrained, script, train

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.hub.portable import portable_files
from diffusers_fm.hub.publisher import Publisher
from diffusers_fm.push_to_hub import main as push


TOKEN = "secret-token"
FILES = {
    "README.md",
    "grid.png",
    "log.jsonl",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "training_args.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # The client and the publisher wait between their tries.
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained pipeline and a data set."""
    folder = tmp_path_factory.mktemp("inputs")
    return save_untrained(folder / "untrained", "unet-classes"), make_dataset(folder / "data")


@pytest.fixture
def run(inputs: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """A run of four steps that uploads; returns its folder."""

    def start(**options: Any) -> Path:
        defaults = {"push_to_hub": True, "hub_token": TOKEN, "num_validation_images": 1, "validation_steps": 2}
        return train(*inputs, tmp_path / "blobs", **{**defaults, **options})

    return start


def text_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# What goes out, and when


def test_what_is_uploaded(hub: FakeHub, run: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    output_dir = run(hub_private_repo=True, checkpointing_steps=2, report_to="tensorboard", hub_license="mit")
    assert hub.repos["someone/blobs"].private
    assert hub.tokens == {TOKEN}
    sent = hub.files("someone/blobs")
    assert set(sent) == FILES
    # Nothing of the machine: no token, no path, neither of the run nor of its data.
    for name, content in sent.items():
        assert TOKEN.encode() not in content, name
        assert str(output_dir.parent).encode() not in content, name
        assert b"/tmp" not in content, name
    for file in output_dir.rglob("*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes(), file
    assert TOKEN not in text_of(caplog)
    # Where nothing had to be taken out, it is the file.
    for name in FILES - {"README.md", "training_args.json", "model_index.json", "unet/config.json"}:
        assert sent[name] == (output_dir / name).read_bytes()
    index = json.loads((output_dir / "model_index.json").read_text())
    assert json.loads(sent["model_index.json"]) == {k: v for k, v in index.items() if k != "_name_or_path"}
    arguments = json.loads(sent["training_args.json"])
    assert arguments["output_dir"] == "blobs"
    assert arguments["dataset_name"] == "data"
    assert b'from_pretrained("someone/blobs")' in sent["README.md"]
    assert hub.commits("someone/blobs") == ["Add the trained pipeline"]
    # The local folder goes on as it was: resumed from its own arguments.
    assert json.loads((output_dir / "training_args.json").read_text())["output_dir"] == str(output_dir)


@pytest.mark.parametrize("strategy", ["checkpoint", "newest_checkpoint"])
def test_checkpoints_go_out_on_the_way(
    hub: FakeHub, run: Callable[..., Path], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = run(checkpointing_steps=1, hub_strategy=strategy, hub_revision="experiment", use_ema=True)
    commits = hub.commits("someone/blobs", "experiment")
    assert hub.commits("someone/blobs") == []
    assert commits[-1] == "Add the trained pipeline"
    if strategy == "checkpoint":
        assert commits == ["Step 1", "Step 2", "Step 3", "Add the trained pipeline"]
        states = {
            commit.message: {path: file.content for path, file in commit.files.items()}
            for commit in hub.repos["someone/blobs"].branches["experiment"]
        }
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert len({states[message][weights] for message in commits}) == 4
        # There are no pictures of the first step; the card does not pretend.
        assert set(states["Step 1"]) - {".gitattributes"} == FILES - {"grid.png"}
        assert b"![Samples]" not in states["Step 1"]["README.md"]
        assert set(states["Step 2"]) - {".gitattributes"} == FILES
        assert b'from_pretrained("someone/blobs")' in states["Step 1"]["README.md"]
    assert set(hub.files("someone/blobs", "experiment")) == FILES
    assert not (output_dir / ".hub").exists()


def publisher_of(folder: Path, **options: Any) -> Publisher:
    """That of a run without a run."""
    options = {"push_to_hub": True, "hub_token": TOKEN, **options}
    line = command_line(folder, folder, folder / "blobs", **options)
    (folder / "blobs").mkdir(exist_ok=True)
    return Publisher(parse_arguments(script.ScriptArguments, line), folder / "blobs")


def test_training_does_not_wait_and_the_newest_goes_first(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = publisher_of(tmp_path, hub_strategy="newest_checkpoint")
    publisher.start()
    # The first upload hangs until the others have been asked for.
    gate, send = threading.Event(), publisher._send

    def slow(folder: Path, message: str) -> str:
        assert gate.wait(30)
        return send(folder, message)

    monkeypatch.setattr(publisher, "_send", slow)
    for step in (1, 2, 3, 4):
        publisher.checkpoint_saved(step, lambda folder, step=step: (folder / "README.md").write_text(f"Step {step}"))
    gate.set()
    publisher._uploads[-1][0].result()
    assert hub.commits("someone/blobs") == ["Step 1", "Step 4"]
    assert list((tmp_path / "blobs" / ".hub").iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_aside_does_not_end_the_run(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = publisher_of(tmp_path, hub_strategy="checkpoint")
    publisher.start()

    def no_space(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    publisher.checkpoint_saved(1, no_space)
    assert "Step 1 is not uploaded (OSError: [Errno 28] No space left on device); training goes on." in text_of(caplog)
    assert hub.commits("someone/blobs") == []


def test_a_dry_run_lists_what_an_upload_sends(
    hub: FakeHub, run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    output_dir = run(push_to_hub=False, push_dry_run=True, hub_model_id="our/blobs", checkpointing_steps=2)
    assert hub.requests == []
    (listed,) = [record.getMessage() for record in caplog.records if "would send" in record.getMessage()]
    names = {line.split()[0] for line in listed.splitlines()[1:]}
    assert names == FILES
    # What an upload of this folder then sends is what was listed.
    assert push([str(output_dir), "--hub_model_id", "our/blobs", "--hub_token", TOKEN]) == 0
    assert set(hub.files("our/blobs")) == names
    assert b'from_pretrained("our/blobs")' in hub.files("our/blobs")["README.md"]


def test_a_folder_that_was_moved_and_others_wrote_goes_out_without_paths(
    hub: FakeHub, run: Callable[..., Path], tmp_path: Path
) -> None:
    output_dir = run(push_to_hub=False, hub_token=None)
    folder = output_dir.rename(tmp_path / "moved")
    for name, settings in {
        "unet/adapter_config.json": {"base_model_name_or_path": str(tmp_path / "customer" / "base")},
        "scheduler/scheduler_config.json": {"_name_or_path": str(tmp_path / "base")},
        "metrics.json": {"dataset_name": str(tmp_path / "data"), "metrics": {"FID": 1.0}},
    }.items():
        (folder / name).write_text(json.dumps(settings))
    assert str(output_dir) in (folder / "README.md").read_text()
    assert push([str(folder), "--hub_model_id", "our/blobs", "--hub_token", TOKEN]) == 0
    sent = hub.files("our/blobs")
    assert b'from_pretrained("our/blobs")' in sent["README.md"]
    assert json.loads(sent["unet/adapter_config.json"]) == {"base_model_name_or_path": "base"}
    assert {name for name, content in sent.items() if str(tmp_path).encode() in content} == set()


# What else lies in a folder


def test_what_else_lies_in_the_folder_stays(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    tiny_pipeline("unet").save_pretrained(folder)
    for name in (
        "checkpoint-2/optimizer.bin",
        "checkpoint-2/random_states_0.pkl",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.ckpt",
        "unet/modeling.py",
        "unet/.hidden.json",
        "unet/passwords.json",
        "unet/other.safetensors",
        "scheduler/notes.json",
        "private.safetensors",
        "model_notes.safetensors",
        "scheduler/state.pt",
        "data/train-00000-of-00001.parquet",
        "cache/latents.safetensors",
        "logs/events.out.tfevents",
        "samples/step-2.png",
        "pipeline.py",
        "notes.txt",
        ".env",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert push([str(folder), "--hub_token", TOKEN]) == 0
    assert set(hub.files("someone/blobs")) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "name",
    [
        *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model-00001-of-00012.safetensors"),
        *("unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.ema-0_100.safetensors"),
        *("unet/diffusion_pytorch_model.safetensors.index.fp16.json", "unet/model.fp16-00001-of-00002.safetensors"),
        *("scheduler/tokenizer_config.json", "scheduler/preprocessor_config.json", "scheduler/spiece.model"),
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights-00001-of-00002.safetensors"),
    ],
)
def test_files_of_diffusers_and_transformers_go_out(tmp_path: Path, name: str) -> None:
    tiny_pipeline("unet").save_pretrained(tmp_path)
    (tmp_path / name).write_text("{}")
    assert name in portable_files(tmp_path)


def test_a_pipeline_with_other_shards_replaces_the_shards(hub: FakeHub, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("unet")
    for size in ("40KB", "10GB"):
        folder = tmp_path / size / "blobs"
        pipeline.save_pretrained(folder, max_shard_size=size)
        assert push([str(folder), "--hub_token", TOKEN]) == 0
        remote = {name for name in hub.files("someone/blobs") if name.startswith("unet/")}
        assert remote == {f"unet/{path.name}" for path in (folder / "unet").iterdir()}
    # With the index of the shards left there, diffusers would go on to load the shards.
    assert remote == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}


# Mistakes are found before any work


REFUSALS = {
    "a wrong token": ({"hub_token": "wrong"}, "it answers 401.*Invalid credentials.*hf auth login"),
    "no token": ({"hub_token": None}, "it answers 401.*hf auth login"),
    "a name of others": (
        {"hub_model_id": "others/blobs"},
        "it answers 403.*don't have the rights.*one that may do this",
    ),
    "a token to read": ({"hub_token": "read-only-token"}, "it answers 403"),
    "a name that cannot be": ({"hub_model_id": "our/a b"}, "Repo id must"),
    "a read-only repository": ({"hub_token": "visitor-token", "hub_model_id": "our/public"}, "it answers 403"),
    "another's private one": ({"hub_token": "visitor-token", "hub_model_id": "our/private"}, "it answers 40[34]"),
    "a licence that is none": ({"hub_license": "Apache 2"}, "--hub_license 'Apache 2' is no licence"),
    "a public one": ({"hub_model_id": "our/public", "hub_private_repo": True}, "exists and is public"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_mistakes_are_found_before_any_work(hub: FakeHub, run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    hub.create("our/public")
    hub.create("our/private", private=True)
    options, said = REFUSALS[name]
    with pytest.raises(ValueError, match=f"The Hub refuses .*{said}") as caught:
        run(**options)
    assert "wrong" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "blobs").exists()
    assert hub.commits("our/public") == []


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        ("notes.txt", b"mine", "holds no pipeline, LoRA weights or card to upload"),
        ("model_index.json", b"{", r"The file '.*model_index.json' is not JSON"),
        ("metrics.json", b"{", r"The file '.*metrics.json' is not JSON"),
        ("training_args.json", b"\xff{}", r"The file '.*training_args.json' is not JSON"),
    ],
)
def test_a_folder_that_cannot_be_uploaded_is_refused_before_the_hub_is_asked(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, content: bytes, refusal: str
) -> None:
    for words in (["--hub_license", "mit"], ["--hub_strategy", "checkpoint"]):
        with pytest.raises(SystemExit):
            push([str(tmp_path), *words])
        assert "are for the training" in capsys.readouterr().err
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as left:
        push([str(tmp_path), "--hub_model_id", "our/blobs", "--hub_token", TOKEN])
    assert left.value.code == 2
    assert re.search(refusal, capsys.readouterr().err)
    assert hub.requests == []


def test_a_token_does_not_go_to_a_tracker_that_records_command_lines(run: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="--hub_token does not go with --report_to wandb.*HF_TOKEN") as caught:
        run(report_to="wandb")
    assert TOKEN not in str(caught.value)


def test_an_option_of_an_upload_needs_one(run: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="--hub_model_id our/blobs needs --push_to_hub"):
        run(push_to_hub=False, hub_model_id="our/blobs")


def test_a_name_that_exists_is_told(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publisher_of(tmp_path).start()
    assert "exists" not in text_of(caplog)
    hub.commit("someone/blobs", "main", "Before", {"README.md": File(b"# Before", is_lfs=False)})
    publisher_of(tmp_path).start()
    assert "someone/blobs exists; what this run uploads becomes its next commit." in text_of(caplog)


# A Hub that is away, or has a bad day


def command_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The command of the log that uploads the folder, without the words that call Python."""
    (line,) = [record.getMessage() for record in caplog.records if "Upload it with" in record.getMessage()]
    assert TOKEN not in line
    words = shlex.split(line.split("`")[1])
    assert words[:3] == ["python", "-m", "diffusers_fm.push_to_hub"]
    return words[3:]


def test_a_hub_that_is_away_loses_nothing(
    hub: FakeHub, run: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    output_dir = run(checkpointing_steps=2, hub_strategy="checkpoint", hub_revision="try", hub_private_repo=True)
    log = text_of(caplog)
    assert "The Hub cannot be reached now (ConnectError" in log
    assert "Step 2 could not be uploaded (ConnectError" in log
    assert f"The run is complete and saved in {output_dir}, but it could not be uploaded (ConnectError" in log
    assert FlowMatchPipeline.from_pretrained(output_dir).num_classes == NUM_CLASSES
    assert not (output_dir / ".hub").exists()

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(command_in(caplog)) == 0
    assert set(hub.files("someone/blobs", "try")) == FILES
    assert hub.repos["someone/blobs"].private
    # The card was written when nobody knew whose name it would be under.
    assert b'from_pretrained("someone/blobs")' in hub.files("someone/blobs", "try")["README.md"]


def test_a_hub_that_comes_back_gets_the_run(
    hub: FakeHub, run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("/api/repos/create", 503)
    run()
    assert "The Hub cannot be reached now (it answers 503" in text_of(caplog)
    assert "Uploaded to" in text_of(caplog)
    assert set(hub.files("someone/blobs")) == FILES


BAD_DAYS = {
    "no card can be checked": ("POST /api/validate-yaml", 502, 2),
    "the modes are not told": ("/preupload/", 500, 2),
    "the modes are cut off": ("/preupload/", "half", 1),
    "the batch is dropped": ("/info/lfs/objects/batch", "drop", 2),
    "a file is dropped": ("PUT /lfs/", "drop", 3),
    "a file is refused for now": ("PUT /lfs/", 503, 3),
    "the check is dropped": ("/verify", "drop", 1),
    "the commit is dropped": ("/commit/", "drop", 2),
    "the commit is refused for now": ("/commit/", 503, 2),
    "the answer to the commit is lost": ("/commit/", "lost", 1),
    "too many requests": ("/commit/", 429, 1),
}


@pytest.mark.parametrize("name", BAD_DAYS)
@pytest.mark.parametrize("part_size", [None, 50_000])
def test_an_upload_gets_over_a_bad_day(hub: FakeHub, tmp_path: Path, name: str, part_size: int | None) -> None:
    hub.part_size = part_size
    folder = tmp_path / "blobs"
    tiny_pipeline("dit-vae").save_pretrained(folder)
    hub.fail(*BAD_DAYS[name])
    assert push([str(folder), "--hub_token", TOKEN]) == 0
    # One commit, and no large file came twice, whatever had to be asked again.
    assert hub.commits("someone/blobs") == ["Add the trained pipeline"]
    assert len(hub.received) == len(set(hub.received)) == 2
    for component in ("transformer", "vae"):
        weights = f"{component}/diffusion_pytorch_model.safetensors"
        assert hub.files("someone/blobs")[weights] == (folder / weights).read_bytes()


def test_a_resumed_upload_sends_nothing_twice(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "blobs"
    tiny_pipeline("dit-vae").save_pretrained(folder)
    # One of the two large files arrives, then the Hub goes away.
    hub.fail("PUT /lfs/", "pass", 1)
    hub.fail("PUT /lfs/|/commit/", 503, 1000)
    assert push([str(folder), "--hub_token", TOKEN]) == 1
    assert len(hub.received) == 1
    hub.recover()
    assert push([str(folder), "--hub_token", TOKEN]) == 0
    assert len(hub.received) == len(set(hub.received)) == 2
    # Once more: there is nothing to do, and no commit without a change.
    assert push([str(folder), "--hub_token", TOKEN]) == 0
    assert len(hub.received) == 2
    assert hub.commits("someone/blobs") == ["Add the trained pipeline"]


@pytest.mark.parametrize("status", [403, 404, 413])
def test_a_refused_upload_loses_nothing(
    hub: FakeHub, run: Callable[..., Path], caplog: pytest.LogCaptureFixture, status: int
) -> None:
    hub.fail("/commit/", status, 1000)
    output_dir = run(hub_model_id="our/blobs", max_train_steps=1)
    assert FlowMatchPipeline.from_pretrained(output_dir).num_classes == NUM_CLASSES
    assert f"it answers {status} (The server has a bad day)" in text_of(caplog)
    # There is no use in asking again.
    assert len([request for request in hub.requests if "/commit/" in request]) == 1
    hub.recover()
    assert push([*command_in(caplog), "--hub_token", TOKEN]) == 0
    assert set(hub.files("our/blobs")) == FILES
