"""An edge starts a run in its region once, and again where an earlier start was cut off."""

from __future__ import annotations

import pytest
from flwr.app import Context, RecordDict

from fedlora.clients.worker import region


def test_a_run_is_started_once_and_again_where_its_start_was_cut_off(tmp_path, monkeypatch):
    """As if the node was killed while the region's app already listened, and the run was not yet written down."""
    begun: list[object] = []

    def begin(config, server, ca, socket, cut=False):
        begun.append(server)
        if cut:
            raise KeyboardInterrupt

    monkeypatch.setattr(region, "is_healthy", lambda socket: bool(begun))
    monkeypatch.setattr(region.edge, "begin", lambda *given: begin(*given, cut=True))
    socket = tmp_path / "worker.sock"

    def message(run: int) -> None:
        region.make_sure(socket, Context(run, 2, {"region": "localhost:1"}, RecordDict(), {}))

    with pytest.raises(KeyboardInterrupt):
        message(7)
    monkeypatch.setattr(region.edge, "begin", begin)
    message(7)
    message(7)
    assert len(begun) == 2
    message(8)
    assert len(begun) == 3
    monkeypatch.setattr(region.edge, "begin", lambda *given: begin(*given, cut=True))
    with pytest.raises(KeyboardInterrupt):
        message(9)
    monkeypatch.setattr(region.edge, "begin", begin)
    message(8)
    assert len(begun) == 5, "the app that listens may be of run 9"
