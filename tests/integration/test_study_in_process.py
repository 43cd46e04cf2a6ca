"""The whole path with both real apps in one process: honest sites, bad sites, stops and resumes."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from client.privacy.ledger import Ceiling, Ledger
from client.site import Site
from common.claims import Claim
from common.errors import FederationError, StorageError
from common.model.diffusion_model import load_model
from common.protocol import TrainReply
from server import pipeline
from server.checkpoints import RunFolder
from server.federation.sites import SiteGroup
from server.progress import Progress
from server.release.checksums import verify_checksums
from server.stages import train as train_stage
from support.grid import InProcessGrid, tampered
from support.sites import approve, make_site
from support.studies import agreement, tiny_study

STUDY = tiny_study()


class _Run:
    def __init__(self, tmp_path, study=STUDY, policies=("", "", "")):
        self.study = study
        self.folder = RunFolder.create(tmp_path / "runs", study, agreement(study).plan)
        (tmp_path / "hospitals").mkdir(parents=True)
        self.files = [
            make_site(tmp_path / "hospitals", f"site-{index + 1}", index=index, policy=policy)
            for index, policy in enumerate(policies)
        ]
        for path in self.files:
            approve(Site.open(path, study), study)
        self.out = io.StringIO()
        self.grid = InProcessGrid(self.files)

    def go(self, timeout=20.0):
        self.grid = self.grid or InProcessGrid(self.files)
        group = SiteGroup(self.grid, timeout_seconds=timeout)
        return pipeline.run(RunFolder.open(self.folder.path), group, Progress(self.folder, self.out))

    def ledger(self, number):
        return Ledger.open(self.files[number - 1].parent / f"site-{number}")

    def asked(self, number):
        return [entry.body["mechanism"] for entry in self.ledger(number).entries() if entry.kind == "reserved"]

    def metrics(self):
        return json.loads((self.folder.release / "metrics.json").read_text())

    def claim(self):
        return Claim.from_json(json.loads((self.folder.release / "claim.json").read_text()))


def test_a_study_runs_to_a_release_and_never_passes_its_epsilon(tmp_path):
    run = _Run(tmp_path)
    report = run.go()
    text = report.read_text()
    assert "PHANTOMS" in text
    assert not re.search(r"<script|@import|url\((?!#)|(src|href)=.(http|//)", text)  # nothing is loaded from anywhere
    with np.load(run.folder.release / "images.npz", allow_pickle=False) as made:
        assert made["train_images"].shape == (24, 16, 16)
        assert set(np.unique(made["train_labels"])) == {0, 1}
    assert len(list((run.folder.release / "images").rglob("*.png"))) == 24
    assert verify_checksums(run.folder.release) == []
    claim = run.claim()
    for number in (1, 2, 3):
        spent = run.ledger(number).spent(delta=1e-5, accountant="rdp")
        assert max(spent.values()) == pytest.approx(claim.sites[number - 1].epsilon)
        assert 0 < max(spent.values()) <= STUDY.privacy.epsilon
    names = [row["name"] for row in run.metrics()["validation"]]
    assert names[0].startswith("trained on the synthetic")
    assert names[1].startswith("reference")
    assert names[2] == "chance"
    assert {event["event"] for event in run.folder.events()} >= {"begin", "stage", "step", "end"}


def test_a_changed_released_file_is_noticed(tmp_path):
    run = _Run(tmp_path)
    run.go()
    (run.folder.release / "claim.json").write_text("{}")
    (run.folder.release / "images" / "extra.png").write_bytes(b"x")
    assert verify_checksums(run.folder.release) == ["claim.json was changed", "images/extra.png is not listed"]


def _nan(answer, arrays):
    next(iter(arrays.values())).flat[0] = np.nan
    return answer, arrays


def _each(change):
    return lambda answer, arrays: (answer, {name: change(array) for name, array in arrays.items()})


TAMPERINGS = {
    "not finite": _nan,
    "over the bound": _each(lambda array: array + np.float32(1e3)),
    "has shape": lambda answer, arrays: (answer, {**arrays, "net.embed.weight": np.zeros((2, 2), np.float32)}),
    "wrong names": lambda answer, arrays: (answer, {"other": np.zeros(2, np.float32)}),
    "not float32": _each(lambda array: array.astype(np.float64)),
    "another question": lambda a, arrays: (a.model_copy(update={"body": TrainReply(round=99)}), arrays),
}


@pytest.mark.parametrize("reason", list(TAMPERINGS))
def test_a_bad_reply_is_dropped_named_and_counted_and_the_study_goes_on(tmp_path, reason):
    run = _Run(tmp_path)
    run.grid.tamper[2] = tampered(TAMPERINGS[reason], stage="train")
    run.go()
    rows = run.folder.last_checkpoint().rows
    assert [row.accepted for row in rows] == [["site-1", "site-3"]] * 2
    assert all(reason in row.rejected["site-2"] for row in rows)
    assert "site-2" in run.out.getvalue()


@pytest.mark.parametrize("value", [b'"x"', b"null", b"-1.0", b"[1]"])
def test_one_ill_typed_answer_does_not_end_the_study(tmp_path, value):
    """Every answer of site 2 but its first two (canary, enrol) says something else than a number of what it spent."""
    run, answers = _Run(tmp_path, tiny_study(training={"rounds": 1})), []

    def tamper(data):
        answers.append(data)
        return data if len(answers) <= 2 else re.sub(rb'"train":[0-9.]+', b'"train":' + value, data, count=1)

    run.grid.tamper[2] = tamper
    run.go()
    assert run.folder.last_checkpoint().rows[0].accepted == ["site-1", "site-3"]
    assert len(answers) == 6
    assert (run.claim().sites[1].site, run.claim().sites[1].basis) == ("site-2", "plan")


def test_a_silent_and_a_crashed_site_are_named_and_their_whole_planned_cost_is_claimed(tmp_path):
    run = _Run(tmp_path, tiny_study(federation={"min_sites": 1}))
    original = run.grid.push_messages

    def push(messages):
        messages = list(messages)
        if messages[0].metadata.message_type == "evaluate":
            run.grid.silent, run.grid.crashed = {2}, {3}
        return original(messages)

    run.grid.push_messages = push
    run.go(timeout=8.0)
    claim = run.claim()
    assert [site.basis for site in claim.sites] == ["ledger", "plan", "plan"]
    assert claim.sites[1].epsilon_holdout > 7
    assert "no answer before the deadline" in run.out.getvalue()
    assert "it gave none in time (Flower error 4)" in run.out.getvalue()


def test_too_few_sites_stop_the_run_cleanly_and_a_resume_goes_on_from_the_checkpoint(tmp_path):
    run = _Run(tmp_path, tiny_study(federation={"timeout_seconds": 1}))
    original = run.grid.push_messages
    trained = []

    def push(messages):
        messages = list(messages)
        if messages[0].metadata.message_type == "train":
            trained.append(1)
            run.grid.crashed = {2, 3} if len(trained) > 3 else set()
        return original(messages)

    run.grid.push_messages = push
    with pytest.raises(FederationError, match="1 usable answers in 'round 2', 2 needed.*site-2"):
        run.go()
    assert run.folder.last_checkpoint().round == 1
    run.grid = InProcessGrid(run.files)
    run.go()
    assert [row.round for row in run.folder.last_checkpoint().rows] == [1, 2]
    assert (
        run.ledger(1).counts(STUDY.sha256)[0] == 3 + 2 + 2
    )  # counts, features, moments, two rounds, reference, evaluation
    assert run.ledger(2).counts(STUDY.sha256)[0] == 3 + 2 + 2


def test_a_site_that_took_part_and_is_gone_after_a_resume_stays_in_the_claim(tmp_path, monkeypatch):
    run = _Run(tmp_path)
    monkeypatch.setattr(pipeline, "generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.go()  # trained, then stopped
    monkeypatch.undo()
    run.grid = InProcessGrid(run.files[:2])
    run.go()
    claim = run.claim()
    assert [(site.site, site.basis) for site in claim.sites] == [
        ("site-1", "ledger"), ("site-2", "ledger"), ("site-3", "plan"),
    ]  # fmt: skip
    assert claim.sites[2].epsilon_train >= run.ledger(3).spent(delta=1e-5, accountant="rdp")["train"]


def test_a_second_pass_over_a_finished_run_spends_nothing(tmp_path):
    run = _Run(tmp_path)
    run.go()
    before = [run.ledger(n).counts(STUDY.sha256) for n in (1, 2, 3)]
    claim = run.claim()
    run.go()
    assert [run.ledger(n).counts(STUDY.sha256) for n in (1, 2, 3)] == before
    assert run.claim() == claim


def test_a_site_whose_policy_forbids_the_study_is_left_out_with_its_reason(tmp_path):
    run = _Run(tmp_path, policies=("", "max_epsilon = 2.0", ""))
    run.go()
    assert "site-2" not in run.metrics()["epsilon"]["sites"]
    assert "epsilon 8 asked, 2 allowed" in run.out.getvalue()
    assert run.ledger(2).counts(STUDY.sha256) == (0, 0)


def test_a_round_that_was_paid_for_but_lost_ends_training_early_not_over_the_ceiling(tmp_path, monkeypatch):
    """Every site is killed in the middle of round 1: one round's budget is gone, one round is left."""
    import client.stages.train as stage

    run = _Run(tmp_path)
    original = stage._Step.noisy_sum
    monkeypatch.setattr(stage._Step, "noisy_sum", lambda self, permit: 1 / 0)
    with pytest.raises(FederationError, match="the site cannot answer now"):
        run.go()
    monkeypatch.setattr(stage._Step, "noisy_sum", original)
    run.go()
    assert run.folder.last_checkpoint().round == 1
    assert "training ends after round 1" in run.out.getvalue()
    assert max(site.epsilon for site in run.claim().sites) <= STUDY.privacy.epsilon


def test_a_site_whose_ceiling_is_reached_stops_by_itself_and_the_study_ends_cleanly_with_the_others(tmp_path):
    study = tiny_study(training={"rounds": 4})
    run = _Run(tmp_path, study, policies=("", "max_epsilon = 8.0", ""))
    plan = run.folder.plan()
    ledger = run.ledger(2)  # an earlier study, at another clipping norm, has spent on the same records
    wide = Ceiling(1e3, 1e-5, "rdp")
    train = plan["train"]
    earlier = train.model_copy(update={"steps": train.steps * 2, "releases": 1, "sensitivity": 0.3})
    ledger.reserve(earlier, study="an earlier study", request="r", study_ceiling=wide, ceiling=wide, approval=None)
    ledger.close()
    run.go()
    rows = run.folder.last_checkpoint().rows
    assert [row.round for row in rows] == [1, 2, 3, 4]
    took_part = ["site-2" in row.accepted for row in rows]
    assert took_part[0] and not took_part[-1] and took_part == sorted(took_part, reverse=True)
    assert "over the ceiling 8 of the site" in rows[-1].rejected["site-2"]
    spent = run.ledger(2).spent(delta=1e-5, accountant="rdp")
    assert max(spent.values()) <= 8.0
    ours = run.ledger(2).spent(delta=1e-5, accountant="rdp", study=study.sha256)
    assert run.claim().sites[1].epsilon_train == pytest.approx(ours["train"])
    refused = [entry for entry in run.ledger(2).entries() if entry.kind == "refused"]
    assert refused[0].body["rule"] == "ledger.ceiling"
    assert float(refused[0].body["asked"]) > 8.0


def test_what_a_site_spent_on_a_lost_answer_is_in_the_claim(tmp_path, monkeypatch):
    """Site 3 fails in the middle of every round: it has spent, has nothing to show for it, and says so."""
    import client.stages.train as stage

    run = _Run(tmp_path)
    original = stage._Step.noisy_sum

    def fail_at_site_3(self, permit):
        if "site-3" in str(permit._gate.facts):
            raise MemoryError
        return original(self, permit)

    monkeypatch.setattr(stage._Step, "noisy_sum", fail_at_site_3)
    run.go()
    assert [row.accepted for row in run.folder.last_checkpoint().rows] == [["site-1", "site-2"]] * 2
    spent = run.ledger(3).spent(delta=1e-5, accountant="rdp")
    claim = run.claim().sites[2]
    assert (claim.site, claim.basis) == ("site-3", "ledger")
    assert claim.epsilon_train == pytest.approx(spent["train"])
    assert claim.epsilon_train > run.claim().sites[0].epsilon_train * 0.5


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    run = _Run(tmp_path)
    run.go()
    newest = run.folder.path / "checkpoints" / "round-00002.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert run.folder.last_checkpoint().round == 1


def test_an_exception_at_a_site_tells_the_server_nothing_about_its_data(tmp_path, monkeypatch):
    import client.service as service

    def leak(*_):
        raise ValueError("patient 4711 has pixel value 3")

    run = _Run(tmp_path)
    monkeypatch.setitem(service.STAGES, "enrol", leak)
    with pytest.raises(FederationError) as caught:
        run.go()
    assert "4711" not in str(caught.value)
    assert "4711" not in run.out.getvalue()
    assert "4711" in (run.files[0].parent / "site-1" / "site.log").read_text()


def test_a_full_disk_stops_with_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    import errno
    import os

    run = _Run(tmp_path)
    original = os.fsync
    state = {"full": False}

    def fsync(handle):
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    saved = RunFolder.save_checkpoint

    def save(self, checkpoint):
        state["full"] = checkpoint.round == 2
        try:
            saved(self, checkpoint)
        finally:
            state["full"] = False

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    with pytest.raises(StorageError, match="no space left"):
        run.go()
    monkeypatch.undo()
    assert run.folder.last_checkpoint().round == 1
    assert not list(run.folder.path.rglob(".round-*"))
    run.go()
    assert run.folder.last_checkpoint().round == 2


def test_moments_are_asked_once_and_their_network_is_the_checkpoint_of_round_0(tmp_path, monkeypatch):
    run = _Run(tmp_path)
    monkeypatch.setattr(pipeline, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.go()  # the moments are there, then it stops
    first = run.folder.last_checkpoint()
    assert first.round == 0
    assert run.ledger(1).counts(STUDY.sha256) == (3, 3)  # counts, features and moments
    monkeypatch.undo()
    run.go()
    assert run.asked(1).count("moments") == run.asked(1).count("features") == 1
    assert [row.round for row in run.folder.last_checkpoint().rows] == [1, 2]


def test_one_fedsgd_step_per_round_is_the_optimizers_step_on_all_sites_sums(tmp_path):
    """Stopped after a round and taken up again: the optimizer goes on, and the prior is as it was."""
    study = tiny_study(training={"algorithm": "fedsgd", "local_steps": 1, "parameters": "bias", "rounds": 3})
    run = _Run(tmp_path, study)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage, "_one_round", _stops_after(1, train_stage._one_round))
        with pytest.raises(KeyboardInterrupt):
            run.go()
    first = run.folder.last_checkpoint()
    assert first.round == 1
    assert int(first.optimizer["steps"][0]) == 1
    start = load_model(study, first.weights)
    trained = set(start.set_trainable("bias"))
    run.go()
    last = run.folder.last_checkpoint()
    assert int(last.optimizer["steps"][0]) == 3
    assert len(last.rows) == 3
    for name, array in last.weights.items():
        assert np.array_equal(array, first.weights[name]) == (name not in trained), name


def _stops_after(rounds, one_round):
    def stopping(session, state):
        if state.round == rounds:
            raise KeyboardInterrupt
        return one_round(session, state)

    return stopping


def test_a_study_without_a_round_is_made_of_the_moments_alone(tmp_path):
    run = _Run(tmp_path, tiny_study(training={"rounds": 0}))
    report = run.go()
    assert sorted(run.asked(1)) == ["counts", "evaluate", "features", "moments", "reference"]
    assert report.is_file()
    assert run.folder.last_checkpoint().round == 0


def test_a_study_without_moments_and_features_asks_for_none(tmp_path):
    run = _Run(tmp_path, tiny_study(privacy={"moments_share": 0.0, "features_share": 0.0}))
    run.go()
    assert set(run.asked(1)) == {"counts", "train", "reference", "evaluate"}


def test_of_the_candidates_as_many_are_released_as_the_study_wants(tmp_path):
    for share, drawn in ((0.25, 72), (0.0, 24)):
        study = tiny_study(privacy={"features_share": share}, generation={"candidates": 3}, training={"rounds": 0})
        run = _Run(tmp_path / str(share), study)
        run.go()
        files = run.folder.path.glob("checkpoints/generated-*/batch-*.npz")
        assert sum(len(np.load(file)["labels"]) for file in files) == drawn
        assert len(np.load(run.folder.release / "images.npz")["train_labels"]) == 24


def test_bad_moments_are_dropped_and_named(tmp_path):
    run = _Run(tmp_path)
    run.grid.tamper[3] = tampered(_nan, stage="moments")
    run.go()
    assert re.search(r"moments: site-3 left out: '\w+' has values that are not finite", run.out.getvalue())


class _Away:
    """The socket of a site whose process is not there for the first `times` that it is asked for."""

    def __init__(self, socket, times):
        self.socket, self.times = socket, times

    def __str__(self):
        self.times -= 1
        return str(self.socket) if self.times < 0 else str(self.socket.parent / "away" / "site-2.sock")


def test_a_site_that_cannot_be_reached_is_named_and_waited_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("server.session._AGAIN_SECONDS", 0.05)
    run = _Run(tmp_path, tiny_study(federation={"min_sites": 3, "timeout_seconds": 30}, training={"rounds": 1}))
    node = run.grid.get_node_ids()[1]
    run.grid.sites[node] = _Away(run.grid.sites[node], times=3)
    run.go()
    text = run.out.getvalue()
    assert text.count("waiting for site-2") == 3 and "its process does not answer (UNAVAILABLE)" in text
    assert "left out" not in text and run.metrics()["rounds"] == 1
    assert run.asked(2).count("counts") == 1


@pytest.mark.slow
def test_it_is_not_waited_for_where_the_others_are_enough_and_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("server.session._AGAIN_SECONDS", 0.05)
    run = _Run(tmp_path, tiny_study(federation={"min_sites": 3, "timeout_seconds": 1}, training={"rounds": 1}))
    node = run.grid.get_node_ids()[1]
    run.grid.sites[node] = _Away(run.grid.sites[node], times=10**6)
    with pytest.raises(
        FederationError,
        match="2 usable answers in 'enrol', 3 needed .site-2 .node 2, by its carr",
    ):
        run.go()
    enough = _Run(tmp_path / "enough", tiny_study(training={"rounds": 1}))
    enough.grid.sites[node] = _Away(enough.grid.sites[node], times=10**6)
    enough.go()
    assert "waiting for" not in enough.out.getvalue()
    assert "enrol: site-2 (node 2, by its carrier) left out: its process does not answer" in enough.out.getvalue()
