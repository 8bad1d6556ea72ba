"""vhost-user devices and NBD's server side by real peers: virtiofsd and qemu-storage-daemon."""
import filecmp
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from conftest import SLOW, TRAPLINE, boot, boot_args, run

VIRTIOFSD = [p for p in ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd") if os.path.exists(p)]
needs_virtiofsd = pytest.mark.skipif(not VIRTIOFSD, reason="virtiofsd is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root")
needs_qsd = pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is not installed")


def script(*commands):
    return 'trapline.exec="' + "; ".join(commands) + '"'


def tree(folder):
    return sorted(os.path.relpath(os.path.join(base, name), folder) for base, _, names in os.walk(folder) for name in names)


def same_trees(a, b):
    assert tree(a) == tree(b)
    _, different, errors = filecmp.cmpfiles(a, b, tree(a), shallow=False)
    assert different == [] and errors == []


def fill(folder):
    os.makedirs(os.path.join(folder, "deep", "er"))
    for i in range(40):
        with open(os.path.join(folder, "deep", "er" if i % 2 else "", f"file {i}"), "wb") as f:
            f.write(os.urandom(i * 1777))
    with open(os.path.join(folder, "big"), "wb") as f:
        f.write(os.urandom(5 << 20))


@needs_virtiofsd
@needs_root
def test_share(any_accel, tmp_path):
    """A tree read, copied, compared, renamed and removed by the guest: the host sees the same."""
    share, read_only = tmp_path / "share", tmp_path / "ro"
    fill(share / "from-host")
    fill(read_only / "data")
    result = boot(any_accel, script(
        "mkdir /a /b", "mount -t virtiofs work /a && mount -t virtiofs share1 /b && echo MOUNTED",
        "cp -r /a/from-host /tmp/copy && diff -r /a/from-host /tmp/copy && echo READ",
        "cp -r /tmp/copy /a/from-guest && sync && diff -r /a/from-guest /tmp/copy && echo WRITTEN",
        "mkdir /a/d && mv /a/from-guest/big /a/d/moved && cmp /a/d/moved /tmp/copy/big && cp /a/d/moved /a/from-guest/big && echo RENAMED",
        "ln -s d/moved /a/link && cmp /a/link /a/d/moved && chmod 640 /a/d/moved && rm -r /a/from-host && echo REMOVED",
        "touch /b/data/x || echo PROTECTED", "diff -r /b/data /tmp/copy >/dev/null; cp -r /b/data /a/from-ro", "umount /a /b && echo UNMOUNTED"),
        "--share", f"{share},tag=work", "--share", f"{read_only},ro", cpus=2)
    assert result.status == 0, result
    for word in ("MOUNTED", "READ", "WRITTEN", "RENAMED", "REMOVED", "PROTECTED", "UNMOUNTED"):
        assert word in result.out, result
    assert not (share / "from-host").exists() and os.readlink(share / "link") == "d/moved"
    assert (share / "d" / "moved").stat().st_mode & 0o777 == 0o640
    assert filecmp.cmp(share / "d" / "moved", share / "from-guest" / "big", shallow=False)
    same_trees(read_only / "data", share / "from-ro")
    assert "trapline" not in result.err and "virtio_loop" not in result.err, result


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as f:
        return [int(c) for c in f.read().split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(what, condition, seconds=30):
    end = time.monotonic() + seconds * SLOW
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    pytest.fail(f"waited in vain for {what}")


class Guest:
    """A VM in the background whose console is a file."""

    def __init__(self, accel, append, *more, tmp_path, **machine):
        self.console, self.stderr = tmp_path / "console", tmp_path / "stderr"
        self.console.unlink(missing_ok=True)
        with open(self.stderr, "wb") as err:
            self.process = subprocess.Popen([TRAPLINE, *boot_args(accel, append, **machine), "--serial", f"file:{self.console}", *more],
                                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err)

    def says(self, word):
        return self.console.exists() and word in self.console.read_text(errors="replace")

    def err(self):
        return self.stderr.read_text(errors="replace")

    def wait_for(self, word, seconds=90):
        end = time.monotonic() + seconds * SLOW
        while not self.says(word):
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the guest never said {word}\n{self.console.read_text(errors='replace')[-3000:]}\n{self.err()}")
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@needs_virtiofsd
@needs_root
def test_share_ends_with_the_vm(any_accel, tmp_path):
    """SIGKILL of the VMM takes virtiofsd with it; SIGKILL of virtiofsd leaves the guest alive, with errors for files."""
    (tmp_path / "s").mkdir()
    mount = ("mkdir /a", "mount -t virtiofs share0 /a && echo MOUNTED")
    with Guest(any_accel, script(*mount, "sleep 1000"), "--share", str(tmp_path / "s"), tmp_path=tmp_path) as guest:
        guest.wait_for("MOUNTED")
        daemons = children(guest.process.pid)
        daemons += [c for d in daemons for c in children(d)]
        assert daemons
        guest.process.kill()
        wait_for("the end of virtiofsd", lambda: not any(map(alive, daemons)))
    with Guest(any_accel, script(*mount, "while ls /a/x 2>&1 | grep -q such; do usleep 50000; done", "ls /a/x", "echo ALIVE"),
               "--share", str(tmp_path / "s"), tmp_path=tmp_path) as guest:
        guest.wait_for("MOUNTED")
        os.kill(children(guest.process.pid)[0], signal.SIGKILL)
        assert guest.process.wait(timeout=60 * SLOW) == 0
        assert guest.says("ALIVE")
        assert len(re.findall("virtio-fs share0: .* is lost", guest.err())) == 1


@needs_virtiofsd
@needs_root
def test_share_after_a_reboot(any_accel, tmp_path):
    """The machine is built anew: with a virtiofsd of its own, and none left of before."""
    share = tmp_path / "s"
    share.mkdir()
    with Guest(any_accel, script("mkdir /a", "mount -t virtiofs share0 /a", "if [ -e /a/first ]", "then touch /a/second", "sync", "else touch /a/first",
                                 "sync", "reboot -f", "fi"), "--share", str(share), tmp_path=tmp_path, no_reboot=False) as guest:
        assert guest.process.wait(timeout=120 * SLOW) == 0, guest.err()
    assert (share / "first").exists() and (share / "second").exists(), guest.err()
    assert "trapline" not in guest.err()


def test_share_refusals(any_accel, tmp_path):
    (tmp_path / "file").write_text("x")
    for value, word in ((f"{tmp_path}/none", "none"), (f"{tmp_path}/file", "not a folder"), ("", "empty"), (f"{tmp_path},tag={'x' * 37}", "36"),
                        (f"{tmp_path},cache=maybe", "cache"), (f"{tmp_path},wrong=1", "wrong"), ("socket=/nonexistent/s", "/nonexistent/s"),
                        (f"{tmp_path},socket=/x", "socket")):
        if word in ("none", "not a folder") and (not VIRTIOFSD or os.geteuid()):
            continue
        result = run(*boot_args(any_accel, "trapline.report"), "--share", value)
        assert result.status == 2 and "--share" in result.err and word in result.err, (value, result)
        assert len(result.err.splitlines()) == 1, result


@pytest.mark.skipif(not shutil.which("dpdk-testpmd"), reason="dpdk-testpmd (package dpdk-dev) is not installed")
@pytest.mark.parametrize("queues", [1, 2])
def test_network_of_two(any_accel, tmp_path, queues):
    """Two VMs on the two ports of DPDK's testpmd: a file from one to the other."""
    sockets = [str(tmp_path / name) for name in "ab"]
    vdevs = [a for i, path in enumerate(sockets) for a in ("--vdev", f"net_vhost{i},iface={path},queues={queues},legacy-ol-flags=1")]
    pmd = subprocess.Popen(["nice", "dpdk-testpmd", "-l", "0,1", "--no-huge", "-m", "256", "--no-pci", "--no-shconf", "-d", "librte_net_vhost.so.23",
                            "-d", "librte_mempool_ring.so.23", *vdevs, "--", "--forward-mode=io", "--auto-start", "--total-num-mbufs=4096",
                            f"--rxq={queues}", f"--txq={queues}", "--stats-period=60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("testpmd", lambda: all(map(os.path.exists, sockets)), 60)
        up = "ip link set eth0 up; ip addr add 10.9.0.{}/24 dev eth0"
        (tmp_path / "receiver").mkdir()
        net = [("--net", f"vhost-user,socket={path},queues={queues}") for path in sockets]
        with Guest(any_accel, script("echo QUEUES $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l) END", up.format(1), "sleep 300 | nc -l -p 99 | md5sum", "poweroff -f"), *net[0],
                   tmp_path=tmp_path / "receiver", memory="256M", cpus=queues) as receiver:
            sender = boot(any_accel, script(up.format(2), "until ping -c 1 -W 1 10.9.0.1 >/dev/null; do :; done", "dd if=/dev/urandom of=/tmp/r bs=1M count=8 2>/dev/null",
                                            "md5sum </tmp/r", "nc 10.9.0.1 99 </tmp/r"), *net[1], memory="256M", cpus=queues)
            assert sender.status == 0, sender
            md5 = re.search(r"^([0-9a-f]{32})  -", sender.out, re.M).group(1)
            receiver.wait_for(md5)
            assert receiver.says(f"QUEUES {queues} END")
    finally:
        pmd.kill()
        pmd.wait()


class StorageDaemon:
    def __init__(self, tmp_path, exports):
        """exports: name -> (image, format)"""
        self.args = ["qemu-storage-daemon"]
        self.sockets = {}
        for name, (image, fmt) in exports.items():
            self.sockets[name] = str(tmp_path / f"{name}.sock")
            self.args += ["--blockdev", f"driver=file,node-name=file-{name},filename={image},discard=unmap",
                          "--blockdev", f"driver={fmt},node-name={name},file=file-{name},discard=unmap",
                          "--export", f"type=vhost-user-blk,id=export-{name},node-name={name},addr.type=unix,addr.path={self.sockets[name]},"
                          "writable=on,num-queues=2"]
        self.start()

    def start(self):
        for path in self.sockets.values():
            if os.path.exists(path):
                os.unlink(path)
        self.process = subprocess.Popen(self.args)
        wait_for("qemu-storage-daemon", lambda: all(map(os.path.exists, self.sockets.values())))

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGKILL)


@needs_qsd
def test_disks(any_accel, tmp_path):
    """Disks of qemu-storage-daemon, raw and qcow2: written and flushed by the guest, read back by it and from the image."""
    raw, qcow2 = tmp_path / "raw", tmp_path / "qcow2"
    with open(raw, "wb") as f:
        f.truncate(64 << 20)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "64M"], check=True)
    with StorageDaemon(tmp_path, {"raw": (raw, "raw"), "qcow2": (qcow2, "qcow2")}) as daemon:
        result = boot(any_accel, script(
            "cat /sys/block/vda/size", "ls /sys/block/vda/mq | wc -w", "dd if=/dev/urandom of=/tmp/r bs=1M count=24 2>/dev/null",
            "for d in vda vdb", "do dd if=/tmp/r of=/dev/$d bs=1M conv=fsync 2>/dev/null", "done", "echo 3 >/proc/sys/vm/drop_caches",
            "for d in vda vdb", "do head -c 25165824 /dev/$d | cmp - /tmp/r && echo SAME $d", "done", "blkdiscard -o 4194304 -l 4194304 /dev/vda && echo DISCARDED",
            "md5sum </tmp/r"),
            "--disk", f"vhost-user={daemon.sockets['raw']},queues=2", "--disk", f"vhost-user={daemon.sockets['qcow2']}", cpus=2)
        daemon.stop()
    assert result.status == 0 and "SAME vda" in result.out and "SAME vdb" in result.out and "DISCARDED" in result.out, result
    assert re.search(r"^131072\n2\n", result.out, re.M), result
    assert "trapline" not in result.err, result
    subprocess.run(["qemu-img", "check", "-q", qcow2], check=True)
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-O", "raw", qcow2, flat], check=True)
    md5 = re.search(r"^([0-9a-f]{32})  -", result.out, re.M).group(1)
    assert subprocess.run(f"head -c 24M '{flat}' | md5sum", shell=True, check=True, capture_output=True, text=True).stdout.split()[0] == md5


@needs_qsd
def test_disk_comes_back(any_accel, tmp_path):
    """qemu-storage-daemon is killed while the guest writes, and started again: the guest notices nothing but a pause."""
    raw = tmp_path / "raw"
    with open(raw, "wb") as f:
        f.truncate(256 << 20)
    with StorageDaemon(tmp_path, {"raw": (raw, "raw")}) as daemon:
        with Guest(any_accel, script("dd if=/dev/urandom of=/tmp/r bs=1M count=16 2>/dev/null", "echo WRITING",
                                     "for i in $(seq 0 15)", "do dd if=/tmp/r of=/dev/vda bs=1M seek=$((i*16)) conv=fsync 2>/dev/null || echo FAILED", "done",
                                     "echo 3 >/proc/sys/vm/drop_caches",
                                     "for i in $(seq 0 15)", "do dd if=/dev/vda bs=1M skip=$((i*16)) count=16 2>/dev/null | cmp - /tmp/r || echo DIFFERENT", "done", "echo FINISHED"),
                   "--disk", f"vhost-user={daemon.sockets['raw']}", tmp_path=tmp_path) as guest:
            guest.wait_for("WRITING")
            for _ in range(2):
                time.sleep(0.3)
                daemon.stop(signal.SIGKILL)
                daemon.start()
            guest.wait_for("FINISHED")
            assert guest.process.wait(timeout=60 * SLOW) == 0
            assert not guest.says("FAILED") and not guest.says("DIFFERENT") and not guest.says("I/O error")
            assert "is back" in guest.err()
