"""Tests. What is to be known before torch and rich are loaded stands here."""

import os

from fedlora.common import processes

processes.share_cores(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.pop("COLUMNS", None)  # tests set a width of their own, which one set before would outrank
