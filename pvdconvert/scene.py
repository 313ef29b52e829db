"""What belongs to a field and is not its weights: box, transform, units, background, ray space, cameras.

Imports no torch. Every number is in the *scene's world*: the coordinates in which the field is asked, which are those
of the file it came from. Density is per world unit (it is multiplied by a length in world units before ``1 - exp(-)``).
See ``docs/conventions.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pvdconvert.cameras import Camera
from pvdconvert.errors import InputError

Vec3 = tuple[float, float, float]
IDENTITY: tuple[tuple[float, ...], ...] = (
    (1.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 1.0),
)


def _vec3(values: Sequence[float], what: str) -> Vec3:
    try:
        a, b, c = (float(v) for v in values)
    except (TypeError, ValueError):
        raise InputError(f"{what}: expected three numbers, got {values!r}") from None
    if not all(abs(v) < float("inf") for v in (a, b, c)):
        raise InputError(f"{what}: {values!r} is not finite")
    return (a, b, c)


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned box in world units. ``min < max`` on every axis."""

    min: Vec3
    max: Vec3

    def __post_init__(self) -> None:
        object.__setattr__(self, "min", _vec3(self.min, "box min"))
        object.__setattr__(self, "max", _vec3(self.max, "box max"))
        if not all(a < b for a, b in zip(self.min, self.max)):
            raise InputError(
                f"box {self.min} .. {self.max} is empty", hint="give --bounds as six numbers, min then max"
            )

    @classmethod
    def cube(cls, half: float, center: Sequence[float] = (0.0, 0.0, 0.0)) -> Box:
        """The cube of half side ``half`` around ``center``."""
        x, y, z = (float(v) for v in center)
        return cls((x - half, y - half, z - half), (x + half, y + half, z + half))

    @property
    def size(self) -> Vec3:
        a, b = self.min, self.max
        return (b[0] - a[0], b[1] - a[1], b[2] - a[2])

    @property
    def center(self) -> Vec3:
        a, b = self.min, self.max
        return ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, (a[2] + b[2]) / 2)

    @property
    def diagonal(self) -> float:
        x, y, z = self.size
        return float((x * x + y * y + z * z) ** 0.5)

    @property
    def longest(self) -> float:
        return max(self.size)

    def to_json(self) -> dict[str, Any]:
        return {"min": list(self.min), "max": list(self.max)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Box:
        return cls(tuple(data["min"]), tuple(data["max"]))


@dataclasses.dataclass(frozen=True, slots=True)
class RaySpace:
    """The space in which samples lie along a ray.

    ``world``: the pinhole world. ``ndc``: normalised device coordinates of a forward-facing camera (LLFF): positions
    handed to the field are NDC positions, directions stay those of the un-warped world ray; ``width``, ``height``
    (pixels), ``focal`` (pixels) and ``near`` (world units) define the warp.

    ``contracted``: an unbounded world, drawn into radius 2 (mip-NeRF 360); positions handed to the field are contracted
    ones, lengths and directions stay the world's. ``norm`` ("l2": a ball; "linf": a cube), ``center`` and ``radius``
    (world units) of the part that is not moved define the map.
    """

    kind: Literal["world", "ndc", "contracted"] = "world"
    width: float | None = None
    height: float | None = None
    focal: float | None = None
    near: float | None = None
    norm: Literal["l2", "linf"] = "l2"
    center: Vec3 = (0.0, 0.0, 0.0)
    radius: float = 1.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RaySpace:
        if data.get("kind", "world") not in ("world", "ndc", "contracted"):
            raise InputError(f"ray space: unknown kind {data['kind']!r}", hint="known: world, ndc, contracted")
        if data.get("norm", "l2") not in ("l2", "linf"):
            raise InputError(f"ray space: unknown norm {data['norm']!r}", hint="known: l2, linf")
        given = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        given["center"] = _vec3(data.get("center", (0.0, 0.0, 0.0)), "center of the ray space")
        given["radius"] = float(data.get("radius", 1.0))
        if not 0 < given["radius"] < float("inf"):
            raise InputError(f"ray space: radius {given['radius']} is not a length")
        return cls(**given)


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Everything a renderer must know beside the field.

    box             where the field is defined; rays are clipped to it. In NDC and contracted: of the warped space
    world           4x4, row-major: scene coordinates -> the coordinates of the dataset that the source was trained on
    background      rgb in [0, 1] composited behind the field, or None if the file does not say (then white is used)
    color_space     "srgb" or "linear": the space in which colours are stored and composited
    near, far       where the source sampled rays of its own cameras, world units; views from elsewhere are clipped by
                    the box alone. In NDC: fractions of the warped ray
    step            the step length that the source renders with, world units; None if unknown
    cameras         cameras that came with the file
    assumed         names of the entries above that were defaults of the program and not in the file
    """

    box: Box
    world: tuple[tuple[float, ...], ...] = IDENTITY
    background: Vec3 | None = None
    color_space: Literal["srgb", "linear"] = "srgb"
    near: float | None = None
    far: float | None = None
    step: float | None = None
    ray_space: RaySpace = RaySpace()
    cameras: tuple[Camera, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def backdrop(self) -> Vec3:
        """The background to composite over: the scene's, or white where the file does not say."""
        return (1.0, 1.0, 1.0) if self.background is None else self.background

    @property
    def clip(self) -> tuple[float | None, float | None]:
        """near and far for any camera: those of NDC; near alone where space is contracted, because cameras stand among
        what they see; (None, None) in the world, where the box alone clips."""
        if self.ray_space.kind == "contracted":
            return self.near, None
        return (self.near, self.far) if self.ray_space.kind == "ndc" else (None, None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the inverse of :meth:`from_json`."""
        return {
            "box": self.box.to_json(),
            "world": [list(row) for row in self.world],
            "background": None if self.background is None else list(self.background),
            "color_space": self.color_space,
            "near": self.near,
            "far": self.far,
            "step": self.step,
            "ray_space": self.ray_space.to_json(),
            "cameras": [c.to_json() for c in self.cameras],
            "assumed": list(self.assumed),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scene:
        """Read what :meth:`to_json` wrote. Raises InputError naming the key that is missing or wrong."""
        try:
            background = data.get("background")
            color_space = data.get("color_space", "srgb")
            if color_space not in ("srgb", "linear"):
                raise InputError(f"color space: unknown {color_space!r}", hint="known: srgb, linear")
            return cls(
                box=Box.from_json(data["box"]),
                world=tuple(tuple(float(v) for v in row) for row in data.get("world", IDENTITY)),
                background=None if background is None else _vec3(background, "background"),
                color_space=color_space,
                near=_optional(data.get("near")),
                far=_optional(data.get("far")),
                step=_optional(data.get("step")),
                ray_space=RaySpace.from_json(data.get("ray_space", {})),
                cameras=tuple(Camera.from_json(c) for c in data.get("cameras", ())),
                assumed=tuple(str(v) for v in data.get("assumed", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"scene: bad or missing entry {error}") from error


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)
