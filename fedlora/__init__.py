"""FedLoRA: federated LoRA fine-tuning with unequal ranks on a quantized base.

Importing this package is cheap: torch, transformers and flwr load with the names and modules that use them.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.adapters import AdapterState, LoraFactors
    from fedlora.common.errors import FedLoraError
    from fedlora.config import Config
    from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
    from fedlora.simulations.run import Result, run  # pyright: ignore[reportMissingImports]
    from fedlora.strategies.base import ServerState, Strategy  # pyright: ignore[reportMissingImports]

__version__ = "0.1.0"
__all__ = [
    "AdapterState",
    "Broadcast",
    "ClientInfo",
    "ClientUpdate",
    "Config",
    "FedLoraError",
    "LoraFactors",
    "Result",
    "ServerState",
    "Strategy",
    "run",
]

# In an installed wheel, the folders strategies/, clients/, simulations/ and configs/ are inside this package. In a
# checkout, or in a Flower app bundle, they are beside it, and Python must look there as well.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "strategies").is_dir():
    __path__.append(str(_root))

# On CPUs with AVX512-BF16, bitsandbytes warns while it is imported that it found no faster code of the hub. Nothing is
# missing that this package uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)

# The public names, each with the module that is imported when the name is first used.
_PLACES = {
    "AdapterState": "fedlora.adapters",
    "Broadcast": "fedlora.exchange",
    "ClientInfo": "fedlora.exchange",
    "ClientUpdate": "fedlora.exchange",
    "Config": "fedlora.config",
    "FedLoraError": "fedlora.common.errors",
    "LoraFactors": "fedlora.adapters",
    "Result": "fedlora.simulations.run",
    "ServerState": "fedlora.strategies.base",
    "Strategy": "fedlora.strategies.base",
    "run": "fedlora.simulations.run",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
