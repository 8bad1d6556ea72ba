#!/usr/bin/python3
"""The one test runner: meson's unit tests and fuzzers, the include rules, the integration tests.

Ends with "N passed, N failed, N skipped" alone on a line; status 1 if anything failed, or if nothing ran.
Usage: scripts/test.py [--build DIR] [-k EXPRESSION] [--only unit|rules|integration]
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = "/usr/bin/python3"  # Debian's, which has pytest and pexpect; another may be first in PATH
SLOW = 5.0  # seconds


class Totals:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.slow = []
        self.failures = []
        self.skips = []  # sentences

    def add(self, name, result, seconds):
        if result == "pass":
            self.passed += 1
        elif result == "skip":
            self.skipped += 1
        else:
            self.failed += 1
            self.failures.append(name)
        if seconds >= SLOW:
            self.slow.append((seconds, name))


def heading(text):
    print(f"\n== {text}", flush=True)


def add_guest_skips(totals, name, output):
    """A guest test says by name what it cannot run on this host: "skip   MODE: why", "skip   MODE, \"SECTION\": why"."""
    for why in re.findall(r"^skip +(.+)$", output or "", re.M):
        totals.skipped += 1
        totals.skips.append(f"{name}: {why}")


def run_unit(totals, build):
    heading("unit tests and fuzzers")
    log = os.path.join(build, "meson-logs", "testlog.json")
    if os.path.exists(log):
        os.remove(log)
    status = subprocess.run(["meson", "test", "-C", build, "--no-rebuild", "--print-errorlogs"], cwd=ROOT).returncode
    ran = 0
    if os.path.exists(log):
        with open(log, encoding="utf-8") as f:
            for line in f:
                test = json.loads(line)
                ran += 1
                result = {"OK": "pass", "SKIP": "skip", "EXPECTEDFAIL": "pass"}.get(test["result"], "fail")
                totals.add(test["name"], result, test["duration"])
                if test["name"].startswith("guest ") and result == "pass":
                    add_guest_skips(totals, test["name"], test.get("stdout"))
    if status and not totals.failed:
        totals.add("meson test", "fail", 0)
    if not ran:
        totals.add("meson test ran nothing; is libcmocka-dev installed?", "fail", 0)


def run_rules(totals):
    heading("include rules")
    start = time.monotonic()
    r = subprocess.run([PYTHON, "tests/include_rules.py"], cwd=ROOT, text=True, capture_output=True)
    sys.stdout.write(r.stdout)
    sys.stderr.write(r.stderr)
    counts = re.findall(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", r.stdout, re.M)
    if not counts:
        totals.add("include rules", "fail", 0)
        return
    totals.passed += int(counts[-1][0])
    totals.failed += int(counts[-1][1])
    if int(counts[-1][1]):
        totals.failures.append("include rules")
    if time.monotonic() - start >= SLOW:
        totals.slow.append((time.monotonic() - start, "include rules"))


def run_integration(totals, build, expression):
    heading("integration tests")
    guest = subprocess.run(["scripts/guest.sh", "cloud", "amd64"], cwd=ROOT)
    if guest.returncode:
        totals.add("the demo guest could not be made", "fail", 0)
    with tempfile.TemporaryDirectory() as scratch:
        report = os.path.join(scratch, "report.xml")
        command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-ra", "--junitxml", report, "tests/integration"]
        if expression:
            command += ["-k", expression]
        env = dict(os.environ, TRAPLINE=os.path.join(build, "trapline"), PYTHONDONTWRITEBYTECODE="1")
        status = subprocess.run(command, cwd=ROOT, env=env).returncode
        if not os.path.exists(report):
            totals.add("pytest did not run", "fail", 0)
            return
        failed_before = totals.failed
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            result = "fail" if kinds & {"failure", "error"} else "skip" if "skipped" in kinds else "pass"
            totals.add(case.get("name"), result, float(case.get("time", 0)))
        # 5: nothing matched -k, which is fine.
        if status not in (0, 5) and totals.failed == failed_before:
            totals.add(f"pytest ended with status {status}", "fail", 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build")
    parser.add_argument("-k", dest="expression", help="run only the integration tests that match (as pytest -k)")
    parser.add_argument("--only", choices=["unit", "rules", "integration"])
    options = parser.parse_args()
    build = os.path.join(ROOT, options.build)
    only = options.only or ("integration" if options.expression else None)

    totals = Totals()
    start = time.monotonic()
    if only in (None, "unit"):
        run_unit(totals, build)
    if only in (None, "rules"):
        run_rules(totals)
    if only in (None, "integration"):
        run_integration(totals, build, options.expression)

    if totals.slow:
        heading(f"slower than {SLOW:.0f} s")
        for seconds, name in sorted(totals.slow, reverse=True)[:20]:
            print(f"{seconds:8.1f} s  {name}")
    if totals.skips:
        heading("skipped by guests")
        for why in totals.skips:
            print(f"  {why}")
    if totals.failures:
        heading("failed")
        for name in totals.failures:
            print(f"  {name}")
    heading(f"done in {time.monotonic() - start:.0f} s")
    print(f"{totals.passed} passed, {totals.failed} failed, {totals.skipped} skipped", flush=True)
    return 1 if totals.failed or not totals.passed else 0


if __name__ == "__main__":
    sys.exit(main())
