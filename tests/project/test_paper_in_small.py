# SPDX-License-Identifier: Apache-2.0
"""The reproduction of the founding paper in small: its settings, and that it goes on where it was."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "paper"))

import pieces  # noqa: E402
import report  # noqa: E402
from objectives import OBJECTIVES, Flow  # noqa: E402
from problems import Checkerboard, Digits  # noqa: E402

from diffusers_fm.evaluation.features import SmallClassifier  # noqa: E402


TINY = {
    name: dataclasses.replace(
        size,
        steps=3,
        batch_size=8,
        looks=(2, 3),
        num_early=66,
        num_samples=66,
        num_solver_samples=66,
        calls=(4, 8, 10, 20),
        num_likelihoods=4,
        num_ways=6,
    )
    for name, size in pieces.SIZES.items()
}


def test_objectives_are_those_of_the_paper_index() -> None:
    page = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", page, re.MULTILINE)
    stated = {(objective.path, objective.prediction_type, objective.weighting) for objective in OBJECTIVES.values()}
    assert len(rows) == 5
    assert stated - set(rows) == {("ve", "v_prediction", "v_prediction")}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_sees_the_same_noise_and_times(name: str) -> None:
    seen = []

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(timesteps)
        return torch.zeros_like(x)

    flow = Flow(OBJECTIVES[name], torch.nn.Identity())
    flow.network = torch.nn.Module()
    flow.network.forward = network
    data = Checkerboard.draw(16, torch.Generator().manual_seed(1))
    loss = flow.loss(data, torch.Generator().manual_seed(2))
    assert torch.isfinite(loss)
    t = seen[0] / 1000
    assert t.min() >= flow.first_time
    torch.manual_seed(0)
    other = Flow(OBJECTIVES["fm-ot"], torch.nn.Identity())
    other.network = flow.network
    other.loss(data, torch.Generator().manual_seed(2))
    torch.testing.assert_close(seen[1] / 1000, (t - flow.first_time) / (1 - flow.first_time), rtol=0, atol=1e-6)


def test_board_is_what_is_drawn() -> None:
    board = Checkerboard(Path())
    points = board.draw(20_000, torch.Generator().manual_seed(0))
    # Binomial counts n p of 128 cells, p = 1 / 128: the mean of |deviation| is about sqrt(2 p / (pi n)) in each.
    assert board.distance(points) == pytest.approx(64 * (2 / 128 / torch.pi / 20_000) ** 0.5, rel=0.1)
    assert board.distance(points.flip(1) * torch.tensor([1.0, -1.0])) > 0.99
    assert board.distance(points + 10) == 1


def test_levels_survive_the_way_to_data_and_back() -> None:
    levels = torch.arange(17).reshape(1, 1, 1, 17).float()
    for noise in (0.001, 0.5, 0.999):
        samples = (levels + noise) * (2 / 17) - 1
        assert torch.equal(Digits.to_pixels(samples), (levels * 255 / 16).round().to(torch.uint8))


def test_calls_for_an_error_are_interpolated() -> None:
    calls, errors = [4, 8, 16], [0.16, 0.04, 0.01]  # second order
    assert report.calls_for(calls, errors, 0.08) == pytest.approx(4 * 2**0.5)
    assert report.calls_for(calls, errors, 0.01) == pytest.approx(16)
    assert report.calls_for(calls, errors, 0.001) != report.calls_for(calls, errors, 0.001)
    assert report.calls_for(calls, errors, 0.5) != report.calls_for(calls, errors, 0.5)


def test_every_piece_is_a_file_and_the_page_is_made_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An untrained classifier stands in for the trained one: its features are as good for a figure's plumbing.
    from safetensors.torch import save_file

    save_file(SmallClassifier(1, 10).state_dict(), tmp_path / "classifier.safetensors")
    monkeypatch.setattr(report, "SIZES", TINY)
    # Figures of untrained networks need not be exact either.
    for name, value in {"REFERENCE_TOLERANCE": 1e-2, "LIKELIHOOD_TOLERANCE": 1e-2}.items():
        monkeypatch.setattr(pieces, name, value)
    monkeypatch.setattr(pieces.sample, "__defaults__", (1, 1e-2))
    stages = pieces.all_pieces(tmp_path, [0], TINY)
    for stage in stages:
        for piece in stage:
            assert not piece.done
            piece.run()
            assert piece.done
    trained = json.loads((tmp_path / "digits" / "fm-ot-0" / "training.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in trained["looks"]] == [2, 3]
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    marks = re.findall(r"<!-- table: \w+ -->", (ROOT / "docs" / "paper_in_small.md").read_text(encoding="utf-8"))
    page.write_text("\n".join(f"{mark}\nold\n<!-- end -->" for mark in marks), encoding="utf-8")
    report.write_report(tmp_path, [0], page)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.count("| FM, OT path |") == 3
    shown = re.findall(r"images/(paper_\w+\.png)", (ROOT / "docs" / "paper_in_small.md").read_text(encoding="utf-8"))
    assert {file.name for file in (page.parent / "images").glob("*.png")} == set(shown)
