"""The gdb stub with Debian's gdb: a bare-metal guest with its debug information, Debian's kernel with symbols from its own kallsyms, and a peer
of our own for what gdb never sends.

By hand, with all of the kernel's debug information (280 MB to download): apt-get download linux-image-VERSION-cloud-amd64-dbg, unpack it, and give
its usr/lib/debug/boot/vmlinux-* to gdb; then every backtrace is whole.
"""
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pexpect
import pytest

from conftest import ACCELS, CONSOLE, INITRD, ROOT, SLOW, TRAPLINE, available, boot, kernel, need, run, timeout_of

GUESTS = os.path.join(os.path.dirname(TRAPLINE), "tests", "guest")
PATIENCE = 30 * SLOW

pytestmark = pytest.mark.skipif(not shutil.which("gdb"), reason="gdb is not installed (scripts/deps.sh test does it)")


def guest(name):
    path = os.path.join(GUESTS, f"{name}.elf")
    if not os.path.exists(path):
        pytest.skip(f"{path} is not there: it is built by ninja")
    return path


@pytest.fixture(params=["interp", "dbt", "kvm"])
def any_engine(request):
    """For short guests: all accelerators, each."""
    need(request.param)
    return request.param


class Vm:
    def __init__(self, folder, *args, gdb="{socket},wait"):
        self.socket = os.path.join(folder, "gdb")
        self.out = open(os.path.join(folder, "out"), "w+b")
        spec = "unix:" + gdb.format(socket=self.socket)
        self.process = subprocess.Popen([TRAPLINE, "run", *args, "--gdb", spec], stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.out)
        end = time.monotonic() + PATIENCE
        while not os.path.exists(self.socket):
            assert self.process.poll() is None and time.monotonic() < end, self.text()
            time.sleep(0.01)

    def text(self):
        with open(self.out.name, errors="replace") as f:
            return f.read()

    def wait_for(self, words, patience=PATIENCE):
        end = time.monotonic() + patience
        while words not in self.text():
            assert self.process.poll() is None and time.monotonic() < end, f'no "{words}":\n{self.text()}'
            time.sleep(0.02)

    def status(self):
        return self.process.wait(timeout=PATIENCE)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.out.close()


@pytest.fixture
def start(tmp_path):
    """start(args...) -> Vm. All are gone after the test."""
    vms = []

    def start_one(*args, **more):
        folder = tmp_path / str(len(vms))
        folder.mkdir()
        vms.append(Vm(str(folder), *args, **more))
        return vms[-1]

    yield start_one
    for vm in vms:
        vm.kill()


def bare(accel, name, cpus=1):
    lapics = ["--irqchip", "user"] if accel == "kvm" else []  # so that it is known who waits for a start-up IPI
    return [*lapics, "--accel", accel, "--cpus", str(cpus), "--memory", "64M", "--no-reboot", "--serial", "stdio", "--kernel", guest(name),
            "--append", f"cpus={cpus}" + (" defects=split-lock" if accel == "kvm" else "")]  # tests/guest/kvm_defects.c looks for that one


def check_end(vm):
    """The guest came to its end, and was content."""
    assert vm.status() == 1 and ", 0 failed" in vm.text(), vm.text()


class Gdb:
    """Debian's gdb, line by line."""
    PROMPT = "(gdb) "

    def __init__(self, vm, symbols=None):
        args = ["-nx", "-q", "-iex", "set debuginfod enabled off", "-iex", "set pagination off", "-iex", "set confirm off", "-iex", "set width 0",
                "-iex", "set style enabled off", "-iex", f"set remotetimeout {int(20 * SLOW)}"]
        self.p = pexpect.spawn("gdb", args + ([symbols] if symbols else []), encoding="utf-8", timeout=PATIENCE, echo=False,
                               env=dict(os.environ, TERM="dumb", LC_ALL="C"))
        self.p.expect_exact(self.PROMPT)
        self.said = self.do(f"target remote {vm.socket}")

    def do(self, line, timeout=None):
        self.p.sendline(line)
        return self.answer(timeout)

    def answer(self, timeout=None):
        self.p.expect_exact(self.PROMPT, timeout=timeout or PATIENCE)
        return self.p.before.replace("\r", "")

    def all(self, *lines):
        return "".join(self.do(line) for line in lines)

    def interrupt_soon(self, line):
        """A line that does not come back by itself."""
        self.p.sendline(line)
        time.sleep(0.3 * SLOW)
        self.p.kill(signal.SIGINT)
        return self.answer()

    def number(self, expression):
        said = self.do(f"output/x {expression}")
        return int(re.search(r"0x[0-9a-f]+", said).group(0), 16)

    def quit(self):
        self.p.sendline("quit")
        self.p.expect(pexpect.EOF)
        self.p.close()


class Raw:
    """A peer that says what it likes."""

    def __init__(self, vm):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(PATIENCE)
        self.s.connect(vm.socket)
        self.buffer = b""

    def send(self, payload):
        if isinstance(payload, str):
            payload = payload.encode()
        payload = re.sub(rb"[$#}*]", lambda m: bytes([0x7d, m.group(0)[0] ^ 0x20]), payload)
        self.s.sendall(b"$" + payload + b"#%02x" % (sum(payload) & 255))

    def receive(self):
        while not (m := re.search(rb"\$([^#]*)#..", self.buffer, re.S)):
            more = self.s.recv(65536)
            if not more:
                return None
            self.buffer += more
        self.buffer = self.buffer[m.end():]
        try:
            self.s.sendall(b"+")
        except OSError:
            pass  # it has said goodbye
        return m.group(1).decode(errors="replace")

    def ask(self, payload):
        self.send(payload)
        return self.receive()


# --- bare-metal guests ---


def test_bare_guest(start, any_engine):
    """Breakpoints of both sorts, steps, a backtrace, memory and registers on both sides, threads, and the guest's own end."""
    vm = start(*bare(any_engine, "smp", cpus=2))
    gdb = Gdb(vm, guest("smp"))
    said = gdb.all("break guest_main", "continue")
    assert re.search(r"Thread 1 hit Breakpoint 1.*guest_main \(\) at .*smp\.c:", said), said
    said = gdb.do("backtrace")
    assert re.search(r"#0 +guest_main.*\n#1 .* in guest_start .*guest\.c.*\n#2 .* in start \(\)", said), said
    said = gdb.do("info threads")
    assert "vCPU 0 (running)" in said and "vCPU 1 (waits for its start-up IPI)" in said, said
    here = gdb.number("$pc")
    gdb.do("stepi")
    assert here < gdb.number("$pc") <= here + 15
    # What is written is there, also where a breakpoint is inserted; registers keep what they are given.
    gdb.all("set var guest_cpus = 2", "set $r15 = 0x1122334455667788", "set $xmm7.v2_int64[1] = 0x55", "set $eflags = $eflags ^ 1")
    assert gdb.number("$r15") == 0x1122334455667788 and gdb.number("$xmm7.v2_int64[1]") == 0x55
    assert gdb.number("guest_cpus") == 2
    assert "Cannot access memory" in gdb.do("x/x 0xffff800000000000")
    assert gdb.number("$cr0") & 0x80000001 == 0x80000001 and "LMA" in gdb.do("info registers efer")
    # Both come through a hardware breakpoint, each by itself.
    gdb.all("delete", "set $eflags = $eflags ^ 1", "hbreak hello")
    threads = set()
    for _ in range(2):
        said = gdb.do("continue")
        threads.add(re.search(r"Thread (\d) hit Breakpoint 2, hello", said).group(1))
    assert threads == {"1", "2"}
    # The one that was last moves, the other stays (it may halt, and would not wake up without the first).
    gdb.all("set scheduler-locking on", "delete")
    last = re.search(r"Thread (\d) hit", said).group(1)
    look = f"thread apply {3 - int(last)} info registers rip"
    other = gdb.do(look)
    for _ in range(5):
        here = gdb.number("$pc")
        gdb.do("stepi")
        assert gdb.number("$pc") != here
    assert gdb.do(look) == other
    said = gdb.all("set scheduler-locking off", "continue")
    assert "exited with code 01" in said, said + vm.text()  # what the guest's debug exit makes the status
    check_end(vm)
    gdb.quit()


def test_watchpoint(start, any_engine):
    vm = start(*bare(any_engine, "string"))
    gdb = Gdb(vm, guest("string"))
    gdb.all("break guest_main", "continue", "delete")
    gdb.do("watch checks")  # guest.c counts in it
    said = gdb.do("continue")
    if "Could not insert hardware" in said:
        assert any_engine == "kvm", said
        pytest.skip("this host's KVM does not honour watchpoints (accel/kvm/debug.c tries it)")
    assert re.search(r"Hardware watchpoint 2: checks\s+Old value = 0\s+New value = 1\s+\w+ \(.*guest\.c:", said), said
    said = gdb.do("continue")
    assert "New value = 2" in said, said
    gdb.all("delete", "detach")
    check_end(vm)
    gdb.quit()


def rips(start, accel, name, count):
    """Where the guest goes: the first steps (32-bit code, the switch of modes), then `count` from guest_main on."""
    vm = start(*bare(accel, name))
    symbols = subprocess.run(["nm", guest(name)], capture_output=True, text=True, check=True).stdout
    main = int(re.search(r"^([0-9a-f]+) T guest_main$", symbols, re.M).group(1), 16)
    raw = Raw(vm)
    assert raw.ask("?").startswith("T05")
    raw.ask("QStartNoAckMode")
    trace = []

    def steps(n):
        for _ in range(n):
            said = raw.ask("vCont;s:1")
            trace.append(re.search(r"10:([0-9a-f]{16});", said).group(1))

    steps(30)
    assert raw.ask(f"Z0,{main:x},1") == "OK" and raw.ask("vCont;c").startswith("T05") and raw.ask(f"z0,{main:x},1") == "OK"
    steps(count)
    vm.kill()
    return trace


def test_steps_are_the_interpreters(start, accel):
    """A thousand steps are the same on all accelerators."""
    trace = rips(start, accel, "string", 1000)
    assert len(set(trace)) > 50  # it does not just run in a circle
    assert trace == rips(start, "interp", "string", 1000)


def test_steps_of_kvm_are_the_interpreters(start):
    need("kvm")
    assert rips(start, "kvm", "string", 1000) == rips(start, "interp", "string", 1000)


def test_wait_and_detach(start, any_engine):
    """With wait nothing runs; a second peer is refused; detaching lets it go, without the breakpoints."""
    vm = start(*bare(any_engine, "smp", cpus=2))
    time.sleep(0.3)
    assert "smp" not in vm.text()
    gdb = Gdb(vm, guest("smp"))
    second = Raw(vm)
    with pytest.raises((ConnectionError, BrokenPipeError)):
        if second.ask("?") is None:
            raise ConnectionError
    assert "refused: there is one already" in vm.text()
    gdb.all("break guest_main", "continue", "break finish", "break check_eq_at")
    said = gdb.do("detach")
    assert "detached" in said, said
    check_end(vm)
    gdb.quit()


def test_kill(start, accel):
    vm = start(*bare(accel, "smp", cpus=2))
    gdb = Gdb(vm, guest("smp"))
    gdb.do("kill")
    assert vm.status() == 0
    gdb.quit()


def test_monitor(start, accel):
    vm = start(*bare(accel, "smp", cpus=2))
    gdb = Gdb(vm, guest("smp"))
    assert "monitor translate" in gdb.do("monitor help")
    assert "no such command" in gdb.do("monitor frob")
    gdb.all("break guest_main", "continue")
    assert "cr3" in gdb.do("monitor registers") and "64-bit code" in gdb.do("monitor registers")
    text = gdb.number("&guest_main")
    assert f"guest-physical 0x{text:x}" in gdb.do(f"monitor translate {text}")
    assert "physical" in gdb.do("monitor phys on")
    assert "guest_main" in gdb.do(f"x/i {text}")
    gdb.all("monitor phys off", "monitor quit")
    assert vm.status() == 0
    gdb.quit()


HOSTILE = [b"", b"$", b"$#00", b"\x03\x03\x03", b"$" + b"a" * 100000 + b"#00", b"$m0,ffffffffffffffff#0f", b"$g" * 5000, b"}" * 9000, b"$}#}#00" * 99,
           b"+-+-+-$?#3f$?#3f$?#3f", bytes(range(256)) * 20]
HOSTILE_PACKETS = ["m", "m,", "mffffffffffffffff,10", "m0,ffffffffffffffff", "M0,4:00", "M0,ffffffffffffffff:00", "X0,8:abc", "Z0", "Z9,0,0", "Z0,0",
                   "Z2,fffffffffffffff8,ffffffffffffffff", "Z2,ffffffffffffffff,8", "z4,1,0", "vCont;s:99", "vCont;c:", "vCont;r0", "vCont;;;", "vConta",
                   "Hg-2", "Hg11111111111111111111", "T0", "p", "pffff", "P10", "P10=12", "P10=ffffffffffffff00", "G", "G00", "g0", "qRcmd,6", "qRcmd,zz",
                   "qXfer:features:read:target.xml:", "qXfer:features:read:target.xml:ffffffffffffffff,ffffffffffffffff", "qXfer:features:read:../etc/passwd:0,10",
                   "qThreadExtraInfo,0g", "qSupported", "vFile:open:2f,0,0", "!", "R00", "bc", "\x00", "C", "Sxx", "QStartNoAckModes", "D;zz" * 100]


def test_hostile_peers(start, accel):
    """Nonsense is answered or ends the connection; the VM goes on and gdb can debug it afterwards."""
    vm = start(*bare(accel, "smp", cpus=2))
    for noise in HOSTILE:
        raw = Raw(vm)
        try:
            raw.s.sendall(noise)
            time.sleep(0.02)
        except OSError:
            pass
        raw.s.close()
        if vm.process.poll() == 1 and ", 0 failed" in vm.text():  # between two peers the guest goes on: it was done
            vm = start(*bare(accel, "smp", cpus=2))
        assert vm.process.poll() is None, noise
    vm.kill()
    vm = start(*bare(accel, "smp", cpus=2))
    raw = Raw(vm)
    assert raw.ask("?").startswith("T05")
    for packet in HOSTILE_PACKETS:
        said = raw.ask(packet)
        if packet.startswith("D"):
            break
        assert said == "" or said == "OK" or re.fullmatch(r"E[0-9a-f]{2}|l|[0-9a-f]+|m.*|PacketSize=.*", said, re.S), (packet, said)
        if packet.startswith("Z") and said == "OK":
            raw.ask("z" + packet[1:])
    raw.s.close()
    # It never reads: what waits for it is bounded, then it is gone.
    flood = Raw(vm)
    flood.s.settimeout(0.2)
    try:
        for _ in range(3000):
            flood.send("qXfer:features:read:target.xml:0,3f00")
    except OSError:
        pass
    flood.s.close()
    assert vm.process.poll() is None


def test_web_page(start, accel):
    """A page can make a browser send its text to any port of the host: that is not listened to, even if packets are in it."""
    vm = start(*bare(accel, "smp"))
    browser = Raw(vm)
    browser.s.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1:1234\r\nContent-Type: text/plain\r\n\r\n$k#6b$vKill;1#6e")
    assert browser.receive() is None
    assert "not gdb's protocol" in vm.text() and vm.process.poll() is None
    raw = Raw(vm)
    assert raw.ask("?").startswith("T05")


# --- Debian's kernel ---

# Functions of the kernel that the tests stop in or that lead there. From kallsyms of a boot: Debian's vmlinuz has no symbols, its System.map is empty.
NAMES = ["start_kernel", "rest_init", "arch_call_rest_init", "secondary_startup_64", "secondary_startup_64_no_verify", "x86_64_start_kernel", "do_syscall_64", "entry_SYSCALL_64",
         "entry_SYSCALL_64_after_hwframe", "entry_SYSCALL_64_safe_stack", "__x64_sys_newuname", "__x64_sys_getpid", "__x64_sys_getppid", "do_idle",
         "default_idle", "default_idle_call", "jiffies_64", "setup_arch", "early_cpu_init", "_text", "_end", "__fentry__"]


@pytest.fixture(scope="session")
def kernel_symbols(tmp_path_factory):
    """An ELF file with nothing but these symbols, at their addresses without KASLR."""
    engine = "dbt" if "dbt" in available() else available()[0]
    pattern = "|".join(NAMES)
    result = boot(engine, f'nokaslr trapline.exec="grep -wE \'{pattern}\' /proc/kallsyms"')
    found = {name: int(at, 16) for at, name in re.findall(r"^([0-9a-f]{16}) \w (\w+)$", result.out, re.M)}
    assert "start_kernel" in found and "do_syscall_64" in found, result
    folder = tmp_path_factory.mktemp("symbols")
    base = found["_text"]
    source = '.section .ktext, "ax", @nobits\nbase: .skip %#x\n' % (found["_end"] - base)
    for name, at in found.items():
        source += f".globl {name}\n.type {name}, @{'object' if name == 'jiffies_64' else 'function'}\n.set {name}, base + {at - base:#x}\n"
    (folder / "k.s").write_text(source)
    subprocess.run(["as", "-o", "k.o", "k.s"], cwd=folder, check=True)
    subprocess.run(["ld", "-o", "kernel", f"--section-start=.ktext={base:#x}", "-e", "0", "k.o"], cwd=folder, check=True)
    return str(folder / "kernel")


@pytest.fixture(scope="session")
def kernel_elf(tmp_path_factory):
    """The ELF file inside of vmlinuz: a slow accelerator need not unpack it."""
    path = tmp_path_factory.mktemp("kernel") / "vmlinux"
    subprocess.run(["/usr/bin/python3", os.path.join(ROOT, "scripts", "vmlinux.py"), kernel(), str(path)], check=True)
    return str(path)


def linux(accel, exec_, cpus=1):
    return ["--accel", accel, "--cpus", str(cpus), "--memory", "256M", "--no-reboot", "--kernel", kernel(), "--initrd", INITRD, "--append",
            f'{CONSOLE} nokaslr trapline.exec="{exec_}"']


def test_debian_kernel(start, accel, kernel_symbols):
    """A breakpoint in the kernel before it is even unpacked, hit; steps; a backtrace with symbols; on to a system call of a program; and the
    program's end is as if nothing had been."""
    vm = start(*linux(accel, "echo before; uname -r; echo after"))
    gdb = Gdb(vm, kernel_symbols)
    said = gdb.all("break start_kernel", "continue")
    assert re.search(r"Breakpoint 1, .*in start_kernel \(\)|Breakpoint 1, .*start_kernel", said), said
    said = gdb.do("backtrace")
    assert re.search(r"#0 .*start_kernel.*\n#1 .*secondary_startup_64", said), said
    at = gdb.number("$pc")
    gdb.do("stepi")
    assert gdb.number("$pc") != at
    gdb.all("delete", "break __x64_sys_newuname")
    said = gdb.do("continue", timeout=timeout_of(accel))
    assert "__x64_sys_newuname" in said, said
    said = gdb.do("backtrace 2")
    assert re.search(r"#0 .*__x64_sys_newuname.*\n#1 .* in do_syscall_64", said), said
    said = gdb.do("finish", timeout=timeout_of(accel))
    assert "do_syscall_64" in said, said
    # Its clock writes this again and again.
    gdb.all("delete", "watch *(unsigned long *)&jiffies_64")
    said = gdb.do("continue")
    assert "Old value" in said and "New value" in said, said
    said = gdb.all("delete", "continue")
    assert "exited normally" in said, said
    assert vm.status() == 0
    assert re.search(r"before\s+6\.\S+\s+after", vm.text()), vm.text()
    gdb.quit()


def test_debian_kernel_begins(start, any_engine, kernel_elf, kernel_symbols):
    """The same kernel on all accelerators: breakpoints of both sorts in its first seconds, steps, a backtrace, and on."""
    args = ["--accel", any_engine, "--memory", "256M", "--no-reboot", "--kernel", kernel_elf, "--append", f"{CONSOLE} nokaslr"]
    vm = start(*args)
    gdb = Gdb(vm, kernel_symbols)
    gdb.do("break start_kernel")
    said = gdb.do("continue", timeout=timeout_of("interp"))
    assert "start_kernel" in said, said
    said = gdb.do("backtrace")
    assert re.search(r"#0 .*start_kernel.*\n#1 .*secondary_startup_64", said), said
    here = gdb.number("$pc")
    gdb.do("stepi")
    assert gdb.number("$pc") != here
    gdb.all("delete", "break setup_arch")  # mapped by now: in memory
    said = gdb.do("continue", timeout=timeout_of("interp"))
    assert "setup_arch" in said, said
    said = gdb.do("backtrace 2")
    assert re.search(r"#0 .*setup_arch.*\n#1 .* in start_kernel", said), said
    gdb.all("delete", "hbreak early_cpu_init")
    said = gdb.do("continue", timeout=timeout_of("interp"))
    assert "early_cpu_init" in said, said
    gdb.do("kill")
    assert vm.status() == 0
    gdb.quit()


def test_a_busy_guest_and_an_idle_one(start, accel, kernel_symbols):
    """Attach to four processors at work, stop them by Ctrl-C, look at each, go away, come back, and stop them while all halt."""
    vm = start(*linux(accel, "for i in 1 2 3; do while :; do :; done & done; echo busy; sleep 1000", cpus=4), gdb="{socket}")
    vm.wait_for("busy", timeout_of(accel))
    gdb = Gdb(vm, kernel_symbols)
    said = gdb.do("info threads")
    assert len(re.findall(r"^\*? +\d +Thread \d \(vCPU \d \((running|halted)", said, re.M)) == 4, said
    assert said.count("running") >= 2, said
    for _ in range(3):
        said = gdb.interrupt_soon("continue")
        assert "SIGINT" in said, said
        gdb.all("thread 3", "stepi", "stepi")
    gdb.do("detach")
    gdb.quit()

    vm = start(*linux(accel, "echo idle; sleep 1000", cpus=2), gdb="{socket}")
    vm.wait_for("idle", timeout_of(accel))
    time.sleep(0.5)
    gdb = Gdb(vm, kernel_symbols)
    assert "halted" in gdb.do("info threads")
    said = gdb.interrupt_soon("continue")
    assert "SIGINT" in said, said
    said = gdb.do("info threads")
    assert "halted" in said, said
    gdb.quit()  # leaves it alone
    # A step of a halted processor ends with an interrupt, or Ctrl-C: nothing else wakes it.
    raw = Raw(vm)
    assert raw.ask("?").startswith("T05")
    raw.send("vCont;s:1")
    time.sleep(0.1)
    raw.s.sendall(b"\x03")
    assert re.match("T0[25]thread:1;", raw.receive())
    assert raw.ask("D") == "OK"
    assert vm.process.poll() is None


def test_reset(start, accel, kernel_symbols):
    """A guest that resets: gdb is told, and its breakpoint is hit in the next boot as well."""
    args = [a for a in linux(accel, "reboot -f") if a != "--no-reboot"]
    vm = start(*args)
    gdb = Gdb(vm, kernel_symbols)
    gdb.all("break start_kernel")
    for boot_number in range(2):
        said = gdb.do("continue", timeout=timeout_of(accel))
        assert "start_kernel" in said, (boot_number, said)
        said = gdb.do("continue", timeout=timeout_of(accel))
        assert "the guest was reset" in said and "SIGTRAP" in said, (boot_number, said)
    gdb.do("kill")
    assert vm.status() == 0
    gdb.quit()


def test_reset_into_nothing(start, accel, tmp_path):
    """A machine that cannot be built again after a reset has ended, which gdb is told like any other end."""
    kernel_file = tmp_path / "kernel"
    shutil.copyfile(guest("hello"), kernel_file)
    vm = start("--accel", accel, "--memory", "64M", "--serial", "none", "--kernel", str(kernel_file))
    raw = Raw(vm)
    assert raw.ask("?").startswith("T05")
    kernel_file.unlink()
    raw.s.sendall(b"$qRcmd,7265736574#37$vCont;c#a8")  # monitor reset, and go on before that is seen
    assert raw.receive().startswith("746865206d616368696e65")
    assert raw.receive() == "X06"
    assert vm.status() == 3 and "after a guest reset" in vm.text()


# --- the option ---


@pytest.mark.parametrize("value, says", [
    ("1234", "neither tcp:HOST:PORT nor unix:PATH"),
    ("tcp:1234", "not tcp:HOST:PORT"),
    ("unix:/nonexistent/gdb", "cannot listen there"),
    ("tcp:127.0.0.1:1234,now", 'no such key "now"'),
])
def test_option(any_accel, value, says):
    result = run("run", "--accel", any_accel, "--kernel", guest("hello"), "--gdb", value)
    assert result.status == 2 and says in result.err and result.err.count("\n") == 1, result


def test_tcp(any_accel):
    """Over TCP; and an address that others can reach is warned of."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = ["--memory", "64M", "--no-reboot", "--kernel", guest("hello"), "--gdb"]
    process = subprocess.Popen([TRAPLINE, "run", "--accel", any_accel, *args, f"tcp:127.0.0.1:{port},wait"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    script = ["-ex", f"target remote 127.0.0.1:{port}", "-ex", "stepi", "-ex", "continue"]
    time.sleep(0.5 * SLOW)
    said = subprocess.run(["gdb", "-nx", "-batch", *script], capture_output=True, text=True, timeout=PATIENCE).stdout
    assert "exited" in said, said
    assert process.wait(timeout=PATIENCE) >= 0 and b"owns the guest" not in process.stderr.read()
    result = run("run", "--accel", any_accel, *args, f"tcp:0.0.0.0:{port}")
    assert "anyone who can reach this address owns the guest" in result.err
