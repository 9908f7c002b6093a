"""BeamLoRA's gates: LoRA as long as they are equal, and which ranks are pruned and grown after a round."""

from __future__ import annotations

import pytest
import torch

from fedlora.adapters import AdapterState, delta
from fedlora.adapters.kinds.base import Place, after_round
from fedlora.adapters.kinds.beam_lora import BeamLora
from fedlora.common.errors import ConfigError
from fedlora.strategies.server import saved_state
from tests.federation import run_locally, tiny

PLACE = Place("m", 5, 6, 3)


def parts(seed: int, gates: list[float] | None = None) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {part: torch.randn(shape, generator=g) for part, shape in BeamLora().shapes(PLACE).items()}
    return made | {"g": torch.tensor(gates or [0.0] * 3)}


def test_with_equal_gates_it_is_lora():
    own = parts(0)
    factors = BeamLora(scale=1.5).factors(own, {}, PLACE)
    torch.testing.assert_close(delta(factors), 1.5 * own["B"] @ own["A"])
    assert BeamLora().gates(own["g"]).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_weak_ranks_take_what_the_strong_ones_were_a_round_before():
    """Two modules, sorted together: all that is behind 80 % of the sum of the gates is in the first one."""
    kind = BeamLora(tau=1.0, p_first=0.8)
    before = [parts(0), parts(1)]
    strong, even = torch.tensor([0.6, 2.3, 0.1]).log(), torch.zeros(3)
    after = [parts(2) | {"g": strong}, parts(3) | {"g": even}]
    first, second = kind.after_round(before, after, share=0.0)
    torch.testing.assert_close(first["A"][1], after[0]["A"][1])  # the strongest stays
    for weak in (0, 2):
        torch.testing.assert_close(first["A"][weak], before[0]["A"][1])
        torch.testing.assert_close(first["B"][:, weak], before[0]["B"][:, 1])
    assert first["g"][2] == first["g"][1]
    assert all(torch.equal(second[name], after[1][name]) for name in second)
    assert after[0]["g"] is strong  # what was given is not changed
    whole = kind.after_round(before, after, share=1.0)  # p is 1 in the end
    assert all(torch.equal(new[n], old[n]) for new, old in zip(whole, after, strict=True) for n in new)


def test_other_tensors_and_missing_modules_are_left_alone():
    kind = BeamLora()
    tensors = {kind.key("m", name): value for name, value in parts(0, [1.0, 0.0, -1.0]).items()}
    adapter = AdapterState(tensors={"head": torch.ones(2), **tensors})
    made = after_round(adapter, adapter, kind, {"m": (5, 6)}, 0.0)
    assert made.tensors.keys() == adapter.tensors.keys()
    assert torch.equal(made.tensors["head"], torch.ones(2))
    same = after_round(adapter, adapter, BeamLora(p_first=1.0), {"m": (5, 6)}, 0.0)
    assert all(torch.equal(same.tensors[name], value) for name, value in adapter.tensors.items())


@pytest.mark.parametrize("together", ["1", "auto"])
def test_a_federation_prunes_and_grows_and_learns(tmp_path, tiny_llama, together):
    keys = {"lora__kind": "beamlora", "lora__ranks": "", "lora__rank": 4, "strategy__name": "fedavg"}
    keys |= {"train__lr": 2e-2, "train__steps": 6, "train__clients_at_once": together, "model__quantization": "nf4"}
    config = tiny(tmp_path, tiny_llama, lora__kind_options="p_first=0.6", run__keep=2, **keys)
    folder, result = run_locally(config)
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    kept = [saved_state.load(folder / "state", result["key"], after=number) for number in (1, 2)]
    first, last = (state[0].adapter.tensors for state in kept if state is not None)
    ties = {name: 4 - len(set(value.tolist())) for name, value in first.items() if name.endswith("_g")}
    assert sum(ties.values()) > 0  # a rank that grew has the gate of the one that it was made of
    assert all(len(set(value.tolist())) == 4 for name, value in last.items() if name.endswith("_g"))


@pytest.mark.parametrize(("option", "value"), [("tau", 0.0), ("scale", -1.0), ("p_first", 0.0), ("p_first", 1.5)])
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ConfigError, match=f"beamlora's {option} = {value}, expected"):
        BeamLora(**{option: value})
