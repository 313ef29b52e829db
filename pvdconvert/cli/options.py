"""Options that several commands share: their spelling, and how their text becomes values. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

import typer

from pvdconvert.cli import complete
from pvdconvert.errors import PvdError, UsageError

if TYPE_CHECKING:
    from pvdconvert.plugin import ReadOptions
    from pvdconvert.scene import Box, Vec3

File = Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint: a file, or a folder of one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more; show the traceback of an internal error.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        "-f",
        metavar="FORMAT",
        autocompletion=complete.formats,
        help="The input's format. Default: found by looking at the contents.",
    ),
]
Bounds = Annotated[
    str | None,
    typer.Option("--bounds", metavar="X0,Y0,Z0,X1,Y1,Z1", help="The scene's box, world units, if the file has none."),
]
Background = Annotated[
    str | None,
    typer.Option("--background", metavar="white|black|R,G,B", help="Colour behind the field; R,G,B in 0..1."),
]
Near = Annotated[float | None, typer.Option("--near", metavar="DISTANCE", help="Where rays start, world units.")]
Far = Annotated[float | None, typer.Option("--far", metavar="DISTANCE", help="Where rays end, world units.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The source program's config, if it is not beside FILE.")
]
Extra = Annotated[
    list[str] | None,
    typer.Option(
        "--extra", metavar="KEY=VALUE", help="What else the format asks for, such as focal=400; repeat for more."
    ),
]
Cameras = Annotated[
    Path | None,
    typer.Option("--cameras", metavar="PATH", help="A transforms.json, or a dataset, whose cameras to look through."),
]
Layout = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="FORMAT",
        autocompletion=complete.formats,
        help="The output's layout. Default: that of -o's suffix, else pvdconvert's own .safetensors.",
    ),
]
MaxMb = Annotated[float | None, typer.Option("--max-mb", metavar="MB", help="The output's largest size.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A configuration key of the target; repeat for more. pvdconvert formats ARCHITECTURE lists them.",
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.")]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        envvar="PVDCONVERT_BACKEND",
        metavar="auto|torch|numba|triton|tinycudann",
        help="Which twin of the kernels runs: numba on the CPU, triton or tinycudann on CUDA, torch anywhere.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads. Default: all cores.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output if it is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
ProgressMode = Annotated[
    str,
    typer.Option("--progress", metavar="auto|bar|plain|json|none", help="How to report progress, always on stderr."),
]

BACKENDS = ("auto", "torch", "numba", "triton", "tinycudann")
_BACKGROUNDS: dict[str, tuple[float, float, float]] = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def choice(option: str, value: str, known: tuple[str, ...]) -> str:
    """``value`` if it is one of ``known``, else UsageError."""
    if value in known:
        return value
    raise UsageError(f"{option} {value}: unknown; known: {', '.join(known)}", hint=complete.near(value, known))


def seconds(text: str, option: str = "--budget") -> float:
    """Seconds of "90", "90s", "5m", "1h30m"."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    plain = "".join(f"{n}{u}" for n, u in parts) == text.strip().lower()
    bare = [u for _, u in parts].count("")
    if not parts or not plain or (bare and len(parts) > 1):
        raise UsageError(f"{option} {text}: not a duration", hint="write 90s, 5m or 1h30m")
    total = sum(float(n) * _UNITS[u or "s"] for n, u in parts)
    if not 0 < total < math.inf:
        raise UsageError(f"{option} {text}: must be more than nothing")
    return total


def _numbers(option: str, text: str, count: int, example: str) -> list[float]:
    try:
        values = [float(v) for v in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if len(values) != count or not all(math.isfinite(v) for v in values):
        raise UsageError(f"{option} {text}: expected {count} numbers", hint=f"such as {option}={example}")
    return values


def bounds(text: str) -> Box:
    """The box of "x0,y0,z0,x1,y1,z1"."""
    from pvdconvert.scene import Box

    v = _numbers("--bounds", text, 6, "-1,-1,-1,1,1,1")
    try:
        return Box((v[0], v[1], v[2]), (v[3], v[4], v[5]))
    except PvdError:
        raise UsageError(f"--bounds {text}: empty", hint="each maximum must be above its minimum") from None


def background(text: str) -> Vec3:
    """The colour of "white", "black" or "r,g,b" in [0, 1]."""
    if text.lower() in _BACKGROUNDS:
        return _BACKGROUNDS[text.lower()]
    try:
        r, g, b = _numbers("--background", text, 3, "0.5,0.5,0.5")
    except UsageError:
        raise UsageError(f"--background {text}: not a colour", hint="white, black, or r,g,b in 0..1") from None
    if not all(0.0 <= v <= 1.0 for v in (r, g, b)):
        raise UsageError(f"--background {text}: outside of 0..1", hint="divide 8-bit values by 255")
    return (r, g, b)


def device(text: str) -> str:
    """A device's name as torch takes it, or "auto"; whether it is there is known only to torch."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise UsageError(f"--device {text}: unknown", hint="auto, cpu, cuda or cuda:N")
    return text


@dataclasses.dataclass(frozen=True)
class Reading:
    """How to read FILE: the options of every command that opens a checkpoint, as they were typed."""

    from_: From = None
    bounds: Bounds = None
    background: Background = None
    near: Near = None
    far: Far = None
    config: ConfigFile = None
    extra: Extra = None

    def options(self) -> ReadOptions:
        """What the user adds to the file. Raises UsageError for values that cannot be, InputError: no such config."""
        from pvdconvert.errors import InputError
        from pvdconvert.plugin import ReadOptions

        for name, value in (("--near", self.near), ("--far", self.far)):
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} {value}: must be a distance >= 0")
        if self.near is not None and self.far is not None and self.near >= self.far:
            raise UsageError(f"--near {self.near:g} is not before --far {self.far:g}")
        if self.config is not None and not self.config.is_file():
            raise InputError(f"--config {self.config}: no such file")
        pairs = [pair.partition("=") for pair in self.extra or []]
        for key, equals, _ in pairs:
            if not key.strip() or not equals:
                raise UsageError(f"--extra {key}: expected KEY=VALUE")
        return ReadOptions(
            extra={key.strip(): text.strip() for key, _, text in pairs},
            bounds=None if self.bounds is None else bounds(self.bounds),
            background=None if self.background is None else background(self.background),
            near=self.near,
            far=self.far,
            config=self.config,
        )


@dataclasses.dataclass(frozen=True)
class Compute:
    """Where and with what to compute. Using it imports torch."""

    device: str
    backend: Literal["auto", "torch", "numba", "triton", "tinycudann"]
    threads: int | None

    def apply(self) -> None:
        """Set threads (numba reads its environment when it is imported) and the kernels' twin for this process."""
        if self.threads is not None:
            for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
                os.environ[name] = str(self.threads)
        import torch

        from pvdconvert.kernels.backend import set_backend

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        set_backend(self.backend)

    def notes(self) -> list[str]:
        """After :meth:`apply`: what this machine does slower than it could, and what happens on a first use."""
        import torch

        from pvdconvert.kernels import backend

        cuda = torch.cuda.is_available() and not self.device.startswith("cpu")
        return [text for text in (backend.lost(cuda), None if cuda else backend.compiling()) if text]

    def choose(self) -> str:
        """:meth:`apply`, and the device's name for torch. Raises DeviceError where it is not there."""
        self.apply()
        from pvdconvert.loading import choose_device

        return choose_device(self.device)


@dataclasses.dataclass(frozen=True)
class Computing:
    """The options of every command that needs torch, as they were typed."""

    device: Device = "auto"
    backend: Backend = "auto"
    threads: Threads = None

    def checked(self) -> Compute:
        """The checked ``--device``, ``--backend`` and ``--threads``."""
        twin = choice("--backend", self.backend, BACKENDS)
        name = device(self.device)
        if twin == "numba" and name.startswith(("cuda", "mps")):
            raise UsageError(f"--backend numba runs on the CPU only, not on --device {name}")
        interpreted = twin == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if twin in ("triton", "tinycudann") and name in ("cpu", "mps") and not interpreted:
            raise UsageError(f"--backend {twin} runs on CUDA only, not on --device {name}")
        return Compute(name, cast("Any", twin), self.threads)


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with each parameter that is a dataclass of options replaced by those options, for Typer to see."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        p.name: p.annotation for p in signature.parameters.values() if dataclasses.is_dataclass(p.annotation)
    }
    seen: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name not in groups:
            seen.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(parameter.annotation, include_extras=True)
        for field in dataclasses.fields(parameter.annotation):
            kind = inspect.Parameter.KEYWORD_ONLY
            seen.append(inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name]))

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in dataclasses.fields(kind)})
        command(**values)

    wrapper.__signature__ = signature.replace(parameters=seen)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in seen}
    del wrapper.__wrapped__
    return wrapper
