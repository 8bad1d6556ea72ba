"""The interactive console: a shell, the escape keys, signals, and the terminal as it was before."""
import hashlib
import os
import shlex
import signal

import pexpect
import pytest

from conftest import SLOW, TRAPLINE, boot_args, timeout_of

PROMPT = "root@trapline:/root# "


class Console:
    """The program on a terminal of its own, started by a shell that tells status and terminal settings before and after."""

    def __init__(self, accel, append="", **machine):
        command = " ".join(shlex.quote(a) for a in [TRAPLINE, *boot_args(accel, append, **machine)])
        script = f"echo before=$(stty -g); sh -c 'echo pid=$$; exec \"$@\"' sh {command}; echo status=$?; echo after=$(stty -g)"
        self.child = pexpect.spawn("/bin/sh", ["-c", script], timeout=30 * SLOW, encoding="utf-8", codec_errors="replace",
                                   dimensions=(40, 120))
        self.child.expect(r"before=(\S+)")
        self.before = self.child.match.group(1)
        self.child.expect(r"pid=(\d+)")
        self.pid = int(self.child.match.group(1))
        self.timeout = timeout_of(accel)

    def wait_for_shell(self):
        self.child.expect_exact(PROMPT, timeout=self.timeout)

    def command(self, line):
        """Type a line; return what was printed until the next prompt."""
        self.child.send(line + "\r")
        self.child.expect_exact(PROMPT)
        return self.child.before.replace("\r", "")

    def end(self):
        """Wait for the end; returns the status, having checked that the terminal is as before."""
        self.child.expect(r"status=(\d+)", timeout=30 * SLOW)
        status = int(self.child.match.group(1))
        self.child.expect(r"after=(\S+)")
        assert self.child.match.group(1) == self.before, "the terminal was not restored"
        self.child.close()
        return status


@pytest.fixture
def console(accel):
    c = Console(accel)
    yield c
    if c.child.isalive():
        c.child.terminate(force=True)


def test_shell(console):
    console.wait_for_shell()
    assert "42" in console.command("echo $((6 * 7))").splitlines()
    assert "0" in console.command("false; true; echo $?").splitlines()
    console.child.send("poweroff\r")
    assert console.end() == 0


def test_quit_by_ctrl_a_x(console):
    console.wait_for_shell()
    console.child.send("\x01x")
    assert console.end() == 0


def test_help_by_ctrl_a_h(console):
    console.wait_for_shell()
    console.child.send("\x01h")
    console.child.expect("(?i)ctrl-a x")
    console.child.send("\x01x")
    assert console.end() == 0


def test_ctrl_a_twice_sends_one(console):
    console.wait_for_shell()
    console.child.send("cat -v\r")
    console.child.expect_exact("cat -v")
    console.child.send("\x01\x01\r")
    console.child.expect_exact("^A")
    console.child.send("\x03")
    console.child.expect_exact(PROMPT)
    console.child.send("\x01x")
    assert console.end() == 0


def test_ctrl_c_goes_to_the_guest(console):
    """^C ends the guest's program, not the VM; and there is job control."""
    console.wait_for_shell()
    console.child.send("sleep 1000\r")
    console.child.expect_exact("sleep 1000")
    console.child.send("\x03")
    console.child.expect_exact(PROMPT)
    console.child.send("sleep 1000\r")
    console.child.expect(r"sleep 1000\r+\n")
    console.child.send("\x1a")
    console.child.expect("(?i)stopped")
    console.child.expect_exact(PROMPT)
    assert "kill" in console.command("kill -9 %1; sleep 1; jobs; echo kill")
    console.child.send("exit\r")
    assert console.end() == 0


def test_pasted_text_arrives_whole(console):
    """More bytes at once than a UART's FIFO holds."""
    console.wait_for_shell()
    text = "".join(f"{n:04d}" for n in range(200))
    printed = console.command(f"echo {text} | md5sum")
    assert hashlib.md5((text + "\n").encode()).hexdigest() in printed


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_cleanly(console, sig):
    console.wait_for_shell()
    os.kill(console.pid, sig)
    assert console.end() == 128 + sig


def test_quit_while_booting(console):
    """Ctrl-A x works before the guest listens."""
    console.child.expect("Ctrl-A x")
    console.child.send("\x01x")
    assert console.end() == 0
