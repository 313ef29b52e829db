"""The main road: one call from a file, a field or two functions to a written student and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pvdconvert import registry as registries
from pvdconvert.cameras import load_transforms
from pvdconvert.conversion import Conversion
from pvdconvert.errors import DeviceError
from pvdconvert.loading import Loaded, Teacher, as_loaded, open_field
from pvdconvert.plugin import ReadOptions
from pvdconvert.prepare import Prepared, prepare
from pvdconvert.progress import Progress, Silent
from pvdconvert.report import Report
from pvdconvert.scene import Box, Scene
from pvdconvert.settings import Settings, parse_sets

__all__ = ["Loaded", "Prepared", "convert", "open_field", "prepare"]


def convert(
    source: Teacher,
    to: str,
    *,
    out: str | Path | None = None,
    from_: str | None = None,
    as_: str | None = None,
    preset: str = "balanced",
    budget: float | None = None,
    max_mb: float | None = None,
    sets: Mapping[str, Any] | None = None,
    device: str = "auto",
    seed: int = 0,
    cameras: str | Path | None = None,
    read: ReadOptions | None = None,
    box: Box | None = None,
    scene: Scene | None = None,
    min_psnr: float | None = None,
    steps: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    resume: bool = False,
    validate: bool = True,
    exact: bool = False,
    numbers: str = "same",
    method: str = "store",
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    registry: registries.Registry | None = None,
) -> Report:
    """Convert ``source`` into architecture ``to`` and write it to ``out`` (nothing is written without it).

    source    a path, a loaded field, a RadianceField, or two functions ``(density, color)`` with ``box`` or ``scene``:
              ``density(x [N,3]) -> [N]`` per world unit, ``color(x [N,3], d [N,3]) -> [N,3]`` in [0, 1]
    as_       output layout; None = safetensors
    budget    seconds for the whole conversion; None = the preset's
    steps     a report's ``replay``: run exactly these steps, whatever the clock says
    min_psnr  dB by ``fidelity/1``; below it nothing is written and QualityError is raised
    resume    go on from ``OUT.resume/`` that an interrupted run left
    exact     refuse, with RequestError, whatever would have to be trained
    numbers   of a transcoded file: "same" as in the source, or "float32"
    method    how the student is taught: "store", or "pvd" and "pvd-al" as published (docs/pvd.md); their options follow
              a colon: "pvd:loss=L2,rays=1024"
    stop      asked after every step; true interrupts the run in a resumable state

    Returns the report. Raises the errors of :mod:`pvdconvert.errors`.
    """
    run = Conversion(
        Settings(
            to,
            preset,
            budget,
            max_mb,
            parse_sets(sets or {}),
            seed,
            device,
            as_,
            min_psnr,
            steps,
            exact,
            numbers,
            method=method,
        ),
        Path(out) if out is not None else None,
        progress or Silent(),
        registry or registries.default(),
        stop,
    )
    try:
        run.check(force=force, resume=resume)
        loaded = as_loaded(source, box, scene, from_=from_, read=read, device=run.device, registry=run.registry)
        if cameras is not None:
            own = load_transforms(Path(cameras))
            loaded = dataclasses.replace(loaded, scene=dataclasses.replace(loaded.scene, cameras=own))
        return run.convert(loaded, dry_run=dry_run, resume=resume, validate=validate)
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"out of memory on {run.device}", hint="--device cpu, or a smaller --preset") from error
    except MemoryError as error:
        raise DeviceError("out of memory", hint="a smaller --preset or --max-mb") from error
    finally:
        run.progress.close()
