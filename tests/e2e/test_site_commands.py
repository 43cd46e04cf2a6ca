"""A hospital's way through its own command, on real files: init, check, explain, approve, serve, look, revoke."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from client.cli import init, main
from client.service import METHOD, SERVICE
from common.messages import EnrolReply, EnrolRequest, Refusal, TrainRequest, decode_reply, encode
from support.datasets import good_arrays, write_npz
from support.paths import REPOSITORY
from support.studies import agreement, tiny_study, tiny_toml

STUDY = tiny_study(privacy={"unit": "patient"})


def _site(*arguments, cwd, **options):
    return subprocess.run(
        [sys.executable, "-m", "client.cli", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        timeout=120, check=False, env=_environment(), **options,
    )  # fmt: skip


def _environment():
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def hospital(tmp_path):
    write_npz(tmp_path / "images.npz", good_arrays(size=16, patients=True))
    (tmp_path / "study.toml").write_text(tiny_toml(privacy={"unit": "patient"}))
    init(tmp_path / "site.toml", "hospital-a", Path("images.npz"))
    text = (tmp_path / "site.toml").read_text()
    (tmp_path / "site.toml").write_text(text.replace("min_units = 50", "min_units = 5"))
    return tmp_path


def _send(path, request):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        return decode_reply(channel.unary_unary(f"/{SERVICE}/{METHOD}")(encode(request), timeout=60))


@pytest.fixture
def served(hospital):
    process = subprocess.Popen(
        [sys.executable, "-m", "client.cli", "serve", "site.toml", "--sockets", "s"], cwd=hospital, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready: ")
    yield process, hospital / "s" / "site.sock"
    process.terminate()
    assert process.communicate(timeout=60)[0] == "stopped\n"
    assert process.returncode == 0


def test_a_hospital_reads_approves_serves_looks_and_revokes(hospital, served):
    _, socket = served
    study = ("--study", "study.toml")
    assert "training patients" in _site("check", "site.toml", *study, cwd=hospital).stdout
    page = _site("explain", "site.toml", "study.toml", cwd=hospital)
    assert page.returncode == 0, page.stderr
    for words in ("What leaves this hospital", "Privacy unit: patient", "YES:", "Not approved yet", "Signature"):
        assert words in page.stdout, words
    agreed = agreement(STUDY)
    refused = _send(socket, EnrolRequest(agreed))
    assert isinstance(refused, Refusal)
    assert refused.rule == "policy.require_approval"
    assert _site("approve", "site.toml", *study, "--by", "Dr. A. Example", cwd=hospital).returncode == 0
    assert isinstance(_send(socket, EnrolRequest(agreed)), EnrolReply)
    assert "Approved by Dr. A. Example" in _site("explain", "site.toml", "study.toml", cwd=hospital).stdout
    account = json.loads(_site("budget", "site.toml", "--json", "--plot", "b.svg", cwd=hospital).stdout)[0]
    assert account["epsilon"]["train"] > 0
    assert [stage["name"] for stage in account["studies"][0]["stages"]] == ["counts"]
    assert len(account["studies"][0]["refusals"]) == 1
    assert (hospital / "b.svg").read_text().startswith("<svg")
    assert _site("page", "site.toml", "--once", "page.html", cwd=hospital).returncode == 0
    assert "Dr. A. Example" in (hospital / "page.html").read_text()
    assert _site("revoke", "site.toml", *study, "--by", "Dr. B. Example", cwd=hospital).returncode == 0
    answer = _send(socket, TrainRequest(agreed, round=1, expected_batch=4.0, arrays={}))
    assert isinstance(answer, Refusal)
    found = _site("verify-ledger", "site.toml", cwd=hospital).stdout
    assert re.search(r"hospital-a: \d+ entries, unbroken; newest hash [0-9a-f]{64}", found)


def test_explain_names_a_public_set_whose_people_are_not_protected(hospital):
    public = {"source": "npz", "path": "public.npz", "sha256": "ab" * 32}
    (hospital / "study.toml").write_text(tiny_toml(privacy={"unit": "patient"}, pretrain=public))
    page = _site("explain", "site.toml", "study.toml", cwd=hospital)
    assert page.returncode == 0, page.stderr
    assert "ab" * 32 in page.stdout
    assert "People in it are not protected" in " ".join(page.stdout.split())


def test_explain_says_no_where_the_policy_does_and_exits_with_3(hospital):
    text = (hospital / "site.toml").read_text()
    (hospital / "site.toml").write_text(text.replace("max_study_epsilon = 8.0", "max_study_epsilon = 2.0"))
    page = _site("explain", "site.toml", "study.toml", cwd=hospital)
    assert page.returncode == 3
    assert "NO: policy.max_study_epsilon: epsilon 8 asked, 2 allowed" in page.stdout
    assert "YES" not in page.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("init", "site.toml", "--name", "x", "--data", "y"), "exists already"),
     (("init", "new.toml", "--name", "no good name", "--data", "y"), "name"),
     (("check", "nowhere.toml", "--study", "study.toml"), "cannot read the site file"),
     (("approve", "site.toml", "--study", "study.toml", "--by", " "), "no name given"),
     (("revoke", "site.toml", "--study", "study.toml", "--by", "Dr. A"), "not approved here"),
     (("explain", "site.toml", "nowhere.toml"), "cannot read the study file"),
     (("budget", "site.toml", "site.toml", "--plot", "x.svg"), "one picture shows one site"),
     (("explain", "site.toml"), "STUDY.toml"),
     (("serve", "site.toml"), "--sockets")],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(hospital, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(hospital)
    monkeypatch.setattr(sys, "argv", ["synthward-site", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert len(said.strip().splitlines()) == 1, said
    assert said.startswith("error: ")
    assert words in said
    assert not (hospital / "new.toml").exists()


def test_a_site_that_is_killed_while_it_serves_can_be_served_again(hospital):
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "client.cli", "serve", "site.toml", "--sockets", "s"], cwd=hospital, text=True,
            stdout=subprocess.PIPE, env=_environment(),
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: ")
        assert isinstance(_send(hospital / "s" / "site.sock", EnrolRequest(agreement(STUDY))), Refusal)
        process.kill()
        process.communicate()
