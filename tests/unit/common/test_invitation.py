"""The invitation, and fingerprints that two people compare."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.invitation import Invitation, fingerprint, load_invitation, require_same
from support.invitations import PEM, invitation

GOOD = invitation().model_dump(mode="json")


def test_an_invitation_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "invitation.json"
    file.write_text(json.dumps(GOOD, indent=4))
    assert load_invitation(file) == invitation()


def test_its_fingerprint_is_of_what_it_says_not_of_its_bytes(tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(GOOD))
    two.write_text(json.dumps(dict(reversed(GOOD.items())), indent=1))
    assert load_invitation(one).fingerprint == load_invitation(two).fingerprint


@pytest.mark.parametrize("change", [
    {"coordinator": "evil.example:8443"}, {"certificate": PEM.replace("MIIB", "MIIC")}, {"bundles": ["1" * 64]},
    {"number": 2}, {"signer": invitation(Ed25519PrivateKey.from_private_bytes(b"1" * 32)).signer},
    {"signature": "0" * 128}, {"signature": invitation(number=3).signature}, {"signer": "f" * 64},
])  # fmt: skip
def test_whatever_of_it_is_changed_its_signature_does_not_fit(tmp_path, change):
    file = tmp_path / "invitation.json"
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(DataError, match="its signature does not fit"):
        load_invitation(file)
    if "signature" not in change:
        assert Invitation.model_validate({**GOOD, **change}).fingerprint != invitation().fingerprint


def test_the_key_of_another_thing_that_was_signed_is_no_invitation(tmp_path):
    key = Ed25519PrivateKey.generate()
    good = invitation(key)
    bare = key.sign(good._said()).hex()  # the same words, for another purpose
    file = tmp_path / "invitation.json"
    file.write_text(json.dumps({**good.model_dump(mode="json"), "signature": bare}))
    with pytest.raises(DataError, match="its signature does not fit"):
        load_invitation(file)


@pytest.mark.parametrize("change", [
    {"coordinator": "no port"}, {"coordinator": "a:b@c:1"}, {"certificate": "x"}, {"bundles": []}, {"bundles": ["abc"]},
    {"more": 1}, {"coordinator": "--insecure:1 --x"}, {"coordinator": "host\nnext:1"}, {"bundles": "0" * 64},
    {"number": 0}, {"number": "1"}, {"number": True}, {"number": 1 << 40}, {"signer": "x"}, {"signature": ""},
])  # fmt: skip
def test_anything_else_is_refused_in_one_line(tmp_path, change):
    file = tmp_path / "invitation.json"
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(DataError, match="not an invitation") as caught:
        load_invitation(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 90_000, b" " * 200_000])
def test_what_is_no_json_is_refused(tmp_path, data):
    file = tmp_path / "invitation.json"
    file.write_bytes(data)
    with pytest.raises(DataError, match="not an invitation"):
        load_invitation(file)


def test_a_missing_one_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        load_invitation(tmp_path / "none.json")


@given(st.binary(max_size=200))
def test_a_fingerprint_is_the_first_half_of_sha256_in_groups(data):
    groups = fingerprint(data).split(" ")
    assert [len(group) for group in groups] == [4] * 8
    assert hashlib.sha256(data).hexdigest().startswith("".join(groups))


def test_a_fingerprint_may_be_said_in_other_ways_but_no_digit_of_it():
    own = fingerprint(b"a")
    for said in (own, own.upper(), own.replace(" ", ""), own.replace(" ", "-"), f"  {own}\n"):
        require_same(said, own, where="here", remedy="Ask.")
    for wrong in ("", own[:-1], own + "0", own.replace(own[0], "x", 1), own[:-1] + ("0" if own[-1] != "0" else "1")):
        with pytest.raises(DataError, match="not the one given"):
            require_same(wrong, own, where="here", remedy="Ask.")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        load_invitation(tmp_path / "pipe")
