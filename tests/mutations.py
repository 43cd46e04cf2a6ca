"""Take out one guard at a time and see its tests fail: python tests/mutations.py [name ...]

SPDX-License-Identifier: Apache-2.0

Each mutation changes one line in a copy of the repository and runs the tests that should notice. A mutation that no
test notices is printed as SURVIVED and the exit code is 1.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
GATE, GRADIENTS = "tests/unit/client/test_gate_and_stages.py", "tests/unit/client/test_grad_sample.py"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation("no clipping", "client/privacy/grad_sample.py", "(max_grad_norm / norm).clamp(max=1.0)",
             "torch.ones_like(norm)", f"{GRADIENTS} {GATE}"),
    Mutation("windows share a norm", "client/privacy/grad_sample.py", "g.sum(dim=1).flatten(2)",
             "g[:, 0].flatten(2)", GRADIENTS),
    Mutation("no noise", "client/privacy/mechanism.py", "std * source.normal_like(part)",
             "0.0 * source.normal_like(part)", f"tests/statistical/test_mechanism.py {GATE}"),
    Mutation("two thirds of the noise", "client/privacy/mechanism.py",
             "std = noise_multiplier * sensitivity", "std = noise_multiplier * sensitivity * 2 / 3",
             f"tests/statistical/test_mechanism.py {GATE}"),
    Mutation("no accounting", "client/privacy/gate.py", "            *plans, study=study.sha256",
             "            study=study.sha256", GATE),
    Mutation("no ceiling", "client/privacy/ledger.py", "if cost > bound.epsilon:", "if False:",
             "tests/unit/client/test_ledger.py"),
    Mutation("losses of unfinished requests forgotten", "client/privacy/ledger.py",
             "WHERE kind = 'reserved' AND (?",
             "WHERE number IN (SELECT number - 1 FROM entries WHERE kind = 'confirmed') AND (?",
             f"tests/unit/client/test_ledger.py {GATE}"),
    Mutation("no limit of releases", "client/privacy/ledger.py",
             "fetchone()[0] >= plan.releases:", "fetchone()[0] < 0:",
             f"tests/unit/client/test_ledger.py {GATE}"),
    Mutation("an edited entry accepted", "client/privacy/ledger.py", "and entry.hash == entry.hash_after(previous)",
             "", "tests/unit/client/test_ledger.py"),
    Mutation("no approval asked for", "client/privacy/policy.py", "if self.require_approval and not approved:",
             "if False:", GATE),
    Mutation("a fixed batch", "client/privacy/randomness.py", "return self.uniform(records) < sample_rate",
             "return np.arange(records) < records * sample_rate", "tests/statistical/test_mechanism.py"),
    Mutation("the loss not clipped", "client/stages/train.py", ".clamp(0.0, LARGEST_LOSS)", "* 100.0", GATE),
    Mutation("moments not clipped", "common/moments.py",
             "np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1.0)", "1.0",
             "tests/unit/common/test_moments.py tests/statistical/test_sensitivity.py"),
    Mutation("squares and energies not within one norm", "common/moments.py", "0.40, 0.84, 0.35, 0.10",
             "0.40, 0.84, 0.9, 0.10",
             "tests/unit/common/test_moments.py tests/statistical/test_sensitivity.py"),
    Mutation("parts of a release are free", "client/privacy/gate.py", "self._left[name] -= part**2",
             "self._left[name] -= part == 1", GATE),
    Mutation("a part of a release taken for a smaller one", "client/stages/moments.py", "part=SPREAD_PART", "part=0.5",
             "tests/statistical/test_sensitivity.py"),
    Mutation("the norm not clipped", "common/moments.py", "np.square(whole).sum(axis=1) / NORM_REACH**2, 1.0)",
             "np.square(whole).sum(axis=1) / NORM_REACH**2, 100.0)",
             "tests/unit/common/test_moments.py tests/statistical/test_sensitivity.py"),
    Mutation("squares about the exact means", "client/stages/moments.py", 'class_means(sums["means"].numpy(),',
             "class_means(class_sums(site.train, classes, space),", "tests/statistical/test_sensitivity.py"),
    Mutation("what is frozen has a gradient", "client/privacy/grad_sample.py",
             "if p.requires_grad)\n            if trained", ")\n            if trained", GRADIENTS),
    Mutation("any plan is taken", "client/privacy/gate.py", "        check_plan(study, plan)\n", "\n", GATE),
    Mutation("bad updates let in", "server/federation/screening.py", "if not finite(arrays):", "if False:",
             "tests/integration/test_study_in_process.py"),
)  # fmt: skip


def main() -> int:
    wanted = set(sys.argv[1:])
    survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        for mutation in MUTATIONS:
            if wanted and mutation.name not in wanted:
                continue
            path = copy / mutation.file
            text = path.read_text()
            if mutation.old not in text:
                print(f"STALE     {mutation.name}: the line is no longer there")
                survived += 1
                continue
            path.write_text(text.replace(mutation.old, mutation.new, 1))
            command = [sys.executable, "-m", "pytest", "-q", "-x", *mutation.tests.split()]
            result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
            path.write_text(text)
            noticed = result.returncode == 1
            survived += not noticed
            last = result.stdout.strip().splitlines()[-2:] if result.stdout.strip() else [result.stderr[-200:]]
            print(f"{'noticed ' if noticed else 'SURVIVED'}  {mutation.name}: {last[0][:110]}", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
