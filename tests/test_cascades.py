"""Masks of nested cubes: every point looked up in the smallest cube that holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pvdconvert.errors import InputError
from pvdconvert.nn.cascades import CascadedMask
from pvdconvert.nn.mask import Mask

CENTER = (0.5, -1.0, 0.25)


def make(count: int = 4, n: int = 16, share: float = 0.2, halves: tuple[float, ...] | None = None) -> CascadedMask:
    rng = np.random.default_rng(0)
    cubes = torch.from_numpy((rng.random((count, n, n, n)) < share).astype(np.uint8))
    return CascadedMask(cubes, CENTER, halves or tuple(0.5 * 2.0**c for c in range(count)))


@pytest.mark.parametrize("halves", [None, (0.5, 1.0, 2.0, 3.0)])
def test_points_by_the_definition(halves: tuple[float, ...] | None) -> None:
    mask = make(halves=halves)
    rng = np.random.default_rng(1)
    x = rng.uniform(-5, 5, (4000, 3))
    got = mask.inside(torch.from_numpy(x))
    for point, answer in zip(x - CENTER, got.tolist()):
        level = next((c for c, h in enumerate(mask.halves) if np.abs(point).max() < h), None)
        if level is None:
            assert not answer
            continue
        i, j, k = ((point / mask.halves[level] + 1) / 2 * 16).astype(int)
        assert answer == bool(mask.cascades[level, i, j, k])


def test_the_cover_holds_all_that_is_inside() -> None:
    mask = make(share=0.01)
    x = torch.from_numpy(np.random.default_rng(2).uniform(-5, 5, (20000, 3)))
    plain = Mask(mask.grid, mask.origin, mask.cell)
    assert mask.grid.shape == (128, 128, 128)
    assert bool((plain.inside(x) | ~mask.inside(x)).all())
    assert float(mask.grid.float().mean()) < 0.2


def test_on_disk() -> None:
    mask = make()
    config, bits = mask.to_config(), mask.bits
    assert config == {"shape": [4, 16, 16, 16], "center": list(CENTER), "halves": [0.5, 1.0, 2.0, 4.0]}
    assert bits.numel() == 4 * 16**3 // 8
    back = Mask.from_parts(config, bits)
    assert isinstance(back, CascadedMask)
    assert torch.equal(back.cascades, mask.cascades)
    assert torch.equal(back.grid, mask.grid)
    plain = Mask(torch.ones(2, 2, 2), (0.0, 0.0, 0.0), 1.0)
    assert type(Mask.from_parts(plain.to_config(), plain.bits)) is Mask


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": [4, 16, 16]}, "impossible shape"),
        ({"shape": [3, 16, 16, 16]}, "impossible shape"),
        ({"shape": [4, 16, 16, 8]}, "impossible shape"),
        ({"shape": None}, "malformed"),
        ({"center": [0.0]}, "malformed"),
        ({"halves": [0.5, 1.0, 1.0, 2.0]}, "ascend"),
        ({"halves": [0.5, 1.0, 2.0, float("inf")]}, "ascend"),
        ({"shape": [4, 32, 32, 32]}, "needs"),
    ],
)
def test_malformed(changes: dict[str, Any], match: str) -> None:
    mask = make()
    with pytest.raises(InputError, match=match):
        Mask.from_parts({**mask.to_config(), **changes}, mask.bits)
