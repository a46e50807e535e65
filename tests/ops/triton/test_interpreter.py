"""Runs the interpreted tests of this folder, a file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("name", sorted({path.name for path in HERE.parent.glob("test_*.py")} - {HERE.name}))
def test_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(HERE.with_name(name))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_XDIST_AUTO_NUM_WORKERS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
