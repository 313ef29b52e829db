"""Adam that updates touched rows only: against torch's Adam, by hand, and through a kernel."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward

from pvdconvert.kernels import backend
from pvdconvert.kernels.voxels import BrickMap, voxel_interp
from pvdconvert.solve.lazy_adam import LazyAdam


@pytest.fixture(params=["torch", "numba"], autouse=True)
def twin(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "numba" and not backend.has_numba():
        pytest.skip("numba is not installed")
    before = backend.get_backend()
    backend.set_backend(request.param)
    yield request.param
    backend.set_backend(before)


def table(rows: int = 40, width: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)))


def group(*params: Tensor, sparse: bool = True, lr: float = 0.1) -> dict[str, object]:
    return {"params": list(params), "lr": lr, "sparse_rows": sparse}


def gradients(p: Tensor, count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=g) for _ in range(count)]


@pytest.mark.parametrize("sparse", [True, False])
def test_equals_adam_where_every_row_is_touched(sparse: bool) -> None:
    ours, theirs = table(), table()
    a = LazyAdam([group(ours, sparse=sparse)], betas=(0.9, 0.99), eps=1e-15)
    b = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-15)
    for g in gradients(ours, 30):
        for p, optimiser in ((ours, a), (theirs, b)):
            optimiser.zero_grad()
            backward((p * g).sum())
            optimiser.step()
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_each_row_follows_adam_on_its_own_steps() -> None:
    """A row that is touched in steps 3, 5, 6 only moves exactly as Adam would on those three gradients."""
    p = table()
    optimiser = LazyAdam([group(p)])
    masks = [torch.rand(len(p), generator=torch.Generator().manual_seed(s)) < 0.4 for s in range(12)]
    grads = gradients(p, 12)
    start = p.detach().clone()
    for mask, g in zip(masks, grads):
        optimiser.zero_grad()
        backward((p * g * mask[:, None]).sum())
        optimiser.step()
        assert p.grad is not None
        assert not bool(p.grad.any())
    for row in range(len(p)):
        alone = nn.Parameter(start[row].clone())
        adam = torch.optim.Adam([alone], lr=0.1, betas=(0.9, 0.99), eps=1e-15)
        for mask, g in zip(masks, grads):
            if mask[row]:
                alone.grad = g[row].clone()
                adam.step()
        torch.testing.assert_close(p[row], alone, atol=2e-5, rtol=1e-5)


def test_a_kernel_and_a_dense_term_add_up() -> None:
    """Rows reached only by a term that autograd handles itself are updated as well."""
    shape = (5, 5, 5)
    vertices = torch.cartesian_prod(*(torch.arange(n) for n in shape))
    grid = BrickMap.from_vertices(vertices, shape)
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)) * 1.9
    ours, theirs = table(125), table(125)
    a, b = LazyAdam([group(ours)], eps=1e-15), torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-15)
    for _ in range(3):
        for p, optimiser in ((ours, a), (theirs, b)):
            optimiser.zero_grad()
            backward(voxel_interp(x, grid, p).square().sum() + (p[100:110] ** 2).sum())
            optimiser.step()
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert not torch.equal(ours[105], table(125)[105])
    assert torch.equal(ours[120], table(125)[120])


def test_dropped_gradients_are_forgotten() -> None:
    p = table()
    optimiser = LazyAdam([group(p)])
    before = p.detach().clone()
    backward(p[3].sum())
    optimiser.zero_grad()
    optimiser.step()
    assert torch.equal(p, before)
    p.grad = None
    optimiser.zero_grad()
    backward(p[3].sum())
    optimiser.step()
    assert (p != before).any(1).nonzero().tolist() == [[3]]


def test_state_round_trip_continues_bit_equally() -> None:
    first, dense = table(), nn.Parameter(torch.ones(4))
    optimiser = LazyAdam([group(first), group(dense, sparse=False)])

    def advance(p: Tensor, q: Tensor, o: LazyAdam, grads: list[Tensor]) -> None:
        for g in grads:
            o.zero_grad()
            backward((p * g).sum() + (q**2).sum())
            o.step()

    grads = gradients(first, 8)
    advance(first, dense, optimiser, grads[:4])
    second, other = nn.Parameter(first.detach().clone()), nn.Parameter(dense.detach().clone())
    resumed = LazyAdam([group(second), group(other, sparse=False)])
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    advance(first, dense, optimiser, grads[4:])
    advance(second, other, resumed, grads[4:])
    assert torch.equal(first, second)
    assert torch.equal(dense, other)


def test_learning_rate_of_the_group_is_obeyed() -> None:
    p = table()
    optimiser = LazyAdam([group(p)])
    before = p.detach().clone()
    optimiser.param_groups[0]["lr"] = 0.5
    backward(p.sum())
    optimiser.step()
    torch.testing.assert_close(before - p, torch.full_like(before, 0.5))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        LazyAdam([table()], **wrong)  # type: ignore[arg-type]
