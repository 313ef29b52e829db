"""Real spherical harmonics, in the order and signs that tiny-cuda-nn, torch-ngp, svox, svox2, TensoRF and PVD share.

Layouts section 0.3: sqrt(2) Im Y_l^|m| for m < 0, Y_l^0, sqrt(2) Re Y_l^m for m > 0 of the complex harmonics with the
Condon-Shortley phase; index order (l, m), m = -l .. l.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BANDS = 5


def sh_basis(d: Tensor, bands: int) -> Tensor:
    """The first ``bands`` bands at unit directions ``d`` [..., 3] -> [..., bands**2]; 1 <= bands <= 5.

    "Degree n" of tiny-cuda-nn and torch-ngp means n bands; "SH degree n" of svox2 means n + 1.
    """
    if not 1 <= bands <= MAX_BANDS:
        raise ValueError(f"bands must be 1..{MAX_BANDS}, got {bands}")
    x, y, z = d.unbind(-1)
    out = [torch.full_like(x, 0.28209479177387814)]
    if bands > 1:
        c = 0.48860251190291987
        out += [-c * y, c * z, -c * x]
    if bands > 2:
        xx, yy, zz = x * x, y * y, z * z
        c = 1.0925484305920792
        out += [
            c * x * y,
            -c * y * z,
            0.94617469575755997 * zz - 0.31539156525251999,
            -c * x * z,
            0.54627421529603959 * (xx - yy),
        ]
    if bands > 3:
        out += [
            0.59004358992664352 * y * (yy - 3 * xx),
            2.8906114426405538 * x * y * z,
            0.45704579946446572 * y * (1 - 5 * zz),
            0.3731763325901154 * z * (5 * zz - 3),
            0.45704579946446572 * x * (1 - 5 * zz),
            1.4453057213202769 * z * (xx - yy),
            0.59004358992664352 * x * (3 * yy - xx),
        ]
    if bands > 4:
        out += [
            2.5033429417967046 * x * y * (xx - yy),
            -1.7701307697799304 * y * z * (3 * xx - yy),
            0.9461746957575601 * x * y * (7 * zz - 1),
            -0.6690465435572892 * y * z * (7 * zz - 3),
            0.10578554691520431 * (35 * zz * zz - 30 * zz + 3),
            -0.6690465435572892 * x * z * (7 * zz - 3),
            0.47308734787878004 * (xx - yy) * (7 * zz - 1),
            -1.7701307697799304 * x * z * (xx - 3 * yy),
            0.6258357354491761 * (xx * (xx - 3 * yy) - yy * (3 * xx - yy)),
        ]
    return torch.stack(out, dim=-1)
