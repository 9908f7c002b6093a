"""Fixtures for all tests: tiny models, and caches that no fast test shares with the user."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Read when huggingface_hub is imported, hence before anything else here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from fedlora.clients.node import held_folds
from fedlora.clients.training import cohort
from fedlora.models import adapted
from fedlora.models.base.read import quiet
from tests.device import DEVICE
from tests.tiny import save_bert, save_llama, save_vit


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Tiny models are slower on many threads, and test runs share their machine."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """What the models of the tests compute on; see `tests.device`."""
    return DEVICE


@pytest.fixture(scope="session", autouse=True)
def whole_fp32() -> None:
    """fp32 on a GPU is fp32, and no TF32 of ten bits, which cuDNN's convolutions are by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def caches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, session_cache: Path) -> None:
    """Fast tests keep assets and models in a folder of the session; slow ones in the user's own cache."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("FEDLORA_CACHE", str(session_cache / "fedlora"))
        monkeypatch.setenv("HF_HOME", str(session_cache / "huggingface"))


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Commands that run in this process send the product's log to their terminal; the next test has it as before."""
    log = logging.getLogger("fedlora")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return save_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return save_vit(tmp_path_factory.mktemp("models") / "tiny-vit")


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """What this process holds of a base and its folds is let go of at the end, as when it ends."""
    yield
    adapted.forget()
    held_folds._held.clear()


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients each computation trained."""
    seen: list[int] = []
    train = cohort.train

    def counted(bench, members, *words, **more):
        seen.append(len(members))
        return train(bench, members, *words, **more)

    monkeypatch.setattr(cohort, "train", counted)
    return seen


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process: its exit code, what it printed, and what it was refused with."""
    from fedlora.cli.main import main

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedlora", *map(str, words)])
        monkeypatch.setattr("sys.path", [*sys.path])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as end:
            main()
        done = capsys.readouterr()
        return int(end.value.code or 0), done.out, done.err

    return call
