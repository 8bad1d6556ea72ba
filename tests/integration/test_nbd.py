"""Disks of NBD servers in a booted guest: nbdkit and qemu-nbd."""
import os
import re
import shutil
import subprocess
import time

import pytest

from conftest import SLOW, boot

pytestmark = pytest.mark.skipif(not shutil.which("nbdkit") or not shutil.which("qemu-nbd"), reason="nbdkit or qemu-nbd is not installed")


def script(*commands):
    return 'trapline.exec="' + "; ".join(commands) + '"'


class Server:
    def __init__(self, socket, *args):
        self.process = subprocess.Popen(args, stdin=subprocess.DEVNULL)
        end = time.monotonic() + 20 * SLOW
        while not os.path.exists(socket):
            assert self.process.poll() is None and time.monotonic() < end, args
            time.sleep(0.02)

    def __enter__(self):
        return self.process

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def test_nbdkit_with_tls(any_accel, tmp_path):
    """Written over TLS with a shared key, flushed, discarded, read back; the server's file has it."""
    socket, keys, disk = tmp_path / "s", tmp_path / "keys", tmp_path / "disk"
    with open(disk, "wb") as f:
        f.truncate(64 << 20)
    subprocess.run(["psktool", "-u", "guest", "-p", keys], check=True, capture_output=True)
    with Server(socket, "nbdkit", "-f", "-U", socket, "--tls=require", f"--tls-psk={keys}", "file", disk):
        result = boot(any_accel, script(
            "cat /sys/block/vda/size", "dd if=/dev/urandom of=/tmp/r bs=1M count=24 2>/dev/null", "dd if=/tmp/r of=/dev/vda bs=1M conv=fsync 2>/dev/null",
            "blkdiscard -o 33554432 -l 4194304 /dev/vda && echo DISCARDED", "echo 3 >/proc/sys/vm/drop_caches",
            "head -c 25165824 /dev/vda | cmp - /tmp/r && echo SAME", "md5sum </tmp/r"),
            "--disk", f"nbds+unix://guest@/?socket={socket},tls-psk={keys}", cpus=2)
    assert result.status == 0 and "SAME" in result.out and "DISCARDED" in result.out and result.out.startswith("131072\n"), result
    md5 = re.search(r"^([0-9a-f]{32})  -", result.out, re.M).group(1)
    assert subprocess.run(f"head -c 24M '{disk}' | md5sum", shell=True, check=True, capture_output=True, text=True).stdout.split()[0] == md5
    assert "trapline" not in result.err, result


def test_overlay_over_qemu_nbd(any_accel, tmp_path):
    """A throw-away overlay whose backing image is an export: read through it, written beside it."""
    socket, disk = tmp_path / "s", tmp_path / "disk"
    disk.write_bytes(os.urandom(24 << 20))
    before = subprocess.run(["md5sum", disk], check=True, capture_output=True, text=True).stdout.split()[0]
    with Server(socket, "qemu-nbd", "-t", "-r", "--shared=4", "-f", "raw", "-k", socket, disk):
        result = boot(any_accel, script("md5sum </dev/vda", "echo changed | dd of=/dev/vda bs=1000 seek=7 conv=fsync,notrunc 2>/dev/null",
                                        "echo 3 >/proc/sys/vm/drop_caches", "dd if=/dev/vda bs=1000 skip=7 count=1 2>/dev/null | head -c 7", "md5sum /dev/vda"),
                      "--disk", f"nbd+unix:///?socket={socket},overlay")
    assert result.status == 0 and f"{before}  -" in result.out and "changed" in result.out, result
    assert before + "  /dev/vda" not in result.out, result
    assert subprocess.run(["md5sum", disk], check=True, capture_output=True, text=True).stdout.split()[0] == before


def test_server_gone(any_accel, tmp_path):
    """The server ends while the guest reads: I/O errors for the guest, one line for the user, and the VM goes on."""
    socket = tmp_path / "s"
    with Server(socket, "nbdkit", "-f", "-U", socket, "--filter=delay", "memory", "64M", "delay-read=20ms") as process:
        killer = subprocess.Popen(["sh", "-c", f"sleep 4; kill -9 {process.pid}"])
        result = boot(any_accel, script("while dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null; do :; done", "echo FAILED",
                                        "dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct || echo STILL"),
                      "--disk", f"nbd+unix:///?socket={socket}")
        killer.wait()
    assert result.status == 0 and "FAILED" in result.out and "STILL" in result.out, result
    assert len(re.findall("is lost", result.err)) == 1, result
