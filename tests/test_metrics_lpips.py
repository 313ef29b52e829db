"""LPIPS against the answers of its authors' own program for the same weights, which are made by integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pvdconvert.errors import InputError, PvdError, RequestError, UnsafeError
from pvdconvert.metrics import Lpips, learned

WIDTHS = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512]}
ALEX = {"1.0": (64, 3, 11, 11), "2.3": (192, 64, 5, 5), "3.6": (384, 192, 3, 3), "4.8": (256, 384, 3, 3)}
ALEX |= {"5.10": (256, 256, 3, 3)}
VGG = {"1.0": (64, 3), "1.2": (64, 64), "2.5": (128, 64), "2.7": (128, 128), "3.10": (256, 128), "3.12": (256, 256)}
VGG |= {"3.14": (256, 256), "4.17": (512, 256), "4.19": (512, 512), "4.21": (512, 512)}
VGG |= {"5.24": (512, 512), "5.26": (512, 512), "5.28": (512, 512)}


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that look random, of the variance that keeps a deep network alive; positive for the linear layers."""
    n = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(1000003 * sum(map(ord, name)))
    u = n * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)
    u ^= u >> np.uint64(15)
    u = u * np.uint64(2246822519) & np.uint64(0xFFFFFFFF)
    u ^= u >> np.uint64(13)
    v = u.astype(np.float64) / 2**31 - 1
    v = np.abs(v) if name.startswith("lin") else v * (6.0 / np.prod(shape[1:] or 60.0)) ** 0.5
    return torch.from_numpy(v.astype(np.float32).reshape(shape))


def weights(net: str) -> dict[str, Tensor]:
    """A state_dict of lpips.LPIPS(net=...), but for the constants of its input."""

    def entries() -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in (ALEX if net == "alex" else VGG).items():
            yield f"net.slice{name}.weight", shape if len(shape) == 4 else (*shape, 3, 3)
            yield f"net.slice{name}.bias", shape[:1]
        for k, width in enumerate(WIDTHS[net]):
            yield f"lin{k}.model.1.weight", (1, width, 1, 1)

    return {name: weight(name, shape) for name, shape in entries()}


def pair() -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    j, i = np.mgrid[0:48, 0:64]
    a = np.stack([(4 * i) % 256, (5 * j) % 256, (i * j) % 256], -1).astype(np.uint8)
    b = np.stack([(4 * i + 8 * ((i // 8) % 2)) % 256, (5 * j) % 256, (i * j + 16) % 256], -1).astype(np.uint8)
    return a, b


@pytest.mark.parametrize(
    # lpips 0.1.4 (BSD), LPIPS(net=...), with torchvision 0.29.2's definition of the networks and the weights above.
    ("net", "answer"),
    [("alex", 0.2397574931), ("vgg", 0.2215653956)],
)
def test_agrees_with_its_authors_program(net: str, answer: float) -> None:
    lpips = Lpips(weights(net))
    assert lpips.net == net
    a, b = pair()
    assert lpips(a, b) == pytest.approx(answer, rel=1e-5)
    assert lpips(b, a) == pytest.approx(answer, rel=1e-5)
    assert lpips(a, a) == 0.0


def test_weights_come_from_files(tmp_path: Path) -> None:
    """A state_dict as torch saves it; within a larger one; with torchmetrics' names; as safetensors."""
    from safetensors.torch import save_file

    own = weights("alex")
    a, b = pair()
    answer = pytest.approx(0.2397574931, rel=1e-5)
    scaled = {**own, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for k in range(5):
        scaled[f"lins.{k}.model.1.weight"] = own[f"lin{k}.model.1.weight"]
    torch.save(scaled, tmp_path / "a.pth")
    torch.save({"state_dict": {f"metric.{k}": v for k, v in own.items()}}, tmp_path / "b.pth")
    torch.save({f"net.{k}": v for k, v in own.items()}, tmp_path / "c.pth")
    save_file(own, tmp_path / "d.safetensors")
    for name in ("a.pth", "b.pth", "c.pth", "d.safetensors"):
        assert Lpips.load(tmp_path / name)(a, b) == answer, name


def test_other_files_are_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = weights("alex")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    short = {k: v for k, v in own.items() if k != "lin3.model.1.weight"}
    wrong = {**own, "net.slice3.6.weight": torch.zeros(384, 192, 5, 5)}
    spoiled = {**own, "net.slice2.3.bias": torch.full((192,), torch.nan)}
    for name, tensors in (("short", short), ("wrong", wrong), ("spoiled", spoiled)):
        torch.save(tensors, tmp_path / f"{name}.pth")
    (tmp_path / "code.pth").write_bytes(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    cases: list[tuple[str, type[PvdError] | tuple[type[PvdError], ...], str]] = [
        ("other.pth", InputError, "not the weights of LPIPS.*state_dict"),
        ("short.pth", InputError, "'lin3.model.1.weight' is missing"),
        ("wrong.pth", InputError, "'net.slice3.6.weight' has the shape"),
        ("spoiled.pth", InputError, "NaN"),
        ("code.pth", (InputError, UnsafeError), "code.pth"),
        ("nothing.pth", InputError, "nothing.pth"),
    ]
    for name, kind, text in cases:
        with pytest.raises(kind, match=text) as caught:
            Lpips.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(learned, "MAX_NUMBERS", 1 << 20)
    torch.save(own, tmp_path / "large.pth")
    with pytest.raises(InputError, match="more numbers"):
        Lpips.load(tmp_path / "large.pth")
    small = np.zeros((20, 40, 3), np.uint8)
    with pytest.raises(RequestError, match="needs 31 pixels"):
        Lpips(own)(small, small)
