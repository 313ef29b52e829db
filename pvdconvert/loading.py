"""A path -> a field with its scene. Torch is imported only once the file has been recognised."""

from __future__ import annotations

import dataclasses
import difflib
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pvdconvert import registry as registries
from pvdconvert.errors import DeviceError, InputError, RequestError, UsageError
from pvdconvert.identify import Candidate, Identified, identify
from pvdconvert.plugin import LazyTensor, Parts, ReadOptions
from pvdconvert.scene import Box, Scene

if TYPE_CHECKING:
    import torch

    from pvdconvert.field import RadianceField

MAX_TENSOR_BYTES = 1 << 36

SMALL = 1 << 24
"""Numbers in a file that may be read twice."""
SLIPS = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RecursionError,
          struct.error)  # fmt: skip
"""What a format's code may slip on in a damaged file: an error of the file, not of the program."""


@dataclasses.dataclass
class Loaded:
    """A field and where it came from. ``sha256`` is that of the file (of the files, in order, for a folder)."""

    field: RadianceField
    scene: Scene
    parts: Parts
    format: str
    architecture: str
    candidates: tuple[Candidate, ...]
    sha256: str
    path: Path | None
    bytes: int

    @property
    def notes(self) -> tuple[str, ...]:
        return self.parts.notes


Teacher: TypeAlias = "Path | str | RadianceField | Loaded | tuple[Callable[..., Any], Callable[..., Any]]"


def read_parts(
    path: Path,
    *,
    from_: str | None = None,
    read: ReadOptions | None = None,
    registry: registries.Registry | None = None,
) -> tuple[Identified, Parts]:
    """Recognise ``path`` by content and take it apart; tensors stay in the file. Imports no torch.

    Raises as :func:`pvdconvert.identify.identify` and :func:`take_apart` do.
    """
    registry = registry or registries.default()
    found = identify(path, from_, registry)
    return found, take_apart(found, read, registry)


def take_apart(
    found: Identified,
    read: ReadOptions | None = None,
    registry: registries.Registry | None = None,
    asked: Asked | None = None,
) -> Parts:
    """The parts of a recognised file. What the user gave and the format did not look at is noted, or refused.

    ``asked`` (in place of ``read``) can tell afterwards what the format looked at. Raises InputError (names file and
    key, or the option that is missing), UsageError (an extra entry that the format does not know).
    """
    asked = asked or Asked.of(read or ReadOptions())
    try:
        parts = (registry or registries.default()).format(found.format).read(found.manifest, asked)
    except SLIPS as error:
        raise InputError(
            f"{found.manifest.path}: format {found.format!r} cannot read it: {type(error).__name__}: {error}",
            hint="pvdconvert inspect shows what the file holds",
        ) from error
    notes = asked.unused(found.format)
    return dataclasses.replace(parts, notes=(*parts.notes, *notes)) if notes else parts


class Asked(ReadOptions):
    """ReadOptions that remember which of them were looked at."""

    @classmethod
    def of(cls, read: ReadOptions) -> Asked:
        values = {f.name: getattr(read, f.name) for f in dataclasses.fields(read)}
        return cls(**{**values, "extra": _Keys(values["extra"])})

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in _FLAGS:
            self.__dict__.setdefault("_seen", set()).add(name)
        return value

    def looked_at(self) -> set[str]:
        """Options ("bounds", "config", ...) and keys of ``extra`` that were looked at, given or not."""
        seen: set[str] = self.__dict__.get("_seen", set())
        return {*seen, *self.__dict__["extra"].seen}

    def unused(self, format_name: str) -> tuple[str, ...]:
        """Notes on options that were given and not looked at. Raises UsageError for such extra entries."""
        extra, seen = self.__dict__["extra"], self.__dict__.get("_seen", set())
        for key in extra.given.keys() - extra.seen:
            near = difflib.get_close_matches(key, extra.seen, 1, 0.5)
            known = f"it looks for {', '.join(sorted(extra.seen))}" if extra.seen else "it looks for none"
            raise UsageError(
                f"--extra {key}: format {format_name!r} asks for no such entry of this file",
                hint=f"did you mean {near[0]!r}?" if near else known,
            )
        given = [name for name in _FLAGS if name not in seen and self.__dict__[name] is not None]
        return tuple(f"{_FLAGS[name]} is not used: a {format_name} file says it itself" for name in given)


_FLAGS = {n: f"--{n}" for n in ("bounds", "background", "near", "far", "config")}


class _Keys(Mapping[str, str]):
    """A mapping that remembers which keys were asked for."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given, self.seen = dict(given), set[str]()

    def __getitem__(self, key: str) -> str:
        self.seen.add(key)
        return self.given[key]

    def __iter__(self) -> Iterator[str]:
        self.seen |= self.given.keys()
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def numbers(name: str, lazy: LazyTensor, where: str) -> NDArray[Any]:
    """Read one tensor. Raises RequestError where values are no numbers, InputError where it cannot be read."""
    count = int(np.prod(lazy.shape, dtype=np.float64)) if lazy.shape else 1
    if count * 4 > MAX_TENSOR_BYTES:
        raise RequestError(f"{where}: tensor {name!r} of shape {lazy.shape} is too large to load")
    try:
        array = lazy.numpy()
    except SLIPS as error:
        raise InputError(f"{where}: tensor {name!r} cannot be read: {type(error).__name__}: {error}") from error
    if array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
        raise RequestError(
            f"{where}: tensor {name!r} holds NaN or infinity", hint="the training that wrote it diverged"
        )
    if array.dtype.kind not in "fiub":
        raise InputError(f"{where}: tensor {name!r} has the unusable type {array.dtype}")
    return array


def check_small(tensors: Mapping[str, LazyTensor], where: str) -> None:
    """What :func:`numbers` refuses, before torch is imported, in files that are read twice at no cost."""
    if sum(math.prod(t.shape) for t in tensors.values()) <= SMALL:
        for name, lazy in tensors.items():
            numbers(name, lazy, where)


def to_torch(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, torch.Tensor]:
    """Read every tensor. Raises as :func:`numbers` does, for the first key."""
    import torch

    return {
        name: torch.from_numpy(np.array(numbers(name, lazy, where), copy=True, order="C"))
        for name, lazy in tensors.items()
    }


def open_field(
    path: str | Path,
    *,
    from_: str | None = None,
    read: ReadOptions | None = None,
    device: str = "cpu",
    registry: registries.Registry | None = None,
) -> Loaded:
    """Open a checkpoint as a field that answers density and colour.

    from_   force a format; else it is recognised by content
    read    what the file does not say (:class:`pvdconvert.plugin.ReadOptions`)
    device  "cpu", "cuda:0", ...

    Raises InputError, UnknownError, UnsafeError, PluginError, RequestError (weights that are not numbers), DeviceError.
    """
    path = Path(path)
    registry = registry or registries.default()
    found, parts = read_parts(path, from_=from_, read=read, registry=registry)
    architecture = registry.architecture(parts.architecture)
    tensors = to_torch(parts.tensors, str(path))
    try:
        field = architecture.load(dict(parts.config), tensors, parts.scene)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: plugin {parts.architecture!r} cannot load it: {type(error).__name__}: {error}",
            hint="pvdconvert inspect shows what the file holds",
        ) from error
    return Loaded(
        field=to_device(field, device).eval().requires_grad_(False),
        scene=parts.scene,
        parts=parts,
        format=found.format,
        architecture=parts.architecture,
        candidates=tuple(found.candidates),
        sha256=found.manifest.sha256(),
        path=path,
        bytes=int(found.manifest.size),
    )


def as_loaded(source: Teacher, box: Box | None, scene: Scene | None, **options: Any) -> Loaded:
    """Any kind of teacher as a :class:`Loaded`; bare functions and fields need a ``box`` or a ``scene``."""
    if isinstance(source, Loaded):
        return source
    if isinstance(source, str | Path):
        return open_field(source, **options)
    if scene is None:
        if box is None:
            raise UsageError("a teacher made of functions needs box=Box(min, max) or scene=Scene(...)")
        scene = Scene(box)
    from pvdconvert.field import FunctionField

    field = FunctionField(*source) if isinstance(source, tuple) else source
    parts = Parts("function", {}, {}, scene)
    return Loaded(to_device(field, options["device"]), scene, parts, "function", "function", (), "", None, 0)


def choose_device(name: str) -> str:
    """ "auto" -> the GPU if there is one. Raises DeviceError where ``name`` is not there."""
    import torch

    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"device {name!r}: this torch sees no CUDA device", hint="--device cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}", hint="--device cpu"
        ) from error
    return name


def to_device(field: RadianceField, device: str) -> RadianceField:
    return field if device == "cpu" else field.to(device)
