"""What an interrupted conversion leaves beside its output, so that the same command with ``--resume`` goes on.

``OUT.resume/``: ``run.json`` (request, position, seeds, reports) and ``state.safetensors`` (student and optimiser). The
store is not kept: the recorded number of label batches and the seed rebuild it bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pvdconvert.errors import InputError, OutputError, UsageError
from pvdconvert.field import RadianceField
from pvdconvert.plugin import Architecture
from pvdconvert.report import StageReport, clean
from pvdconvert.scene import Scene
from pvdconvert.settings import Settings

if TYPE_CHECKING:
    from pvdconvert.distill.distiller import Position
    from pvdconvert.solve.lazy_adam import LazyAdam

VERSION = 1


class Run(Protocol):
    """What teaches a student: from a teacher's answers, or from pictures."""

    student: RadianceField
    optimizer: LazyAdam
    generator: torch.Generator
    position: Position


def folder(out: Path) -> Path:
    """``OUT.resume`` beside ``OUT``."""
    return out.with_name(out.name + ".resume")


def remove(out: Path) -> None:
    """Forget an earlier interruption, if there was one."""
    shutil.rmtree(folder(out), ignore_errors=True)


def save(
    where: Path,
    settings: Settings,
    sha256: str,
    config: dict[str, Any],
    distiller: Run,
    architecture: Architecture,
    labels: tuple[int, int],
    reports: list[StageReport],
    elapsed: float,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state of ``distiller`` and ``extra``. Raises OutputError where the disk refuses."""
    from safetensors.torch import save_file

    student, tensors = architecture.save(distiller.student)
    everything = {f"student.{k}": v.detach().cpu().contiguous() for k, v in tensors.items()}
    numbers: dict[str, dict[str, float]] = {}
    for index, entry in distiller.optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                everything[f"optimizer.{index}.{key}"] = value.detach().cpu().contiguous()
            elif isinstance(value, int | float):
                numbers.setdefault(str(index), {})[key] = value
    everything["generator"] = distiller.generator.get_state()
    everything |= {f"extra.{k}": v.detach().cpu().contiguous() for k, v in (extra or {}).items()}
    data = {
        "version": VERSION,
        "request": _request(settings, sha256),
        "config": config,
        "student": student,
        "labels": list(labels),
        "position": dataclasses.asdict(distiller.position),
        "reports": [dataclasses.asdict(r) for r in reports],
        "numbers": numbers,
        "elapsed": elapsed,
    }
    try:
        where.mkdir(exist_ok=True)
        part = where / "state.part"
        save_file(everything, part)
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # the library's temporary files are private, a user's are as he has them
        part.replace(where / "state.safetensors")
        (where / "run.json").write_text(json.dumps(clean(data), indent=1, sort_keys=True), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{where}: the state cannot be kept: {error.strerror or error}") from error


@dataclasses.dataclass
class State:
    """What :func:`load` found. ``student``: its configuration as the architecture saves it, masks and all."""

    config: dict[str, Any]
    student: dict[str, Any]
    scout: int
    labels: int
    position: dict[str, Any]
    reports: list[StageReport]
    elapsed: float
    tensors: dict[str, Tensor]
    numbers: dict[str, dict[str, float]]

    @property
    def extra(self) -> dict[str, Tensor]:
        """What was given to :func:`save` as ``extra``."""
        return {k.removeprefix("extra."): v for k, v in self.tensors.items() if k.startswith("extra.")}

    def restore(self, distiller: Run, architecture: Architecture, scene: Scene) -> RadianceField:
        """Put the student's weights, the optimiser and the random numbers back into ``distiller``."""
        from pvdconvert.distill.distiller import Position

        weights = {k.removeprefix("student."): v for k, v in self.tensors.items() if k.startswith("student.")}
        loaded = architecture.load(self.config_of(distiller, architecture), weights, scene)
        with torch.no_grad():
            theirs = dict(loaded.named_parameters())
            for name, parameter in distiller.student.named_parameters():
                parameter.copy_(theirs[name].to(parameter.device))
        state = distiller.optimizer.state_dict()
        kept: dict[int, dict[str, Any]] = {}
        for key, value in self.tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                # A copy of its own lies aligned in memory, as the original did: vector units round by that.
                kept.setdefault(int(index), {})[name] = value.clone()
        for text, values in self.numbers.items():
            kept.setdefault(int(text), {}).update(values)
        state["state"] = kept
        distiller.optimizer.load_state_dict(state)
        distiller.generator.set_state(self.tensors["generator"])
        distiller.position = Position(**self.position)
        return distiller.student

    def config_of(self, distiller: Run, architecture: Architecture) -> dict[str, Any]:
        """The student's configuration with its mask, as ``save`` gives it."""
        return architecture.save(distiller.student)[0]


def load(where: Path, settings: Settings, sha256: str) -> State:
    """Read what :func:`save` wrote.

    Raises UsageError where the request is not the same, InputError where the state is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        data = json.loads((where / "run.json").read_text(encoding="utf-8"))
        tensors = load_file(where / "state.safetensors")
        if data["version"] != VERSION:
            raise InputError(f"{where}: written by another version", hint="start without --resume")
        request = _request(settings, sha256)
        for key, value in request.items():
            if data["request"].get(key) != value:
                raise UsageError(
                    f"{where}: {key} was {data['request'].get(key)!r}, now {value!r}",
                    hint="repeat the same command, or start without --resume",
                )
        return State(
            config=data["config"],
            student=data["student"],
            scout=int(data["labels"][0]),
            labels=int(data["labels"][1]),
            position=data["position"],
            reports=[StageReport(**r) for r in data["reports"]],
            elapsed=float(data["elapsed"]),
            tensors=tensors,
            numbers=data["numbers"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{where}: the kept state is damaged: {error}", hint="start without --resume") from error


def _request(settings: Settings, sha256: str) -> dict[str, Any]:
    """What must not change between the two runs; the budget may."""
    data = settings.to_json()
    kept = {k: data[k] for k in ("to", "preset", "max_mb", "sets", "seed", "layout", "steps", "method")}
    cleaned = clean({**kept, "sha256": sha256})
    assert isinstance(cleaned, dict)
    return cleaned
