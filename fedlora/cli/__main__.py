"""`python -m fedlora.cli`, which the resident worker uses."""

from .main import main

main()
