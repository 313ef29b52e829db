"""The contracts that plugins implement, and the light specs that announce them. Imports no torch.

An *architecture* is a kind of field; a *format* is the file layout of one program. Both are announced by entry points
whose values are the frozen dataclasses below: cheap to import, naming their heavy code by a dotted path that is
imported on first use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pvdconvert.scene import Box, Scene

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from pvdconvert.containers import Manifest
    from pvdconvert.distill.store import Store
    from pvdconvert.field import RadianceField, Stage
    from pvdconvert.render.occupancy import Occupancy

API_VERSION = 1
PLUGIN_GROUP = "pvdconvert.plugins"
FORMAT_GROUP = "pvdconvert.formats"

Config = dict[str, Any]
"""A configuration: JSON values only, so that it can stand in a file header."""


@dataclasses.dataclass(frozen=True, slots=True)
class ArchitectureSpec:
    """Announces an architecture.

    name           what ``--to`` takes
    title          one line for listings
    code           "module:Class" of the :class:`Architecture`; imported on first use
    options        "module:Dataclass": a frozen dataclass of every configuration key with its default; a field's
                   metadata["help"] is shown to users. Its module must not import torch
    paper, licence a reference, and the licence of the plugin
    needs          distributions that must be importable, with the command that installs them
    view_dependent, unbounded    what the architecture can represent
    """

    name: str
    title: str
    code: str
    options: str
    paper: str = ""
    licence: str = ""
    api_version: int = API_VERSION
    needs: tuple[tuple[str, str], ...] = ()
    view_dependent: bool = True
    unbounded: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class FormatSpec:
    """Announces a file layout.

    name           what ``--from`` and ``--as`` take
    title          one line for listings
    probe          "module:function": ``probe(manifest) -> Match | None``, torch-free
    code           "module:Class" of the :class:`Format`; imported on first use, torch-free if at all possible
    architectures  names of the architectures that the layout can hold
    writes         those of them that it writes, where it writes; () = all
    pixel_offset   where in a pixel the program's ray passes: 0.5, the centre, or 0, as vanilla NeRF has it
    suffixes       usual suffixes, for output names and help only: reading never looks at them
    native         the default layout of outputs (one format only)
    versions       which versions or variants of the layout are read, in a few words
    verified       by what the reader is verified: a real file, a file written by the peer's own code with its oracle,
                   or a known answer with its derivation (the tests that do it stand beside it)
    """

    name: str
    title: str
    probe: str
    code: str
    architectures: tuple[str, ...]
    suffixes: tuple[str, ...] = ()
    can_read: bool = True
    can_write: bool = False
    native: bool = False
    versions: str = ""
    verified: str = ""
    program: str = ""
    licence: str = ""
    writes: tuple[str, ...] = ()
    pixel_offset: float = 0.5
    api_version: int = API_VERSION

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the architectures that it writes."""
        return (self.writes or self.architectures) if self.can_write else ()


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A format's verdict on a file: ``score`` in (0, 1], and the reason in words that a user can check.

    1.0: a mark that no other program writes. 0.9: keys and shapes fit exactly. 0.5: plausible.
    """

    score: float
    reason: str


class LazyTensor(Protocol):
    """A named array in a file that is not read before :meth:`numpy` is called."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str:
        """numpy's name ("float32", "int64", ...) or "bfloat16"."""
        ...

    def numpy(self) -> NDArray[Any]:
        """Read it, read-only. bfloat16 comes as float32."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A :class:`LazyTensor` around an array in memory."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> str:
        return str(self.array.dtype)

    def numpy(self) -> NDArray[Any]:
        return self.array


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What a user may add to a file that does not say everything. None = not given."""

    bounds: Box | None = None
    background: tuple[float, float, float] | None = None
    near: float | None = None
    far: float | None = None
    config: Path | None = None
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A field taken apart: what a format reads and writes.

    tensors      name -> lazy tensor, in the names that the architecture's ``load`` expects
    provenance   JSON: where it came from, settings, seed, fidelity; carried along
    notes        what was skipped or guessed while reading; shown in every report
    """

    architecture: str
    config: Config
    tensors: Mapping[str, LazyTensor]
    scene: Scene
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a target layout asks of a student.

    fixed     configuration values that the layout cannot hold otherwise; {} = anything
    defaults  values that the program assumes unless its user says otherwise; ``--set`` may change them
    cells     cells along the longest side of the scene's box that a mask must have; None = any
    """

    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cells: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """What the user is ready to pay."""

    preset: str = "balanced"
    seconds: float | None = None
    max_mb: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TeacherFacts:
    """What a planner may know of the teacher.

    occupied_box    tight box of occupied space, world units
    occupied_cells  occupied cells of the occupancy grid; ``cell`` is their side, world units
    surface_cells   those of them that some camera sees
    occupancy       where these are, if known: the very cells that the student will be restricted to
    """

    scene: Scene
    occupied_box: Box
    occupied_cells: int
    surface_cells: int
    cell: float
    architecture: str | None = None
    config: Mapping[str, Any] | None = None
    occupancy: Occupancy | None = None


@runtime_checkable
class Architecture(Protocol):
    """An architecture's code. Stateless; one instance serves every call."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        """Choose a student's configuration. ``overrides`` (from ``--set``, typed) always win; ``limits`` must hold.

        Raises RequestError where that cannot be done.
        """
        ...

    def build(self, config: Config, scene: Scene, seed: int) -> RadianceField:
        """A fresh field, deterministic in ``seed``."""
        ...

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> RadianceField:
        """A field with exactly these weights. Raises InputError naming a missing, surplus or misshapen key."""
        ...

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        """The inverse of ``load``, exactly."""
        ...

    def forward_stage(
        self, field: RadianceField, stage: Stage, x: Tensor, d: Tensor | None, latent: Tensor | None = None
    ) -> Tensor | None:
        """What ``stage`` compares (:func:`pvdconvert.field.forward_stage` is the default)."""
        ...

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        """Optimiser groups: dicts with "params", "lr" (the peak rate for distillation), "name"."""
        ...

    def project(self, field: RadianceField, store: Store, seconds: float) -> str | None:
        """Start ``field`` in closed form from the teacher's answers, in place, within about ``seconds``.

        Returns one line that says what was solved, or None if this architecture has no closed form.
        """
        ...


class ArchitectureBase:
    """Defaults for :class:`Architecture`: derive from it and write plan, build, load, save."""

    def forward_stage(
        self, field: RadianceField, stage: Stage, x: Tensor, d: Tensor | None, latent: Tensor | None = None
    ) -> Tensor | None:
        from pvdconvert.field import forward_stage

        return forward_stage(field, stage, x, d, latent)

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        return [{"params": [p for p in field.parameters() if p.requires_grad], "lr": 1e-2, "name": "all"}]

    def project(self, field: RadianceField, store: Store, seconds: float) -> str | None:
        return None

    def regularizer(self, field: RadianceField, generator: torch.Generator) -> Tensor | None:
        """Optional: what the architecture's paper adds to the loss when it trains from pictures, differentiable and
        weighted: total variation, sparsity. Random choices come from ``generator``. None = nothing."""
        return None

    def distortion(self, scene: Scene) -> float:
        """Optional: the weight that the architecture's paper gives to the distortion loss (mip-NeRF 360, equation 15)
        when it trains from pictures of such a scene. 0 = none."""
        return 0.0

    def factor_norm(self, field: RadianceField) -> Tensor | None:
        """Optional: what ``--method pvd`` keeps small, differentiable; the mean absolute values of the factors of a
        low-rank density, summed. None = nothing."""
        return None


@runtime_checkable
class Format(Protocol):
    """A layout's code."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        """Take the file apart. Tensors stay lazy. Raises InputError naming file and key."""
        ...

    def limits(self, architecture: str) -> Limits:
        """What a student must keep to so that this layout holds it."""
        ...

    def write(self, parts: Parts, path: Path) -> None:
        """Write to ``path`` (a temporary name that the core renames). Raises RequestError naming the limit."""
        ...


class FormatBase:
    """Defaults for :class:`Format`: read-only layouts need only ``read``."""

    def limits(self, architecture: str) -> Limits:
        return Limits()

    def write(self, parts: Parts, path: Path) -> None:
        from pvdconvert.errors import RequestError

        raise RequestError(f"{path}: this format is read-only", hint="see pvdconvert formats for those that write")


def option_help(options: type) -> Iterator[tuple[str, Any, str]]:
    """(name, default, help) of every configuration key of an options dataclass."""
    for f in dataclasses.fields(options):
        default = f.default
        if default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        yield f.name, default, str(f.metadata.get("help", ""))


if TYPE_CHECKING:
    _check: LazyTensor = ArrayTensor(np.zeros(1))
