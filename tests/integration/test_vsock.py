"""virtio-vsock and virtio-console with a guest: connections both ways, many at once, files by checksum; ports and the terminal's size."""
import hashlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time

import pexpect
import pytest

from conftest import INITRD, ROOT, TRAPLINE, boot, boot_args, need, timeout_of

DATA = hashlib.sha256(b"vsock").digest() * 65536  # 2 MiB


@pytest.fixture(scope="module")
def initrd(tmp_path_factory):
    """The demo guest's initramfs with the program behind it: archives may follow each other."""
    folder = tmp_path_factory.mktemp("initrd")
    os.makedirs(folder / "bin")
    cc = shutil.which("cc")
    if not cc:
        pytest.skip("no C compiler for the guest's program")
    subprocess.run([cc, "-static", "-O2", "-o", folder / "bin" / "vsock", os.path.join(ROOT, "tests/guest/vsock.c")], check=True)
    extra = subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], input=b"bin\nbin/vsock\n", cwd=folder, check=True, capture_output=True).stdout
    path = folder / "initrd.img"
    with open(INITRD, "rb") as f:
        demo = f.read()
    path.write_bytes(demo + b"\0" * (-len(demo) % 512) + extra)
    return str(path)


class Guest:
    """A VM that runs `script`, with the host's ends of vsock at self.path."""

    def __init__(self, initrd, tmp_path, script, *more):
        need("dbt")
        self.path = str(tmp_path / "v")
        args = boot_args("dbt", f'trapline.exec="{script}"')
        args[args.index("--initrd") + 1] = initrd
        self.process = subprocess.Popen([TRAPLINE, *args, "--vsock", self.path, *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def end(self):
        out, err = self.process.communicate(timeout=timeout_of("dbt"))
        assert self.process.returncode == 0, (out, err)
        return out

    def connect(self, port):
        """Connect to the guest's port, trying until it listens."""
        end = time.monotonic() + timeout_of("dbt") / 2
        while time.monotonic() < end:
            s = socket.socket(socket.AF_UNIX)
            s.settimeout(timeout_of("dbt") / 2)
            try:
                s.connect(self.path)
                s.sendall(b"CONNECT %d\n" % port)
                line = b""
                while not line.endswith(b"\n") and (byte := s.recv(1)):
                    line += byte
                if re.fullmatch(rb"OK \d+\n", line):
                    return s
            except OSError:
                pass
            s.close()
            time.sleep(0.2)
        raise TimeoutError(f"the guest's port {port} does not answer")


def read_all(s):
    data = b""
    while chunk := s.recv(65536):
        data += chunk
    return data


def exchange(s, data):
    """Send data and our end; what came back by then."""
    sender = threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR)))
    sender.start()
    back = read_all(s)
    sender.join()
    return back


def test_guest_connects(initrd, tmp_path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "v_1234"))
    server.listen(4)
    server.settimeout(timeout_of("dbt"))
    script = ("dd if=/dev/urandom of=/f bs=1k count=3000 2>/dev/null; vsock connect 2 1234 </f | md5sum; md5sum /f; vsock connect 2 77 </f;"
              "vsock connect 5 1234 </f")
    with Guest(initrd, tmp_path, script) as guest:
        s, _ = server.accept()
        got = read_all(s)
        s.sendall(DATA)
        s.close()
        out = guest.end()
    assert hashlib.md5(DATA).hexdigest() in out, out
    assert hashlib.md5(got).hexdigest() in out and len(got) == 3000 << 10, out
    assert out.count("vsock: connect:") == 2, out  # nobody at port 77, nobody at CID 5
    assert not os.path.exists(tmp_path / "v")


def test_host_connects(initrd, tmp_path):
    with Guest(initrd, tmp_path, "vsock echo 5000 12") as guest:
        s = guest.connect(5000)
        results = [exchange(s, DATA) == DATA]
        # Eleven more at the same time.
        threads = [threading.Thread(target=lambda i=i: results.append(exchange(guest.connect(5000), DATA[:100000 + i]) == DATA[:100000 + i]))
                   for i in range(11)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        out = guest.end()
    assert results == [True] * 12
    assert "vsock: 0 echoes failed" in out, out


def test_console_ports(tmp_path):
    """Two ports by name, each a Unix socket; more than any buffer holds, both ways at once."""
    need("dbt")
    script = ("cd /sys/class/virtio-ports; for p in *; do [ -s $p/name ] && echo port $(cat $p/name) is $p; done;"
              "one=$(echo /dev/vport*p1); two=$(echo /dev/vport*p2); exec 3<>$one; head -c 2097152 <&3 >&3; read -r x <$two; echo got $x; echo bye >$two")
    args = boot_args("dbt", f'trapline.exec="{script}"')
    process = subprocess.Popen([TRAPLINE, *args, "--port", f"org.test.echo=socket:{tmp_path}/echo", "--port", f"second=socket:{tmp_path}/second"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ends = []
        for name in ("echo", "second"):
            path = tmp_path / name
            while not path.exists() and process.poll() is None:
                time.sleep(0.05)
            ends.append(socket.socket(socket.AF_UNIX))
            ends[-1].settimeout(timeout_of("dbt"))
            ends[-1].connect(str(path))
        sender = threading.Thread(target=ends[0].sendall, args=(DATA,))
        sender.start()
        back = b""
        while len(back) < len(DATA) and (chunk := ends[0].recv(65536)):
            back += chunk
        sender.join()
        ends[1].sendall(b"something\n")
        bye = ends[1].recv(100)
        out, err = process.communicate(timeout=timeout_of("dbt"))
    finally:
        process.kill()
    assert process.returncode == 0, (out, err)
    assert back == DATA and bye.replace(b"\r", b"") == b"bye\n", (len(back), bye, out)
    assert "port org.test.echo is vport" in out and "port second is vport" in out and "got something" in out, out


@pytest.mark.parametrize("more", [[], ["--port", "x=none"]], ids=["alone", "with-ports"])
def test_console_size(more):
    """hvc0 on a terminal: its size at the start and after a change."""
    need("dbt")
    script = "sleep 1; stty size </dev/hvc0 >/dev/hvc0; read -r x </dev/hvc0; until stty size </dev/hvc0 | grep -q 120; do sleep 1; done; stty size </dev/hvc0 >/dev/hvc0; echo heard $x >/dev/hvc0"
    child = pexpect.spawn(TRAPLINE, boot_args("dbt", f'trapline.exec="{script}"') + ["--console", "stdio", *more],
                          timeout=timeout_of("dbt"), dimensions=(33, 101))
    try:
        child.expect("33 101")
        child.setwinsize(44, 120)
        time.sleep(1)
        child.send("word\r")
        child.expect("44 120")
        child.expect("heard word")
        child.expect(pexpect.EOF)
        child.wait()
    finally:
        child.close(force=True)
    assert child.exitstatus == 0
