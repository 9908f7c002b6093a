"""Fixtures for the commands on trained adapters."""

import pytest

from fedlora.cli.main import main


@pytest.fixture
def fedlora(monkeypatch, capsys):
    """The exit code, what was printed and what was refused."""

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedlora", *map(str, words)])
        monkeypatch.setattr("sys.path", [*__import__("sys").path])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as end:
            main()
        done = capsys.readouterr()
        return int(end.value.code or 0), done.out, done.err

    return call
