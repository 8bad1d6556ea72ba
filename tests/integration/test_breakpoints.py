"""The guest's own debug registers as Linux uses them: ptrace, perf's breakpoint events, single steps."""
import shutil
import subprocess

import pytest

from conftest import INITRD, ROOT, boot, complaints, cpio, dmesg_of


@pytest.fixture(scope="module")
def initrd(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("breakpoints")
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o", folder / "breakpoints", "tests/integration/breakpoints.c"],
                   cwd=ROOT, check=True)
    with open(INITRD, "rb") as f:
        base = f.read()
    path = folder / "initrd.img"
    path.write_bytes(base + b"\0" * (-len(base) % 512) + cpio(folder, {"bin/breakpoints": (folder / "breakpoints").read_bytes()}))
    return str(path)


@pytest.mark.parametrize("cpus,debug", [(1, None), (2, None), (1, "tiny-tlb,random-flush")])
def test_ptrace_and_perf(accel, initrd, cpus, debug):
    if debug and accel != "dbt":
        pytest.skip("a forced mode of the translator")
    more = ["--debug", debug] if debug else []
    result = boot(accel, "trapline.dmesg trapline.exec=/bin/breakpoints", *more, initrd=initrd, cpus=cpus)
    assert "all right" in result.out, result
    assert not complaints(dmesg_of(result))
