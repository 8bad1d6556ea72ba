"""--cpu: Debian's kernel on every named processor, and what it finds there."""
import re

import pytest

from conftest import boot, complaints, dmesg_of, need, run

# The levels of the x86-64 psABI, by names of /proc/cpuinfo.
LEVELS = {
    "x86-64": "cmov cx8 fpu fxsr mmx syscall sse sse2",
    "x86-64-v2": "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}


def flags_of(result):
    match = re.search(r"^flags\s*: (.*)$", result.out, re.M)
    assert match, result
    return set(match.group(1).split())


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels(level):
    """The kernel boots without a complaint and finds the level's features, and none of the next."""
    need("dbt")
    names = list(LEVELS)
    result = boot("dbt", 'trapline.dmesg trapline.exec="grep -m1 ^flags /proc/cpuinfo"', "--cpu", names[level - 1])
    assert result.status == 0, result
    flags = flags_of(result)
    for name in names[:level]:
        assert set(LEVELS[name].split()) <= flags, result
    for name in names[level:]:
        assert not set(LEVELS[name].split()) & flags, result
    assert complaints(dmesg_of(result)) == [], result


def test_features():
    need("dbt")
    result = boot("dbt", 'trapline.exec="grep -m1 ^flags /proc/cpuinfo"', "--cpu", "x86-64-v2,+aes,-pcid,-rdrand")
    flags = flags_of(result)
    assert "aes" in flags and "popcnt" in flags, result
    assert not {"pcid", "invpcid", "rdrand", "avx"} & flags, result


def test_help(any_accel):
    result = run("run", "--cpu", "help")
    assert result.status == 0, result
    assert re.search(r"^  x86-64-v2 ", result.out, re.M)
    assert re.search(r"^  popcnt +v2 ", result.out, re.M)
    assert re.search(r"^  monitor .*hidden: ", result.out, re.M)


@pytest.mark.parametrize("cpu, says", [("x86-64-v9", "no such model"), ("host,+vmx", "no guest is shown it"), ("-sse2", "every x86-64 processor has it")])
def test_refused(cpu, says):
    result = run("run", "--kernel", "/nowhere", "--cpu", cpu)
    assert result.status == 2 and "--cpu" in result.err and says in result.err, result
