"""Operators as torch knows them, the choice of their twins, and what each twin can be asked for."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pvdconvert.cli import options
from pvdconvert.errors import DeviceError, UsageError
from pvdconvert.kernels import backend, hashgrid_tcnn
from pvdconvert.kernels.composite import ray_sum, render_weights
from pvdconvert.kernels.hashgrid import HashGridSpec, growth, hash_encode, hash_encode_torch
from pvdconvert.kernels.lines import cp_sum
from pvdconvert.kernels.march import march
from pvdconvert.kernels.occupancy import occupancy_update
from pvdconvert.kernels.planes import AXES, PAIRS, vm_features, vm_sum
from pvdconvert.kernels.voxels import BrickMap, voxel_interp, voxel_sh_color
from tests.twins import check

OPS: Any = torch.ops.pvdconvert


def grid_arguments(rule: str = "tcnn", features: int = 2) -> tuple[HashGridSpec, tuple[Any, ...]]:
    spec = HashGridSpec.make(3, features, 6, 3, 1.8, rule)
    return spec, (list(spec.scales), list(spec.ints), *spec.domain, spec.mode, spec.shift)


def factors(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    n, ranks, g = (4, 3, 5), (2, 1, 3), torch.Generator().manual_seed(0)
    planes = [torch.randn(n[b], n[a], r, generator=g, dtype=dtype) for (a, b), r in zip(PAIRS, ranks)]
    lines = [torch.randn(n[c], r, generator=g, dtype=dtype) for c, r in zip(AXES, ranks)]
    return [p.requires_grad_() for p in planes], [v.requires_grad_() for v in lines]


def lattice() -> BrickMap:
    vertices = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(5))
    return BrickMap.from_vertices(vertices[::1], (4, 3, 5), 4)


def given(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Small arguments of the operator ``name``."""
    g = torch.Generator().manual_seed(1)

    def random(*shape: int, grad: bool = False) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=dtype).requires_grad_(grad)

    x, offsets = random(7, 3), torch.tensor([0, 3, 3, 9])
    if name.startswith("hashgrid"):
        spec, geometry = grid_arguments()
        if name == "hashgrid":
            return (x, random(spec.entries, 2, grad=True), *geometry)
        return (x, random(7, spec.width), spec.entries, *geometry)
    if name.startswith("vm"):
        planes, lines = factors(dtype)
        if name == "vm":
            return (x, *planes, *lines, False)
        return (x, random(7), *[t.detach() for t in (*planes, *lines)], True)
    if name.startswith("cp"):
        lines = [random(n, 3, grad=name == "cp") for n in (4, 2, 5)]
        return (x, *lines, True) if name == "cp" else (x, random(7, 3), *lines, False)
    if name.startswith("voxel"):
        grid = lattice()
        rows, weights = OPS.voxel_locate(x * 3, grid.shape, grid.top, grid.bricks, False)
        return {
            "voxel_locate": (x * 3, list(grid.shape), grid.top, grid.bricks, True),
            "voxel_gather": (rows, weights, random(60, 3, grad=True), -1.0),
            "voxel_gather_sh": (rows, weights, random(7, 2, 4), random(60, 12, grad=True)),
            "voxel_scatter": (rows, weights, random(7, 3), 60),
            "voxel_scatter_sh": (rows, weights, random(7, 2, 4), random(7, 2, 3), 60),
        }[name]
    return {
        "render_weights": (random(9, grad=True), offsets),
        "render_weights_backward": (random(9), random(3), offsets, random(9), random(3)),
        "ray_sum": (random(9, 2, grad=True), offsets),
        "ray_sum_backward": (random(3, 2), offsets, 9),
        "ray_blend": (random(9, grad=True), random(9, 2, grad=True), offsets),
        "ray_blend_backward": (random(3, 2), random(9), random(9, 2), offsets),
        "occupancy_update": (random(6), torch.tensor([1, 1, 4]), random(3), 0.5),
        "march": (
            torch.tensor([[-1.0, 0.5, 0.5]], dtype=dtype),
            torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype),
            torch.zeros(1, dtype=dtype),
            torch.full((1,), 4.0, dtype=dtype),
            torch.full((1,), 0.5, dtype=dtype),
            torch.zeros(3, dtype=dtype),
            torch.ones(2, 1, 1, dtype=torch.uint8),
            1.0,
            0.25,
        ),
    }[name]


DIFFERENTIABLE = ["hashgrid", "vm", "cp", "voxel_gather", "voxel_gather_sh", "render_weights", "ray_sum"]
DIFFERENTIABLE += ["ray_blend"]
OTHERS = ["hashgrid_backward", "vm_backward", "cp_backward", "voxel_locate", "voxel_scatter", "voxel_scatter_sh"]
OTHERS += ["render_weights_backward", "ray_sum_backward", "ray_blend_backward", "march", "occupancy_update"]


@pytest.mark.parametrize("name", DIFFERENTIABLE + OTHERS)
def test_torch_accepts_the_operator(name: str) -> None:
    check(name, *given(name))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_the_truth_are_those_of_finite_differences(name: str) -> None:
    """In float64 an operator runs as plain torch, gradients included."""
    arguments = given(name, torch.float64)
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]

    def run(*tensors: Tensor) -> Any:
        full = list(arguments)
        for i, tensor in zip(places, tensors):
            full[i] = tensor
        return getattr(OPS, name)(*full)

    assert places
    assert torch.autograd.gradcheck(run, [arguments[i] for i in places])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_operator_as_plain_torch_meets_the_fast_twin(name: str) -> None:
    if not backend.has_numba():
        pytest.skip("numba is not installed")
    results = []
    twins: tuple[backend.Backend, ...] = ("torch", "numba")
    for twin in twins:
        backend.set_backend(twin)
        arguments = given(name)
        out = getattr(OPS, name)(*arguments)
        out = torch.cat([o.reshape(-1) for o in out]) if isinstance(out, tuple) else out
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        up = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, up)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused_in_words() -> None:
    x, table, *geometry = given("hashgrid")
    out = OPS.hashgrid(x, table, *geometry)
    weights = torch.ones_like(out, requires_grad=True)
    (grad,) = torch.autograd.grad(out, table, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="hashgrid_backward is not differentiable twice"):
        torch.autograd.grad(grad.sum(), weights)


def test_operators_are_traced_whole() -> None:
    """One graph through all public functions, and the numbers of eager mode."""
    spec, _ = grid_arguments("torch-ngp")
    planes, lines = factors()
    grid, offsets = lattice(), torch.tensor([0, 3, 3, 7])
    table = torch.rand(spec.entries, 2, requires_grad=True)

    def everything(x: Tensor, table: Tensor) -> Tensor:
        a = hash_encode(x, table, spec).sum(1) + vm_sum(x, planes, lines) + vm_features(x, planes, lines).sum(1)
        a = a + voxel_interp(x * 2, grid, table[:60, :1]).sum(1) + cp_sum(x, [v[:, :1] for v in lines])
        a = a + voxel_sh_color(x * 2, x[:, None, :1], grid, table.repeat(1, 2)[:60, :3]).sum((1, 2))
        w, end = render_weights(a.abs(), offsets)
        return ray_sum(x, offsets, w).sum(1) + end

    x = torch.rand(7, 3)
    traced = torch.compile(everything, backend="aot_eager", fullgraph=True)
    results = []
    for function in (everything, traced):
        out = function(x, table)
        results.append((out.detach(), torch.autograd.grad(out.sum(), table)[0]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------- the choice of a twin


def test_what_runs_follows_device_type_and_request() -> None:
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    meta = torch.zeros(1, device="meta")
    best = "numba" if backend.has_numba() else "torch"
    assert backend.twin(single) == best
    assert backend.twin(single, torch.zeros(1, dtype=torch.int64)) == best
    assert backend.twin(single, double) == "torch"
    assert backend.twin(meta) == "torch"
    backend.set_backend("torch")
    assert backend.twin(single) == "torch"


@pytest.mark.skipif(not (backend.has_triton() and backend.interpreted()), reason="Triton's interpreter is not here")
def test_the_interpreter_runs_only_where_it_is_asked_for() -> None:
    assert backend.twin(torch.zeros(1)) != "triton"
    backend.set_backend("triton")
    assert backend.twin(torch.zeros(1)) == "triton"
    assert backend.use_numba(torch.zeros(1)) is backend.has_numba()  # what Triton has no twin of


def test_impossible_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, words in (("triton", "triton"), ("tinycudann", "needs a CUDA device"), ("cuda", "unknown backend")):
        with pytest.raises(DeviceError, match=words) as error:
            backend.set_backend(cast("backend.Backend", name))
        assert error.value.exit_code == 7
    monkeypatch.setattr(backend, "has_numba", lambda: False)
    with pytest.raises(DeviceError, match="pip install numba"):
        backend.set_backend("numba")


def test_the_environment_chooses_where_nobody_else_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.get_backend() == "torch"
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(DeviceError, match="known: auto, torch, numba, triton, tinycudann"):
        backend.get_backend()
    backend.set_backend("auto")


def test_the_command_line_knows_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.NAMES == options.BACKENDS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("triton", "tinycudann"):
        compute = options.Computing(backend=name).checked()
        with pytest.raises(DeviceError):  # exit code 7
            compute.apply()
        with pytest.raises(UsageError, match="runs on CUDA only, not on --device cpu"):
            options.Computing(device="cpu", backend=name).checked()
    with pytest.raises(UsageError, match="--backend cuda: unknown"):
        options.Computing(backend="cuda").checked()


def test_what_is_lost_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.set_backend("auto")
    monkeypatch.setattr(backend, "has_numba", lambda: False)
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    for cuda, words in ((False, "numba is not installed"), (True, "Triton is not installed")):
        line = backend.lost(cuda)
        assert line is not None
        assert words in line
        assert "\n" not in line
    backend.set_backend("torch")
    assert backend.lost(False) is None  # asked for


def test_a_first_use_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not backend.has_numba():
        pytest.skip("numba is not installed")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert "first use" in str(backend.compiling())
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "march.nbi").touch()
    assert backend.compiling() is None


@pytest.mark.slow
def test_without_numba_plain_torch_answers_and_says_so(repo: Path, tmp_path: Path) -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "numba":
            raise ImportError("numba is blocked")
sys.meta_path.insert(0, Block())
from pvdconvert.cli.main import run
sys.exit(run(sys.argv[1:]))
"""
    words = [
        "render",
        str(repo / "examples" / "ngp.ckpt"),
        "-o",
        str(tmp_path / "a.png"),
        "--size",
        "24",
        "--progress",
        "plain",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()
    assert [line for line in done.stderr.splitlines() if "numba is not installed: plain torch" in line], done.stderr


# ------------------------------------------------------------------------------------------- Triton's index arithmetic


@pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed")
def test_addresses_have_64_bits() -> None:
    """Rows x features of the largest legal tables pass 2^31; nothing of that size is allocated."""
    if not backend.interpreted() and not torch.cuda.is_available():
        pytest.skip("Triton can run nowhere here")
    from tests.triton_kernels import write_addresses

    place = "cpu" if backend.interpreted() else "cuda"
    big = [0, 2**26, 2**30 - 1, 2**31 - 1]
    rows = torch.tensor(big, dtype=torch.int32, device=place)
    out = torch.zeros(4, 4, dtype=torch.int64, device=place)
    write_addresses[(1,)](rows, out, WIDTH=32)
    assert out.tolist() == [[row * 32 + c for c in range(4)] for row in big]


@pytest.mark.slow
@pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed")
def test_every_kernel_compiles_for_a_gpu(repo: Path, tmp_path: Path) -> None:
    """The interpreter forgives what the compiler does not. No GPU is needed to compile for one."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    words = [sys.executable, "-m", "tests.triton_compile"]
    done = subprocess.run(words, cwd=repo, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    both = ("_forward", "_backward")
    kernels = {
        "hashgrid": both,
        "planes": both,
        "lines": both,
        "voxels": ("_locate", "_gather", "_gather_sh", "_scatter", "_scatter_sh"),
        "composite": (*both, "_sum", "_spread"),
        "march": ("_march",),
        "occupancy": ("_update",),
    }
    assert compiled == {f"{module}_triton.{name}" for module, names in kernels.items() for name in names}


# ------------------------------------------------------------------------------------------- tiny-cuda-nn


@pytest.mark.parametrize("finest", [512, 2048, 4096, 131072])
@pytest.mark.parametrize(("levels", "features", "log2"), [(16, 2, 19), (8, 4, 19), (4, 8, 22), (1, 1, 14)])
def test_tinycudann_is_given_the_same_grid(levels: int, features: int, log2: int, finest: int) -> None:
    spec = HashGridSpec.make(levels, features, log2, 16, growth(levels, 16, finest, "tcnn"), "tcnn")
    config = hashgrid_tcnn.config(spec)
    assert config is not None
    assert config["type"] == "Hash" or not any(level.hashed for level in spec.levels)
    again = HashGridSpec.make(
        config["n_levels"],
        config["n_features_per_level"],
        config["log2_hashmap_size"],
        config["base_resolution"],
        config["per_level_scale"],
        "tcnn",
        interpolation=config["interpolation"].lower(),
        grid_type=config["type"].lower(),
    )
    assert again == spec


def test_tinycudann_is_not_given_what_it_would_lay_out_otherwise() -> None:
    good = HashGridSpec.make(4, 2, 8, 4, 1.7, "tcnn")
    torch_ngp = HashGridSpec.make(4, 2, 8, 4, 1.7, "torch-ngp")
    three = HashGridSpec.make(4, 3, 8, 4, 1.7, "tcnn")
    moved = dataclasses.replace(good.levels[1], scale=good.levels[1].scale * 1.01)
    uneven = dataclasses.replace(good, levels=(good.levels[0], moved, *good.levels[2:]))
    assert hashgrid_tcnn.represents(good)
    assert not any(map(hashgrid_tcnn.represents, (torch_ngp, three, uneven)))
    backend._forced = "tinycudann"
    with pytest.raises(DeviceError, match="cannot represent this hash grid: index rule torch-ngp"):
        hashgrid_tcnn.represents(torch_ngp)


class Encoding(nn.Module):
    """As tinycudann's: parameters of its own on construction, those of the call in the call."""

    extra = 0

    def __init__(self, n_input_dims: int, encoding_config: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        assert (n_input_dims, dtype) == (3, torch.float32)
        c = encoding_config
        self.spec = HashGridSpec.make(
            c["n_levels"],
            c["n_features_per_level"],
            c["log2_hashmap_size"],
            c["base_resolution"],
            c["per_level_scale"],
            "tcnn",
        )
        self.params = nn.Parameter(torch.zeros(self.spec.entries * self.spec.features + self.extra))

    def forward(self, x: Tensor) -> Tensor:
        return hash_encode_torch(x, self.params.view(-1, self.spec.features), self.spec)


def test_tinycudann_reads_the_callers_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinycudann", types.SimpleNamespace(Encoding=Encoding))
    hashgrid_tcnn._encoding.cache_clear()
    spec = HashGridSpec.make(4, 2, 8, 4, 1.7, "tcnn")
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = float("nan"), 300.0
    results = []
    for encode in (hash_encode_torch, hashgrid_tcnn.hash_encode_tcnn):
        table = torch.rand(spec.entries, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = encode(x, table, spec)
        results.append((out.detach(), torch.autograd.grad(out.square().sum(), table)[0]))
        assert encode(x[:0], table, spec).shape == (0, spec.width)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    monkeypatch.setattr(Encoding, "extra", 8)
    hashgrid_tcnn._encoding.cache_clear()
    with pytest.raises(DeviceError, match="lays the hash grid out in"):
        hashgrid_tcnn.hash_encode_tcnn(x, results[0][1], spec)
    hashgrid_tcnn._encoding.cache_clear()


def test_a_march_through_the_operator_by_hand() -> None:
    offsets, t = OPS.march(*given("march"))
    assert offsets.tolist() == [0, 8]
    assert t.tolist() == [1.125 + 0.25 * k for k in range(8)]
    box = types.SimpleNamespace(origin=torch.zeros(3), cell=1.0, grid=torch.ones(2, 1, 1, dtype=torch.uint8))
    o, d, t0, t1 = given("march")[:4]
    assert torch.equal(march(o, d, t0, t1, cast("Any", box), 0.25)[1], t)
    occupancy_update(peak := torch.zeros(2), torch.tensor([1]), torch.tensor([3.0]))
    assert peak.tolist() == [0.0, 3.0]
