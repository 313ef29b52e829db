"""torch-ngp's background network: its mean colour against an integral over the sphere, from the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert_formats.torch_ngp import TorchNgp
from tests.snapshots import harmonics
from tests.test_formats_torch_ngp import saved, state

SCALE = 2 ** (np.log2(2048 / 16) / 3)
SIZES = [min(2**19, -(-((int(np.ceil(16 * SCALE**k)) + 1) ** 2) // 8) * 8) for k in range(4)]
OFFSETS = [sum(SIZES[:k]) for k in range(5)]


def network(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "encoder_bg.embeddings": torch.rand(OFFSETS[-1], 2, generator=g) - 0.5,
        "encoder_bg.offsets": torch.tensor(OFFSETS, dtype=torch.int32),
        "bg_net.0.weight": torch.randn(64, 24, generator=g) / 4,
        "bg_net.1.weight": torch.randn(3, 64, generator=g) / 8,
    }


def color_of(own: dict[str, Any], d: Any) -> Any:
    """One direction, seen from the centre: angles from +y and around it, four levels of a plane, two layers."""
    x, y, z = d
    theta, phi = np.arctan2(np.sqrt(x * x + z * z), y), np.arctan2(z, x)
    u = (np.array([2 * theta / np.pi - 1, phi / np.pi]) + 1) / 2
    table, features = own["encoder_bg.embeddings"].double().numpy(), []
    for level in range(4):
        count = SIZES[level]
        scale = float(np.float32(np.exp2(level * np.log2(SCALE)) * 16 - 1))
        res = int(np.ceil(scale)) + 1
        pos = u * scale + 0.5
        i, j = (int(v) for v in np.floor(pos))
        f, g = pos - np.floor(pos)
        total = np.zeros(2)
        for a, b, weight in (
            (i, j, (1 - f) * (1 - g)),
            (i + 1, j, f * (1 - g)),
            (i, j + 1, (1 - f) * g),
            (i + 1, j + 1, f * g),
        ):
            index = a + b * (res + 1) if (res + 1) ** 2 <= count else a ^ b * 2654435761 % 2**32
            total += weight * table[OFFSETS[level] + index % count]
        features.append(total)
    h = np.concatenate([harmonics(d, 4), *features])
    h = np.maximum(own["bg_net.0.weight"].double().numpy() @ h, 0)
    return 1 / (1 + np.exp(-(own["bg_net.1.weight"].double().numpy() @ h)))


def read(tmp_path: Path, own: dict[str, Any]) -> Parts:
    return TorchNgp().read(open_manifest(saved(tmp_path, own)), ReadOptions())


def test_the_mean_over_the_sphere(tmp_path: Path) -> None:
    own = network()
    parts = read(tmp_path, state(table=10) | own)
    # Independent directions: a grid that is even in height (Archimedes) and in angle.
    heights, angles = (np.arange(40) + 0.5) / 20 - 1, (np.arange(60) + 0.5) * np.pi / 30
    colors = [
        color_of(own, ((1 - v * v) ** 0.5 * np.cos(a), v, (1 - v * v) ** 0.5 * np.sin(a)))
        for v in heights
        for a in angles
    ]
    assert parts.scene.background is not None
    np.testing.assert_allclose(parts.scene.background, np.mean(colors, 0), atol=3e-3)
    assert not any(k.startswith(("bg_net", "encoder_bg")) for k in parts.tensors)
    (note,) = (n for n in parts.notes if "bg_net" in n)
    assert float(note.split()[-1]) == pytest.approx(np.std(colors, 0).max(), abs=5e-3)
    assert parts.scene.background != (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"encoder_bg.embeddings": None}, "encoder_bg.embeddings"),
        ({"encoder_bg.offsets": torch.zeros(5, dtype=torch.int32)}, "encoder_bg.offsets"),
        ({"bg_net.0.weight": torch.zeros(64, 20)}, "bg_net maps"),
        ({"bg_net.1.weight": torch.zeros(4, 64)}, "bg_net maps"),
        ({"bg_net.1.weight": torch.full((3, 64), float("nan"))}, "not a number"),
    ],
)
def test_malformed(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    own = {k: v for k, v in (state(table=10) | network() | changes).items() if v is not None}
    with pytest.raises(InputError, match=match):
        read(tmp_path, own)
