#!/usr/bin/python3
"""Disks and networks, Trapline and QEMU TCG side by side: the same Debian system, kernel and host, one after the other.

Both VMMs run the demo disk (scripts/demo-disk.sh) with a second, raw disk and three network cards (user, passt, tap), inside a network
namespace of this program's own, so that nothing of the host's network changes. Prints medians and ratios and writes
bench/RESULTS-IO.md. Needs root (namespaces, tap).
Usage: bench/io.py [--build DIR] [--accel NAME] [--rounds N] [--quick] [--cpus N] [--only trapline|qemu] [--no-write]
"""
import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from run import describe_machine, geometric_mean, memory_of_command, number, ratio  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEMO = os.path.join(ROOT, ".cache", "demo")
KEY = os.path.join(DEMO, "id_ed25519")
MEMORY = 1024  # MiB
DISK = 1024    # MiB, the second disk
APPEND = "root=/dev/vda rw console=ttyS0 quiet"
SSH_PORT = 2222
MACS = {"user": "52:54:00:00:00:01", "passt": "52:54:00:00:00:02", "tap": "52:54:00:00:00:03"}
# The host as each card sees it.
SERVERS = {"user": "10.0.2.2", "passt": "192.168.200.1", "tap": "192.168.77.1"}

# Higher is better, or lower: rows with their titles in the order of the table.
FIO = {
    "randread-1": ("4k random read, depth 1, IOPS", "randread", "4k", 1),
    "randread-32": ("4k random read, depth 32, IOPS", "randread", "4k", 32),
    "randwrite-1": ("4k random write, depth 1, IOPS", "randwrite", "4k", 1),
    "randwrite-32": ("4k random write, depth 32, IOPS", "randwrite", "4k", 32),
    "read": ("sequential read, 1 MiB, depth 4, MB/s", "read", "1M", 4),
    "write": ("sequential write, 1 MiB, depth 4, MB/s", "write", "1M", 4),
}
IPERF = {f"{kind}-{way}": (f"iperf3, {kind}, {'guest to host' if way == 'out' else 'host to guest'}, Gbit/s", kind, way)
         for kind in SERVERS for way in ("out", "in")}
LOWER = {
    "ssh": "ssh round trip (a command on an open connection), ms",
    "boot": "command to login by ssh, s",
    "idle": "idle: VMM's CPU, % of a core",
    "rss": "VMM's memory beside guest RAM, MiB",
}


def sh(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options).stdout


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat", encoding="utf-8").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Vm:
    def __init__(self, scratch, options):
        self.scratch, self.options = scratch, options
        self.disk = os.path.join(scratch, "data.raw")

    def __enter__(self):
        self.log = open(os.path.join(self.scratch, "console.log"), "w+b")
        self.control = os.path.join(self.scratch, "ssh")
        self.helpers = []
        begin = time.monotonic()
        self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)
        try:
            while self.ssh_raw("-o", "ConnectTimeout=2", "-M", "-N", "-f").returncode:
                if self.process.poll() is not None or time.monotonic() - begin > 300:
                    raise RuntimeError(f"{self.name}: no login by ssh (status {self.process.poll()})\n{self.tail()}")
                time.sleep(0.05)
            self.boot = time.monotonic() - begin
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.ssh_raw("systemctl poweroff --no-block")
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for helper in self.helpers:
            helper.kill()
        self.process.wait()
        self.log.close()

    def tail(self):
        self.log.seek(0)
        return self.log.read()[-2000:].decode(errors="replace")

    def ssh_raw(self, *arguments):
        return subprocess.run(["ssh", "-q", "-i", KEY, "-p", str(SSH_PORT), "-S", self.control, "-o", "BatchMode=yes",
                               "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@127.0.0.1", *arguments],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)

    def ssh(self, command):
        done = self.ssh_raw(command)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {command}: status {done.returncode}\n{done.stdout[-800:]}{done.stderr[-800:]}")
        return done.stdout

    def fio(self, kind, block, depth, seconds):
        out = self.ssh(f"fio --name=x --filename=/dev/vdb --rw={kind} --bs={block} --iodepth={depth} --ioengine=libaio --direct=1 "
                       f"--runtime={seconds} --time_based --ramp_time=1 --randrepeat=1 --norandommap --output-format=json")
        job = json.loads(out[out.index("{"):])["jobs"][0]
        side = job["write" if "write" in kind else "read"]
        return side["bw_bytes"] / 1e6 if block == "1M" else side["iops"]

    def iperf(self, kind, way, seconds):
        server = subprocess.Popen(["iperf3", "-s", "-1", "-p", "5201"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            device = f"$(grep -l {MACS[kind]} /sys/class/net/*/address | cut -d/ -f5)"
            time.sleep(0.3)
            out = self.ssh(f"iperf3 -c {SERVERS[kind]} -p 5201 --bind-dev {device} -t {seconds} -O 1 -J {'-R' if way == 'in' else ''}")
            return json.loads(out)["end"]["sum_received"]["bits_per_second"] / 1e9
        finally:
            server.kill()
            server.wait()

    def round_trip(self):
        samples = []
        for _ in range(15):
            begin = time.monotonic()
            self.ssh("true")
            samples.append((time.monotonic() - begin) * 1e3)
        return statistics.median(samples)

    def idle(self, seconds):
        time.sleep(2)
        before = cpu_seconds(self.process.pid)
        time.sleep(seconds)
        return (cpu_seconds(self.process.pid) - before) / seconds * 100

    def tap_address(self):
        self.ssh(f"ip addr add 192.168.77.2/24 dev $(grep -l {MACS['tap']} /sys/class/net/*/address | cut -d/ -f5)")


class Trapline(Vm):
    name = "Trapline"

    def command(self):
        return [os.path.join(ROOT, self.options.build, "trapline"), "run", "--accel", self.options.accel, "--memory", f"{MEMORY}M",
                "--cpus", str(self.options.cpus), "--no-reboot", "--kernel", f"{DEMO}/vmlinuz", "--initrd", f"{DEMO}/initrd.img",
                "--append", APPEND, "--disk", f"{DEMO}/base.qcow2,overlay", "--disk", f"{self.disk},format=raw",
                "--net", f"user,mac={MACS['user']},hostfwd=tcp:127.0.0.1:{SSH_PORT}-:22",
                "--net", f"passt,mac={MACS['passt']}", "--net", f"tap,ifname=tap0,mac={MACS['tap']}"]


class Qemu(Vm):
    name = "QEMU TCG"

    def command(self):
        sock = "/tmp/trapline-bench-passt.sock"
        if os.path.exists(sock):
            os.unlink(sock)
        passt = subprocess.Popen(["passt", "-f", "-q", "-s", sock], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.helpers.append(passt)
        for _ in range(100):
            if os.path.exists(sock):
                break
            time.sleep(0.05)
        return ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-m", f"{MEMORY}M",
                "-smp", str(self.options.cpus), "-nographic", "-no-reboot", "-kernel", f"{DEMO}/vmlinuz", "-initrd", f"{DEMO}/initrd.img",
                "-append", APPEND, "-drive", f"file={DEMO}/base.qcow2,if=virtio,snapshot=on",
                "-drive", f"file={self.disk},format=raw,if=virtio,aio=io_uring",
                "-netdev", f"user,id=user,hostfwd=tcp:127.0.0.1:{SSH_PORT}-:22", "-device", f"virtio-net-pci,netdev=user,mac={MACS['user']}",
                "-netdev", f"stream,id=passt,server=off,addr.type=unix,addr.path={sock}",
                "-device", f"virtio-net-pci,netdev=passt,mac={MACS['passt']}",
                "-netdev", "tap,id=tap,ifname=tap0,script=no,downscript=no", "-device", f"virtio-net-pci,netdev=tap,mac={MACS['tap']}",
                "-device", "virtio-rng-pci"]


def network():
    """The namespace's interfaces: loopback, one that passt takes its addresses from, and the tap device."""
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "tuntap", "add", "uplink", "mode", "tap")
    sh("ip", "addr", "add", "192.168.200.2/24", "dev", "uplink")
    sh("ip", "link", "set", "uplink", "up")
    sh("ip", "route", "add", "default", "via", "192.168.200.1")
    sh("ip", "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
    sh("ip", "addr", "add", "192.168.77.1/24", "dev", "tap0")
    sh("ip", "link", "set", "tap0", "up")


def measure(vm, record, options):
    seconds = 2 if options.quick else 4
    with vm:
        steps = [("boot", lambda: vm.boot)]
        vm.tap_address()
        for row, (_, kind, block, depth) in FIO.items():
            steps.append((row, lambda k=kind, b=block, d=depth: vm.fio(k, b, d, seconds)))
        for row, (_, kind, way) in IPERF.items():
            steps.append((row, lambda k=kind, w=way: vm.iperf(k, w, seconds)))
        steps.append(("ssh", vm.round_trip))
        steps.append(("rss", lambda: memory_of_command(vm.process.pid, MEMORY)[1]))
        steps.append(("idle", lambda: vm.idle(5 if options.quick else 15)))
        for row, step in steps:
            value = step()
            print(f"bench:   {vm.name}: {row} {number(value)}", flush=True)
            record(vm.name, row, value)


def table(results):
    def value(system, row):
        samples = results.get(system, {}).get(row)
        return statistics.median(samples) if samples else None

    lines = ["| row | Trapline | QEMU TCG | times better |", "|---|--:|--:|--:|"]
    better = {}
    rows = [(r, t[0], True) for r, t in {**FIO, **IPERF}.items()] + [(r, t, False) for r, t in LOWER.items()]
    for row, title, higher in rows:
        t, q = value("Trapline", row), value("QEMU TCG", row)
        a, b = (t, q) if higher else (q, t)
        lines.append(f"| {title} | {number(t)} | {number(q)} | {ratio(a, b)} |")
        if a and b:
            better[row] = a / b
    io = [better[r] for r in {**FIO, **IPERF, "ssh": 0} if r in better]
    if io:
        slower = [title for row, title, _ in rows if row in better and better[row] < 1 and row not in ("idle", "rss")]
        lines += ["", f"- I/O rows (disks, networks, ssh), times better than TCG, geometric mean (goal: at least 3): {geometric_mean(io):.2f}",
                  f"- I/O rows slower than TCG (goal: none): {'; '.join(slower) or 'none'}"]
    if "boot" in better:
        lines.append(f"- Boot to login, Trapline/TCG (goal: at most 0.5): {1 / better['boot']:.2f}")
    if value("Trapline", "idle") is not None:
        lines.append(f"- Idle CPU, % (goal: under 1): {number(value('Trapline', 'idle'))}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build")
    parser.add_argument("--accel", default="dbt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="shorter rows")
    parser.add_argument("--only", choices=["trapline", "qemu"])
    parser.add_argument("--no-write", action="store_true", help="do not write bench/RESULTS-IO.md")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    if not options.in_namespace:
        if os.geteuid() != 0:
            print("bench: disks and networks are left out: a network namespace and a tap device need root", file=sys.stderr)
            return 0
        subprocess.run([os.path.join(ROOT, "scripts", "demo-disk.sh")], check=True)
        os.execvp("unshare", ["unshare", "--net", "--mount", sys.executable, os.path.abspath(__file__), "--in-namespace", *sys.argv[1:]])
    network()

    results, failures = {}, []

    def record(system, row, value):
        results.setdefault(system, {}).setdefault(row, []).append(value)

    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        disk = os.path.join(scratch, "data.raw")
        with open(disk, "wb") as f:
            for _ in range(DISK):
                f.write(os.urandom(1 << 16) * 16)
        systems = [s for s in (Trapline, Qemu) if options.only in (None, s.__name__.lower())]
        for n in range(options.rounds):
            for system in systems:
                print(f"bench: round {n + 1} of {options.rounds}: {system.name}", flush=True)
                try:
                    measure(system(scratch, options), record, options)
                except (RuntimeError, subprocess.SubprocessError, ValueError, KeyError) as e:
                    failures.append(f"{system.name}: {str(e)[-1500:]}")
                    print(f"bench: {failures[-1]}", file=sys.stderr, flush=True)

    lines = table(results)
    print("\n" + "\n".join(lines))
    if not options.no_write and not options.only and not failures:
        with open(os.path.join(ROOT, "bench", "RESULTS-IO.md"), "w", encoding="utf-8") as f:
            f.write("# Benchmark results: disks and networks\n\nWritten by `make bench` (bench/io.py); medians of "
                    f"{options.rounds} interleaved rounds{' (quick)' if options.quick else ''}.\n\n")
            guest = f"- Guest: Debian 12 from a qcow2 image behind a throw-away overlay, {options.cpus} vCPU, {MEMORY} MiB; fio on a second, raw disk of {DISK} MiB, in the host's page cache"
            f.write("\n".join(describe_machine()[:-1] + [guest]) + "\n\n" + "\n".join(lines) + "\n")
        print("\nbench: wrote bench/RESULTS-IO.md")
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not shutil.which("ip"):
        print("bench: there is no ip program; install iproute2", file=sys.stderr)
        sys.exit(1)
    sys.exit(main())
