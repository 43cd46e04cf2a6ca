"""Where a site's images come from: one configuration for each kind, one function that opens it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from client.data.npz import NpzConfig, read_npz
from client.data.phantoms import PhantomConfig, draw_phantoms
from client.data.splits import Splits
from common.errors import DataError
from common.study import DataConfig, Modality

__all__ = ["NpzConfig", "PhantomConfig", "SourceConfig", "Splits", "open_source"]

SourceConfig = Annotated[NpzConfig | PhantomConfig, Field(discriminator="source")]


def open_source(config: NpzConfig | PhantomConfig, schema: DataConfig, *, modality: Modality) -> Splits:
    """Read (or draw) the images of a site and check that they fit the study's `schema`.

    Args:
        config: the source as the site file gives it.
        schema: image size, channels and classes of the study.
        modality: the study's modality; phantoms must be of the same one, a file cannot be asked.

    Raises:
        DataError: the source cannot be read or does not fit the study; one line with the remedy.
    """
    if isinstance(config, NpzConfig):
        return read_npz(config, schema)
    if config.modality != modality:
        raise DataError(
            f"phantoms of {config.modality} in a study of {modality}",
            where="data: modality",
            remedy=f"Set it to '{modality}'.",
        )
    return draw_phantoms(config, schema)[0]
