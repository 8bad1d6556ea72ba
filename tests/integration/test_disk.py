"""Disks: a guest's Linux writes what the host reads and the other way round, on raw images in every mode; and what is refused."""
import hashlib
import os
import shutil
import subprocess
import time

import pytest

from conftest import boot, boot_args, complaints, dmesg_of, kernel, need, run

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path_factory):
    """Not in /tmp, which may be a tmpfs: that has no O_DIRECT."""
    path = f"/var/tmp/trapline-disk-{os.getpid()}-{time.monotonic_ns()}"
    os.mkdir(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def dbt():
    need("dbt")
    return "dbt"


def image(folder, name="disk.raw", size=32 * MIB, random=0):
    path = os.path.join(folder, name)
    with open(path, "wb") as f:
        f.write(os.urandom(random))
        f.truncate(size)
    return path


def guest(accel, folder, script, *disks, **machine):
    """Run a shell script in a guest that has these disks; the script itself comes on one more."""
    path = os.path.join(folder, "script")
    with open(path, "w") as f:
        f.write(script)
    args = [word for disk in disks for word in ("--disk", disk)]
    vd = "/dev/vd" + "abcdefgh"[len(disks)]
    return boot(accel, f"trapline.dmesg trapline.exec=\"tr -d '\\0' <{vd} >/tmp/s; sh -e /tmp/s\"", *args,
                "--disk", f"{path},ro,format=raw,serial=script", **machine)


def good(result):
    assert result.status == 0, result
    assert "trapline: exec status 0" in result.out, result
    # (A timeout or an error of the disk would be in the kernel's log.)
    log = dmesg_of(result)
    assert not complaints(log), result
    assert "I/O error" not in log, result


COPY = """
# The random half to the other one: in parts, at the same time, each in another way.
dd if=/dev/vda of=/dev/vda bs=4k  count=512 skip=0    seek=4096 conv=notrunc oflag=direct iflag=direct 2>/dev/null &
dd if=/dev/vda of=/dev/vda bs=1M  count=4   skip=2    seek=18   conv=notrunc,fsync 2>/dev/null &
dd if=/dev/vda of=/dev/vda bs=64k count=64  skip=96   seek=352  conv=notrunc oflag=direct 2>/dev/null &
dd if=/dev/vda of=/dev/vda bs=512 count=2048 skip=20480 seek=53248 conv=notrunc iflag=direct oflag=direct 2>/dev/null &
dd if=/dev/vda of=/dev/vda bs=128k count=40 skip=88   seek=216  conv=notrunc 2>/dev/null &
wait
sync
echo 3 >/proc/sys/vm/drop_caches
echo "sum $(dd if=/dev/vda bs=1M count=16 2>/dev/null | sha256sum)"
echo "sum $(dd if=/dev/vda bs=1M count=16 skip=16 2>/dev/null | sha256sum)"
echo "queues $(ls /sys/block/vda/mq | wc -l)"
"""


@pytest.mark.parametrize("cpus, keys", [
    (1, "cache=none,aio=io_uring"), (4, "cache=none,aio=threads"),
    (4, "cache=writeback,aio=io_uring"), (1, "cache=writeback,aio=threads"), (1, "cache=directsync"),
])
def test_copy(dbt, folder, cpus, keys):
    path = image(folder, random=16 * MIB)
    with open(path, "rb") as f:
        half = f.read(16 * MIB)
    result = guest(dbt, folder, COPY, f"{path},format=raw,{keys}", cpus=cpus)
    if result.status == 2 and ("O_DIRECT" in result.err or "io_uring" in result.err):
        pytest.skip(result.err.strip())
    good(result)
    digest = hashlib.sha256(half).hexdigest()
    assert result.out.count(f"sum {digest}") == 2, result
    assert f"queues {cpus}\n" in result.out, result
    with open(path, "rb") as f:
        assert f.read() == half + half


FILES = """
mke2fs -F /dev/vda >/dev/null 2>&1
mkdir /mnt
mount -t ext2 /dev/vda /mnt
for i in $(seq 40); do cp /bin/busybox /mnt/b$i; done
mkdir -p /mnt/a/b/c; echo deep >/mnt/a/b/c/d
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext2 -o discard /dev/vda /mnt
for i in $(seq 40); do cmp /bin/busybox /mnt/b$i; done
[ "$(cat /mnt/a/b/c/d)" = deep ]
umount /mnt
"""


def test_file_system(dbt, folder):
    path = image(folder, size=256 * MIB)
    result = guest(dbt, folder, "[ -n \"$(grep ext /proc/filesystems)\" ] || modprobe ext4\n" + FILES, f"{path},format=raw", cpus=2,
                   flavour="amd64" if os.path.exists(kernel("amd64")) else "cloud")
    good(result)
    if not shutil.which("e2fsck", path="/usr/sbin:/sbin:/usr/bin"):
        pytest.skip("no e2fsck on this host: the guest's own checks passed")
    check = subprocess.run(["/usr/sbin/e2fsck", "-fn", path], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def allocated(path):
    return os.stat(path).st_blocks * 512


def test_discard(dbt, folder):
    path = image(folder, random=32 * MIB)
    before = allocated(path)
    result = guest(dbt, folder, "blkdiscard -o 0 -l 16777216 /dev/vda\ndd if=/dev/vda bs=1M count=16 2>/dev/null | tr -d '\\0' | wc -c",
                   f"{path},format=raw")
    good(result)
    assert allocated(path) <= before - 15 * MIB


def test_identity(dbt, folder):
    path = image(folder)
    result = guest(dbt, folder, "cd /sys/block/vda; echo serial $(cat serial)\necho block $(cat queue/logical_block_size queue/physical_block_size)\n"
                   "echo size $(cat size)\necho second $(cat /sys/block/vdb/serial)\necho cache $(cat queue/write_cache) / $(cat /sys/block/vdb/queue/write_cache)\n",
                   f"{path},format=raw,serial=BACKUP-7,block-size=4096", f"{image(folder, 'two')},format=raw,cache=writethrough")
    good(result)
    for line in ("serial BACKUP-7", "block 4096 4096", "size 65536", "second disk1", "cache write back / write through"):
        assert f"\n{line}\n" in "\n" + result.out, result


def test_read_only(dbt, folder):
    path = image(folder, random=MIB, size=MIB)
    with open(path, "rb") as f:
        before = f.read()
    result = guest(dbt, folder, "cat /sys/block/vda/ro\nif dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null; then echo WRITTEN; fi\n",
                   f"{path},format=raw,ro")
    good(result)
    assert result.out.startswith("1\n") and "WRITTEN" not in result.out, result
    with open(path, "rb") as f:
        assert f.read() == before


def test_reboot(dbt, folder):
    """A disk outlives its guest: what one start writes the next one reads."""
    path = image(folder)
    result = guest(dbt, folder, "if [ \"$(dd if=/dev/vda bs=1 count=5 2>/dev/null)\" = first ]; then echo SECOND; exit 0; fi\n"
                   "echo first | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null\n"
                   "dd if=/dev/urandom of=/dev/vda bs=1M seek=1 2>/dev/null & sleep 0.3; reboot -f\n", f"{path},format=raw", no_reboot=False)
    good(result)
    assert "SECOND" in result.out, result


def refused(result, *says):
    assert result.status == 2, result
    assert len(result.err.splitlines()) == 1, result
    for words in says:
        assert words in result.err, result


def start(accel, *args, **more):
    return run(*boot_args(accel, "trapline.report"), *args, **more)


def test_refusals(any_accel, folder):
    path = image(folder)
    image(folder, "empty", size=0)
    for disk, says in [("missing", "no such file"), (".", "directory"), ("empty", "empty")]:
        refused(start(any_accel, "--disk", os.path.join(folder, disk)), "--disk", says)
    refused(start(any_accel, "--disk", f"{path},serail=7"), "serail", "serial")
    refused(start(any_accel, "--disk", f"{path},format=vdi"), "format=vdi")
    refused(start(any_accel, "--disk", path, "--disk", path), "lock=off")


def test_permission(any_accel, folder):
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may read everything, and there is no setpriv to give that up")
    path = image(folder)
    os.chmod(path, 0o400)
    if os.geteuid():
        refused(start(any_accel, "--disk", path), "take ro")
        return
    os.chmod(path, 0)
    from conftest import TRAPLINE
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*drop, "test", "-x", TRAPLINE], check=False).returncode:
        pytest.skip("this checkout is not readable for other users")
    process = subprocess.run([*drop, TRAPLINE, *boot_args(any_accel, "trapline.report"), "--disk", path], capture_output=True, text=True, timeout=60,
                             env=dict(os.environ, XDG_RUNTIME_DIR=folder), stdin=subprocess.DEVNULL)
    assert process.returncode == 2 and "check its permissions" in process.stderr, process


def test_locked(any_accel, folder):
    if not shutil.which("qemu-io"):
        pytest.skip("no qemu-io on this host (Debian: qemu-utils)")
    path = image(folder)
    holder = subprocess.Popen(["qemu-io", "-f", "raw", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        holder.stdin.write("length\n")
        holder.stdin.flush()
        assert "32 MiB" in holder.stdout.readline()
        refused(start(any_accel, "--disk", path), "another process")
        refused(start(any_accel, "--disk", f"{path},ro"), "another process")
    finally:
        holder.stdin.close()
        holder.wait()
