"""The list of mutations is true of the code: every place is there once, every test exists, the docs show it all."""

from __future__ import annotations

import pytest
from mutations import MUTATIONS, table

from support.paths import REPOSITORY


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_changes_one_place_that_is_there(mutation):
    assert (REPOSITORY / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    for test in mutation.tests.split():
        assert (REPOSITORY / test).is_file()


def test_names_differ_and_the_docs_show_all():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 40
    assert table() in (REPOSITORY / "docs" / "privacy.md").read_text()
