"""How close pictures are (PSNR, SSIM, FLIP, LPIPS), and how close fields are: the protocol ``fidelity/1``."""

from pvdconvert.metrics.ldr_flip import PIXELS_PER_DEGREE, flip, flip_map
from pvdconvert.metrics.learned import Lpips
from pvdconvert.metrics.pictures import CAP, SSIM_WINDOW, Picture, mse, psnr, ssim
from pvdconvert.metrics.protocol import (
    COUNT,
    PROTOCOL,
    QUICK_COUNT,
    QUICK_SIZE,
    SEED,
    SIZE,
    Drawn,
    Fidelity,
    Keep,
    ReferenceViews,
    between_cameras,
    fidelity,
    held_out_cameras,
    views,
)

__all__ = [
    "CAP",
    "COUNT",
    "PIXELS_PER_DEGREE",
    "PROTOCOL",
    "QUICK_COUNT",
    "QUICK_SIZE",
    "SEED",
    "SIZE",
    "SSIM_WINDOW",
    "Drawn",
    "Fidelity",
    "Keep",
    "Lpips",
    "Picture",
    "ReferenceViews",
    "between_cameras",
    "fidelity",
    "flip",
    "flip_map",
    "held_out_cameras",
    "mse",
    "psnr",
    "ssim",
    "views",
]
