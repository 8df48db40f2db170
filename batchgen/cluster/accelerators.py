"""Compute capability and memory of GPUs by the names that Ray gives them."""

from __future__ import annotations

import re

from batchgen.records import DeviceInfo

# Name -> compute capability (developer.nvidia.com/cuda-gpus), GiB that torch can use, rounded down.
# A name with several sizes of memory has the smallest.
KNOWN: dict[str, tuple[tuple[int, int], int]] = {
    "K80": ((3, 7), 11),
    "P100": ((6, 0), 11),
    "P4": ((6, 1), 7),
    "V100": ((7, 0), 15),
    "T4": ((7, 5), 14),
    "A100": ((8, 0), 39),
    "A100-40G": ((8, 0), 39),
    "A100-80G": ((8, 0), 79),
    "A30": ((8, 0), 23),
    "A10": ((8, 6), 22),
    "A10G": ((8, 6), 22),
    "A40": ((8, 6), 44),
    "RTX-A4000": ((8, 6), 15),
    "RTX-A5000": ((8, 6), 23),
    "RTX-A6000": ((8, 6), 47),
    "GeForce-RTX-3090": ((8, 6), 23),
    "L4": ((8, 9), 22),
    "L40": ((8, 9), 44),
    "L40S": ((8, 9), 44),
    "GeForce-RTX-4090": ((8, 9), 23),
    "H20": ((9, 0), 94),
    "H100": ((9, 0), 79),
    "H200": ((9, 0), 139),
    "GH200": ((9, 0), 94),
    "B200": ((10, 0), 177),
    "GB200": ((10, 0), 177),
    "B300": ((10, 3), 260),
    "GB300": ((10, 3), 260),
    "RTX-PRO-6000": ((12, 0), 94),
    "GeForce-RTX-5090": ((12, 0), 31),
}
# Other GPUs that NVIDIA sold before those with bfloat16. (Quadro RTX 6000 and RTX 6000 Ada have one
# name; the older one counts.)
OLDER = re.compile(r"(GeForce-)?(GTX|MX\d|RTX-20[678]0)|TITAN|Quadro|[KMPT]\d+$|RTX-[3-8]000$")
OLDER_AT_MOST = (7, 5)


def named(name: str) -> DeviceInfo:
    """The GPU that Ray calls by this name; its memory is 0 and its capability None if unknown."""
    if name in KNOWN:
        capability, gib = KNOWN[name]
        return DeviceInfo(name, gib << 30, capability)
    return DeviceInfo(name, 0, OLDER_AT_MOST if OLDER.match(name) else None)
