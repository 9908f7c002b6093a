"""Statistics by name; the server asks for one by its name."""

from __future__ import annotations

from fedlora.common.registry import Registry

STATISTICS = Registry(
    noun="statistic",
    key="the server's job",
    options_key="the server's job",
    base="fedlora.clients.statistics.base:Statistic",
    method="measure",
    names={
        "gradient": "fedlora.clients.statistics.gradients:LeadingDirections",
        "inputs": "fedlora.clients.statistics.inputs:Inputs",
        "dimensions": "fedlora.clients.statistics.dimension:IntrinsicDimension",
        "contributions": "fedlora.clients.statistics.contributions:Contributions",
        "selection": "fedlora.clients.statistics.selection:Selection",
    },
)
