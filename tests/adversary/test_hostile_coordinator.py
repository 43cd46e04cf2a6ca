"""A coordinator that means harm, against one site: each attack as it was run on the code before, and what it gave.

The figures in the docstrings are of the commit before the bounds were rebuilt; `docs/privacy.md` has the table.
"""

from __future__ import annotations

import math
import os
import threading
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest

import client.log as log_module
import client.privacy.gate as gate_module
import client.service as service_module
from client.approval import approve as approve_at_site
from client.privacy.randomness import NoiseSource
from client.service import SiteService
from client.site import Site, load_site_config
from client.stages.enrol import enrol
from common.accounting import plan_study
from common.errors import PolicyRefusal, StorageError
from common.model.diffusion_model import initial_weights
from common.model.weights import LARGEST_WEIGHT
from common.protocol import Agreement, EnrolRequest, Refusal, TrainReply, TrainRequest, decode_answer, encode
from support.sites import approve, ask, make_npz_site, write_images
from support.studies import agreement, tiny_study

GRAM = tiny_study(  # one channel per group of the norm behind a convolution, whose gradients it makes sum to nothing
    data={"image_size": 32, "channels": 1, "classes": ["clear", "opacity"]},
    network={"width": 8, "depths": [0], "heads": [1]}, pretrain={"source": "none"},
    training={"rounds": 6, "algorithm": "fedsgd", "local_steps": 1, "sample_rate": 0.5, "max_grad_norm": 0.1,
              "parameters": "all"},
    privacy={"epsilon": 1.0, "moments_share": 0.0, "features_share": 0.0, "reference_share": 0.0, "counts_share": 0.3},
)  # fmt: skip
TINY = tiny_study()


def _cancelling_tokens(study, size: float, spread: float):
    """Weights under which all that a convolution sees is huge and alike, and its gradients nearly cancel."""
    rng = np.random.default_rng(0)
    weights = {
        name: (spread * rng.standard_normal(array.shape)).clip(-LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.float32)
        for name, array in initial_weights(study).items()
    }
    for name in weights:
        if name.endswith("norm1.bias"):
            weights[name][:] = size
    return weights


@pytest.fixture
def exact_norms(monkeypatch):
    """The norm of every exact sum that the gate made noisy, in units of the sensitivity."""
    seen = []
    original = gate_module.gaussian_release

    def spy(total, *, sensitivity, **rest):
        seen.append(math.sqrt(sum(float(p.square().sum()) for p in total.parts.values())) / sensitivity)
        return original(total, sensitivity=sensitivity, **rest)

    monkeypatch.setattr(gate_module, "gaussian_release", spy)
    return seen


def _only_record(monkeypatch, number: int) -> None:
    def one(self, records, rate):
        mask = np.zeros(records, dtype=bool)
        mask[number] = True
        return mask

    monkeypatch.setattr(NoiseSource, "poisson_mask", one)


@pytest.mark.parametrize("size", [2.0**8, LARGEST_WEIGHT])
@pytest.mark.parametrize("spread", [0.3, 2.0**8])
def test_weights_that_make_tokens_cancel_leave_one_record_within_the_clipping_norm(
    tmp_path, monkeypatch, exact_norms, size, spread
):
    """Attack 1. Before: one record contributed up to 6e8 times the clipping norm."""
    path = make_npz_site(tmp_path, size=32, policy="max_epsilon = 1.0")
    site = Site.open(path, GRAM)
    approve(site, GRAM)
    for number in range(6):
        _only_record(monkeypatch, 7 * number)
        request = TrainRequest(agreement=agreement(GRAM), round=number + 1, expected_batch=30.0)
        answer, _ = ask(path, request, _cancelling_tokens(GRAM, size, spread))
        assert isinstance(answer.body, TrainReply)
    assert len(exact_norms) == 6
    assert max(exact_norms) <= 1.0001


@pytest.mark.parametrize("factor", [1.0001, 2.0**20, 1e300])
def test_weights_beyond_the_bound_are_refused_before_anything_is_spent(tmp_path, factor):
    """Attack 1 and 8. Before: any finite number was taken, float64 beyond float32 too."""
    path = make_npz_site(tmp_path, size=32)
    approve(Site.open(path, GRAM), GRAM)
    weights = initial_weights(GRAM)
    weights["net.head.bias"] = np.full_like(weights["net.head.bias"], 1.0).astype(
        np.float64 if factor > 1e38 else np.float32
    ) * (LARGEST_WEIGHT * factor)
    answer, _ = ask(path, TrainRequest(agreement=agreement(GRAM), round=1, expected_batch=30.0), weights)
    assert isinstance(answer.body, Refusal)
    assert answer.body.kind == "ReplyError"
    assert answer.spent.reserved == 0


def test_a_record_whose_gradient_overflows_decides_nothing(tmp_path, monkeypatch, exact_norms):
    """Attack 2. Before: 47 of 200 records made the sum NaN, and the mechanism raised after the reservation."""
    path = make_npz_site(tmp_path)
    site = Site.open(path, TINY)
    approve(site, TINY)
    weights = {n: np.full_like(a, LARGEST_WEIGHT) for n, a in initial_weights(TINY).items()}
    answer, arrays = ask(path, TrainRequest(agreement=agreement(), round=1, expected_batch=12.0), weights)
    assert isinstance(answer.body, TrainReply)
    assert all(np.isfinite(part).all() for part in arrays.values())
    assert answer.spent.confirmed == 1


@pytest.mark.parametrize("loss", ["deleted", "truncated", "folder gone", "one byte"])
def test_a_ledger_that_is_lost_stops_everything_and_never_begins_anew(tmp_path, loss):
    """Attack 3. Before: epsilon back to 0, `verify-ledger` said "unbroken" with exit code 0."""
    path = make_npz_site(tmp_path)
    approve(Site.open(path, TINY), TINY)
    ask(path, EnrolRequest(agreement=agreement()))
    state = load_site_config(path).state
    files = sorted(state.glob("ledger.sqlite*"))
    head = (state / "ledger.head").read_bytes()
    if loss == "deleted":
        for file in files:
            file.unlink()
    elif loss == "truncated":
        for file in files[1:]:
            file.unlink()
        os.truncate(files[0], 0)
    elif loss == "folder gone":
        state.rename(tmp_path / "away")
    else:
        data = bytearray(files[0].read_bytes())
        where = data.find(b"noise_multiplier")
        data[where + 30] ^= 1
        files[0].write_bytes(bytes(data))
    with pytest.raises(StorageError) as caught:
        load_site_config(path).ledger()
    assert caught.value.remedy
    answer, _ = ask(path, EnrolRequest(agreement=agreement(tiny_study(study={"seed": 9}))))
    assert isinstance(answer.body, Refusal)
    if loss != "folder gone":
        assert (state / "ledger.head").read_bytes() == head
    else:
        assert not (state / "ledger.sqlite").exists()


def test_a_record_that_changes_sides_between_two_studies_is_refused(tmp_path):
    """Attack 4. Before: 7.99 and 8.00 under a ceiling of 8, a record's true total 11.96."""
    path = make_npz_site(tmp_path, policy="max_epsilon = 20.0")
    site = Site.open(path, TINY)
    with closing(site.config.ledger()) as ledger:
        approve_at_site(site, ledger, TINY, plan_study(TINY), by="Dr. A. Test")
    ask(path, EnrolRequest(agreement=agreement()))
    write_images(tmp_path / "site-1.npz", train=60, holdout=30, size=16, seed=0, swap=True)
    other = tiny_study(study={"seed": 4}, privacy={"epsilon": 1.0})
    swapped = Site.open(path, other)
    with closing(swapped.config.ledger()) as ledger, pytest.raises(PolicyRefusal, match="side"):
        approve_at_site(swapped, ledger, other, plan_study(other), by="Dr. A. Test")
    answer, _ = ask(path, EnrolRequest(agreement=agreement(other)))
    assert answer.body.kind == "NotApproved"
    # And the first study gets no more answers from the exchanged parts.
    answer, _ = ask(path, TrainRequest(agreement=agreement(), round=1, expected_batch=12.0), initial_weights(TINY))
    assert answer.body.kind == "Unavailable"
    assert answer.spent.reserved == 1


def test_a_second_ledger_over_the_same_images_is_refused(tmp_path):
    """Attack 4. Before: a second site file on the same images had a fresh ledger."""
    first = make_npz_site(tmp_path)
    approve(Site.open(first, TINY), TINY)
    ask(first, EnrolRequest(agreement=agreement()))
    second = make_npz_site(tmp_path, "site-2", data=tmp_path / "site-1.npz")
    site = Site.open(second, TINY)
    with closing(site.config.ledger()) as ledger, pytest.raises(PolicyRefusal, match="ledger of site site-1"):
        approve_at_site(site, ledger, TINY, plan_study(TINY), by="Dr. A. Test")


def test_less_noise_than_was_approved_is_refused_though_the_total_would_fit(tmp_path):
    """Attack 5. Before: `explain` showed counts at sigma 4.63, the coordinator sent 0.62, the site answered."""
    path = make_npz_site(tmp_path)
    approve(Site.open(path, TINY), TINY)
    agreed = agreement()
    shifted = {"counts": 0.62, "train": 40.0, "moments": 40.0, "reference": 40.0}
    plans = tuple(
        p.model_copy(update={"noise_multiplier": shifted.get(p.name, p.noise_multiplier)})
        for p in agreed.plan.mechanisms
    )
    weak = Agreement(study=agreed.study, plan=agreed.plan.model_copy(update={"mechanisms": plans}))
    answer, _ = ask(path, EnrolRequest(agreement=weak))
    assert answer.body.kind == "BudgetError"
    assert answer.spent.reserved == 0


def test_no_refusal_tells_how_many_images_there_are(tmp_path):
    """Attack 7. Before: one image more or less flipped DataError and PolicyRefusal of a study nobody approved."""
    answers = set()
    for count in (1, 3, 59, 60):
        folder = tmp_path / str(count)
        folder.mkdir()
        path = make_npz_site(folder, train=count, policy="min_units = 60\nmin_units_per_class = 30")
        answers.add(SiteService(path).answer(encode(EnrolRequest(agreement=agreement(TINY)))))
    assert len(answers) == 1


def test_after_approval_the_sites_own_minimum_is_not_asked_again(tmp_path):
    """Before: 51 images were refused and 52 answered, an exact threshold for nothing."""
    for count in (51, 52):
        folder = tmp_path / str(count)
        folder.mkdir()
        path = make_npz_site(folder, train=count, policy="min_units = 52")
        approve(Site.open(path, TINY), TINY)  # past the policy, as if it had been written later
        assert ask(path, EnrolRequest(agreement=agreement(TINY)))[0].body.stage == "enrol"


def test_before_approval_every_kind_of_study_gets_the_same_bytes_and_no_image_is_opened(tmp_path, monkeypatch):
    """Attack 7. Other classes, sizes and units mapped the label range, the geometry and whether patients are known."""
    path = make_npz_site(tmp_path)
    monkeypatch.setattr(Site, "open", lambda *_: pytest.fail("the images were opened"))
    studies = [
        TINY, tiny_study(privacy={"unit": "patient"}), tiny_study(data={"classes": ["a", "b", "c"]}),
        tiny_study(data={"image_size": 32}), tiny_study(privacy={"epsilon": 500.0}),
    ]  # fmt: skip
    weights = initial_weights(TINY)
    answers = {SiteService(path).answer(encode(EnrolRequest(agreement=agreement(study)))) for study in studies}
    answers |= {
        SiteService(path).answer(encode(TrainRequest(agreement=agreement(), round=r, expected_batch=1.0), weights))
        for r in (1, 2)
    }
    assert len(answers) == 1
    with closing(load_site_config(path).ledger()) as ledger:
        assert [entry.kind for entry in ledger.entries()] == [ledger.entries()[0].kind]


def test_a_revoked_study_gets_no_stored_answer(tmp_path):
    path = make_npz_site(tmp_path)
    approve(Site.open(path, TINY), TINY)
    request = EnrolRequest(agreement=agreement())
    assert ask(path, request)[0].body.stage == "enrol"
    with closing(load_site_config(path).ledger()) as ledger:
        ledger.revoke(TINY.sha256, by="Dr. B. Test")
    answer, arrays = ask(path, request)
    assert answer.body.kind == "NotApproved"
    assert not arrays


def test_asking_in_vain_fills_neither_ledger_nor_disk(tmp_path, monkeypatch):
    """Attack 9. Before: thirty study hashes made thirty entries, and the log grew with every request."""
    monkeypatch.setattr(log_module, "MOST_BYTES", 5_000)
    path = make_npz_site(tmp_path)
    approve(Site.open(path, TINY), TINY)
    state = load_site_config(path).state
    service = SiteService(path)
    before = len(_entries(path))
    for seed in range(30):
        service.answer(encode(EnrolRequest(agreement=agreement(tiny_study(study={"seed": 100 + seed})))))
        service.answer(b"SYNW2\n" + bytes(seed))
    assert len(_entries(path)) == before
    assert sum(file.stat().st_size for file in state.glob("site.log*")) < 20_000


def test_a_request_larger_than_the_site_allows_is_not_read(tmp_path):
    """Attack 9. Before: a message might have 1 GiB."""
    path = make_npz_site(tmp_path)
    path.write_text(path.read_text().replace("threads = 1", "threads = 1\nmax_message_mb = 1"))
    approve(Site.open(path, TINY), TINY)
    request = encode(EnrolRequest(agreement=agreement()), {"big": np.zeros(1 << 20, np.float32)})
    answer = SiteService(path).answer(request)
    assert b"over 1 MiB" in answer


def _entries(path: Path):
    with closing(load_site_config(path).ledger()) as ledger:
        return ledger.entries()


def test_an_approval_that_is_replaced_while_a_request_runs_ends_the_request(tmp_path, monkeypatch):
    """Before: what the old images had spent was booked under the new ones, and a swap of sides then passed."""
    path = make_npz_site(tmp_path)
    approve(Site.open(path, TINY), TINY)

    def meanwhile(site, gate, request, arrays):
        write_images(tmp_path / "site-1.npz", train=60, holdout=30, size=16, seed=1)
        approve(Site.open(path, TINY), TINY)
        return enrol(site, gate, request, arrays)

    monkeypatch.setitem(service_module.STAGES, "enrol", meanwhile)
    answer, _ = ask(path, EnrolRequest(agreement=agreement()))
    assert answer.body.kind == "Unavailable"  # the images are not those of its approval
    with closing(load_site_config(path).ledger()) as ledger:
        assert ledger.counts(TINY.sha256) == (0, 0)


def test_a_record_does_not_decide_about_an_answer_where_the_log_cannot_be_written(tmp_path, monkeypatch):
    """Before: a record whose gradient overflowed made a line in the log, and without a log there was no answer."""
    path = make_npz_site(tmp_path)
    approve(Site.open(path, TINY), TINY)
    (load_site_config(path).state / "site.log").unlink(missing_ok=True)
    (load_site_config(path).state / "site.log").mkdir()
    weights = {n: np.full_like(a, LARGEST_WEIGHT) for n, a in initial_weights(TINY).items()}
    answer, _ = ask(path, TrainRequest(agreement=agreement(), round=1, expected_batch=12.0), weights)
    assert isinstance(answer.body, TrainReply)


def test_a_stored_answer_that_was_cut_is_not_sent(tmp_path):
    path = make_npz_site(tmp_path)
    approve(Site.open(path, TINY), TINY)
    ask(path, EnrolRequest(agreement=agreement()))
    stored = next((load_site_config(path).state / "replies").iterdir())
    os.truncate(stored, 40)
    answer, _ = ask(path, EnrolRequest(agreement=agreement()))
    assert answer.body.kind == "Unavailable"
    assert answer.spent.reserved == 1


def test_a_request_that_never_ends_holds_up_nobody_else(tmp_path):
    """Before: one open call that sent nothing silenced every site of the process."""
    path = make_npz_site(tmp_path)
    approve(Site.open(path, TINY), TINY)
    with service_module.serving([path], tmp_path / "s") as made, grpc.insecure_channel(f"unix:{made[0]}") as channel:
        method = f"/{service_module.SERVICE}/{service_module.METHOD}"
        waiting = threading.Event()
        calls = [channel.stream_unary(method).future(_never(waiting)) for _ in range(3)]
        answer = channel.unary_unary(method)(encode(EnrolRequest(agreement=agreement())), timeout=60)
        waiting.set()
        for call in calls:
            call.cancel()
    assert decode_answer(answer)[0].body.stage == "enrol"


def _never(waiting):
    waiting.wait(60)
    yield b""
