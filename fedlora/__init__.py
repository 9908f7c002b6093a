"""FedLoRA: federated LoRA fine-tuning with unequal ranks on a quantized base.

Importing this package is cheap: torch, transformers and flwr load with the modules that use them.
"""

from pathlib import Path

__version__ = "0.1.0"

# In an installed wheel, setuptools has placed strategies/, clients/, simulations/ and configs/ inside
# this package. In a checkout, or in a Flower app bundle, they lie beside it: look there too.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "strategies").is_dir():
    __path__.append(str(_root))
