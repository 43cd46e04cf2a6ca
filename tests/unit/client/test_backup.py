"""A backup is the state of one moment, also while answers are given, and goes back whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from client.backup import back_up, restore
from client.privacy.ledger import Ledger
from client.registry import Registry
from client.service import SiteService
from client.site import Site, load_site_config
from common.errors import StorageError
from common.protocol import EnrolRequest, MomentsRequest, decode_answer, encode
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
    found = restore(file, state, accept=lambda _: None)
    assert (found.number, found.hash) == (number, newest)
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
        state = tmp_path / f"state-{number}"
        assert restore(tmp_path / f"{number}.tar", state, accept=lambda _: None).number == entries


def test_nothing_is_written_over(path, tmp_path):
    state, file = load_site_config(path).state, tmp_path / "backup.tar"
    _back_up(path, file)
    data = file.read_bytes()
    with pytest.raises(StorageError, match="is there already"):
        _back_up(path, file)
    with pytest.raises(StorageError, match="not empty"):
        restore(file, state, accept=lambda _: None)
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
        restore(file, state, accept=lambda _: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backup.tar"]


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
            restore(half, tmp_path / f"state-{number}", accept=lambda _: None)
    with tarfile.open(file) as tar:
        entry = tar.getmember("ledger.sqlite")
    for number in range(6):
        spoilt = bytearray(data)
        for place in rng.integers(entry.offset_data, entry.offset_data + entry.size, 200):
            spoilt[place] ^= 0xFF
        half.write_bytes(spoilt)
        with pytest.raises(StorageError):
            restore(half, tmp_path / f"spoilt-{number}", accept=lambda _: None)


def test_one_changed_byte_of_any_file_in_it_is_found(path, tmp_path):
    file, spoilt = tmp_path / "backup.tar", tmp_path / "spoilt.tar"
    (load_site_config(path).state / "note.txt").write_text("what nothing else checks")
    _back_up(path, file)
    with tarfile.open(file) as tar:
        files = [(m.name, m.offset_data, m.size) for m in tar.getmembers()[:-1] if m.size]
    assert {"ledger.sqlite", "ledger.key", "note.txt"} < {name for name, _, _ in files}
    for name, offset, size in files:
        data = bytearray(file.read_bytes())
        data[offset + size // 2] ^= 1
        spoilt.write_bytes(data)
        with pytest.raises(StorageError, match=f"'{name}' in it was changed"):
            restore(spoilt, tmp_path / "again", accept=lambda _: None)
        assert not (tmp_path / "again").exists()


def test_an_older_backup_than_the_machine_has_seen_is_not_taken(path, tmp_path):
    config, file = load_site_config(path), tmp_path / "backup.tar"
    with closing(config.ledger()) as ledger, Registry(config.registry).locked():
        Registry(config.registry).place(config.name, ledger)
    _back_up(path, file)
    service = SiteService(path)
    service.answer(encode(MomentsRequest(agreement=agreement(), counts=(30.0, 30.0))))  # the list hears of it
    config.state.rename(tmp_path / "lost")
    with pytest.raises(StorageError, match="an older backup was restored"):
        restore(file, config.state, accept=Registry(config.registry).require_not_older)
    assert not config.state.exists()
    restore(file, config.state, accept=lambda _: None)  # by force, under a service that answers
    before = file.read_bytes()
    refused, _ = decode_answer(service.answer(encode(EnrolRequest(agreement=agreement()))))
    assert refused.body.kind == "Unavailable"
    assert "an older one was put in its place" in (config.state / "site.log").read_text()
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["a#b", "a?b=c", "a%41"])
def test_a_state_under_any_path_is_backed_up(tmp_path, name):
    (tmp_path / name).mkdir()
    site = make_npz_site(tmp_path / name)
    (load_site_config(site).state / "deep" / "er").mkdir(parents=True)
    (load_site_config(site).state / "deep" / "er" / "file").write_text("x")
    _back_up(site, tmp_path / "backup.tar")
    restore(tmp_path / "backup.tar", tmp_path / "again", accept=lambda _: None)
    assert (tmp_path / "again" / "deep" / "er" / "file").read_text() == "x"


def test_a_folder_that_is_there_and_empty_is_filled_where_it_is(path, tmp_path):
    """A mounted folder cannot be exchanged for another one, and a folder of root's may hold it."""
    file, state = tmp_path / "backup.tar", tmp_path / "mounted" / "state"
    number, _ = _back_up(path, file)
    state.mkdir(parents=True)
    before = state.stat().st_ino
    with pytest.raises(StorageError):
        restore(_spoilt(file), state, accept=lambda _: None)
    assert list(state.iterdir()) == []
    assert restore(file, state, accept=lambda _: None).number == number
    assert state.stat().st_ino == before
    assert [p.name for p in state.parent.iterdir()] == ["state"]
    Ledger.open(state).close()


def _spoilt(file):
    half = file.with_name("half.tar")
    half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return half


def _killed_while_it_moves(file, state, after):
    """In a child that dies as a killed process does: nothing of it runs any more."""
    child = os.fork()
    if child == 0:
        rename, moved = Path.rename, list[Path]()

        def stopped(source, target):
            if len(moved) == after:
                os._exit(9)
            moved.append(source)
            return rename(source, target)

        Path.rename = stopped
        restore(file, state, accept=lambda _: None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_restore_that_was_killed_while_it_moved_files_leaves_nothing_that_is_taken_for_a_ledger(path, tmp_path):
    file = tmp_path / "backup.tar"
    number, _ = _back_up(path, file)
    with tarfile.open(file) as tar:
        files = {name.partition("/")[0] for name in tar.getnames()} - {"backup.json"}
    for after in range(len(files)):
        state = tmp_path / f"state-{after}"
        state.mkdir()
        _killed_while_it_moves(file, state, after)
        with pytest.raises(StorageError):
            Ledger.open(state)
        with pytest.raises(StorageError):  # nor does a new one begin beside it
            Ledger.create(state)
        if after:
            with pytest.raises(StorageError, match="not empty"):
                restore(file, state, accept=lambda _: None)
        else:
            assert restore(file, state, accept=lambda _: None).number == number
    assert len(files) >= 3


def test_an_error_while_files_are_moved_leaves_nothing_behind_and_a_new_disk_is_empty(path, tmp_path, monkeypatch):
    file, state = tmp_path / "backup.tar", tmp_path / "state"
    number, _ = _back_up(path, file)
    (state / "lost+found").mkdir(parents=True)
    rename = Path.rename

    def fails(source, target):
        if source.name == "ledger.sqlite":
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(StorageError, match="Input/output error"):
        restore(file, state, accept=lambda _: None)
    monkeypatch.undo()
    assert [p.name for p in state.iterdir()] == ["lost+found"]
    assert restore(file, state, accept=lambda _: None).number == number
