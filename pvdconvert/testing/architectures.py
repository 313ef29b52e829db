"""What every architecture plugin must do, ours or not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvdconvert import registry as registries
from pvdconvert.errors import InputError, PvdError, RequestError
from pvdconvert.field import Stage
from pvdconvert.plugin import Architecture, Budget, Limits, option_help
from pvdconvert.testing.checks import Check, Failed, expect, expect_torch_free, plain, run_all
from pvdconvert.testing.subject import Subject, answers_of, close


def spec(s: Subject) -> str:
    found = s.entry.spec
    expect(found.title.strip(), "the spec has no title")
    expect("\n" not in found.title, "the title is more than one line")
    expect(isinstance(s.code, Architecture), f"{found.code} lacks a method of pvdconvert.plugin.Architecture")
    return f"{s.entry.origin}: {found.title}"


def torch_free(s: Subject) -> None:
    expect_torch_free(s.entry.origin.value, s.entry.spec.options)


def options(s: Subject) -> str:
    expect(dataclasses.is_dataclass(s.options), "options is not a dataclass")
    params = getattr(s.options, "__dataclass_params__", None)
    expect(getattr(params, "frozen", False), "the options dataclass is not frozen")
    rows = list(option_help(s.options))
    for key, default, text in rows:
        expect(text.strip(), f"option {key!r} has no metadata['help']")
        json.dumps(None if default is dataclasses.MISSING else plain(default), allow_nan=False)
    return f"{len(rows)} options"


def plan(s: Subject) -> str:
    config = s.config
    expect(json.loads(json.dumps(config, allow_nan=False)) == plain(config), "the configuration is not JSON")
    known = {f.name for f in dataclasses.fields(s.options)}
    expect(set(config) <= known, f"plan returns keys that are no options: {sorted(set(config) - known)}")
    expect(s.code.plan(s.facts, s.budget, Limits(), {}) == config, "plan answers differently the second time")
    return f"max_mb={s.budget.max_mb}"


def plan_overrides(s: Subject) -> str:
    """Keys in which two presets differ are values that the plugin itself deems possible: each must be settable."""
    base, other = (s.code.plan(s.facts, Budget(preset), Limits(), {}) for preset in ("fast", "best"))
    scalars = {k: v for k, v in other.items() if base.get(k) != v and isinstance(v, int | float | str | bool)}
    if not scalars:
        scalars = {k: v for k, v in base.items() if isinstance(v, int | float | str | bool)}
    kept = []
    for key, value in scalars.items():
        try:
            made = s.code.plan(s.facts, Budget("fast"), Limits(), {key: value})
        except RequestError:
            continue
        expect(made.get(key) == value, f"--set {key}={value!r} was planned as {made.get(key)!r}")
        held = s.code.plan(s.facts, Budget("fast"), Limits({key: value}), {})
        expect(held.get(key) == value, f"a layout's limit {key}={value!r} was planned as {held.get(key)!r}")
        kept.append(key)
    expect(kept, "no key could be set")
    return ", ".join(kept)


def plan_unknown_key(s: Subject) -> None:
    try:
        s.code.plan(s.facts, Budget("fast"), Limits(), {"no_such_key": 1})
    except PvdError as error:
        expect("no_such_key" in str(error), f"the error does not name the key: {error}")
        return
    raise Failed("--set no_such_key=1 is accepted")


def plan_size(s: Subject) -> str:
    assert s.budget.max_mb is not None
    tensors = s.code.save(s.fresh())[1]
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6
    expect(size <= s.budget.max_mb * 1.02, f"asked for {s.budget.max_mb} MB, {size:.3f} MB of tensors")
    try:
        s.code.plan(s.facts, Budget("fast", max_mb=1e-6), Limits(), {})
    except RequestError:
        return f"{size:.3f} of {s.budget.max_mb} MB"
    raise Failed("a student of one byte is promised")


def build(s: Subject) -> str:
    before = torch.get_rng_state()
    a, b = s.fresh(5), s.fresh(5)
    expect(torch.equal(before, torch.get_rng_state()), "building moves torch's global random state")
    pairs = list(zip(a.state_dict().items(), b.state_dict().items()))
    expect(pairs or not list(a.parameters()), "the field has no state")
    for (name, one), (_, two) in pairs:
        expect(torch.equal(one, two), f"{name!r} differs between two builds of one seed")
    expect(a.flops_per_point > 0, "flops_per_point is not positive")
    return f"{sum(p.numel() for p in a.parameters())} parameters"


def answers(s: Subject) -> None:
    x, d = s.points(257), s.directions(257, 3)
    latent = s.field.encode(x)
    sigma, rgb = s.field.density(latent), s.field.color(latent, d)
    expect(latent.dim() == 2 and len(latent) == 257, f"encode returns {list(latent.shape)}, not [N, C]")
    expect(sigma.shape == (257,), f"density returns {list(sigma.shape)}, not [N]")
    expect(rgb.shape == (257, 3, 3), f"color returns {list(rgb.shape)}, not [N, K, 3]")
    for what, value in (("density", sigma), ("color", rgb)):
        expect(value.dtype == torch.float32, f"{what} is {value.dtype}, not float32")
        expect(torch.isfinite(value).all(), f"{what} is not finite")
    expect((sigma >= 0).all(), "density is negative")
    expect((answers_of(s.field, s.occupied(257), d)[0] > 0).any(), "density is 0 in every occupied cell")
    for name, value in [*s.field.named_parameters(), *s.field.named_buffers()]:
        expect(value.dtype != torch.float64, f"{name!r} is float64")


def outside_box(s: Subject) -> None:
    x = s.points(512, box=3.0)
    x = x[(x.abs() > 1.001).any(-1)]
    sigma, rgb = answers_of(s.field, x, s.directions(len(x), 1))
    expect((sigma == 0).all(), "density is not exactly 0 outside of the box")
    expect(torch.isfinite(rgb).all(), "colour outside of the box is not finite")


def outside_mask(s: Subject) -> str:
    """After restrict(), support() says where the field may render; elsewhere it is exactly 0."""
    support = s.field.support()
    if support is None:
        raise Failed("support() knows nothing after restrict()")
    x = s.points(4096)
    out = ~support.contains(x)
    expect(out.any(), "support() is the whole box although restrict() gave a part of it")
    sigma = answers_of(s.field, x, s.directions(len(x), 1))[0]
    expect((sigma[out] == 0).all(), "density is not exactly 0 outside of support()")
    held = support.contains(s.occupied(4096)).float().mean()
    expect(held > 0.99, f"support() leaves out {1 - float(held):.1%} of the cells given to restrict()")
    return f"{1 - float(out.float().mean()):.1%} of the box, {float(s.occupancy.grid.float().mean()):.1%} was given"


def rows(s: Subject) -> None:
    """Row n belongs to point n, whatever stands beside it."""
    x, d = s.occupied(300), s.directions(300, 2)
    sigma, rgb = answers_of(s.field, x, d)
    pick = torch.tensor([299, 0, 17, 128])
    with torch.no_grad():
        latent = s.field.encode(x)[pick]
        close(s.field.density(latent), sigma[pick], "densities of sliced latents")
        close(s.field.color(latent, d[pick]), rgb[pick], "colours of sliced latents")
    alone = [answers_of(s.field, x[i : i + 1], d[i : i + 1]) for i in pick.tolist()]
    close(torch.cat([a for a, _ in alone]), sigma[pick], "densities of points asked alone")
    close(torch.cat([b for _, b in alone]), rgb[pick], "colours of points asked alone")


def directions(s: Subject) -> None:
    x, d = s.occupied(50), s.directions(50, 5)
    with torch.no_grad():
        latent = s.field.encode(x)
        together = s.field.color(latent, d)
        single = torch.cat([s.field.color(latent, d[:, k : k + 1]) for k in range(5)], dim=1)
        close(together, single, "colours of five directions at once and one by one")
        close(s.field(x, d[:, 2])[1], together[:, 2], "forward and color")
    if s.entry.spec.view_dependent:
        expect((together.amax(1) - together.amin(1)).max() > 0, "announced as view dependent, but no direction matters")


def recording(s: Subject) -> None:
    """With and without autograd, contiguous or not, frozen or not: the same answers."""
    x, d = s.points(100), s.directions(100, 2)
    sigma, rgb = answers_of(s.field, x, d)
    latent = s.field.encode(x)
    close(s.field.density(latent).detach(), sigma, "density with and without gradients")
    close(s.field.color(latent, d).detach(), rgb, "colour with and without gradients")
    wide, deep = torch.zeros(100, 7), torch.zeros(3, 2, 100)
    wide[:, 2:5], deep[:] = x, d.permute(2, 1, 0)
    strided = answers_of(s.field, wide[:, 2:5], deep.permute(2, 1, 0))
    close(strided[0], sigma, "density of strided input")
    close(strided[1], rgb, "colour of strided input")


def empty(s: Subject) -> None:
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            latent = s.field.encode(torch.zeros(0, 3))
            expect(len(latent) == 0, "encode makes rows of nothing")
            expect(s.field.density(latent).shape == (0,), "density of nothing is not [0]")
            expect(s.field.color(latent, torch.zeros(0, 4, 3)).shape == (0, 4, 3), "colour of nothing is not [0, K, 3]")


def stages(s: Subject) -> str:
    x, d = s.occupied(20), s.directions(20, 2)
    with torch.no_grad():
        latent = s.field.encode(x)
        sigma, rgb = s.field.density(latent), s.field.color(latent, d)

        def forward(stage: Stage) -> Tensor | None:
            given = s.code.forward_stage(s.field, stage, x, d, latent)
            asked = s.code.forward_stage(s.field, stage, x, d)
            expect((given is None) == (asked is None), f"{stage}: an answer with a latent only")
            if given is not None and asked is not None:
                close(given, asked, f"{stage} with and without a latent")
            return given

        features, density, color, render = (forward(stage) for stage in Stage)
    expect(density is not None and density.shape == (20,), "the density stage is not [N]")
    expect(color is not None and color.shape == (20, 2, 3), "the color stage is not [N, K, 3]")
    expect(render is not None and render.shape == (20, 4), "the render stage is not [N, 4]")
    assert density is not None
    assert color is not None
    assert render is not None
    close(density, sigma, "the density stage and density")
    close(color, rgb, "the color stage and color")
    close(render, torch.cat([sigma[:, None], rgb[:, 0]], dim=1), "the render stage and the field")
    width = s.field.feature_width
    if features is None:
        expect(width is None, f"feature_width is {width}, but there are no features")
        return "no features"
    expect(features.shape == (20, width), f"features are {list(features.shape)}, feature_width is {width}")
    return f"{width} features"


def save_load(s: Subject) -> str:
    config, tensors = s.code.save(s.field)
    held = json.loads(json.dumps(config, allow_nan=False))
    expect(held == plain(config), "the saved configuration is not JSON")
    for name, t in tensors.items():
        expect(not t.requires_grad, f"saved tensor {name!r} still records gradients")
        expect(t.dtype != torch.float64, f"saved tensor {name!r} is float64")
    copies = {name: t.clone() for name, t in tensors.items()}
    back = s.code.load(held, tensors, s.scene)
    again, same = s.code.save(back)
    expect(plain(again) == held, f"load and save change the configuration: {_difference(held, plain(again))}")
    expect(same.keys() == tensors.keys(), f"load and save change the keys: {sorted(same.keys() ^ tensors.keys())}")
    for name, t in same.items():
        expect(torch.equal(t, copies[name]), f"tensor {name!r} does not survive load and save")
        expect(torch.equal(tensors[name], copies[name]), f"load changes the tensor {name!r} that it was given")
    x, d = s.occupied(200), s.directions(200, 2)
    frozen = back.eval().requires_grad_(False)
    twice = s.code.load(plain(again), same, s.scene)
    for what, asked, first, second in zip(
        ("density", "colour"), *(answers_of(f, x, d) for f in (s.field, frozen, twice))
    ):
        expect(torch.equal(first, second), f"{what} is not bit-equal after load, save and load")
        # A plugin may keep less than float32 on disk: then the first save rounds, and only that one.
        expect(torch.allclose(asked, first, rtol=1e-2, atol=1e-2 * float(asked.max())), f"save loses {what}")
    return f"{len(tensors)} tensors"


def _difference(a: Any, b: Any) -> list[str]:
    return sorted(k for k in {*a, *b} if a.get(k, Failed) != b.get(k, Failed))


def _refused(s: Subject, tensors: dict[str, Tensor], key: str, what: str) -> None:
    config = s.code.save(s.field)[0]
    try:
        s.code.load(config, tensors, s.scene)
    except InputError as error:
        expect(key in str(error), f"{what} {key!r}: the error does not name it: {error}")
        return
    except Exception as error:
        raise Failed(f"{what} {key!r} raises {type(error).__name__}, not InputError: {error}") from error
    raise Failed(f"{what} {key!r} is accepted")


def load_missing(s: Subject) -> None:
    tensors = s.code.save(s.field)[1]
    for key in tensors:
        _refused(s, {k: t for k, t in tensors.items() if k != key}, key, "missing tensor")


def load_surplus(s: Subject) -> None:
    tensors = s.code.save(s.field)[1]
    _refused(s, {**tensors, "no.such.tensor": torch.zeros(2)}, "no.such.tensor", "surplus tensor")


def load_misshapen(s: Subject) -> None:
    tensors = s.code.save(s.field)[1]
    for key, t in tensors.items():
        _refused(s, {**tensors, key: t.reshape(-1)[:-1].clone()}, key, "misshapen tensor")


def parameters(s: Subject) -> str:
    field = s.fresh()
    groups = s.code.param_groups(field)
    listed = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p): name for name, p in field.named_parameters() if p.requires_grad}
    expect(len(listed) == len(set(listed)), "a parameter stands in two groups")
    expect(set(listed) <= trainable.keys(), "a group holds what is no trainable parameter of the field")
    absent = [name for key, name in trainable.items() if key not in set(listed)]
    expect(not absent, f"in no group: {absent}")
    for group in groups:
        expect(isinstance(group.get("name"), str), "a group has no name")
        expect(math.isfinite(group["lr"]) and group["lr"] > 0, f"group {group['name']!r} has the rate {group['lr']}")
    return ", ".join(f"{group['name']} {group['lr']:.2g}" for group in groups)


def gradients(s: Subject) -> None:
    field = s.fresh()
    x, d = s.occupied(3000), s.directions(3000, 1)
    latent = field.encode(x)
    loss = (field.density(latent) * torch.rand(len(x))).sum() + (
        field.color(latent, d) * torch.rand(len(x), 1, 3)
    ).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, p in field.named_parameters():
        if p.requires_grad:
            expect(p.grad is not None and bool((p.grad != 0).any()), f"no gradient reaches {name!r}")
            expect(p.grad is not None and bool(torch.isfinite(p.grad).all()), f"the gradient of {name!r} is not finite")


def fit(s: Subject) -> str:
    """A few steps of Adam at the plugin's own rates bring density and colour nearer to the teacher's."""
    field = s.fresh()
    optimizer = torch.optim.Adam(s.code.param_groups(field))
    x, d = s.occupied(8192), s.directions(8192, 1)
    sigma, rgb = answers_of(s.teacher, x, d)
    step = 0.05

    def loss(pick: Tensor) -> Tensor:
        latent = field.encode(x[pick])
        alpha = torch.exp(-step * field.density(latent))
        weight = 1 - torch.exp(-step * sigma[pick])
        off = (field.color(latent, d[pick]) - rgb[pick]).square().sum((1, 2))
        return (alpha - 1 + weight).square().mean() + (weight * off).mean()

    with torch.no_grad():
        before = float(loss(torch.arange(len(x))))
    generator = torch.Generator().manual_seed(11)
    for _ in range(60):
        optimizer.zero_grad()
        loss(torch.randint(len(x), (2048,), generator=generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        after = float(loss(torch.arange(len(x))))
    expect(math.isfinite(after) and after < 0.7 * before, f"the loss went from {before:.4f} to {after:.4f} in 60 steps")
    return f"loss {before:.4f} -> {after:.4f}"


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "spec": spec,
    "torch-free": torch_free,
    "options": options,
    "plan": plan,
    "plan-overrides": plan_overrides,
    "plan-unknown-key": plan_unknown_key,
    "plan-size": plan_size,
    "build": build,
    "answers": answers,
    "outside-box": outside_box,
    "outside-mask": outside_mask,
    "rows": rows,
    "directions": directions,
    "recording": recording,
    "empty": empty,
    "stages": stages,
    "save-load": save_load,
    "load-missing": load_missing,
    "load-surplus": load_surplus,
    "load-misshapen": load_misshapen,
    "parameters": parameters,
    "gradients": gradients,
    "fit": fit,
}
"""Every check of an architecture by name, in the order in which they are worth reading."""


def check_architecture(name: str, registry: registries.Registry | None = None) -> list[Check]:
    """Run every check on architecture ``name``. Raises UnknownError if it is not installed."""
    registry = registry or registries.default()
    registry.architecture(name)
    return run_all(CHECKS, lambda: Subject(name, registry))
