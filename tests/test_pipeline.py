"""The main road from a tiny analytic teacher: order, reproducibility, gates, interruption, safe writing."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import pvdconvert
from pvdconvert.errors import (
    InputError,
    Interrupted,
    OutputError,
    PvdError,
    QualityError,
    RequestError,
    UnknownError,
    UsageError,
)
from pvdconvert.plugin import ArrayTensor, Parts
from pvdconvert.registry import default
from pvdconvert.report import Report
from pvdconvert.scene import Box
from pvdconvert.testing.analytic import AnalyticScene

STEPS = "labels=1;features=5/5;density=20/20;color=20/20;render=20/20"
SMALL: dict[str, dict[str, Any]] = {
    "ngp": {"log2_table": 12, "levels": 6},
    "nerf": {"depth": 2, "width": 32},
    "tensorf": {"resolution": 24, "density_ranks": [4, 4, 4], "color_ranks": [4, 4, 4]},
    "plenoxels": {"resolution": 24},
}


def small(to: str, out: Path | None = None, **options: Any) -> Report:
    field = AnalyticScene()
    settings: dict[str, Any] = {"steps": STEPS, "validate": False, "sets": SMALL[to], **options}
    return pvdconvert.convert(field, to, scene=field.scene, out=out, **settings)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "tiny.safetensors"
    small("ngp", out)
    return out


def test_the_stages_run_in_the_order_of_the_paper(tmp_path: Path) -> None:
    report = small("tensorf", tmp_path / "o.safetensors")
    names = [s.name for s in report.stages if s.name not in ("labels", "projection")]
    assert names == ["features", "density", "color", "render"]
    ran = {s.name: s for s in report.stages}
    assert [ran[n].steps for n in ("density", "color", "render")] == [20, 20, 20]
    assert report.replay.endswith("density=20/20;color=20/20;render=20/20")
    for name in ("density", "color", "render"):
        assert ran[name].psnr_before is not None
        assert ran[name].psnr_after is not None
    assert (ran["render"].psnr_after or 0) > (ran["density"].psnr_before or 99)


@pytest.mark.slow
def test_rounds_of_preset_best_ask_anew_and_replay_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pvdconvert import conversion, settings

    monkeypatch.setattr(settings, "BEST_ROUND", 2.0)
    monkeypatch.setattr(settings, "BEST_ROUNDS", 2)
    monkeypatch.setattr(conversion, "BEST_ROUND", 2.0)
    monkeypatch.setattr(conversion, "BEST_GAIN", -100.0)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first = small("ngp", a, preset="best", steps=None)
    names = [s.name for s in first.stages]
    assert names[-5:] == ["labels-1", "color-1", "labels-2", "color-2", "rays"]
    assert all(f"{n}=" in first.replay for n in ("labels-1", "color-1", "rays"))
    again = small("ngp", b, preset="best", steps=first.replay)
    assert again.replay == first.replay
    with safe_open(a, "np") as one, safe_open(b, "np") as two:
        assert all((one.get_tensor(k) == two.get_tensor(k)).all() for k in one.keys())  # noqa: SIM118


def test_a_student_without_a_tap_says_that_features_were_skipped(tmp_path: Path) -> None:
    report = small("plenoxels")
    assert next(s for s in report.stages if s.name == "features").note.startswith("skipped: ")


@pytest.mark.parametrize("cut", ["color-1", "labels-2", "rays"])
def test_a_replay_that_ends_within_a_round_is_refused(cut: str) -> None:
    steps = "labels=1;features=0/0;density=1/1;color=1/1;render=1/1;labels-1=1/1;color-1=1/1"
    steps += ";labels-2=1/1;color-2=1/1;rays=1/1"
    kept = ";".join(part for part in steps.split(";") if not part.startswith(f"{cut}="))
    with pytest.raises(UsageError, match=f"rounds without '{cut}'"):
        small("ngp", steps=kept)


def test_two_bare_functions_and_a_box_are_a_teacher() -> None:
    def density(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.norm(dim=1) < 0.5, 40.0, 0.0)

    def color(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 0.3)

    report = pvdconvert.convert((density, color), "plenoxels", box=Box.cube(1.0), steps=STEPS, sets={"resolution": 24})
    assert report.fidelity is not None
    assert report.fidelity["psnr"] > 20
    with pytest.raises(UsageError, match="box"):
        pvdconvert.convert((density, color), "plenoxels")


def test_the_report_is_json_without_nan(tmp_path: Path) -> None:
    report = small("tensorf")
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["schema"] == "pvdconvert/report/1"


def test_the_same_architecture_is_re_laid_out_exactly(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "same.safetensors"
    report = pvdconvert.convert(native, "ngp", out=out)
    assert report.stages[0].name == "transcode"
    a, b = pvdconvert.open_field(native), pvdconvert.open_field(out)
    for name, tensor in a.field.state_dict().items():
        assert torch.equal(tensor, b.field.state_dict()[name])
    x = torch.rand(500, 3) * 2 - 1
    d = torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    for u, v in zip(a.field(x, d), b.field(x, d)):
        assert torch.equal(u, v)


def test_a_setting_turns_transcoding_into_distillation(native: Path) -> None:
    report = pvdconvert.convert(native, "ngp", sets={"log2_table": 11, "levels": 4}, steps=STEPS, validate=False)
    assert report.plan["kind"] == "distil"


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    report = small("tensorf", out, dry_run=True, steps=None)
    assert report.dry_run
    assert report.plan["config"]["resolution"]
    assert report.target["bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_density_outside_of_the_visible_cells_is_exactly_zero(native: Path) -> None:
    field = pvdconvert.open_field(native).field
    x = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    teacher = AnalyticScene()
    far = teacher._blobs(x).sum(-1) == 0
    near = torch.stack([(x - c).norm(dim=1) / r for c, r in zip(teacher.centers, teacher.radii)]).amin(0) < 1.25
    sigma = field.density(field.encode(x))
    assert bool((sigma[far & ~near] == 0).all())
    assert bool((sigma > 0).any())


# -- refusals --------------------------------------------------------------------------------------------------


def refused(error: type[PvdError], code: int, run: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        run()
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_architecture_is_refused_with_a_suggestion(native: Path) -> None:
    assert "tensorf" in refused(UnknownError, 4, lambda: pvdconvert.convert(native, "tensorff"))


def test_an_existing_output_is_refused_before_work(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    out.write_text("precious")
    assert "--force" in refused(OutputError, 9, lambda: pvdconvert.convert(native, "tensorf", out=out))
    assert out.read_text() == "precious"


def test_a_missing_folder_is_refused_before_work(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "no" / "o.safetensors"
    assert "mkdir" in refused(OutputError, 9, lambda: pvdconvert.convert(native, "tensorf", out=out))


def test_an_output_that_is_a_folder_is_refused(native: Path, tmp_path: Path) -> None:
    refused(OutputError, 9, lambda: pvdconvert.convert(native, "tensorf", out=tmp_path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(InputError, 3, lambda: pvdconvert.convert(tmp_path / "nothing.ckpt", "tensorf"))


def test_an_empty_scene_is_refused() -> None:
    def empty() -> object:
        return pvdconvert.convert((lambda x: torch.zeros(len(x)), lambda x, d: x), "ngp", box=Box.cube(1.0))

    assert "no density" in refused(RequestError, 10, empty)


def test_weights_that_are_not_numbers_are_refused(native: Path, tmp_path: Path) -> None:
    loaded = pvdconvert.open_field(native)
    tensors = {k: ArrayTensor(v.numpy().copy()) for k, v in loaded.parts.tensors.items()}
    name = next(k for k, v in tensors.items() if v.dtype == "float32")
    tensors[name].array.reshape(-1)[0] = math.nan
    bad = tmp_path / "bad.safetensors"
    default().format(default().native()).write(Parts("ngp", dict(loaded.parts.config), tensors, loaded.scene), bad)
    assert name in refused(RequestError, 10, lambda: pvdconvert.convert(bad, "tensorf"))


@pytest.mark.parametrize(
    "options", [{"preset": "fasst"}, {"budget": -1.0}, {"max_mb": 0.0}, {"seed": -1}, {"steps": "nonsense"}]
)
def test_impossible_settings_are_usage_errors(native: Path, options: dict[str, Any]) -> None:
    refused(UsageError, 2, lambda: pvdconvert.convert(native, "tensorf", **options))


def test_the_quality_gate_writes_nothing_below_it(tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    text = refused(QualityError, 6, lambda: small("nerf", out, min_psnr=60.0, validate=True))
    assert "60" in text
    assert list(tmp_path.iterdir()) == []


# -- writing -----------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_behind(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "o.safetensors"
    assert "No space" in refused(OutputError, 9, lambda: pvdconvert.convert(native, "ngp", out=out))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_differently_is_not_kept(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = default().format(default().native())
    real = code.write

    def flip(parts: Parts, path: Path) -> None:
        real(parts, path)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(code, "write", flip)
    out = tmp_path / "o.safetensors"
    refused(OutputError, 9, lambda: pvdconvert.convert(native, "ngp", out=out))
    assert list(tmp_path.iterdir()) == []


# -- interruption --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("to", sorted(SMALL))
def test_the_same_seed_gives_the_same_file_bit_for_bit_interrupted_or_not(to: str, tmp_path: Path) -> None:
    whole, cut, other = (tmp_path / f"{n}.safetensors" for n in ("whole", "cut", "other"))
    small(to, whole)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 35

    with pytest.raises(Interrupted, match="--resume") as caught:
        small(to, cut, stop=stop)
    assert caught.value.exit_code == 130
    assert not cut.exists()
    assert (tmp_path / "cut.safetensors.resume" / "run.json").is_file()
    small(to, cut, resume=True)
    assert cut.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "cut.safetensors.resume").exists()
    small(to, other, seed=1)
    assert other.read_bytes() != whole.read_bytes()


def test_resuming_another_request_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    with pytest.raises(Interrupted):
        small("tensorf", out, stop=lambda: True)
    text = refused(UsageError, 2, lambda: small("tensorf", out, resume=True, seed=5))
    assert "seed" in text
    (tmp_path / "o.safetensors.resume" / "run.json").write_text("{")
    refused(InputError, 3, lambda: small("tensorf", out, resume=True))


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    refused(UsageError, 2, lambda: small("tensorf", tmp_path / "o.safetensors", resume=True))
