"""Pictures on disk: found, measured by their header alone, and read one at a time when asked. No torch.

Nothing is kept: a dataset of any length needs no more memory than one picture. Colours are bytes as stored (sRGB), with
straight alpha; rotation tags are ignored, as the programs do whose poses these are.
"""

from __future__ import annotations

import dataclasses
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pvdconvert.data import Pixels
from pvdconvert.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Read by Pillow's own decoders; nothing that runs another program."""
_FAULTS = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError, MemoryError)
_LOCK = threading.Lock()


class Header(NamedTuple):
    """A picture's size, and whether it has alpha."""

    width: int
    height: int
    alpha: bool


def found(path: Path) -> Path | None:
    """The picture ``path``, which may lack its suffix; None where there is none."""
    names = [path]
    names += [path.with_name(path.name + s) for t in SUFFIXES for s in (t, t.upper())]
    for candidate in names:
        try:
            if candidate.is_file():
                return candidate
        except (OSError, ValueError):
            return None
    return None


def _open(path: Path) -> Any:
    from PIL import Image

    try:
        # Pillow warns of bombs and refuses them beyond twice that size; here both are errors. Its filters are global.
        with _LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: the picture claims more pixels than are decoded: refused as a bomb") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such picture") from error
    except _FAULTS as error:
        raise InputError(
            f"{path}: not a readable picture ({type(error).__name__})", hint="PNG, JPEG, WebP, BMP or TIFF"
        ) from error


def header(path: Path) -> Header:
    """Size and alpha, from the header. Raises InputError."""
    with _open(path) as image:
        width, height = image.size
        return Header(width, height, image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info)


@dataclasses.dataclass(frozen=True)
class Picture:
    """Reads a picture at each call: [H, W, 3 or 4] bytes.

    size       (width, height) of the file; another is refused
    downscale  averages blocks of that side, colours weighted by alpha
    alpha      a file that holds the alpha, where it lies apart
    """

    path: Path
    size: tuple[int, int]
    downscale: int = 1
    alpha: Path | None = None

    def __call__(self) -> Pixels:
        image = self._decoded(self.path)
        if self.alpha is not None:
            image = image.convert("RGBA")
            image.putalpha(self._decoded(self.alpha).convert("L"))
        return np.asarray(reduced(image, self.downscale), dtype=np.uint8)

    def _decoded(self, path: Path) -> Any:
        with _open(path) as image:
            expect_size(path, image.size, self.size)
            try:
                image.load()
                return _as_rgb(image)
            except _FAULTS as error:
                raise InputError(f"{path}: the picture is truncated or corrupt ({type(error).__name__})") from error


@dataclasses.dataclass(frozen=True)
class Mask:
    """Reads a mask at each call: [H, W] bool, true where the picture counts.

    path      white counts (``inverted``: black does)
    """

    path: Path
    size: tuple[int, int]
    downscale: int = 1
    inverted: bool = False

    def __call__(self) -> NDArray[np.bool_]:
        pixels = Picture(self.path, self.size)()
        counts = pixels[..., :3].max(-1) > 0
        if self.inverted:
            counts = ~counts
        n, (w, h) = self.downscale, (self.size[0] // self.downscale, self.size[1] // self.downscale)
        if n == 1:
            return np.asarray(counts)
        blocks: NDArray[np.bool_] = counts[: h * n, : w * n].reshape(h, n, w, n).all((1, 3))
        return blocks


def reduced(image: Any, n: int) -> Any:
    """Averages of ``n`` x ``n`` pixels; what is left over at the right and at the bottom is cut off."""
    if n == 1:
        return image
    # Pillow premultiplies RGBA before it averages, and divides after.
    return image.crop((0, 0, image.width // n * n, image.height // n * n)).reduce(n)


def expect_size(path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raise InputError where a picture is not of the size that its camera has."""
    if tuple(size) != tuple(expected):
        raise InputError(
            f"{path}: the picture is {size[0]} x {size[1]}, its camera {expected[0]} x {expected[1]}",
            hint="the intrinsics belong to pictures of another size",
        )


def _as_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode in ("RGB", "RGBA") and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image, dtype=np.float64)
        return Image.fromarray(np.clip(grey / 257.0 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    alpha = image.mode in ("LA", "PA", "RGBa", "La") or "transparency" in image.info
    return image.convert("RGBA" if alpha else "RGB")
