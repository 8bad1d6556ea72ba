"""The Debian system of make demo-disk, where it was built: it boots, is whole, and obeys its power button."""
import json
import os
import subprocess
import time

import pytest

from conftest import ROOT, SLOW, TRAPLINE, complaints, run

DEMO = os.path.join(ROOT, ".cache", "demo")
PATIENCE = 240 * SLOW

pytestmark = pytest.mark.skipif(not os.path.exists(os.path.join(DEMO, "recipe")), reason="no demo disk; make demo-disk builds it")


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_make_demo(runtime, any_accel):
    env = dict(os.environ, BUILD=os.path.dirname(TRAPLINE), ACCEL=any_accel, CPUS="2", MEMORY="512M", DEMO_TIMEOUT=str(int(PATIENCE)))
    result = subprocess.run(["scripts/demo.sh"], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert result.returncode == 0, result
    uname, state = result.stdout.splitlines()
    assert "Debian" in uname and state == "running", result
    assert "the VM ended with status 0" in result.stderr


def test_power_button(runtime, tmp_path, any_accel):
    console = tmp_path / "console"
    result = run("run", "--accel", any_accel, "--memory", "512M", "--kernel", f"{DEMO}/vmlinuz", "--initrd", f"{DEMO}/initrd.img",
                 "--append", "root=/dev/vda rw console=ttyS0 panic=-1", "--disk", f"{DEMO}/base.qcow2,overlay", "--net", "user", "--balloon", "on",
                 "--serial", f"file:{console}", "--no-reboot", "--detach")
    assert result.status == 0 and result.out.startswith("base runs in the background"), result
    try:
        end = time.monotonic() + PATIENCE
        while "root@trapline" not in console.read_text(errors="replace"):
            assert time.monotonic() < end, console.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        stats = json.loads(run("stats", "base", "--json").out)["device"]
        assert stats["disk0"]["read_bytes"] > 10 << 20 and stats["disk0"]["errors"] == 0 and stats["net0"]["tx_frames"] > 0
        result = run("stop", "base", "--timeout", str(int(PATIENCE)), timeout=2 * PATIENCE)
        assert result.err == "base has powered off\n", result
    finally:
        run("stop", "base", "--force", timeout=PATIENCE)
    assert not complaints(console.read_text(errors="replace"))
