"""Boots of Debian's kernels to the report, and the ends a VM can come to."""
import os
import re
import signal
import subprocess
import time

import pytest

from conftest import (ACCELS_ASKED, ROOT, SLOW, TRAPLINE, boot, boot_args, complaints, dmesg_of, need, report_of, run,
                      timeout_of)


def healthy(result, cpus):
    """Status 0, a whole report, and a kernel log without a complaint."""
    assert result.status == 0, result
    report = report_of(result)
    assert report["kernel"].startswith("Linux "), result
    assert report["cpus"].split()[0] == str(cpus), result
    assert float(report["uptime"].split()[0]) > 0, result
    log = dmesg_of(result)
    assert complaints(log) == [], "the guest's kernel complains\n" + log[-8000:]
    return report


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("flavour", ["cloud", "amd64"])
def test_report(accel, flavour, cpus):
    report = healthy(boot(accel, "trapline.report trapline.dmesg", cpus=cpus, flavour=flavour), cpus)
    assert ("cloud" in report["kernel"]) == (flavour == "cloud")
    assert 400 <= int(report["memory"].split()[0]) <= 512


def test_interp_boots():
    """The reference boots the kernel on its own. Slow, so it is one boot unless TRAPLINE_TEST_ACCELS names interp."""
    need("interp")
    if ACCELS_ASKED is not None:
        pytest.skip("TRAPLINE_TEST_ACCELS decides what is booted")
    healthy(boot("interp", "trapline.report trapline.dmesg"), 1)


@pytest.mark.parametrize("memory, low, high", [("128M", 70, 128), ("256M", 180, 256), ("3G", 2800, 3072), ("6G", 5700, 6144)])
def test_memory_sizes(accel, memory, low, high):
    """Little, usual, up to the hole below 4 GiB, and above 4 GiB, where Linux then allocates from first."""
    report = healthy(boot(accel, "trapline.report trapline.dmesg", memory=memory), 1)
    assert low <= int(report["memory"].split()[0]) <= high


def test_boots_in_a_row(accel):
    for _ in range(int(os.environ.get("TRAPLINE_TEST_BOOTS", "3"))):
        healthy(boot(accel, "trapline.report trapline.dmesg", cpus=2), 2)


WORK = "i=0; while [ $i -lt 100 ]; do /bin/true; echo $i | md5sum >/dev/null; i=$((i+1)); done"


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_work_on_all_cpus(accel, cpus):
    """Processes that fork, exec, pipe and migrate on every CPU at once; all of them come back."""
    jobs = f"for j in 1 2 3 4; do ({WORK}; echo job $j done) & done; wait; echo all done"
    result = boot(accel, f'trapline.dmesg trapline.exec="{jobs}"', cpus=cpus)
    assert result.status == 0 and "all done" in result.out and "exec status 0" in result.out, result
    assert result.out.count(" done\n") >= 5, result
    assert complaints(dmesg_of(result)) == [], result


def test_time_passes_at_the_right_speed(accel):
    """The guest's clock against ours over some seconds."""
    process = subprocess.Popen([TRAPLINE, *boot_args(accel, 'trapline.exec="echo mark1; sleep 4; echo mark2"')],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    marks = {}
    try:
        for line in process.stdout:
            marks[line.strip()] = time.monotonic()
        assert process.wait(timeout=30 * SLOW) == 0
    finally:
        process.kill()
    assert 3.8 <= marks[b"mark2"] - marks[b"mark1"] <= 4.5 * SLOW + 0.5


def test_reset_with_no_reboot(accel):
    result = boot(accel, 'trapline.exec="echo resetting; reboot -f"')
    assert result.status == 0 and "resetting" in result.out, result


@pytest.mark.parametrize("how", ["a", "k", "p"])
def test_ways_to_reset(accel, how):
    """By the ACPI reset register, the keyboard controller and port 0xcf9 (Linux's reboot=)."""
    result = boot(accel, f'reboot={how} trapline.exec="echo resetting; reboot -f"')
    assert result.status == 0 and "resetting" in result.out, result


def test_reset_starts_again(accel):
    """Without --no-reboot the machine comes up anew; SIGTERM then ends it cleanly."""
    args = boot_args(accel, 'trapline.exec="echo once-more; reboot -f"', no_reboot=False)
    process = subprocess.Popen([TRAPLINE, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 2 * timeout_of(accel)
    seen = 0
    try:
        for line in process.stdout:
            seen += b"once-more" in line and b"exec=" not in line
            if seen == 2 or time.monotonic() > end:
                break
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30 * SLOW)
    finally:
        process.kill()
    assert seen == 2
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("value", [0, 5, 127])
def test_debug_exit(accel, value):
    """Port 0xf4 through /dev/port (which the cloud kernel lacks); writing v ends the VM with status (v << 1) | 1."""
    write = f"printf '\\{value:03o}' | dd of=/dev/port bs=1 seek=244 conv=notrunc 2>/dev/null"
    result = boot(accel, f'trapline.exec="{write}; echo not reached"', flavour="amd64")
    assert result.status == (value << 1 | 1) & 0xff, result
    assert "not reached" not in result.out


def test_triple_fault(accel, tmp_path):
    """Linux's reboot=t loads an empty IDT and traps. One line, a status, and a dump."""
    result = boot(accel, 'reboot=t trapline.exec="reboot -f"', env={"TMPDIR": str(tmp_path)})
    assert result.status == 3, result
    assert len(result.err.splitlines()) == 1 and "triple fault" in result.err.lower(), result
    match = re.search(r"registers and code are in (\S+)", result.err)
    assert match, result
    with open(match.group(1), encoding="utf-8", errors="replace") as f:
        assert "rip" in f.read().lower()


def test_panic_ends_the_run(accel):
    result = boot(accel, 'trapline.exec="echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger"')
    assert result.status == 0 and "Kernel panic" in result.out, result


def test_serial_to_a_file(accel, tmp_path):
    log = tmp_path / "log"
    result = boot(accel, "trapline.report", "--serial", f"file:{log}")
    assert result.status == 0 and result.out == "", result
    result.out = log.read_text(errors="replace").replace("\r", "")
    assert report_of(result)


def test_serial_to_nowhere(accel):
    result = boot(accel, "trapline.report", "--serial", "none")
    assert result.status == 0 and result.out == "", result


def test_bulk_output_arrives_whole(accel):
    """A thousand lines through the UART's FIFO and interrupts, none lost."""
    result = boot(accel, 'trapline.exec="seq 1 1000"')
    assert result.status == 0, result
    numbers = [int(n) for n in re.findall(r"^(\d+)$", result.out, re.M)]
    assert numbers == list(range(1, 1001)), result


def test_make_run_without_a_terminal(any_accel):
    """What `make run </dev/null` does after the build."""
    env = dict(os.environ, BUILD=os.path.relpath(os.path.dirname(TRAPLINE), ROOT), ACCEL="auto")
    done = subprocess.run([os.path.join(ROOT, "scripts", "run.sh")], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          errors="replace", env=env, timeout=timeout_of(any_accel))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--- end of report ---" in done.stdout


@pytest.mark.parametrize("mode", ["one-insn", "tiny-tlb", "checks-fail", "random-flush", "poison-flags", "no-chain"])
def test_forced_modes(accel, mode):
    """Each makes a rare path of the translator the common one; the kernel boots all the same."""
    if accel != "dbt":
        pytest.skip("forced modes are the translator's")
    healthy(boot(accel, "trapline.report trapline.dmesg", "--debug", mode, cpus=2, timeout=300 * SLOW), 2)


def test_lockstep(accel):
    """A boot in which each block's first runs, and some of the later ones, are done by the stepper too: no difference."""
    if accel != "dbt":
        pytest.skip("the translator is what is compared with the stepper")
    out = boot(accel, "trapline.report trapline.dmesg", "--debug", "verify", "--verbose", cpus=1, timeout=300 * SLOW)
    healthy(out, 1)
    verified = int(re.search(r"(\d+) blocks verified", out.err).group(1))
    assert verified > 100000


def test_small_code_cache(accel):
    """A cache that fills again and again: translations are thrown away and made anew."""
    if accel != "dbt":
        pytest.skip("only the translator has a code cache")
    healthy(boot(accel, "trapline.report trapline.dmesg", "--code-cache", "1M", timeout=300 * SLOW), 1)
