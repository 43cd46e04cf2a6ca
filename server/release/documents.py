"""Every document of a release that follows from its study, claim, metrics and files alone.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import common
from server.release.card_templates import CITATION, DATASET, DATASHEET, MODEL
from server.release.croissant import croissant
from server.release.facts import Facts
from server.release.generator import generator_config

DESCRIBED = ("images.npz", "images/metadata.csv", "generator/model.safetensors", "claim.json", "metrics.json")
NAMES = ("README.md", "DATASHEET.md", "CITATION.cff", "generator/README.md", "generator/config.json", "croissant.json")


@cache
def writer() -> str:
    """SHA-256 of the code whose words a release has; a checkout keeps its version's number for months."""
    own, shared = Path(__file__).parent, Path(next(iter(common.__path__)))
    sources = [*sorted(own.glob("*.py")), *(shared / f"{name}.py" for name in ("claims", "mechanisms", "study_file"))]
    return hashlib.sha256(b"".join(hashlib.sha256(source.read_bytes()).digest() for source in sources)).hexdigest()


def documents(facts: Facts, checksums: dict[str, str]) -> dict[str, bytes]:
    """The documents' bytes by their paths, `NAMES`.

    Args:
        checksums: SHA-256 of the files in `DESCRIBED`.
    """
    texts = {
        "README.md": facts.fill(DATASET), "DATASHEET.md": facts.fill(DATASHEET), "CITATION.cff": facts.fill(CITATION),
        "generator/README.md": facts.fill(MODEL), "generator/config.json": _json(generator_config(facts.study)),
        "croissant.json": _json(croissant(facts, checksums)),
    }  # fmt: skip
    return {name: text.encode() for name, text in texts.items()}


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
