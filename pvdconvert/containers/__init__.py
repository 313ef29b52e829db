"""Safe, lazy views of checkpoint containers. No torch; numpy only. Nothing in a file is ever executed."""

from __future__ import annotations

from pvdconvert.containers.manifest import Manifest, as_mapping, open_bytes, open_manifest
from pvdconvert.containers.values import Stub

__all__ = ["Manifest", "Stub", "as_mapping", "open_bytes", "open_manifest"]
