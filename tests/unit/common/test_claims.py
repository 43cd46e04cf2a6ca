"""The claim: every number from its fields, none without a site's own figure, none over the ceiling."""

from __future__ import annotations

import copy
import html
import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.privacy.randomness import NoiseSource
from common.accounting import PrivacyLoss, StudyPlan, epsilon_of
from common.claims import Claim, Composition, MechanismClaim, Observer, SiteClaim, two_digits_up
from common.errors import BudgetError
from common.messages import Spent
from server.checkpoints import RunFolder
from server.release.report import render_report
from server.session import Member, Session
from server.stages.release import claim_of
from support.paths import REPOSITORY
from support.reports import report_inputs
from support.studies import agreement, tiny_study

CLAIM = Claim(
    study="s", study_sha256="ab" * 32, unit="image", delta=1e-5, epsilon_ceiling=8.0, accountant="prv",
    trust_model="local", phantoms=False, random_source="aes",
    mechanisms=(MechanismClaim("train", "train", 1.5, 0.1, 100, 1.0),),
    sites=(SiteClaim("a", 7.25, 3.0, "ledger"), SiteClaim("b", 2.0, 4.5, "plan")),
    unprotected=("that a site took part",), libraries={"opacus": "1.6.0"},
)  # fmt: skip
SCHEMA = json.loads((REPOSITORY / "common" / "claim.schema.json").read_text())
FITS = jsonschema.Draft202012Validator(SCHEMA)


def as_read(claim: Claim) -> dict[str, Any]:
    return json.loads(json.dumps(claim.to_json()))


def test_the_claim_for_one_site_is_the_worst_partition_of_the_worst_site_and_for_all_sites_the_sum():
    assert CLAIM.epsilon_max == 7.25
    assert CLAIM.epsilon_sum == 7.25 + 4.5
    assert CLAIM.delta_sum == 2e-5


def test_the_statement_carries_these_numbers_the_unit_and_the_trust_model():
    text = CLAIM.statement()
    numbers = ("epsilon 7.25", "delta 1e-05", "epsilon 11.75", "delta 2e-05", "ceiling of epsilon 8", "1 in 100,000")
    for words in (*numbers, "any one image", "coordinator", "PRV", "add or remove one image", "2 sites"):
        assert words in text
    assert "phantoms" not in text
    assert "phantoms" in replace(CLAIM, phantoms=True).statement()
    assert "public" not in text.replace("the public, the coordinator", "")
    assert "SHA-256 abababababababab…): whoever is in them" in replace(CLAIM, public_sha256="ab" * 32).statement()


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(0.1, "at most 1.11,"), (1.0, "at most 2.72,"), (3.0, "at most 20.1,"), (8.0, "at most 2,981,"),
     (700.0, "more than a factor of a million, which is no promise"), (0.0, "at most 1.00,")],
)  # fmt: skip
def test_the_statement_says_epsilon_as_odds(epsilon, words):
    claim = replace(CLAIM, epsilon_ceiling=1000.0, sites=(SiteClaim("a", epsilon, 0.0, "ledger"),))
    assert words in claim.statement()


@settings(deadline=None)
@given(st.floats(0, 1000))
def test_a_figure_for_readers_is_never_less_than_what_was_spent(epsilon):
    shown = float(two_digits_up(epsilon))
    assert epsilon - 1e-7 <= shown < epsilon + 0.01 + 1e-7


def test_the_statement_of_one_site_speaks_of_no_other():
    text = replace(CLAIM, sites=CLAIM.sites[:1]).statement()
    assert "the one site" in text
    assert "other sites" not in text
    assert "every site" not in text


def test_the_statement_says_what_the_unit_means_for_somebody_with_several_images():
    assert "several images at a site is protected less" in CLAIM.statement()
    patient = replace(CLAIM, unit="patient").statement()
    assert "any one patient was there" in patient
    assert "makes no difference" in patient
    assert "several images at a site is protected less" not in patient


@pytest.mark.parametrize("unit", ["image", "patient"])
@pytest.mark.parametrize("phantoms", [False, True])
def test_the_statement_is_short_and_free_of_the_trades_words(unit, phantoms):
    text = replace(CLAIM, unit=unit, phantoms=phantoms).statement()
    assert len(text.split()) <= 250
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
    assert back.same_as(CLAIM)
    assert not back.same_as(replace(CLAIM, delta=2e-5))


@pytest.mark.parametrize(
    ("path", "lie"),
    [(("epsilon_max",), 1.0), (("epsilon_sum",), 1.0), (("delta_sum",), 1e-9), (("sites", 0, "epsilon"), 1.0),
     (("observers", 0, "epsilon"), 0.5), (("observers", 3, "epsilon"), 0.5), (("adjacency",), "nothing"),
     (("protects",), False), (("schema",), "synthward-claim/0"), (("delta",), 0.0), (("delta",), 1.0),
     (("unit",), "pixel"), (("trust_model",), "central"), (("epsilon_ceiling",), 7.0),
     (("epsilon_ceiling",), float("nan"))],
)  # fmt: skip
def test_a_claim_that_contradicts_itself_is_not_read(path, lie):
    value: Any = as_read(CLAIM)
    part = value
    for step in path[:-1]:
        part = part[step]
    assert part[path[-1]] != lie
    part[path[-1]] = lie
    with pytest.raises(BudgetError):
        Claim.from_json(value)


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf"), -1.0, 8.01])
def test_no_claim_without_a_true_figure_or_over_the_ceiling(epsilon):
    for sites in (SiteClaim("a", epsilon, 1.0, "ledger"), SiteClaim("a", 1.0, epsilon, "ledger")):
        with pytest.raises(BudgetError):
            replace(CLAIM, sites=(sites,))


def test_no_claim_without_sites():
    with pytest.raises(BudgetError):
        replace(CLAIM, sites=())


def test_under_local_trust_everybody_but_the_site_itself_has_the_same_figure():
    observers = {o.who: (o.epsilon, o.delta) for o in CLAIM.observers}
    alike = dict.fromkeys(("public", "coordinator", "another site"), (7.25, 1e-5))
    assert observers == {**alike, "the site itself": (None, None)}
    assert all(o.sees and o.why for o in CLAIM.observers)


def test_noise_from_a_seed_promises_nothing_to_nobody():
    seeded = replace(CLAIM, random_source=f"{NoiseSource().name}; {NoiseSource(3).name}")
    assert not seeded.protects
    assert {o.epsilon for o in seeded.observers} == {None}
    assert "NOTHING IS PROTECTED" in seeded.statement()
    secret = replace(CLAIM, random_source=NoiseSource().name)
    assert secret.protects
    assert "NOTHING" not in secret.statement()


# The schema

TEXT = st.text(max_size=20)
FIGURES = st.floats(0, 1000)
CLAIMS = st.builds(
    Claim,
    study=TEXT, study_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    unit=st.sampled_from(["image", "patient"]), delta=st.floats(1e-300, 0.99), epsilon_ceiling=st.just(1000.0),
    accountant=st.sampled_from(["prv", "rdp"]), trust_model=st.just("local"), phantoms=st.booleans(),
    random_source=st.sampled_from(["aes", "SEEDED: for tests only"]),
    mechanisms=st.lists(
        st.builds(
            MechanismClaim, TEXT, st.sampled_from(["train", "holdout"]), st.floats(0.4, 500), st.floats(1e-6, 1),
            st.integers(1, 10**6), st.floats(1e-6, 100),
        ), min_size=1, max_size=3,
    ).map(tuple),
    sites=st.lists(
        st.builds(SiteClaim, TEXT, FIGURES, FIGURES, st.sampled_from(["ledger", "plan"])), min_size=1, max_size=4
    ).map(tuple),
    unprotected=st.lists(TEXT, min_size=1, max_size=3).map(tuple), libraries=st.dictionaries(TEXT, TEXT, max_size=3),
    begun=st.just("") | st.dates().map(str), ended=st.just("") | st.dates().map(str),
    tuning=st.text(min_size=1, max_size=20),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(CLAIMS)
def test_every_claim_fits_the_schema_and_is_read_back_as_it_was(claim):
    value = as_read(claim)
    FITS.validate(value)
    assert Claim.from_json(value) == claim
    assert Claim.from_json(value).same_as(claim)


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def objects(schema: dict[str, Any], path: tuple[str | int, ...] = ()) -> Iterator[tuple[dict[str, Any], tuple]]:
    """Every object with named fields in the schema, and where it is in a claim."""
    if "properties" in schema:
        yield schema, path
        for name, part in schema["properties"].items():
            yield from objects(part, (*path, name))
    elif schema.get("type") == "array":
        yield from objects(schema["items"], (*path, 0))


def test_the_schema_has_the_fields_of_the_types_and_asks_for_each():
    value = as_read(CLAIM)
    parts = {path: schema for schema, path in objects(SCHEMA)}
    kinds = {("mechanisms", 0): MechanismClaim, ("sites", 0): SiteClaim, ("observers", 0): Observer,
             ("composition", 0): Composition, (): Claim}  # fmt: skip
    assert set(parts) == set(kinds)
    for path, schema in parts.items():
        part = value
        for step in path:
            part = part[step]
        assert {field.name for field in fields(kinds[path])} <= set(part)
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


# From a run


def session_of(tmp_path, members: dict[int, Member], *, phantoms: bool | None = False, unit: str = "image") -> Session:
    """A session that has ended asking; what the claim reads of a run's folder is written as a run writes it."""
    study = tiny_study(privacy={"unit": unit})
    folder = RunFolder(tmp_path)
    folder.event("begin", study=study.sha256)
    folder.event("stage", stage="release", text="")
    if phantoms is not None:
        said = {m.site: {"phantoms": phantoms, "random_source": m.random_source} for m in members.values()}
        folder.keep_result("enrol", said)
    return Session(agreement(study), folder, cast(Any, None), cast(Any, SimpleNamespace()), members)


def member(number: int, *, train: float = 2.0, holdout: float = 3.0, open_question: bool = False) -> Member:
    spent = Spent(train, holdout, 1, 1)
    return Member(number, f"site-{number}", [1.0, 1.0], False, "aes", spent, open_question)


def test_what_a_run_claims_is_what_the_ledgers_said_or_else_the_whole_plan(tmp_path):
    session = session_of(tmp_path, {1: member(1), 2: member(2, open_question=True)}, unit="patient")
    claim = claim_of(session)
    FITS.validate(as_read(claim))
    assert claim.unit == "patient"
    assert claim.sites[0] == SiteClaim("site-1", 2.0, 3.0, "ledger")
    assert claim.sites[1].basis == "plan"
    for partition, said in (("train", claim.sites[1].epsilon_train), ("holdout", claim.sites[1].epsilon_holdout)):
        # A reader can compute the figure anew from the mechanisms alone.
        losses = [PrivacyLoss(m.noise_multiplier, m.sample_rate, m.steps)
                  for m in claim.mechanisms if m.partition == partition]  # fmt: skip
        assert said == pytest.approx(epsilon_of(losses, delta=claim.delta, accountant=claim.accountant), rel=1e-12)
        assert said > 7
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", claim.begun)
    assert claim.begun <= claim.ended
    assert [m.name for m in claim.mechanisms] == [p.name for p in session.agreement.plan.mechanisms]


@pytest.mark.parametrize("name", [field.name for field in fields(StudyPlan)])
def test_every_mechanism_that_a_study_can_plan_is_said_in_words(name):
    assert len(MechanismClaim(name, "train", 1.0, 1.0, 1, 1.0).meaning.split()) > 4


@pytest.mark.parametrize(("said", "claimed"), [(True, True), (False, False), (None, False)])
def test_only_a_run_whose_sites_all_said_so_is_one_of_phantoms(tmp_path, said, claimed):
    assert claim_of(session_of(tmp_path, {1: member(1)}, phantoms=said)).phantoms is claimed


@pytest.mark.parametrize("source", ["aes", "SEEDED: for tests only"])
def test_every_privacy_figure_of_the_report_is_the_claims_own_and_not_the_studys(source):
    """The study here says 8 and 1e-5; the claim says something else throughout."""
    inputs = report_inputs(tiny_study())
    sites = (SiteClaim("site-1", 6.1234, 3.4512, "ledger"), SiteClaim("site-2", 5.5, 1.25, "plan"))
    claim = replace(inputs.claim, epsilon_ceiling=9.75, delta=3e-6, sites=sites, random_source=source)
    page = render_report(replace(inputs, claim=claim))
    settings_shown = page[page.rindex("<pre>") :]
    words = html.unescape(page.removesuffix(settings_shown))
    for figure in ("<b>6.13</b>", "<td>6.13</td><td>3.46</td><td>6.13</td>", "<td>5.50</td><td>1.25</td><td>5.50</td>",
                   "ceiling 9.75", "3e-06", "from 2026-01-02 to 2026-01-03", claim.statement()):  # fmt: skip
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
