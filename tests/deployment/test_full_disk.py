"""A real server whose database's disk is full: the run ends, names the disk, and nobody holds it."""

import json
import os
import subprocess
import time
from contextlib import ExitStack, suppress

import pytest

from fedlora.deployment.flower_programs import config_table
from fedlora.results.run_folder import folder_of, is_taken
from tests.deployment.programs import begun, make_site, words
from tests.deployment.test_faults import events, until
from tests.federation import tiny

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 48 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    with suppress(FileNotFoundError):
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            yield folder
            subprocess.run(["umount", "-l", str(folder)], check=True)
            return
    pytest.skip("needs the right to mount a small disk")


def test_a_full_disk_ends_the_run_in_a_sentence(tmp_path, tiny_llama, small_disk):
    site = make_site(tmp_path)
    folder, environment = site
    config = tiny(
        tmp_path,
        tiny_llama,
        lora__ranks="2",
        federation__clients=1,
        federation__rounds=50,
        evaluate__server=False,
        data__partition="iid",
        train__steps=50,
        run__dir=str(tmp_path / "runs"),
    )
    (folder / "run.toml").write_text(config_table(config), encoding="utf-8")
    run = folder_of(config)
    serves = "fedlora server --insecure --port $PORT --state state/server --database disk/superlink.db"
    joins = "fedlora node --server $SERVER --insecure --partition-id 0 --state state/north"
    with ExitStack() as stack:
        _, _, said = stack.enter_context(begun(serves, site, "server: listening on"))
        stack.enter_context(begun(joins, site, "node: started for the server"))
        command = words("fedlora run run.toml --server $SERVER --insecure", environment)
        with (folder / "run.out").open("w") as output:
            running = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            until(lambda: events(run, "round-end"), "a round has ended")
            filler = (small_disk / "filler").open("wb", buffering=0)
            with filler, suppress(OSError):
                while True:
                    filler.write(os.urandom(1 << 20))
            with (small_disk / "more").open("wb", buffering=0) as more, suppress(OSError):
                while True:
                    more.write(b"x" * 512)
            began = time.monotonic()
            assert running.wait(timeout=400) == 1, (folder / "run.out").read_text()
        finally:
            running.kill()
            running.wait()
        seconds = time.monotonic() - began
        told = (folder / "run.out").read_text()
        assert f"the disk of the server's database is full: {small_disk} has 0 MB left; make room there" in told
        assert seconds < 300
        until(lambda: not is_taken(run), "nobody is at the run", 90)
        result = json.loads((run / "result.json").read_text())
        assert result["status"] == "failed"
        assert "the disk of the server's database is full" in result["error"]
        until(lambda: "the disk of the server's database is full" in said.read_text(), "the server says so too", 60)
