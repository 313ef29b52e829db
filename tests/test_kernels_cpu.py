"""How kernels are shared among threads: every index once, errors come through, forks and other threads do no harm."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from numba import njit

from pvdconvert import stopwatch
from pvdconvert.kernels import cpu


@pytest.fixture(params=[1, 2])
def among(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("among")
@pytest.mark.parametrize(
    ("count", "grain", "uneven"), [(0, 1, 1), (1, 1, 1), (7, 1, 1), (7, 4, 1), (1000, 1, 16), (3, 1, 64)]
)
def test_every_index_is_done_once(count: int, grain: int, uneven: int) -> None:
    seen = np.zeros(count, np.int64)

    def kernel(begin: int, end: int, target: np.ndarray) -> None:
        assert 0 <= begin <= end <= count
        target[begin:end] += 1

    cpu.share(kernel, count, seen, grain=grain, uneven=uneven)
    assert (seen == 1).all()


@pytest.mark.usefixtures("among")
def test_what_a_piece_raises_is_raised() -> None:
    def kernel(begin: int, end: int) -> None:
        if end == 64:
            raise FloatingPointError("the last piece")

    with pytest.raises(FloatingPointError, match="the last piece"):
        cpu.share(kernel, 64, uneven=4)


def test_a_piece_too_small_for_a_thread_runs_where_it_was_asked() -> None:
    where: list[int] = []
    cpu.share(lambda begin, end: where.append(threading.get_ident()), 255, grain=256)
    assert where == [threading.get_ident()]


@pytest.mark.usefixtures("among")
def test_many_callers_at_once() -> None:
    sums = np.zeros(8, np.int64)

    def kernel(begin: int, end: int, row: int) -> None:
        with lock:
            sums[row] += sum(range(begin, end))

    lock = threading.Lock()
    callers = [threading.Thread(target=cpu.share, args=(kernel, 1000, row), kwargs={"uneven": 8}) for row in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert (sums == 999 * 500).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_process_makes_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cpu.share(lambda begin, end: None, 64)  # the parent's threads exist now
        child = os.fork()
        if child == 0:
            done = np.zeros(64, np.int64)

            def kernel(begin: int, end: int) -> None:
                done[begin:end] = 1

            cpu.share(kernel, 64)
            os._exit(0 if done.all() else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_compiling_belongs_to_no_budget() -> None:
    inner = njit(nogil=True)(lambda x: np.sqrt(x) + 1.0)

    @njit(nogil=True)
    def kernel(begin: int, end: int, out: np.ndarray) -> None:
        for i in range(begin, end):
            out[i] = inner(out[i])

    out, spent = np.full(8, 4.0), stopwatch.Stopwatch()
    cpu.share(kernel, 8, out)
    assert (out == 3.0).all()
    compiled = spent.excused()
    assert 0.2 * spent.seconds() < compiled < spent.seconds()  # the inner one is not counted twice
    cpu.share(kernel, 8, out)
    assert spent.excused() == compiled
