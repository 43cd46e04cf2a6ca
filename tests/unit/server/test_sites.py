"""Who is missing when a run waits for sites to come online."""

from __future__ import annotations

from typing import cast

import pytest
from flwr.serverapp import Grid

from common.errors import FederationError
from server.federation import sites as module
from server.federation.sites import SiteGroup


class _Online:
    """Nodes that come online one after another, one at each look."""

    def __init__(self, *nodes, looks=None):
        self.nodes, self.looks = list(nodes), looks

    def get_node_ids(self):
        if self.looks is None:
            return self.nodes
        self.looks += 1
        return self.nodes[: self.looks]


def _group(grid, seconds=0.3):
    return SiteGroup(cast(Grid, grid), timeout_seconds=seconds)


def test_it_waits_until_enough_are_there_in_a_fixed_order(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    nodes = _group(_Online(9, 3, 5, looks=0), 60).wait_for(2, known={}, on_wait=lambda *_: None)
    assert nodes == [3, 9]


def test_a_site_that_took_part_before_and_is_not_online_is_named_while_it_waits_and_at_the_end(monkeypatch):
    monkeypatch.setattr(module, "_TELL_SECONDS", 0.0)
    told = []
    with pytest.raises(FederationError, match="1 of 2 sites are online; not online: hospital-b after"):
        _group(_Online(3)).wait_for(2, known={3: "hospital-a", 8: "hospital-b"}, on_wait=lambda *row: told.append(row))
    assert told[0][0] == "1 of 2 sites are online; not online: hospital-b"
    assert 0 < told[0][1] <= 0.3


def test_where_no_name_is_known_the_number_is_said():
    with pytest.raises(FederationError, match="0 of 2 sites are online after 0 s"):
        _group(_Online()).wait_for(2, known={}, on_wait=lambda *_: None)
