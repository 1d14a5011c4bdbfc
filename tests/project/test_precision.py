# SPDX-License-Identifier: Apache-2.0
"""No float64 on a device that may lack it: conversions go through `precision`, and a scan finds those that do not."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusers_fm
from diffusers_fm.precision import read_numbers, to_float64, widest_float


SOURCES = [path for path in Path(diffusers_fm.__file__).parent.rglob("*.py") if path.name != "precision.py"]


def offences(source: str) -> Iterator[int]:
    """Lines that may put float64 on a device: `x.double()`, `x.to(float64)`, `factory(device=...)`, `"mps"`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value == "mps":
            yield node.lineno
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        wide = any(isinstance(a, ast.Attribute) and a.attr in ("float64", "double") for a in arguments)
        devices = [keyword.value for keyword in node.keywords if keyword.arg == "device"]
        on_device = any(not (isinstance(device, ast.Constant) and device.value == "cpu") for device in devices)
        from_numpy = isinstance(node.func.value, ast.Call) and ast.unparse(node.func.value.func) == "torch.from_numpy"
        if (
            (node.func.attr == "double" and not from_numpy)
            or (node.func.attr in ("to", "type") and wide)
            or (wide and on_device)
        ):
            yield node.lineno


def test_no_float64_goes_to_a_device() -> None:
    assert len(SOURCES) > 50
    found = [f"{path.name}:{line}" for path in SOURCES for line in offences(path.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "x.double()",
        "x.cpu().double()",
        "x.to('cpu', torch.float64)",
        "x.to(device=d, dtype=torch.float64)",
        "torch.zeros(3, dtype=torch.float64, device=x.device)",
        "torch.float32 if x.device.type == 'mps' else y",
    ],
)
def test_the_scan_finds(line: str) -> None:
    assert list(offences(line)) == [1]


def test_conversions() -> None:
    x = torch.randn(3, dtype=torch.bfloat16)
    assert torch.equal(to_float64(x), x.double())
    assert widest_float(x) == torch.float64
    assert widest_float(torch.empty(1, device="meta")) == torch.float64


@pytest.mark.parametrize(
    "values",
    [
        [0.1, 0.2],
        (0.1, 0.2),
        np.array([0.2, 0.1])[::-1],
        torch.tensor([0.1, 0.2], dtype=torch.float64),
        [torch.tensor(0.1, dtype=torch.float64), 0.2],
        [np.float64(0.1), np.float64(0.2)],
    ],
)
def test_numbers_in_every_form(values: object) -> None:
    assert read_numbers("values", values).tolist() == [0.1, 0.2]


@pytest.mark.parametrize("values", ["12", ["0.1", "0.2"], [None], [[0.1], [0.2]], torch.zeros(2, 2), [True]])
def test_what_is_no_list_of_numbers_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="`values` must be a list of numbers"):
        read_numbers("values", values)
