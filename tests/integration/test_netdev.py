"""Network backends with a guest behind them: passt, a tap in a network namespace, two VMs on one cable."""
import contextlib
import hashlib
import http.server
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request

import pytest

from conftest import TRAPLINE, boot, boot_args, need, timeout_of

BODY = hashlib.sha256(b"trapline").digest() * 32768  # 1 MiB
SUM = hashlib.md5(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """GET gives BODY."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def fetch(port, end_port, timeout, into):
    """Fetch the guest's page by the forwarded port, trying until it is there; then connect to the other one, which the guest waits for."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and not into:
        try:
            into.append(urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=5).read())
        except OSError:
            time.sleep(0.2)
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", end_port), timeout=5).close()


def test_passt(web):
    need("dbt")
    if not shutil.which("passt"):
        pytest.skip("there is no passt")
    if not re.search(r"^default ", subprocess.run(["ip", "route"], text=True, capture_output=True).stdout, re.M):
        pytest.skip("this host has no default route, which passt needs")
    port, end_port, heard = free_port(), free_port(), []
    listener = threading.Thread(target=fetch, args=(port, end_port, timeout_of("dbt") / 2, heard))
    listener.start()
    # passt's DHCP gives the host's own address and router, and a connection to the router is one to the host.
    script = ("ip link set eth0 up;"
              "set -- $(udhcpc -n -q -i eth0 -s /bin/true 2>&1 | sed -n 's/.*lease of \\(.*\\) obtained from \\([^,]*\\),.*/\\1 \\2/p');"
              "ip addr add $1/24 dev eth0; ip route add default via $2 onlink dev eth0;"
              f"wget -q -O- http://$2:{web}/ | md5sum; cat /sys/class/net/eth0/mtu; mkdir /w; echo from the guest >/w/page; httpd -p 80 -h /w; nc -l -p 81")
    r = boot("dbt", f'trapline.exec="{script}"', "--net",
             f"passt,hostfwd=tcp:127.0.0.1:{port}-:80,hostfwd=tcp:127.0.0.1:{end_port}-:81")
    listener.join()
    assert SUM in r.out, r
    assert re.search(r"^65520$", r.out, re.M), r
    assert heard == [b"from the guest\n"], r
    # It ends with the VM.
    for _ in range(50):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("passt still listens")


def test_tap(tmp_path):
    need("dbt")
    if not shutil.which("ip") or subprocess.run(["unshare", "-n", "ip", "tuntap", "add", "tl0", "mode", "tap"], capture_output=True).returncode:
        pytest.skip("no right to make a tap interface in a network namespace of its own")
    (tmp_path / "f").write_bytes(BODY)
    script = ("ip link set eth0 up; ip addr add 198.51.100.2/24 dev eth0; ping -c 2 -W 5 198.51.100.1;"
              "ls -d /sys/class/net/eth0/queues/rx-*; wget -q -O- http://198.51.100.1:8000/f | md5sum;"
              "dd if=/dev/zero bs=64k count=64 2>/dev/null | nc 198.51.100.1 8001")
    args = boot_args("dbt", f'trapline.exec="{script}"', cpus=2) + ["--net", "tap,ifname=tl0,queues=2"]
    # The namespace's side: a web server, and one that counts what the guest sends.
    inside = ("ip link set lo up; ip tuntap add tl0 mode tap multi_queue; ip addr add 198.51.100.1/24 dev tl0; ip link set tl0 up;"
              f"cd {tmp_path}; /usr/bin/python3 -m http.server >/dev/null 2>&1 & web=$!;"
              "/usr/bin/python3 -c 'import socket; s = socket.create_server((\"\", 8001)); c = s.accept()[0]; n = 0\n"
              "while d := c.recv(65536): n += len(d)\nprint(\"sent:\", n, flush=True)' & count=$!;"
              '"$@" </dev/null; status=$?; kill $web; wait $count; exit $status')
    r = subprocess.run(["unshare", "-n", "sh", "-c", inside, "sh", TRAPLINE, *args], text=True, capture_output=True, timeout=timeout_of("dbt"))
    assert r.returncode == 0, r
    assert "2 packets received" in r.stdout, r
    assert r.stdout.count("queues/rx-") == 2, r
    assert SUM in r.stdout, r
    assert "sent: 4194304" in r.stdout, r


def test_cable(tmp_path):
    need("dbt")
    path = str(tmp_path / "wire")
    one = ("ip link set eth0 up; ip addr add 10.9.0.1/24 dev eth0; mkdir /w; dd if=/dev/urandom of=/w/f bs=1M count=4 2>/dev/null; md5sum /w/f;"
           "httpd -p 80 -h /w; nc -l -p 99")
    two = ("ip link set eth0 up; ip addr add 10.9.0.2/24 dev eth0; n=0; until wget -q -O /f http://10.9.0.1/f || [ $n = 60 ]; do n=$((n+1)); sleep 1; done;"
           "md5sum /f; nc 10.9.0.1 99 </dev/null")
    first = subprocess.Popen([TRAPLINE, *boot_args("dbt", f'trapline.exec="{one}"'), "--name", f"one-{os.getpid()}", "--net", f"socket,listen={path}"],
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        second = boot("dbt", f'trapline.exec="{two}"', "--name", f"two-{os.getpid()}", "--net", f"socket,connect={path}")
        out, err = first.communicate(timeout=timeout_of("dbt"))
    finally:
        first.kill()
    sums = re.findall(r"^([0-9a-f]{32})  ", out + second.out, re.M)
    assert len(sums) == 2 and sums[0] == sums[1], (out, err, second)
    assert first.returncode == 0 and second.status == 0, (out, err, second)
    assert not os.path.exists(path)
