"""Tests. What is to be known before torch is loaded stands here."""

import os

from fedlora import processes

processes.share_cores(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
