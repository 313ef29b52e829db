"""Directions in which a teacher's colours mean something: those from which a place was seen."""

from __future__ import annotations

import pytest
import torch

from pvdconvert.distill.distiller import Distiller
from pvdconvert.distill.label import SIDED, SIDES
from pvdconvert.distill.seen import FEWEST, MOST, Seen
from pvdconvert.prepare import prepare
from pvdconvert.progress import Silent
from pvdconvert.testing.analytic import AnalyticScene
from pvdconvert.testing.subject import Subject
from tests.answers import answers


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, 3, generator=generator), dim=-1)


def test_a_wall_of_two_faces_is_asked_from_in_front_of_each() -> None:
    """Two faces, cells apart: what is drawn for a face comes from its own side, and a place that none saw is told."""
    count = 4000
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, generator=generator)
    front = torch.arange(count) % 2 == 0
    x[:, 0] = torch.where(front, 0.05, 0.92)
    d = unit(count)
    d[:, 0] = torch.where(front, d[:, 0].abs(), -d[:, 0].abs()).mul(0.9).add(torch.where(front, 0.3, -0.3))
    d = torch.nn.functional.normalize(d, dim=-1)
    seen = Seen(x, d, cell=0.1)
    places = torch.tensor([[0.06, 0.5, 0.5], [0.93, 0.5, 0.5], [0.5, 0.5, 0.5], [9.0, 9.0, 9.0], [-9.0, 0.5, 0.5]])
    drawn, known = seen.draw(places, 64, generator, torch.full((5,), 0.1))
    assert known.tolist() == [True, True, False, False, False]
    assert (drawn[0, :, 0] > 0).float().mean() > 0.98
    assert (drawn[1, :, 0] < 0).float().mean() > 0.98
    assert torch.allclose(drawn[:2].norm(dim=-1), torch.ones(2, 64), atol=1e-5)
    # All around, not one direction: the mean over the half sphere above has length 1/2 and a little more.
    assert 0.4 < float(drawn[0].mean(0).norm()) < 0.8


def test_too_few_directions_are_no_knowledge() -> None:
    x = torch.zeros(FEWEST, 3)
    generator = torch.Generator().manual_seed(0)
    assert Seen(x, unit(FEWEST), 1.0).draw(x[:1], 2, generator, torch.ones(1))[1].item()
    assert not Seen(x[1:], unit(FEWEST - 1), 1.0).draw(x[:1], 2, generator, torch.ones(1))[1].item()
    drawn, known = Seen(x[:0], unit(0), 1.0).draw(x, 2, generator, torch.ones(FEWEST))
    assert not known.any()
    assert drawn.shape == (FEWEST, 2, 3)


def test_memory_is_bounded() -> None:
    assert len(Seen(torch.zeros(2 * MOST + 1, 3), torch.ones(2 * MOST + 1, 3), 1.0).d) <= MOST


def test_labels_ask_from_where_places_show() -> None:
    """With it, few colours are asked through what lies before a point."""
    field = AnalyticScene()
    prepared = prepare(field, field.scene, seconds=1.0)

    def asked(first: int, seen: Seen | None) -> tuple[float, Seen]:
        store = answers(prepared.occupancy, 2, first=first, seen=seen)
        assert store.many_d.shape[1] == SIDES
        x, d = store.x[store.many[:2000]], store.many_d[:2000]
        back = x[:, None, None] - d[:, :, None] * torch.linspace(0.005, 1.995, 200)[:, None]
        thick = 0.01 * field.density(back.reshape(-1, 3)).view(*d.shape[:2], -1).sum(-1)
        return float((torch.exp(-thick) < 0.02).float().mean()), Seen.of(store, SIDED, prepared.occupancy.cell)

    before, seen = asked(0, None)
    after, _ = asked(2, seen)
    assert before > 0.1
    assert after < 0.7 * before, (before, after)


@pytest.mark.parametrize(("wanted", "compared"), [(2, 2), (SIDES, SIDES), (SIDES + 3, SIDES)])
def test_a_step_compares_as_many_directions_as_a_student_asks_for(wanted: int, compared: int) -> None:
    """Those of one sample, each with its own colour; no more than were asked."""
    field, subject = AnalyticScene(), Subject("plenoxels")
    store = answers(prepare(field, field.scene, seconds=1.0).occupancy, 1)
    student = subject.fresh()
    student.batch_sides = wanted
    distiller = Distiller(subject.code, student, store, seed=0, progress=Silent(), evaluate=lambda: 0.0)
    many, d, rgb = distiller._from_sides(50)
    assert d.shape == rgb.shape == (50, compared, 3)
    x = store.x[many]
    assert torch.allclose(field.color(x, d), rgb, atol=1e-5)
