"""Frequency encodings against columns written out by hand, and the linear layers that follow them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pvdconvert.kernels.linear import linear, row_chunks
from pvdconvert.nn.frequency import ORDERS, frequency_encode, frequency_width

X, Y = 0.3, -1.1


def sin(v: float) -> float:
    return math.sin(v)


def cos(v: float) -> float:
    return math.cos(v)


# Two coordinates, two octaves: every column by hand.
WAVES = {
    "interleaved": [sin(X), sin(Y), cos(X), cos(Y), sin(2 * X), sin(2 * Y), cos(2 * X), cos(2 * Y)],
    "per-coordinate": [sin(X), cos(X), sin(2 * X), cos(2 * X), sin(Y), cos(Y), sin(2 * Y), cos(2 * Y)],
    "channel-major": [sin(X), sin(2 * X), sin(Y), sin(2 * Y), cos(X), cos(2 * X), cos(Y), cos(2 * Y)],
}
WITH_INPUT = {
    "interleaved": [X, Y, *WAVES["interleaved"]],
    "per-coordinate": [X, *WAVES["per-coordinate"][:4], Y, *WAVES["per-coordinate"][4:]],
    "channel-major": [X, Y, *WAVES["channel-major"]],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("include_input", [False, True])
def test_columns(order: str, include_input: bool) -> None:
    x = torch.tensor([[9.0, 9.0], [X, Y]], dtype=torch.float64)
    row = frequency_encode(x, 2, include_input=include_input, order=order)[1]
    expected = (WITH_INPUT if include_input else WAVES)[order]
    torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@given(
    dim=st.integers(1, 4), frequencies=st.integers(0, 12), include_input=st.booleans(), order=st.sampled_from(ORDERS)
)
def test_width_and_rows(dim: int, frequencies: int, include_input: bool, order: str) -> None:
    """The width is what is announced, every row stands for itself, and float32 keeps to float64."""
    x = torch.rand(5, dim, generator=torch.Generator().manual_seed(1)) * 6 - 3
    out = frequency_encode(x, frequencies, include_input=include_input, order=order)
    assert out.shape == (5, frequency_width(dim, frequencies, include_input))
    torch.testing.assert_close(
        frequency_encode(x[3:4], frequencies, include_input=include_input, order=order), out[3:4], rtol=0, atol=2e-7
    )
    exact = frequency_encode(x.double(), frequencies, include_input=include_input, order=order)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize("order", ORDERS)
def test_empty_strided_and_differentiable(order: str) -> None:
    assert frequency_encode(torch.zeros(0, 3), 4, order=order).shape == (0, 27)
    wide = torch.rand(6, 7)
    torch.testing.assert_close(
        frequency_encode(wide[:, 1:4], 3, order=order), frequency_encode(wide[:, 1:4].contiguous(), 3, order=order)
    )
    x = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: frequency_encode(v, 3, order=order), (x,))


def test_unknown_order() -> None:
    with pytest.raises(ValueError, match="per-coordinate"):
        frequency_encode(torch.zeros(1, 3), 2, order="sorted")


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 257, 512])
@pytest.mark.parametrize(("wide", "units"), [(7, 3), (63, 128), (128, 17)])
def test_linear(rows: int, wide: int, units: int) -> None:
    """Both roads of the layer, values and gradients, against float64."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, wide + 1, generator=g)[:, 1:].requires_grad_()
    w, b = (torch.randn(shape, generator=g, requires_grad=True) for shape in ((units, wide), (units,)))
    up = torch.randn(rows, units, generator=g)
    out = linear(x, w, b)
    grads = torch.autograd.grad(out, (x, w, b), up)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = exact[0] @ exact[1].T + exact[2]
    true_grads = torch.autograd.grad(truth, exact, up.double())
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=2e-5)
    for ours, theirs in zip(grads, true_grads):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear(x, w), linear(x, w, torch.zeros(units)), rtol=1e-5, atol=1e-5)


@given(n=st.integers(0, 300), rows=st.sampled_from([16, 48, 128]))
def test_row_chunks(n: int, rows: int) -> None:
    """Every row once, in order; only the last slice may be odd."""
    slices = list(row_chunks(n, rows))
    assert [i for s in slices for i in range(n)[s]] == list(range(n))
    assert all((s.stop - s.start) % 16 == 0 for s in slices[:-1])
    assert all(s.stop - s.start <= rows for s in slices)
