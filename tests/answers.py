"""What the analytic scene answers when it is asked along rays, for tests of what is asked and kept."""

from __future__ import annotations

from typing import Any

import torch

from pvdconvert.distill.label import label
from pvdconvert.distill.store import Store
from pvdconvert.progress import Silent
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.testing.analytic import AnalyticScene


def answers(occupancy: Occupancy, batches: int, **more: Any) -> Store:
    """Exactly ``batches`` batches of rays through ``occupancy``; ``more`` goes to :func:`label`."""
    field = AnalyticScene()
    store, done = label(
        field,
        field.scene,
        occupancy,
        step=0.03,
        seconds=60.0,
        max_samples=10**7,
        batches=batches,
        progress=Silent(),
        device=torch.device("cpu"),
        **more,
    )
    assert done == batches
    return store
