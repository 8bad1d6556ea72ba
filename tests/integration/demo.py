"""The Debian system of scripts/demo-disk.sh in a VM, reached by ssh: for tests of whole systems, and the soak."""
import os
import re
import socket
import subprocess
import time

from conftest import ROOT, SLOW, TRAPLINE, Result, complaints

DEMO = os.path.join(ROOT, ".cache", "demo")


def build():
    """Build the disk, or find it. The reason if it cannot be built."""
    if os.geteuid() != 0:
        return "building the demo disk needs root"
    done = subprocess.run([os.path.join(ROOT, "scripts", "demo-disk.sh")], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return None if done.returncode == 0 else f"the demo disk cannot be built: {done.stderr[-1500:]}"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class System:
    """with System(tmp_path, accel, "--disk", ...) as s: s.ssh("uname -a"). Leaving it shuts the guest down from the inside; s.status
    is the VMM's status then."""

    def __init__(self, scratch, accel, *more, cpus=1, memory="1G"):
        self.scratch, self.accel, self.more, self.cpus, self.memory = str(scratch), accel, more, cpus, memory
        self.status = None

    def __enter__(self):
        self.port = free_port()
        self.console = os.path.join(self.scratch, "console.log")
        self.stderr = open(os.path.join(self.scratch, "stderr.log"), "w+", encoding="utf-8")
        command = [TRAPLINE, "run", "--accel", self.accel, "--cpus", str(self.cpus), "--memory", self.memory, "--no-reboot",
                   "--kernel", f"{DEMO}/vmlinuz", "--initrd", f"{DEMO}/initrd.img", "--append", "root=/dev/vda rw console=ttyS0 panic=-1",
                   "--serial", f"file:{self.console}", "--disk", f"{DEMO}/base.qcow2,overlay",
                   "--net", f"user,hostfwd=tcp:127.0.0.1:{self.port}-:22", *self.more]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.stderr, stderr=self.stderr)
        end = time.monotonic() + 240 * SLOW
        while self.ssh_raw("true", timeout=30 * SLOW).returncode:
            if self.process.poll() is not None or time.monotonic() > end:
                text = f"no login by ssh (VMM status {self.process.poll()})\n{self.said()}"
                self.process.kill()
                raise AssertionError(text)
            time.sleep(0.2)
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.ssh_raw("systemctl poweroff --no-block")
        try:
            self.status = self.process.wait(90 * SLOW)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            if kind is None:
                raise AssertionError(f"the guest did not power off\n{self.said()}") from None

    def said(self):
        self.stderr.seek(0)
        with open(self.console, encoding="utf-8", errors="replace") as console:
            return Result(self.process.poll(), console.read(), self.stderr.read())

    def ssh_raw(self, command, timeout=120):
        try:
            return subprocess.run(["ssh", "-q", "-i", f"{DEMO}/id_ed25519", "-p", str(self.port), "-o", "BatchMode=yes", "-o", "ConnectTimeout=20",
                                   "-o", f"UserKnownHostsFile={DEMO}/known_hosts", "-o", "HostKeyAlias=trapline", "root@127.0.0.1", command],
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 255, "", f"no answer within {timeout:.0f} s")

    def ssh(self, command, timeout=120):
        done = self.ssh_raw(command, timeout * SLOW)
        assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}\n{self.said()}"
        return done.stdout

    def complaints(self):
        """What the guest's kernel complained about; of network names there is no end, so by the usual words."""
        return [line for line in complaints(self.ssh("dmesg")) if not re.search(r"systemd\[1\]|pci=nocrs", line)]
