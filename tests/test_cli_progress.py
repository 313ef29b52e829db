"""What progress draws: lines, JSON lines, bars; what a report and a table look like; how text becomes values."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import signal
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdconvert.cli import options, output, settings
from pvdconvert.cli.interrupt import Interrupt
from pvdconvert.cli.progress import Bars, JsonLines, Lines, make
from pvdconvert.cli.report import lines as report_lines
from pvdconvert.errors import UsageError
from pvdconvert.progress import Silent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_every_few_seconds_with_eta_and_metrics() -> None:
    out, clock = io.StringIO(), Clock()
    bar = Lines(out, clock, period=5.0)
    bar.stage("density", 4000)
    for done in range(0, 1201, 100):
        bar.advance(done, psnr=29.42, loss=0.00012)
        clock.now += 5.0 / 12 * 1.0
    clock.now = 190.0
    bar.advance(1200, psnr=29.42)
    bar.stage("color", None)
    bar.stage("color", 7)
    bar.note("two\n lines")
    bar.close()
    bar.close()
    text = out.getvalue().splitlines()
    assert text[0] == "[density] starts"
    assert "[density] 1200/4000 30% psnr 29.4 loss 1.2e-04 eta 3m30s" in text
    assert len([t for t in text if "/4000" in t]) == 2
    assert text[-4:-2] == ["[density] ends after 1m30s psnr 29.4 loss 1.2e-04", "[color] starts"]
    assert text[-2:] == ["note: two lines", "[color] ends after 0.0s"]


def test_a_total_among_the_metrics_corrects_the_announced_one() -> None:
    out, clock = io.StringIO(), Clock()
    bar = Lines(out, clock, period=0.0)
    bar.stage("render", None)
    clock.now += 10
    bar.advance(50, total=200.0)
    assert out.getvalue().splitlines()[-1] == "[render] 50/200 25% eta 30s"


def test_json_lines_are_json_and_throttled() -> None:
    out, clock = io.StringIO(), Clock()
    bar = JsonLines(out, clock, period=0.5)
    bar.stage("color", 10)
    for done in range(1, 11):
        clock.now += 0.125
        bar.advance(done, psnr=math.nan)
    bar.note("n")
    bar.close()
    bar.close()
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["stage", *["advance"] * 4, "note", "end"]
    assert [e["done"] for e in events if e["event"] == "advance"] == [1, 5, 9, 10]
    assert events[1]["psnr"] is None
    assert events[2]["eta_s"] == 0.625


def test_json_lines_announce_a_stage_once() -> None:
    out, clock = io.StringIO(), Clock()
    bar = JsonLines(out, clock, period=0.5)
    bar.stage("density", None)
    bar.stage("density", 40.0)  # its length is known after a few steps
    bar.advance(16)
    bar.stage("color", None)
    bar.stage("density", 1.0)  # another one of that name
    bar.close()
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(e["event"], e["stage"]) for e in events] == [
        ("stage", "density"), ("advance", "density"), ("stage", "color"), ("stage", "density"), ("end", "density"),
    ]  # fmt: skip
    assert events[1]["total"] == 40.0


def test_bars_draw_on_a_terminal_and_keep_notes() -> None:
    out = Terminal()
    bar = Bars(out)
    bar.stage("density", 10)
    bar.advance(5, psnr=31.25)
    bar.note("[markup] is text")
    bar.stage("color", None)
    bar.close()
    bar.close()
    text = out.getvalue()
    for word in ("density", "color", "psnr 31.2", "[markup] is text"):
        assert word in text


def test_auto_is_bars_only_on_a_capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make("auto", stream=Terminal()), Bars)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make("auto", stream=io.StringIO()), Lines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make("auto", stream=Terminal()), Lines)
    assert isinstance(make("bar", stream=io.StringIO()), Bars)
    assert isinstance(make("none", stream=Terminal()), Silent)
    assert isinstance(make("json", quiet=True, stream=Terminal()), Silent)
    with pytest.raises(UsageError, match="did you mean 'plain'"):
        make("plian")


def test_a_broken_stderr_does_not_stop_the_work() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    bar = Lines(Broken())
    bar.stage("density", 1)
    bar.note("lost")
    bar.close()


def test_the_first_interrupt_asks_and_the_second_ends() -> None:
    out, before = io.StringIO(), signal.getsignal(signal.SIGINT)
    with Interrupt(Lines(out)) as interrupt:
        assert not interrupt.stop()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.stop()
        assert "--resume" in out.getvalue()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_before_there_is_anything_to_resume_the_first_interrupt_ends() -> None:
    with Interrupt(Silent()), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1h", 3600), ("1h30m", 5400), ("0.5m", 30)]
)
def test_durations(text: str, seconds: float) -> None:
    assert options.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "-5s", "5x", "5 m", "10 20", "1h30", "inf", "nan"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        options.seconds(text)


@given(st.floats(0, 1e6))
def test_printed_durations_read_back(seconds: float) -> None:
    text = output.duration(seconds)
    if text != "0.0s":
        assert options.seconds(text) == pytest.approx(seconds, rel=0.02, abs=0.06)


@given(st.tuples(*[st.floats(-1e6, 1e6)] * 3), st.tuples(*[st.floats(1e-3, 1e6)] * 3))
def test_bounds_read_back(low: tuple[float, ...], size: tuple[float, ...]) -> None:
    high = [a + b for a, b in zip(low, size, strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        box = options.bounds(",".join(map(repr, [*low, *high])))
        assert (box.min, list(box.max)) == (low, high)


def test_backgrounds() -> None:
    assert options.background("white") == (1.0, 1.0, 1.0)
    assert options.background("BLACK") == (0.0, 0.0, 0.0)
    assert options.background("0.1, 0.2,0.3") == (0.1, 0.2, 0.3)
    for text in ("pink", "1,2", "0,0,2", "nan,0,0"):
        with pytest.raises(UsageError, match="--background"):
            options.background(text)


@dataclasses.dataclass(frozen=True)
class Toy:
    depth: int = 1
    scale: float = 1.0
    mask: bool = False
    name: str = "a"
    kind: Literal["mlp", "sh"] = "mlp"
    maybe: int | None = None
    triple: tuple[int, int, int] = (1, 2, 3)
    many: tuple[float, ...] = ()
    corners: list[list[float]] | None = None
    coarse: Mapping[str, Any] | None = field(
        default=None, metadata={"help": "or --set finest=N, from which it follows"}
    )


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("depth=8", 8),
        ("toy.depth=8", 8),
        ("scale=2", 2.0),
        ("scale=1e-3", 1e-3),
        ("mask=yes", True),
        ("mask=0", False),
        ("name=8", "8"),
        ("name=a=b", "a=b"),
        ("kind=sh", "sh"),
        ("maybe=none", None),
        ("maybe=3", 3),
        ("triple=1,2,3", [1, 2, 3]),
        ("triple=(1, 2, 3)", [1, 2, 3]),
        ("triple=64", 64),
        ("many=0.5", [0.5]),
        ("many=[1, 2.5]", [1.0, 2.5]),
        ("corners=[[0,0],[1,1]]", [[0.0, 0.0], [1.0, 1.0]]),
        ('coarse={"depth": 2}', {"depth": 2}),
        ("finest=64", 64),
    ],
)
def test_set_gives_values_of_the_declared_type(pair: str, expected: object) -> None:
    (value,) = settings.parse([pair], Toy, "toy").values()
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "pair",
    [
        "depth=1.5",
        "depth=",
        "scale=nan",
        "mask=perhaps",
        "kind=mpl",
        "triple=1,2",
        "triple=a,b,c",
        "coarse=3",
        "dpth=1",
    ],
)
def test_set_refuses_in_one_line_what_does_not_fit(pair: str) -> None:
    with pytest.raises(UsageError, match=f"^--set {pair.partition('=')[0]}"):
        settings.parse([pair], Toy, "toy")


def test_set_refuses_a_key_given_twice() -> None:
    with pytest.raises(UsageError, match="given twice"):
        settings.parse(["depth=1", "depth=2"], Toy, "toy")


def test_json_never_holds_what_json_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit({"a": math.nan, "b": (1, math.inf), "c": {1.5}, "d": None, "e": True})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, None], "c": [1.5], "d": None, "e": True}


def test_tables_keep_every_cell_whole() -> None:
    long = "x" * 300
    text = output.table(["name", "n"], [["a", 1], [long, 22]], right=[1])
    assert text[1].split() == ["a", "1"]
    assert text[2] == f"{long}  22"
    assert len(text[1]) == len(text[2])


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (3400, "3.4 kB"), (999_600, "1.0 MB"), (28e6, "28.0 MB")]
)
def test_sizes(count: float, text: str) -> None:
    assert output.size(count) == text


def test_the_report_shows_stages_fidelity_and_notes() -> None:
    stage = {"name": "density", "steps": 120, "seconds": 61.0, "psnr_before": 20.123, "psnr_after": 31.5, "note": ""}
    document = {
        "source": {"path": "a.ckpt", "format": "torch-ngp", "architecture": "ngp", "bytes": 2_000_000},
        "target": {"path": "b.safetensors", "architecture": "tensorf", "bytes": 5_000_000},
        "plan": {"kind": "distil", "seconds": 300, "config": {"resolution": [64, 64, 64], "mask": None}},
        "stages": [stage, {**stage, "name": "color", "psnr_before": None}],
        "fidelity": {"psnr": 35.2, "psnr_worst": 33.1, "views": [35.2] * 16, "size": 200, "protocol": "fidelity/1"},
        "notes": ["guessed the box"],
        "seconds": 301.2,
        "dry_run": False,
    }
    text = "\n".join(report_lines(document, where="b.safetensors"))
    assert "a.ckpt  torch-ngp, ngp  2.0 MB" in text
    assert "density    120  1m01s      20.12     31.50" in text
    assert "35.20 dB" in text
    assert "fidelity/1: 16 views, 200 px" in text
    assert "note  guessed the box" in text
    assert "wrote b.safetensors, 5.0 MB, in 5m01s" in text
    assert "resolution=[64,64,64]" in text
    assert "mask" not in text
    dry = "\n".join(report_lines({**document, "dry_run": True}, where="b.safetensors"))
    assert "nothing was written; without --dry-run it would be b.safetensors" in dry
