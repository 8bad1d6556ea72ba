#!/usr/bin/python3
"""Take the uncompressed kernel (an ELF file) out of a vmlinuz. Usage: scripts/vmlinux.py VMLINUZ OUTPUT

Where the payload is, the boot protocol tells (Linux Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length);
its first bytes say what compressed it, and a program of that name takes it apart.
"""
import struct
import subprocess
import sys

# Magic number -> what decompresses a stream. The payload ends in four bytes of its size, which none of them wants.
PROGRAMS = {
    b"\x02\x21\x4c\x18": ["lz4", "-dc"],
    b"\x28\xb5\x2f\xfd": ["zstd", "-dc"],
    b"\x1f\x8b": ["gzip", "-dc"],
    b"\xfd7zXZ": ["xz", "-dc"],
}


def extract(image):
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise ValueError("not a Linux bzImage")
    setup_sects = image[0x1f1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[(setup_sects + 1) * 512 + offset:][:length]
    for magic, program in PROGRAMS.items():
        if payload.startswith(magic):
            r = subprocess.run(program, input=payload[:-4], capture_output=True)
            if r.stdout.startswith(b"\x7fELF"):
                return r.stdout
            raise ValueError(f"{program[0]} cannot take its payload apart: {r.stderr.decode(errors='replace').strip()}")
    raise ValueError(f"its payload is compressed in a way that is not known here ({payload[:4].hex()})")


def main():
    if len(sys.argv) != 3:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    try:
        with open(sys.argv[1], "rb") as f:
            kernel = extract(f.read())
    except (OSError, ValueError) as e:
        print(f"vmlinux: {sys.argv[1]}: {e}", file=sys.stderr)
        return 1
    with open(sys.argv[2], "wb") as f:
        f.write(kernel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
