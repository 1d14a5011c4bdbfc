# SPDX-License-Identifier: Apache-2.0
"""Linear operators: adjoints, pseudo-inverses and solves by definition, and errors that say what is wrong."""

import pytest
import torch

from diffusers_fm.applications.operators import (
    BlurOperator,
    CompressedOperator,
    DownsampleOperator,
    FunctionOperator,
    LinearOperator,
    MaskOperator,
    check_operator,
    conjugate_gradient,
)


SHAPE = (2, 6, 8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference() -> FunctionOperator:
    """The difference of neighbours in a row: a plain function, of a singular square."""

    def adjoint(y: torch.Tensor) -> torch.Tensor:
        x = y.new_zeros(*y.shape[:-1], y.shape[-1] + 1)
        x[..., 1:] += y
        x[..., :-1] -= y
        return x

    return FunctionOperator(lambda x: x[..., 1:] - x[..., :-1], adjoint)


OPERATORS = {
    "mask": MaskOperator(random(6, 8) > 0),
    "downsample": DownsampleOperator(2),
    "gaussian blur": BlurOperator.gaussian(0.6),
    # Neither symmetric nor of odd size, and with zeros in its spectrum.
    "blur": BlurOperator(torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]])),
    "compressed": CompressedOperator(SHAPE, 31),
    "function": difference(),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())


def matrix(operator: LinearOperator) -> torch.Tensor:
    """The operator as a matrix, column by column."""
    size = torch.Size(SHAPE).numel()
    return operator.forward(torch.eye(size, dtype=torch.float64).reshape(size, *SHAPE)).flatten(1).T


@every_operator
def test_adjoint_is_the_transpose(operator: LinearOperator) -> None:
    x = random(3, *SHAPE)
    y = random(*operator.forward(x).shape, seed=1)
    torch.testing.assert_close(operator.adjoint(y).flatten(1), y.flatten(1) @ matrix(operator))
    left, right = (operator.forward(x) * y).flatten(1).sum(1), (x * operator.adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right)


@every_operator
def test_pseudo_inverse_is_that_of_the_matrix(operator: LinearOperator) -> None:
    dense = matrix(operator)
    y = random(3, *operator.forward(random(1, *SHAPE)).shape[1:], seed=1)
    expected = (y.flatten(1) @ torch.linalg.pinv(dense, rtol=1e-6).T).reshape(3, *SHAPE)
    # The tolerance is that of conjugate gradients, squared condition and all.
    torch.testing.assert_close(operator.pseudo_inverse(y), expected, rtol=1e-3, atol=1e-4)


@every_operator
@pytest.mark.parametrize(("data_variance", "noise_variance"), [(1.0, 0.5), (0.3, 1e-2)])
def test_solve_is_that_of_the_matrix(operator: LinearOperator, data_variance: float, noise_variance: float) -> None:
    dense = matrix(operator)
    y = random(3, *operator.forward(random(1, *SHAPE)).shape[1:], seed=1)
    total = data_variance * dense @ dense.T + noise_variance * torch.eye(len(dense), dtype=torch.float64)
    # Where a mask has hidden a pixel there is no measurement: only what the adjoint sees of the solution counts.
    expected = torch.linalg.solve(total, y.flatten(1).T).T @ dense
    found = operator.adjoint(operator.solve(y, data_variance, noise_variance)).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_operator
def test_a_sample_does_not_depend_on_its_batch(operator: LinearOperator) -> None:
    x = random(3, *SHAPE)
    y = operator.forward(x)
    together = operator.pseudo_inverse(y)
    torch.testing.assert_close(together[1:2], operator.pseudo_inverse(y[1:2]), rtol=1e-9, atol=1e-9)


def test_compressed_measurements_keep_all_of_an_image_at_full_number() -> None:
    operator = CompressedOperator((1, 3, 5), 15)
    x = random(2, 1, 3, 5)
    torch.testing.assert_close(operator.adjoint(operator.forward(x)), x)


def test_conjugate_gradients_stop_where_the_matrix_is_not_positive() -> None:
    dense = torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    found = conjugate_gradient(lambda x: x @ dense, b, 10, 1e-9)
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 2, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64))


@every_operator
def test_checks_pass_for_what_fits(operator: LinearOperator) -> None:
    check_operator(operator, SHAPE, operator.forward(random(2, *SHAPE).float()))


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        (DownsampleOperator(2), (1, 2, 3, 3), "`measurement` must have the shape"),
        (DownsampleOperator(4), (1, 2, 1, 2), "multiples of the factor 4"),
        (BlurOperator.gaussian(2.0), (1, 2, 6, 8), "larger than the image"),
        (CompressedOperator((1, 6, 8), 5), (1, 5), "must have the shape"),
        (FunctionOperator(lambda x: x, lambda y: 2 * y), (1, *SHAPE), "not the adjoint"),
        (FunctionOperator(lambda x: x.roll(1, 2), lambda y: y.roll(1, 2)), (1, *SHAPE), "not the adjoint"),
        (FunctionOperator(lambda x: x, lambda y: y[:, :1]), (1, *SHAPE), "must give images of the shape"),
        (FunctionOperator(lambda x: x + 1, lambda y: y), (1, *SHAPE), "must be linear"),
    ],
)
def test_checks_say_what_does_not_fit(operator: LinearOperator, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_operator(operator, SHAPE, torch.zeros(shape))


def test_a_measurement_must_be_finite() -> None:
    with pytest.raises(ValueError, match="`measurement` must be finite"):
        check_operator(MaskOperator(torch.ones(6, 8)), SHAPE, torch.full((1, *SHAPE), torch.nan))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskOperator(torch.tensor([[0.0, 0.5]])), "`mask` must hold 0 and 1"),
        (lambda: DownsampleOperator(0), "`factor` must be a whole number"),
        (lambda: DownsampleOperator(2.0), "`factor` must be a whole number"),
        (lambda: BlurOperator(torch.ones(3)), "`kernel` must be"),
        (lambda: BlurOperator(torch.zeros(3, 3)), "`kernel` must be"),
        (lambda: BlurOperator.gaussian(0.0), "`std` must be"),
        (lambda: BlurOperator.gaussian("1"), "`std` must be"),
        (lambda: DownsampleOperator("2"), "`factor` must be a whole number"),
        (lambda: CompressedOperator((1, 2, 2), "3"), "`num_measurements` must be from 1 to 4"),
        (lambda: CompressedOperator((1, 2, 2), 5), "`num_measurements` must be from 1 to 4"),
    ],
)
def test_operators_refuse_what_makes_no_sense(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
