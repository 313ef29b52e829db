"""Updating occupancy: by hand and against a loop, the same on every twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pvdconvert.kernels.occupancy import occupancy_update
from tests.twins import TWINS, choose


@pytest.fixture(params=TWINS, autouse=True)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    choose(name, monkeypatch, request.module)
    return name


def update(twin: str, peak: Tensor, index: Tensor, sigma: Tensor, decay: float) -> Tensor:
    place = "cuda" if twin == "cuda" else "cpu"
    out = peak.clone().to(place)
    occupancy_update(out, index.to(place), sigma.to(place), decay)
    return out.cpu()


def test_by_hand(twin: str) -> None:
    peak = torch.tensor([8.0, 1.0, 0.0, 4.0])
    index = torch.tensor([1, 1, 0, 2, 3, -1, 4])
    sigma = torch.tensor([3.0, 2.0, 1.0, -5.0, float("nan"), 9.0, 9.0])
    assert update(twin, peak, index, sigma, 0.5).tolist() == [4.0, 3.0, 0.0, 2.0]


def test_against_a_loop_with_strided_input(twin: str) -> None:
    g = torch.Generator().manual_seed(0)
    peak = torch.rand(50, generator=g)
    index = torch.randint(0, 50, (600,), generator=g)[::2]
    sigma = (torch.rand(600, generator=g) * 2)[::2]
    expected = [v * 0.75 for v in peak.tolist()]
    for cell, value in zip(index.tolist(), sigma.tolist()):
        expected[cell] = max(expected[cell], value)
    torch.testing.assert_close(update(twin, peak, index, sigma, 0.75), torch.tensor(expected))


def test_nothing_found_only_decays(twin: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert update(twin, torch.tensor([2.0, 6.0]), none, torch.zeros(0), 0.5).tolist() == [1.0, 3.0]
    assert update(twin, torch.zeros(0), none, torch.zeros(0), 1.0).tolist() == []


def test_what_does_not_fit_is_refused() -> None:
    peak, index, sigma = torch.zeros(4), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    with pytest.raises(ValueError, match="expected, got"):
        occupancy_update(peak, index, sigma[:1])
    with pytest.raises(ValueError, match="decay"):
        occupancy_update(peak, index, sigma, 1.5)
    with pytest.raises(ValueError, match="contiguous"):
        occupancy_update(torch.zeros(8)[::2], index, sigma)
