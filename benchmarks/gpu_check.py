"""The fast tests and the measurements of a GPU on one card, within ten minutes, as one JSON.

    python -m benchmarks.gpu_check --device cuda:0 [--seconds 600] [--workers 8] [--tests PATH …] [--no-benchmarks]

1. `pytest -m "not slow"` with FEDLORA_TEST_DEVICE: how many tests passed, and which failed with which words.
2. benchmarks.clients on bases of random weights, which need no download: eight clients as one batch, one at a time,
   and plain PEFT; then benchmarks.mixed: many adapters in one pass.

Each part ends when its time is over, and the JSON says what was not done. Writes benchmarks/results/gpu-check.json, or
the file that --out names. The exit code is 0 if every test passed or was skipped, and everything was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks.engine import ROOT
from fedlora.common import processes
from fedlora.common.errors import ModelError
from fedlora.common.files import write_json

_SHARE_OF_TESTS = 0.6  # of all the time
_ENDING = 20.0  # seconds that pytest gets to write what it has found
_WORDS = 300  # of a failure
_STEPS = 20  # of each client; ten are over too soon on a GPU


def machine(device: str) -> dict[str, Any]:
    """What is measured on.

    Raises:
        ModelError: there is no such device.
    """
    import torch

    from fedlora.models import pick_device
    from fedlora.results.environment import code_version, versions

    picked = pick_device(device, "--device")
    facts: dict[str, Any] = {
        "device": str(picked),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "code": code_version(),
    }
    if picked.type == "cuda":
        card = torch.cuda.get_device_properties(picked)
        facts["card"] = {"name": card.name, "memory-bytes": card.total_memory, "driver": _driver()}
        facts["card"]["cuda"] = torch.version.cuda
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def run_tests(device: str, paths: list[str], workers: int, seconds: float) -> dict[str, Any]:
    """The outcome of the fast tests; when the time is over, that of those which were done by then."""
    words = ["-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *paths]
    words += ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        with (Path(scratch) / "said.txt").open("w+", encoding="utf-8", errors="replace") as said:
            environment = os.environ | {"FEDLORA_TEST_DEVICE": device}
            command = [sys.executable, *words, f"--junitxml={report}"]
            process = processes.start(command, ROOT, environment, said)
            code, finished = _wait(process, seconds)
            said.seek(0)
            tail = said.read()[-2000:]
        found = outcomes(report) if report.exists() else {"passed": 0, "skipped": 0, "failed": []}
    found |= {"command": "pytest " + " ".join(words[2:]), "workers": workers, "seconds": time.monotonic() - began}
    found |= {"finished": finished and code in (0, 1), "exit-code": code}
    return found if found["finished"] else found | {"said": tail}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> tuple[int | None, bool]:
    """(exit code, whether it ended by itself)."""
    try:
        return process.wait(seconds), True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest ends as with Ctrl-C, and writes its report
    try:
        return process.wait(_ENDING), False
    except subprocess.TimeoutExpired:
        processes.stop_tree(process)
        return process.returncode, False


def outcomes(report: Path) -> dict[str, Any]:
    """How many tests of a JUnit report passed and were skipped, and the failed ones with their first words."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
    for case in ET.parse(report).iter("testcase"):
        if case.get("name") is None:  # it had not come to its end
            continue
        wrong = [child for child in case if child.tag in ("failure", "error")]
        if wrong:
            name = f"{case.get('classname')}::{case.get('name')}"
            found["failed"].append({"test": name, "says": (wrong[0].get("message") or "")[:_WORDS]})
        else:
            found["skipped" if case.find("skipped") is not None else "passed"] += 1
    return found


def run_benchmarks(device: str, until: float) -> dict[str, Any]:
    """Seconds of `benchmarks.clients` and `benchmarks.mixed`; what had no time or failed is named in `left-out`."""
    from benchmarks.clients import SETTINGS, Place, measure

    clients: dict[str, dict[str, Any]] = {setting: {} for setting in SETTINGS}
    mixed: Any = None
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLORA_CACHE"] = str(Path(folder) / "cache")  # of the processes that measure: nothing is left
        place = Place(device, _STEPS, folder)
        for setting in SETTINGS:
            for kind in ("a", "b", "c"):
                try:
                    clients[setting][kind] = measure(kind, setting, place, max(1.0, until - time.monotonic()))
                except (SystemExit, subprocess.TimeoutExpired) as error:
                    missing[f"clients: {setting}, {kind}"] = _why(error)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.mixed", "--json"]
        command += [f"--device={device}", f"--random={folder}"]
        left = max(1.0, until - time.monotonic())
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=left)
            mixed = json.loads(done.stdout.splitlines()[-1])
        except subprocess.SubprocessError as error:
            missing["mixed"] = _why(error)
    return {"steps": _STEPS, "clients": clients, "mixed": mixed, "left-out": missing}


def _why(error: BaseException) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return "the time was over"
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return said.strip().splitlines()[-1][:_WORDS] if said.strip() else type(error).__name__


def main() -> int:
    """Check, write and say in a few lines what was found; the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background hands down that it is ignored
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything")
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    parser.add_argument("--workers", type=int, default=workers, help="processes that test at the same time")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="these alone")
    parser.add_argument("--no-benchmarks", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/gpu-check.json, or cpu-check.json of a CPU"
    )
    options = parser.parse_args()
    began = time.monotonic()
    try:
        found = machine(options.device)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    until = began + 0.97 * options.seconds
    own = options.seconds if options.no_benchmarks else _SHARE_OF_TESTS * options.seconds
    found["tests"] = run_tests(found["device"], options.tests, options.workers, own - _ENDING)
    if not options.no_benchmarks:
        found["benchmarks"] = run_benchmarks(found["device"], until)
    found["seconds"] = time.monotonic() - began
    kind = "gpu" if "card" in found else found["device"].split(":")[0]
    out = options.out or ROOT / "benchmarks" / "results" / f"{kind}-check.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    return _tell(found, out)


def _tell(found: dict[str, Any], out: Path) -> int:
    """What was found, on the terminal; the exit code."""
    tests, missing = found["tests"], found.get("benchmarks", {}).get("left-out", {})
    for failure in tests["failed"]:
        print(f"failed: {failure['test']}: {failure['says'].splitlines()[0] if failure['says'] else ''}")
    for name, why in missing.items():
        print(f"not measured: {name}: {why}")
    if not tests["finished"]:
        print(f"the tests did not come to their end (exit code {tests['exit-code']}): {tests['said'][-300:]}")
    passed, skipped, failed = tests["passed"], tests["skipped"], len(tests["failed"])
    print(f"{found['device']}: {passed} passed, {failed} failed, {skipped} skipped in {tests['seconds']:.0f} s; {out}")
    return 0 if tests["finished"] and passed and not failed and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
