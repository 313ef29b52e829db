"""The conformance suite: what every architecture and format must do, ours or not.

``pvdconvert selftest NAME`` runs it on an installed plugin. In a plugin's own tests::

    from pvdconvert.testing import selftest

    def test_conformance():
        assert [check for check in selftest("my-plugin") if not check.ok] == []
"""

from __future__ import annotations

from pvdconvert import registry as registries
from pvdconvert.testing.analytic import AnalyticScene
from pvdconvert.testing.architectures import check_architecture
from pvdconvert.testing.checks import Check
from pvdconvert.testing.conversions import check_conversion
from pvdconvert.testing.formats import check_format

__all__ = ["AnalyticScene", "Check", "check_architecture", "check_conversion", "check_format", "selftest"]


def selftest(name: str, registry: registries.Registry | None = None) -> list[Check]:
    """Every check of the architecture or format ``name``; of both, if two share the name.

    Raises UnknownError if neither is installed, PluginError if it cannot be imported.
    """
    registry = registry or registries.default()
    checks: list[Check] = []
    if name in registry.architectures():
        checks += [*check_architecture(name, registry), check_conversion(name, registry=registry)]
    if name in registry.formats():
        checks += check_format(name, registry)
    if not checks:
        registry.architecture(name)
    return checks
