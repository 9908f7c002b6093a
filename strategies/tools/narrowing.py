"""Messages about a part of the modules."""

from __future__ import annotations

from dataclasses import replace

from fedlora.adapters import AdapterState
from fedlora.exchange import Broadcast


def narrowed(sent: Broadcast, modules: frozenset[str]) -> Broadcast:
    """The message with a plan for no other modules, and without the factors of others that add nothing (B = 0).

    Clients put zeros in place of factors that are not sent. Where a client keeps personal factors, all are sent.
    """
    wanted = modules if sent.plan.modules is None else modules & sent.plan.modules
    lora = sent.adapter.lora
    if not sent.plan.keep:
        lora = {name: f for name, f in lora.items() if name in wanted or bool(f.B.any())}
    adapter = AdapterState(lora=lora, tensors=sent.adapter.tensors)
    return replace(sent, adapter=adapter, plan=replace(sent.plan, modules=wanted))
