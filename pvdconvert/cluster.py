"""Rows of a batch on many machines, by Dask (extra ``cluster``): we start tasks, it schedules them. No torch.

A worker runs its rows as processes of its own Python, so every machine needs this package and the same file system.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from pvdconvert import __version__
from pvdconvert.batch import interrupt
from pvdconvert.errors import DeviceError, PluginError

WAIT = 60.0
"""Seconds to wait for the first worker."""


@contextlib.contextmanager
def connect(
    address: str, jobs: int | None = None
) -> Iterator[tuple[concurrent.futures.Executor, Callable[..., None], str]]:
    """(executor, ask_to_stop for :func:`pvdconvert.batch.run`, what is there in words) of a Dask cluster.

    address  of its scheduler, such as tcp://10.0.0.1:8786, or "local": ``jobs`` workers on this machine

    Raises PluginError where Dask is not installed, DeviceError where the cluster cannot be reached or is not fit.
    """
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise PluginError(
            f"--cluster needs Dask: {error}", hint="pip install 'pvdconvert[cluster]', here and on the workers"
        ) from error
    # A row's memory is its process's, not its worker's: nothing to spill, pause or restart a worker for.
    memory = {f"distributed.worker.memory.{k}": False for k in ("target", "spill", "pause", "terminate")}
    quiet = {"distributed.logging.distributed": "critical", **memory}
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(quiet))
        try:
            place: Any = address
            if address == "local":
                local: Any = LocalCluster
                place = stack.enter_context(
                    local(n_workers=jobs or 1, threads_per_worker=1, dashboard_address=None, silence_logs=50)
                )
            dial: Any = Client
            client = stack.enter_context(dial(place, timeout=WAIT, set_as_default=False))
            client.wait_for_workers(1, timeout=WAIT)
            versions = client.run(_version)
        except (OSError, TimeoutError, ValueError) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise DeviceError(f"--cluster {address}: {text:.200}", hint="is the scheduler there?") from error
        for worker, version in versions.items():
            if version != __version__:
                raise DeviceError(f"--cluster {address}: {worker} has pvdconvert {version}, here is {__version__}")

        def ask_to_stop(token: str, *, kill: bool = False) -> None:
            with contextlib.suppress(Exception):  # a worker that is lost runs nothing
                client.run(functools.partial(interrupt, token, kill=kill))

        slots = sum(client.nthreads().values())
        yield (
            client.get_executor(pure=False, retries=0),
            ask_to_stop,
            f"{len(versions)} workers, {slots} rows at a time",
        )


def _version() -> str:
    return __version__
