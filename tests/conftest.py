"""What every test shares: determinism, the real data, and a count of what was skipped and why."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from pvdconvert import launch

REPO = Path(__file__).resolve().parents[1]
DATA_HINT = "real data not found: set PVDCONVERT_DATA or put it at ../shared/data beside the repository"

# One thread a test process: results are bit-equal per thread count, and workers share the cores evenly. Set before
# torch is imported, and inherited by the command lines that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
launch.prepare()
for _name in ("PVDCONVERT_PLUGINS", "PVDCONVERT_BACKEND"):
    os.environ.pop(_name, None)
# Without a GPU, Triton's kernels run in its interpreter; it reads this when it is imported.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


def _data_root() -> Path | None:
    named = os.environ.get("PVDCONVERT_DATA")
    root = Path(named) if named else REPO.parent / "shared" / "data"
    return root if (root / "checkpoints").is_dir() else None


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real checkpoints and images; the test is skipped where it is absent."""
    root = _data_root()
    if root is None:
        pytest.skip(DATA_HINT)
    return root


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the source tree."""
    return REPO


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium (tests/browser.py); the test is skipped where there is none."""
    from tests.browser import started

    with started() as running:
        yield running


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Same threads, seed and kernel twin for every test; leaves torch alone if nobody imported it."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
    yield
    backend: Any = sys.modules.get("pvdconvert.kernels.backend")
    if backend is not None:
        backend.set_backend("auto")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would put the files with most tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, those with most of them at the very front: workers take whole files, and none should
    begin its longest at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("requires_data") and _data_root() is None:
        pytest.skip(DATA_HINT)
    if item.get_closest_marker("requires_cuda") and not _has_cuda():
        pytest.skip("no CUDA device")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests were skipped, grouped by reason."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        where = report.longrepr
        reason = where[2] if isinstance(where, tuple) else str(where)
        reasons[reason.removeprefix("Skipped: ")] += 1
    terminalreporter.section("skipped")
    terminalreporter.line(f"{sum(reasons.values())} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"  {count:4d}  {reason}")
