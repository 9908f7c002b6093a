"""The tutorial's commands, in their order, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"
_BLOCK = re.compile(
    r"^(?P<skip><!-- not tested: [^\n]*-->\n)?(?:`(?P<file>[\w./-]+)`:\n\n)?```(?P<kind>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def script(text: str) -> str:
    """All commands, and before them in their places the files that the reader is told to write."""
    parts = []
    for block in _BLOCK.finditer(text):
        if block["file"]:
            parts.append(f"cat > {block['file']} <<'END OF FILE'\n{block['body']}END OF FILE\n")
        elif block["kind"] == "sh" and not block["skip"]:
            parts.append(f"echo '== line {text.count(chr(10), 0, block.start()) + 2}'\n{block['body']}")
    return "\n".join(parts)


def test_every_block_is_understood():
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = list(_BLOCK.finditer(text))
    assert 2 * len(blocks) == text.count("\n```")
    assert [block["file"] for block in blocks if block["file"]] == ["hospitals.toml", "mine.py", "grid.toml"]
    assert all(block["file"] for block in blocks if block["kind"] in {"toml", "python"})
    assert sum(bool(block["skip"]) for block in blocks) == 1
    assert "END OF FILE" not in text


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_tutorial_runs_from_its_first_command_to_its_last(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = tmp_path / "printed.txt"
    with log.open("w", encoding="utf-8") as printed:
        done = subprocess.run(
            ["bash", "-e", "-u", "-c", script(TUTORIAL.read_text(encoding="utf-8"))],
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "OMP_WAIT_POLICY": "passive"},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            timeout=1100,
        )
    assert done.returncode == 0, log.read_text(encoding="utf-8")[-4000:]
    assert "all done" in log.read_text(encoding="utf-8")
    for file in ("runs/compare/mine/report/tables/final.md", "merged/model.safetensors", "scores.json"):
        assert (tmp_path / file).is_file(), file
