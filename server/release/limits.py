"""The least that a study asks of its release (`[release] min_auc`, `smallest_class`), and where it falls short.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from common.study import Study
from server.release.metrics import Metrics


def unmet(study: Study, metrics: Metrics) -> list[str]:
    """A line for each limit that is not met; an empty list where all are, or the study sets none."""
    least, fewest, auc = study.release.min_auc, study.release.smallest_class, metrics.headline.auc_macro.value
    lines = []
    if least is not None and (auc is None or auc < least):
        lines.append(f"AUC {'unknown' if auc is None else f'{auc:.3f}'}, release.min_auc is {least:g}")
    name, count = min(metrics.classes.items(), key=lambda entry: entry[1])
    if count < fewest:
        lines.append(f"{count} images of class '{name}', release.smallest_class is {fewest}")
    return lines
