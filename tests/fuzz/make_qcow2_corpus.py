#!/usr/bin/python3
"""Make the corpus of fuzz_qcow2.c anew: small images of many kinds, made by qemu-img, in the form that the fuzzer reads.

Usage: make_qcow2_corpus.py FOLDER
"""
import os
import struct
import subprocess
import sys
import tempfile

IMAGES = {
    "v2": "qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=512 image 48k",
    "v3": "qemu-img create -q -f qcow2 -o cluster_size=512 image 48k; qemu-io -c 'write -P 0 1k 3k' -c 'write -z 8k 4k' image",
    "64k": "qemu-img create -q -f qcow2 image 1M; qemu-io -c 'write -P 0 1k 3k' -c 'write -z 128k 64k' image",
    "2m": "qemu-img create -q -f qcow2 -o cluster_size=2M image 1G; qemu-io -c 'write -P 0 1k 3k' image",
    "1bit": "qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=1 image 48k; qemu-io -c 'write -P 0 1k 9k' image",
    "64bit": "qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 image 48k; qemu-io -c 'write -P 0 1k 9k' image",
    "zlib": "qemu-img create -q -f qcow2 -o cluster_size=4k image 48k; qemu-io -c 'write -c -P 1 0 12k' -c 'write -c -P 2 16k 4k' image",
    "zstd": "qemu-img create -q -f qcow2 -o cluster_size=4k,compression_type=zstd image 48k; qemu-io -c 'write -c -P 1 0 12k' image",
    "snapshots": "qemu-img create -q -f qcow2 -o cluster_size=512 image 8k; qemu-io -c 'write -P 1 1k 2k' image; qemu-img snapshot -c a image;"
                 "qemu-io -c 'write -P 2 2k 2k' image; qemu-img snapshot -c b image",
    "dirty": "qemu-img create -q -f qcow2 -o cluster_size=512,lazy_refcounts=on image 8k; qemu-io -c 'write -P 1 1k 2k' -c flush -c 'sigraise 9' image",
    "dirty-snapshot": "qemu-img create -q -f qcow2 -o cluster_size=4k,lazy_refcounts=on image 64k; qemu-io -c 'write -P 0 4k 8k' image; qemu-img snapshot -c a image;"
                      "qemu-io -c 'write -P 0 8k 8k' -c flush -c 'sigraise 9' image",
    "backing": "truncate -s 16k raw; qemu-img create -q -u -f qcow2 -b /dev/null -F raw -o cluster_size=512 image 16k",
    "prealloc": "qemu-img create -q -f qcow2 -o cluster_size=4k,preallocation=metadata image 64k",
    "bitmap": "qemu-img create -q -f qcow2 -o cluster_size=4k image 64k; qemu-img bitmap --add image b",
}

# What, offset, length: a bit of everything, then the same after opening again.
OPS = [(0, 0, 15), (1, 2, 7), (5, 0, 0), (0, 0, 63), (2, 8, 16), (1, 17, 0), (3, 24, 31), (4, 0, 12), (1, 0, 40), (5, 0, 0), (1, 70, 5), (6, 0, 0), (0, 0, 255),
       (1, 1, 2), (5, 0, 0), (4, 0, 255), (5, 0, 0), (5, 0, 0), (1, 3, 60), (7, 0, 0), (0, 0, 255)]


def encode(image, flags):
    out = bytes([flags, len(OPS)]) + b"".join(struct.pack("<BHB", *op) for op in OPS)
    out += struct.pack("<H", (len(image) + 511) // 512)
    for sector in range(0, (len(image) + 511) // 512):
        piece = image[sector * 512:sector * 512 + 512].rstrip(b"\0")
        if piece:
            out += struct.pack("<HH", sector, len(piece)) + piece
    return out


def main():
    folder = os.path.abspath(sys.argv[1])
    os.makedirs(folder, exist_ok=True)
    for name, command in IMAGES.items():
        with tempfile.TemporaryDirectory() as d:
            subprocess.run(["sh", "-c", command], cwd=d, stdout=subprocess.DEVNULL, check=False)
            with open(os.path.join(d, "image"), "rb") as f:
                image = f.read()
        for flags, suffix in (0, ""), (1, "-layer"):
            data = encode(image, flags)
            print(f"{name}{suffix}: {len(data)}")
            with open(os.path.join(folder, name + suffix), "wb") as f:
                f.write(data)


main()
