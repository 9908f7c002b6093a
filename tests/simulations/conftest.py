"""Fixtures for simulations."""

import pytest

from fedlora.clients.training import cohort


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many clients each computation trained."""
    seen: list[int] = []
    train = cohort.train

    def counted(bench, members, *words, **more):
        seen.append(len(members))
        return train(bench, members, *words, **more)

    monkeypatch.setattr(cohort, "train", counted)
    return seen
