"""Compositing: closed forms, float64, gradients; both twins on the same tests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pvdconvert.kernels.composite import ray_sum, render_weights, render_weights_torch
from pvdconvert.kernels.wavefront import Wave, take, weigh
from tests.twins import TWINS, choose


@pytest.fixture(params=TWINS, autouse=True)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    choose(name, monkeypatch, request.module, "render_weights", "ray_sum")
    return name


def packed(seed: int, rays: int = 12, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """tau [S] over nine orders of magnitude, offsets [R+1] with empty rays first, last and between."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 40, (rays,), generator=g)
    counts[0] = counts[-1] = counts[rays // 2] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    tau = 10 ** (torch.rand(int(offsets[-1]), generator=g) * 9 - 8) * scale
    tau[::7] = 0
    return tau, offsets


def plain(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, ray by ray in float64: alpha, the product of what came before, and their product."""
    weights, ends = [], []
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        alpha = -torch.expm1(-tau[a:b].double())
        left = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - alpha, 0)])
        weights.append(left[:-1] * alpha)
        ends.append(left[-1])
    return torch.cat(weights), torch.stack(ends)


def test_weights_by_hand() -> None:
    half = math.log(2.0)
    w, end = render_weights(torch.tensor([half, half, half]), torch.tensor([0, 2, 2, 3]))
    torch.testing.assert_close(w, torch.tensor([0.5, 0.25, 0.5]))
    torch.testing.assert_close(end, torch.tensor([0.25, 1.0, 0.5]))


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_weights_against_float64(seed: int) -> None:
    tau, offsets = packed(seed)
    true_w, true_end = plain(tau, offsets)
    w, end = render_weights(tau, offsets)
    torch.testing.assert_close(w.double(), true_w, rtol=3e-6, atol=1e-12)
    torch.testing.assert_close(end.double(), true_end, rtol=3e-6, atol=1e-12)
    torch.testing.assert_close(ray_sum(w, offsets) + end, torch.ones(len(end)), rtol=0, atol=2e-6)


def test_homogeneous_slab() -> None:
    sigma, length, n = 3.0, 0.7, 64
    w, end = render_weights(torch.full((n,), sigma * length / n), torch.tensor([0, n]))
    assert end.item() == pytest.approx(math.exp(-sigma * length), rel=1e-6)
    assert w.sum().item() == pytest.approx(1 - math.exp(-sigma * length), rel=1e-6)
    t = (torch.arange(n) + 0.5) * length / n
    # Mean free depth of a slab: integral of t sigma exp(-sigma t) from 0 to L = 1/sigma - (L + 1/sigma) exp(-sigma L).
    expected = 1 / sigma - (length + 1 / sigma) * math.exp(-sigma * length)
    assert (w * t).sum().item() == pytest.approx(expected, rel=3e-4)  # midpoints: (sigma dt)^2 / 12


def test_opaque_and_infinite_samples_stay_on_their_ray() -> None:
    tau = torch.tensor([1.0, torch.inf, 2.0, 1e30, 0.5, math.log(2.0)])
    w, end = render_weights(tau, torch.tensor([0, 3, 5, 6]))
    e = math.exp(-1.0)
    torch.testing.assert_close(w, torch.tensor([1 - e, e, 0.0, 1.0, 0.0, 0.5]))
    torch.testing.assert_close(end, torch.tensor([0.0, 0.0, 0.5]))


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_gradients_against_float64(seed: int) -> None:
    tau, offsets = packed(seed, scale=0.3)
    g = torch.Generator().manual_seed(seed + 1)
    gw, ge = torch.randn(len(tau), generator=g), torch.randn(len(offsets) - 1, generator=g)
    exact = tau.double().requires_grad_()
    w, end = plain(exact, offsets)
    ((w * gw).sum() + (end * ge).sum()).backward()  # type: ignore[no-untyped-call]
    mine = tau.clone().requires_grad_()
    w, end = render_weights(mine, offsets)
    ((w * gw).sum() + (end * ge).sum()).backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=2e-6)


def test_gradient_through_one_output_only() -> None:
    tau = torch.tensor([0.3, 0.2], requires_grad=True)
    offsets = torch.tensor([0, 2])
    render_weights(tau, offsets)[1].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(tau.grad, torch.full((2,), -math.exp(-0.5)))
    tau.grad = None
    render_weights(tau, offsets)[0][1:].sum().backward()  # type: ignore[no-untyped-call]
    second = math.exp(-0.3) * (1 - math.exp(-0.2))
    torch.testing.assert_close(tau.grad, torch.tensor([-second, math.exp(-0.5)]))


@pytest.mark.parametrize("channels", [0, 3])
def test_weighted_sums_and_their_gradients(channels: int) -> None:
    """Against the definition, ray by ray in float64; ``channels`` 0: values [S]."""
    w, offsets = packed(3, rays=7)
    values = torch.rand((len(w), channels) if channels else (len(w),), generator=torch.Generator().manual_seed(0))
    up = torch.rand((7, channels) if channels else (7,), generator=torch.Generator().manual_seed(1))
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = w.to(dtype).requires_grad_(), values.to(dtype).requires_grad_()
        if dtype == torch.float32:
            out = ray_sum(b, offsets, a)
        else:
            each = a.view(-1, *[1] * (b.dim() - 1)) * b
            out = torch.stack([each[i:j].sum(0) for i, j in zip(offsets[:-1].tolist(), offsets[1:].tolist())])
        results.append([out.detach(), *torch.autograd.grad(out, [a, b], up.to(dtype))])
    for mine, true in zip(*results):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


def test_truth_passes_gradcheck() -> None:
    tau = torch.rand(9, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 9])
    assert torch.autograd.gradcheck(lambda v: render_weights_torch(v, offsets), (tau,))
    values = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: ray_sum(v, offsets), (values,))


def test_empty_and_non_contiguous_input() -> None:
    w, end = render_weights(torch.zeros(0), torch.tensor([0, 0, 0]))
    assert w.shape == (0,)
    assert end.tolist() == [1.0, 1.0]
    w, end = render_weights(torch.zeros(0), torch.tensor([0]))
    assert end.shape == (0,)
    assert ray_sum(torch.zeros(0, 3), torch.tensor([0, 0])).tolist() == [[0.0, 0.0, 0.0]]
    tau, offsets = packed(1)
    assert torch.equal(render_weights(tau.repeat_interleave(2)[::2], offsets)[0], render_weights(tau, offsets)[0])


def test_same_bits_every_time_and_for_any_threads(twin: str) -> None:
    tau, offsets = packed(5, rays=10 if twin == "triton" else 500)

    def run() -> list[Tensor]:
        leaf = tau.clone().requires_grad_()
        w, end = render_weights(leaf, offsets)
        rgb = ray_sum(w[:, None] * torch.linspace(0, 1, len(tau) * 3).view(-1, 3), offsets)
        (rgb.square().sum() + end.sum()).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return [w.detach(), end.detach(), rgb.detach(), leaf.grad]

    first = run()
    torch.set_num_threads(2)
    second = run()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_ray_sum_and_its_gradient() -> None:
    values = torch.arange(8.0).view(4, 2).requires_grad_()
    out = ray_sum(values, torch.tensor([0, 0, 3, 4, 4]))
    assert out.tolist() == [[0, 0], [0 + 2 + 4, 1 + 3 + 5], [6, 7], [0, 0]]
    (out * torch.tensor([[9.0, 9], [1, 2], [3, 4], [9, 9]])).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [[1, 2], [1, 2], [1, 2], [3, 4]]
    assert ray_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3])).tolist() == [3.0, 4.0]


def front(seed: int) -> tuple[Wave, Tensor, Tensor]:
    tau, offsets = packed(seed, rays=30, scale=0.05)
    g = torch.Generator().manual_seed(seed)
    o, d = torch.rand(30, 3, generator=g), torch.rand(30, 3, generator=g)
    return Wave.start(o, d, torch.rand(len(tau), generator=g).cumsum(0), offsets), tau, offsets


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_a_wavefront_gives_the_weights_of_the_whole_ray(ahead: int) -> None:
    wave, tau, offsets = front(2)
    step, seen = 0.25, torch.zeros(len(tau), dtype=torch.int64)
    weight, mass = torch.zeros(len(tau)), torch.zeros(len(tau))
    live = (wave.cursor < wave.end).nonzero().squeeze(1)
    while live.numel():
        part, index, x = take(wave, live, ahead)
        assert (part.diff() <= ahead).all()
        ray = torch.repeat_interleave(live, part.diff())
        torch.testing.assert_close(x, wave.o[ray] + wave.t[index, None] * wave.d[ray])
        found = weigh(wave, live, part, index, tau[index] / step, step, 0.0, 1e-3)
        assert found.reached.all()
        seen[index] += 1
        weight[index] = found.weight
        mass[index[found.pick]] = found.mass
        assert found.pick_offsets[-1] == len(found.pick)
        live = live[wave.cursor[live] < wave.end[live]]
    assert (seen == 1).all()
    true_w, true_end = plain(tau, offsets)
    torch.testing.assert_close(weight.double(), true_w, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(wave.left.double(), true_end, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(wave.opacity, ray_sum(weight, offsets))
    torch.testing.assert_close(wave.depth, ray_sum(weight * wave.t, offsets))
    # Every weight above the threshold has a colour, and all colours together stand for all but a threshold's worth.
    assert (mass[weight > 1.01e-3] > 0).all()
    torch.testing.assert_close(ray_sum(mass, offsets), wave.colored)
    assert (wave.opacity - wave.colored <= 1e-3 + 1e-6).all()


def test_weighing_stops_behind_opaque_samples() -> None:
    half = math.log(2.0)
    wave = Wave.start(torch.zeros(1, 3), torch.ones(1, 3), torch.arange(5.0), torch.tensor([0, 5]))
    part, index, _ = take(wave, torch.tensor([0]), 5)
    found = weigh(wave, torch.tensor([0]), part, index, torch.full((5,), half), 1.0, 0.2, 0.0)
    assert found.reached.tolist() == [True, True, True, False, False]
    torch.testing.assert_close(found.weight, torch.tensor([0.5, 0.25, 0.125, 0, 0]))
    torch.testing.assert_close(wave.left, torch.tensor([0.125]))
    assert found.pick.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.mass, torch.tensor([0.5, 0.25, 0.125]))
