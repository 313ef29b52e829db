"""What every hostile file must end in: one line, a documented exit code, soon, and without anything run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvdconvert.errors import PvdError
from pvdconvert.identify import identify

Refuse = Callable[..., PvdError]
_watched: list[str] | None = None
_FORBIDDEN = ("os.system", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class", "socket.",
              "shutil.", "os.remove", "os.rename", "os.mkdir", "ctypes.")  # fmt: skip


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event.startswith(_FORBIDDEN) or writes:
        _watched.append(f"{event} {arguments!r:.100}")


sys.addaudithook(_audit)


@pytest.fixture
def audited() -> Iterator[list[str]]:
    """What the interpreter was asked to run, write or unpickle meanwhile: must stay empty."""
    global _watched
    _watched = []
    yield _watched
    _watched = None


@pytest.fixture
def refuse(tmp_path: Path, audited: list[str]) -> Refuse:
    """``refuse(data, *exit codes)``: identify a file of these bytes; the error it ends in, after checking its form."""

    def run(data: bytes, *codes: int) -> PvdError:
        global _watched
        path = tmp_path / "hostile.bin"
        watched, _watched = _watched, None
        path.write_bytes(data)
        _watched = watched
        start = time.monotonic()
        with pytest.raises(PvdError) as caught:
            identify(path)
        assert time.monotonic() - start < 20, "hangs"  # 2 s on an idle machine; this is only a guard
        text = str(caught.value)
        assert "\n" not in text
        assert "hostile.bin" in text
        assert len(text) < 900
        assert caught.value.exit_code in (codes or (3, 4, 8)), text
        assert audited == []
        assert not (tmp_path / "marker").exists()
        return caught.value

    return run
