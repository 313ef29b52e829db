"""One conversion by several processes, each with its own GPU or its share of the cores (torchrun, torch.distributed).

What costs time is divided: each process asks the teacher its own batches of rays, and computes the gradient of its own
part of each batch. Every process then holds the same answers and, by an all-reduce, the same gradient, so all students
stay equal. Random numbers are drawn for the whole batch by each: W processes draw what one would, and their result
differs from its by float rounding (where W divides a draw of points; else its last few are left out).
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pvdconvert import ranks as environment
from pvdconvert.distill.distiller import Distiller
from pvdconvert.distill.methods import DEFAULT, Lesson
from pvdconvert.errors import DeviceError, PvdError, UsageError
from pvdconvert.field import Stage
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.settings import Settings

PATIENCE = timedelta(hours=12)
"""How long one may wait for another: the first process validates alone. torchrun ends a group that has lost one."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A group of processes. Small messages go through gloo, tensors on a GPU through nccl."""

    rank: int
    size: int

    # -- exchanges: every process must come to each of them ----------------------------------------------------------

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise DeviceError(
                f"lost contact with another process of the group: {text:.120}", hint="was it killed?"
            ) from error

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor``, added up in place over the processes."""
        with self._exchange():
            dist.all_reduce(tensor)
        return tensor

    def most(self, *values: float) -> list[float]:
        """The largest of each value, over the processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        with self._exchange():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return cast("list[float]", tensor.tolist())

    def first(self, value: Any) -> Any:
        """What the first process holds."""
        box = [value]
        with self._exchange():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def copy(self, tensor: Tensor, owner: int = 0) -> None:
        """Overwrite ``tensor`` with that of process ``owner``."""
        whole = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
        with self._exchange():
            dist.broadcast(whole.view(torch.uint8) if whole.dtype == torch.bool else whole, src=owner)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)

    def alone(self, measure: Callable[[], float]) -> Callable[[], float]:
        """``measure`` by the first process only; all get its answer."""
        return lambda: float(self.first(measure() if self.rank == 0 else None))

    def wait(self) -> None:
        """Until all are here."""
        self.most(0.0)

    # -- what is divided ---------------------------------------------------------------------------------------------

    def mine(self, drawn: Tensor) -> Tensor:
        """This process's share of a draw [N, ...]: equally many in each process."""
        return drawn[: len(drawn) // self.size * self.size][self.rank :: self.size]

    def gather(self, parts: list[tuple[Tensor, ...]], device: torch.device) -> list[tuple[Tensor, ...]]:
        """Everybody's parts, in the order of their numbers; number k is part k // W of process k % W.

        A part is a tuple of tensors; columns agree in all but their first size.
        """
        every: list[list[tuple[Tensor, ...]]] = []
        for owner in range(self.size):
            meta: list[Any] = [None]
            if owner == self.rank:
                columns = list(zip(*parts))
                meta = [[([len(t) for t in c], c[0].shape[1:], c[0].dtype) for c in columns]]
            with self._exchange():
                dist.broadcast_object_list(meta, src=owner, device=torch.device("cpu"))
            split = []
            for k, (sizes, shape, dtype) in enumerate(meta[0]):
                if owner == self.rank:
                    column = torch.cat(columns[k])
                else:
                    column = torch.empty((sum(sizes), *shape), dtype=dtype, device=device)
                if column.numel():
                    self.copy(column, owner)
                split.append(torch.split(column, sizes))
            every.append(list(zip(*split)))
        longest = max(len(p) for p in every)
        return [parts[k] for k in range(longest) for parts in every if k < len(parts)]

    def same(self, cells: Occupancy) -> Occupancy:
        """The first process's cells: those of another kind of GPU might differ at a threshold."""
        origin, cell, shape = self.first((cells.origin.tolist(), cells.cell, tuple(cells.grid.shape)))
        grid = cells.grid.clone() if self.rank == 0 else cells.grid.new_empty(shape)
        self.copy(grid)
        return Occupancy(torch.tensor(origin, dtype=cells.origin.dtype, device=grid.device), cell, grid)


@contextlib.contextmanager
def group(device: str) -> Iterator[Ranks | None]:
    """The processes that torchrun has started, while this one works for them; None where it is the only one.

    The first failure is the one that is raised as it was; it claims the group's one report
    (:func:`pvdconvert.ranks.claim`). Raises DeviceError where the group cannot come together.
    """
    if environment.size() == 1:
        yield None
        return
    cuda = torch.device(device).type == "cuda"
    try:
        if cuda:
            torch.cuda.set_device(torch.device(device))
        if not dist.is_initialized():  # a second conversion goes on with the group of the first
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
            atexit.register(leave)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise DeviceError(f"the {environment.size()} processes cannot find each other: {text:.160}") from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
        ranks.wait()
    except BaseException as error:
        # Claimed before the connections close, which is what the others will stumble over.
        if environment.claim() or isinstance(error, PvdError | KeyboardInterrupt):
            raise
        raise DeviceError("another process of the group has failed") from error


def leave() -> None:
    """At the end of the program. A group that has failed is left as it is: saying goodbye would wait for the others."""
    if dist.is_initialized() and environment.intact():
        dist.destroy_process_group()


def fit(settings: Settings) -> Settings:
    """``settings`` with this process's own device. Raises UsageError or DeviceError for what a group cannot do."""
    if environment.size() == 1:
        return settings
    if settings.via is not None or settings.method != DEFAULT:
        what = "--via" if settings.via is not None else f"--method {settings.method}"
        raise UsageError(f"{what} runs in one process", hint="without torchrun")
    device = settings.device
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: each process takes a device of its own", hint="--device cuda, or cpu")
    there = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if not there:
        return settings
    number = environment.local()[0]
    if number >= there:
        raise DeviceError(f"process {number + 1} of this machine has no GPU of its own: there are {there}")
    return dataclasses.replace(settings, device=f"cuda:{number}")


class ParallelDistiller(Distiller):
    """A :class:`Distiller` of which every process of a group runs one."""

    def __init__(self, ranks: Ranks, lesson: Lesson) -> None:
        self.ranks = ranks
        super().__init__(
            lesson.architecture,
            lesson.student,
            lesson.store,
            seed=lesson.seed,
            progress=lesson.progress,
            evaluate=ranks.alone(lesson.evaluate),
            stop=lesson.stop,
        )

    # -- what is drawn: by all the same, then divided ----------------------------------------------------------------

    def _points(self, share: int = 2) -> tuple[Tensor, Tensor]:
        shown, rest = super()._points(share)
        return self.ranks.mine(shown), self.ranks.mine(rest)

    def _free(self) -> tuple[Tensor, Tensor, Tensor]:
        x, sigma, dt = super()._free()
        return self.ranks.mine(x), self.ranks.mine(sigma), self.ranks.mine(dt)

    def _from_sides(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        many, d, rgb = super()._from_sides(count)
        return self.ranks.mine(many), self.ranks.mine(d), self.ranks.mine(rgb)

    def _tapped(self) -> Tensor:
        return self.ranks.mine(super()._tapped())

    def _rays(self) -> Tensor:
        """Rays of one draw may not divide, and have many samples or few: their means are weighted accordingly."""
        every = super()._rays()
        own = every[self.ranks.rank :: self.ranks.size]
        s = self.store
        counts = s.offsets[every + 1] - s.offsets[every]
        whole, part = int(counts.sum()), int(counts[self.ranks.rank :: self.ranks.size].sum())
        if s.whole_space:
            free = self.batch // 4 // self.ranks.size
            whole, part = whole + free * self.ranks.size, part + free
        self.ray_share = self.ranks.size * len(own) / len(every)
        self.sample_share = self.ranks.size * part / max(1, whole)
        return own

    def _mean(self, own: Tensor) -> Tensor:
        """The mean over the processes, with the gradient of this one's part."""
        whole = self.ranks.sum(own.detach().clone()) / self.ranks.size
        return own + (whole - own.detach())

    # -- what is agreed upon -----------------------------------------------------------------------------------------

    def _agree(self, stop: bool, late: bool) -> tuple[bool, bool]:
        found = self.ranks.most(stop, late)
        return bool(found[0]), bool(found[1])

    def _planned(self, steps: int) -> int:
        return int(self.ranks.first(steps))

    def _held_loss(self, stage: Stage) -> float:
        own = super()._held_loss
        return self.ranks.alone(lambda: own(stage))()

    def _stage(self, stage: Stage, seconds: float, window: tuple[float, float], fixed: tuple[int, int] | None) -> None:
        for tensor in (*self.student.parameters(), *self.student.buffers()):
            if tensor.numel():
                self.ranks.copy(tensor.data)
        super()._stage(stage, seconds, window, fixed)

    # -- the gradient ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _share_gradients(self) -> None:
        """The mean over the processes, in every process; rows of tables that any of them touched."""
        for param, touched in self.optimizer.marked():
            self.ranks.sum(touched)
            rows = touched.nonzero().squeeze(1)
            touched.clamp_(max=1)
            grad = cast(Tensor, param.grad)
            if len(rows):
                grad[rows] = self.ranks.sum(grad[rows].contiguous()).div_(self.ranks.size)
        dense = self.optimizer.dense()
        there = self.ranks.most(*(float(p.grad is not None) for p in dense)) if dense else []
        grads = []
        for param, any_ in zip(dense, there):
            if any_:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                grads.append(param.grad)
        if grads:
            flat = self.ranks.sum(torch.cat([g.reshape(-1) for g in grads])).div_(self.ranks.size)
            for grad, mean in zip(grads, torch.split(flat, [g.numel() for g in grads])):
                grad.copy_(mean.view_as(grad))
