"""The study file: one clear line for every mistake, the same hash for the same agreement."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StudyError
from common.study_file import load_study
from support.studies import tiny_study, tiny_toml


def _write(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_a_study_written_out_reads_back_as_the_same_agreement(tmp_path):
    study = load_study(_write(tmp_path, tiny_toml()))
    assert study == tiny_study()
    assert study.sha256 == tiny_study().sha256


def test_settings_of_a_machine_are_no_part_of_the_agreement(tmp_path):
    """Waiting time, simulated sites and where the public set lies: another machine, the same study."""
    here = tiny_study(federation={"timeout_seconds": 5.0}, simulation={"sites": 7, "phantoms_per_site": 90})
    assert here.sha256 == tiny_study().sha256
    assert "simulation" not in here.agreed()
    assert tiny_study(federation={"min_sites": 1}).sha256 != tiny_study().sha256


def test_any_changed_setting_changes_the_hash():
    assert tiny_study(training={"rounds": 3}).sha256 != tiny_study().sha256


@pytest.mark.parametrize(
    ("old", "new", "field", "hint"),
    [
        ("rounds = 2", "round = 2", "training.", "rounds"),
        ("sample_rate = 0.2", "sample_rte = 0.2", "training.sample_rte", "Did you mean 'sample_rate'?"),
        ("epsilon = 8.0", "epsilon = -1.0", "privacy.epsilon", "greater than 0"),
        ("epsilon = 8.0", 'epsilon = "8"', "privacy.epsilon", "must be a number, without quotes (got '8')"),
        ("epsilon = 8.0", "epsilon = true", "privacy.epsilon", "must be a number, without quotes (got True)"),
        ("rounds = 2", "rounds = 2.5", "training.rounds", "must be a whole number"),
        ("own_reference = true", 'own_reference = "no"', "simulation.own_reference", "must be true or false"),
        ('name = "tiny"', 'name = "Tiny Study"', "study.name", "must be of lower case letters, digits and hyphens"),
        ('"clear",', '"clear", 3,', "data.classes.1", "must be text, in quotes"),
        ("depths = [\n    0,", 'depths = [\n    "0",', "network.depths.0", "must be a whole number"),
        ("heads = [\n    1,", "heads = [\n    true,", "network.heads.0", "must be a whole number"),
        ("channels = 1", "channels = true", "data.channels", "must be a number"),
        ("rounds = 2", f"rounds = 0x{5000 * 'f'}", "training.rounds", "a very long number"),
        ("rounds = 2", f"rounds = {5000 * '9'}", "study.toml", "not valid TOML"),
        ("rounds = 2", f"rounds = {5000 * '['}", "study.toml", "not valid TOML"),
        ("[privacy]", f'["{500 * "x"}"]\n[privacy]', "unknown key", "Known keys"),
        ("delta = 1e-05", "delta = 2.0", "privacy.delta", "less than 1"),
        ('accountant = "rdp"', 'accountant = "pvr"', "privacy.accountant", "'prv' or 'rdp'"),
        ("channels = 1", "channels = 2", "data.channels", "1 or 3"),
        ("image_size = 16", "image_size = 17", "network.depths", "halved"),
        ("heads = [\n    1,", "heads = [\n    3,", "network.heads", "divide"),
        ("heads = [\n    1,", "heads = [\n    0,", "network.heads", "greater than or equal to 1"),
        ("depths = [\n    0,", "depths = [\n    400,", "network.depths", "less than or equal to 16"),
        ("width = 8", "width = 513", "network.width", "less than or equal to 512"),
        ("max_grad_norm = 1.0", "max_grad_norm = 1e-44", "training.max_grad_norm", "greater than or equal to 0.001"),
        ("seed = 3", "seed = 18446744073709551616", "study.seed", "less than"),
        ("local_steps = 2", "local_steps = 200001", "training.local_steps", "less than or equal to"),
        ('algorithm = "fedavg"', 'algorithm = "fedsgd"', "training.local_steps", "must be 1"),
        ("components = 4", "components = 16", "moments.components", "not fewer than the 16 px"),
        ("rounds = 2", "rounds = -1", "training.rounds", "greater than or equal to 0"),
        ("[privacy]", "[privcy]", "privcy", "Did you mean 'privacy'?"),
        ("rounds = 2", "rounds = ", "study.toml", "not valid TOML"),
    ],
)
def test_a_mistake_gives_one_line_with_file_field_and_remedy(tmp_path, old, new, field, hint):
    text = tiny_toml()
    assert old in text
    path = _write(tmp_path, text.replace(old, new, 1))
    with pytest.raises(StudyError) as caught:
        load_study(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert field in line
    assert hint in line
    assert caught.value.exit_code == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"nowhere\.toml: cannot read the study file"):
        load_study(tmp_path / "nowhere.toml")


def test_overrides_are_read_as_a_person_types_them(tmp_path):
    words = (
        "privacy.epsilon=.5",
        "training.ema_decay=0.",
        "pretrain.source=npz",
        f"pretrain.sha256={64 * '0'}",
        "simulation.own_reference=False",
        "privacy.accountant=prv",
    )
    study = load_study(_write(tmp_path, tiny_toml()), words)
    assert (study.privacy.epsilon, study.training.ema_decay, study.simulation.own_reference) == (0.5, 0.0, False)
    assert study.pretrain.sha256 == 64 * "0"


def test_overrides_change_one_setting_and_are_checked(tmp_path):
    path = _write(tmp_path, tiny_toml())
    assert load_study(path, ("training.rounds=5", "privacy.accountant=prv")).training.rounds == 5
    for bad, hint in [("rounds=2", "--set"), ("training.rounds", "--set"), ("training.rouns=2", "'rounds'"),
                      ("training.rounds=two", "training.rounds")]:  # fmt: skip
        with pytest.raises(StudyError) as caught:
            load_study(path, (bad,))
        assert hint in str(caught.value)


@given(st.text(max_size=40))
def test_no_override_text_escapes_as_another_kind_of_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("s") / "study.toml"
    path.write_text(tiny_toml())
    with contextlib.suppress(StudyError):  # any other error fails the test
        load_study(path, (text,))


def test_a_study_that_would_learn_nothing_or_draw_what_cannot_be_drawn_is_refused(tmp_path):
    for sections, field in (
        ({"training": {"rounds": 0}, "privacy": {"moments_share": 0.0}}, "training.rounds"),
        ({"data": {"image_size": 8, "channels": 1, "classes": ["a", "b"]}, }, "pretrain.source"),
        ({"pretrain": {"source": "none"}}, "pretrain.source"),
        ({"pretrain": {"source": "none"}, "privacy": {"moments_share": 0.0}}, "pretrain.source"),
        ({"pretrain": {"class_share": 0.5}, "privacy": {"features_share": 0.0}}, "pretrain.class_share"),
        ({"pretrain": {"class_share": 0.5}, "privacy": {"moments_share": 0.0}}, "pretrain.class_share"),
    ):  # fmt: skip
        with pytest.raises(StudyError, match=field):
            tiny_study(**sections)


@pytest.mark.parametrize(
    ("modality", "said", "symmetry"),
    [("radiology", {}, "none"), ("ophthalmology", {}, "hflip"), ("histopathology", {}, "dihedral"),
     ("histopathology", {"symmetry": "none"}, "none")],
)  # fmt: skip
def test_what_an_image_does_not_depend_on_follows_from_the_modality_unless_the_study_says_it(modality, said, symmetry):
    assert tiny_study(study={"modality": modality}, data=said).symmetry == symmetry


@pytest.mark.parametrize("letter", ["\x1b", "\r", "\u3164", "\u202e", "\u2066", "\u200b", "\ufeff", "\x9b", "\u2028"])
@pytest.mark.parametrize("place", ["class", "description"])
def test_text_that_would_not_be_shown_as_it_is_written_is_refused(letter, place):
    text = f"benign{letter}[2K"
    changes = {"data": {"classes": ["clear", text]}} if place == "class" else {"study": {"description": text}}
    with pytest.raises(StudyError) as refused:
        tiny_study(**changes)
    assert str(refused.value).isprintable()


def test_text_in_any_script_is_taken_and_a_file_may_begin_as_notepad_writes_it(tmp_path):
    names = ["健 康", "a\u3000b", "l\u2019\u0153il\u00a0:", "می\u200cخواهم", "Grüße", "क्ष", "👩\u200d⚕️"]
    assert tiny_study(data={"classes": names}).data.classes == tuple(names)
    (tmp_path / "s.toml").write_bytes(b"\xef\xbb\xbf" + tiny_toml().encode())
    assert load_study(tmp_path / "s.toml").sha256 == tiny_study().sha256
