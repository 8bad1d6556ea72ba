"""A whole Debian system from a disk image: systemd, ssh, and data that comes back as it was written on every kind of disk."""
import os
import subprocess

import pytest

import demo
from conftest import SLOW
from demo import System


@pytest.fixture(scope="module")
def disk():
    why = demo.build()
    if why:
        pytest.skip(why)


@pytest.fixture
def servers():
    """Processes that serve disks; killed at the end."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def wait_for(path):
    for _ in range(int(200 * SLOW)):
        if os.path.exists(path):
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail(f"{path} did not appear")


def raw(path, mib):
    with open(path, "wb") as f:
        f.truncate(mib << 20)
    return path


def test_system_runs(disk, tmp_path, accel):
    """Multi-user with nothing failed, shut down from the inside."""
    with System(tmp_path, accel, cpus=2) as s:
        state = s.ssh_raw("systemctl is-system-running --wait").stdout.strip()
        assert state == "running", s.ssh("systemctl --failed --no-legend; systemctl list-jobs")
        assert s.ssh("findmnt -no SOURCE /").strip() == "/dev/vda"
        assert s.complaints() == []
    assert s.status == 0, s.said()


def test_fio_verifies(disk, servers, tmp_path, accel):
    """fio writes and verifies on raw, qcow2 with a backing file, NBD and vhost-user disks, all at once, with 4 vCPUs."""
    size = 48
    plain = raw(tmp_path / "plain.raw", size)
    base = raw(tmp_path / "base.raw", size)
    with open(base, "r+b") as f:
        f.write(os.urandom(8 << 20))
    overlay = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay], check=True)
    nbd_socket, vhost_socket = tmp_path / "nbd.sock", tmp_path / "vhost.sock"
    servers.append(subprocess.Popen(["qemu-nbd", "-k", nbd_socket, "-f", "raw", "-t", raw(tmp_path / "nbd.raw", size)]))
    servers.append(subprocess.Popen([
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={raw(tmp_path / 'vhost.raw', size)}",
        "--export", f"vhost-user-blk,id=x,node-name=file,addr.type=unix,addr.path={vhost_socket},writable=on"]))
    wait_for(nbd_socket)
    wait_for(vhost_socket)
    with System(tmp_path, accel, "--disk", f"{plain},format=raw,cache=none", "--disk", str(overlay), "--disk", f"nbd+unix:///?socket={nbd_socket}",
                "--disk", f"vhost-user={vhost_socket}", cpus=4) as s:
        jobs = " ".join(f"--name={disk} --filename=/dev/{disk}" for disk in ("vdb", "vdc", "vdd", "vde"))
        s.ssh(f"fio --rw=randwrite --bsrange=4k-64k --size={size}M --io_size=16M --iodepth=8 --ioengine=libaio --direct=1 --verify=crc32c "
              f"--verify_fatal=1 --fsync=64 --group_reporting {jobs}", timeout=240)
        assert s.complaints() == []
    assert s.status == 0, s.said()
    done = subprocess.run(["qemu-img", "check", overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
