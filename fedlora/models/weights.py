"""The frozen weights of adapted layers, whatever their number format."""

from __future__ import annotations

from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear8bitLt, Params4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def weight_of(layer: LoraLayer) -> Tensor:
    """The layer's frozen weight, dequantized, [d_out, d_in]; moved to the CPU if the device has no SVD."""
    weight = _dequantized(layer.get_base_layer()).detach()
    weight = weight.cpu() if weight.device.type not in ("cpu", "cuda") else weight
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


def _dequantized(module: nn.Module) -> Tensor:
    """The module's weight, dequantized; the module is not changed."""
    weight = module.weight
    if isinstance(weight, Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, Int8Params):
        assert isinstance(module, Linear8bitLt)
        scales = weight.SCB if module.state.SCB is None else module.state.SCB  # the first forward pass moves them
        return int8_vectorwise_dequant(weight.data, scales)
    assert isinstance(weight, Tensor)
    return weight
