#!/usr/bin/python3
"""Light code of the translator runs with the guest's FPU state in the host registers, so it may call only light code: not
memset, which the compiler likes to make of a loop and which uses vector registers.

Usage: light_calls.py ARCHIVE   (of the light objects). Follows the direct calls from the functions below; status 1 with a line for
each that leaves the archive. Calls through pointers are not seen.
"""
import re
import subprocess
import sys

# Called by translated code, or by the dispatcher and its helpers before they have saved the guest's FPU state.
ROOTS = re.compile(r"dbt_(help_\w+|fill|tlb_flush|stack_window_drop|itlb|token_set|tb_lookup|tb_by_host|shadow_select|mode|enter)$|pte_hva$")

# Sanitizers' instrumentation: reports of failures; nothing matters after those.
SANITIZER = ("__asan_report_", "__asan_handle_no_return", "__ubsan_handle_")

FUNCTION = re.compile(r"^[0-9a-f]+ <([^>]+)>:$")
BRANCH = re.compile(r"\t(?:call|jmp|j\w+) +[0-9a-f]+ <([^>+]+)(\+0x[0-9a-f]+)?>$")
RELOCATION = re.compile(r"R_X86_64_(?:PLT32|PC32|GOTPCRELX?|REX_GOTPCRELX)\s+([^\s+-]+)")


def call_graph(archive):
    """Function -> names it calls or jumps to. A static function's name stands for all of that name."""
    text = subprocess.run(["objdump", "-dr", "--no-show-raw-insn", archive], check=True, capture_output=True, text=True).stdout
    calls, function, branch = {}, None, None
    for line in text.splitlines():
        if m := FUNCTION.match(line):
            function = m.group(1)
            calls.setdefault(function, set())
        elif m := RELOCATION.search(line):
            if branch:
                target = m.group(1)
                calls[function].add(function + ".cold" if target.startswith(".text.unlikely") else target)
                branch = None
        else:
            if branch:
                calls[function].add(branch)
            m = BRANCH.search(line)
            branch = m.group(1) if m else None
            if branch and branch.split(".")[0] == function.split(".")[0] and m.group(2) and ".cold" not in branch:
                # Inside itself, or the zero displacement of a relocation that follows.
                branch = function
    return calls


def main():
    calls = call_graph(sys.argv[1])
    roots = sorted(f for f in calls if ROOTS.match(f))
    if len(roots) < 20:
        print(f"{sys.argv[1]}: only {len(roots)} light entry points found; did their names change?")
        return 1
    came_from, queue, failed = {f: None for f in roots}, list(roots), 0
    while queue:
        function = queue.pop()
        for target in sorted(calls[function]):
            if target in came_from or target.startswith((".text", ".rodata", ".L")) or target.startswith(SANITIZER):
                continue
            came_from[target] = function
            if target in calls:
                queue.append(target)
                continue
            path, at = [target], function
            while at:
                path.append(at)
                at = came_from[at]
            print(" <- ".join(path) + ": not light")
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
