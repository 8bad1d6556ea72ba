#!/usr/bin/python3
"""Native, Trapline and QEMU TCG side by side: the same benchmark program, the same kernel and initramfs, one vCPU.

Runs them interleaved, so that a noisy machine is noisy to all; prints medians and ratios and writes bench/RESULTS.md.
Usage: bench/run.py [--build DIR] [--accel NAME] [--rounds N] [--quick] [--no-qemu] [--no-write]
"""
import argparse
import datetime
import math
import os
import platform
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time

import pexpect

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GUEST = os.path.join(ROOT, ".cache", "guest")
KERNEL = os.path.join(GUEST, "vmlinuz-cloud")
INITRD = os.path.join(GUEST, "initrd.img")
BENCH = os.path.join(GUEST, "bench")
MEMORY = 512  # MiB
CONSOLE = "console=ttyS0 quiet panic=-1"
PROMPT = "root@trapline:/root# "

COMPUTE = ["collatz", "matmul", "chase", "qsort", "memcpy", "fnv"]
SYSTEM = ["getppid", "read4k", "fork", "exec", "pipe", "fault"]
TITLES = {
    "collatz": "collatz (integer ALU), ms", "matmul": "matmul 200x200 double, ms",
    "chase": "random pointer chase 4 MiB, ns/load", "qsort": "qsort, ns/element", "memcpy": "memcpy, us/MiB",
    "fnv": "byte hash FNV, us/MiB", "getppid": "getppid, ns", "read4k": "read 4 KiB of /dev/zero, ns",
    "fork": "fork+exit+wait, us", "exec": "fork+exec+wait (static), us", "pipe": "pipe ping-pong, us",
    "fault": "page fault (anonymous), ns", "init-uptime": "kernel start to init, s in the guest",
    "shell": "command to shell prompt, s", "start": "command to the end of a guest that ends at once, ms",
    "overhead": "VMM overhead after boot, MiB", "touched": "guest RAM touched after boot, MiB",
}
MACHINE_ROWS = ["init-uptime", "shell", "start", "overhead", "touched"]


class Native:
    name = "native"

    def bench(self, quick):
        # Pinned: a guest with one vCPU has one CPU too.
        cpu = min(os.sched_getaffinity(0))
        return subprocess.run([BENCH] + (["-q"] if quick else []), capture_output=True, text=True, check=True,
                              preexec_fn=lambda: os.sched_setaffinity(0, {cpu})).stdout


class Vm:
    """A VMM as a command line."""

    def bench(self, quick):
        append = f"{CONSOLE} trapline.bench" + (" trapline.bench.args=-q" if quick else "")
        done = subprocess.run(self.command(append), stdin=subprocess.DEVNULL, capture_output=True, timeout=900)
        out = done.stdout.decode(errors="replace")
        if "bench status 0" not in out:
            raise RuntimeError(f"{self.name}: the benchmark did not finish (status {done.returncode})\n"
                               f"{out[-2000:]}{done.stderr.decode(errors='replace')[-1000:]}")
        return out

    def shell(self):
        """Wall time to the prompt, then what the process holds in memory, by kind."""
        command = self.command(CONSOLE)
        start = time.monotonic()
        child = pexpect.spawn(command[0], command[1:], timeout=300, encoding="utf-8", codec_errors="replace")
        try:
            child.expect_exact(PROMPT)
            wall = time.monotonic() - start
            guest, rest = memory_of(child.pid)
            child.send("\x01x")
            child.expect(pexpect.EOF, timeout=20)
        finally:
            child.close(force=True)
        return {"shell": wall, "touched": guest, "overhead": rest}

    def start(self, image):
        """From the command to the end of a guest whose third instruction ends the VM, in ms: an upper bound of the time to
        the first guest instruction."""
        begin = time.monotonic()
        done = subprocess.run(self.command(None, kernel=image), stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        if done.returncode != 1:
            raise RuntimeError(f"{self.name}: status {done.returncode} from the guest that ends at once\n"
                               f"{done.stderr.decode(errors='replace')}")
        return (time.monotonic() - begin) * 1e3


class Trapline(Vm):
    def __init__(self, program, accel):
        self.program, self.accel = program, accel
        self.name = f"Trapline {accel}"

    def command(self, append, kernel=KERNEL):
        command = [self.program, "run", "--accel", self.accel, "--memory", f"{MEMORY}M", "--no-reboot", "--kernel", kernel]
        return command + (["--initrd", INITRD, "--append", append] if append else [])

    def works(self):
        doctor = subprocess.run([self.program, "doctor"], capture_output=True, text=True)
        return re.search(rf"^  {self.accel} +works here", doctor.stdout, re.M) is not None


class Qemu(Vm):
    name = "QEMU TCG"

    def command(self, append, kernel=KERNEL):
        command = ["qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-cpu", "max", "-m", f"{MEMORY}M", "-nographic",
                   "-no-reboot", "-kernel", kernel]
        if append:
            return command + ["-initrd", INITRD, "-append", append]
        return command + ["-device", "isa-debug-exit,iobase=0xf4"]


def memory_of(pid):
    return memory_of_command(pid, MEMORY)


def memory_of_command(pid, memory):
    """MiB of guest RAM touched, and of everything else the process has in RAM (from /proc/PID/smaps)."""
    guest = rest = 0
    is_guest = False
    with open(f"/proc/{pid}/smaps", encoding="utf-8") as smaps:
        for line in smaps:
            head = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line)
            if head:
                size = int(head.group(2), 16) - int(head.group(1), 16)
                # Ours is a memfd of that name; QEMU's is the mapping of exactly the guest's size.
                is_guest = "memfd:guest-ram" in head.group(3) or size >= memory << 20
            elif line.startswith("Rss:"):
                kib = int(line.split()[1])
                if is_guest:
                    guest += kib
                else:
                    rest += kib
    return guest / 1024, rest / 1024


def tiny_guest(path):
    """A multiboot 1 image (a.out kludge) that writes 0 to the debug-exit port at once."""
    code = bytes([0x66, 0xba, 0xf4, 0x00,  # mov $0xf4, %dx
                  0x31, 0xc0,              # xor %eax, %eax
                  0xee,                    # out %al, (%dx)
                  0xf4])                   # hlt
    load, magic, flags = 0x100000, 0x1BADB002, 1 << 16
    size = 32 + len(code)
    header = struct.pack("<8I", magic, flags, -(magic + flags) & 0xffffffff, load, load, load + size, load + size, load + 32)
    with open(path, "wb") as f:
        f.write(header + code + bytes(4096))


def rows_of(text):
    return {name: float(value) for name, value in re.findall(r"row (\S+) ([\d.]+) \S+", text)}


def geometric_mean(values):
    return math.exp(sum(math.log(v) for v in values) / len(values))


def first_line(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def describe_machine():
    cpuinfo = open("/proc/cpuinfo", encoding="utf-8").read()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    mem = re.search(r"MemTotal: +(\d+)", open("/proc/meminfo", encoding="utf-8").read())
    virtualized = "in a VM" if re.search(r"^flags.*\bhypervisor\b", cpuinfo, re.M) else "bare metal"
    hardware = "with VT-x/SVM" if re.search(r"^flags.*\b(vmx|svm)\b", cpuinfo, re.M) else "without VT-x/SVM"
    return [
        f"- {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, Trapline {first_line(['git', 'describe', '--always', '--dirty'])}",
        f"- Host: {model.group(1) if model else 'unknown'}, {os.cpu_count()} CPUs, {virtualized}, {hardware}, "
        f"{int(mem.group(1)) >> 10} MiB, Linux {platform.release()}",
        f"- Load average when the run ended: {os.getloadavg()[0]:.1f} (above 1 before a run means others shared the CPUs)",
        f"- QEMU: {first_line(['qemu-system-x86_64', '--version'])}, `-accel tcg -M q35 -cpu max`",
        f"- Guest: {os.path.basename(os.path.realpath(KERNEL))}, 1 vCPU, {MEMORY} MiB, the same initramfs",
    ]


def number(v):
    if v is None:
        return "–"
    return f"{v:.0f}" if v >= 1000 else f"{v:.1f}" if v >= 100 else f"{v:.2f}"


def ratio(a, b):
    return f"{a / b:.2f}" if a is not None and b else "–"


def judge(met, samples):
    """A goal is judged by medians; fewer than three samples make none."""
    return (": met" if met else ": NOT met") if samples >= 3 else ": not judged, fewer than 3 samples"


def table(results, systems):
    def value(system, row):
        samples = results[system].get(row)
        return statistics.median(samples) if samples else None

    native, trapline, qemu = systems
    lines = [f"| row | {native} | {trapline} | {qemu} | Trapline/native | TCG/native | Trapline/TCG |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    for row in COMPUTE + SYSTEM + MACHINE_ROWS:
        n, t, q = (value(s, row) for s in systems)
        lines.append(f"| {TITLES[row]} | {number(n)} | {number(t)} | {number(q)} | {ratio(t, n)} | {ratio(q, n)} | {ratio(t, q)} |")

    lines.append("")
    for title, rows, base, over, goal in [
            ("Compute rows, Trapline/native, geometric mean (goal: at most 2.2)", COMPUTE, native, trapline, 2.2),
            ("Compute rows, TCG/native, geometric mean", COMPUTE, native, qemu, None),
            ("System rows, Trapline/TCG, geometric mean (goal: at most 0.5)", SYSTEM, qemu, trapline, 0.5),
            ("Command to shell, Trapline/TCG (goal: at most 0.6)", ["shell"], qemu, trapline, 0.6)]:
        pairs = [(value(over, r), value(base, r)) for r in rows]
        if all(a is not None and b for a, b in pairs):
            mean = geometric_mean([a / b for a, b in pairs])
            verdict = "" if goal is None else judge(mean <= goal, len(results[over][rows[0]]))
            lines.append(f"- {title}: {mean:.2f}{verdict}")
    for title, row, goal in [("read of 4 KiB, ns (goal: under 1500)", "read4k", 1500),
                             ("VMM overhead after boot, MiB (goal: under 64)", "overhead", 64),
                             ("Command to the end of a guest that ends at once, ms (first instruction's goal: under 20)", "start", 20)]:
        v = value(trapline, row)
        if v is not None:
            lines.append(f"- {title}: {number(v)}{judge(v < goal, len(results[trapline][row]))}")
    slower = [TITLES[r] for r in COMPUTE + SYSTEM
              if value(trapline, r) is not None and value(qemu, r) is not None and value(trapline, r) > value(qemu, r)]
    if value(trapline, "collatz") is not None and value(qemu, "collatz") is not None:
        lines.append(f"- Rows slower than TCG (goal: none): {'; '.join(slower) or 'none'}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build")
    parser.add_argument("--accel", default="dbt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer runs of each row")
    parser.add_argument("--no-qemu", action="store_true")
    parser.add_argument("--no-write", action="store_true", help="do not write bench/RESULTS.md")
    options = parser.parse_args()

    subprocess.run([os.path.join(ROOT, "scripts", "guest.sh"), "cloud"], check=True)
    trapline = Trapline(os.path.join(ROOT, options.build, "trapline"), options.accel)
    qemu = Qemu()
    systems = [Native(), trapline, qemu]
    skipped = []
    if not trapline.works():
        skipped.append(trapline)
        print(f"bench: {trapline.name} does not work here (see {options.build}/trapline doctor); leaving it out", flush=True)
    if options.no_qemu:
        skipped.append(qemu)

    results = {s.name: {} for s in systems}

    def record(system, rows):
        for row, v in rows.items():
            results[system.name].setdefault(row, []).append(v)

    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        image = os.path.join(scratch, "tiny")
        tiny_guest(image)
        for n in range(options.rounds):
            for system in systems:
                if system in skipped:
                    continue
                print(f"bench: round {n + 1} of {options.rounds}: {system.name}", flush=True)
                steps = [lambda s=system: record(s, rows_of(s.bench(options.quick)))]
                if isinstance(system, Vm):
                    steps.append(lambda s=system: record(s, s.shell()))
                    steps += [lambda s=system: record(s, {"start": s.start(image)})] * 3
                for step in steps:
                    try:
                        step()
                    except (RuntimeError, subprocess.SubprocessError, pexpect.ExceptionPexpect) as e:
                        failures.append(f"{system.name}: {str(e)[-1500:]}")
                        print(f"bench: {failures[-1]}", file=sys.stderr, flush=True)

    lines = table(results, [s.name for s in systems])
    print("\n" + "\n".join(lines))
    if not options.no_write and not skipped and not failures:
        with open(os.path.join(ROOT, "bench", "RESULTS.md"), "w", encoding="utf-8") as f:
            f.write("# Benchmark results\n\nWritten by `make bench`; medians of "
                    f"{options.rounds} interleaved rounds{' (quick)' if options.quick else ''}. Lower is better everywhere.\n\n")
            f.write("\n".join(describe_machine()) + "\n\n" + "\n".join(lines) + "\n")
        print("\nbench: wrote bench/RESULTS.md")
    elif not options.no_write:
        print("\nbench: bench/RESULTS.md is written only by a complete run")
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
