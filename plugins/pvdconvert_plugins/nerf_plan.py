"""How large a `nerf` student is. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import Budget, Config, Limits, TeacherFacts
from pvdconvert_plugins.nerf_spec import NerfOptions

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"depth": 4, "width": 128, "skips": [], "direction_layers": [64]},
    "balanced": {"depth": 6, "width": 192, "skips": [2], "direction_layers": [96]},
    "best": {"depth": 8, "width": 256, "skips": [4], "direction_layers": [128]},
}
"""Students: sizes by preset; a bottleneck without activation adds nothing to what such a network can be."""


NARROW = (96, 64, 48, 32, 24, 16)
"""Widths that are tried where the presets exceed --max-mb."""

THICK = 40.0
"""Unit output of a student's density layer is this over the side of its box."""


def plan(facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
    """The largest network that preset, size and layout allow. Raises RequestError where they contradict."""
    for key, value in overrides.items():
        if key in limits.fixed and limits.fixed[key] != value:
            raise RequestError(
                f"nerf: {key}={value!r} was asked, but the output layout holds only {limits.fixed[key]!r}",
                hint="leave out --set, or write the native layout",
            )
    for preset in _sizes(budget.preset, limits.defaults):
        config = student(facts, preset, limits, overrides)
        if budget.max_mb is None or _megabytes(config, facts) <= budget.max_mb:
            return config
    raise RequestError(
        f"nerf: no network fits --max-mb {budget.max_mb}: the smallest takes {_megabytes(config, facts):.3f} MB",
        hint="raise --max-mb",
    )


def student(facts: TeacherFacts, preset: Mapping[str, Any], limits: Limits, overrides: Mapping[str, Any]) -> Config:
    """One network of the shape ``preset`` on the teacher's occupied box; ``limits.fixed`` and ``overrides`` win."""
    box = facts.occupied_box
    given = {**limits.fixed, **overrides}
    config: Config = {
        "direction_encoding": "sh",
        "bottleneck_width": None,
        # Grows no faster than the weights, unlike exp; unit output is a mean free path of a fortieth of the box.
        "density_activation": "softplus",
        "density_scale": THICK / box.longest,
        "input": "box",
        "box": box.to_json(),
        **preset,
        **given,
    }
    width = config["width"]
    if preset.get("bottleneck_width") == preset["width"] and isinstance(width, int):
        # A program whose other layers follow the trunk's width.
        config |= {"bottleneck_width": width, "direction_layers": [width // 2], **given}
    if "skips" not in given and isinstance(config["depth"], int):
        config["skips"] = [layer for layer in config["skips"] if layer < config["depth"] - 1]
    try:
        return NerfOptions.from_config(config).to_config()
    except InputError as error:
        raise RequestError(str(error)) from error


def _sizes(preset: str, defaults: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Shapes to try, largest first: the layout's own and narrower ones, or the presets from ``preset`` downwards."""
    if defaults:
        narrow = [
            {"depth": 4, "skips": [], "width": w, "bottleneck_width": w, "direction_layers": [w // 2]}
            for w in (128, *NARROW)
        ]
        base = {**PRESETS["best"], **defaults}
        return [base, *({**base, **shape} for shape in narrow)]
    names = list(PRESETS)[list(PRESETS).index(preset) :: -1] if preset in PRESETS else ["balanced", "fast"]
    narrow = [{**PRESETS["fast"], "width": w, "direction_layers": [w // 2]} for w in NARROW]
    return [*(PRESETS[name] for name in names), *narrow]


def _megabytes(config: Config, facts: TeacherFacts) -> float:
    """Size on disk: float32 weights and a bit for each cell of the mask."""
    weights = sum(math.prod(shape) for shape in NerfOptions.from_config(config).shapes().values())
    cells = math.prod(math.ceil(side / facts.cell) for side in facts.scene.box.size)
    return (4 * weights + cells / 8 + 4096) / 1e6
