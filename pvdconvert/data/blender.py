"""NeRF-Synthetic and what is laid out like it: ``transforms_{train,val,test}.json`` (layouts 9.1). No torch.

RGBA with straight alpha, OpenGL poses, square pixels of ``camera_angle_x``; any other intrinsics of a transforms.json
are read as well. Pictures whose json names no suffix are PNG first.
"""

from __future__ import annotations

import re
from pathlib import Path

from pvdconvert.data import Dataset
from pvdconvert.data.common import SPLITS, Fit, Options, Shot, finished
from pvdconvert.data.frames import FrameReader
from pvdconvert.data.poses import Hints, subject, synthetic
from pvdconvert.errors import InputError

_NAME = re.compile(r"transforms_(train|val|test)\.json")


class Blender:
    """Folders with a transforms file a split, or one of these files: then its siblings are read too."""

    name = "blender"
    title = "NeRF-Synthetic: transforms_train.json, transforms_val.json, transforms_test.json"

    def probe(self, path: Path) -> Fit | None:
        there = self._files(path)
        if not there:
            return None
        return Fit(0.95 if "train" in there else 0.8, f"{', '.join(p.name for p in there.values())}")

    def load(self, path: Path, options: Options) -> Dataset:
        files = self._files(path)
        if not files:
            raise InputError(f"{path}: blender: no transforms_train.json, _val.json or _test.json")
        reader = FrameReader(options)
        splits: dict[str, list[Shot]] = {}
        for split, file in files.items():
            splits[split] = reader.read(file)[1]
            reader.refuse_missing(file)
        cameras = [s.frame.camera for shots in splits.values() for s in shots]
        notes = reader.notes()
        hints = synthetic(cameras)
        if hints is None:
            hints = Hints(subject(cameras))
            if options.bounds is None:
                notes.append(
                    "the cameras do not stand as in NeRF-Synthetic: "
                    + ("the box is guessed from what they look at" if hints.box else "the box is unknown")
                )
        return finished(path, self.name, splits, options, hints, notes)

    def _files(self, path: Path) -> dict[str, Path]:
        folder = path
        if path.is_file():
            if not _NAME.fullmatch(path.name):
                return {}
            folder = path.absolute().parent
        return {s: p for s in SPLITS if (p := folder / f"transforms_{s}.json").is_file()}
