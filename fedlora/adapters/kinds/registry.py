"""Adapter kinds by name."""

from __future__ import annotations

from fedlora.common.registry import Registry

KINDS = Registry(
    noun="adapter kind",
    key="lora.kind",
    options_key="lora.kind-options",
    base="fedlora.adapters.kinds.base:AdapterKind",
    method="forward",
    names={
        "lora": "fedlora.adapters.kinds.lora:Lora",
        "miss": "fedlora.adapters.kinds.miss:Miss",
        "randlora": "fedlora.adapters.kinds.randlora:RandLora",
        "vera": "fedlora.adapters.kinds.vera:Vera",
        "beamlora": "fedlora.adapters.kinds.beam_lora:BeamLora",
        "block-lora": "fedlora.adapters.kinds.block_lora:BlockLora",
        "lora-xs": "fedlora.adapters.kinds.lora_xs:LoraXs",
        "loldu": "fedlora.adapters.kinds.loldu:LoLdu",
        "dora": "fedlora.adapters.kinds.dora:Dora",
        "glora": "fedlora.adapters.kinds.glora:GLora",
        "mtl-lora": "fedlora.adapters.kinds.mtl_lora:MtlLora",
        "ravan": "fedlora.adapters.kinds.ravan:Ravan",
        "mixlora": "fedlora.adapters.kinds.mix_lora:MixLora",
        "fedalt": "fedlora.adapters.kinds.fed_alt:FedAlt",
    },
)
