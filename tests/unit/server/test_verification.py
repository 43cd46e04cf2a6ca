"""`synthward verify` and `release` on what somebody may have done to a bundle: one line each; only plain files are
opened."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import struct
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import CheckpointError, StorageError, StudyError, SynthwardError
from common.files import write_json
from server.checkpoints import RunFolder
from server.release import export, verification
from server.release.checksums import CHECKSUMS, verify_checksums, write_checksums
from server.release.export import give_away
from server.release.verification import in_words, release_folder, verified
from support.releases import a_finished_run, a_release, claim_of
from support.studies import tiny_study

ROOT = "1.2.826.0.1.3680043.10.1"
MOST_MEMORY = 60 << 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return a_release(tmp_path_factory.mktemp("whole") / "release")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return a_finished_run(tmp_path_factory.mktemp("run"), tiny_study(release={"min_auc": 0.8, "smallest_class": 12}))


@pytest.fixture
def release(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "release")


@pytest.fixture
def own_run(run, tmp_path):
    return RunFolder(shutil.copytree(run.path, tmp_path / "run"))


def line_of(folder, act=verified):
    """What is said of a folder that is refused: one line, and it names no trace."""
    with pytest.raises(SynthwardError) as caught:
        act(folder)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def resealed(folder, act=verified):
    """The same, where whoever changed it wrote the checksums anew."""
    write_checksums(folder)
    return line_of(folder, act)


def edited(path, change):
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def test_a_whole_release_says_what_is_promised_and_by_whom(whole):
    facts = verified(whole)
    words = in_words(whole, facts)
    assert facts.claim.statement in words and "PHANTOMS" not in words.splitlines()[0]
    assert "the ledger of site-1, site-2" in words and "Nobody has signed it." in words
    assert all(line.isprintable() for line in words.splitlines())


def test_signatures_may_be_there_and_are_left_to_those_who_read_them(release):
    (release / "signatures").mkdir()
    (release / "signatures" / "coordinator.sig").write_bytes(b"x")
    assert "1 file(s)" in in_words(release, verified(release))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_flipped_byte_of_any_file_is_named(whole, data):
    files = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(files + [CHECKSUMS] * 20))
    before = (whole / name).read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    after = bytearray(before)
    after[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        (whole / name).write_bytes(after)
        try:
            problems = verify_checksums(whole)
        except SynthwardError as error:
            problems = [str(error)]
        told = " ".join(problems)
        touched = name
        if name == CHECKSUMS:  # the line that was changed names a file, or none any more
            line = before[: place + 1].count(b"\n") - (before[place : place + 1] == b"\n")
            touched = before.split(b"\n")[line].decode().partition("  ")[2]
        assert touched in told or CHECKSUMS in told
    finally:
        (whole / name).write_bytes(before)


def _edit(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _link(path):
    shutil.copy(path, path.parent.parent / "elsewhere")
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


def _folder(path):
    path.unlink()
    path.mkdir()


def _sparse(path):
    with path.open("ab") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(("name", "act", "words"), [
    ("claim.json", lambda p: p.unlink(), "claim.json is missing"),
    ("images.npz", lambda p: p.write_bytes(p.read_bytes()[:-9]), "images.npz was changed"),
    ("report.html", _fifo, "report.html is a named pipe"), ("report.html", _link, "report.html is a symbolic link"),
    ("report.html", _folder, "report.html is missing"), ("README.md", _sparse, "README.md is larger than any"),
    ("images.npz", _sparse, "images.npz is larger than any"),
    ("SHA256SUMS", lambda p: p.unlink(), "no finished release"), ("SHA256SUMS", _sparse, "far longer than"),
    ("SHA256SUMS", _fifo, "SHA256SUMS"), ("SHA256SUMS", _link, "SHA256SUMS"),
    ("SHA256SUMS", lambda p: p.write_text(p.read_text()[:-1]), "SHA256SUMS is cut short"),
    ("SHA256SUMS", lambda p: p.write_text(p.read_text() + p.read_text().splitlines()[0] + "\n"), "is listed twice"),
    ("SHA256SUMS", lambda p: p.write_text(p.read_text() + f"{'0' * 64}  ../../etc/passwd\n"), "no file of the release"),
    ("SHA256SUMS", lambda p: p.write_text(p.read_text() + f"{'0' * 64}  /etc/passwd\n"), "no file of the release"),
    ("SHA256SUMS", lambda p: p.write_text(p.read_text() + f"{'0' * 64}  images/../claim.json\n"), "no file of the"),
    ("extra", lambda p: p.write_text("x"), "extra is not listed"), ("pipe", os.mkfifo, "pipe is a named pipe"),
    ("link", lambda p: p.symlink_to("/etc"), "link is a symbolic link"),
])  # fmt: skip
def test_what_is_no_longer_as_it_was_written_is_named(release, name, act, words):
    act(release / name)
    assert words in line_of(release)


def test_a_folder_behind_a_link_is_not_followed(release):
    shutil.move(release / "images", release.parent / "moved")
    (release / "images").symlink_to(release.parent / "moved")
    assert "images/0-clear/00000.png is behind a symbolic link" in line_of(release)


def test_a_device_is_never_opened(release):
    if os.geteuid() != 0:
        pytest.skip("making a device needs root")
    try:
        os.mknod(release / "null", 0o600 | 0o020000, os.makedev(1, 3))
    except OSError:
        pytest.skip("no devices can be made here")
    assert "null is a device" in line_of(release)


def test_what_is_no_folder_is_one_line(release, tmp_path):
    assert "no finished release" in line_of(tmp_path / "nowhere")
    assert "is a file" in line_of(release / "claim.json")


def _claim(**changes):
    """claim.json of the tiny study, changed and consistent in itself."""
    return claim_of(tiny_study()).model_copy(update=changes).to_json()


def _lower(site):
    return site.model_copy(update={"epsilon_train": 0.1, "basis": "plan"})


CLAIMS = {
    "contradicts itself": lambda v: v.update(epsilon_max=0.1),
    "another study": lambda v: v.update(_claim(study_sha256="0" * 64)),
    "promises something else": lambda v: v.update(_claim(unit="patient")),
    "other mechanisms": lambda v: v.update(_claim(mechanisms=claim_of(tiny_study()).mechanisms[1:])),
    "a noise that no plan has": lambda v: v["mechanisms"][0].update(noise_multiplier=1e-9),
    "where its mechanisms cost": lambda v: [m.update(noise_multiplier=400.0) for m in v["mechanisms"]],
    "does not say what claim.json": lambda v: v.update(statement="Epsilon is 0.1."),
    "not a claim": lambda v: v.update(delta=5e-324),
    "not a claim ": lambda v: v.clear(),
}


@pytest.mark.parametrize("words", CLAIMS)
def test_a_claim_whose_figures_do_not_follow_is_refused_whoever_wrote_the_checksums(release, words):
    edited(release / "claim.json", CLAIMS[words])
    assert words.strip() in resealed(release)


def test_a_site_of_the_plan_costs_the_plan_and_metrics_say_what_the_claim_does(release):
    sites = tuple(map(_lower, claim_of(tiny_study()).sites))
    claim = claim_of(tiny_study()).model_copy(update={"sites": sites})
    write_json(release / "claim.json", claim.to_json())
    assert "other epsilons than claim.json" in resealed(release)
    edited(release / "metrics.json", lambda v: v["epsilon"].update(
        max=claim.epsilon_max, sum=claim.epsilon_sum, sites={s.site: s.epsilon for s in claim.sites}
    ))  # fmt: skip
    assert "says epsilon 0.1 of site-1's train records" in resealed(release)


def _bomb(path):
    """Says that it is the set, has its images, and unpacks to far more."""
    with np.load(path) as archive:
        images, labels = archive["train_images"], archive["train_labels"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("train_images.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (24, 16, 16)})
            file.write(images.tobytes())
            for _ in range(100):
                file.write(bytes(1 << 20))
        for part in ("train_labels", "val_images", "val_labels", "test_images", "test_labels"):
            shape = (0, 1) if part.endswith("labels") else (0, 16, 16)
            with archive.open(f"{part}.npy", "w") as file:
                np.lib.format.write_array(file, labels if part == "train_labels" else np.zeros(shape, np.uint8))


def _many_members(path):
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(300):
            archive.writestr(f"{number}.npy", b"")


def _large_png(path):
    """A head that promises 30,000 x 30,000 pixels."""
    head = b"IHDR" + struct.pack(">LLBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">L", 13) + head + struct.pack(">L", zlib.crc32(head)))


def _larger_shape(path):
    np.savez_compressed(path, train_images=np.zeros((24, 500, 500), np.uint8))


@pytest.mark.parametrize(("name", "act", "words"), [
    ("images.npz", _bomb, "not 24 images of this study"), ("images.npz", _many_members, "longer directory"),
    ("images.npz", _larger_shape, "other arrays"), ("images.npz", lambda p: p.write_bytes(b"PK"), "no end of an"),
    ("images.npz", lambda p: p.write_bytes(b""), "no end of an archive"),
    ("images/0-clear/00000.png", _large_png, "00000.png is not the image"),
    ("images/0-clear/00000.png", lambda p: Image.new("L", (17, 16)).save(p), "00000.png is not the image"),
    ("images/0-clear/00000.png", lambda p: p.write_bytes(b"\x89PNG"), "00000.png is not the image"),
    ("images/metadata.csv", _edit(",0,", ",1,"), "metadata.csv does not say"),
    ("images/metadata.csv", lambda p: p.write_text(p.read_text() + "x,0,clear\n"), "more lines"),
    ("claim.json", lambda p: p.write_text("[" * 100_000), "not JSON"),
    ("claim.json", lambda p: p.write_text(f'"{"x" * (5 << 20)}"'), "larger than the"),
    ("metrics.json", lambda p: p.write_text('{"images": 1}'), "not the metrics"),
    ("metrics.json", lambda p: p.write_text("[" * 100_000), "not JSON"),
    ("metrics.json", lambda p: p.write_text("1" * 10_000), "not JSON"),
    ("metrics.json", lambda p: edited(p, lambda v: v.update(images=23)), "other classes or images"),
    ("metrics.json", lambda p: edited(p, lambda v: v["classes"].update(clear=11, opacity=13)), "12 images of class"),
    ("study.toml", lambda p: p.write_text("[" * 100_000), "not TOML"),
    ("study.toml", lambda p: p.write_bytes(b"\xff"), "not TOML"),
    ("study.toml", _edit("steps = 4", "steps = 5"), "another study than"),
    ("study.toml", lambda p: p.write_text(p.read_text() + "\n# path = /home/x\n"), "study.toml does not say"),
    ("generator/model.safetensors", lambda p: p.write_bytes(b"x"), "model.safetensors does not load"),
    ("generator/model.safetensors", lambda p: p.write_bytes(bytes(64 << 20)), "model.safetensors does not load"),
    ("README.md", _edit("epsilon 4.20", "epsilon 0.42"), "README.md does not say"),
    ("croissant.json", lambda p: p.write_text("{}"), "croissant.json does not say"),
])  # fmt: skip
def test_what_contradicts_the_rest_is_named_within_bounded_memory(release, name, act, words):
    act(release / name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in resealed(release)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < MOST_MEMORY


def test_a_bundle_mixed_of_two_releases_is_named(release, tmp_path):
    other = a_release(tmp_path / "other", tiny_study(study={"seed": 4}))
    shutil.copy(other / "claim.json", release / "claim.json")
    assert "another study" in resealed(release)


def test_another_versions_words_are_not_compared_and_that_is_said(release, monkeypatch):
    monkeypatch.setattr(verification, "writer", lambda: "0" * 64)  # as after an update of a checkout: the number stays
    (release / "README.md").write_text("Other words.")
    write_checksums(release)
    assert "written by other code than this" in in_words(release, verified(release))


def test_a_run_is_given_away_whole_and_is_the_same_each_time(run, tmp_path):
    assert release_folder(run.path) == run.release
    first = give_away(run.path, tmp_path / "first", dicom=True, uid_root=ROOT)
    second = give_away(run.path, tmp_path / "second", dicom=True, uid_root=ROOT)
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)
    verified(first)
    plain = give_away(run.path, None, dicom=False, uid_root="")
    assert plain == run.path.with_name(f"{run.path.name}-release")
    assert (plain / CHECKSUMS).read_bytes() == (run.release / CHECKSUMS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize(("settings_of_data", "interpretation"), [({}, "MONOCHROME2"), ({"channels": 3}, "RGB")])
def test_dicom_files_are_marked_as_synthetic_and_say_nothing_of_a_patient(tmp_path, settings_of_data, interpretation):
    pydicom = pytest.importorskip("pydicom")
    odd = {"classes": ["a\\b " + "x" * 70, "健康"], **settings_of_data}
    run = a_finished_run(tmp_path, tiny_study(data=odd, release={"uid_root": ROOT}))
    out = give_away(run.path, tmp_path / "out", dicom=True, uid_root="")
    found = [pydicom.dcmread(path) for path in sorted(out.rglob("*.dcm"))]
    assert len(found) == 24 and len({image.SOPInstanceUID for image in found}) == 24
    images = np.load(out / "images.npz")["train_images"]
    for image in found:
        assert (image.SyntheticData, image.ConversionType, image.BurnedInAnnotation) == ("YES", "SYN", "NO")
        assert image[0x0008, 0x001C].value == "YES" and image.PhotometricInterpretation == interpretation
        uids = [element.value for element in image if element.VR == "UI" and element.keyword != "SOPClassUID"]
        assert all(uid.startswith(f"{ROOT}.") and pydicom.uid.UID(uid).is_valid for uid in uids)
        assert not [e for e in image if e.tag.group == 0x0010 and e.value] and not [
            e for e in image if e.VR in ("DA", "TM", "DT") and e.value
        ]
        assert any(np.array_equal(image.pixel_array, pixels) for pixels in images)
    assert len({image.StudyInstanceUID for image in found}) == 1 and len({i.SeriesInstanceUID for i in found}) == 2
    some = next(out.rglob("*.dcm"))
    image = pydicom.dcmread(some)
    image.PatientName = "Somebody"
    image.save_as(some)
    assert "dcm is not the image" in resealed(out)


def _unfinished(run):
    shutil.rmtree(run.release)


def _report(run):
    edited(run.path / "state.json", lambda v: v["release"]["reported"]["site-1"].update(epsilon_train=0.1))


def _rounds(run):
    last = run.last_checkpoint()
    run.save_checkpoint(replace(last, rows=[replace(last.rows[0], epsilon={"site-1": 7.9})]))


@pytest.mark.parametrize(("act", "words"), [
    (_unfinished, "the run is not finished. Go on with it: synthward run --resume"),
    (_report, "not what the sites' ledgers reported"), (_rounds, "not what the sites' ledgers reported"),
    (lambda run: (run.path / "state.json").unlink(), "not what the sites' ledgers reported"),
    (lambda run: (run.release / "claim.json").write_text("{}"), "claim.json was changed"),
    (lambda run: (run.path / "plan.json").unlink(), "not a run folder"),
])  # fmt: skip
def test_what_does_not_hold_is_not_given_away(own_run, tmp_path, act, words):
    act(own_run)
    out = tmp_path / "out"
    assert words in line_of(own_run.path, lambda path: give_away(path, out, dicom=False, uid_root=""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(("limits", "words"), [
    ({"min_auc": 0.9}, "AUC 0.876, release.min_auc is 0.9"),
    ({"smallest_class": 13}, "12 images of class 'clear', release.smallest_class is 13"),
])  # fmt: skip
def test_a_limit_of_the_study_that_is_not_met_is_one_line(tmp_path, limits, words):
    run = a_finished_run(tmp_path, tiny_study(release=limits))
    with pytest.raises(StudyError, match=re.escape(words)):
        give_away(run.path, None, dicom=False, uid_root="")
    assert list(tmp_path.iterdir()) == [run.path]


def test_dicom_without_a_root_and_places_that_are_taken_are_one_line(run, tmp_path):
    for root, words in (("", "need the root"), ("1.x", "no root of DICOM UIDs"), ("1." + "2" * 40, "no root of")):
        assert words in line_of(run.path, lambda path: give_away(path, tmp_path / "o", dicom=True, uid_root=root))
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("taken", "link"):
        with pytest.raises(StorageError, match="is there already"):
            give_away(run.path, tmp_path / name, dicom=False, uid_root="")
    with pytest.raises(StorageError, match="inside the run folder"):
        give_away(run.path, run.path / "release" / "again", dicom=False, uid_root="")
    assert not (tmp_path / "o").exists() and verify_checksums(run.release) == []


def test_what_stops_in_the_middle_leaves_nothing_and_what_a_kill_left_is_no_release(run, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"

    def stop(*_):
        assert partial.is_dir() and not out.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export, "write_checksums", stop)
        with pytest.raises(KeyboardInterrupt):
            give_away(run.path, out, dicom=False, uid_root="")
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(run.release, partial)  # as SIGKILL leaves it
    (partial / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match="no finished release"):
        verified(partial)
    give_away(run.path, out, dicom=False, uid_root="")
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_changes_while_it_is_copied_is_not_given_away(own_run, tmp_path, monkeypatch):
    real = export.listed_files
    monkeypatch.setattr(export, "listed_files", lambda folder: {**real(folder), "report.html": "0" * 64})
    with pytest.raises(CheckpointError, match="changed while it was copied"):
        give_away(own_run.path, tmp_path / "out", dicom=False, uid_root="")
    assert not (tmp_path / "out").exists()
