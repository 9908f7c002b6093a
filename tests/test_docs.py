"""What the documentation shows does what it says."""

import doctest
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_strategy_of_your_own_runs_as_shown():
    done = doctest.testfile(str(DOCS / "strategies.md"), module_relative=False, encoding="utf-8")
    assert done.attempted >= 10
    assert done.failed == 0
