"""LDR-FLIP: a closed form for flat pictures, and the answers of its authors' own program."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pvdconvert.metrics import PIXELS_PER_DEGREE, flip, flip_map, ssim

Bytes = NDArray[np.uint8]


def pictures() -> dict[str, tuple[Bytes, Bytes]]:
    """Pairs [48, 64, 3] made by integer arithmetic: displaced bands, a bright spot, an edge moved by 3 pixels."""
    j, i = np.mgrid[0:48, 0:64]
    a = np.stack([(4 * i) % 256, (5 * j) % 256, (i * j) % 256], -1).astype(np.uint8)
    b = np.stack([(4 * i + 8 * ((i // 8) % 2)) % 256, (5 * j) % 256, (i * j + 16) % 256], -1).astype(np.uint8)
    c = a.copy()
    c[20:28, 30:34] = 255
    left, right = np.array([40, 90, 160], np.uint8), np.array([200, 120, 30], np.uint8)
    edge = np.where((i < 32)[..., None], left, right)
    return {"bands": (a, b), "spot": (a, c), "edge": (edge, np.roll(edge, 3, axis=1))}


def flat(value: tuple[int, int, int]) -> Bytes:
    return np.full((24, 30, 3), value, np.uint8)


def lab(rgb: tuple[float, float, float]) -> NDArray[np.float64]:
    """CIE L*a*b* of linear sRGB by its definition; primaries and D65 of IEC 61966-2-1, derived from chromaticities."""
    xy = np.array([[0.64, 0.33], [0.30, 0.60], [0.15, 0.06]])
    columns = np.stack([xy[:, 0] / xy[:, 1], np.ones(3), (1 - xy.sum(1)) / xy[:, 1]])
    white = np.array([0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290])
    xyz = columns @ (np.linalg.solve(columns, white) * np.array(rgb)) / white
    f = np.array([t ** (1 / 3) if t > (6 / 29) ** 3 else t * (29 / 6) ** 2 / 3 + 4 / 29 for t in xyz])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def hyab(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    one, two = (v * np.array([1.0, v[0] / 100, v[0] / 100]) for v in (lab(a), lab(b)))
    return float(abs(one[0] - two[0]) + np.hypot(*(one - two)[1:]))


def closed_form(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """FLIP of two flat pictures: no filter changes them and they have no feature, so only colour counts."""
    largest = math.pow(hyab((0, 1, 0), (0, 0, 1)), 0.7)
    d = math.pow(hyab(a, b), 0.7)
    if d < 0.4 * largest:
        return 0.95 * d / (0.4 * largest)
    return 0.95 + 0.05 * (d - 0.4 * largest) / (0.6 * largest)


def test_flat_pictures_have_a_closed_form() -> None:
    black, white, grey = (0, 0, 0), (255, 255, 255), (128, 128, 128)
    # L* of black and white differ by 100, so d = 100^0.7 = 25.12; the rest follows from the distance of green and blue.
    assert flip(flat(black), flat(white)) == pytest.approx(closed_form((0, 0, 0), (1, 1, 1)), abs=2e-4)
    assert closed_form((0, 0, 0), (1, 1, 1)) == pytest.approx(0.9674, abs=2e-4)
    linear = ((128 / 255 + 0.055) / 1.055) ** 2.4
    assert flip(flat(grey), flat(white)) == pytest.approx(closed_form((linear,) * 3, (1, 1, 1)), abs=2e-4)
    # The largest distance there is counts 1.
    assert flip(flat((0, 255, 0)), flat((0, 0, 255))) == pytest.approx(1.0, abs=1e-9)
    # No distance at all counts 0, in every pixel.
    assert flip_map(flat((9, 80, 200)), flat((9, 80, 200))).max() == 0.0


@pytest.mark.parametrize(
    ("name", "density", "mean", "pixels"),
    [
        # Means and the pixels (24, 32), (0, 0), (24, 10), (47, 63) answered by flip-evaluator 1.7 (BSD-3, float32), to
        # which the pictures were given as n / 255. Features of a picture are moved by float32 up to 3e-5.
        ("bands", PIXELS_PER_DEGREE, 0.16636916, (0.06695657, 0.02736340, 0.28498104, 0.96299237)),
        ("spot", PIXELS_PER_DEGREE, 0.02610377, (0.975257, 0.0, 0.0, 0.0)),
        ("edge", PIXELS_PER_DEGREE, 0.16807677, (0.6979971, 0.9527866, 0.01711138, 0.0)),
        ("bands", 20.0, 0.25152054, (0.04636001, 0.02697752, 0.648988, 0.95942473)),
        ("spot", 20.0, 0.01536685, (0.97009504, 0.0, 0.0, 0.0)),
        ("edge", 20.0, 0.11677486, (0.91881365, 0.95808226, 0.0, 0.0)),
    ],
)
def test_agrees_with_its_authors_program(
    name: str, density: float, mean: float, pixels: tuple[float, float, float, float]
) -> None:
    got = flip_map(*pictures()[name], pixels_per_degree=density)
    assert got.shape == (48, 64)
    assert got.mean() == pytest.approx(mean, abs=2e-6)
    assert [got[24, 32], got[0, 0], got[24, 10], got[47, 63]] == pytest.approx(pixels, abs=5e-5)
    assert 0.0 <= got.min() <= got.max() <= 1.0


def test_installed_program_agrees() -> None:
    """The same against the program itself, where somebody has it (it is no dependency)."""
    evaluator = pytest.importorskip("flip_evaluator", reason="flip-evaluator is not installed")
    for first, second in pictures().values():
        one, two = ((v / 255).astype(np.float32) for v in (first, second))
        theirs = np.asarray(evaluator.evaluate(one, two, "LDR", True, False)[0])
        np.testing.assert_allclose(flip_map(first, second), theirs.reshape(48, 64), atol=5e-5)


def test_masks_pick_pixels() -> None:
    first, second = pictures()["spot"]
    mask = np.zeros((48, 64), bool)
    mask[:, :10] = True  # far from the spot
    assert flip(first, second, mask) == 0.0
    assert flip(first, second, ~mask) == pytest.approx(flip_map(first, second)[:, 10:].mean())
    assert ssim(first, second, mask) == pytest.approx(1.0)
    # Windows are picked by their central pixel; those of the columns 5 to 58 lie inside of the picture.
    share = 5 / 54
    rest = (ssim(first, second) - share) / (1 - share)
    assert ssim(first, second, ~mask) == pytest.approx(rest)
    for figure in (flip, ssim):
        with pytest.raises(ValueError, match="no pixels"):
            figure(first, second, np.zeros((48, 64), bool))
