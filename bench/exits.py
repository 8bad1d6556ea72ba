#!/usr/bin/python3
"""What an exit costs, how fast a VM starts and what it takes, side by side with QEMU on the same accelerators.

One guest (bench/guest/exits.c) times exits by its TSC under Trapline and QEMU, KVM and translators, interleaved; where KVM does not work
only the translators run. The VMM's own time an exit is what the process spends in user mode over many exits, under KVM, where the guest
spends none. Prints a table and writes bench/RESULTS-EXITS.md.
Usage: bench/exits.py [--build DIR] [--rounds N] [--quick] [--no-write]
"""
import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

from run import INITRD, KERNEL, ROOT, describe_machine, number  # noqa: E402

MEMORY = 64  # MiB
ROWS = {
    "pio-read": "IN from a port where nobody is",
    "pio-write": "OUT to such a port",
    "pio-rtc": "IN from the RTC",
    "mmio-read": "read of the HPET's counter",
    "mmio-write": "write to an HPET register",
    "x2apic-read": "read of an x2APIC register",
    "cpuid": "CPUID",
    "msr-read": "RDMSR of APIC_BASE",
    "notify": "virtio queue notify (nothing in the queue)",
    "hlt-timer": "PIT armed for 201 us, HLT, interrupt",
    "hlt-ipi": "IPI to a processor in HLT, and its answer seen",
}
OWN = ["pio-read", "mmio-read", "notify"]  # the VMM's own time


class System:
    def __init__(self, name, command, accel, guest):
        self.name, self.command, self.accel, self.guest = name, command, accel, guest
        self.rows, self.own, self.start, self.memory = {}, {}, [], []

    def run(self, append, stdout=subprocess.PIPE):
        return subprocess.Popen([*self.command, "-append" if "qemu" in self.command[0] else "--append", append],
                                stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL)


def trapline(build, accel, guest):
    return System(f"Trapline {accel}", [f"{build}/trapline", "run", "--accel", accel, "--memory", f"{MEMORY}M", "--cpus", "2", "--no-reboot",
                                        "--kernel", guest], accel, guest)


def qemu(accel, guest):
    cpu = "host" if accel == "kvm" else "max"
    return System(f"QEMU {accel}", [shutil.which("qemu-system-x86_64"), "-accel", accel, "-cpu", cpu, "-M", "q35,memory-backend=ram", "-object",
                                    f"memory-backend-memfd,id=ram,size={MEMORY}M", "-m", f"{MEMORY}M", "-smp", "2", "-display", "none",
                                    "-nodefaults", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device",
                                    "virtio-rng-pci,disable-legacy=on", "-serial", "stdio", "-kernel", guest], accel, guest)


def exits(system):
    process = system.run("cpus=2")
    try:
        out, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"{system.name} did not end in 120 s"
    rows = re.findall(r"row (\S+) (\d+) \d+", out.decode(errors="replace"))
    for row, cycles in rows:
        system.rows.setdefault(row, []).append(int(cycles))
    return None if rows else f"{system.name} said: {out[-300:]!r}"


def user_ns(system, kind, count):
    """The VMM's own time over `count` exits, in ns an exit: user mode, without what the kernel books there for the guest; what a run without any
    exits takes is taken off."""
    def spent(n):
        process = system.run(f"only={kind} count={n}", subprocess.DEVNULL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with open(f"/proc/{process.pid}/stat", encoding="ascii", errors="replace") as f:
            fields = f.read().rsplit(")", 1)[1].split()  # proc_pid_stat(5): the first is number 3
        process.wait()
        return (int(fields[14 - 3]) - int(fields[43 - 3])) / os.sysconf("SC_CLK_TCK")
    return max(0.0, spent(count) - spent(0)) * 1e9 / count


def first_byte_ms(system):
    """Command to the first byte that the guest prints: its first row is its first word, but for what firmware says before."""
    begin = time.monotonic()
    process = system.run("only=none")
    seen = b""
    while b"exits:" not in seen:
        chunk = os.read(process.stdout.fileno(), 4096)
        if not chunk:
            break
        seen += chunk
    took = (time.monotonic() - begin) * 1e3
    process.kill()
    process.communicate()
    return took


def overhead_mib(system):
    """Resident memory but for guest RAM, while the guest runs."""
    process = system.run("only=nothing count=1000000000000", subprocess.DEVNULL)
    time.sleep(1.0)
    total, guest = 0, False
    with open(f"/proc/{process.pid}/smaps", encoding="ascii", errors="replace") as f:
        for line in f:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                guest = "memfd:guest-ram" in line or "memfd:memory-backend-memfd" in line
            elif line.startswith("Rss:") and not guest:
                total += int(line.split()[1])
    process.kill()
    process.wait()
    return total / 1024


def entry_ms(build, accel, more):
    """execve to the first entry of vCPU 0, by the line that --verbose logs."""
    begin = time.clock_gettime(time.CLOCK_MONOTONIC)
    process = subprocess.Popen([f"{build}/trapline", "run", "--verbose", "--accel", accel, "--serial", "none", *more],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = b""
    while b"monotonic clock" not in said:
        chunk = os.read(process.stderr.fileno(), 4096)
        if not chunk:
            break
        said += chunk
    process.kill()
    process.communicate()
    match = re.search(rb"enters the guest, at ([0-9.]+) s", said)
    return (float(match.group(1)) - begin) * 1e3 if match else None


def kvm_works(build):
    doctor = subprocess.run([f"{build}/trapline", "doctor"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"^  kvm +works here.*\n +(.*)$", doctor, re.M)
    tsc = re.search(r"TSC +([0-9.]+) MHz", doctor)
    return (found.group(1) if found else None), float(tsc.group(1)) if tsc else 0.0


def median(samples):
    samples = [s for s in samples if s is not None]
    return statistics.median(samples) if samples else None


def cell(value):
    return "–" if value is None else number(value)


def report(systems, entries, found, mhz, rounds):
    lines = [f"| cycles ({mhz:.0f} a microsecond) | " + " | ".join(s.name for s in systems) + " |", "|---|" + "--:|" * len(systems)]
    for row, title in ROWS.items():
        lines.append(f"| {title} | " + " | ".join(cell(median(s.rows.get(row, []))) for s in systems) + " |")
    lines += ["", "| of the process | " + " | ".join(s.name for s in systems) + " |", "|---|" + "--:|" * len(systems)]
    for kind in OWN:
        if any(s.own.get(kind) for s in systems):
            lines.append(f"| own time an exit ({ROWS[kind]}), ns | " + " | ".join(cell(median(s.own.get(kind, []))) for s in systems) + " |")
    lines.append("| command to the guest's first line, ms | " + " | ".join(cell(median(s.start)) for s in systems) + " |")
    lines.append("| resident memory beside guest RAM, MiB | " + " | ".join(cell(median(s.memory)) for s in systems) + " |")
    lines += ["", "| execve to the first guest instruction, ms | median | least |", "|---|--:|--:|"]
    for name, samples in entries.items():
        samples = [s for s in samples if s is not None]
        if samples:
            lines.append(f"| {name} | {number(statistics.median(samples))} | {number(min(samples))} |")
    lines += [""] + ([f"- KVM here: {found}"] if found else ["- KVM: does not work here"])
    lines += ["- Times of HLT rows have the wait in them; QEMU's command to first line has SeaBIOS in it.",
              f"- Medians of {rounds} interleaved rounds (first instruction: {rounds * 3})."]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, few exits, nothing written")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    build = os.path.join(ROOT, options.build)
    guest = os.path.join(build, "tests", "guest", "exits.elf")
    rounds = 1 if options.quick else options.rounds
    found, mhz = kvm_works(build)
    accels = ["kvm"] if found else []
    systems = []
    for accel in accels + ["dbt"]:
        systems.append(trapline(build, accel, guest))
        if shutil.which("qemu-system-x86_64"):
            systems.append(qemu("kvm" if accel == "kvm" else "tcg", guest))
    entries = {}
    troubles = []
    for n in range(rounds):
        for system in systems:
            print(f"round {n + 1} of {rounds}: {system.name}", file=sys.stderr, flush=True)
            trouble = exits(system)
            if trouble:
                troubles.append(trouble)
                continue
            system.start.append(first_byte_ms(system))
            if n == 0:
                system.memory.append(overhead_mib(system))
            for kind in OWN if system.accel == "kvm" else []:
                # At ticks of 4 ms some tens of thousands are needed; a software KVM takes seconds for them.
                system.own.setdefault(kind, []).append(user_ns(system, kind, 2000 if options.quick else 40000))
        for accel in accels + ["dbt"]:
            for _ in range(3):
                entries.setdefault(f"{accel}, a small guest", []).append(entry_ms(build, accel, ["--kernel", guest]))
                if os.path.exists(KERNEL) and os.path.exists(INITRD):
                    entries.setdefault(f"{accel}, Debian's kernel and an initrd of {os.path.getsize(INITRD) >> 20} MiB", []).append(
                        entry_ms(build, accel, ["--kernel", KERNEL, "--initrd", INITRD]))
    lines = report(systems, entries, found, mhz, rounds) + [f"- {t}" for t in sorted(set(troubles))]
    print("\n".join(lines))
    if not (options.quick or options.no_write):
        with open(os.path.join(ROOT, "bench", "RESULTS-EXITS.md"), "w", encoding="utf-8") as f:
            f.write("# Benchmark results: exits, start, size\n\nWritten by `make bench` (bench/exits.py).\n\n"
                    + "\n".join([line for line in describe_machine() if not line.startswith("- Guest:")] + [""] + lines) + "\n")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
