"""A hospital's way through its own command, on real files: init, check, explain, approve, serve, look, revoke."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import grpc
import numpy as np
import pytest

from client.beginning import begin
from client.cli import main
from client.service import METHOD, SERVICE
from common.protocol import EnrolReply, EnrolRequest, Refusal, TrainRequest, decode_answer, encode
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
    begin(tmp_path / "site.toml", "hospital-a", Path("images.npz"))
    text = (tmp_path / "site.toml").read_text()
    (tmp_path / "site.toml").write_text(text.replace("min_units = 50", "min_units = 5"))
    return tmp_path


def _send(path, request):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        return decode_answer(channel.unary_unary(f"/{SERVICE}/{METHOD}")(encode(request), timeout=60))[0]


def _serve(hospital):
    """`serve`, ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "client.cli", "serve", "site.toml", "--sockets", "s"], cwd=hospital, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready: ")
    return process


def _end(process):
    """End it as a supervisor does; its standard error."""
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert out.endswith("stopped\n")
    assert process.returncode == 0
    return error


@pytest.fixture
def served(hospital):
    process = _serve(hospital)
    yield process, hospital / "s" / "site.sock"
    _end(process)


def test_a_hospital_reads_approves_serves_looks_and_revokes(hospital, served):
    _, socket = served
    study = ("--study", "study.toml")
    assert "training patients" in _site("check", "site.toml", *study, cwd=hospital).stdout
    page = _site("explain", "site.toml", "study.toml", cwd=hospital)
    assert page.returncode == 0, page.stderr
    for words in ("What leaves this hospital", "Privacy unit: patient", "YES:", "Not approved yet", "Signature",
                  "the ceiling allows 0 more of this size"):  # fmt: skip
        assert words in " ".join(page.stdout.split()), words
    request = EnrolRequest(agreement=agreement(STUDY))
    refused = _send(socket, request)
    assert isinstance(refused.body, Refusal)
    assert (refused.body.kind, refused.spent) == ("NotApproved", None)
    approved = _site("approve", "site.toml", *study, "--by", "Dr. A. Example", cwd=hospital)
    assert approved.returncode == 0, approved.stderr
    assert re.search(r"cost +epsilon \d\.\d\d for a training patient", approved.stdout)
    assert "0 more of this size" in approved.stdout
    answer = _send(socket, request)
    assert isinstance(answer.body, EnrolReply)
    assert "Approved by Dr. A. Example" in _site("explain", "site.toml", "study.toml", cwd=hospital).stdout
    account = json.loads(_site("budget", "site.toml", "--json", "--plot", "b.svg", cwd=hospital).stdout)[0]
    assert account["epsilon"]["train"] > 0
    assert [stage["name"] for stage in account["studies"][0]["stages"]] == ["counts"]
    assert account["studies"][0]["refusals"] == []  # it was nobody's study when it was refused
    assert (hospital / "b.svg").read_text().startswith("<svg")
    assert _site("page", "site.toml", "--once", "page.html", cwd=hospital).returncode == 0
    assert "Dr. A. Example" in (hospital / "page.html").read_text()
    assert _site("revoke", "site.toml", "--name", "tiny", "--by", "Dr. B. Example", cwd=hospital).returncode == 0
    for asked in (request, TrainRequest(agreement=request.agreement, round=1, expected_batch=4.0)):
        assert _send(socket, asked).body == refused.body  # the stored answer is not given again either
    found = _site("verify-ledger", "site.toml", cwd=hospital).stdout
    assert re.search(r"hospital-a: \d+ entries, unbroken; newest hash [0-9a-f]{64}", found)


def test_images_that_changed_since_the_approval_get_no_answer_until_it_is_approved_again(hospital, served):
    _, socket = served
    request = EnrolRequest(agreement=agreement(STUDY))
    approve = ("approve", "site.toml", "--study", "study.toml", "--by", "Dr. A. Example")
    assert _site(*approve, cwd=hospital).returncode == 0
    write_npz(hospital / "images.npz", good_arrays(size=16, patients=True, train=42))
    refused = _send(socket, request).body
    assert isinstance(refused, Refusal)
    assert "images" not in refused.what  # why, is told in the site's own log only
    assert "not those that were there" in (hospital / "state" / "site.log").read_text()
    assert _site(*approve, cwd=hospital).returncode == 0
    assert isinstance(_send(socket, request).body, EnrolReply)


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


STUDY_AND_NAME = ("--study", "study.toml", "--by", "Dr. A")


def _error(arguments, monkeypatch, capsys):
    """What a command says that has to fail in one line with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["synthward-site", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert len(said.strip().splitlines()) == 1, said
    assert said.startswith("error: ")
    return said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("init", "site.toml", "--name", "x", "--data", "y"), "exists already"),
     (("init", "new.toml", "--name", "no good name", "--data", "y"), "name"),
     (("init", "new.toml", "--name", "hospital-a", "--data", "y"), "site hospital-a has a ledger at"),
     (("init", "new.toml", "--name", "x"), "needs a name and images"),
     (("init", "site.toml", "new.toml", "--name", "x"), "one name and one file"),
     (("init", "site.toml"), "restore its state folder from backup"),
     (("check", "nowhere.toml", "--study", "study.toml"), "cannot read the site file"),
     (("approve", "site.toml", "--study", "study.toml", "--by", " "), "fewer than two letters. Give name and role"),
     (("backup", "site.toml"), "Missing option '--to'. See `synthward-site backup --help`"),
     (("explain", "site.toml", "--study", "study.toml"), "No such option '--study'. See `synthward-site explain"),
     (("approve", "site.toml", "--study", "study.toml", "--by", "Dr. A\udcff"), "cannot be printed"),
     (("approve", "site.toml", "--study", "study.toml", "--by", "Dr. A\nB"), "cannot be printed"),
     (("approve", "site.toml", "--study", "images.toml", "--by", "Dr. A"), "policy.unit: the study protects"),
     (("revoke", "site.toml", *STUDY_AND_NAME), "not approved here. Approved are: none"),
     (("revoke", "site.toml", "--sha256", "abcdef", "--by", "Dr. A"), "not approved here"),
     (("revoke", "site.toml", "--by", "Dr. A"), "Give --study, --sha256 or --name"),
     (("revoke", "site.toml", *STUDY_AND_NAME, "--name", "tiny"), "Give --study, --sha256 or --name"),
     (("explain", "site.toml", "nowhere.toml"), "cannot read the study file"),
     (("budget", "site.toml", "site.toml", "--plot", "x.svg"), "one picture shows one site"),
     (("explain", "site.toml"), "STUDY.toml"),
     (("serve", "site.toml"), "--sockets")],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(hospital, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(hospital)
    (hospital / "images.toml").write_text(tiny_toml())
    before = (hospital / "state" / "ledger.head").read_bytes()
    assert words in _error(arguments, monkeypatch, capsys)
    assert not (hospital / "new.toml").exists()
    assert (hospital / "state" / "ledger.head").read_bytes() == before


@pytest.mark.parametrize("command", ["check", "explain", "approve"])
def test_a_misspelt_backbone_is_found_before_anything_is_approved(hospital, command, monkeypatch, capsys):
    """Finding 10 of the review: it passed `check`, let the sites spend epsilon 7.7 and then ended the run."""
    monkeypatch.chdir(hospital)
    wrong = tiny_toml(privacy={"unit": "patient"}, validation={"backbone": "test_eficientnet_gn"})
    (hospital / "study.toml").write_text(wrong)
    study = {"check": ("--study", "study.toml"), "explain": ("study.toml",), "approve": STUDY_AND_NAME}[command]
    assert "test_eficientnet_gn" in _error((command, "site.toml", *study), monkeypatch, capsys)


@pytest.mark.parametrize(
    "arguments",
    [("check", "site.toml", "--study", "study.toml"), ("explain", "site.toml", "study.toml"),
     ("approve", "site.toml", *STUDY_AND_NAME), ("revoke", "site.toml", *STUDY_AND_NAME), ("budget", "site.toml"),
     ("serve", "site.toml", "--sockets", "s"), ("verify-ledger", "site.toml"), ("init", "site.toml"),
     ("page", "site.toml", "--once", "p.html")],
    ids=lambda a: a[0],
)  # fmt: skip
@pytest.mark.parametrize("lost", ["ledger.sqlite", "everything", "cut short"])
def test_no_command_makes_a_lost_ledger_anew(hospital, arguments, lost, monkeypatch, capsys):
    """Finding 3 of the review: the next command began again at epsilon 0 and overwrote the head, the evidence."""
    monkeypatch.chdir(hospital)
    state = hospital / "state"
    if lost == "everything":  # as where a disk is not mounted
        state.rename(hospital / "unmounted")
    elif lost == "cut short":
        os.truncate(state / "ledger.sqlite", 0)
    else:
        (state / "ledger.sqlite").unlink()
    before = sorted(path.name for path in state.rglob("*")) if state.exists() else None
    said = _error(arguments, monkeypatch, capsys)
    assert "estore" in said
    assert "backup" in said
    assert (sorted(path.name for path in state.rglob("*")) if state.exists() else None) == before


def test_a_site_that_is_killed_while_it_serves_can_be_served_again(hospital):
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "client.cli", "serve", "site.toml", "--sockets", "s"], cwd=hospital, text=True,
            stdout=subprocess.PIPE, env=_environment(),
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: ")
        request = EnrolRequest(agreement=agreement(STUDY))
        assert isinstance(_send(hospital / "s" / "site.sock", request).body, Refusal)
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_file_that_is_larger_than_the_memory_is_told_in_one_line(hospital):
    _write_black_images(hospital / "images.npz", megabytes=1500)
    limit = 1000 << 20
    result = _site("check", "site.toml", "--study", "study.toml", cwd=hospital,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: .*images\.npz: train_images: the array does not fit in memory\..*\n", result.stderr)


def _write_black_images(path, *, megabytes):
    """An archive that packs as well as an attacker's, or a constant export."""
    count, side = (megabytes << 20) // 256, 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for part, many in (("train", count), ("test", 40)):
            head = {"descr": "|u1", "fortran_order": False, "shape": (many, side, side)}
            with archive.open(f"{part}_images.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, head)
                for start in range(0, many * side * side, 1 << 24):
                    file.write(bytes(min(1 << 24, many * side * side - start)))
            with archive.open(f"{part}_labels.npy", "w") as file:
                np.lib.format.write_array(file, (np.arange(many) % 2).astype(np.uint8)[:, None])


def test_what_stands_in_the_way_of_an_answer_is_said_before_anybody_asks(hospital):
    """Before: `serve` said "ready" without images or approvals, and `explain` "Approved" for images that are others."""
    approve = ("approve", "site.toml", "--study", "study.toml", "--by", "Dr. A. Example")
    assert "has approved no study" in _served_for_a_moment(hospital)
    assert _site(*approve, cwd=hospital).returncode == 0
    assert "warning" not in _served_for_a_moment(hospital)
    write_npz(hospital / "other.npz", good_arrays(size=16, patients=True, seed=5))
    (hospital / "other.npz").replace(hospital / "images.npz")
    (hospital / "images.npz").chmod(0o600)
    page = " ".join(_site("explain", "site.toml", "study.toml", cwd=hospital).stdout.split())
    assert "That was for other images than are here now" in page
    (hospital / "images.npz").unlink()
    assert "is not there: hospital-a answers nobody until it is" in _served_for_a_moment(hospital)


def _served_for_a_moment(hospital):
    """What `serve` warns of."""
    (hospital / "images.npz").exists() and (hospital / "images.npz").chmod(0o600)
    return _end(_serve(hospital))
