"""Memory that comes and goes: what a guest frees goes back to the host, and it can be given more. Seen in the VMM's own RSS."""
import json
import os
import re
import signal
import subprocess
import tempfile
import time

import pytest

from conftest import SLOW, TRAPLINE, boot_args, run, timeout_of

MIB = 1024  # in KiB, as /proc counts

# A program that touches 300 MiB, again and again, until it is killed: dd reads into one buffer of that size.
TOUCH = """dd if=/dev/zero of=/dev/null bs=300M count=100000 2>/dev/null & p=$!;
while :; do read a b c </proc/$p/statm; [ $b -gt 76800 ] && break; usleep 50000; done; echo TOUCHED;
usleep 500000; kill $p; wait $p; echo FREED"""


def one_line(script):
    return " ".join(script.split())


class VM:
    """A VM that runs a script in its guest; used as a context manager."""

    def __init__(self, accel, script, *more, append="", **machine):
        self.accel, self.script, self.more, self.append, self.machine = accel, one_line(script), more, append, machine

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="trapline-test-")
        self.env = dict(os.environ, XDG_RUNTIME_DIR=self.folder.name)
        self.log = os.path.join(self.folder.name, "console")
        args = boot_args(self.accel, f'{self.append} trapline.exec="{self.script}"', **self.machine)
        self.process = subprocess.Popen([TRAPLINE, *args, "--name", "m", "--serial", f"file:{self.log}", *self.more],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=self.env)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.folder.cleanup()

    def console(self):
        try:
            with open(self.log, encoding="utf-8", errors="replace") as f:
                return f.read().replace("\r", "")
        except FileNotFoundError:
            return ""

    def rss(self):
        """What of guest RAM (and the translator's code) the process has, in KiB."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as f:
            return int(re.search(r"RssShmem:\s*(\d+)", f.read()).group(1))

    def until(self, what, holds, timeout=30):
        end = time.monotonic() + timeout * SLOW
        while not holds():
            if self.process.poll() is not None:
                pytest.fail(f"the VM ended before {what}\n{self.console()[-4000:]}\n{self.process.stderr.read().decode()}")
            if time.monotonic() > end:
                pytest.fail(f"not after {timeout} s: {what}; RssShmem {self.rss()} kB\n{self.console()[-4000:]}")
            time.sleep(0.1)

    def until_said(self, text, times=1, timeout=None):
        self.until(f'"{text}"', lambda: len(re.findall(rf"^{text}$", self.console(), re.M)) >= times, timeout or timeout_of(self.accel))

    def control(self, *args):
        r = run(*args, env=self.env)
        assert r.status == 0, r
        return r.out

    def stat(self, group, part, key):
        value = json.loads(self.control("stats", "m", "--json"))[group]
        return (value[part] if part else value)[key]

    def total(self):
        """MemTotal as the guest said last, in KiB."""
        said = re.findall(r"^MemTotal: *(\d+) kB$", self.console(), re.M)
        return int(said[-1]) if said else 0


@pytest.mark.parametrize("cpus", [1, 4])
def test_what_is_freed_goes_back(accel, cpus):
    """Free-page reporting: at least 80% of what a program freed, without anybody asking."""
    with VM(accel, f"echo READY; sleep 1; {TOUCH}; sleep 1000", "--balloon", "on", cpus=cpus) as vm:
        vm.until_said("READY")
        before = vm.rss()
        vm.until_said("TOUCHED")
        most = vm.rss()
        assert most > 300 * MIB
        vm.until_said("FREED")
        vm.until(f"80% of 300 MiB less than {most} kB (before: {before} kB)", lambda: vm.rss() < most - 240 * MIB)


def test_without_a_balloon_nothing_goes_back(accel):
    """The test above can fail."""
    with VM(accel, f"{TOUCH}; sleep 1000") as vm:
        vm.until_said("FREED")
        time.sleep(5)
        assert vm.rss() > 300 * MIB
        r = run("balloon", "m", "256M", env=vm.env)
        assert r.status != 0 and "no balloon" in r.err, r


@pytest.mark.parametrize("option, says", [
    ("on,foo=1", "foo"), ("on,size=1G", "4M to 512M"), ("on,size=1M", "4M to 512M"), ("on,size=much", "not a size"), ("half", "on or"),
])
def test_balloon_refusals(option, says):
    r = run(*boot_args("interp", ""), "--balloon", option)
    assert r.status == 2 and "--balloon" in r.err and says in r.err and r.err.count("\n") == 1, r


def test_balloon_from_the_start(accel):
    with VM(accel, "echo READY; sleep 1000", "--balloon", "on,size=300M") as vm:
        vm.until_said("READY")
        vm.until("the balloon has its size", lambda: vm.stat("device", "balloon", "actual") == 212 << 20, timeout_of(accel))


def test_balloon(accel):
    """Without reporting, what is free stays with the guest until the balloon takes it; deflated, the guest has it again."""
    no_reporting = "echo 11 >/sys/module/page_reporting/parameters/page_reporting_order"
    with VM(accel, f"{no_reporting}; {TOUCH}; while [ $(sed -n 's/^MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) -gt 200000 ]; do usleep 200000; done; "
            f"echo SMALL; while [ $(sed -n 's/^MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) -lt 400000 ]; do usleep 200000; done; "
            f"{TOUCH}; sleep 1000", "--balloon", "on") as vm:
        vm.until_said("FREED")
        most = vm.rss()
        assert most > 300 * MIB
        time.sleep(5)
        assert vm.rss() > most - 30 * MIB, "something else gave it back"
        vm.control("balloon", "m", "128M")
        vm.until("80% of 300 MiB less", lambda: vm.rss() < most - 240 * MIB)
        vm.until_said("SMALL")
        vm.until("the driver's word", lambda: vm.stat("device", "balloon", "actual") == 384 << 20)
        assert vm.stat("device", "balloon", "inflated") >= 384 << 20
        vm.control("balloon", "m", "512M")
        vm.until_said("FREED", 2)
        assert vm.stat("device", "balloon", "actual") == 0
        assert vm.rss() > 300 * MIB
        r = run("balloon", "m", "513M", env=vm.env)
        assert r.status != 0 and "max=" in r.err, r


@pytest.mark.parametrize("cpus", [1, 4])
def test_added_memory(accel, cpus):
    """virtio-mem: the guest gets a GiB more, uses it, and gives it back."""
    big = TOUCH.replace("300M", "900M").replace("76800", "230400")
    with VM(accel, f"(while :; do grep MemTotal /proc/meminfo; usleep 300000; done) & while [ $(sed -n 's/^MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) "
            f"-lt 1200000 ]; do usleep 200000; done; {big}; sleep 1000", append="memhp_default_state=online_movable", memory="512M,max=2G",
            cpus=cpus) as vm:
        vm.until("MemTotal", lambda: 400 * MIB < vm.total() < 512 * MIB, timeout_of(accel))
        start = vm.total()
        vm.control("balloon", "m", "1536M")
        vm.until("a GiB more", lambda: vm.total() == start + 1024 * MIB)
        vm.until_said("TOUCHED")
        most = vm.rss()
        assert most > 900 * MIB
        vm.until_said("FREED")
        vm.control("balloon", "m", "512M")
        vm.until("a GiB less", lambda: vm.total() == start, 60)
        vm.until("it in the process, too", lambda: vm.rss() < most - 700 * MIB)
        assert vm.stat("device", "mem", "plugged") == 0
        r = run("balloon", "m", "3G", env=vm.env)
        assert r.status != 0 and "2048" in r.err, r
