"""How large a student of Plenoxels is to be: by preset, size, time, and the target layout's limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from pvdconvert.errors import RequestError
from pvdconvert.nn.voxels import Shape, count_touched, lattice_shape
from pvdconvert.plugin import Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box
from pvdconvert_plugins.plenoxels_spec import as_config, checked, plain

PRESETS = {"fast": 144, "balanced": 256, "best": 384}
SMALLEST = 16
VERTICES_A_SECOND = 1.2e4
"""Vertices a second of the whole budget: more could not be projected within its share, nor seen often enough (lego at
preset best, after two rounds: 34.9 dB on the quick views with 327 vertices across, 34.7 with 448)."""


def plan(facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
    """Resolution by preset over the occupied box, less where the time is short or ``max_mb`` asks for it.

    To keep ``max_mb`` the colours' storage is halved before the lattice shrinks. Raises RequestError where the request
    cannot be met.
    """
    for key, value in overrides.items():
        if key in limits.fixed and plain(limits.fixed[key]) != plain(value):
            raise RequestError(
                f"plenoxels: {key}={value} cannot be had: the output layout needs {key}={limits.fixed[key]}",
                hint=f"drop --set {key}, or write another layout",
            )
    given = {**limits.defaults, **limits.fixed, **overrides}
    checked(given, RequestError)
    most = limits.defaults.get("bands")
    if most is not None and int(given["bands"]) > most:
        raise RequestError(
            f"plenoxels: bands={given['bands']} cannot be had: the output layout holds up to {most}",
            hint=f"--set bands={most}, or write another layout",
        )
    preset = PRESETS.get(budget.preset, PRESETS["balanced"])
    chosen = _config(facts, given, preset, "float32")
    if "resolution" not in given and given.get("shape") is None and budget.seconds is not None:
        for resolution in _steps(preset):
            chosen = _config(facts, given, resolution, "float32")
            if vertices(chosen, facts) <= VERTICES_A_SECOND * budget.seconds:
                break
    if budget.max_mb is None or estimate_mb(chosen, facts) <= budget.max_mb:
        return chosen
    for resolution in _steps(int(chosen["resolution"])):
        chosen = _config(facts, given, resolution, "float16")
        if estimate_mb(chosen, facts) <= budget.max_mb:
            return chosen
    least = math.ceil(estimate_mb(chosen, facts) * 100) / 100
    raise RequestError(
        f"plenoxels does not fit into {budget.max_mb:g} MB: the least that this request needs is {least:g} MB",
        hint=f"--max-mb {least:g}, or fewer --set keys",
    )


def _steps(resolution: int) -> Iterator[int]:
    """Resolutions from this one down, about 3 % apart: 10 % in size."""
    while resolution > SMALLEST:
        yield resolution
        resolution = min(resolution - 1, int(resolution * 0.97))
    yield SMALLEST


def _config(facts: TeacherFacts, given: Mapping[str, Any], resolution: int, dtype: str) -> Config:
    chosen = {"resolution": resolution, "store_dtype": dtype, **given}
    box = Box.from_json(given["box"]) if given.get("box") is not None else facts.occupied_box
    if given.get("shape") is not None:
        shape = cast(Shape, tuple(given["shape"]))
    elif given.get("box") is not None:
        shape = lattice_shape(box, int(chosen["resolution"]))
    elif given.get("missing") == "zero":
        box, shape = _centered(box, facts.scene.box, int(chosen["resolution"]))
    else:
        box, shape = cubic(box, int(chosen["resolution"]))
    return as_config(checked({**chosen, "box": box.to_json(), "shape": list(shape)}, RequestError))


def cubic(box: Box, resolution: int) -> tuple[Box, Shape]:
    """``box`` grown about its centre to whole cubic cells; the longest side keeps its length."""
    h = box.longest / (resolution - 1)
    n = [max(1, math.ceil(s / h - 1e-6)) for s in box.size]
    low = [c - 0.5 * h * k for c, k in zip(box.center, n)]
    x, y, z = (k + 1 for k in n)
    grown = Box((low[0], low[1], low[2]), (low[0] + h * n[0], low[1] + h * n[1], low[2] + h * n[2]))
    return grown, (x, y, z)


def _centered(box: Box, scene: Box, resolution: int) -> tuple[Box, Shape]:
    """A lattice whose vertices are the centres of cells that tile ``box``, grown to whole cubes inside of ``scene``.

    svox2's arrangement: half a cell around the outer vertices belongs to it, and must not leave the scene. Cells are
    not quite cubes where the scene has no room for whole ones.
    """
    h = box.longest / resolution
    low, high, n = [], [], []
    for a, b, first, last in zip(box.min, box.max, scene.min, scene.max):
        a, b = max(a, first), min(b, last)
        k = max(2, math.ceil((b - a) / h - 1e-6))
        length = min(k * h, last - first)
        start = min(max((a + b - length) / 2, first), last - length)
        low.append(start + 0.5 * length / k)
        high.append(start + length - 0.5 * length / k)
        n.append(k)
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2])), (n[0], n[1], n[2])


def vertices(config: Config, facts: TeacherFacts) -> float:
    """Vertices that the student will have: counted where the visible cells are known, else an upper estimate."""
    o = checked(config, RequestError)
    box, shape = Box.from_json(cast("Mapping[str, Any]", o.box)), cast(Shape, o.shape)
    if facts.occupancy is not None:
        return float(count_touched(box, shape, facts.occupancy.origin, facts.occupancy.cell, facts.occupancy.grid))
    h = math.prod(s / (n - 1) for n, s in zip(shape, box.size)) ** (1 / 3)
    volume = (facts.surface_cells or facts.occupied_cells) * facts.cell**3
    return min(volume / h**3 * (1 + 1.5 * h / facts.cell), float(math.prod(shape)))


def estimate_mb(config: Config, facts: TeacherFacts) -> float:
    """Megabytes (10^6) of the file."""
    o = checked(config, RequestError)
    row = 6 + 4 + 3 * o.bands**2 * (2 if o.store_dtype == "float16" else 4)
    return vertices(config, facts) * row / 1e6 + 0.01
