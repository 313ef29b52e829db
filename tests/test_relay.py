"""Chains: teacher -> proxy -> student, judged by the first teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import pvdconvert
from pvdconvert.cli.report import lines
from pvdconvert.errors import Interrupted, RequestError, UsageError
from pvdconvert.loading import open_field
from pvdconvert.looking import reference
from pvdconvert.prepare import prepare
from pvdconvert.relay import halves
from pvdconvert.settings import Settings
from pvdconvert.testing.analytic import AnalyticScene
from tests.test_pipeline import SMALL

STEPS = "labels=1;features=2/2;density=8/8;color=8/8;render=8/8"
CHAIN = f"{STEPS}|{STEPS}"


def chain(out: Path | None = None, **options: Any) -> Any:
    field = AnalyticScene()
    settings: dict[str, Any] = {"via": "tensorf-cp", "preset": "fast", "steps": CHAIN, **options}
    settings.setdefault("sets", SMALL["tensorf"])
    return pvdconvert.convert(field, "tensorf", scene=field.scene, out=out, **settings)


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("chain") / "student.safetensors"
    return out, chain(out)


@pytest.mark.slow
def test_a_chain_reports_both_errors(chained: tuple[Path, Any]) -> None:
    report = chained[1]
    assert report.via["architecture"] == "tensorf-cp"
    whole, first, second = (v["psnr"] for v in (report.fidelity, report.via["fidelity"], report.via["of_proxy"]))
    assert len({whole, first, second}) == 3
    assert min(whole, first, second) > 15
    assert report.source["architecture"] == "function"
    assert any("proxy against teacher" in line for line in lines(report.to_json()))


@pytest.mark.slow
def test_the_student_is_judged_by_the_first_teacher(chained: tuple[Path, Any]) -> None:
    out, report = chained
    teacher, student = prepare(AnalyticScene(), AnalyticScene().scene), open_field(out)
    cells = student.field.support()
    assert cells is not None
    own = reference(teacher, count=4, size=60).compare(student.field.eval(), cells).psnr
    # Fewer and smaller views: about the same figure.
    assert abs(own - report.fidelity["psnr"]) < 3


@pytest.mark.slow
def test_a_chain_replays_bit_for_bit(chained: tuple[Path, Any], tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert chain(one, validate=False).replay == chained[1].replay
    assert chain(two, validate=False, steps=chained[1].replay).replay == chained[1].replay
    with safe_open(one, "np") as a, safe_open(two, "np") as b:
        assert all((a.get_tensor(k) == b.get_tensor(k)).all() for k in a.keys())  # noqa: SIM118


def test_the_budget_is_shared_and_only_the_student_meets_the_request() -> None:
    proxy, student = halves(Settings("nerf", budget=100.0, via="ngp", max_mb=2.0, layout="bmild", min_psnr=30.0))
    assert (proxy.to, proxy.budget, proxy.max_mb, proxy.layout, proxy.min_psnr) == ("ngp", 50.0, None, None, None)
    assert (student.to, student.budget, student.max_mb, student.layout) == ("nerf", 50.0, 2.0, "bmild")
    assert [s.rounds > 0 for s in halves(Settings("nerf", "best", via="ngp"))] == [True, True]


@pytest.mark.slow
def test_a_chain_that_is_stopped_says_that_it_cannot_resume(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped in stage") as stopped:
        chain(tmp_path / "o.safetensors", stop=lambda: True)
    assert "nothing to resume" in str(stopped.value)
    assert not list(tmp_path.iterdir())


def test_chains_that_make_no_sense_are_refused(chained: tuple[Path, Any]) -> None:
    for options, message in (
        ({"via": "tensorf"}, "contradict"),
        ({"exact": True}, "contradict"),
        ({"resume": True}, "cannot be resumed"),
        ({"dry_run": True}, "cannot be resumed"),
        ({"steps": STEPS}, "two parts"),
    ):
        with pytest.raises(UsageError, match=message):
            chain(**options)
    with pytest.raises(RequestError, match="already is"):
        pvdconvert.convert(chained[0], "ngp", via="tensorf", steps=CHAIN)
