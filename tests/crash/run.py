#!/usr/bin/python3
"""Kill the VMM in the middle of writing, again and again, and look whether everything is there that the guest saw flushed.

A guest writes to its disk and says on the serial line what was flushed (tests/crash/writer.c). After a random time the VMM gets SIGKILL; then
qemu-img, which shares no line with our block layer, checks the image and reads it, and every sector is compared with what it may hold:
the last write that was flushed, or one that came later; never an older one, a torn one, or another sector's. The same image goes on
into the next round, so what a crash left is what the next start must cope with.

  tests/crash/run.py --kills 200 --disk qcow2
  tests/crash/run.py --kills 20 --disk raw --keys cache=none,aio=threads --seed 7

Status 0 if nothing was lost, 1 if something was, 2 if it could not be tried, 77 if a program is missing.
"""
import argparse
import fcntl
import os
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GUEST = os.path.join(ROOT, ".cache", "guest")
THREADS, MAX_SECTORS, MAGIC = 8, 64, 0x74726170
MASK = (1 << 64) - 1
STAMP = struct.Struct("<IIIIQQ")
ZERO = bytes(512)


class Lost(Exception):
    pass


def operations(seed, epoch, thread, sectors):
    """What thread of the writer does: (operation, first sector, how many, zero?, flush behind it?)."""
    part = sectors // THREADS
    start = part * thread
    state = seed ^ ((epoch << 32 | (thread + 1)) * 0x9E3779B97F4A7C15 & MASK)

    def number():
        nonlocal state
        state ^= state << 13 & MASK
        state ^= state >> 7
        state ^= state << 17 & MASK
        return state

    operation = 0
    while True:
        operation += 1
        r, where = number(), number()
        n = 1 + ((r >> 8) & 0xFFFFFFFF) % MAX_SECTORS
        yield operation, start + where % (part - n + 1), n, thread % 2 == 0 and r % 100 < 15, (r >> 40) % 16 == 0


class Disk:
    """The image, and what is known to be on it."""

    def __init__(self, kind, folder, size, options):
        self.kind, self.folder = kind, folder
        self.sectors = size // 512
        self.content = bytes(size)  # at the last look
        self.path = os.path.join(folder, "disk." + kind)
        if kind == "raw":
            with open(self.path, "wb") as f:
                f.truncate(size)
        else:
            command = ["qemu-img", "create", "-q", "-f", "qcow2"]
            if kind == "qcow2-backing":
                base = os.path.join(folder, "base.raw")
                with open(base, "wb") as f:
                    f.write(random.Random(1).randbytes(size // 2))
                    f.truncate(size)
                with open(base, "rb") as f:
                    self.content = f.read()
                command += ["-b", base, "-F", "raw"]
            if options:
                command += ["-o", options]
            subprocess.run([*command, self.path, str(size)], check=True)

    @property
    def format(self):
        return self.kind.split("-")[0]

    def wait_unlocked(self):
        """The kernel may finish I/O of a dead process, and keeps its locks so long."""
        deadline = time.monotonic() + 30
        with open(self.path, "r+b") as f:
            while True:
                asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
                if struct.unpack("hhqqi4x", fcntl.fcntl(f, fcntl.F_OFD_GETLK, asked))[0] == fcntl.F_UNLCK:
                    return
                if time.monotonic() > deadline:
                    raise Lost("the image is still locked 30 s after the VMM was killed")
                time.sleep(0.01)

    def look(self):
        """The whole content, by qemu-img, from a copy that is repaired as QEMU does it: what a crash left must be repairable."""
        copy, raw = os.path.join(self.folder, "copy"), os.path.join(self.folder, "look.raw")
        source = self.path
        self.wait_unlocked()
        if self.format == "qcow2":
            subprocess.run(["cp", "--sparse=always", self.path, copy], check=True)
            check = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", copy], capture_output=True, text=True)
            # 3: clusters that nobody uses, the price of a crash. 2: errors, which only an image that says it is dirty may have.
            if check.returncode == 2:
                info = subprocess.run(["qemu-img", "info", "-f", "qcow2", copy], capture_output=True, text=True)
                if "lazy refcounts: true" not in info.stdout:
                    raise Lost(f"qemu-img check: {check.stdout}{check.stderr}")
            elif check.returncode not in (0, 3):
                raise Lost(f"qemu-img check: {check.stdout}{check.stderr}")
            check = subprocess.run(["qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", copy], capture_output=True, text=True)
            if check.returncode:
                raise Lost(f"qemu-img check -r all: {check.stdout}{check.stderr}")
            source = copy
        subprocess.run(["qemu-img", "convert", "-f", self.format, "-O", "raw", source, raw], check=True)
        with open(raw, "rb") as f:
            return f.read()

    def compare(self, seed, epoch, flushed):
        """Each sector against what it may hold after `flushed` ({thread: operation})."""
        now = self.look()
        assert len(now) == self.sectors * 512
        must = {}  # sector -> operation that was flushed last
        zeroed = {}  # sector -> operations that wrote zeroes, in order
        for thread in range(THREADS):
            last = flushed.get(thread, 0)
            # Behind the last flush that we know of the writer may have gone on; its line got lost. How far is not known, but bounded.
            for operation, first, n, zero, _ in operations(seed, epoch, thread, self.sectors):
                if operation > last + 4000:
                    break
                if operation <= last:
                    for sector in range(first, first + n):
                        must[sector] = operation
                if zero:
                    for sector in range(first, first + n):
                        zeroed.setdefault(sector, []).append(operation)
        for sector in range(self.sectors):
            data = now[sector * 512:sector * 512 + 512]
            least = must.get(sector, 0)
            if data == self.content[sector * 512:sector * 512 + 512]:
                if not least:
                    continue
                if data != ZERO:
                    raise Lost(f"sector {sector}: still what it was before this start, but operation {least} was flushed")
            if data == ZERO:
                if any(operation >= least for operation in zeroed.get(sector, [])):
                    continue
                raise Lost(f"sector {sector}: zeroes, but operation {least} was flushed")
            magic, its_epoch, thread, _, operation, its_sector = STAMP.unpack_from(data)
            if data != data[:32] * 16:
                raise Lost(f"sector {sector}: torn, or of nobody: {data[:32].hex()}")
            if (magic, its_epoch, its_sector) != (MAGIC, epoch, sector):
                raise Lost(f"sector {sector}: holds sector {its_sector} of start {its_epoch} (this is {epoch})")
            if operation < least:
                raise Lost(f"sector {sector}: operation {operation} of thread {thread}, but {least} was flushed")
        self.content = now
        return len(must)


def one(o, disk, epoch, rng):
    """Start, write, kill. Returns {thread: operation flushed}, and how long it wrote."""
    command = [o.trapline, "run", "--accel", o.accel, "--cpus", str(o.cpus), "--memory", "256M", "--no-reboot",
               "--kernel", os.path.join(GUEST, "vmlinuz-cloud"), "--initrd", os.path.join(GUEST, "initrd.img"),
               "--append", "console=ttyS0 quiet panic=-1 trapline.exec=\"cat /dev/vdb >/tmp/w; chmod +x /tmp/w; "
               f"/tmp/w /dev/vda {epoch} {o.seed}{' lie' if o.lie else ''}\"",
               "--disk", f"{disk.path},format={disk.format}" + (f",{o.keys}" if o.keys else ""),
               "--disk", f"{os.path.join(disk.folder, 'writer')},format=raw,ro"]
    vmm = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.set_blocking(vmm.stdout.fileno(), False)
    selector = selectors.DefaultSelector()
    selector.register(vmm.stdout, selectors.EVENT_READ)
    text, started, deadline = b"", None, time.monotonic() + o.timeout
    try:
        while True:
            now = time.monotonic()
            if started is not None and now >= deadline:
                break
            if now >= deadline:
                raise Lost(f"the guest did not come to writing in {o.timeout} s:\n{text.decode(errors='replace')[-2000:]}")
            if selector.select(max(0, deadline - now)):
                chunk = vmm.stdout.read()
                if chunk == b"":
                    raise Lost("the VMM ended by itself: " + vmm.stderr.read().decode(errors="replace")
                               + text.decode(errors="replace")[-2000:])
                text += chunk or b""
                if started is None and b"WRITER STARTS" in text:
                    started = time.monotonic()
                    deadline = started + rng.uniform(0.02, o.seconds)
    finally:
        vmm.send_signal(signal.SIGKILL)
        vmm.wait()
        text += vmm.stdout.read() or b""
        vmm.stdout.close()
        vmm.stderr.close()
    for word in (b"READ BACK SOMETHING ELSE", b"WRITER FAILED", b"I/O error"):
        if word in text:
            raise Lost(text.decode(errors="replace")[-2000:])
    flushed = {}
    for line in text.replace(b"\r", b"").split(b"\n")[:-1]:  # the last may be cut
        words = line.split()
        if len(words) == 3 and words[0] == b"F" and words[1].isdigit() and words[2].isdigit() and int(words[1]) < THREADS:
            flushed[int(words[1])] = max(flushed.get(int(words[1]), 0), int(words[2]))
    return flushed, time.monotonic() - started


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--disk", choices=["raw", "qcow2", "qcow2-backing"], default="raw")
    p.add_argument("--options", default="", help="of qemu-img create -o, e.g. lazy_refcounts=on,cluster_size=4096")
    p.add_argument("--keys", default="", help="more keys of --disk, e.g. cache=none,aio=threads")
    p.add_argument("--size", type=int, default=48, help="MiB")
    p.add_argument("--cpus", type=int, default=2)
    p.add_argument("--accel", default="dbt")
    p.add_argument("--seed", type=int, default=None)
    p.add_argument("--seconds", type=float, default=1.5, help="the longest time that a guest writes")
    p.add_argument("--timeout", type=float, default=120)
    p.add_argument("--trapline", default=os.environ.get("TRAPLINE", os.path.join(ROOT, "build", "trapline")))
    p.add_argument("--lie", action="store_true", help="the guest does not flush, but says so: the checker must notice")
    p.add_argument("--keep", action="store_true", help="leave the folder")
    o = p.parse_args()
    if not shutil.which("qemu-img"):
        print("crash: no qemu-img on this host (Debian: qemu-utils)", file=sys.stderr)
        return 77
    if o.seed is None:
        o.seed = random.randrange(1, 1 << 32)
    rng = random.Random(o.seed)
    folder = tempfile.mkdtemp(prefix="trapline-crash-", dir="/var/tmp")
    keep = o.keep
    try:
        subprocess.run(["cc", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-o", os.path.join(folder, "writer"),
                        os.path.join(ROOT, "tests", "crash", "writer.c")], check=True)
        disk = Disk(o.disk, folder, o.size << 20, o.options)
        print(f"crash: {o.kills} kills, {o.disk} {o.options} {o.keys}, seed {o.seed}", flush=True)
        flushes = sectors = 0
        for epoch in range(1, o.kills + 1):
            try:
                flushed, wrote = one(o, disk, epoch, rng)
                known = disk.compare(o.seed, epoch, flushed)
            except Lost as e:
                keep = not o.lie
                print(f"\ncrash: kill {epoch}: LOST: {e}\ncrash: seed {o.seed}{f', the image is left in {folder}' if keep else ''}", flush=True)
                return 1
            flushes += sum(flushed.values())
            sectors += known
            end = "\r" if sys.stdout.isatty() and epoch < o.kills else "\n"
            print(f"crash: kill {epoch}/{o.kills} after {wrote:.2f} s: {sum(flushed.values())} flushed operations, {known} sectors looked at",
                  end=end, flush=True)
        print(f"crash: {o.kills} kills, {flushes} flushed operations, {sectors} sectors, nothing lost")
        return 0
    finally:
        if not keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
