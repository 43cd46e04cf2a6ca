"""The claim: every number from its fields, none without a site's own figure, none over the ceiling."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

from common.claims import Claim, MechanismClaim, SiteClaim
from common.errors import BudgetError
from support.paths import REPOSITORY

CLAIM = Claim(
    study="s", study_sha256="ab" * 32, unit="image", delta=1e-5, epsilon_ceiling=8.0, accountant="prv",
    trust_model="local", phantoms=False, random_source="aes",
    mechanisms=(MechanismClaim("train", "train", 1.5, 0.1, 100, 1.0),),
    sites=(SiteClaim("a", 7.25, 3.0, "ledger"), SiteClaim("b", 2.0, 4.5, "plan")),
    unprotected=("that a site took part",), libraries={"opacus": "1.6.0"},
)  # fmt: skip


def test_the_claim_for_one_site_is_the_worst_partition_of_the_worst_site_and_for_all_sites_the_sum():
    assert CLAIM.epsilon_max == 7.25
    assert CLAIM.epsilon_sum == 7.25 + 4.5
    assert CLAIM.delta_sum == 2e-5


def test_the_statement_carries_these_numbers_the_unit_and_the_trust_model():
    text = CLAIM.statement()
    numbers = ("epsilon 7.25", "delta 1e-05", "epsilon 11.75", "delta 2e-05", "ceiling of epsilon 8")
    for words in (*numbers, "any one image", "coordinator", "PRV", "add or remove one image"):
        assert words in text
    assert "phantoms" not in text
    assert "phantoms" in replace(CLAIM, phantoms=True).statement()


def test_a_claim_survives_json():
    back = Claim.from_json(json.loads(json.dumps(CLAIM.to_json())))
    assert back == CLAIM
    assert back.same_as(CLAIM)
    assert not back.same_as(replace(CLAIM, delta=2e-5))


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf"), -1.0, 8.01])
def test_no_claim_without_a_true_figure_or_over_the_ceiling(epsilon):
    with pytest.raises(BudgetError):
        replace(CLAIM, sites=(SiteClaim("a", epsilon, 1.0, "ledger"),))


def test_no_claim_without_sites():
    with pytest.raises(BudgetError):
        replace(CLAIM, sites=())


SCHEMA = json.loads((REPOSITORY / "common" / "claim.schema.json").read_text())


def test_a_claim_fits_its_schema_and_the_schema_asks_for_every_field():
    for claim in (CLAIM, replace(CLAIM, unit="patient", phantoms=True, begun="2026-01-02")):
        value = json.loads(json.dumps(claim.to_json()))
        jsonschema.Draft202012Validator(SCHEMA).validate(value)
        assert set(value) == set(SCHEMA["properties"]) == set(SCHEMA["required"])
        for field in value:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.Draft202012Validator(SCHEMA).validate({k: v for k, v in value.items() if k != field})


def test_the_claim_names_every_observer_with_the_same_figure_under_local_trust():
    observers = {o.who: (o.epsilon, o.delta) for o in CLAIM.observers}
    assert observers == dict.fromkeys(("public", "coordinator", "another site"), (7.25, 1e-5))


def test_the_statement_says_what_the_unit_means_for_somebody_with_several_images():
    assert "several images at a site is protected less" in CLAIM.statement()
    patient = replace(CLAIM, unit="patient").statement()
    assert "had any one patient never been there" in patient
    assert "makes no difference" in patient
    assert "several images at a site is protected less" not in patient
