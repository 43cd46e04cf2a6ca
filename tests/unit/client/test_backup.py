"""A backup is the state of one moment, also while answers are given, and goes back whole or not at all."""

from __future__ import annotations

import io
import stat
import tarfile
import threading
from contextlib import closing

import numpy as np
import pytest

from client.backup import back_up, restore
from client.privacy.ledger import Ledger
from client.site import Site, load_site_config
from common.errors import StorageError
from common.protocol import EnrolRequest
from support.sites import approve, ask, make_npz_site
from support.studies import agreement, tiny_study

STUDY = tiny_study()


@pytest.fixture
def path(tmp_path):
    path = make_npz_site(tmp_path)
    approve(Site.open(path, STUDY), STUDY)
    ask(path, EnrolRequest(agreement=agreement()))
    return path


def _back_up(path, file):
    with closing(load_site_config(path).ledger()) as ledger:
        return back_up(ledger, file)


def test_what_was_backed_up_is_there_again_and_answers_as_before(path, tmp_path):
    state, file = load_site_config(path).state, tmp_path / "backup.tar"
    number, newest = _back_up(path, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = ask(path, EnrolRequest(agreement=agreement()))
    kept = {p.relative_to(state): p.read_bytes() for p in state.rglob("*.reply")}
    state.rename(tmp_path / "lost")
    assert restore(file, state)[:2] == (number, newest)
    assert {p.relative_to(state): p.read_bytes() for p in state.rglob("*.reply")} == kept and kept
    assert ask(path, EnrolRequest(agreement=agreement()))[0] == before[0]
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o077 == 0 for p in (state, *state.rglob("*")))
    with closing(load_site_config(path).ledger()) as ledger:
        ledger.refused(STUDY, stage="train", rule="x", asked="", allowed="", what="")  # it can be written


def test_every_backup_that_is_made_while_the_ledger_is_written_can_be_restored(path, tmp_path):
    state, stop = load_site_config(path).state, threading.Event()

    def write():
        with closing(Ledger.open(state)) as ledger:
            for number in range(90):  # a study's refusals are counted to a hundred
                ledger.refused(STUDY, stage="train", rule=str(number), asked="", allowed="", what="")
                if stop.is_set():
                    return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = [_back_up(path, tmp_path / f"{number}.tar")[0] for number in range(8)]
    finally:
        stop.set()
        writer.join()
    assert found == sorted(found) and found[-1] > found[0]
    for number, entries in enumerate(found):
        assert restore(tmp_path / f"{number}.tar", tmp_path / f"state-{number}")[0] == entries


def test_nothing_is_written_over(path, tmp_path):
    state, file = load_site_config(path).state, tmp_path / "backup.tar"
    _back_up(path, file)
    data = file.read_bytes()
    with pytest.raises(StorageError, match="is there already"):
        _back_up(path, file)
    with pytest.raises(StorageError, match="not empty"):
        restore(file, state)
    assert file.read_bytes() == data
    Ledger.open(state).close()


def _tar(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            if data is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data or b""))
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 2000, _tar(), _tar(("ledger.sqlite", b"no ledger")), _tar(("../out", b"x")), _tar(("/tmp/out", b"x")),
     _tar(("ledger.key", None)), _tar(("a/b/c", b"x"))],
)  # fmt: skip
def test_what_is_no_backup_leaves_nothing_behind(tmp_path, data):
    file, state = tmp_path / "backup.tar", tmp_path / "state"
    file.write_bytes(data)
    with pytest.raises(StorageError):
        restore(file, state)
    assert not state.exists() or not [p for p in state.rglob("*") if p.is_file()]
    assert not (tmp_path / "out").exists()


def test_a_cut_or_flipped_backup_is_refused(path, tmp_path):
    file, half = tmp_path / "backup.tar", tmp_path / "half.tar"
    _back_up(path, file)
    data, rng = file.read_bytes(), np.random.default_rng(0)
    with tarfile.open(file) as tar:
        cuts = [entry.offset for entry in tar] + [tar.getmembers()[-1].offset_data + 1]
    assert len(cuts) > 5
    for number, cut in enumerate(cuts):
        half.write_bytes(data[:cut])
        with pytest.raises(StorageError):
            restore(half, tmp_path / f"state-{number}")
    with tarfile.open(file) as tar:
        entry = tar.getmember("ledger.sqlite")
    for number in range(6):
        spoilt = bytearray(data)
        for place in rng.integers(entry.offset_data, entry.offset_data + entry.size, 200):
            spoilt[place] ^= 0xFF
        half.write_bytes(spoilt)
        with pytest.raises(StorageError):
            restore(half, tmp_path / f"spoilt-{number}")
