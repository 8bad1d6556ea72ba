"""Nothing that a guest saw flushed is lost when the VMM is killed: a few rounds of tests/crash/run.py, which does hundreds when asked."""
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, SLOW, TRAPLINE, need

RUN = os.path.join(ROOT, "tests", "crash", "run.py")


def crash(*args):
    need("dbt")
    if not shutil.which("qemu-img"):
        pytest.skip("no qemu-img on this host (Debian: qemu-utils)")
    return subprocess.run([sys.executable, RUN, "--trapline", TRAPLINE, "--timeout", str(120 * SLOW), *args], capture_output=True, text=True)


@pytest.mark.parametrize("disk, keys, options", [
    ("raw", "cache=none", ""),
    ("qcow2", "cache=writeback", "lazy_refcounts=on"),
])
def test_kill(disk, keys, options):
    result = crash("--kills", os.environ.get("TRAPLINE_TEST_KILLS", "5"), "--disk", disk, "--keys", keys, "--options", options, "--seconds", "0.7")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing lost" in result.stdout


def test_checker():
    """A guest that says "flushed" and did not flush is caught: the test can fail."""
    result = crash("--kills", "5", "--lie")
    assert result.returncode == 1 and "LOST" in result.stdout, result.stdout + result.stderr
