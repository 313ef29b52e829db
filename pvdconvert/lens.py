"""Lenses: what bends a ray between the scene and the picture. numpy only, no torch.

Coordinates are OpenCV's: x right, y down, z forward; those of a picture are (u, v) = ((i - cx) / fx, (j - cy) / fy).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import InputError

Array = NDArray[np.float64]
MOST = 1e3
"""Largest coefficient that is one."""
FARTHEST = 1e3
"""Tangent beyond which no pinhole sees."""
TINY = 1e-14
"""Coefficients below it bend nothing."""
CLOSE = 1e-12
"""Picture coordinates that are equal: a millionth of a millionth of the focal length."""


@dataclasses.dataclass(frozen=True)
class Lens:
    """A lens, by OpenCV's models.

    opencv    p = (x, y) / z, r = |p|; radial factor (1 + k1 r^2 + k2 r^4 + ...) / (1 + q1 r^2 + q2 r^4 + ...) and the
              tangential terms of (p1, p2). OpenCV's k1, k2, k3 are ``radial``, its k4, k5, k6 are ``rational``
    fisheye   the angle t from the axis lands at t (1 + k1 t^2 + k2 t^4 + k3 t^6 + k4 t^8); may see beyond 90 degrees
    """

    kind: Literal["opencv", "fisheye"] = "opencv"
    radial: tuple[float, ...] = ()
    rational: tuple[float, ...] = ()
    tangential: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.kind not in ("opencv", "fisheye"):
            raise InputError(f"lens: unknown kind {self.kind!r}", hint="known: opencv, fisheye")
        values = (*self.radial, *self.rational, *self.tangential)
        if not all(abs(v) <= MOST for v in values) or len(self.radial) > 8 or len(self.rational) > 8:
            raise InputError(f"lens: {values} are no coefficients")
        if self.kind == "fisheye" and (any(self.rational) or any(self.tangential)):
            raise InputError("lens: a fisheye has neither rational nor tangential terms")

    def distort(self, points: Array) -> Array:
        """Picture coordinates [N, 2] of points [N, 3] before the lens; NaN where it does not see them."""
        x, y, z = np.moveaxis(np.asarray(points, dtype=np.float64), -1, 0)
        if self.kind == "fisheye":
            across = np.hypot(x, y)
            angle = np.arctan2(across, z)
            scale = np.where(across > 0, self._bent(angle) / np.where(across > 0, across, 1.0), 0.0)
            out = np.stack([x * scale, y * scale], -1)
            out[(angle > self._limit) | ((across == 0) & (z <= 0))] = np.nan
            return out
        ahead = z > 0
        p = np.stack([x, y], -1) / np.where(ahead, z, 1.0)[:, None]
        ahead &= np.hypot(p[:, 0], p[:, 1]) <= self._limit
        out = self._bend(p)
        out[~ahead] = np.nan
        return out

    def undistort(self, uv: Array) -> Array:
        """Unit directions [N, 3] of picture coordinates [N, 2]; where the lens reaches none of them, the nearest."""
        return self._solve(np.asarray(uv, dtype=np.float64))[0]

    def reaches(self, uv: Array, tolerance: float = 1e-6) -> NDArray[np.bool_]:
        """[N]: whether a ray lands at picture coordinates [N, 2], to ``tolerance``."""
        return np.asarray(self._solve(np.asarray(uv, dtype=np.float64))[1] <= tolerance)

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lens:
        p1, p2 = (float(v) for v in data.get("tangential", (0.0, 0.0)))
        radial, rational = (tuple(float(v) for v in data.get(k, ())) for k in ("radial", "rational"))
        return cls(data.get("kind", "opencv"), radial, rational, (p1, p2))

    # ------------------------------------------------------------------------------------------------------ models

    def _bent(self, angle: Array) -> Array:
        """Where the angle lands, fisheye."""
        return np.asarray(angle * _horner((1.0, *self.radial), angle * angle))

    def _bend(self, p: Array) -> Array:
        """[N, 2] -> [N, 2], opencv."""
        x, y = p[:, 0], p[:, 1]
        r2 = x * x + y * y
        g = _horner((1.0, *self.radial), r2) / _horner((1.0, *self.rational), r2)
        p1, p2 = self.tangential
        u = x * g + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        v = y * g + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        return np.stack([u, v], -1)

    def _slopes(self, p: Array) -> tuple[Array, Array, Array, Array]:
        """The Jacobian of :meth:`_bend`: du/dx, du/dy, dv/dx, dv/dy."""
        x, y = p[:, 0], p[:, 1]
        r2 = x * x + y * y
        over, under = (1.0, *self.radial), (1.0, *self.rational)
        n, d = _horner(over, r2), _horner(under, r2)
        g = n / d
        dg = (_horner(_derived(over), r2) * d - n * _horner(_derived(under), r2)) / (d * d)
        p1, p2 = self.tangential
        cross = 2 * x * y * dg + 2 * p1 * x + 2 * p2 * y
        return (
            g + 2 * x * x * dg + 2 * p1 * y + 6 * p2 * x,
            cross,
            cross,
            g + 2 * y * y * dg + 6 * p1 * y + 2 * p2 * x,
        )

    @functools.cached_property
    def _limit(self) -> float:
        """Up to which r (fisheye: angle) the radial map rises: beyond, the polynomial folds back and means nothing."""
        # In s = r^2 the map is r n(s) / d(s): it rises where (n + 2 s n') d - 2 s n d' > 0 and d > 0.
        poly, twice = np.polynomial.polynomial, np.array([0.0, 2.0])
        n, d = np.array([1.0, *self.radial]), np.array([1.0, *self.rational])
        slope = poly.polysub(
            poly.polymul(poly.polyadd(n, poly.polymul(twice, poly.polyder(n))), d),
            poly.polymul(poly.polymul(twice, n), poly.polyder(d)),
        )
        ends = [math.pi if self.kind == "fisheye" else FARTHEST]
        for part in (slope, d):
            part = np.trim_zeros(np.where(np.abs(part) < TINY, 0.0, part), "b")
            if len(part) > 1:
                roots = poly.polyroots(part)
                real = roots.real[(np.abs(roots.imag) < 1e-9 * (1 + np.abs(roots))) & (roots.real > 1e-9)]
                ends.extend(float(r) ** 0.5 for r in real)
        return min(ends) * (1 - 1e-9)

    # ----------------------------------------------------------------------------------------------------- inverse

    def _solve(self, uv: Array) -> tuple[Array, Array]:
        """Unit directions [N, 3] and how far from ``uv`` they land [N]."""
        if self.kind == "fisheye":
            reach = np.hypot(uv[:, 0], uv[:, 1])
            angle, miss = self._angle(reach)
            across = np.where(reach > 0, np.sin(angle) / np.where(reach > 0, reach, 1.0), 0.0)
            return np.stack([uv[:, 0] * across, uv[:, 1] * across, np.cos(angle)], -1), miss
        p, miss = self._pinhole(uv)
        d = np.concatenate([p, np.ones((len(p), 1))], -1)
        return d / np.linalg.norm(d, axis=-1, keepdims=True), miss

    def _angle(self, reach: Array) -> tuple[Array, Array]:
        """Newton's method within a bracket, which halves where Newton leaves it."""
        slope = _even_slope((1.0, *self.radial))
        low, high = np.zeros_like(reach), np.full_like(reach, self._limit)
        angle = np.minimum(reach, self._limit)
        for _ in range(60):
            error = self._bent(angle) - reach
            if np.abs(error).max(initial=0.0) < CLOSE:
                break
            high, low = np.where(error > 0, angle, high), np.where(error <= 0, angle, low)
            with np.errstate(divide="ignore", invalid="ignore"):
                step = angle - error / _horner(slope, angle * angle)
            angle = np.where((step > low) & (step < high), step, 0.5 * (low + high))
        return angle, np.abs(self._bent(angle) - reach)

    def _pinhole(self, uv: Array) -> tuple[Array, Array]:
        """Newton's method; a step that does not come nearer is halved, and none leaves the rising part of the map."""
        p = self._within(uv)
        miss = self._miss(p, uv)
        todo = np.nonzero(miss > CLOSE)[0]
        for _ in range(60):
            if not len(todo):
                break
            at, goal, old = p[todo], uv[todo], miss[todo]
            error = self._bend(at) - goal
            a, b, c, d = self._slopes(at)
            det = a * d - b * c
            det = np.where(np.abs(det) < 1e-9, np.copysign(1e-9, det), det)
            step = np.stack([d * error[:, 0] - b * error[:, 1], a * error[:, 1] - c * error[:, 0]], -1) / det[:, None]
            best, nearest = at, old
            scale = 1.0
            for _ in range(12):
                trial = self._within(at - scale * step)
                new = self._miss(trial, goal)
                better = new < nearest
                best, nearest = np.where(better[:, None], trial, best), np.where(better, new, nearest)
                if (nearest < old).all():
                    break
                scale *= 0.5
            p[todo], miss[todo] = best, nearest
            todo = todo[(nearest > CLOSE) & (nearest < old)]
        return p, miss

    def _within(self, p: Array) -> Array:
        r = np.hypot(p[:, 0], p[:, 1])
        return np.asarray(p * np.minimum(1.0, self._limit / np.maximum(r, 1e-300))[:, None])

    def _miss(self, p: Array, uv: Array) -> Array:
        return np.asarray(np.hypot(*np.moveaxis(self._bend(p) - uv, -1, 0)))


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    out = np.full_like(x, coefficients[-1] if coefficients else 0.0)
    for c in coefficients[-2::-1]:
        out = out * x + c
    return out


def _derived(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(k * c for k, c in enumerate(coefficients))[1:]


def _even_slope(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """Of t * sum(c_k t^2k): the coefficients of its derivative in t^2."""
    return tuple((2 * k + 1) * c for k, c in enumerate(coefficients))


_PINHOLES = {"", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE"}
_OPENCV = {"OPENCV", "SIMPLE_RADIAL", "RADIAL", "FULL_OPENCV"}
_FISHEYES = {"OPENCV_FISHEYE", "FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE"}
_OTHERS = ("ftheta_p0", "latlong", "equirectangular", "orthographic")


def from_keys(data: Mapping[str, Any], where: str) -> Lens | None:
    """The lens of a transforms.json's entries (layouts 9.4, 9.5): camera_model, is_fisheye, k1..k6, p1, p2.

    A k4 without k5 and k6 is nerfstudio's factor of r^8; with them it is OpenCV's denominator. None = a pinhole. Raises
    InputError where the camera is of a kind that no pinhole or fisheye stands for.
    """
    for key in _OTHERS:
        if data.get(key):
            raise InputError(f"{where}: {key!r}: that camera is not supported", hint="known: pinhole, OpenCV, fisheye")
    model = str(data.get("camera_model") or "").upper()
    if model not in _PINHOLES | _OPENCV | _FISHEYES:
        raise InputError(
            f"{where}: camera_model {model!r:.40} is not supported", hint="known: PINHOLE, OPENCV, OPENCV_FISHEYE"
        )
    k = [_coefficient(data, f"k{n}", where) for n in range(1, 7)]
    p = (_coefficient(data, "p1", where), _coefficient(data, "p2", where))
    try:
        if model in _FISHEYES or (not model and data.get("is_fisheye")):
            return Lens("fisheye", tuple(k[:4]), (), p)
        if model in _PINHOLES - {""} or not any((*k, *p)):
            return None
        if any(k[4:]):
            return Lens("opencv", tuple(k[:3]), tuple(k[3:]), p)
        return Lens("opencv", tuple(k[:4]) if k[3] else tuple(k[:3]), (), p)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _coefficient(data: Mapping[str, Any], key: str, where: str) -> float:
    value = data.get(key) or 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MOST:
        raise InputError(f"{where}: {key!r} is {value!r:.40}, not a coefficient of a lens")
    return float(value)
