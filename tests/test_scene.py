"""Boxes, ray spaces and scenes: exact round trips, and one clear error for every kind of bad entry."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdconvert.cameras import Camera
from pvdconvert.errors import InputError
from pvdconvert.scene import IDENTITY, Box, RaySpace, Scene

finite = st.floats(-1e6, 1e6, allow_nan=False, width=64)
positive = st.floats(1e-3, 1e6)
optional = st.none() | positive
vectors = st.tuples(finite, finite, finite)
unit_colors = st.tuples(*[st.floats(0, 1)] * 3)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    low, size = draw(vectors), draw(st.tuples(positive, positive, positive))
    x, y, z = (a + s for a, s in zip(low, size))
    return Box(low, (x, y, z))


cameras = st.builds(
    Camera,
    width=st.integers(1, 10_000),
    height=st.integers(1, 10_000),
    fx=positive,
    fy=positive,
    cx=finite,
    cy=finite,
    c2w=st.tuples(*[st.tuples(finite, finite, finite, finite)] * 3),
    offset=st.sampled_from([0.0, 0.5]),
)
scenes = st.builds(
    Scene,
    box=boxes(),
    world=st.tuples(*[st.tuples(finite, finite, finite, finite)] * 4),
    background=st.none() | unit_colors,
    color_space=st.sampled_from(["srgb", "linear"]),
    near=optional,
    far=optional,
    step=optional,
    ray_space=st.builds(
        RaySpace,
        kind=st.sampled_from(["world", "ndc", "contracted"]),
        width=optional,
        height=optional,
        focal=optional,
        near=optional,
        norm=st.sampled_from(["l2", "linf"]),
        center=st.tuples(finite, finite, finite),
        radius=positive,
    ),
    cameras=st.lists(cameras, max_size=3).map(tuple),
    assumed=st.lists(st.sampled_from(["box", "near", "background"]), unique=True).map(tuple),
)


@given(scenes)
def test_a_scene_survives_json_exactly(scene: Scene) -> None:
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


@given(boxes())
def test_a_box_survives_json_exactly(box: Box) -> None:
    assert Box.from_json(json.loads(json.dumps(box.to_json()))) == box


def test_what_is_left_out_of_a_scene_takes_its_default() -> None:
    scene = Scene.from_json({"box": {"min": [-1, -1, -1], "max": [1, 1, 1]}})
    assert scene == Scene(Box.cube(1.0))
    assert scene.world == IDENTITY
    assert scene.color_space == "srgb"
    assert scene.ray_space.kind == "world"


def test_the_measures_of_a_box() -> None:
    box = Box((-1.0, 0.0, 2.0), (2.0, 4.0, 14.0))
    assert box.size == (3.0, 4.0, 12.0)
    assert box.center == (0.5, 2.0, 8.0)
    assert box.diagonal == 13.0
    assert box.longest == 12.0
    assert Box.cube(2.0, (1.0, 0.0, -1.0)) == Box((-1.0, -2.0, -3.0), (3.0, 2.0, 1.0))


def test_a_scene_that_names_no_background_is_composited_on_white() -> None:
    assert Scene(Box.cube(1.0)).backdrop == (1.0, 1.0, 1.0)
    assert Scene(Box.cube(1.0), background=(0.0, 0.25, 0.0)).backdrop == (0.0, 0.25, 0.0)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ((0, 0, 0), (1, 0, 1), "is empty"),
        ((0, 0, 0), (1, -1, 1), "is empty"),
        ((0, 0, math.nan), (1, 1, 1), "box min: .* is not finite"),
        ((0, 0, 0), (1, math.inf, 1), "box max: .* is not finite"),
        ((0, 0), (1, 1, 1), "box min: expected three numbers"),
        ((0, 0, 0), (1, 1, "far"), "box max: expected three numbers"),
        ((0, 0, 0), None, "box max: expected three numbers"),
    ],
)
def test_an_impossible_box_is_refused(low: Any, high: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Box(low, high)
    assert "\n" not in str(caught.value)


GOOD: dict[str, Any] = Scene(Box.cube(1.0)).to_json()
CAMERA = Camera(4, 4, 1.0, 1.0, 2.0, 2.0, IDENTITY[:3]).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": None}, "scene: bad or missing entry"),
        ({"box": {"min": [0, 0, 0]}}, "scene: bad or missing entry 'max'"),
        ({"box": {"min": [0, 0, 0], "max": [0, 0, 0]}}, "is empty"),
        ({"background": [1, 1]}, "background: expected three numbers"),
        ({"world": [["x"]]}, "scene: bad or missing entry"),
        ({"world": 3}, "scene: bad or missing entry"),
        ({"near": "close"}, "scene: bad or missing entry"),
        ({"ray_space": {"kind": "spherical"}}, "ray space: .*spherical"),
        ({"color_space": "cmyk"}, "color space: .*cmyk"),
        ({"cameras": [{**CAMERA, "fx": None}]}, "scene: bad or missing entry"),
        ({"cameras": [{k: v for k, v in CAMERA.items() if k != "c2w"}]}, "scene: bad or missing entry 'c2w'"),
        ({"cameras": 1}, "scene: bad or missing entry"),
    ],
)
def test_a_bad_entry_of_a_scene_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Scene.from_json({**GOOD, **change})
    assert "\n" not in str(caught.value)


def test_a_scene_without_a_box_is_refused() -> None:
    with pytest.raises(InputError, match="scene: bad or missing entry 'box'"):
        Scene.from_json({k: v for k, v in GOOD.items() if k != "box"})
