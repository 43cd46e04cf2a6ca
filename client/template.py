"""The commented site file that `synthward-site init` writes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
from pathlib import Path

_TEMPLATE = """\
# The site file: owned by the hospital, read on the hospital's machine only, never sent anywhere.
# Check it with: synthward-site check site.toml --study STUDY.toml
# Relative paths are relative to this file. What is commented out shows the default.

name = {name}          # letters, digits, - and _; the coordinator sees it
state = "state"              # folder of the ledger, the stored answers and the log; back it up, never edit it
own_reference = false        # also train a classifier without privacy, whose figures stay in this folder

[data]
source = "npz"               # MedMNIST layout: train_images, train_labels, test_images, test_labels [, *_groups]
path = {path}

# What this hospital permits, whatever a study asks. A refusal names the rule, and nothing of the records.
[policy]
max_epsilon = 8.0            # ceiling over ALL studies on these records, for ever; nobody else can lift it
max_delta = 1e-5             # the delta at which all studies are counted together
max_study_epsilon = 8.0      # ceiling of a single study
max_study_delta = 1e-5
max_stage_share = 1.0        # the largest share of a study's epsilon that one stage alone may cost
min_units = 50               # fewest training images (or patients, where they are the unit) that may take part
min_units_per_class = 2      # the same for the smallest class
require_approval = true      # a study needs `synthward-site approve` before it gets anything
allowed_studies = []         # SHA-256 of permitted studies; empty = any that is approved
allowed_mechanisms = ["counts", "moments", "train", "reference", "evaluate"]
exact_aggregates = false     # no exact figure leaves; this version has no way to ask for one
# accountant = "prv"         # or "rdp": how privacy losses are added up

[performance]                # cannot change the guarantee
threads = 2
memory_mb = 1500             # bounds how many records are in memory at once
"""


def site_file_text(name: str, data: Path) -> str:
    """A site file with every setting explained."""
    return _TEMPLATE.format(name=json.dumps(name), path=json.dumps(str(data)))
