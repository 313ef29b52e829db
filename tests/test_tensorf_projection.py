"""Starting tensorf and tensorf-cp from a teacher's answers: a painted ball, known in closed form."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvdconvert.distill.store import Store
from pvdconvert.field import FunctionField
from pvdconvert.plugin import Budget, Config, Limits, TeacherFacts
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.tensorf import Tensorf
from pvdconvert_plugins.tensorf_cp import TensorfCp
from pvdconvert_plugins.tensorf_field import TensorialField

SCENE = Scene(Box((-1.0, -1.2, -0.8), (1.0, 1.0, 1.1)))
FACTS = TeacherFacts(SCENE, Box((-0.5, -0.6, -0.4), (0.6, 0.7, 1.0)), 1000, 500, 0.02)
COUNT = 40_000


def sphere(x: Tensor) -> Tensor:
    """A soft ball of radius 0.5 and density 40."""
    return 40.0 * torch.sigmoid((0.5 - x.norm(dim=-1)) * 60.0)


def painted(x: Tensor) -> Tensor:
    """A colour for each place, of far more than one product of a plane and a line, or of three lines."""
    return torch.sigmoid(torch.stack([3 * x[:, 0], 2 * x[:, 1] - x[:, 2], 4 * torch.sin(3 * x[:, 2] + x[:, 0])], -1))


def store_of(cost: float) -> Store:
    """Answers of the ball at random points near its surface, each on a ray of its own."""
    teacher = FunctionField(sphere, lambda x, d: painted(x))
    teacher.flops_per_point = cost
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(COUNT, 3, generator=g), dim=-1) * (0.3 + 0.35 * torch.rand(COUNT, 1, generator=g))
    occupancy = Occupancy(torch.tensor([-1.0, -1.2, -0.8]), 0.1, torch.ones(20, 22, 19, dtype=torch.uint8))
    none, row, rgb = torch.empty(0), torch.empty(0, 3), painted(x)
    ones, d = torch.ones(COUNT), F.normalize(torch.randn(COUNT, 3, generator=g), dim=-1)
    return Store(
        scene=SCENE, occupancy=occupancy, step=0.01, x=x, t=0 * ones, dt=0.01 * ones, sigma=sphere(x), weight=ones,
        rgb=rgb, colored=ones.bool(), d=d, offsets=torch.arange(COUNT + 1), ray_rgb=rgb,
        ray_opacity=ones, ray_depth=ones, free_x=row, free_sigma=none, teacher=teacher,
    )  # fmt: skip


def build(plugin: Tensorf | TensorfCp, overrides: Config) -> TensorialField:
    """A student as planned, over the whole box of the scene unless ``overrides`` say otherwise."""
    overrides = {"box": SCENE.box.to_json(), **overrides}
    return plugin.build(plugin.plan(FACTS, Budget(), Limits(), overrides), SCENE, 0)


def told(plugin: Tensorf | TensorfCp, field: TensorialField, store: Store, seconds: float) -> str:
    """The line on what was projected."""
    line = plugin.project(field, store, seconds)
    assert line is not None
    return line


def factors(field: TensorialField, grid: str) -> list[Tensor]:
    """The planes and lines of a grid."""
    found: list[Tensor] = [p for name, p in field.named_parameters() if name.startswith(f"{grid}.")]
    assert found
    return found


@torch.no_grad()
def color_error(field: TensorialField, store: Store) -> float:
    """Root mean square error of the colours of a store's own samples."""
    return float((field.color(store.x, store.d[:, None])[:, 0] - store.rgb).square().mean().sqrt())


@torch.no_grad()
def alpha_error(field: TensorialField) -> float:
    """Root mean square error of the opacity over a length of 0.02, near the ball's surface."""
    g = torch.Generator().manual_seed(9)
    x = F.normalize(torch.randn(5000, 3, generator=g), dim=-1) * (0.4 + 0.2 * torch.rand(5000, 1, generator=g))
    error = torch.exp(-0.02 * field.density(x)) - torch.exp(-0.02 * sphere(x))
    return float(error.square().mean().sqrt())


@dataclasses.dataclass(frozen=True)
class Case:
    """An architecture, what its density is planned with, and the share of the error that may stay."""

    plugin: Tensorf | TensorfCp
    density: Config
    left: dict[str, float]


VM = Case(Tensorf(), {}, {"asked": 0.1, "spread": 0.2})
CP = Case(TensorfCp(), {"density_rank": 32}, {"asked": 0.15, "spread": 0.25})


@pytest.mark.parametrize(("cost", "words"), [(1e3, "asked"), (1e12, "spread")])
@pytest.mark.parametrize(
    ("case", "activation"), [(VM, "exp"), (VM, "softplus"), (VM, "relu"), (CP, "exp"), (CP, "softplus")]
)
def test_projection_starts_near_the_teacher(cost: float, words: str, case: Case, activation: str) -> None:
    overrides = {"resolution": 48, "density_activation": activation, "density_scale": 25.0, **case.density}
    runs = []
    for _ in range(2):
        field = build(case.plugin, overrides)
        before = alpha_error(field)
        assert words in told(case.plugin, field, store_of(cost), 10.0)
        assert alpha_error(field) < case.left[words] * before
        runs.append(factors(field, "density_grid")[0])
    assert torch.equal(runs[0], runs[1])


VM_RANKS = {"color_ranks": [13, 12, 12]}


@pytest.mark.parametrize(
    ("plugin", "overrides", "most", "share"),
    [
        (Tensorf(), VM_RANKS, 0.03, 0.2),
        (Tensorf(), {**VM_RANKS, "mlp_bias": False}, 0.03, 0.2),
        (Tensorf(), {**VM_RANKS, "shading": "sh"}, 0.03, 0.2),
        (Tensorf(), {**VM_RANKS, "shading": "rgb", "color_features": 3}, 0.03, 0.2),
        (TensorfCp(), {"color_rank": 97, "density_rank": 16}, 0.04, 0.25),
    ],
)
def test_colour_is_projected_too(plugin: Tensorf | TensorfCp, overrides: Config, most: float, share: float) -> None:
    field, store = build(plugin, {"resolution": 32, **overrides}), store_of(1e3)
    before = color_error(field, store)
    assert "colour by" in told(plugin, field, store, 20.0)
    assert color_error(field, store) < min(most, share * before)


@pytest.mark.parametrize("plugin", [Tensorf(), TensorfCp()])
def test_a_head_of_one_layer_is_not_solved_for(plugin: Tensorf | TensorfCp) -> None:
    line = told(plugin, build(plugin, {"resolution": 16, "mlp_layers": 1}), store_of(1e3), 5.0)
    assert "colour by" in line
    assert "last layer" not in line


@pytest.mark.parametrize(
    ("plugin", "few"),
    [
        (Tensorf(), {"color_ranks": [5, 5, 5]}),
        (Tensorf(), {"color_features": 2}),
        (TensorfCp(), {"color_rank": 5}),
        (TensorfCp(), {"color_features": 2}),
    ],
)
def test_too_few_products_or_features_are_left_alone(plugin: Tensorf | TensorfCp, few: dict[str, Any]) -> None:
    field = build(plugin, {"resolution": 16, **few})
    before = [p.clone() for p in factors(field, "color_grid")]
    assert "colour" not in told(plugin, field, store_of(1e3), 5.0)
    assert all(torch.equal(a, b) for a, b in zip(before, factors(field, "color_grid")))


@pytest.mark.parametrize("plugin", [Tensorf(), TensorfCp()])
def test_projection_of_nothing_is_none(plugin: Tensorf | TensorfCp) -> None:
    beside = {"min": [0.9, 0.9, 0.9], "max": [1.0, 1.0, 1.0]}
    assert plugin.project(build(plugin, {"resolution": 9, "box": beside}), store_of(1e3), 1.0) is None


def test_a_hundred_steps_fit_a_ball() -> None:
    plugin = Tensorf()
    field = build(plugin, {"resolution": 40})
    optimizer = torch.optim.Adam(plugin.param_groups(field)[:1], betas=(0.9, 0.99))
    g = torch.Generator().manual_seed(0)
    before = alpha_error(field)
    for _ in range(100):
        x = F.normalize(torch.randn(2000, 3, generator=g), dim=-1) * (0.3 + 0.3 * torch.rand(2000, 1, generator=g))
        target = sphere(x)
        sigma = field.density(field.encode(x))
        loss = (torch.exp(-0.02 * sigma) - torch.exp(-0.02 * target)).square().mean()
        loss = loss + 0.05 * F.huber_loss(sigma.add(1e-3).log(), target.add(1e-3).log())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert alpha_error(field) < 0.15 * before
