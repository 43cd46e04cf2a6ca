"""What a release says in words: every figure is the claim's or the metrics', every format is what its readers take."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from common.claims import two_digits_up
from common.errors import StudyError
from common.files import unpack_arrays
from common.model.diffusion_model import initial_weights, load_model
from common.study import ReleaseConfig
from common.study_file import load_study
from server.release.checksums import REQUIRED, verify_checksums
from server.release.documents import DESCRIBED, documents
from server.release.facts import Facts
from support.releases import a_release, parts_of
from support.studies import tiny_study

SAID = {
    "title": 'A "set": of *chests*', "authors": ["Hospital A", "B: the second"], "contact": "dpo@example.org",
    "licence": "CC-BY-4.0", "url": "https://example.org/set", "min_auc": 0.9, "smallest_class": 100,
}  # fmt: skip
ODD = ['a|b *c* <img src="x">', "健康", "- yes: no", "'q' \"p\"", "test", "#6", "null"]
SUMS = dict.fromkeys(DESCRIBED, "ab" * 32)


def texts(study=None, *, phantoms=True, **changes):
    """The documents of the tiny study's release, as text."""
    study = study or tiny_study()
    inputs, metrics = parts_of(study, phantoms=phantoms)
    facts = replace(Facts(study, inputs.claim, metrics), **changes)
    return {name: data.decode() for name, data in documents(facts, SUMS).items()}, facts


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return a_release(tmp_path_factory.mktemp("release") / "r")


def test_a_release_is_whole_and_the_same_bytes_each_time(release, tmp_path):
    assert verify_checksums(release) == []
    assert not list(release.parent.glob(".*"))
    again = a_release(tmp_path / "r")
    files = sorted(path.relative_to(release) for path in release.rglob("*") if path.is_file())
    assert {path.as_posix() for path in files} >= set(REQUIRED)
    for path in files:
        assert (release / path).read_bytes() == (again / path).read_bytes(), path


def test_no_path_of_the_coordinators_machine_is_given_away(tmp_path):
    public = {"source": "npz", "path": "/home/somebody/public.npz", "sha256": "0" * 64}
    folder = a_release(tmp_path / "r", tiny_study(pretrain=public))
    assert not [path for path in folder.rglob("*") if path.is_file() and b"somebody" in path.read_bytes()]
    study = load_study(folder / "study.toml")
    assert study.sha256 == json.loads((folder / "claim.json").read_text())["study_sha256"]


def test_the_weights_load_by_the_words_of_their_card(release):
    weights = unpack_arrays((release / "generator" / "model.safetensors").read_bytes(), where="model")
    model = load_model(load_study(release / "study.toml"), weights)
    expected = initial_weights(tiny_study())
    assert all(np.array_equal(array, expected[name]) for name, array in model.weights().items())
    config = json.loads((release / "generator" / "config.json").read_text())
    assert config["network"]["width"] == 8 and config["data"]["classes"] == ["clear", "opacity"]


@pytest.mark.parametrize("name", ["README.md", "DATASHEET.md", "generator/README.md"])
def test_a_card_has_the_claims_figures_and_no_others(name):
    found, facts = texts()
    text = found[name].partition("\n---\n")[2] or found[name]
    for figure in (
        two_digits_up(facts.claim.epsilon_max),
        two_digits_up(facts.claim.epsilon_sum),
        "0.876 [0.800, 0.900]",
        "per image and per site",
    ):
        assert figure in text, figure
    assert facts.claim.statement in text.replace("\\", "")
    said = json.dumps([facts.claim.to_json(), facts.metrics.model_dump(), facts.study.agreed()])
    said += " ".join(two_digits_up(x) for site in facts.claim.sites for x in (site.epsilon_train, site.epsilon_holdout))
    for number in re.findall(r"\d+\.\d{2,}", text):
        assert any(abs(float(number) - float(known)) < 0.006 for known in re.findall(r"\d+\.\d+", said)), number


@pytest.mark.parametrize("name", ["README.md", "DATASHEET.md", "generator/README.md"])
def test_phantoms_are_said_first_and_only_where_they_are(name):
    text = texts()[0][name].partition("\n---\n")[2] or texts()[0][name]
    assert text.index("PHANTOMS") < 200
    assert "PHANTOMS" not in texts(phantoms=False)[0][name]
    assert "real images" in texts(phantoms=False)[0][name]


def test_seeded_noise_is_said_before_anything_is_promised():
    inputs, _ = parts_of(tiny_study())
    seeded = inputs.claim.model_copy(update={"random_source": "SEEDED, for tests"})
    found = texts(claim=seeded)[0]
    assert all("NOTHING IS PROTECTED" in found[name] for name in ("README.md", "DATASHEET.md", "croissant.json"))


def test_the_licence_is_the_studys_and_where_there_is_none_that_is_said():
    found, _ = texts(tiny_study(release=SAID))
    head = yaml.safe_load(found["README.md"].split("---\n")[1])
    assert (head["license"], head["pretty_name"]) == ("cc-by-4.0", SAID["title"])
    cited = yaml.safe_load(found["CITATION.cff"])
    assert cited["license"] == "CC-BY-4.0" and [a["name"] for a in cited["authors"]] == SAID["authors"]
    assert str(cited["date-released"]) == "2026-01-03" and cited["url"] == SAID["url"]
    assert json.loads(found["croissant.json"])["license"] == "https://spdx.org/licenses/CC-BY-4.0.html"
    none = texts()[0]
    assert yaml.safe_load(none["README.md"].split("---\n")[1])["license"] == "unknown"
    assert "The study gives none" in none["README.md"] and "license" not in yaml.safe_load(none["CITATION.cff"])
    own = {"licence": "LicenseRef-Ours", "licence_url": "https://example.org/terms"}
    head = yaml.safe_load(texts(tiny_study(release=own))[0]["README.md"].split("---\n")[1])
    assert [head[key] for key in ("license", "license_name", "license_link")] == ["other", "licenseref-ours",
                                                                                 own["licence_url"]]  # fmt: skip


def test_limits_that_are_not_met_are_said():
    found, facts = texts(tiny_study(release=SAID))
    assert facts.unmet == [
        "AUC 0.876, release.min_auc is 0.9",
        "12 images of class 'clear', release.smallest_class is 100",
    ]
    assert all("Below its study's own limits" in found[name] for name in ("README.md", "DATASHEET.md"))
    assert texts()[1].unmet == []


def test_names_in_any_script_and_with_any_mark_stay_what_they_are():
    study = tiny_study(data={"classes": ODD}, release={"title": ODD[2], "authors": [ODD[3]]})
    found, _ = texts(study)
    head = yaml.safe_load(found["README.md"].split("---\n")[1])
    assert head["pretty_name"] == ODD[2] and yaml.safe_load(found["CITATION.cff"])["authors"] == [{"name": ODD[3]}]
    assert "<img" not in found["README.md"].split("---\n")[2] and r"a\|b \*c\*" in found["README.md"]


CROISSANT = ("@context", "@type", "dct:conformsTo", "description", "license", "name", "url", "creator", "datePublished")
RAI = ("dataCollection", "dataLimitations", "dataBiases", "dataUseCases", "personalSensitiveInformation",
       "dataSocialImpact", "dataReleaseMaintenancePlan", "dataAnnotationProtocol")  # fmt: skip


def test_croissant_has_every_property_that_the_specification_requires():
    """Of Croissant 1.0, "Required"; `mlcroissant` itself is not installed here."""
    found = json.loads(texts()[0]["croissant.json"])
    assert all(found[key] for key in CROISSANT) and found["@type"] == "sc:Dataset"
    assert found["dct:conformsTo"] == ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"]
    assert all(found[f"rai:{key}"] for key in RAI)
    prefixes = {key.partition(":")[0] for key in found if ":" in key}
    assert prefixes <= found["@context"].keys()
    ids = [part["@id"] for part in (*found["distribution"], *found["recordSet"])]
    for part in found["distribution"]:
        need = ("name", "contentUrl", "encodingFormat", "sha256") if part["@type"] == "cr:FileObject" else (
            "name", "encodingFormat", "includes")  # fmt: skip
        assert all(part[key] for key in need)
    for record in found["recordSet"]:
        assert record["name"] and record["field"]
        for field in record["field"]:
            assert field["name"] and field["dataType"] and field["@id"].startswith(f"{record['@id']}/")
            assert "data" in record or field["source"]
            ids.append(field["@id"])
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'\{"@id": "([^"]+)"\}', json.dumps(found["recordSet"])):
        assert reference in ids


def test_a_study_without_a_release_table_keeps_its_hash():
    """Digests from before there was one: sites have approved studies by them."""
    assert tiny_study().sha256 == "58c0b3d2eb4b5d9c6c502f4446d4c7852df590f04d018ff87e5e7926f7f821b1"
    assert tiny_study(release={"smallest_class": 0}).sha256 == tiny_study().sha256
    assert tiny_study(release={"licence": "MIT"}).sha256 != tiny_study().sha256
    assert "release" not in tiny_study().agreed()


@pytest.mark.parametrize(("table", "words"), [
    ({"licence": "all mine"}, "release.licence: must be an SPDX"), ({"licence": "LicenseRef-x"}, "release.licence"),
    ({"licence_url": "https://example.org"}, "release.licence_url"), ({"url": "http://example.org"}, "release.url"),
    ({"uid_root": "1.02.3"}, "release.uid_root: must be numbers"), ({"min_auc": 1.5}, "release.min_auc"),
    ({"min_auc": "0.5"}, "release.min_auc"), ({"license": "MIT"}, "Did you mean 'licence'"),
    ({"smallest_class": -1}, "release.smallest_class"), ({"title": "a\u202eb"}, "release.title"),
])  # fmt: skip
def test_a_release_table_that_cannot_be_used_is_one_line(table, words):
    with pytest.raises(StudyError) as caught:
        tiny_study(release=table)
    assert words in str(caught.value)


def test_the_shipped_study_without_a_table_says_nothing():
    assert tiny_study().release == ReleaseConfig()
