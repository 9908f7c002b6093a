"""The traffic that FlowerTune's leaderboard publishes for SmolLM2, computed from shapes, and beside it this count.

Published: SmolLM2-135M-Instruct and SmolLM2-360M-Instruct, r = 8 on q_proj and v_proj, 20 clients, two in each of 100
rounds (github.com/TNI-playground/TNI-FlowerTune-LLM-Leaderboard-GeneralNLP-SmolLM2-Series). Its clients train DoRA.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from fedlora.adapters import AdapterState
from fedlora.adapters.kinds.base import Place
from fedlora.adapters.kinds.dora import Dora
from fedlora.adapters.kinds.lora import Lora
from fedlora.exchange import Broadcast, ClientUpdate, wire

# layers, width, width of keys and values; megabytes published
MODELS = {"135M": (30, 576, 192, "747.07"), "360M": (32, 960, 320, "1321.88")}
TRANSFERS = 100 * 2 * 2  # rounds, clients in each, down and up
FP32 = 4


def parts(kind: Dora | Lora, model: str) -> dict[str, tuple[int, ...]]:
    layers, width, narrow, _ = MODELS[model]
    outputs = {"q_proj": width, "v_proj": narrow}
    places = [Place(f"model.layers.{i}.self_attn.{n}", d, width, 8) for i in range(layers) for n, d in outputs.items()]
    return {f"{place.module}.dora_{part}": s for place in places for part, s in kind.shapes(place).items()}


def numbers(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def saved_by_numpy(shape: tuple[int, ...]) -> int:
    """What Flower's `ndarrays_to_parameters` makes of an array."""
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.float32), allow_pickle=False)
    return len(file.getvalue())


@pytest.mark.parametrize("model", MODELS)
def test_what_flowertune_counts(model: str) -> None:
    """DoRA's A, B and magnitudes in fp32, each tensor in NumPy's file format, down and up, in units of 2^20 bytes."""
    shapes, published = parts(Dora(), model).values(), MODELS[model][3]
    transfer = sum(saved_by_numpy(shape) for shape in shapes)
    assert transfer == FP32 * numbers(shapes) + 128 * len(shapes)
    assert f"{TRANSFERS * transfer / 2**20:.2f}" == published


def test_every_part_of_the_difference_is_needed() -> None:
    """LoRA's bare numbers are 737.28 MB; magnitudes, headers and the unit make 747.07 of it."""
    dora, lora = parts(Dora(), "135M"), parts(Lora(), "135M")
    assert numbers(lora.values()) == 460_800
    assert TRANSFERS * FP32 * numbers(lora.values()) == 737_280_000
    assert numbers(dora.values()) - numbers(lora.values()) == 30 * (576 + 192)
    magnitudes, headers = TRANSFERS * FP32 * 23_040, TRANSFERS * 128 * 180
    assert (magnitudes, headers) == (36_864_000, 9_216_000)
    assert 737_280_000 + magnitudes + headers == 783_360_000 == 747.0703125 * 2**20


def test_what_this_project_counts_for_the_same_run() -> None:
    """The same numbers, and one header for all tensors of a message instead of one for each."""
    shapes = parts(Dora(), "135M")
    adapter = AdapterState(tensors={name: torch.zeros(shape) for name, shape in shapes.items()})
    sent = Broadcast(round=1, adapter=adapter, base_version=0, folds=(), folds_from=0)
    down = wire.payload_bytes(wire.encode_broadcast(sent, "base"))
    up = wire.payload_bytes(wire.encode_update(ClientUpdate(0, adapter, 1, 0), "base", "fp32"))
    bare = FP32 * numbers(shapes.values())
    assert bare == 1_935_360
    assert 0 < down - bare < 128 * len(shapes)
    assert up == down
    assert f"{TRANSFERS / 2 * (up + down) / 1e6:.1f}" == "782.3"
