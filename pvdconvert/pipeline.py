"""The main road: one call from a file, a field or two functions to a written student and a report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pvdconvert import registry as registries
from pvdconvert.conversion import Conversion
from pvdconvert.data import Dataset
from pvdconvert.data.opening import open_cameras
from pvdconvert.errors import DeviceError, UsageError
from pvdconvert.loading import Loaded, Teacher, as_loaded, open_field
from pvdconvert.metrics import Keep
from pvdconvert.plugin import ReadOptions
from pvdconvert.prepare import Prepared, prepare
from pvdconvert.progress import Progress, Silent
from pvdconvert.reality import Reality
from pvdconvert.relay import halves, relay
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
    via: str | None = None,
    images: Reality | Dataset | str | Path | None = None,
    polish: bool = False,
    parallel: bool = False,
    max_memory: int | None = None,
    keep: Keep | None = None,
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
    via       an architecture: distil into it first, and from that proxy into ``to`` (both errors are reported)
    method    how the student is taught: "store", or "pvd" and "pvd-al" as published (docs/pvd.md); their options follow
              a colon: "pvd:loss=L2,rays=1024"
    images    real pictures of the scene: the report says what teacher and student are worth on a few of their split
              "test" (a path, a dataset, or a pvdconvert.reality.Reality, which says on how many)
    polish    go on training the student on the split "train" of ``images``; nothing else is ever trained on
    parallel  share the work with the other processes that torchrun has started; each must make the same call, and the
              first alone reports, validates and writes
    max_memory  bytes of memory for the whole process, None = what is free: fewer of the teacher's answers are kept at
              once, or they are mapped from files beside ``out``
    keep      told the held-out pictures of teacher and student (pvdconvert.report.album), if there is a validation
    stop      asked after every step; true interrupts the run in a resumable state

    Returns the report. Raises the errors of :mod:`pvdconvert.errors`.
    """
    sets = parse_sets(sets or {})
    settings = Settings(to, preset, budget, max_mb, sets, seed, device, as_, min_psnr, steps, exact, numbers, via)
    settings = dataclasses.replace(settings, method=method, max_memory=max_memory)
    if via is not None and (resume or dry_run):
        raise UsageError("--via cannot be resumed or tried dry", hint="convert in two steps: FILE --to PROXY, then on")
    if polish and images is None:
        raise UsageError("--polish needs real pictures", hint="add --images DATASET")
    if polish and resume:
        raise UsageError("--polish and --resume contradict each other: polishing cannot be resumed")
    if parallel:
        from pvdconvert.distill.parallel import fit, group

        settings = fit(settings)
    asked, proxied = (settings, None) if via is None else reversed(halves(settings))
    target = Path(out) if out is not None else None
    rooms = (progress or Silent(), registry or registries.default(), stop)
    run = Conversion(asked, target, *rooms)
    proxy = None if proxied is None else Conversion(proxied, None, *rooms)
    run.keep = keep
    try:
        run.check(force=force, resume=resume)
        if proxy is not None:
            proxy.check(force=force, resume=False)
        loaded = as_loaded(source, box, scene, from_=from_, read=read, device=run.device, registry=run.registry)
        if cameras is not None:
            own = open_cameras(cameras)
            loaded = dataclasses.replace(loaded, scene=dataclasses.replace(loaded.scene, cameras=own))
        if images is not None:
            run.reality = Reality.of(images, loaded, run.registry, polish=polish)
        if proxy is not None:
            report = relay(loaded, proxy, run, validate=validate)
            report.settings = settings.to_json()
            return report
        with group(run.device) if parallel else contextlib.nullcontext() as run.ranks:
            if run.ranks is not None and run.reality is not None and run.reality.polish:
                raise UsageError("--polish runs in one process", hint="leave torchrun away")
            return run.convert(loaded, dry_run=dry_run, resume=resume, validate=validate)
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"out of memory on {run.device}", hint="--device cpu, or a smaller --preset") from error
    except MemoryError as error:
        raise DeviceError("out of memory", hint="a smaller --preset or --max-mb") from error
    finally:
        run.progress.close()
