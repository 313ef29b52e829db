"""``args.txt`` of AAAI2023-PVD: what its files lack (layouts section 8.1). Imports no torch."""

from __future__ import annotations

import ast
import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import ReadOptions
from pvdconvert_formats._lazy import text_near

SIGMA_CLIP = (-2.0, 7.0)
SCALE = 0.8
MAX_LINE = 4096


@dataclasses.dataclass(frozen=True)
class Args:
    """The arguments that change the function; ``assumed`` names those that stand in no file.

    clip     bounds of the log-density
    scale    positions are this times the data set's, axes cycled
    distill  whether distill_mutual wrote the file: it cuts vm's colour features as well
    white    whether rays end on white
    """

    clip: tuple[float, float]
    scale: float
    distill: bool | None
    assumed: tuple[str, ...]


def read_args(manifest: Manifest, options: ReadOptions, own: Mapping[str, Any], where: str) -> Args:
    """From ``--config``, from args.txt beside the file or in the folder above, or the program's defaults."""
    found = text_near(manifest, ("args.txt",), options.config)
    given = parse(*found) if found else {}
    if given.get("enable_edit_plenoxel") is True:
        raise InputError(f"{where}: trained with --enable_edit_plenoxel, which erases parts by hand: not supported")
    assumed = []
    clip: Any = own.get("sigma_clip")
    if not _pair(clip):
        low, high = given.get("sigma_clip_min"), given.get("sigma_clip_max")
        assumed += ["sigma_clip"] if low is None or high is None else []
        clip = (SIGMA_CLIP[0] if low is None else low, SIGMA_CLIP[1] if high is None else high)
    if not _pair(clip):
        raise InputError(f"{where}: sigma_clip_min, sigma_clip_max are {clip!r:.60}", hint="numbers such as -2 and 7")
    scale = own.get("scale", given.get("scale"))
    if scale is None:
        assumed.append("world")
        scale = SCALE
    if type(scale) not in (int, float) or not 0 < scale < 1e6:
        raise InputError(f"{where}: scale is {scale!r:.40}, not a positive number")
    distill = None if not given else given.get("just_train_a_model") is not True
    if isinstance(own.get("distill"), bool):
        distill = own["distill"]
    return Args((float(clip[0]), float(clip[1])), float(scale), distill, tuple(assumed))


def _pair(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and [type(v) in (int, float) for v in value] == [True, True]
        and -100 <= value[0] < value[1] <= 30
    )


def parse(path: str, text: str) -> dict[str, Any]:
    """name -> value of the lines ``('name', value)``; other lines (metrics) are skipped.

    Values are Python literals, never evaluated. Raises InputError where no line is one.
    """
    out: dict[str, Any] = {}
    for line in text.splitlines()[:MAX_LINE]:
        found = re.fullmatch(r"\(\s*'(\w{1,64})'\s*,\s*(.{1,4000}?)\s*\)", line.strip())
        if found is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out[found[1]] = ast.literal_eval(found[2])
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    if not out:
        raise InputError(f"{path}: not an args.txt of AAAI2023-PVD: no line is ('name', value)")
    return out
