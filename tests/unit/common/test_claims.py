"""The claim: every number from its fields, none without a site's own figure, none over the ceiling."""

from __future__ import annotations

import copy
import html
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client.privacy.randomness import NoiseSource
from common.accounting import PrivacyLoss, epsilon_of, plan_study
from common.claims import (
    Claim,
    Composition,
    MechanismClaim,
    Observer,
    SiteClaim,
    TuningClaim,
    schema_text,
    two_digits_up,
)
from common.errors import BudgetError, CheckpointError
from common.mechanisms import BY_NAME
from common.study import TuningConfig
from server.release.report import render_report
from support.paths import REPOSITORY
from support.reports import MECHANISM, claim_with, report_inputs, site_claim
from support.studies import tiny_study

CLAIM = claim_with()
SCHEMA = json.loads((REPOSITORY / "common" / "claim.schema.json").read_text())
FITS = jsonschema.Draft202012Validator(SCHEMA)


def as_read(claim: Claim) -> dict[str, Any]:
    return json.loads(json.dumps(claim.to_json()))


def test_the_claim_for_one_site_is_the_worst_partition_of_the_worst_site_and_for_all_sites_the_sum():
    assert CLAIM.epsilon_max == 7.25
    assert CLAIM.epsilon_sum == 7.25 + 4.5
    assert CLAIM.delta_sum == 2e-5


def test_the_statement_carries_these_numbers_the_unit_and_the_trust_model():
    text = CLAIM.statement
    numbers = ("epsilon 7.25", "delta 1e-05", "epsilon 11.75", "delta 2e-05", "ceiling of epsilon 8", "1 in 100,000")
    for words in (*numbers, "any one image", "per image and per site", "the sum over the sites", "coordinator", "PRV",
                  "add or remove one image", "2 sites"):  # fmt: skip
        assert words in text
    assert "phantoms" not in text
    assert "phantoms" in claim_with(phantoms=True).statement
    assert "public" not in text.replace("the public, the coordinator", "")
    assert "SHA-256 abababababababab…): whoever is in them" in claim_with(public_sha256="ab" * 32).statement


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(0.1, "at most 1.11,"), (1.0, "at most 2.72,"), (3.0, "at most 20.1,"), (8.0, "at most 2,981,"),
     (700.0, "more than a factor of a million, which is no promise"), (0.0, "at most 1.00,")],
)  # fmt: skip
def test_the_statement_says_epsilon_as_odds(epsilon, words):
    assert words in claim_with(epsilon_ceiling=1000.0, sites=(site_claim("a", epsilon, 0.0),)).statement


@settings(deadline=None)
@given(st.floats(0, 1000))
def test_a_figure_for_readers_is_never_less_than_what_was_spent(epsilon):
    shown = float(two_digits_up(epsilon))
    assert epsilon - 1e-7 <= shown < epsilon + 0.01 + 1e-7


def test_the_statement_of_one_site_speaks_of_no_other():
    text = claim_with(sites=CLAIM.sites[:1]).statement
    assert "the one site" in text
    for words in ("other sites", "every site", "sum over"):
        assert words not in text


def test_the_statement_says_what_the_unit_means_for_somebody_with_several_images():
    assert "several images at a site is protected less" in CLAIM.statement
    patient = claim_with(unit="patient").statement
    assert "any one patient was there" in patient
    assert "makes no difference" in patient
    assert "several images at a site is protected less" not in patient


BASES = TuningConfig.model_json_schema()["properties"]["basis"]["enum"]


@pytest.mark.parametrize("basis", BASES)
def test_the_claim_says_of_tuning_what_the_study_declares_and_no_more(basis):
    sources = () if basis in ("undeclared", "nothing") else ("PneumoniaMNIST, val", "colon, val")
    study = tiny_study().model_copy(update={"tuning": TuningConfig(basis=basis, sources=sources)})
    claim = Claim.of(study, plan_study(tiny_study()), sites=CLAIM.sites, phantoms=False, random_source="aes",
                     unprotected=("x",), libraries={})  # fmt: skip
    assert (claim.tuning.basis, claim.tuning.sources) == (basis, sources)
    assert claim.tuning.meaning.startswith("the study ")
    assert claim.tuning.meaning[1:] in claim.statement
    assert all(source in claim.statement for source in sources)
    assert "before a record was read" not in claim.statement
    assert ("choices made on these records would not be covered" in claim.statement) is (basis == "undeclared")
    assert len({TuningClaim(basis=other).meaning for other in BASES}) == len(BASES)


@pytest.mark.parametrize("unit", ["image", "patient"])
@pytest.mark.parametrize("phantoms", [False, True])
@pytest.mark.parametrize("basis", BASES)
def test_the_statement_is_short_and_free_of_the_trades_words(unit, phantoms, basis):
    text = claim_with(unit=unit, phantoms=phantoms, tuning=TuningClaim(basis=basis)).statement
    assert len(text.split()) <= 275
    for word in (
        "gradient",
        "train set",
        "clip",
        "sampling",
        "mechanism",
        "noise_multiplier",
        "composition",
        "gaussian",
    ):
        assert word not in text.lower()


def test_a_claim_survives_json():
    back = Claim.from_json(as_read(CLAIM))
    assert back == CLAIM
    assert back.to_json() == CLAIM.to_json()
    assert back != claim_with(delta=2e-5)


@pytest.mark.parametrize(
    ("path", "lie"),
    [(("epsilon_max",), 1.0), (("epsilon_sum",), 1.0), (("delta_sum",), 1e-9), (("sites", 0, "epsilon"), 1.0),
     (("observers", 0, "epsilon"), 0.5), (("observers", 3, "epsilon"), 0.5), (("adjacency",), "nothing"),
     (("protects",), False), (("schema",), "synthward-claim/1"), (("delta",), 0.0), (("delta",), 1.0),
     (("unit",), "pixel"), (("trust_model",), "central"), (("epsilon_ceiling",), 7.0), (("sites",), None),
     (("tuning", "basis"), "luck"), (("epsilon_ceiling",), float("nan"))],
)  # fmt: skip
def test_a_claim_that_contradicts_itself_is_not_read(path, lie):
    value: Any = as_read(CLAIM)
    part = value
    for step in path[:-1]:
        part = part[step]
    assert part[path[-1]] != lie
    part[path[-1]] = lie
    with pytest.raises((BudgetError, CheckpointError)):
        Claim.from_json(value)


@pytest.mark.parametrize("value", [None, [], {}, "claim"])
def test_what_is_no_claim_is_not_read(value):
    with pytest.raises(CheckpointError):
        Claim.from_json(value)


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf"), -1.0, 8.01])
def test_no_claim_without_a_true_figure_or_over_the_ceiling(epsilon):
    for figures in ((epsilon, 1.0), (1.0, epsilon)):
        with pytest.raises((BudgetError, ValidationError)):
            claim_with(sites=(site_claim("a", *figures),))


def test_no_claim_without_sites():
    with pytest.raises((BudgetError, ValidationError, ValueError)):
        claim_with(sites=())


def test_under_local_trust_everybody_but_the_site_itself_has_the_same_figure():
    observers = {o.who: (o.epsilon, o.delta) for o in CLAIM.observers}
    alike = dict.fromkeys(("public", "coordinator", "another site"), (7.25, 1e-5))
    assert observers == {**alike, "the site itself": (None, None)}
    assert all(o.sees and o.why for o in CLAIM.observers)


def test_noise_from_a_seed_promises_nothing_to_nobody():
    seeded = claim_with(random_source=f"{NoiseSource().name}; {NoiseSource(3).name}")
    assert not seeded.protects
    assert {o.epsilon for o in seeded.observers} == {None}
    assert "NOTHING IS PROTECTED" in seeded.statement
    secret = claim_with(random_source=NoiseSource().name)
    assert secret.protects
    assert "NOTHING" not in secret.statement


# The schema

TEXT = st.text(max_size=20)
SOME = st.text(min_size=1, max_size=20)
FIGURES = st.floats(0, 1000)
CLAIMS = st.builds(
    Claim,
    study=TEXT, study_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    unit=st.sampled_from(["image", "patient"]), delta=st.floats(1e-300, 0.99), epsilon_ceiling=st.just(1000.0),
    accountant=st.sampled_from(["prv", "rdp"]), trust_model=st.just("local"), phantoms=st.booleans(),
    random_source=st.sampled_from(["aes", "SEEDED: for tests only"]),
    mechanisms=st.lists(
        st.builds(
            MechanismClaim, name=TEXT | st.sampled_from(sorted(BY_NAME)),
            partition=st.sampled_from(["train", "holdout"]), noise_multiplier=st.floats(0.4, 500),
            sample_rate=st.floats(1e-6, 1), steps=st.integers(1, 10**6), sensitivity=st.floats(1e-6, 100),
        ), min_size=1, max_size=3,
    ).map(tuple),
    sites=st.lists(
        st.builds(site_claim, TEXT, FIGURES, FIGURES, st.sampled_from(["ledger", "plan"])), min_size=1, max_size=4
    ).map(tuple),
    unprotected=st.lists(SOME, min_size=1, max_size=3).map(tuple), libraries=st.dictionaries(TEXT, TEXT, max_size=3),
    begun=st.just("") | st.dates().map(str), ended=st.just("") | st.dates().map(str),
    tuning=st.builds(TuningClaim, basis=st.sampled_from(BASES), sources=st.sampled_from([(), ("a",), ("a", "b{c}")])),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(CLAIMS)
def test_every_claim_fits_the_schema_and_is_read_back_as_it_was(claim):
    value = as_read(claim)
    FITS.validate(value)
    assert Claim.from_json(value) == claim


def test_the_schema_is_one_and_is_made_from_the_types():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert (REPOSITORY / "common" / "claim.schema.json").read_text() == schema_text(), (
        "write it anew: see common/claims.py"
    )


def objects(schema: dict[str, Any], path: tuple[str | int, ...] = ()) -> Iterator[tuple[dict[str, Any], tuple]]:
    """Every object with named fields in the schema, and where it is in a claim."""
    schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "properties" in schema:
        yield schema, path
        for name, part in schema["properties"].items():
            yield from objects(part, (*path, name))
    elif schema.get("type") == "array":
        yield from objects(schema["items"], (*path, 0))


def test_the_schema_has_the_fields_of_the_types_and_asks_for_each():
    value = as_read(claim_with(tuning=TuningClaim(basis="phantoms", sources=("ours",))))
    parts = {path: schema for schema, path in objects(SCHEMA)}
    kinds = {("mechanisms", 0): MechanismClaim, ("sites", 0): SiteClaim, ("observers", 0): Observer,
             ("composition", 0): Composition, ("tuning",): TuningClaim, (): Claim}  # fmt: skip
    assert set(parts) == set(kinds)
    for path, schema in parts.items():
        part = value
        for step in path:
            part = part[step]
        fields = {field.alias or name for name, field in kinds[path].model_fields.items()}
        assert fields | set(kinds[path].model_computed_fields) == set(part)
        assert set(part) == set(schema["properties"]) == set(schema["required"])
        for name in part:
            for broken in (_without(value, path, name), _with(value, (*path, name), [["no such value"]])):
                assert not FITS.is_valid(broken), (path, name)
        assert not FITS.is_valid(_with(value, (*path, "extra"), 1)), path


def _without(value: dict[str, Any], path: tuple, name: str) -> dict[str, Any]:
    found = part = copy.deepcopy(value)
    for step in path:
        part = part[step]
    del part[name]
    return found


def _with(value: dict[str, Any], path: tuple, new: Any) -> dict[str, Any]:
    found = part = copy.deepcopy(value)
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = new
    return found


# From a study


def test_a_reader_can_compute_what_a_plan_costs_anew_from_the_mechanisms_alone():
    study = tiny_study(privacy={"unit": "patient"})
    plan = plan_study(study)
    claim = Claim.of(study, plan, sites=CLAIM.sites, phantoms=False, random_source="aes", unprotected=("x",),
                     libraries={"opacus": "1.6"}, begun="2026-01-02", ended="2026-01-03")  # fmt: skip
    FITS.validate(as_read(claim))
    assert claim.unit == "patient"
    assert claim.study_sha256 == study.sha256
    assert claim.accountant_version == "opacus 1.6"
    assert [m.name for m in claim.mechanisms] == [p.name for p in plan.mechanisms]
    for partition in ("train", "holdout"):
        losses = [PrivacyLoss(m.noise_multiplier, m.sample_rate, m.steps)
                  for m in claim.mechanisms if m.partition == partition]  # fmt: skip
        said = epsilon_of(plan.losses(partition), delta=claim.delta, accountant=claim.accountant)
        assert epsilon_of(losses, delta=claim.delta, accountant=claim.accountant) == pytest.approx(said, rel=1e-12)
        assert 7 < said <= claim.epsilon_ceiling


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_mechanism_that_a_study_can_plan_is_said_in_words(name):
    meaning = MechanismClaim(**{**MECHANISM, "name": name}).meaning
    assert len(meaning.split()) > 4
    assert meaning == BY_NAME[name].meaning


@pytest.mark.parametrize("source", ["aes", "SEEDED: for tests only"])
def test_every_privacy_figure_of_the_report_is_the_claims_own_and_not_the_studys(source):
    """The study here says 8 and 1e-5; the claim says something else throughout."""
    inputs = report_inputs(tiny_study())
    sites = (site_claim("site-1", 6.1234, 3.4512), site_claim("site-2", 5.5, 1.25, "plan"))
    claim = claim_with(epsilon_ceiling=9.75, delta=3e-6, sites=sites, random_source=source,
                       tuning=TuningClaim(basis="public data", sources=("a set",)))  # fmt: skip
    page = render_report(replace(inputs, claim=claim))
    settings_shown = page[page.rindex("<pre>") :]
    words = html.unescape(page.removesuffix(settings_shown))
    for figure in ("<b>6.13</b>", "<td>6.13</td><td>3.46</td><td>6.13</td>", "<td>5.50</td><td>1.25</td><td>5.50</td>",
                   "<b>11.63</b>", "ceiling 9.75", "3e-06", "from 2026-01-02 to 2026-01-03", claim.statement,
                   claim.tuning.meaning):  # fmt: skip
        assert figure in words, figure
    assert words.count("no promise</td>") == (1 if claim.protects else 4)
    assert "1e-05" not in words
    assert "7.25" not in re.sub(r"<svg.*?</svg>|data:image[^\"]*", "", words, flags=re.DOTALL)


# For the reader

GUIDE = (REPOSITORY / "docs" / "reading-a-release.md").read_text(encoding="utf-8")


def test_the_readers_guide_names_every_field_of_the_claim():
    named = set(re.findall(r"`(\w+)`", GUIDE.split("## The claim, field by field")[1].split("\n## ")[0]))
    parts = {name for schema, _ in objects(SCHEMA) for name in schema["properties"]}
    assert set(SCHEMA["properties"]) <= named
    assert parts - named == set()


def test_the_readers_guide_computes_the_odds_rightly():
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.,]+) \| ([\d.]+) % \| ([\d.]+) % \|$", GUIDE, re.MULTILINE)
    assert [row[0] for row in rows] == ["0.1", "1", "3", "8"]
    for epsilon, odds, half, rare in rows:
        factor = math.exp(float(epsilon))
        assert float(odds.replace(",", "")) == pytest.approx(factor, rel=5e-3)
        for shown, prior in ((half, 0.5), (rare, 0.01)):
            sure = 100 * prior * factor / (prior * factor + 1 - prior)
            assert float(shown) == round(sure, len(shown.partition(".")[2]))
