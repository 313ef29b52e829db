"""What `tensorf-cp` is and how it is configured. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pvdconvert.plugin import ArchitectureSpec
from pvdconvert_plugins.tensorf_spec import TensorialOptions, option, parse_as

SPEC = ArchitectureSpec(
    name="tensorf-cp",
    title="TensoRF (CP): lines only, the smallest grid",
    code="pvdconvert_plugins.tensorf_cp:TensorfCp",
    options="pvdconvert_plugins.tensorf_cp_spec:TensorfCpOptions",
    paper="Chen et al. 2022, arXiv:2203.09517",
    licence="MIT",
)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorfCpOptions(TensorialOptions):
    """Every configuration key. The defaults are those of the TensoRF program; conversions plan their own.

    Tensors, in TensoRF's names and shapes (layouts 3.2), for the lines i along axis 2, 1, 0; n = resolution:

    ``density_line.{i}``   [1, density_rank, n[axis], 1]
    ``app_line.{i}``       [1, color_rank, n[axis], 1]
    ``basis_mat.weight``   [color_features, color_rank]

    and the colour network and masks of :class:`pvdconvert_plugins.tensorf_spec.TensorfOptions`.
    """

    density_rank: int = option(96, "components for density")
    color_rank: int = option(288, "components for colour")


def megabytes(options: TensorfCpOptions) -> float:
    """Size of the float32 lines and networks in MB, 10^6 bytes; a mask comes on top."""
    floats = (options.density_rank + options.color_rank) * sum(options.resolution)
    return 4e-6 * (floats + options.color_features * options.color_rank + options.shading_floats)


def parse(config: Mapping[str, Any]) -> TensorfCpOptions:
    """Options from a JSON configuration. Raises InputError naming the key that is unknown or impossible."""
    return parse_as(TensorfCpOptions, SPEC.name, config)
