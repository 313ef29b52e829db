"""How a student is taught: the methods that ``--method`` takes. Imports no torch.

A method is a *trainer* made of a :class:`Lesson`. The core knows no method but through this table: a new one is a line
in :data:`METHODS` and a class.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from pvdconvert.errors import UsageError

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store
    from pvdconvert.field import RadianceField
    from pvdconvert.plugin import Architecture, LazyTensor
    from pvdconvert.progress import Progress
    from pvdconvert.report import StageReport

LOSSES = ("normL2", "L2", "normL1", "L1")
RATES = ("paper", "plugin")
VIEWS = ("sphere", "hemisphere")


class Trainer(Protocol):
    """Teaches a student, stage by stage."""

    reports: list[StageReport]

    @property
    def where(self) -> str:
        """Where it is, for a person: "stage color after 31 steps"."""
        ...

    def run(self, seconds: float, *, steps: dict[str, tuple[int, int]] | None = None) -> list[StageReport]:
        """Run within about ``seconds``, or exactly ``steps``: stage -> (steps run, steps planned).

        Raises :class:`pvdconvert.distill.distiller.Stopped` where the caller asked to stop.
        """
        ...


@dataclasses.dataclass
class Lesson:
    """What a method is given.

    store     the teacher, its answers, and the cells that the student is restricted to
    tensors   the teacher's weights by name, where it came from a file
    evaluate  dB against the teacher on the quick held-out views
    stop      asked after every step
    options   the method's own, as :func:`parse` made them
    """

    architecture: Architecture
    student: RadianceField
    store: Store
    seed: int
    progress: Progress
    evaluate: Callable[[], float]
    stop: Callable[[], bool]
    tensors: Mapping[str, LazyTensor]
    options: Any


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A method without options."""


@dataclasses.dataclass(frozen=True)
class PaperOptions:
    """Options of the paper's method. The defaults are the paper's, but for ``views``."""

    loss: str = dataclasses.field(
        default="normL2",
        metadata={"help": "norm of differences, not squared, not divided by their number; or L2, L1: means"},
    )
    rays: int = dataclasses.field(default=4096, metadata={"help": "rays a step"})
    rates: str = dataclasses.field(
        default="paper", metadata={"help": "1e-2 for grids and 1e-3 for networks, or those of the plugin"}
    )
    views: str = dataclasses.field(
        default="sphere", metadata={"help": "hemisphere: nothing looks from below, as in the reference"}
    )

    def __post_init__(self) -> None:
        for name, known in (("loss", LOSSES), ("rates", RATES), ("views", VIEWS)):
            if getattr(self, name) not in known:
                raise UsageError(f"--method: {name}={getattr(self, name)}: unknown", hint=f"known: {', '.join(known)}")
        if not 1 <= self.rays <= 1 << 20:
            raise UsageError(f"--method: rays={self.rays}: must be in 1 .. {1 << 20}")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to teach.

    name, title  what ``--method`` takes, and one line for help
    code         "module:Class" of the trainer, called with a :class:`Lesson`; imported on first use
    options      dataclass of its options: ``--method name:key=value,...``
    labels       share of the budget for asking the teacher before the first step
    projects     the student starts in closed form where its architecture has one
    resumes      what was interrupted can go on
    unbounded    it knows contracted scenes
    spreads      several processes can share its work
    """

    name: str
    title: str
    code: str
    options: type = NoOptions
    labels: float = 0.35
    projects: bool = True
    resumes: bool = True
    unbounded: bool = True
    spreads: bool = True

    def trainer(self, lesson: Lesson) -> Trainer:
        """The method at work."""
        module, _, name = self.code.partition(":")
        made: Trainer = getattr(importlib.import_module(module), name)(lesson)
        return made


_SCOUTING = 0.05
"""Share that the paper's methods need to find the cells that a camera sees; all else they ask at every step."""

METHODS = {
    m.name: m
    for m in (
        Method("store", "ask the teacher once, project, distil from its answers", "pvdconvert.distill.distiller:teach"),
        Method(
            "pvd",
            "Progressive Volume Distillation as published (arXiv 2211.15977)",
            "pvdconvert.distill.paper:Paper",
            PaperOptions,
            _SCOUTING,
            projects=False,
            resumes=False,
            unbounded=False,
            spreads=False,
        ),
        Method(
            "pvd-al",
            "the same with three levels of active learning (arXiv 2304.04012)",
            "pvdconvert.distill.active:ActivePaper",
            PaperOptions,
            _SCOUTING,
            projects=False,
            resumes=False,
            unbounded=False,
            spreads=False,
        ),
    )
}
DEFAULT = "store"


def parse(text: str) -> tuple[Method, Any]:
    """The method and its options of "pvd" or "pvd:loss=L2,rays=1024". Raises UsageError."""
    name, _, rest = text.partition(":")
    method = METHODS.get(name)
    if method is None:
        close = difflib.get_close_matches(name, METHODS, 1)
        raise UsageError(
            f"unknown method {name!r}; known: {', '.join(METHODS)}", hint=f"did you mean {close[0]}?" if close else ""
        )
    known = {f.name: f for f in dataclasses.fields(method.options)}
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"--method {name}: no option {key!r}", hint=has)
        try:
            values[key] = int(value) if known[key].type == "int" else value
        except ValueError:
            raise UsageError(f"--method {name}: {key}={value}: not a number") from None
    return method, method.options(**values)
