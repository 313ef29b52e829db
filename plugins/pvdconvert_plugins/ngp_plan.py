"""Which ``ngp`` student to make for what it may cost. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pvdconvert.errors import InputError, RequestError, UsageError
from pvdconvert.kernels.hashgrid_spec import HashGridSpec, growth
from pvdconvert.plugin import Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box
from pvdconvert_plugins.ngp_spec import NgpOptions, parse

# preset -> log2_table, finest cells per occupancy cell, width of the colour network. On lego, 900 steps, 2^19 entries:
# finest cells 512, 768, 2048 across gave 32.6, 32.2, 32.0 dB. At equal time, 2^18 entries: networks 64 wide 32.6 dB,
# both 128 wide 33.0, that of the colour alone 33.1.
_PRESETS = {"fast": (16, 4.0, 64), "balanced": (18, 6.0, 128), "best": (19, 8.0, 128)}
_SMALLEST_TABLE = 8
CUBE = "cube"
"""``box``: the cube that shares the lowest corner and the longest side of the scene's box."""
PER_BOX = "per box"
"""``density_scale``: one over the side of the box, so that the network's density is per box."""


def grid_spec(options: NgpOptions) -> HashGridSpec:
    """The grid that ``options`` describe. Raises InputError where there is none."""
    o = options
    try:
        return HashGridSpec.make(
            o.levels,
            o.features,
            o.log2_table,
            o.base_resolution,
            o.per_level_scale,
            o.index_rule,
            o.offsets,
            o.interpolation,
            o.grid_type or "hash",
        )
    except ValueError as error:
        raise InputError(f"ngp: {error}") from error


def plan(facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
    """Table and finest resolution by preset; the pseudo-key ``finest_resolution`` sets per_level_scale.

    A layout's ``finest_per_unit`` sets it per world unit; its box and density_scale may be ``CUBE`` and ``PER_BOX``;
    ``allowed`` says which values it has room for, by key.
    """
    fixed = dict(limits.fixed)
    for key in fixed.keys() & overrides.keys():
        if fixed[key] != overrides[key]:
            raise RequestError(
                f"ngp: {key}={overrides[key]} was asked, but the target layout only holds {fixed[key]}",
                hint=f"leave out --set {key}, or write the native format",
            )
    wanted = {**limits.defaults, **fixed, **overrides}
    preset = budget.preset if budget.preset in _PRESETS else "balanced"
    if budget.seconds is not None and budget.seconds < 100:
        preset = "fast"
    log2_table, per_cell, color_hidden = _PRESETS[preset]
    box = facts.occupied_box
    if wanted.get("box") == CUBE:
        low, side = facts.scene.box.min, facts.scene.box.longest
        box = Box(low, (low[0] + side, low[1] + side, low[2] + side))
        wanted["box"] = [list(box.min), list(box.max)]
    if wanted.get("density_scale") == PER_BOX:
        wanted["density_scale"] = 1.0 / box.longest
    for key, values in wanted.pop("allowed", {}).items():
        if wanted.get(key) is not None and wanted[key] not in values:
            known = ", ".join(str(v) for v in list(values)[:8]) + (", ..." if len(values) > 8 else "")
            raise RequestError(f"ngp: {key} = {wanted[key]!r} does not fit the target layout", hint=f"one of {known}")
    finest, per_unit = wanted.pop("finest_resolution", None), wanted.pop("finest_per_unit", None)
    if finest is None and per_unit is not None and "per_level_scale" not in wanted:
        finest = float(per_unit) * facts.scene.box.longest
    if finest is not None and "per_level_scale" in wanted:
        raise RequestError("ngp: finest_resolution and per_level_scale exclude each other", hint="set one of them")
    config: Config = {**dataclasses.asdict(NgpOptions()), "box": [list(box.min), list(box.max)]}
    config["log2_table"] = log2_table
    if "hidden" not in wanted:  # else the colour's is as wide as that, unless it was set, too
        config["color_hidden"] = color_hidden
    config.update(wanted)
    if "per_level_scale" not in wanted:
        cells = box.longest / facts.cell
        finest = float(finest) if finest is not None else min(max(cells * per_cell, 128.0), 4096.0)
        config["per_level_scale"] = growth(
            int(config["levels"]), int(config["base_resolution"]), finest, str(config["index_rule"])
        )
    try:
        grid_spec(parse(config))
    except InputError as error:
        raise UsageError(str(error), hint="check --set") from error
    _fit(config, budget, facts, fixed_table="log2_table" in wanted)
    return config


def _megabytes(config: Config, facts: TeacherFacts) -> float:
    """Size of the weights and the mask on disk, 10^6 bytes."""
    options = parse({**config, "mask": None})
    spec = grid_spec(options)
    color_hidden, color_in = options.color_hidden or options.hidden, options.sh_bands**2 + 1 + options.geo_features
    field_nets = (
        spec.width * options.hidden
        + options.hidden**2 * max(0, options.density_layers - 1)
        + options.hidden * (1 + options.geo_features)
        + color_hidden * (color_in + len(options.color_constants or ()) + 3)
        + color_hidden**2 * max(0, options.color_layers - 1)
    )
    cells = math.prod(side / facts.cell + 1 for side in facts.scene.box.size)
    each = 2.0 if options.dtype == "float16" else 4.0
    return (each * (spec.entries * spec.features + field_nets) + cells / 8) / 1e6


def _fit(config: Config, budget: Budget, facts: TeacherFacts, *, fixed_table: bool) -> None:
    """Shrink the table, in place, until the file stays below ``budget.max_mb``."""
    while budget.max_mb is not None and (size := _megabytes(config, facts)) > budget.max_mb:
        if fixed_table or config["log2_table"] <= _SMALLEST_TABLE:
            raise RequestError(
                f"ngp: {size:.2f} MB is the smallest that these settings allow, --max-mb {budget.max_mb:g} was asked",
                hint="raise --max-mb, or lower --set levels, hidden or log2_table",
            )
        config["log2_table"] -= 1
