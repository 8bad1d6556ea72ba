"""Networks as a guest uses them: Linux's driver and busybox's programs against servers and clients of this host."""
import hashlib
import http.server
import os
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

from conftest import INITRD, SLOW, boot, boot_args, run, timeout_of, TRAPLINE

DHCP = r"""#!/bin/sh
case $1 in bound)
	ip addr add $ip/$mask dev $interface
	[ -z "$router" ] || ip route add default via $router
	[ -z "$dns" ] || echo "nameserver $dns" >/etc/resolv.conf
	echo "dhcp: $ip/$mask $router $dns $hostname" >/tmp/dhcp ;;
esac
"""
UP = "ip link set lo up; ip link set eth0 up; udhcpc -i eth0 -n -q -f -t 10 -s /dhcp >/dev/null 2>/tmp/dhcp.log || cat /tmp/dhcp.log; "\
     "cat /tmp/dhcp"


def member(name, data, mode, ino):
    """One file of a cpio archive (Linux: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    fields = [ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def initrd_with(path, script, **files):
    """The demo guest's initramfs and behind it an archive with /run-me and more files."""
    files = {"run-me": "#!/bin/sh\n" + script, "dhcp": DHCP, **files}
    with open(INITRD, "rb") as f:
        base = f.read()
    with open(path, "wb") as f:
        f.write(base)
        for i, (name, data) in enumerate(files.items()):
            f.write(member(name, data.encode() if isinstance(data, str) else data, 0o100755, 0x700000 + i))
        f.write(member("TRAILER!!!", b"", 0, 0))
    return path


def net_args(tmp_path, accel, script, *nets, cpus=1, no_reboot=True, **files):
    args = boot_args(accel, 'trapline.exec="/run-me"', cpus=cpus, no_reboot=no_reboot)
    args[args.index(INITRD)] = str(initrd_with(tmp_path / "initrd.img", script, **files))
    for net in nets:
        args += ["--net", net]
    return args


def net_boot(tmp_path, accel, script, *nets, **more):
    return run(*net_args(tmp_path, accel, script, *nets, **more), timeout=timeout_of(accel))


class Server(http.server.ThreadingHTTPServer):
    """Gives /blob, counts visits; on another port keeps whatever is sent."""

    def __init__(self):
        self.blob = os.urandom(6 << 20)
        self.sent = []
        self.visits = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.visits += 1
                data = server.blob if self.path == "/blob" else b"%d" % server.visits
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.raw = socket.create_server(("127.0.0.1", 0))
        self.raw_port = self.raw.getsockname()[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()
        threading.Thread(target=self.keep, daemon=True).start()

    def keep(self):
        while True:
            try:
                s, _ = self.raw.accept()
            except OSError:
                return
            with s:
                data = b""
                while part := s.recv(1 << 20):
                    data += part
                self.sent.append(data)


@pytest.fixture
def server():
    s = Server()
    yield s
    s.shutdown()
    s.server_close()
    s.raw.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("cpus, net", [
    (1, "user"),
    (4, "user,queues=2"),
    (2, "user,ring=split,mtu=1500,net=192.168.76.0/24"),
    (2, "user,ring=split,queues=4"),
], ids=["1cpu", "4cpus-2queues", "split-1500", "split-4queues"])
def test_down_and_up(accel, tmp_path, server, cpus, net):
    """DHCP, the gateway's ping, some megabytes in both directions, several connections at once."""
    port = server.server_port
    host = "192.168.76.2" if "192" in net else "10.0.2.2"
    script = f"""{UP}
ping -c 2 {host} | grep received
wget -q -O /tmp/blob http://{host}:{port}/blob && sha256sum </tmp/blob
nc {host} {server.raw_port} </tmp/blob
for i in 1 2 3 4; do (wget -q -O - http://{host}:{port}/blob | sha256sum | sed 's/^/many /') & done; wait
"""
    result = net_boot(tmp_path, accel, script, net, cpus=cpus)
    digest = hashlib.sha256(server.blob).hexdigest()
    assert result.status == 0, result
    assert f"dhcp: {host[:-1]}15/24 {host} {host[:-1]}3" in result.out, result
    assert "2 packets received" in result.out, result
    assert re.search(rf"^{digest}", result.out, re.M), result
    assert result.out.count(f"many {digest}") == 4, result
    assert [hashlib.sha256(x).hexdigest() for x in server.sent] == [digest], result
    assert "trapline: " not in result.err, result


def fetch(url, seconds, data=None):
    """Until the guest is there to answer: the port is open from the start."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=20 * SLOW) as answer:
                return answer.read()
        except (urllib.error.URLError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_forwarded_ports(accel, tmp_path, server):
    """A server in the guest behind two forwarded ports, with restrict: in, but not out."""
    web, raw = free_port(), free_port()
    script = f"""{UP}
mkdir -p /www; dd if=/dev/urandom of=/www/file bs=64k count=40 2>/dev/null; sha256sum </www/file
httpd -p 80 -h /www
wget -q -T 5 -O - http://10.0.2.2:{server.server_port}/out && echo got out
nc -l -p 99 </www/file >/tmp/in; sha256sum </tmp/in | sed 's/^/in /'
"""
    args = net_args(tmp_path, accel, script,
                    f"user,restrict,hostfwd=tcp:127.0.0.1:{web}-:80,hostfwd=tcp:127.0.0.1:{raw}-10.0.2.15:99,hostname=inside", cpus=2)
    vm = subprocess.Popen([TRAPLINE, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        served = fetch(f"http://127.0.0.1:{web}/file", 60 * SLOW)
        sent = os.urandom(3 << 20)
        with socket.create_connection(("127.0.0.1", raw), timeout=60 * SLOW) as s:
            sender = threading.Thread(target=lambda: (s.sendall(sent), s.shutdown(socket.SHUT_WR)))
            sender.start()
            back = b""
            while part := s.recv(1 << 16):
                back += part
            sender.join()
        out = vm.communicate(timeout=timeout_of(accel))[0].decode(errors="replace").replace("\r", "")
    finally:
        vm.kill()
        vm.wait()
    assert vm.returncode == 0, out
    assert re.search(rf"^{hashlib.sha256(served).hexdigest()} ", out, re.M), out
    assert back == served, out
    assert f"in {hashlib.sha256(sent).hexdigest()}" in out, out
    assert "dhcp: 10.0.2.15/24   inside" in out and "got out" not in out, out  # no router, no name server
    assert server.visits == 0


def test_reboot(accel, tmp_path, server):
    """The network outlives a reboot of the machine, and the card's address is the same again and again, and another VM's is not."""
    script = f"""{UP}
cat /sys/class/net/eth0/address | sed 's/^/mac /'
n=$(wget -q -O - http://10.0.2.2:{server.server_port}/n); echo visit $n
[ "$n" -ge 3 ] || reboot -f
"""
    result = net_boot(tmp_path, accel, script, "user", no_reboot=False)
    assert result.status == 0, result
    macs = set(re.findall(r"^mac (\S+)", result.out, re.M))
    assert server.visits == 3 and len(macs) == 1, result
    other = run(*net_args(tmp_path, accel, "cat /sys/class/net/*/address | sed 's/^/mac /'", "user", "user"), "--name", "other",
                timeout=timeout_of(accel))
    others = set(re.findall(r"^mac (\S+)", other.out, re.M)) - {"00:00:00:00:00:00"}
    assert len(others) == 2 and not macs & others, other


def resolvable():
    try:
        with open("/etc/resolv.conf", encoding="utf-8") as f:
            servers = re.findall(r"^nameserver\s+(\d+\.\d+\.\d+\.\d+)", f.read(), re.M)
        return bool(servers) and bool(socket.gethostbyname("deb.debian.org"))
    except OSError:
        return False


def test_names(accel, tmp_path):
    """The host's name server answers at 10.0.2.3."""
    if not resolvable():
        pytest.skip("this host has no IPv4 name server that knows deb.debian.org")
    result = net_boot(tmp_path, accel, f"{UP}\nnslookup deb.debian.org 10.0.2.3 && echo found", "user")
    assert "found" in result.out, result


def test_no_cable(accel, tmp_path):
    result = net_boot(tmp_path, accel, "ip link set eth0 up; sleep 1; cat /sys/class/net/eth0/carrier | sed 's/^/carrier /'", "none")
    assert result.status == 0 and "carrier 0" in result.out, result


def test_port_is_taken(any_accel):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        result = boot(any_accel, "", "--net", f"user,hostfwd=tcp:127.0.0.1:{port}-:22")
    assert result.status == 2 and result.err.count("\n") == 1, result
    assert f"port {port} of this host is taken" in result.err, result
