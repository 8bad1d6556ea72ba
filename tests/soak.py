#!/usr/bin/python3
"""Hot load: a Debian system with several vCPUs under disk, network and memory pressure at once, for as long as one likes.

fio writes and verifies on a qcow2 disk with a backing file and on a raw one, iperf3 sends both ways through the user network, and a
program fills the memory again and again until the kernel must reclaim. Nothing may fail, the guest's kernel may complain about nothing, the VMM
must end with status 0, and the qcow2 image must be clean.
Usage: tests/soak.py [--seconds 600] [--cpus 4] [--accel dbt] [--build build]
"""
import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--accel", default="dbt")
    parser.add_argument("--build", default="build")
    options = parser.parse_args()
    os.environ["TRAPLINE"] = os.path.join(ROOT, options.build, "trapline")
    sys.path.insert(0, os.path.join(ROOT, "tests", "integration"))
    import demo  # after the environment says which program

    why = demo.build()
    if why:
        print(f"soak: {why}", file=sys.stderr)
        return 2
    failures, counts = [], {}
    begin = time.monotonic()
    end = begin + options.seconds

    def repeat(name, step):
        """Again and again until the time is over; the first failure ends it."""
        while time.monotonic() < end and not failures:
            try:
                step()
                counts[name] = counts.get(name, 0) + 1
            except AssertionError as e:
                failures.append(f"{name}: {e}")

    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        base, top, plain = (os.path.join(scratch, n) for n in ("base.raw", "top.qcow2", "plain.raw"))
        for path in (base, plain):
            with open(path, "wb") as f:
                f.truncate(256 << 20)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
        server = subprocess.Popen(["iperf3", "-s", "-p", "5391"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with demo.System(scratch, options.accel, "--disk", top, "--disk", f"{plain},format=raw,cache=none", "--balloon", "on",
                             cpus=options.cpus) as s:
                print(f"soak: logged in after {time.monotonic() - begin:.0f} s", flush=True)
                end = time.monotonic() + options.seconds
                jobs = {
                    "fio": lambda: s.ssh(
                        "fio --rw=randrw --bsrange=4k-128k --size=192M --io_size=64M --iodepth=16 --ioengine=libaio --direct=1 --verify=crc32c "
                        "--verify_fatal=1 --fsync=128 --name=b --filename=/dev/vdb --name=c --filename=/dev/vdc", timeout=600),
                    # One after the other: iperf3's server takes one client at a time.
                    "network": lambda: (s.ssh("iperf3 -c 10.0.2.2 -p 5391 -t 5", timeout=120),
                                        s.ssh("iperf3 -c 10.0.2.2 -p 5391 -t 5 -R", timeout=120)),
                    "memory": lambda: s.ssh("head -c 600m /dev/zero | tail -c 400m | wc -c; find /usr -xdev -type f -size -64k | head -3000 | "
                                            "xargs cat >/dev/null", timeout=300),
                }
                threads = [threading.Thread(target=repeat, args=job) for job in jobs.items()]
                for t in threads:
                    t.start()
                while any(t.is_alive() for t in threads):
                    time.sleep(10)
                    print(f"soak: {time.monotonic() - begin:5.0f} s  " + "  ".join(f"{k} {v}" for k, v in sorted(counts.items())), flush=True)
                if not failures:
                    failures += [f"the guest's kernel said: {line}" for line in s.complaints()]
            if s.status != 0:
                failures.append(f"the VMM ended with status {s.status}\n{s.said()}")
        except AssertionError as e:
            failures.append(str(e))
        finally:
            server.kill()
            server.wait()
        done = subprocess.run(["qemu-img", "check", top], capture_output=True, text=True)
        if done.returncode:
            failures.append(f"qemu-img check: {done.stdout}{done.stderr}")
    for f in failures:
        print(f"soak: {f}", file=sys.stderr)
    print(f"soak: {sum(counts.values())} rounds in {time.monotonic() - begin:.0f} s, {len(failures)} failures")
    return 1 if failures or not counts else 0


if __name__ == "__main__":
    sys.exit(main())
