"""The site file: each mistake is one line in its owner's words."""

from __future__ import annotations

import re

import pytest

from client.site import load_site_config
from common.errors import DataError

GOOD = 'name = "st-a"\nstate = "s"\n[data]\nsource = "npz"\npath = "x.npz"\n[policy]\nmax_epsilon = 8.0\n'
NAME = "name: must be of letters (A to Z), digits, _ and -, 40 at most, no _ or - first"


def _line(tmp_path, old, new):
    assert old in GOOD
    path = tmp_path / "site.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        load_site_config(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("path =", "pth =", "data.pth: unknown key 'pth'. Did you mean 'path'?"),
        ('"npz"', '"dicom"', "data.source: must be one of 'npz', 'phantoms' (got 'dicom'). Fix the value."),
        ('source = "npz"\n', "", "data.source: missing. Add it."),
        ('path = "x.npz"\n', "", "data.path: missing. Add it."),
        ("[data]", "[dta]", "dta: unknown key 'dta'. Did you mean 'data'?"),
        ('"x.npz"', "3", "data.path: must be a path, in quotes (got 3). Fix the value."),
        ("st-a", "St A", f"{NAME} (got 'St A'). Fix the value."),
        ('name = "st-a"\n', "", "name: missing. Add it."),
        ('"st-a"', '"' + 200 * "x" + '"', f"{NAME} (got '{79 * 'x'}…). Fix the value."),
        ("8.0", '"8"', "policy.max_epsilon: must be a number, without quotes (got '8'). Fix the value."),
        ("8.0", "inf", "policy.max_epsilon: must be a finite number (got inf). Fix the value."),
        ('"x.npz"', '"x.npz"\nshard_index = 5', "data.shard_index: 5 is not below shard_count 1. Change one of them."),
        ('[data]\nsource = "npz"\npath = "x.npz"', 'data = "x.npz"', "data: must be a section of its own, with its "
         "settings below it (got 'x.npz'). Fix the value."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, old, new, line):
    assert _line(tmp_path, old, new) == line


def test_no_message_is_in_the_words_of_the_checking_library(tmp_path):
    """Whatever kind of value stands where another one belongs."""
    for key in ("name", "state", "own_reference", "test_noise_seed", "data", "policy"):
        for value in ("1.5", "true", '"text"', "[]", "{}", "1979-05-27"):
            path = tmp_path / "site.toml"
            path.write_text(f"{key} = {value}\n" + "".join(
                line for line in ('name = "a"\n', 'state = "s"\n') if not line.startswith(f"{key} ")))  # fmt: skip
            with pytest.raises(DataError) as caught:  # if of nothing else, of the images that are missing
                load_site_config(path)
            assert not re.search("Input|valid|pars|pydantic|Tuple|String", str(caught.value))
