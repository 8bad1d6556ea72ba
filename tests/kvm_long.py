#!/usr/bin/python3
"""Boot Debian's unmodified cloud kernel, as its uncompressed ELF, under --accel kvm until init runs a command, however long that takes.

On a processor that virtualizes it is a matter of a second. On a software KVM, which interprets ring 0 and gives up on some instructions, it takes many
minutes and thousands of steps of our own emulator: this shows that none of them ends the guest.
Usage: tests/kvm_long.py [--build build] [--irqchip auto] [--cpus 1] [--limit SECONDS] [--append WORDS]
"""
import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.path.join(ROOT, ".cache", "guest")
DONE = "init reached"
CLOCK = re.compile(r"^\[ *(\d+\.\d+)\] (.*)")


def files():
    """The kernel and the smallest initramfs: a shell and nothing else. Unpacking costs a software KVM a second per 100 KB."""
    subprocess.run([os.path.join(ROOT, "scripts", "guest.sh"), "cloud"], check=True)
    vmlinuz, kernel, initrd = (os.path.join(CACHE, n) for n in ("vmlinuz-cloud", "vmlinux-cloud", "initrd-small.img"))
    if not os.path.exists(kernel) or os.path.getmtime(kernel) < os.path.getmtime(vmlinuz):
        subprocess.run([os.path.join(ROOT, "scripts", "vmlinux.py"), vmlinuz, kernel], check=True)
    subprocess.run([os.path.join(ROOT, "scripts", "mkinitramfs.sh"), os.path.join(CACHE, "busybox"), initrd], check=True)
    return kernel, initrd


class Boot:
    def __init__(self, command, name):
        self.name = name
        self.begin = time.monotonic()
        self.clock, self.line, self.lines, self.complaints = 0.0, "", [], []
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            line = line.rstrip()
            self.lines.append(line)
            m = CLOCK.match(line)
            if m:
                self.clock, line = float(m.group(1)), m.group(2)
                # Slow is what this boot is, and the host's processor has the bugs it has; everything else a healthy kernel does not say.
                if re.search(r"BUG:|WARNING:|Oops|segfault|Kernel panic|general protection|invalid opcode", line) and not re.search("soft lockup|RETBleed", line):
                    self.complaints.append(line)
            if line.strip():
                self.line = line

    def steps(self, trapline):
        r = subprocess.run([trapline, "stats", self.name], capture_output=True, text=True)
        m = re.search(r"instructions stepped +(\d+)", r.stdout)
        return int(m.group(1)) if m else None

    def elapsed(self):
        return time.monotonic() - self.begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build")
    parser.add_argument("--irqchip", default="auto")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--limit", type=int, default=6 * 3600, help="seconds after which it has failed")
    parser.add_argument("--append", default="")
    options = parser.parse_args()
    trapline = os.path.join(ROOT, options.build, "trapline")
    doctor = subprocess.run([trapline, "doctor"], capture_output=True, text=True).stdout
    print("\n".join(line for line in doctor.splitlines() if "kvm" in line), flush=True)
    kernel, initrd = files()
    name = f"kvm-long-{os.getpid()}"
    boot = Boot([trapline, "run", "--name", name, "--accel", "kvm", "--irqchip", options.irqchip, "--cpus", str(options.cpus), "--memory", "256M",
                 "--no-reboot", "--kernel", kernel, "--initrd", initrd, "--append",
                 f'console=ttyS0 earlyprintk=ttyS0 panic=-1 {options.append} trapline.exec="uname -a; echo {DONE}"'], name)
    steps = 0
    try:
        print(f"{'elapsed':>8} {'guest':>8} {'stepped':>9}  last line of the guest")
        while boot.process.poll() is None and boot.elapsed() < options.limit:
            steps = boot.steps(trapline) or steps
            print(f"{boot.elapsed():7.0f}s {boot.clock:7.1f}s {steps:9}  {boot.line[:100]}", flush=True)
            for _ in range(10):
                if boot.process.poll() is None:
                    time.sleep(1)
    finally:
        if boot.process.poll() is None:
            boot.process.send_signal(signal.SIGTERM)
    status = boot.process.wait()
    boot.reader.join()
    reached = any(line.strip() == DONE for line in boot.lines)
    for line in boot.complaints:
        print(f"kernel: {line}")
    print(f"{'init was reached' if reached else 'init was NOT reached'} after {boot.elapsed():.0f} s ({boot.clock:.1f} s of the guest's), "
          f"some {steps} instructions stepped, status {status}, {len(boot.complaints)} complaints of the kernel")
    if not reached or status or boot.complaints:
        with tempfile.NamedTemporaryFile("w", prefix="kvm-long-", suffix=".log", delete=False) as f:
            f.write("\n".join(boot.lines) + "\n")
        print(f"what the guest printed is in {f.name}")
    return 0 if reached and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
