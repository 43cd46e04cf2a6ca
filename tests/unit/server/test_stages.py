"""The server's stages against made-up sites: what is asked, what is taken, and that no answer can spoil the model."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

from common.errors import FederationError
from common.features import directions_of
from common.loss_curve import mean_loss, scale
from common.metrics import vector_length
from common.model.diffusion_model import initial_weights, load_model, space_of
from common.model.weights import LARGEST_WEIGHT
from common.protocol import (
    CanaryReply,
    EnrolReply,
    FeaturesReply,
    MomentsReply,
    Refusal,
    TrainReply,
    Unreachable,
    ValidateReply,
)
from server.checkpoints import RunFolder
from server.federation.screening import LARGEST_COUNT
from server.progress import Progress
from server.session import Session
from server.stages.canary import canary, largest_messages
from server.stages.enrol import enrol
from server.stages.features import features
from server.stages.moments import moments
from server.stages.train import train
from server.stages.validate import validate
from support.answers import ScriptedSites, answer, facts, member, spent
from support.studies import agreement, tiny_study

FEDAVG = tiny_study(training={"rounds": 1})
FEDSGD = tiny_study(training={"rounds": 1, "algorithm": "fedsgd", "local_steps": 1, "parameters": "bias"})
BATCH = 0.2 * 70  # sample_rate × counts of a made-up member


def _session(tmp_path, study, by_node, *, members=(1, 2, 3)):
    impatient = study.federation.model_copy(update={"timeout_seconds": 0.05})  # it is asked again for as long
    study = study.model_copy(update={"federation": impatient})
    agreed, sites, out = agreement(study), ScriptedSites(by_node), io.StringIO()
    folder = RunFolder.create(tmp_path, study, agreed.plan)
    session = Session(agreed, folder, sites.group, Progress(folder, out), {n: member(n) for n in members})
    return session, sites, out


def _names(study):
    model = load_model(study, initial_weights(study))
    return {n: tuple(model.state_dict()[n].shape) for n in model.set_trainable(study.training.parameters)}


def _update(study, value=0.0, *, loss=0.0, changed=None):
    arrays = {name: np.full(shape, value, np.float32) for name, shape in _names(study).items()}
    return {**arrays, "loss": np.array([loss], np.float32), **(changed or {})}


def _train_answers(study, bad):
    return {
        1: answer(1, TrainReply(round=1), _update(study)),
        2: bad,
        3: answer(3, TrainReply(round=1), _update(study)),
    }


FIRST = next(iter(_names(FEDSGD)))
SHAPE = _names(FEDSGD)[FIRST]
SPOILT = {
    "float64": {FIRST: np.full(SHAPE, 1e300)}, "over the bound": {FIRST: np.full(SHAPE, 3e38, np.float32)},
    "not finite": {FIRST: np.full(SHAPE, np.inf, np.float32)}, "int32": {FIRST: np.ones(SHAPE, np.int32)},
    "has shape": {FIRST: np.zeros((2, 2, 2), np.float32)}, "wrong names": {"other": np.zeros(1, np.float32)},
    "loss of norm": {"loss": np.array([3e38], np.float32)}, "'loss' has": {"loss": np.array([np.nan], np.float32)},
    "'loss' is": {"loss": np.array([1.0])}, "'loss' has shape": {"loss": np.zeros(2, np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("study", [FEDSGD, FEDAVG], ids=["fedsgd", "fedavg"])
@pytest.mark.parametrize("reason", list(SPOILT))
def test_a_spoilt_update_is_named_and_leaves_the_weights_as_the_other_sites_make_them(tmp_path, study, reason):
    bad = answer(2, TrainReply(round=1), _update(study, changed=SPOILT[reason]))
    session, _, out = _session(tmp_path, study, _train_answers(study, bad))
    state = train(session)
    assert state.rows[0].accepted == ["site-1", "site-3"]
    assert reason in state.rows[0].rejected["site-2"]
    assert reason in out.getvalue()
    assert session.members[2].open_question
    for name, array in initial_weights(study).items():  # the others said nothing but zero
        assert np.array_equal(state.weights[name], array), name


@pytest.mark.parametrize("study", [FEDSGD, FEDAVG], ids=["fedsgd", "fedavg"])
def test_the_largest_update_that_is_taken_leaves_every_weight_one_that_a_site_takes(tmp_path, study):
    names = _names(study)
    shape = names[next(iter(names))]
    wide = tiny_study(training={**study.training.model_dump(), "max_update_norm": 1e30})
    for value in (1e3, 1e12, 3e38):
        update = _update(wide, changed={next(iter(names)): np.full(shape, value, np.float32)})
        session, _, _ = _session(tmp_path, wide, {n: answer(n, TrainReply(round=1), update) for n in (1, 2, 3)})
        try:
            state = train(session)
        except FederationError:  # all three are left out
            continue
        for name, array in {**state.weights, **state.ema}.items():
            assert np.isfinite(array).all() and np.abs(array).max() <= LARGEST_WEIGHT, name


@pytest.mark.parametrize("study", [FEDSGD, FEDAVG], ids=["fedsgd", "fedavg"])
def test_a_step_does_not_pass_the_bound_of_a_weight(tmp_path, study, monkeypatch):
    monkeypatch.setattr("server.stages.train.LARGEST_WEIGHT", 0.01)
    said = {n: answer(n, TrainReply(round=1), _update(study, 1e-3)) for n in (1, 2, 3)}
    state = train(_session(tmp_path, study, said)[0])
    assert max(float(np.abs(state.weights[name]).max()) for name in _names(study)) == np.float32(0.01)


def test_an_answer_of_another_round_is_dropped(tmp_path):
    bad = answer(2, TrainReply(round=2), _update(FEDSGD))
    session, _, _ = _session(tmp_path, FEDSGD, _train_answers(FEDSGD, bad))
    assert "another question (round 2)" in train(session).rows[0].rejected["site-2"]


@pytest.mark.parametrize("study", [FEDSGD, FEDAVG], ids=["fedsgd", "fedavg"])
def test_the_loss_curve_is_the_mean_loss_over_the_records_of_the_sites(tmp_path, study):
    steps, norm = study.training.local_steps, study.training.max_grad_norm
    sums = {1: 0.5, 2: 0.7, 3: 0.9}
    said = {
        n: answer(n, TrainReply(round=1), _update(study, loss=mean * scale(norm) * BATCH * steps))
        for n, mean in sums.items()
    }
    session, _, _ = _session(tmp_path, study, said)
    assert train(session).rows[0].loss == pytest.approx(0.7, rel=1e-5)
    assert mean_loss(scale(norm) * BATCH * steps, max_grad_norm=norm, expected_batch=BATCH, steps=steps) == 1.0


def test_a_fedsgd_round_steps_against_the_sites_common_gradient(tmp_path):
    rate = FEDSGD.training.learning_rate
    said = {n: answer(n, TrainReply(round=1), _update(FEDSGD, 0.001 * n)) for n in (1, 2, 3)}
    session, sites, _ = _session(tmp_path, FEDSGD, said)
    state, start = train(session), initial_weights(FEDSGD)
    for name in _names(FEDSGD):
        np.testing.assert_allclose(state.weights[name], start[name] - rate, atol=rate * 1e-3, err_msg=name)
    request, arrays = sites.asked[0][1]
    assert (request.round, request.expected_batch) == (1, pytest.approx(BATCH))
    assert set(arrays) == set(start)


OUT = Refusal(kind="BudgetError", what="over the ceiling")


def test_training_ends_early_where_the_sites_have_no_budget_left_and_stops_where_they_just_fail(tmp_path):
    session, _, out = _session(tmp_path, FEDSGD, {n: answer(n, OUT, {}, spent=spent(8.0)) for n in (1, 2, 3)})
    assert train(session).round == 0
    assert "training ends after round 0: the budget of 3 sites is used" in out.getvalue()
    session, _, _ = _session(tmp_path, FEDSGD, {1: answer(1, TrainReply(round=1), _update(FEDSGD))})
    with pytest.raises(FederationError, match=r"1 usable answers in 'round 1', 2 needed \(site-2: no answer"):
        train(session)


def test_a_training_that_ended_is_not_taken_up_again(tmp_path):
    """Images may have been drawn of its weights."""
    session, _, _ = _session(tmp_path, FEDSGD, {n: answer(n, OUT, {}, spent=spent(8.0)) for n in (1, 2, 3)})
    assert train(session).round == 0
    session.group = ScriptedSites({n: answer(n, TrainReply(round=1), _update(FEDSGD)) for n in (1, 2, 3)}).group
    assert train(session).round == 0


def _enrol_answers(**spoilt):
    honest = {n: answer(n, EnrolReply(), {"counts": np.array([30.0, 10.0 * n])}) for n in (1, 2, 3)}
    return {n: spoilt.get(f"site_{n}", data) for n, data in honest.items()}


def test_sites_enrol_with_their_counts_and_stay_in_the_record_of_the_run(tmp_path):
    session, _, _ = _session(tmp_path, FEDSGD, _enrol_answers(site_2=b"garbage"), members=())
    (session.folder.path / "sites").mkdir()
    for n in (1, 2, 3):
        (session.folder.path / "sites" / f"site-{n}.toml").touch()
    session.folder.keep_result("enrol", {
        "gone": {"phantoms": False, "random_source": "old"}, "site-1": {"phantoms": True, "random_source": "SEEDED"},
    })  # fmt: skip
    enrol(session, session.online())
    assert {m.name: m.counts for m in session.members.values()} == {"site-1": [30.0, 10.0], "site-3": [30.0, 30.0]}
    assert session.folder.result("enrol") == {
        "gone": {"phantoms": False, "random_source": "old"},
        "site-1": {"phantoms": True, "random_source": "AES-CTR; SEEDED", "node": 1},
        "site-3": {"phantoms": True, "random_source": "AES-CTR", "node": 3},
    }


def test_counts_that_no_site_can_have_are_dropped(tmp_path):
    vast = answer(2, EnrolReply(), {"counts": np.array([2 * LARGEST_COUNT, 1.0])})
    study = tiny_study(federation={"min_sites": 3})
    session, _, _ = _session(tmp_path, study, _enrol_answers(site_2=vast), members=())
    with pytest.raises(FederationError, match="site-2: counts of norm 2e\\+09, over the bound"):
        enrol(session, session.online())


def _sums(study, value=0.0, **changed):
    space, classes = space_of(study), len(study.data.classes)
    return {
        "means": np.full((classes, space.dimension), value), "second_moments": np.full(space.packed, value),
        "band_power": np.full((classes, space.band_count), value), "norm": np.full(1, value), **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"norm": np.array([1e300])}, "over the bound"), ({"norm": np.array([1e4])}, "over the bound"),
     ({"norm": np.zeros(2)}, "has shape"), ({"means": np.zeros(3, np.float32)}, "is float32"),
     ({"squares": np.zeros(1)}, "wrong names"), ({"norm": np.array([np.nan])}, "not finite")],
)  # fmt: skip
def test_bad_moments_are_dropped_and_the_prior_is_that_of_the_other_sites(tmp_path, changed, reason):
    said = {n: answer(n, MomentsReply(), _sums(FEDSGD, 0.1)) for n in (1, 3)}
    session, sites, out = _session(tmp_path, FEDSGD, {**said, 2: answer(2, MomentsReply(), _sums(FEDSGD, **changed))})
    moments(session, None)
    assert "moments: site-2 left out: " in out.getvalue() and reason in out.getvalue()
    state = session.folder.last_checkpoint()
    assert state is not None and all(np.isfinite(array).all() for array in state.weights.values())
    assert sites.asked[0][2][0].counts == (40.0, 30.0)
    for file in (session.folder.path / "checkpoints").glob("round-*"):
        file.unlink()
    session.group = ScriptedSites({}).group
    moments(session, None)  # a stop before the checkpoint: what the sites said is kept
    again = session.folder.last_checkpoint()
    assert again is not None and all(np.array_equal(again.weights[n], a) for n, a in state.weights.items())


def _feature_sums(study, value=0.1, **changed):
    classes, many = len(study.data.classes), directions_of(study)
    return {
        "means": np.full((classes, many), value),
        "second_moments": np.full(many * (many + 1) // 2, value),
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"means": np.full((2, directions_of(FEDSGD)), 1e4)}, "over the bound"), ({"means": np.zeros(2)}, "has shape"),
     ({"second_moments": np.zeros(3, np.float32)}, "is float32"), ({"norm": np.zeros(1)}, "wrong names")],
)  # fmt: skip
def test_bad_features_are_dropped_and_the_teacher_is_that_of_the_other_sites(tmp_path, changed, reason):
    said = {n: answer(n, FeaturesReply(), _feature_sums(FEDSGD)) for n in (1, 3)}
    bad = answer(2, FeaturesReply(), _feature_sums(FEDSGD, **changed))
    session, sites, out = _session(tmp_path, FEDSGD, {**said, 2: bad})
    teacher = features(session)
    assert "features: site-2 left out: " in out.getvalue() and reason in out.getvalue()
    assert teacher is not None and teacher.weights.shape == (directions_of(FEDSGD), 2)
    session.group = ScriptedSites({}).group
    again = features(session)  # what the sites said is kept
    assert again is not None and np.array_equal(again.weights, teacher.weights)
    (session.folder.path / "checkpoints" / "features.safetensors").write_bytes(b"spoilt")
    session.group, asked = sites.group, sites.asked[0][1][1]["directions"]
    features(session)
    assert np.array_equal(sites.asked[1][1][1]["directions"], asked), "the very same question: sites have its answer"


def test_a_study_without_features_asks_for_none_and_draws_no_more_than_it_keeps(tmp_path):
    study = tiny_study(privacy={"features_share": 0.0})
    session, sites, _ = _session(tmp_path, study, {})
    assert features(session) is None and not sites.asked


def _scores(study, value=1.0, names=("synthetic", "reference")):
    length = vector_length(len(study.data.classes), study.validation.bins)
    return {name: np.full(length, value) for name in names}


@pytest.fixture
def validated(tmp_path, monkeypatch):
    """Validate with these answers; the classifier's training is left out."""
    monkeypatch.setattr("server.stages.validate._classifier", lambda *_: {})

    def run(by_node):
        session, _, out = _session(tmp_path, FEDSGD, by_node)
        return validate(session, None), out  # pyright: ignore[reportArgumentType]

    return run


def test_figures_are_of_the_sites_that_answered_and_a_missing_reference_is_no_fault(validated):
    said = {n: answer(n, ValidateReply(), _scores(FEDSGD)) for n in (1, 2)}
    found, _ = validated({**said, 3: answer(3, ValidateReply(), _scores(FEDSGD, names=("synthetic",)))})
    assert {site: sorted(of) for site, of in found.by_site.items()} == {
        "site-1": ["reference", "synthetic"], "site-2": ["reference", "synthetic"], "site-3": ["synthetic"],
    }  # fmt: skip
    assert sum(found.prevalence) == pytest.approx(1.0)
    assert found.merged["synthetic"].support[0].value > found.merged["reference"].support[0].value


@pytest.mark.parametrize("arrays", [
    _scores(FEDSGD, 1e300), _scores(FEDSGD, math.nan), _scores(FEDSGD, names=("reference",)), {},
    {"synthetic": np.zeros(3)}, {**_scores(FEDSGD), "third": np.zeros(1)},
])  # fmt: skip
def test_bad_scores_are_dropped(validated, arrays):
    said = {n: answer(n, ValidateReply(), _scores(FEDSGD)) for n in (1, 3)}
    found, out = validated({**said, 2: answer(2, ValidateReply(), arrays)})
    assert list(found.by_site) == ["site-1", "site-3"]
    assert "validate: site-2 left out" in out.getvalue()
    assert math.isfinite(found.merged["synthetic"].auc_macro.value)


def test_facts_of_the_test_are_those_of_its_members():
    assert member(2).facts == facts(2)


def test_a_site_that_is_asked_again_gets_what_is_left_of_the_time_and_keeps_its_name_and_reason(tmp_path, monkeypatch):
    """Before: the last question had no time at all, was paid for by whoever was back, and left but a node's number."""
    monkeypatch.setattr("server.session._AGAIN_SECONDS", 0.1)
    body = Unreachable(carrier="hospital-b", what="its process does not answer (UNAVAILABLE)", again=True)
    away = answer(2, body, {}, site=None, spent=None)
    session, sites, out = _session(
        tmp_path, FEDAVG, lambda _: {1: answer(1), 2: away} if len(sites.asked) == 1 else {1: answer(1)}
    )
    session.agreement.study.federation.__dict__["timeout_seconds"] = 0.6
    assert session.agreement.study.federation.min_sites == 2
    session.members.clear()
    with pytest.raises(FederationError, match=r"hospital-b \(node 2, by its carrier\): no answer"):
        enrol(session, session.online())
    first, *again = sites.seconds
    assert first is None and again and all(0.1 <= left <= 0.5 for left in again) and again == sorted(again)[::-1]
    assert all(asked.keys() == {2} for asked in sites.asked[1:])
    assert "its process does not answer (UNAVAILABLE)" in out.getvalue()


def test_a_site_of_an_earlier_process_is_named_when_it_is_silent_after_a_resume(tmp_path):
    session, _, _ = _session(tmp_path, FEDAVG, {1: answer(1), 2: "no answer"})
    session.folder.keep_result("enrol", {"hospital-b": {"node": 2, "phantoms": True, "random_source": "x"}})
    session.members.clear()
    with pytest.raises(FederationError, match=r"hospital-b \(node 2, as it was known before\): no answer"):
        enrol(session, session.online())


def _canary_answers(study, **changed):
    _, back = largest_messages(study)
    good = {"zeros": np.zeros(back, np.float32)}
    return {n: changed.get(f"site_{n}", answer(n, CanaryReply(), good)) for n in (1, 2, 3)}


@pytest.mark.parametrize(
    "study", [FEDAVG, FEDSGD, tiny_study(data={"image_size": 32}), tiny_study(network={"width": 32})]
)
def test_the_canary_is_as_large_as_the_largest_message_either_way(tmp_path, study):
    session, sites, _ = _session(tmp_path, study, _canary_answers(study), members=())
    assert canary(session, [1, 2, 3]) == [1, 2, 3]
    request, arrays = sites.asked[0][1]
    there = arrays["zeros"].nbytes
    assert request.stage == "canary" and there >= sum(a.nbytes for a in initial_weights(study).values())
    update = _update(study)
    assert 4 * request.numbers >= sum(a.nbytes for a in update.values())
    assert 4 * request.numbers >= sum(a.nbytes for a in _sums(study).values())
    assert not session.members


def test_a_site_that_does_not_answer_the_canary_is_not_asked_to_spend(tmp_path):
    short = answer(2, CanaryReply(), {"zeros": np.zeros(3, np.float32)})
    session, _, out = _session(tmp_path, FEDAVG, _canary_answers(FEDAVG, site_2=short), members=())
    assert canary(session, [1, 2, 3]) == [1, 3]
    assert "canary    site-2 left out" in out.getvalue()
    assert not [event for event in session.folder.events() if event["event"] == "warning"]  # the report shows those


def test_too_few_answers_to_the_canary_end_the_run_before_anything_is_spent(tmp_path):
    session, sites, _ = _session(
        tmp_path, FEDAVG, _canary_answers(FEDAVG, site_2=b"", site_3="its carrier failed"), members=()
    )
    with pytest.raises(FederationError, match="1 usable answers in 'canary', 2 needed"):
        canary(session, [1, 2, 3])
    assert {request.stage for asked in sites.asked for request, _ in asked.values()} == {"canary"}


def test_there_is_no_canary_once_sites_have_paid(tmp_path):
    session, sites, _ = _session(tmp_path, FEDAVG, {}, members=())
    session.folder.keep_result("enrol", {})
    assert canary(session, [4, 5]) == [4, 5] and not sites.asked
