"""Several VMs at once: names, ls, stop, stats, console, --detach, and what a killed one leaves behind."""
import json
import os
import re
import signal
import socket
import subprocess
import time

import pexpect
import pytest

from conftest import SLOW, TRAPLINE, boot_args, complaints, kernel, need, run

# A guest that listens to its power button as acpid would, and one that does not.
OBEYS = 'trapline.exec="modprobe -a button evdev; echo listening; dd if=/dev/input/event0 bs=24 count=1 >/dev/null 2>&1; echo pressed"'
DEAF = 'trapline.exec="echo deaf; sleep 1000"'
PATIENCE = 60 * SLOW


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """A runtime folder of the test's own; whatever still runs in it at the end is killed."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path / "trapline"
    for pid in (tmp_path / "trapline").glob("*/pid"):
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            pass


class Vm:
    """A VM in the foreground of its own process, its console in a file."""

    def __init__(self, accel, folder, name, append, *more, **machine):
        self.console = folder / f"{name}.log"
        args = boot_args(accel, append, memory=machine.pop("memory", "128M"), **machine)
        self.process = subprocess.Popen([TRAPLINE, *args, "--name", name, "--serial", f"file:{self.console}", *more],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def text(self):
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def wait_for(self, words):
        end = time.monotonic() + PATIENCE
        while words not in self.text():
            assert self.process.poll() is None, f"it ended: {self.process.stdout.read().decode()}\n{self.text()}"
            assert time.monotonic() < end, f"no \"{words}\" on the console:\n{self.text()}"
            time.sleep(0.05)

    def status(self):
        return self.process.wait(timeout=PATIENCE)


def wait_until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def names():
    return [vm["name"] for vm in json.loads(run("ls", "--json").out)]


def test_nothing_runs(runtime):
    result = run("ls")
    assert result.status == 0 and result.out.split() == ["NAME", "PID", "STATE", "VCPUS", "MEMORY", "RESIDENT", "UPTIME"]
    assert json.loads(run("ls", "--json").out) == []
    for command in (["stop", "ghost"], ["console", "ghost"], ["stats", "ghost"], ["balloon", "ghost", "64M"]):
        result = run(*command)
        assert result.status == 2 and result.err == 'trapline: no VM named "ghost" is running; none is\n', result


@pytest.mark.parametrize("args, says", [
    (["ls", "me"], 'unexpected argument "me"'),
    (["ls", "--frob"], "--frob: no such option"),
    (["stop"], "NAME is missing"),
    (["stop", "a", "b"], 'unexpected argument "b"'),
    (["stop", "a", "--timeout"], "--timeout needs a value"),
    (["stop", "a", "--timeout", "soon"], "--timeout soon: not a number of seconds"),
    (["stop", "a", "--force=yes"], "--force takes no value"),
    (["stop", "../../etc"], "no VM named"),
    (["stats", "a", "--watch=0"], "--watch=0: not a time"),
    (["balloon", "a"], "SIZE is missing"),
    (["balloon", "a", "lots"], "lots: not a size"),
    (["run", "--kernel", "x", "--name", ""], "--name : not a name"),
    (["run", "--kernel", "x", "--name", "../x"], "--name ../x: not a name"),
    (["run", "--kernel", "x", "--detach", "--serial", "stdio"], "--detach: a VM in the background has no standard input"),
    (["run", "--kernel", "x", "--detach", "--console", "stdio"], "--detach: a VM in the background has no terminal for --console stdio"),
    (["run", "--kernel", "x", "--detach", "--port", "a=stdio"], "--detach: a VM in the background has no terminal for --port a=stdio"),
    (["run", "--kernel", "x", "--rng", "maybe"], "--rng maybe: write --rng on or --rng off"),
    (["run", "--kernel", "x", "--disk", ""], "--disk is empty"),
    (["run", "--kernel", "/nonexistent", "--detach"], "--kernel /nonexistent: there is no such file"),
])
def test_mistakes(runtime, args, says):
    result = run(*args)
    assert result.status == 2 and result.out == "", result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("trapline: ") and says in lines[0], result


@pytest.mark.parametrize("command", ["ls", "stop", "console", "stats", "balloon"])
def test_help(command):
    for args in (["help", command], [command, "--help"], [command, "x", "--nonsense", "-h"]):
        result = run(*args)
        assert result.status == 0 and result.out.startswith(f"usage: trapline {command}"), result


def test_several_at_once(runtime, tmp_path, any_accel):
    vms = [Vm(any_accel, tmp_path, f"vm{i}", OBEYS if i else DEAF, cpus=1 + i % 2) for i in range(3)]
    for i, vm in enumerate(vms):
        vm.wait_for("listening" if i else "deaf")
    listed = {vm["name"]: vm for vm in json.loads(run("ls", "--json").out)}
    assert sorted(listed) == ["vm0", "vm1", "vm2"]
    for i, vm in enumerate(vms):
        entry = listed[f"vm{i}"]
        assert entry["pid"] == vm.process.pid and entry["state"] == "running" and entry["cpus"] == 1 + i % 2
        assert entry["memory"]["guest"] == 128 << 20 and 0 < entry["memory"]["guest_resident"] <= 128 << 20
        assert entry["uptime_ns"] > 0 and entry["boots"] == 1
    table = run("ls").out.splitlines()
    assert len(table) == 4 and re.match(r"vm1 +\d+  running +2 +128M +\d+(\.\d)?M +\w+$", table[2]), table

    # A name that is taken, and one that is not known.
    result = run(*boot_args(any_accel, "x"), "--name", "vm1")
    assert result.status == 2 and "--name vm1: a VM of this name is running" in result.err, result
    result = run("stop", "vm9")
    assert result.status == 2 and result.err == 'trapline: no VM named "vm9" is running; running: vm0, vm1, vm2\n', result

    # Two that obey; the third is not touched by it.
    for i in (1, 2):
        result = run("stop", f"vm{i}", timeout=PATIENCE)
        assert result.status == 0 and result.err == f"vm{i} has powered off\n", result
        assert vms[i].status() == 0 and "pressed" in vms[i].text()
        assert not complaints(vms[i].text())
    assert names() == ["vm0"]
    # One that does not, is waited for and then forced.
    start = time.monotonic()
    result = run("stop", "vm0", "--timeout", "1", timeout=PATIENCE)
    assert result.status == 0 and "has not powered off within 1 s" in result.err and "was ended by force" in result.err, result
    assert time.monotonic() - start >= 1
    assert vms[0].status() == 0
    assert names() == [] and list(runtime.iterdir()) == []


def test_stop_by_force(runtime, tmp_path, any_accel):
    vm = Vm(any_accel, tmp_path, "deaf", DEAF)
    vm.wait_for("deaf")
    # A VMM that is itself hung.
    vm.process.send_signal(signal.SIGSTOP)
    assert run("ls").out.splitlines()[1].split()[2:4] == ["no", "answer"]
    # So many have asked it already that the next one finds no room in the queue of its socket.
    asked = []
    for _ in range(40):
        asked.append(socket.socket(socket.AF_UNIX))
        asked[-1].setblocking(False)
        try:
            asked[-1].connect(str(runtime / "deaf" / "control.sock"))
        except BlockingIOError:
            break
    else:
        pytest.fail("its queue has no end")
    assert run("ls").out.splitlines()[1].split()[2:4] == ["no", "answer"]
    result = run("stats", "deaf")
    assert result.status == 1 and result.err == "trapline: deaf does not answer\n", result
    result = run("stop", "deaf", "--force", timeout=PATIENCE)
    assert result.status == 0 and "killing its process" in result.err, result
    assert vm.status() == -signal.SIGKILL
    assert list(runtime.iterdir()) == []


def test_signal_while_it_is_built(runtime, tmp_path, any_accel):
    """Building may wait for others: here for an NBD server that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        vm = Vm(any_accel, tmp_path, "waiting", DEAF, "--disk", f"nbd://127.0.0.1:{server.getsockname()[1]}/x")
        with server.accept()[0]:
            start = time.monotonic()
            vm.process.send_signal(signal.SIGINT)
            assert vm.status() == 128 + signal.SIGINT
            assert time.monotonic() - start < 3 * SLOW
    assert names() == []


def test_leftovers_of_a_killed_one(runtime, tmp_path, any_accel):
    vm = Vm(any_accel, tmp_path, "victim", DEAF)
    vm.wait_for("deaf")
    vm.process.kill()
    vm.status()
    assert (runtime / "victim" / "control.sock").exists()
    assert names() == []
    assert not (runtime / "victim").exists()
    # And its name can be taken again, without anybody cleaning up before.
    for _ in range(2):
        vm = Vm(any_accel, tmp_path, "victim", DEAF)
        wait_until(lambda: (runtime / "victim" / "control.sock").exists(), "no control socket")
        vm.process.kill()
        vm.status()


def test_stats(runtime, tmp_path, any_accel):
    vm = Vm(any_accel, tmp_path, "counted", DEAF, "--balloon", "on", cpus=2, memory="256M")
    vm.wait_for("deaf")
    first = json.loads(run("stats", "counted", "--json").out)
    assert first["memory"]["guest"] == 256 << 20
    assert 0 < first["memory"]["guest_resident"] < first["memory"]["process_resident"]
    assert first["exits"]["pio"] > 100 and first["exits"]["hlt"] > 0
    assert set(first["cpu"]) == {"cpu0", "cpu1"} and first["cpu"]["cpu1"]["interrupts"] > 0
    assert first["accelerator"]["interrupts"] > 0
    if any_accel == "dbt":
        assert first["accelerator"]["blocks_translated"] > 1000 and first["accelerator"]["code_bytes"] > 1 << 20
    assert {"rng", "balloon"} <= set(first["device"])
    result = run("stats", "counted")
    assert result.status == 0
    for words in ("memory\n", "guest resident", "exits\n", "  pio ", "cpu1\n", "rng\n"):
        assert words in result.out, result
    second = json.loads(run("stats", "counted", "--json").out)
    assert all(second["exits"][kind] >= n for kind, n in first["exits"].items())

    watch = subprocess.Popen([TRAPLINE, "stats", "counted", "--json", "--watch=0.2"], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert "exits" in json.loads(watch.stdout.readline())
    # It ends with the VM.
    assert run("stop", "counted", "--force", timeout=PATIENCE).status == 0
    assert watch.wait(timeout=PATIENCE) == 0
    assert vm.status() == 0


def test_stats_of_kvm(runtime):
    need("kvm")
    guest = os.path.join(os.path.dirname(TRAPLINE), "tests", "guest", "exits.elf")
    vm = subprocess.Popen([TRAPLINE, "run", "--accel", "kvm", "--cpus", "2", "--memory", "64M", "--name", "counting", "--serial", "none", "--kernel", guest,
                           "--append", "only=pio-read count=1000000000"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (runtime / "counting" / "control.sock").exists(), "no control socket")
        before = json.loads(run("stats", "counting", "--json").out)
        if "kvm" not in before:
            pytest.skip("this host's KVM has no KVM_CAP_BINARY_STATS_FD (Linux 5.14 or later has it)")
        wait_until(lambda: json.loads(run("stats", "counting", "--json").out)["exits"]["pio"] > before["exits"]["pio"] + 100, "no exits")
        after = json.loads(run("stats", "counting", "--json").out)
        # The kernel's count is of the same exits and of those that it serves itself.
        assert after["kvm"]["exits"] - before["kvm"]["exits"] >= 100
        assert "pages_4k" in after["kvm"] and "halt_wakeup" in after["kvm"]
    finally:
        vm.kill()
        vm.wait()


def test_garbage_at_the_socket(runtime, tmp_path, any_accel):
    vm = Vm(any_accel, tmp_path, "target", DEAF)
    vm.wait_for("deaf")
    for garbage in (b"\n" * 1000, b"\0" * 100000, b"[" * 4000 + b"\n", os.urandom(20000), b'{"request":"status"}\n' * 5000):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(runtime / "target" / "control.sock"))
            s.settimeout(0.2)
            try:
                s.sendall(garbage)
            except OSError:
                pass  # it hung up on us, or stopped listening
    assert names() == ["target"]
    assert run("stop", "target", "--force", timeout=PATIENCE).status == 0
    assert vm.status() == 0


def test_reboot_keeps_control(runtime, tmp_path, any_accel):
    vm = Vm(any_accel, tmp_path, "again", 'trapline.exec="echo once more; sleep 1; reboot -f"', no_reboot=False)
    wait_until(lambda: vm.text().count("once more") >= 2, "it did not boot twice")
    entry = json.loads(run("ls", "--json").out)[0]
    assert entry["boots"] >= 2 and entry["pid"] == vm.process.pid
    assert run("stop", "again", "--force", timeout=PATIENCE).status == 0
    assert vm.status() == 0


def test_default_names(runtime, tmp_path, any_accel):
    started = [subprocess.Popen([TRAPLINE, *boot_args(any_accel, DEAF, memory="128M"), "--serial", "none"], stdin=subprocess.DEVNULL)
               for _ in range(2)]
    stem = os.path.basename(kernel())
    wait_until(lambda: len(names()) == 2, "they are not both there")
    assert names() == [stem, f"{stem}-2"]
    for name in names():
        assert run("stop", name, "--force", timeout=PATIENCE).status == 0
    assert [p.wait(timeout=PATIENCE) for p in started] == [0, 0]


def test_detach(runtime, tmp_path, any_accel):
    console = tmp_path / "console"
    result = run(*boot_args(any_accel, OBEYS, memory="128M"), "--detach", "--name", "far", "--serial", f"file:{console}")
    assert result.status == 0 and result.err == "" and result.out.startswith("far runs in the background (process "), result
    assert names() == ["far"]
    wait_until(lambda: console.exists() and "listening" in console.read_text(), "the guest does not come up")
    result = run("stop", "far", timeout=PATIENCE)
    assert result.status == 0 and "has powered off" in result.err, result
    assert list(runtime.iterdir()) == []


def test_detach_tells_mistakes(runtime, tmp_path, any_accel):
    bad = tmp_path / "bad"
    bad.write_bytes(b"not a kernel" * 1000)
    result = run("run", "--accel", any_accel, "--kernel", str(bad), "--detach", "--name", "far")
    assert result.status == 2 and "--kernel" in result.err and result.out == "", result
    assert list(runtime.iterdir()) == []


def test_detached_failure_leaves_a_log(runtime, any_accel):
    # A kernel that panics, with a reset by triple fault: the VM fails, and says so where one can look.
    result = run("run", "--accel", any_accel, "--kernel", kernel(), "--memory", "128M", "--no-reboot", "--serial", "none", "--detach",
                 "--append", "panic=-1 reboot=t", "--name", "doomed")
    assert result.status == 0, result
    log = runtime / ".logs" / "doomed"
    wait_until(lambda: names() == [], "it does not fail")
    assert "triple fault" in log.read_text()


def start_console(name, *args, **kwargs):
    return pexpect.spawn(TRAPLINE, ["console", name, *args], timeout=PATIENCE, encoding="utf-8", codec_errors="replace", **kwargs)


def test_console(runtime, any_accel):
    result = run(*boot_args(any_accel, "", memory="128M"), "--detach", "--name", "shell")
    assert result.status == 0 and "trapline console shell" in result.out, result
    first = start_console("shell")
    first.expect("Ctrl-A x leaves")
    first.expect(r"root@trapline:.*# ")
    first.send("echo $((6 * 7)) are\r")
    first.expect("42 are")
    first.send("\x01h")
    first.expect("this help")
    # Ctrl-C is the guest's.
    first.send("sleep 1000\r")
    time.sleep(0.5)
    first.send("\x03")
    first.expect(r"root@trapline:.*# ")
    first.send("\x01x")
    first.expect("the VM goes on")
    first.expect(pexpect.EOF)
    first.close()
    assert first.exitstatus == 0
    # What the guest prints meanwhile is there for the next one.
    second = start_console("shell")
    second.send("(sleep 1; echo mean''while) &\r")
    second.expect(r"root@trapline:.*# ")
    second.send("\x01x")
    second.expect(pexpect.EOF)
    second.close()
    time.sleep(2)
    third = start_console("shell")
    third.expect("meanwhile")
    third.send("poweroff\r")
    third.expect("the VM has closed its console")
    third.expect(pexpect.EOF)
    third.close()
    assert third.exitstatus == 0
    wait_until(lambda: names() == [], "it is still there")


def test_console_without_terminal(runtime, any_accel):
    assert run(*boot_args(any_accel, "", memory="128M"), "--detach", "--name", "shell").status == 0
    console = subprocess.Popen([TRAPLINE, "console", "shell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    text = b""
    while b"# " not in text:  # before that the guest's driver would drop what comes
        text += console.stdout.read1()
    console.stdin.write(b"echo $((6 * 7)) are; poweroff -f\n")
    console.stdin.close()
    text = console.stdout.read()
    assert console.wait(timeout=PATIENCE) == 0 and b"42 are" in text, text


def test_console_elsewhere(runtime, tmp_path, any_accel):
    vm = Vm(any_accel, tmp_path, "mute", DEAF)
    vm.wait_for("deaf")
    result = run("console", "mute")
    assert result.status == 1 and "has its serial port elsewhere" in result.err, result
    run("stop", "mute", "--force", timeout=PATIENCE)


def test_balloon_needs_one(runtime, tmp_path, any_accel):
    vm = Vm(any_accel, tmp_path, "stiff", DEAF)
    vm.wait_for("deaf")
    result = run("balloon", "stiff", "64M")
    assert result.status == 2 and "stiff: this VM has no balloon; start it with --balloon on" in result.err, result
    run("stop", "stiff", "--force", timeout=PATIENCE)
