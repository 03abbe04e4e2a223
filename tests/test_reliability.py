"""tests/kill.py and tests/fuzz.py for a few seconds; what they found at length is in the README."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytest.importorskip("resource")  # both fork and limit a process, which Windows does not


@pytest.mark.parametrize("script, argv, says", [
    ("kill.py", ["--kills", "2", "--seed", "7"], "2 kills over "),
    ("fuzz.py", ["--cases", "400", "--seed", "7"], " 0 faults"),
])
def test_a_short_form(script, argv, says):
    done = subprocess.run([sys.executable, HERE / script, *argv], capture_output=True, text=True)
    assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["kill.py", "fuzz.py"])
def test_help(script):
    done = subprocess.run([sys.executable, HERE / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--seed" in done.stdout
