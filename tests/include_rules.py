#!/usr/bin/python3
"""Hold the layers: who may include whom, read from the include lines of src/; and that every header compiles alone and
says first what it is.

Prints one line for each broken rule and then "N passed, N failed, N skipped"; status 1 if a rule is broken.
"""
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SRC = os.path.join(ROOT, "src")

VM_LOWER = ["vm/bus.h", "vm/irq.h", "vm/loop.h"]
VM_UPPER = ["base", "mem", "vm", "cpu/x86", "accel/accel.h", "irqchip", "guestabi"]

# Folder or file -> folders whose or files it may include besides its own. The longest matching prefix counts. Lower layers
# never appear with a higher one on their right: that is the picture of ARCHITECTURE.md as a table.
MAY_INCLUDE = {
    "base": [],
    "mem": ["base"],
    "cpu": ["base"],
    # vm/ has two floors: what a device holds (bus, lines, loop), and what runs the vCPUs above accelerator and irqchip.
    "vm": ["base", "mem"],
    "vm/vm.h": VM_UPPER,
    "vm/vm.c": VM_UPPER,
    "vm/vcpu.h": VM_UPPER,
    "vm/vcpu.c": VM_UPPER,
    "vm/hosted.h": VM_UPPER,
    "vm/hosted.c": VM_UPPER,
    "vm/dump.h": VM_UPPER,
    "vm/dump.c": VM_UPPER,
    "accel/accel.h": ["base", "mem", "cpu"],
    "accel": ["base", "mem", "cpu", "guestabi"],
    "accel/common": ["base", "cpu", "accel/accel.h"],
    "accel/kvm": ["base", "mem", "cpu", "accel/accel.h", "accel/common"],
    "accel/interp": ["base", "mem", "cpu", "guestabi", "accel/accel.h", "accel/common"],
    "accel/fake": ["base", "mem", "cpu", "accel/accel.h", "accel/common"],
    "accel/dbt": ["base", "mem", "cpu", "guestabi", "accel/accel.h", "accel/common"],
    "guestabi": ["base", "mem", "cpu"],
    "irqchip": ["base"] + VM_LOWER,
    "chardev": ["base"] + VM_LOWER,
    "device": ["base", "mem", "chardev"] + VM_LOWER,
    "device/virtio": ["base", "mem", "pci", "block", "net", "chardev"] + VM_LOWER,
    "block": ["base"] + VM_LOWER,
    "net": ["base"] + VM_LOWER,
    "pci": ["base", "mem"] + VM_LOWER,
    "load": ["base", "mem"],
    "gdb": ["base", "mem", "vm", "cpu/x86", "accel/accel.h", "irqchip/lapic.h"],
    "machine": ["base", "mem", "cpu", "vm", "accel/accel.h", "guestabi", "irqchip", "chardev", "device", "pci",
                "block", "net", "load", "gdb/server.h"],
    "control": ["base", "machine"] + VM_LOWER,
    "cli": ["base", "machine", "control", "gdb/server.h", "block/block.h", "accel/accel.h", "chardev/terminal.h", "cpu/x86/cpu_model.h"],
}

# System headers that only one folder may know.
ONLY = {
    "jansson.h": ["control", "cli"],
    "linux/kvm.h": ["accel/kvm"],
    "asm/kvm.h": ["accel/kvm"],
    "slirp/": ["net"],
    "liburing.h": ["block"],
    "zlib.h": ["block/qcow2"],
    "zstd.h": ["block/qcow2"],
    "Zydis/": ["cpu/x86", "accel/dbt"],
    "ucontext.h": ["accel", "cpu/x86"],  # host registers of a signal
}

# What code may not say outside accel/dbt: making host code executable is knowing host code. The emulator's native
# stepper runs one guest instruction natively, and it alone has such a buffer too.
ONLY_WORDS = {
    r"\bPROT_EXEC\b": ["accel/dbt", "cpu/x86"],
    r"\blinux/kvm\.h\b": ["accel/kvm"],
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)


def under(path, prefixes):
    return any(path == p or path.startswith(p.rstrip("/") + "/") for p in prefixes)


def rule_for(path):
    best = max((k for k in MAY_INCLUDE if under(path, [k])), key=len, default=None)
    return best


def own_folder(path):
    """What counts as a file's own: its module folder (accel/dbt, cpu/x86), not the layer's siblings."""
    rule = rule_for(path)
    return os.path.dirname(path) if rule is None else (os.path.dirname(path) if rule.endswith((".h", ".c")) else rule)


def without_comments(text):
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)


def files(*extensions):
    for folder, _, names in os.walk(SRC):
        for name in sorted(names):
            if name.endswith(extensions):
                yield os.path.relpath(os.path.join(folder, name), SRC)


def check_includes(path, text):
    problems = []
    rule = rule_for(path)
    if rule is None:
        return [f"src/{path}: its folder is not in tests/include_rules.py; add it to MAY_INCLUDE at its layer"]
    for kind, name in INCLUDE.findall(text):
        if kind == "<":
            for header, owners in ONLY.items():
                if (name == header or (header.endswith("/") and name.startswith(header))) and not under(path, owners):
                    problems.append(f"src/{path} includes <{name}>: only {', '.join(owners)} may")
            continue
        # Our includes are written from src/; one next to the file would hide its layer.
        if not os.path.exists(os.path.join(SRC, name)):
            if not name.endswith("_aml.h"):  # compiled from ASL into the build folder
                problems.append(f'src/{path} includes "{name}": write the path from src/, like "base/error.h"')
            continue
        if not under(name, [own_folder(path)] + MAY_INCLUDE[rule]):
            problems.append(f'src/{path} includes "{name}": {rule}/ may include only {", ".join(MAY_INCLUDE[rule]) or "nothing"}')
    return problems


def check_words(path, text):
    return [f"src/{path} says {pattern}: only {', '.join(owners)} may"
            for pattern, owners in ONLY_WORDS.items()
            if re.search(pattern, text) and not under(path, owners)]


def check_header(path, text):
    problems = []
    if not text.lstrip().startswith("/*"):
        problems.append(f"src/{path} does not start with a comment that says what it is")
    # Twice in an otherwise empty file: complete, and guarded.
    source = f'#include "{path}"\n#include "{path}"\n'
    r = subprocess.run(["cc", "-std=gnu11", "-D_GNU_SOURCE", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I", SRC,
                        "-x", "c", "-"], input=source, text=True, capture_output=True)
    if r.returncode:
        problems.append(f"src/{path} does not compile alone:\n{r.stderr.strip()}")
    return problems


def main():
    passed = failed = 0
    for path in files(".c", ".h"):
        with open(os.path.join(SRC, path), encoding="utf-8") as f:
            text = f.read()
        problems = check_includes(path, text) + check_words(path, without_comments(text))
        if path.endswith(".h"):
            problems += check_header(path, text)
        for problem in problems:
            print(problem)
        failed += bool(problems)
        passed += not problems
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
