"""The public images that the network learns from first: drawn phantoms, or a file that the study names by its hash.

SPDX-License-Identifier: Apache-2.0

Nothing here has anything to do with a site. Whether a file's images are public indeed, and none of them is also at a
site, no program can tell; so the study, the claim and the report name the file, and every site sees it before approval.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import DataError
from common.files import sha256_file
from common.images import ImageSet
from common.npz import opened, read_partition
from common.phantoms import public_phantoms
from common.study import Study


def check_public_set(study: Study) -> None:
    """See that the public set of a study that will read one can be had; hours later is too late.

    Raises:
        DataError: as `public_images` does.
    """
    if study.pretrain.source == "npz" and study.training.rounds:
        public_images(study)


def public_images(study: Study) -> ImageSet:
    """What `pretrain.source` says: phantoms of the study's modality, or the train partition of `pretrain.path`.

    Raises:
        DataError: the file is missing, spoilt, another one than the study names, or its images do not fit the study.
    """
    config = study.pretrain
    if config.source == "phantoms":
        return public_phantoms(study.study.modality, study.data, config.images, seed=study.study.seed)
    if config.path is None:  # no part of what is agreed: only the coordinator has one
        raise DataError("missing", where="pretrain.path", remedy="Give the path of the public set on this machine.")
    path = Path(config.path).expanduser()
    with opened(path) as archive:
        found = sha256_file(path)
        if found != config.sha256:
            raise DataError(
                f"not the file that the study names: its SHA-256 is {found}", where=f"pretrain.path: {path}",
                remedy="Give the file that all sites agreed on, or set pretrain.sha256 before they approve.",
            )  # fmt: skip
        return read_partition(archive, "train", path, study.data)
