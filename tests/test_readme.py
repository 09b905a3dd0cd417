"""Every command in the README does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- test: (?P<how>[^>]*?) -->\n)?```sh\n(?P<lines>.*?)```", re.DOTALL)
SHORT = " --set training.steps=6 --set training.validate_every=3"
"""A long training in short: the same recipe, few steps."""


def commands(how: str) -> list[str]:
    """The lines of the blocks that are marked ``how``, without comments."""
    return [
        line.partition("  #")[0].strip()
        for block in BLOCK.finditer(README)
        if block["how"] == how
        for line in block["lines"].splitlines()
        if line.strip() and not line.startswith("#")
    ]


def test_every_block_of_commands_says_how_it_is_tested() -> None:
    marks = [block["how"] for block in BLOCK.finditer(README)]
    assert marks
    assert set(marks) <= {"run", "by the wheel", "by make", "by hand: needs the hardware"}, marks


@pytest.mark.chain
def test_the_commands_run_in_their_order(tmp_path: Path) -> None:
    lines = commands("run")
    assert any(line.startswith("geodeploy train") for line in lines)
    for name in ("train", "geodeploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in lines:
        command = line + SHORT if line.startswith(("geodeploy train", "geodeploy distil")) else line
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "map.tif").exists()
