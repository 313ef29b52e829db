"""Where a store's tensors lie: in memory, or, if that is too small, in files that the system pages in and out.

The files have no name: they are unlinked while they are mapped, so nothing is left of them, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pvdconvert.errors import OutputError

CHUNK = 1 << 20
"""Rows copied at a time."""


class Scratch:
    """Makes tensors in memory (``folder`` None) or in nameless files in ``folder``.

    Raises OutputError where the disk refuses.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised in memory, zero in a file; the type of ``like``."""
        count = 1
        for n in shape:
            count *= n
        if self.folder is None or not count or like.device.type != "cpu":
            return torch.empty(*shape, dtype=like.dtype, device=like.device)
        try:
            handle, name = tempfile.mkstemp(prefix=".pvdconvert-", suffix=".store", dir=self.folder)
            try:
                # Taken now: a disk that is full must not end the program in the midst of a write to memory.
                size = count * like.element_size()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, size)
                else:
                    os.truncate(handle, size)
                return torch.from_file(name, shared=True, size=count, dtype=like.dtype).view(*shape)
            finally:
                os.close(handle)
                with contextlib.suppress(OSError):
                    os.unlink(name)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or error
            raise OutputError(
                f"{self.folder}: no room for the teacher's answers: {why}", hint="a larger --max-memory, or another -o"
            ) from error

    def hold(self, tensor: Tensor) -> Tensor:
        """``tensor`` where this keeps things."""
        if self.folder is None:
            return tensor
        return self.cat([tensor])

    def cat(self, parts: Sequence[Tensor]) -> Tensor:
        """As torch.cat, over rows."""
        if self.folder is None:
            return torch.cat(list(parts))
        out = self.empty((sum(len(p) for p in parts), *parts[0].shape[1:]), parts[0])
        at = 0
        for part in parts:
            out[at : at + len(part)] = part
            at += len(part)
        return out

    def select(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """``tensor[rows]`` for a mask [N] or indices [K]."""
        if self.folder is None:
            return tensor[rows]
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        out = self.empty((len(index), *tensor.shape[1:]), tensor)
        for at in range(0, len(index), CHUNK):
            part = index[at : at + CHUNK]
            out[at : at + len(part)] = tensor[part]
        return out


IN_MEMORY = Scratch()
