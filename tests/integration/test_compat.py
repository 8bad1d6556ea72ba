"""32-bit programs on Debian's 64-bit kernel: a shell and its tools, and what the kernel does for 32-bit processes."""
import hashlib
import math
import os
import shutil
import subprocess

import pytest

from conftest import GUEST, INITRD, ROOT, boot, complaints, cpio, dmesg_of

CFLAGS = ("-m32 -O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -no-pie -nostdlib -static -mgeneral-regs-only -fno-stack-protector"
          " -fcf-protection=none -fno-asynchronous-unwind-tables -Wl,--build-id=none -Wl,-z,noexecstack").split()

SCRIPT = """
busybox-i386 mkdir /bin32
busybox-i386 --install -s /bin32
PATH=/bin32
echo shell: $(readlink /proc/self/exe) on $(uname -m)
echo sort: $(seq 1 20000 | sort -r | sort -n | md5sum)
echo zip: $(gzip -c /bin/busybox-i386 | gunzip | sha256sum)
echo float: $(awk 'BEGIN { for (i = 1; i < 20000; i++) s += 1 / i; printf "%.9f", s }')
echo calls: $(i=0; while [ $i -lt 200 ]; do echo $i | tr 0-9 a-j; i=$((i+1)); done | md5sum)
for i in $(seq 40); do (true; echo . >>/tmp/dots) & done; wait
echo forks: $(wc -l </tmp/dots)
echo trap: $(sh -c 'trap "echo caught; exit 3" USR1; kill -USR1 $$; sleep 5'; echo $?)
sleep 100 & kill $!; wait $!; echo killed: $?
sh -c 'kill -SEGV $$'; echo segv: $?
timeout 1 sh -c 'while :; do :; done'; echo timeout: $?
/bin/user32; echo user32: $?
"""


@pytest.fixture(scope="module")
def busybox():
    fetch = subprocess.run(["scripts/fetch-guest.sh", "busybox-i386"], cwd=ROOT, stderr=subprocess.PIPE)
    if fetch.returncode:
        pytest.skip("no i386 busybox: " + fetch.stderr.decode(errors="replace").strip().splitlines()[-1])
    with open(os.path.join(GUEST, "busybox-i386"), "rb") as f:
        return f.read()


@pytest.fixture(scope="module")
def user32(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("user32") / "user32"
    subprocess.run(["cc", *CFLAGS, "-o", path, "tests/integration/user32.c"], cwd=ROOT, check=True)
    return path.read_bytes()


@pytest.fixture
def initrd(tmp_path, busybox, user32):
    path = tmp_path / "initrd.img"
    with open(INITRD, "rb") as f:
        base = f.read()
    base += b"\0" * (-len(base) % 512)
    path.write_bytes(base + cpio(tmp_path, {"bin/busybox-i386": busybox, "bin/user32": user32, "bin/test32": SCRIPT.encode()}))
    return str(path)


def guest(accel, initrd, command, *more, **machine):
    return boot(accel, f'trapline.dmesg trapline.exec="{command}"', *more, initrd=initrd, **machine)


@pytest.mark.parametrize("cpus", [1, 2])
def test_shell_and_processes(accel, initrd, busybox, cpus):
    result = guest(accel, initrd, "busybox-i386 sh /bin/test32", cpus=cpus)
    assert result.status == 0 and "exec status 0" in result.out, result
    said = dict(line.split(": ", 1) for line in result.out.splitlines() if ": " in line and not line.startswith("["))
    numbers = "".join(f"{i}\n" for i in range(1, 20001)).encode()
    letters = "".join(str(i).translate(str.maketrans("0123456789", "abcdefghij")) + "\n" for i in range(200)).encode()
    assert said["shell"] == "/bin/busybox-i386 on x86_64", result
    assert said["sort"].split()[0] == hashlib.md5(numbers).hexdigest(), result
    assert said["zip"].split()[0] == hashlib.sha256(busybox).hexdigest(), result
    assert said["calls"].split()[0] == hashlib.md5(letters).hexdigest(), result
    assert abs(float(said["float"]) - math.fsum(1 / i for i in range(1, 20000))) < 1e-8, result
    assert said["forks"] == "40" and said["trap"] == "caught 3", result
    assert said["killed"] == "143" and said["segv"] == "139" and said["timeout"] == "143", result
    assert "FAIL" not in result.out and said["user32"] == "0" and result.out.count("\nok ") == 15, result
    assert complaints(dmesg_of(result)) == [], result
