#!/usr/bin/env python3
"""Compile an ASL file with iasl and write the AML as a C array: embed.py IASL INPUT.asl OUTPUT.h NAME"""
import os
import subprocess
import sys
import tempfile

iasl, source, output, name = sys.argv[1:]
with tempfile.TemporaryDirectory() as tmp:
    prefix = os.path.join(tmp, name)
    # -we: warnings are errors, -vr: no remarks, -vs: no signon
    run = subprocess.run([iasl, "-we", "-vr", "-vs", "-p", prefix, source], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode:
        sys.stderr.buffer.write(run.stdout)
        sys.exit(run.returncode)
    with open(prefix + ".aml", "rb") as f:
        aml = f.read()

with open(output, "w") as f:
    f.write(f"/* Generated from {os.path.basename(source)}. */\nstatic const unsigned char {name}[{len(aml)}] = {{\n")
    for i in range(0, len(aml), 16):
        f.write("\t" + " ".join(f"0x{b:02x}," for b in aml[i:i + 16]) + "\n")
    f.write("};\n")
