"""Looking around in a field in the browser (extra ``[viewer]``: viser). Imports no torch.

``poses`` turns viser's cameras into ours and back, ``layout`` says what of which field is drawn where, ``frames`` draws
pictures of rising resolution (none of the three knows of a browser), ``server`` is the glue to viser.
"""

from __future__ import annotations

import importlib.util

from pvdconvert.errors import PluginError

EXTRA = "viewer"


def require() -> None:
    """Raises PluginError, naming the extra, where viser is not installed."""
    if importlib.util.find_spec("viser") is None:
        raise PluginError("the viewer needs viser, which is not installed", hint="pip install 'pvdconvert[viewer]'")
