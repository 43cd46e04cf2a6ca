"""Approval: everything that a site can say no to is said here, and what was approved is pinned."""

from __future__ import annotations

import json
import shutil
import tempfile
import unicodedata
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from client.approval import MOST_STUDIES, approve, chosen, clean_name, judge
from client.beginning import begin
from client.privacy.ledger import Ceiling, Ledger
from client.privacy.policy import Cohort, SitePolicy
from client.registry import Registry, open_ledger
from client.site import Site, load_site_config
from common.accounting import epsilon_of, plan_study
from common.errors import BudgetError, DataError, PolicyRefusal, StorageError, SynthwardError
from common.files import sha256_file
from support.datasets import good_arrays, write_npz
from support.studies import tiny_study

STUDY = tiny_study(privacy={"unit": "patient"})
SECOND = tiny_study(study={"name": "second"}, privacy={"unit": "patient"})
WIDE = Ceiling(1000.0, 1e-5, "rdp")


def _arrays():
    return good_arrays(size=16, patients=True)


def _hospital(folder, name="hospital-a", arrays=None, **policy):
    """A site file beside its images, with a ledger; returns the site file."""
    folder.mkdir(exist_ok=True)
    write_npz(folder / "images.npz", arrays or _arrays())
    begin(folder / "site.toml", name, Path("images.npz"))
    text = (folder / "site.toml").read_text().replace("min_units = 50", "min_units = 5")
    text = text.replace('# accountant = "prv"', 'accountant = "rdp"')
    for key, value in policy.items():
        lines = [f"{key} = {json.dumps(value)}" if line.startswith(f"{key} = ") else line for line in text.splitlines()]
        assert lines != text.splitlines(), key
        text = "\n".join(lines) + "\n"
    (folder / "site.toml").write_text(text)
    return folder / "site.toml"


def _approve(path, study=STUDY, by="Dr. A. Example"):
    with closing(load_site_config(path).ledger()) as ledger:
        return approve(Site.open(path, study), ledger, study, plan_study(study), by=by)


def _spend(path, study, *mechanisms):
    with closing(load_site_config(path).ledger()) as ledger:
        plan = plan_study(study)
        for number, name in enumerate(mechanisms):
            ledger.reserve(plan[name], study=study.sha256, request=f"{study.sha256}{number}", study_ceiling=WIDE,
                           ceiling=WIDE, approval=None)  # fmt: skip


def _head(path):
    with closing(load_site_config(path).ledger()) as ledger:
        return ledger.head()


def test_an_approval_pins_the_solved_plan_and_the_very_data(tmp_path):
    path = _hospital(tmp_path)
    approval, verdict = _approve(path, by="  Dr. A.  Example, head of data protection ")
    assert approval.by == "Dr. A. Example, head of data protection"
    assert approval.plan == plan_study(STUDY)
    site = Site.open(path, STUDY)
    with closing(load_site_config(path).ledger()) as ledger:
        assert ledger.approval(STUDY.sha256) == approval
        assert site.fingerprints(ledger.key).digest == approval.data
    assert verdict.possible
    assert verdict.before == {"train": 0.0, "holdout": 0.0}
    changed = _arrays()
    changed["train_images"][0, 0, 0] ^= 1
    write_npz(tmp_path / "images.npz", changed)
    with closing(load_site_config(path).ledger()) as ledger:
        assert Site.open(path, STUDY).fingerprints(ledger.key).digest != approval.data
    assert _approve(path)[0].data != approval.data


@pytest.mark.parametrize(
    ("policy", "study", "rule"),
    [({"min_units": 21}, STUDY, "policy.min_units"),
     ({"min_units_per_class": 11}, STUDY, "policy.min_units_per_class"),
     ({}, tiny_study(), "policy.unit"),
     ({"allowed_mechanisms": ["counts", "moments"]}, STUDY, "policy.allowed_mechanisms"),
     ({"allowed_studies": ["ab" * 32]}, STUDY, "policy.allowed_studies"),
     ({"max_stage_share": 0.3}, STUDY, "policy.max_stage_share"),
     ({"max_study_epsilon": 7.9}, STUDY, "policy.max_study_epsilon"),
     ({"max_study_delta": 1e-6}, STUDY, "policy.max_study_delta"),
     ({"max_epsilon": 7.9}, STUDY, "policy.max_epsilon")],
)  # fmt: skip
def test_whatever_the_policy_refuses_is_refused_when_it_is_approved_and_nothing_is_written(
    tmp_path, policy, study, rule
):
    path = _hospital(tmp_path, **policy)
    before = _head(path)
    with pytest.raises(PolicyRefusal) as refused:
        _approve(path, study)
    assert refused.value.where == rule
    assert len(str(refused.value).splitlines()) == 1
    assert _head(path) == before


def test_no_rule_about_the_records_is_asked_when_a_request_comes():
    policy = SitePolicy(min_units=10**6, min_units_per_class=10**6)
    plan, none = plan_study(STUDY), Cohort(0, 0, 0, patients_known=True)
    assert list(policy.refusals(tiny_study(), plan)) == []
    wheres = [refusal.where for refusal in policy.refusals(tiny_study(), plan, none)]
    assert wheres == ["policy.unit", "policy.min_units", "policy.min_units_per_class"]
    assert [r.where for r in SitePolicy(unit="image", min_units=1, min_units_per_class=0).refusals(
        tiny_study(), plan, Cohort(1, 1, 0, patients_known=True))] == []  # fmt: skip


@pytest.mark.parametrize(("delta", "refused", "warned"), [(0.5, True, True), (0.02, True, True), (1 / 60, False, True),
                                                           (0.002, False, True), (1 / 600, False, False)])  # fmt: skip
def test_delta_is_held_against_the_larger_partition(delta, refused, warned):
    """60 units in train, 30 held out: over 1/60 is refused, over 1/600 warned of."""
    study, cohort = tiny_study(privacy={"delta": delta}), Cohort(60, 30, 20, patients_known=False)
    policy, plan = SitePolicy(max_study_delta=0.9, max_delta=0.9), plan_study(tiny_study())
    wheres = [refusal.where for refusal in policy.refusals(study, plan, cohort)]
    assert wheres == (["privacy.delta"] if refused else [])
    assert bool(cohort.warnings(study)) == warned
    assert "privacy.delta" not in [refusal.where for refusal in policy.refusals(study, plan)]


def test_a_mechanism_that_does_not_exist_cannot_be_allowed():
    with pytest.raises(ValueError, match="no mechanism 'mean'; there are counts, features, moments"):
        SitePolicy.model_validate({"allowed_mechanisms": ["counts", "mean"]})


def test_a_study_that_would_not_fit_to_its_end_beside_the_earlier_ones_is_refused(tmp_path):
    path = _hospital(tmp_path)
    _approve(path)
    _spend(path, STUDY, "counts", "moments")
    with pytest.raises(BudgetError, match="the whole study would bring the train records to epsilon .* ceiling 8 "):
        _approve(path, SECOND)
    _approve(path, STUDY)  # its own losses are part of its own plan: they do not count twice


def test_how_many_more_studies_fit_is_what_the_accountant_says(tmp_path):
    path = _hospital(tmp_path, max_epsilon=20.0)
    plan = plan_study(STUDY)

    def cost(studies):
        losses = [loss._replace(steps=loss.steps * studies) for loss in plan.losses("train")]
        return epsilon_of(losses, delta=1e-5, accountant="rdp")

    more = _approve(path)[1].more
    assert cost(1 + more) <= 20.0 < cost(2 + more)
    assert more > 1
    wide = _hospital(tmp_path / "wide", "hospital-b", {**_arrays(), "train_images": 255 - _arrays()["train_images"]},
                     max_epsilon=5000.0)  # fmt: skip
    with closing(load_site_config(wide).ledger()) as ledger:
        assert judge(Site.open(wide, STUDY), ledger, STUDY, plan).more >= MOST_STUDIES - 1


def test_swapping_train_and_test_between_two_studies_does_not_halve_what_a_record_has_lost(tmp_path):
    """Attack 4 of the review: ledger 7.99 and 8.00 under a ceiling of 8, each record's true total 11.96."""
    path = _hospital(tmp_path, max_epsilon=50.0)
    _approve(path)
    _spend(path, STUDY, "counts", "moments", "train", "train")
    swap = {"train": "test", "test": "train"}
    arrays = {f"{swap[key.split('_')[0]]}_{key.split('_')[1]}": value for key, value in _arrays().items()}
    write_npz(tmp_path / "images.npz", arrays)
    before = _head(path)
    with pytest.raises(PolicyRefusal, match="56 images and 28 patients on the other side .* Put them back"):
        _approve(path, SECOND)
    with pytest.raises(PolicyRefusal, match="on the other side"):
        _approve(path, STUDY)
    assert _head(path) == before
    write_npz(tmp_path / "images.npz", _arrays())
    _approve(path, SECOND)


def test_an_exact_copy_on_both_sides_is_refused(tmp_path):
    arrays = _arrays()
    arrays["test_images"][3] = arrays["train_images"][5]
    with pytest.raises(PolicyRefusal, match="1 image in train and in the holdout at once"):
        _approve(_hospital(tmp_path, arrays=arrays))


def test_the_same_records_under_a_second_ledger_of_this_machine_are_refused(tmp_path):
    first = _hospital(tmp_path / "a")
    second = _hospital(tmp_path / "b", "hospital-b")
    _approve(first)
    with pytest.raises(
        PolicyRefusal, match="counted in the ledger of site hospital-a at .* already: 56 images and 28 patients"
    ):
        _approve(second)
    with closing(load_site_config(first).ledger()) as ledger:
        ledger.revoke(STUDY.sha256, by="Dr. A")
    _approve(second)  # nothing was spent there, and nothing more can be
    with pytest.raises(PolicyRefusal, match="hospital-b"):
        _approve(first)


def test_one_name_has_one_ledger_however_it_came_to_it(tmp_path):
    """Before: `init` saw to it, and a name that was written into another site file later was taken without a word."""
    first, second = _hospital(tmp_path / "a"), _hospital(tmp_path / "b", "hospital-b")
    second.write_text(second.read_text().replace('name = "hospital-b"', 'name = "hospital-a"'))
    with pytest.raises(StorageError, match="site hospital-a has another ledger at"):
        _approve(second)
    _approve(first)


def test_while_a_second_ledger_of_the_machine_cannot_be_read_nothing_is_approved(tmp_path):
    """Its images may be the same ones: a folder that is not mounted would else be a fresh account for them."""
    first, second = _hospital(tmp_path / "a"), _hospital(tmp_path / "b", "hospital-b")
    _approve(first)
    (tmp_path / "a" / "state" / "ledger.head").rename(tmp_path / "head")
    with pytest.raises(PolicyRefusal, match="the ledger of site hospital-a at .* cannot be read") as refused:
        _approve(second)
    assert "take its row out of" in refused.value.remedy
    (tmp_path / "head").rename(tmp_path / "a" / "state" / "ledger.head")
    with pytest.raises(PolicyRefusal, match="counted in the ledger of site hospital-a"):
        _approve(second)


def test_a_study_whose_public_set_is_this_sites_own_file_is_refused(tmp_path):
    """Public images are read without noise; a site knows its own file by the hash that the study names."""
    path = _hospital(tmp_path / "a")
    public = {"source": "npz", "sha256": sha256_file(tmp_path / "a" / "images.npz")}
    mine, other = (
        tiny_study(privacy={"unit": "patient"}, pretrain=named) for named in (public, {**public, "sha256": "0" * 64})
    )
    for study, refused in ((mine, True), (other, False)):
        site = Site.open(path, study)
        with closing(open_ledger(site.config.name, site.state, site.config.registry)) as ledger:
            rules = [refusal.where for refusal in judge(site, ledger, study, plan_study(study)).refusals]
        assert ("pretrain.sha256" in rules) == refused


def test_a_ceiling_is_not_promised_twice(tmp_path):
    """An approved study may still spend all of its plan, so another one has only what that leaves."""
    path = _hospital(tmp_path)  # whose ceiling is 8, as that of either study
    _approve(path)
    with pytest.raises(BudgetError, match="over the ceiling"):
        _approve(path, SECOND)
    with closing(load_site_config(path).ledger()) as ledger:
        ledger.revoke(STUDY.sha256, by="Dr. B. Example")
    assert _approve(path, SECOND)[0].study == SECOND.sha256


def test_a_study_of_the_same_name_that_is_approved_already_is_a_warning(tmp_path):
    path = _hospital(tmp_path / "a", max_epsilon=50.0)
    assert not [w for w in _approve(path)[1].warnings if "of this name" in w]
    other = tiny_study(privacy={"unit": "patient"}, training={"rounds": 1})
    assert other.study.name == STUDY.study.name and other.sha256 != STUDY.sha256
    (said,) = [w for w in _approve(path, other)[1].warnings if "of this name" in w]
    assert STUDY.sha256[:12] in said and other.sha256[:12] not in said


def test_a_file_of_images_that_is_not_there_is_said_before_anything_takes_long(tmp_path):
    config = load_site_config(_hospital(tmp_path / "a"))
    config.require_images()
    (tmp_path / "a" / "images.npz").unlink()
    assert config.missing == tmp_path / "a" / "images.npz"
    with pytest.raises(DataError, match=r"images\.npz: no such file\. Put the images there"):
        config.require_images()


def test_patients_that_are_known_and_not_protected_are_a_warning(tmp_path):
    study = tiny_study()
    warnings = _approve(_hospital(tmp_path, unit="image"), study)[1].warnings
    assert any("grows with the number of their images, which is up to 2" in warning for warning in warnings)


def test_a_copied_ledger_and_an_older_one_are_refused_and_a_moved_one_is_not(tmp_path):
    path = _hospital(tmp_path)
    state = tmp_path / "state"
    shutil.copytree(state, tmp_path / "older")
    _approve(path)
    shutil.copytree(state, tmp_path / "copy")
    path.write_text(path.read_text().replace('state = "state"', 'state = "copy"'))
    with pytest.raises(StorageError, match="this ledger is a copy of the one at .*state"):
        _approve(path)
    shutil.rmtree(state)
    _approve(path)  # now it is the only one
    shutil.rmtree(tmp_path / "copy")
    (tmp_path / "older").rename(tmp_path / "copy")
    with pytest.raises(StorageError, match="had 3 entries before and lacks some of them: an older backup"):
        _approve(path)


def test_a_ledger_is_begun_once_whatever_became_of_its_folder(tmp_path):
    path = _hospital(tmp_path)
    shutil.rmtree(tmp_path / "state")
    for name, folder in (("hospital-a", "elsewhere"), ("hospital-x", "state")):
        new = tmp_path / f"{name}-{folder}.toml"
        new.write_text(path.read_text().replace("hospital-a", name).replace('state = "state"', f'state = "{folder}"'))
        with pytest.raises(StorageError, match="restore its state folder from backup"):
            begin(new, None, None)
    with pytest.raises(StorageError, match="restore its state folder"):
        begin(tmp_path / "third.toml", "hospital-a", Path("images.npz"))
    assert not (tmp_path / "third.toml").exists()
    assert not (tmp_path / "state").exists()


def test_a_moved_site_file_says_where_its_ledger_is(tmp_path):
    _hospital(tmp_path)
    with pytest.raises(StorageError, match=f"site hospital-a has one at {tmp_path / 'state'}"):
        open_ledger("hospital-a", tmp_path / "new" / "state", None)
    with pytest.raises(StorageError, match="there is no ledger here. A new site begins one with synthward-site init"):
        open_ledger("hospital-z", tmp_path / "new" / "state", None)
    assert not (tmp_path / "new").exists()


def test_a_damaged_list_of_ledgers_stops_an_approval_and_no_other_command(tmp_path):
    path = _hospital(tmp_path)
    Registry(None).path.write_text("[{]")
    with pytest.raises(StorageError, match="list of this machine's ledgers cannot be read"):
        _approve(path)
    open_ledger("hospital-a", tmp_path / "state", None).close()
    Registry(None).path.unlink()
    _approve(path)
    assert [known.site for known in Registry(None).known()] == ["hospital-a"]


@given(st.text(alphabet=st.characters(blacklist_characters="\x00"), max_size=60))
@example("Dr. Zoë Ångström, Datenschutz")
@example("Zoe\u0308 A")
@example("a\u202eb c")
@example("ab\ncd")
@example("\ud800 Ab")
@example("x" * 201)
def test_a_name_is_kept_clean_or_not_at_all(by):
    try:
        name = clean_name(by)
    except DataError as error:
        said = str(error)
    else:
        said = ""
        _is_clean(name)
    assert said == "" or said.isprintable()


def _is_clean(name):
    assert name.isprintable()
    assert name == unicodedata.normalize("NFC", name) == " ".join(name.split())
    assert sum(c.isalpha() for c in name) >= 2
    assert len(name) <= 200
    assert clean_name(name) == name


def test_a_study_is_found_by_its_first_digits_or_its_name_and_never_by_half(tmp_path):
    with closing(Ledger.create(tmp_path / "state")) as ledger:
        path = _hospital(tmp_path / "h", max_epsilon=50.0)
        site = Site.open(path, STUDY)
        twin = tiny_study(study={"seed": 9}, privacy={"unit": "patient"})
        for study in (STUDY, SECOND, twin):
            ledger.approve(study, plan_study(study), site.fingerprints(ledger.key), by="Dr. A")
        assert chosen(ledger, sha256=SECOND.sha256[:9].upper(), name=None).name == "second"
        assert chosen(ledger, sha256=None, name="second").study == SECOND.sha256
        for digest, name in ((None, "tiny"), ("", None), (None, "secon")):
            with pytest.raises(DataError, match="fits 2 approved|not approved here"):
                chosen(ledger, sha256=digest, name=name)


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=60)
@example("hospital-a", 'im"ages\n\\.npz')
@example("hospital-a", "🩻/Röntgen.npz")
def test_a_site_file_says_what_was_given_or_is_not_written(name, data):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", folder)
        path = Path(folder) / "site.toml"
        try:
            config = begin(path, name, Path(data))
        except SynthwardError:
            config = None
        if config is None:
            assert not path.exists()
            assert not (path.parent / "state").exists()
            return
        assert config.name == name
        assert config.data.path == Path(folder).resolve() / data
        assert config.policy == SitePolicy(max_epsilon=8.0, max_study_epsilon=8.0, min_units=50)
        assert path.stat().st_mode & 0o777 == 0o600
