"""Virtio's transports and rings under Linux's drivers: PCI with MSI-X and with INTx, MMIO, packed and split."""
import hashlib
import re

import pytest

from conftest import COMPLAINTS, boot, run

MIB = 1 << 20

# Bytes from the entropy device; the driver taken away and put back; the transport unloaded and loaded again (the device is reset each time).
RNG = """cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=4k count=16 2>/dev/null | wc -c;
cd /sys/bus/virtio/drivers/virtio_rng; d=$(ls -d virtio*); echo $d >unbind; usleep 100000; echo $d >bind; dd if=/dev/hwrng bs=4k count=4 2>/dev/null | wc -c;
cd /; modprobe -r virtio_pci; modprobe virtio_pci; usleep 100000; dd if=/dev/hwrng bs=4k count=4 2>/dev/null | wc -c;
grep virtio /proc/interrupts"""

# Fill a disk with what the host can check, read it back past the cache, and tell which rings were agreed on.
DISK = """cut -c35 /sys/block/vda/device/features | sed s/^/packed:/; mkdir /d; cd /d;
dd if=/dev/urandom of=data bs=1M count=16 2>/dev/null; sha256sum <data;
dd if=data of=/dev/vda bs=1M oflag=direct 2>/dev/null; dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum;
for i in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct skip=$((i*700)) count=500 2>/dev/null & done; wait;
grep virtio /proc/interrupts"""


def one_line(script):
    return " ".join(script.split())


def check(result):
    assert result.status == 0, result
    assert "trapline: exec status 0" in result.out, result
    assert not COMPLAINTS.search(result.out), result
    assert "broke the rules" not in result.err, result


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_rng(accel, interrupts):
    result = boot(accel, ("pci=nomsi " if interrupts == "intx" else "") + f'trapline.exec="{one_line(RNG)}"')
    check(result)
    assert "virtio_rng" in result.out, result
    assert re.findall(r"^(\d+)$", result.out, re.M) == ["65536", "16384", "16384"], result
    assert re.search(r"IO-APIC .*virtio" if interrupts == "intx" else r"PCI-MSI .*virtio\d+-input", result.out), result


@pytest.mark.parametrize("ring", ["packed", "split"])
@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_disk(any_accel, tmp_path, transport, ring):
    image = tmp_path / "disk.raw"
    with open(image, "wb") as f:
        f.truncate(16 * MIB)
    result = boot(any_accel, f'trapline.exec="{one_line(DISK)}"', "--disk", f"{image},transport={transport},ring={ring}", cpus=2)
    check(result)
    assert f"packed:{int(ring == 'packed')}" in result.out, result
    sums = re.findall(r"^([0-9a-f]{64})", result.out, re.M)
    assert len(sums) == 2 and sums[0] == sums[1] == hashlib.sha256(image.read_bytes()).hexdigest(), result
    if transport == "mmio":
        assert re.search(r"IO-APIC +24-fasteoi", result.out), result


def test_mmio_slots(any_accel, tmp_path):
    """Eight of them, each with an interrupt of its own; a ninth is refused."""
    args = []
    for i in range(8):
        image = tmp_path / f"disk{i}.raw"
        with open(image, "wb") as f:
            f.truncate((i + 1) * MIB)
        args += ["--disk", f"{image},transport=mmio"]
    script = "cat /sys/block/vd?/size; for i in /dev/vd?; do dd if=$i of=/dev/null bs=64k iflag=direct 2>/dev/null; done; grep virtio /proc/interrupts"
    result = boot(any_accel, f'trapline.exec="{script}"', *args)
    check(result)
    assert re.findall(r"^(\d+)$", result.out, re.M) == [str((i + 1) * 2048) for i in range(8)], result
    for pin in range(24, 32):
        assert re.search(rf"{pin}: +[1-9]\d* +IO-APIC +{pin}-fasteoi", result.out), result
    ninth = tmp_path / "ninth.raw"
    with open(ninth, "wb") as f:
        f.truncate(MIB)
    result = run("run", "--kernel", str(ninth), *args, "--disk", f"{ninth},transport=mmio")
    assert result.status == 2 and "at most 8" in result.err, result


def test_front_keys(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    for key in ("transport=isa", "ring=round"):
        result = run("run", "--kernel", str(image), "--disk", f"{image},{key}")
        assert result.status == 2 and key.split("=")[0] in result.err, result
