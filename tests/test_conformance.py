"""The conformance suite over everything that is installed; and over plugins that break it, to see that it can fail."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pvdconvert.containers import open_manifest
from pvdconvert.errors import UnknownError
from pvdconvert.field import RadianceField
from pvdconvert.plugin import FORMAT_GROUP, PLUGIN_GROUP, ArchitectureBase, Config
from pvdconvert.registry import Origin, Registry, default, installed
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.testing import AnalyticScene, architectures, check_conversion, formats, selftest
from pvdconvert.testing.checks import Check, Failed, expect, run, run_all
from pvdconvert.testing.subject import Subject

ARCHITECTURES = default().names(PLUGIN_GROUP)
FORMATS = default().names(FORMAT_GROUP)

architecture_subject = functools.cache(Subject)
format_subject = functools.cache(formats.FormatSubject)


def test_nothing_installed_is_broken() -> None:
    assert [(p.name, p.reason) for p in default().problems()] == []
    assert {"nerf", "ngp", "tensorf", "plenoxels"} <= set(ARCHITECTURES)


@pytest.mark.parametrize("check", architectures.CHECKS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, check: str) -> None:
    result = run(check, architectures.CHECKS[check], architecture_subject(name))
    assert result.ok, result.detail


@pytest.mark.parametrize("check", formats.CHECKS)
@pytest.mark.parametrize("name", FORMATS)
def test_format(name: str, check: str) -> None:
    result = run(check, formats.CHECKS[check], format_subject(name))
    assert result.ok, result.detail


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_conversion(name: str) -> None:
    result = check_conversion(name)
    assert result.ok, result.detail


# --- the suite itself ----------------------------------------------------------------------------------------------


def test_a_check_reports_what_is_wrong() -> None:
    def passes(subject: int) -> str:
        expect(subject == 3, "not 3")
        return "three"

    def crashes(subject: int) -> None:
        raise ZeroDivisionError("by\nnothing")

    assert run("a", passes, 3) == Check("a", True, "three")
    assert run("a", passes, 4) == Check("a", False, "not 3")
    assert run("b", crashes, 3) == Check("b", False, "ZeroDivisionError: by nothing")
    assert [c.status for c in run_all({"a": passes, "b": crashes}, lambda: 3)] == ["pass", "fail"]
    (only,) = run_all({"a": passes}, lambda: 1 // 0)
    assert (only.name, only.ok) == ("code", False)
    with pytest.raises(UnknownError, match="nerv"):
        selftest("nerv")


class Wrapped(RadianceField):
    """A sound field with one fault."""

    def __init__(self, inner: RadianceField, fault: str) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault
        self.feature_width = (inner.feature_width or 0) + (fault == "feature width")

    def restrict(self, occupancy: Occupancy) -> None:
        if self.fault == "ignores restrict":
            self.mask = None
        else:
            self.inner.restrict(occupancy)
            self.mask = self.inner.mask

    def encode(self, x: Tensor) -> Tensor:
        if self.fault == "looks at neighbours":
            x = x + 0.05 * x.mean(0)
        if self.fault == "no empty input":
            x[0]
        return self.inner.encode(x)

    def density(self, latent: Tensor) -> Tensor:
        sigma = self.inner.density(latent)
        if self.fault == "fog outside":
            return sigma + 1e-3
        if self.fault == "negative":
            return sigma - 0.5
        return sigma.detach() if self.fault == "no gradient" else sigma

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        rgb = self.inner.color(latent, d)
        if self.fault == "one direction for all":
            return rgb[:, :1].expand_as(rgb)
        return rgb.double() if self.fault == "double" else rgb

    def features(self, latent: Tensor) -> Tensor | None:
        return self.inner.features(latent)


class Faulty(ArchitectureBase):
    """The `nerf` plugin with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault, self.inner = fault, default().architecture("nerf")

    def plan(self, facts: Any, budget: Any, limits: Any, overrides: Mapping[str, Any]) -> Config:
        if self.fault == "deaf":
            overrides = {}
        if self.fault == "too large":
            budget = dataclasses.replace(budget, max_mb=None)
        return self.inner.plan(facts, budget, limits, overrides)

    def build(self, config: Config, scene: Any, seed: int) -> RadianceField:
        if self.fault == "random":
            seed = int(torch.randint(1 << 30, ()))
        return Wrapped(self.inner.build(config, scene, seed), self.fault)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Any) -> RadianceField:
        if self.fault == "takes anything":
            tensors = {k: v for k, v in tensors.items() if k != "no.such.tensor"}
        return Wrapped(self.inner.load(config, tensors, scene), self.fault)

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        assert isinstance(field, Wrapped)
        config, tensors = self.inner.save(field.inner)
        if self.fault == "lossy":
            tensors = {k: v.half().float() if v.is_floating_point() else v for k, v in tensors.items()}
            tensors["fine.rgb.bias"] = tensors["fine.rgb.bias"] + 1
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, Wrapped)
        groups = self.inner.param_groups(field.inner)
        if self.fault == "forgets a parameter":
            groups[0]["params"] = groups[0]["params"][1:]
        if self.fault == "no rate":
            for group in groups:
                group["lr"] = 1e-12
        return groups


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("deaf", "plan-overrides"),
        ("deaf", "plan-unknown-key"),
        ("too large", "plan-size"),
        ("random", "build"),
        ("negative", "answers"),
        ("double", "answers"),
        ("fog outside", "outside-box"),
        ("fog outside", "outside-mask"),
        ("ignores restrict", "outside-mask"),
        ("looks at neighbours", "rows"),
        ("one direction for all", "directions"),
        ("no empty input", "empty"),
        ("feature width", "stages"),
        ("lossy", "save-load"),
        ("takes anything", "load-surplus"),
        ("forgets a parameter", "parameters"),
        ("no gradient", "gradients"),
        ("no rate", "fit"),
    ],
)
def test_the_suite_finds_faults(fault: str, caught_by: str) -> None:
    nerf = next(o for o in installed(PLUGIN_GROUP) if o.name == "nerf")
    registry = Registry(lambda group: [nerf] if group == PLUGIN_GROUP else [])
    subject = Subject("nerf", registry)
    assert run(caught_by, architectures.CHECKS[caught_by], subject).ok
    subject = Subject("nerf", registry)
    subject.code = Faulty(fault)
    assert not run(caught_by, architectures.CHECKS[caught_by], subject).ok


def test_torch_in_a_spec_is_found() -> None:
    heavy = Origin("nerf", "pvdconvert_plugins.nerf:Nerf", "pvdconvert", "0", lambda: None)
    subject = Subject("nerf")
    subject.entry = dataclasses.replace(subject.entry, origin=heavy)
    with pytest.raises(Failed, match="imports torch"):
        architectures.torch_free(subject)


def test_a_greedy_probe_is_found() -> None:
    subject = formats.FormatSubject(default().native())
    match = next(m for m in (subject.probe(open_manifest(p)) for p, _ in subject.written.values()) if m)
    subject.probe = lambda manifest: match
    assert not run("probe-zoo", formats.CHECKS["probe-zoo"], subject).ok


def test_the_analytic_scene_is_what_it_says() -> None:
    """Density 0 outside of the occupancy it announces, and the peak where the largest blob alone stands."""
    scene = AnalyticScene()
    occupancy = scene.occupancy()
    x = torch.rand(20000, 3) * 2 - 1
    sigma, rgb = scene(x, torch.tensor([[0.0, 0.0, -1.0]]).expand(len(x), 3))
    assert bool((sigma[~occupancy.contains(x)] == 0).all())
    assert 0.02 < float((sigma > 0).float().mean()) < 0.2
    assert bool(((rgb >= 0) & (rgb <= 1)).all())
    center = scene.encode(torch.tensor([[-0.25, -0.15, -0.20], [0.0, 0.0, 1.5]]))
    assert scene.density(center).tolist() == [40.0, 0.0]
    facts = scene.facts(occupancy)
    assert facts.occupied_cells == occupancy.count
    assert all(a <= b for a, b in zip(scene.scene.box.min, facts.occupied_box.min))
