"""Take out one guard at a time and see the fast tests fail: make mutations, or python tests/mutations.py [name ...]

SPDX-License-Identifier: Apache-2.0

Each mutation changes one place in a copy of the repository and runs the tests that should notice, which are all part of
`make test`. One that no test notices is printed as SURVIVED, one whose place is no longer there as STALE, and the exit
code is 1. `--table` prints the table of docs/privacy.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

REPOSITORY = Path(__file__).resolve().parents[1]
WORKERS = max(1, (os.cpu_count() or 2) // 2)  # each runs torch
GATE = "tests/unit/client/test_gate_and_stages.py"
BOUNDED = "tests/unit/common/test_bounded.py"
MECHANISM = "tests/statistical/test_mechanism.py"
LEDGER = "tests/unit/client/test_ledger.py"
GRADIENTS = "tests/unit/client/test_gradients.py"
ENEMY = "tests/adversary/test_hostile_coordinator.py"
FUZZ = "tests/adversary/test_fuzzed_requests.py"
FEATURES = "tests/unit/common/test_features.py"
ACCOUNTING = "tests/unit/common/test_accounting.py"
MOMENTS = "tests/unit/common/test_moments.py"
SENSITIVITY = "tests/statistical/test_sensitivity.py"
UNITS = "tests/unit/common/test_units.py"
APPROVAL = "tests/unit/client/test_approval.py"
CARRIER, CANARY = "tests/unit/client/test_carrier_folder.py", "tests/unit/client/test_canary.py"
INVITATION = "tests/unit/common/test_invitation.py"
FINGERPRINTS = "tests/unit/client/test_fingerprints.py"
PROTOCOL = "tests/unit/common/test_protocol.py"
COLLECT = "tests/unit/server/test_collect.py"
CLAIMS = "tests/unit/common/test_claims.py"
REFERENCE = "tests/unit/client/test_reference.py"
PLACES = "tests/unit/client/test_places.py"
BACKUP = "tests/unit/client/test_backup.py"
SERVICE = "tests/unit/client/test_service.py"
WITHDRAWAL = "tests/unit/client/test_withdrawal.py"
SOCKETS = "tests/unit/common/test_sockets.py"


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        name: what is broken, as docs/privacy.md says it.
        tests: what has to fail; the first is the one that the table names.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


def _m(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, file, old, new, " ".join(tests))


BOUND = "common/bounded.py"
NOISE, GATE_PY, STEPS = "client/privacy/mechanism.py", "client/privacy/gate.py", "client/privacy/local_steps.py"
MUTATIONS = (
    # what one record can do to a sum
    _m("rows are not clipped", BOUND, ".clamp(max=1.0)", ".clamp(min=1.0, max=1.0)", BOUNDED),
    _m("each part of a row is clipped apart", BOUND, "norm = torch.linalg.vector_norm(norms, dim=0)",
       "norm = norms.amax(dim=0)", BOUNDED),
    _m("norms in float32", BOUND, "dim=1, dtype=torch.float64)", "dim=1, dtype=torch.float32)", BOUNDED),
    _m("sums in float32", BOUND, "torch.zeros(shape, dtype=torch.float64)", "torch.zeros(shape)",
       BOUNDED, GATE),
    _m("a row that is not finite enters", BOUND, "finite = torch.isfinite(norm)",
       "finite = torch.ones_like(norm, dtype=torch.bool)", BOUNDED),
    _m("bounds of parts join to the larger", BOUND, "math.hypot(*(each.bound for each in sums))",
       "max(each.bound for each in sums)", BOUNDED),
    _m("a patient's images count as one each", BOUND, "factors = factors * shares[finite]", "factors = factors * 1.0",
       BOUNDED),
    _m("a unit's shares add up to the number of its images", "common/images.py", "out[member] = 1.0 / len(member)",
       "out[member] = 1.0", UNITS, BOUNDED),
    _m("anybody states a bound", BOUND, "if key is not _KEY:", "if False:", BOUNDED),
    # noise
    _m("no noise at all", NOISE, "std * source.normal_like(part)", "0.0 * source.normal_like(part)", MECHANISM),
    _m("half the noise", NOISE, "part + std * source", "part + 0.5 * std * source", MECHANISM),
    _m("noise that forgets the sensitivity", NOISE, "std = noise_multiplier * sensitivity", "std = noise_multiplier",
       MECHANISM),
    _m("a part of a release has the noise of a part", NOISE, "std = noise_multiplier * sensitivity",
       "std = noise_multiplier * min(sensitivity, total.bound)", MECHANISM),
    _m("class counts leave exact", NOISE, "part + std * source",
       'part + (0.0 if name == "counts" else std) * source', GATE),
    _m("moments leave exact", NOISE, "part + std * source",
       'part + (0.0 if name in ("means", "second_moments", "band_power") else std) * source',
       "tests/unit/client/test_stages.py"),
    _m("score histograms leave exact", NOISE, "part + std * source",
       'part + (0.0 if name in ("synthetic", "reference") else std) * source', "tests/unit/client/test_stages.py"),
    _m("gradients leave exact", NOISE, "part + std * source",
       'part + (0.0 if "." in name else std) * source', GATE),
    _m("the reference is trained without noise", "client/reference.py",
       'permit.noisy("reference", total).tensors.items()', "total.parts.items()", REFERENCE),
    _m("a bound over the sensitivity is taken", NOISE, "if not total.bound <= sensitivity * (1 + _TOLERANCE):",
       "if False:", MECHANISM),
    _m("the lowest bits are released", NOISE, "torch.round(part / grid) * grid + 0.0", "part + 0.0", MECHANISM),
    _m("four draws are not averaged", "client/privacy/randomness.py", "out /= math.sqrt(DRAWS)", "out /= 1.0",
       MECHANISM),
    _m("a batch of fixed size", "client/privacy/randomness.py", "return self.uniform(records) < sample_rate",
       "return np.arange(records) < records * sample_rate", MECHANISM),
    _m("batches sampled at 1.5 q while q is accounted", GATE_PY, "self._plans[name].sample_rate)",
       "min(1.0, 1.5 * self._plans[name].sample_rate))", GATE),
    _m("batches sampled at 2 q in the source", "client/privacy/randomness.py",
       "return self.uniform(records) < sample_rate", "return self.uniform(records) < 2 * sample_rate", MECHANISM, GATE),
    # gate
    _m("the loss is reserved after the records were touched", GATE_PY,
       "        numbers = self.ledger.reserve("
       "*plans, request=self.request, approval=self.admitted, **self._bounds())\n"
       "        yield Permit(self, plans, numbers)\n",
       "        yield Permit(self, plans, ())\n"
       "        self.ledger.reserve(*plans, request=self.request, approval=self.admitted, **self._bounds())\n",
       GATE),
    _m("the loss is never reserved", GATE_PY, "self.ledger.reserve(*plans, request", "self.ledger.reserve(request",
       GATE),
    _m("any number can be sealed", GATE_PY, "if type(noisy) is not Noisy:", "if False:", GATE),
    _m("anybody makes noisy numbers", NOISE, "if key is not _KEY:", "if False:", GATE),
    _m("noisy numbers can be written over", NOISE,
       "return {name: tensor.clone() for name, tensor in self._tensors.items()}", "return self._tensors", GATE),
    _m("a plan with other noise is taken", GATE_PY, "if approval.plan != self.agreement.plan:", "if False:",
       GATE, ENEMY),
    _m("parts of a release are free", GATE_PY, "self._left[name] -= part**2", "self._left[name] -= 0.0", GATE),
    _m("a sampled sum has parts", GATE_PY, "or (part < 1 - _WHOLE and plan.sample_rate != 1)", "", GATE),
    _m("the same request is answered anew", "client/privacy/store.py",
       "        if not path.exists():\n", "        if True:\n", GATE),
    _m("an answer is confirmed before it is stored", GATE_PY,
       "            self._gate.store.keep_answer(self._gate.request, data)\n        return",
       "            pass\n        self._gate.store.keep_answer(self._gate.request, data)\n        return", GATE),
    _m("an answer under way outlives its approval", "client/privacy/ledger.py",
       "            self._require_still(study, approval)\n            yield\n", "            yield\n", WITHDRAWAL),
    _m("an answer under way outlives its images", GATE_PY,
       "            self.images(self.admitted)\n            yield\n", "            yield\n", WITHDRAWAL),
    _m("an answer waits unguarded once it is sealed", "client/service.py", "                with gate.still():",
       "                if True:", WITHDRAWAL),
    _m("an answer that may never have left is sent after a withdrawal", "client/privacy/ledger.py",
       'entry.number in confirmed or entry.body.get("data") == approval.data', "True", WITHDRAWAL),
    _m("other images are paid for", GATE_PY,
       "        self.images(self.admitted)\n        plans", "        plans", WITHDRAWAL),
    _m("what was made of other images is used again", "client/privacy/store.py",
       "{approval.study[:16]}-{approval.data[:16]}", "{approval.study[:16]}",
       WITHDRAWAL),
    _m("a change in place is not seen", "client/site.py", "(at.st_ctime_ns, at.st_mtime_ns, ", "(at.st_mtime_ns, ",
       WITHDRAWAL),
    _m("memory keeps withdrawn images until others are opened", "client/service.py",
       "            Site.forget_replaced(self.path)", "            pass", WITHDRAWAL),
    _m("serve ends before its answer does", "client/service.py", "    turns.end()\n", "", SERVICE),
    _m("the policy is not asked again", GATE_PY, "        self.policy.permit(study, approval.plan)\n", "\n",
       "tests/unit/client/test_service.py"),
    # ledger
    _m("no ceiling", "client/privacy/ledger.py", "if cost > bound.epsilon:", "if False:", LEDGER),
    _m("no limit of releases", "client/privacy/ledger.py", "if made >= plan.releases:", "if False:", LEDGER, GATE),
    _m("what was revoked is still approved", "client/privacy/ledger.py",
       'if entries and entries[-1].kind == "approved" else None', "if entries else None", GATE, ENEMY, LEDGER),
    _m("records may change sides", "client/privacy/fingerprints.py",
       "return (self.train & other.holdout) | (self.holdout & other.train)", "return frozenset()", FINGERPRINTS, ENEMY),
    _m("records may be counted in two ledgers", "client/approval.py", "        if shared:\n", "        if False:\n",
       APPROVAL, ENEMY),
    _m("a record may be in both partitions", "client/privacy/fingerprints.py", "return self.train & self.holdout",
       "return frozenset()", FINGERPRINTS, APPROVAL),
    # service: what is said, and when
    _m("images are opened before approval is asked for", "client/service.py", "            approval = gate.admit()\n",
       "            Site.open(self.path, study)\n            approval = gate.admit()\n", ENEMY),
    _m("other images than were approved are used", "client/site.py",
       "if site.fingerprints(ledger.key).digest != approval.data:", "if False:", ENEMY),
    _m("refusals of studies nobody approved are entered", "client/privacy/ledger.py",
       'if self._count("approved", study.sha256) and ', "if ", LEDGER),
    _m("the text of any exception leaves", "client/service.py", '"Unavailable", "the site cannot answer now"',
       '"Unavailable", str(error)', FUZZ),
    # the divisor, the rest of the steps
    _m("the divisor is the true number of records", "client/stages/train.py", "expected_batch=step.expected_batch)",
       "expected_batch=0.2 * len(site.train))", GATE),
    _m("squares about the exact means", "client/stages/moments.py", 'sums.tensors["means"].numpy()',
       'class_sums(site.train, classes, space).parts["means"].numpy()', "tests/unit/client/test_stages.py"),
    _m("directions of any size are taken", "common/features.py", 'fitting(arrays, wanted, where="features").items()',
       "((name, torch.as_tensor(arrays[name])) for name in wanted)", FEATURES, "tests/unit/client/test_stages.py"),
    _m("features are computed in the order of the records", "client/stages/features.py",
       "for places in own_places(len(images), _AT_ONCE, choice):", "for places in np.arange(len(images))[None]:",
       "tests/unit/client/test_stages.py"),
    _m("a feature vector of any length is summed", "common/features.py",
       "math.hypot(MEANS_PART, SECOND_MOMENTS_PART), rows_of", "1e9, rows_of", FEATURES,
       "tests/unit/client/test_stages.py"),
    # plan
    _m("a mechanism is accounted at half its rate", "common/accounting.py",
       "sample_rate=mechanism.sample_rate(study)", "sample_rate=mechanism.sample_rate(study) / 2", ACCOUNTING),
    _m("releases are not accounted", "common/accounting.py", "self.steps * self.releases)", "self.steps)", ACCOUNTING),
    _m("the holdout is tested at the cost of the training records", "common/mechanisms.py", '"evaluate", "holdout",',
       '"evaluate", "train",', ACCOUNTING),
    _m("histograms of two classifiers planned as one", "common/mechanisms.py",
       "return 2 if study.privacy.reference_share > 0 else 1", "return 1", "tests/unit/client/test_stages.py"),
    # the coordinator's door
    _m("values of any type are taken", "common/protocol.py", 'extra="forbid", strict=True',
       'extra="ignore", strict=False', PROTOCOL),
    _m("values that are not finite are taken", "server/federation/screening.py",
       "if not bool(np.isfinite(array).all()):", "if False:", COLLECT),
    _m("an update of any length is taken", "server/federation/screening.py", "if not norm <= largest:", "if False:",
       COLLECT, "tests/unit/server/test_stages.py"),
    _m("the claim forgets that a person may be at every site", "common/claims.py",
       "return sum(site.epsilon for site in self.sites)", "return self.epsilon_max", CLAIMS),
    # the gradient
    _m("rows of empty places enter", "client/privacy/gradients.py", "name: rows[taken] for", "name: rows for",
       GRADIENTS),
    _m("windows stand for the record", "common/model/record_rule.py", "backprops.sum(dim=1)", "backprops[:, 0]",
       GRADIENTS, "tests/unit/common/test_record_rule.py"),
    _m("draws are summed back to other records", "common/model/record_rule.py",
       "gradients.view(records, -1, *gradients.shape[1:]).sum(dim=1)",
       "gradients.view(-1, records, *gradients.shape[1:]).sum(dim=0)",
       GRADIENTS, "tests/unit/common/test_record_rule.py"),
    _m("the loss's part has a bound of its own choosing", "client/privacy/gradients.py",
       "loss_curve.LOSS_SHARE * self._norm)", "self._norm)", GRADIENTS, GATE),
    _m("gradient and loss each have the whole norm", "client/privacy/gradients.py",
       "loss_curve.gradient_norm(self._norm) if self._loss_part else self._norm", "self._norm", GRADIENTS, GATE),
    _m("a record's place depends on who comes before it", "client/privacy/places.py",
       "place = choice.integers(0, size, records)", "place = np.arange(records) % size", PLACES),
    _m("records of one batch share a place", "client/privacy/places.py",
       "turn = np.arange(records) - first[place[order]]", "turn = np.zeros(records, dtype=np.int64)", PLACES),
    _m("an approval may be replaced while a request runs", "client/privacy/ledger.py",
       "(now is None or (now.plan, now.data) != (approval.plan, approval.data))", "False", WITHDRAWAL),
    _m("a sum can be written over", BOUND, "return {name: part.clone() for name, part in self._parts.items()}",
       "return self._parts", BOUNDED),
    _m("approvals in force do not count", "client/approval.py", "for plan in promised.values() for loss in",
       "for plan in () for loss in", APPROVAL),
    _m("a site's own file may be the public set", "client/approval.py", "sha256_file(path) != study.pretrain.sha256",
       "bool(path)", APPROVAL),
    _m("a network that breaks the record rule is taken", "common/model/record_rule.py", "    if reason:\n",
       "    if False:\n", "tests/unit/common/test_record_rule.py"),
    _m("weights of any size are taken", "common/model/weights.py",
       "if not bounded_arrays({name: array}, LARGEST_WEIGHT):", "if False:", GATE),
    _m("weights of any type are taken", "common/model/weights.py", 'if array.dtype != "float32" or ', "if ",
       GATE, ENEMY),
    # what happens around a site: backups, replaced images, the socket
    _m("any delta passes", "client/privacy/policy.py", "if study.privacy.delta > cohort.largest_delta:", "if False:",
       APPROVAL),
    _m("delta is held against the smaller partition", "client/privacy/policy.py",
       "max(1, self.units, self.held_out)", "max(1, min(self.units, self.held_out))", APPROVAL),
    _m("a running service takes an older ledger", "client/service.py", "not holds(ledger, *self._seen)", "False",
       BACKUP),
    _m("the list does not hear of answers", "client/service.py", "                registry.place(config.name, ledger)",
       "                pass", BACKUP),
    _m("an older backup is restored", "client/backup.py", "            accept(ledger)\n", "", BACKUP),
    _m("a changed file of a backup is taken", "client/backup.py",
       "if hashlib.sha256(data).hexdigest() != sums[member.name]:", "if False:", BACKUP),
    _m("a process keeps images of a file that was replaced", "client/site.py",
       "if known[0] == path and before != versions:", "if False:", WITHDRAWAL),
    _m("two processes take one socket", "common/locks.py",
       "fcntl.flock(lock, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))", "pass", SOCKETS),
    _m("a socket that somebody else serves is taken", "common/sockets.py", "        _require_free(path)\n", "",
       SOCKETS),
    # who gets in, and what runs
    _m("a bundle that is not listed is answered", "client/carrier/clientapp.py", "if found not in config.bundles:",
       "if False:", CARRIER),
    _m("a bundle is unpacked and its app is run", "client/carrier/clientapp.py", "setattr(flower, name, ours)", "pass",
       CARRIER),
    _m("an agent app of the coordinator's is run", "client/carrier/clientapp.py",
       "tuple(TASK_TYPE_TO_COMMAND.values())", '("flwr-clientapp",)', CARRIER),
    _m("an invitation that is not signed is taken", "common/invitation.py",
       'key.verify(bytes.fromhex(self.signature), _PURPOSE + self._said())', "pass", INVITATION),
    _m("an invitation of any signer is taken without the telephone", "client/carrier/folder.py",
       "if invitation.signer != carrier.config.signer:", "if False:", CARRIER),
    _m("an old invitation is taken without the telephone", "client/carrier/folder.py",
       "if invitation.number < carrier.config.number:", "if False:", CARRIER),
    _m("any fingerprint will do", "common/invitation.py", 'if plain != own.replace(" ", ""):', "if False:",
       INVITATION),
    _m("the proxy passes everything", "server/deployment/services.py", "location /v1/fleet/ {{", "location /v1/ {{",
       "tests/unit/server/test_deployment.py"),
    _m("the canary answers before approval", "client/service.py", "            approval = gate.admit()\n",
       "            if isinstance(request, CanaryRequest):\n"
       "                return canary(gate, request, most_bytes=1 << 30)\n            approval = gate.admit()\n",
       CANARY),
    _m("the canary has no bound", "client/stages/canary.py", "4 * request.numbers > most_bytes", "False", CANARY),
    _m("there is no canary", "server/pipeline.py", "enrol(session, canary(session, session.online()))",
       "enrol(session, session.online())", "tests/integration/test_study_in_process.py"),
)  # fmt: skip


def table(mutations: Sequence[Mutation] = MUTATIONS) -> str:
    """What docs/privacy.md shows."""
    rows = (f"| {m.name} | `{m.file}` | `{m.tests.split()[0].removeprefix('tests/')}` |" for m in mutations)
    return "\n".join(["| what is broken | file | noticed by |", "|---|---|---|", *rows])


def main() -> int:
    """Run the mutations that are named, or all; the exit code says whether one survived."""
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    if "--table" in sys.argv:
        print(table(chosen))
        return 0
    began, missed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(WORKERS):
            copies.put(_copy(Path(scratch) / str(number)))
        with ThreadPoolExecutor(WORKERS) as pool:
            for mutation, (verdict, line) in zip(chosen, pool.map(lambda m: _try(m, copies), chosen), strict=True):
                missed += verdict != "noticed"
                print(f"{verdict:<9} {mutation.name}: {line[:110]}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{len(chosen) - missed} of {len(chosen)} noticed in {minutes:.0f} minutes, {WORKERS} at a time")
    return 1 if missed else 0


def _copy(folder: Path) -> Path:
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
    return folder


def _try(mutation: Mutation, copies: SimpleQueue[Path]) -> tuple[str, str]:
    """(verdict, the last words of the tests) of one mutation, in a copy that no other one uses meanwhile."""
    copy = copies.get()
    path = copy / mutation.file
    text = path.read_text()
    try:
        if text.count(mutation.old) == 0:
            return "STALE", "the place is no longer there"
        path.write_text(text.replace(mutation.old, mutation.new, 1))
        for test in mutation.tests.split():  # the file that should notice first; the others only where it did not
            command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:randomly", test]
            result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
            words = (result.stdout.strip() or result.stderr.strip()).splitlines()
            failed = next((line for line in words if line.startswith(("FAILED", "ERROR"))), words[-1] if words else "")
            if result.returncode == 1:
                return "noticed", failed
            if result.returncode != 0:
                return "BROKEN", failed  # nothing was collected: the change is no change of behaviour
        return "SURVIVED", failed
    finally:
        path.write_text(text)
        copies.put(copy)


if __name__ == "__main__":
    raise SystemExit(main())
