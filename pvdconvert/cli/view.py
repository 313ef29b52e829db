"""``pvdconvert view``: look around in a field, or in two side by side, in the browser."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pvdconvert import viewer
from pvdconvert.cli import checks, complete, options
from pvdconvert.cli.output import emit, say, warn
from pvdconvert.errors import UsageError
from pvdconvert.viewer import address

PORT = 8080


@options.expanded
def command(
    *,
    file: options.File,
    second: Annotated[
        Path | None, typer.Argument(metavar="[FILE2]", help="Another checkpoint to see beside it, such as the student.")
    ] = None,
    from_b: Annotated[
        str | None,
        typer.Option(
            "--from-b", metavar="FORMAT", autocompletion=complete.formats, help="The format of FILE2; --from is FILE's."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 lets other machines in.")
    ] = address.LOOPBACK,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="The port; 0 takes any free one.")
    ] = PORT,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the default browser.")] = False,
    reading: options.Reading,
    computing: options.Computing,
    json: options.Json = False,
    progress: options.ProgressMode = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Look around in FILE in the browser, until Ctrl-C (exit code 0).

    Pictures are coarse while the camera moves and sharpen when it rests. With FILE2 both are shown, divided by a seam
    or side by side. The page is served to this machine only, unless --host says otherwise. Needs the extra [viewer].
    """
    from pvdconvert.cli import progress as drawing
    from pvdconvert.cli.compare import comparable
    from pvdconvert.loading import take_apart
    from pvdconvert.registry import default

    if second is None and from_b is not None:
        raise UsageError("--from-b is the format of FILE2, and there is none")
    read = reading.options()
    compute = computing.checked()
    bar = drawing.make(progress, quiet=quiet)
    files = [file] if second is None else [file, second]
    for path in files:
        checks.source(path)
    viewer.require()
    where = address.resolve(host, port)
    registry = default()
    first, _ = checks.readable(registry, file, reading.from_, read)
    read_b = read
    if second is not None:
        other = checks.recognised(registry, second, from_b)
        # As in compare: a box or a background holds for both, a program's settings for files of that program.
        read_b = read if other.format == first.format else dataclasses.replace(read, config=None, extra={})
        take_apart(other, read_b, registry)
    try:
        device = compute.choose()
        from pvdconvert.loading import open_field
        from pvdconvert.prepare import prepare

        loaded = [open_field(file, from_=reading.from_, read=read, device=device)]
        if second is not None:
            loaded.append(open_field(second, from_=from_b, read=read_b, device=device))
        notes = [text for one in loaded for text in one.notes]
        notes += comparable(loaded[0], loaded[1]) if len(loaded) > 1 else []
        for text in notes:
            bar.note(text)
        fields = [prepare(one.field, one.scene, device=device, progress=bar) for one in loaded]
        bar.stage("viewer", None)
        from pvdconvert.viewer.server import Shown, Viewer

        names = [f"{one.architecture}: {path.name}" for path, one in zip(files, loaded, strict=True)]
        serving = Viewer([Shown(name, field) for name, field in zip(names, fields, strict=True)], where)
    finally:
        bar.close()
    try:
        with _interrupted() as ended:
            _announce(serving.address, files, json=json, quiet=quiet)
            if open_:
                webbrowser.open(serving.url)
            while not ended.wait(1.0):  # in portions: where a wait cannot be interrupted, Ctrl-C comes between them
                pass
    finally:
        serving.stop()


def _announce(where: address.Address, files: list[Path], *, json: bool, quiet: bool) -> None:
    """The address on stdout, at once; and on stderr who else can come."""
    if json:
        document: dict[str, Any] = {"schema": "pvdconvert/view/1", "url": where.url, "host": where.host}
        emit({**document, "port": where.port, "files": files, "loopback": where.private})
    else:
        say(where.url)
        if not quiet:
            warn(f"showing {' and '.join(map(str, files))}; Ctrl-C ends")
    sys.stdout.flush()
    if not where.private:
        what = " and ".join(path.name for path in files)
        warn(
            f"warning: whoever reaches {where.host} port {where.port} can look at {what} and make this machine compute:"
            " there is no password and no encryption"
        )


@contextlib.contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set: the ordinary end of a server, not an error."""
    ended = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    names = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {name: signal.signal(name, lambda *_: ended.set()) for name in names}
    try:
        yield ended
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
