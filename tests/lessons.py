"""A small student before a small teacher, as a method of the paper is given them."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from pvdconvert.cameras import Camera
from pvdconvert.distill import paper_views
from pvdconvert.distill.methods import Lesson, PaperOptions
from pvdconvert.distill.store import Store
from pvdconvert.field import RadianceField
from pvdconvert.progress import Silent
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.trace import render_rays
from pvdconvert.scene import Box
from pvdconvert.testing.subject import Subject

subject_of = functools.cache(Subject)


def lesson(subject: Subject, teacher: RadianceField | None = None, student: RadianceField | None = None) -> Lesson:
    """A small student before a teacher, with nothing asked yet: the paper's methods ask at every step."""
    none, occupancy = torch.zeros(0), subject.occupancy
    table = torch.zeros(0, 3)
    store = Store(
        subject.scene,
        occupancy,
        occupancy.cell / 2,
        *(table, none, none, none, none, table, none.bool(), table, torch.zeros(1, dtype=torch.int64), table),
        *(none, none, table, none),
        teacher=teacher or subject.teacher,
    )
    student = student or subject.fresh()

    def evaluate() -> float:
        with torch.no_grad():
            return dB(student, subject.teacher, occupancy)

    return Lesson(subject.code, student, store, 0, Silent(), evaluate, lambda: False, {}, PaperOptions(rays=48))


def dB(student: RadianceField, teacher: RadianceField, occupancy: Occupancy) -> float:
    """Of 16 x 16 pixels of three views, by the tracer that knows nothing of methods."""
    cameras = paper_views.hemisphere(Box.cube(1.0), 3, np.random.default_rng(5), below=True)
    o, d = (torch.cat(v) for v in zip(*(paper_views.fixed_rays(c, 16) for c in cameras)))
    a, b = (render_rays(f, o, d, occupancy, step=0.04, backdrop=(0, 0, 0))[0] for f in (student, teacher))
    return -10 * math.log10(float((a - b).square().mean()))


def camera_of(subject: Subject) -> Camera:
    return paper_views.hemisphere(subject.occupancy.box, 1, np.random.default_rng(2), below=False)[0]
