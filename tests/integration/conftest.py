"""What every integration test uses: the program, the demo guest, and how to run a VM.

TRAPLINE               the program (default build/trapline)
TRAPLINE_TEST_ACCELS   accelerators for the whole matrix, comma separated (default dbt, plus one boot of interp)
TRAPLINE_TEST_BOOTS    how many boots in a row test_boots_in_a_row does (default 3)
TRAPLINE_TEST_SLOW     factor on every timeout (default 1); for sanitizer builds and loaded machines
"""
import os
import re
import signal
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TRAPLINE = os.path.abspath(os.environ.get("TRAPLINE", os.path.join(ROOT, "build", "trapline")))
GUEST = os.path.join(ROOT, ".cache", "guest")
INITRD = os.path.join(GUEST, "initrd.img")
SLOW = float(os.environ.get("TRAPLINE_TEST_SLOW", "1"))
ACCELS_ASKED = os.environ.get("TRAPLINE_TEST_ACCELS")
ACCELS = (ACCELS_ASKED or "dbt").split(",")
CONSOLE = "console=ttyS0 quiet panic=-1"

# One boot to the report takes seconds on the translator and minutes on the interpreter.
TIMEOUT = {"dbt": 120, "kvm": 60, "interp": 600}


def kernel(flavour="cloud"):
    return os.path.join(GUEST, f"vmlinuz-{flavour}")


def timeout_of(accel):
    return TIMEOUT.get(accel, 120) * SLOW


class Result:
    """How a run ended: status, what the guest's console said, what the VMM said on stderr."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out.replace("\r", ""), err

    def __repr__(self):
        return f"status {self.status}\n--- stdout (end)\n{self.out[-6000:]}\n--- stderr\n{self.err[-2000:]}"


def run(*args, timeout=30, stdin=subprocess.DEVNULL, env=None, cwd=None):
    """Run the program to its end. A run that outlives the timeout is a failure that shows how far it came."""
    process = subprocess.Popen([TRAPLINE, *args], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
                               env=dict(os.environ, **(env or {})))
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        pytest.fail(f"still running after {timeout:.0f} s: {' '.join(args)}\n"
                    + str(Result("timeout", out.decode(errors="replace"), err.decode(errors="replace"))))
    return Result(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def boot_args(accel, append, cpus=1, memory="512M", flavour="cloud", no_reboot=True, initrd=INITRD):
    args = ["run", "--accel", accel, "--cpus", str(cpus), "--memory", memory, "--kernel", kernel(flavour),
            "--initrd", initrd, "--append", f"{CONSOLE} {append}"]
    return args + (["--no-reboot"] if no_reboot else [])


def boot(accel, append, *more, timeout=None, env=None, **machine):
    return run(*boot_args(accel, append, **machine), *more, timeout=timeout or timeout_of(accel), env=env)


_available = None


def available():
    """The accelerators that this build has and that work here, as doctor tells them."""
    global _available
    if _available is None:
        if not os.path.exists(TRAPLINE):
            pytest.exit(f"{TRAPLINE} does not exist; run make first", returncode=3)
        doctor = run("doctor")
        _available = re.findall(r"^  (\S+) +works here", doctor.out, re.M)
    return _available


def need(accel):
    if accel not in available():
        pytest.skip(f"--accel {accel} is not in this build, or does not work on this host (see trapline doctor)")


@pytest.fixture(params=ACCELS)
def accel(request):
    need(request.param)
    return request.param


@pytest.fixture
def any_accel():
    """For what does not depend on the accelerator but needs one to come that far."""
    if not available():
        pytest.skip("this build has no accelerator that works here")
    return re.search(r"^--accel auto takes (\w+):", run("doctor").out, re.M).group(1)


# What a healthy guest's kernel never says.
COMPLAINTS = re.compile(
    r"WARNING:|\bBUG\b|Oops|Call Trace|general protection|segfault at|stall|soft lockup|hard LOCKUP|hung_task|blocked for more than"
    r"|unstable|[Ll]ost .*(tick|timer|interrupt)|timer.*lost|not connected to IO-APIC|TSC warp|TSC ADJUST|out of sync"
    r"|No irq handler|nobody cared|[Ss]purious|failed to (start|come up)|CPU\d+: failed|Failed to start|do_boot_cpu failed"
    r"|ACPI (BIOS )?Error|unchecked MSR|invalid opcode|x86/fpu: .*(mismatch|bad)|APIC: .*(error|fail)|Kernel panic|double fault"
    r"|APIC calibration not consistent|hpet.*(lost|broken)|random: .*bug")
# ... except for these, which are no complaints.
HARMLESS = re.compile(r"printk: .*console|Spurious LAPIC|Spectre|spectre|Speculative|rcu: .*stall.*(timeout|suppress)|CONFIG_"
                      r"|RCU CPU stall|[Mm]itigation")

# The event loop comes late by more than an RTC period where a build with sanitizers runs it, or others share the processors.
LATE = re.compile(r"hpet: Lost \d+ RTC interrupts")


def cpio(folder, files):
    """An archive that the kernel unpacks over the initramfs in front of it."""
    root = os.path.join(folder, "root")
    os.makedirs(os.path.join(root, "bin"))
    for name, content in files.items():
        with open(os.path.join(root, name), "wb") as f:
            f.write(content)
        os.chmod(os.path.join(root, name), 0o755)
    names = "\n".join(["bin", *files]) + "\n"
    return subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=subprocess.PIPE, check=True).stdout


def complaints(log):
    late = SLOW > 1 or os.getloadavg()[0] > 1.5 * os.cpu_count()
    return [line for line in log.splitlines() if COMPLAINTS.search(line) and not HARMLESS.search(line) and not (late and LATE.search(line))]


def dmesg_of(result):
    match = re.search(r"^--- dmesg ---$(.*)^--- end of dmesg ---$", result.out, re.M | re.S)
    assert match, f"no kernel log on the console\n{result}"
    return match.group(1)


def report_of(result):
    match = re.search(r"^--- guest report ---$(.*)^--- end of report ---$", result.out, re.M | re.S)
    assert match, f"no report on the console\n{result}"
    return dict(re.findall(r"^(\w+): +(.*)$", match.group(1), re.M))
