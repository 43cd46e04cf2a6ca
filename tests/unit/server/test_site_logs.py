"""The owner of simulated sites reads what the sites do not tell the server; what it was told is not said twice."""

from __future__ import annotations

from client.service import _log  # the real writer
from client.site import load_site_config
from common.errors import BudgetError, DataError, StorageError
from server.site_logs import SiteLogs
from support.sites import make_site


def _raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


def test_new_entries_are_told_once_and_what_the_server_knows_is_not(tmp_path):
    site = make_site(tmp_path)
    config = load_site_config(site)
    _log(config, _raised(DataError("an old story", where="x")))
    logs = SiteLogs([site])
    assert list(logs.news()) == []
    _log(config, _raised(DataError("the images are others", where="images.npz", remedy="Put them back.")))
    _log(config, _raised(DataError("the images are others", where="images.npz", remedy="Put them back.")))
    _log(config, _raised(BudgetError("used up", where="policy.max_epsilon", asked="1", allowed="0")))
    assert list(logs.news()) == [(site.stem, "images.npz: the images are others. Put them back.")]
    _log(config, _raised(StorageError("no space left", where="ledger\x1b[31m")))
    (told,) = logs.news()
    assert "no space left" in told[1] and told[1].isprintable()
    assert list(logs.news()) == []


def test_a_log_that_begins_anew_is_read_from_its_beginning_and_a_missing_one_is_empty(tmp_path):
    site = make_site(tmp_path)
    config = load_site_config(site)
    logs = SiteLogs([site, tmp_path / "other.toml"])
    _log(config, _raised(DataError("first " * 50, where="x")))
    assert len(list(logs.news())) == 1
    (config.state / "site.log").unlink()
    _log(config, _raised(DataError("second", where="x")))
    assert [message for _, message in logs.news()] == ["x: second"]
