#!/usr/bin/python3
"""Light code of the translator runs with the guest's FPU state in the host registers, so it may call only light code: not
memset, which the compiler likes to make of a loop and which uses vector registers.

Usage: light_calls.py ARCHIVE OBJECT...   (objects of that archive, by the end of their names). Status 1 with a line for each call
that leaves.
"""
import subprocess
import sys

# Sanitizers' instrumentation: reports of failures (nothing matters after those), set-up and names.
SANITIZER = ("__asan_report_", "__asan_init", "__asan_version", "__asan_register", "__asan_unregister", "__asan_option",
             "__asan_stack_", "__asan_handle_no_return", "__ubsan_handle_")


def symbols(archive):
    """Object -> (defined, undefined)."""
    out = subprocess.run(["nm", "-A", archive], check=True, capture_output=True, text=True).stdout
    result = {}
    for line in out.splitlines():
        where, rest = line.rsplit(":", 1) if ":" in line else ("", "")
        words = rest.split()
        if len(words) >= 2:
            defined, undefined = result.setdefault(where.split(":")[-1], (set(), set()))
            (undefined if words[-2] in "Uw" else defined).add(words[-1])
    return result


def main():
    archive, wanted = sys.argv[1], sys.argv[2:]
    objects = symbols(archive)
    light = set().union(*(defined for defined, _ in objects.values()))
    failed = 0
    for name in wanted:
        found = [o for o in objects if o.endswith(name)]
        if len(found) != 1:
            print(f"{name}: {len(found)} such objects in {archive}")
            failed += 1
            continue
        for call in sorted(objects[found[0]][1] - light):
            if not call.startswith(SANITIZER):
                print(f"{name} calls {call}, which is not light")
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
