"""An image of one program that waits, made from nothing: what holds a container's network. Pure.

No registry is asked, and no program of the host is copied: the program is a dozen instructions.
Sources: elf(5), pause(2), ppoll(2), the image specification 1.2 of moby (docker-archive).
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass

BASE = 0x400000  # where the program is mapped

#: By the machine: its name in an image, its number in elf(5), instructions that sleep for ever.
PROGRAMS = {
    # mov eax, 34 (pause); syscall; jmp back
    "x86_64": ("amd64", 62, bytes.fromhex("b822000000 0f05 ebf7")),
    # mov x0..x3, 0; mov x8, 73 (ppoll); svc 0; b back
    "aarch64": (
        "arm64",
        183,
        struct.pack(
            "<7I",
            *(0xD2800000, 0xD2800001, 0xD2800002, 0xD2800003),
            *(0xD2800928, 0xD4000001, 0x17FFFFFA),
        ),
    ),
}
NAME = "ttp-holder"
HEADER, SEGMENT = 64, 56  # bytes of Elf64_Ehdr and Elf64_Phdr


@dataclass(frozen=True)
class Image:
    """An image by ``tag``, which changes with its content; ``archive`` is for docker load."""

    tag: str
    archive: bytes


def image(machine: str) -> Image:
    """The image for a machine, by uname(2). Raises KeyError if there is no program for it."""
    layer = _tar({"pause": program(machine)})
    config = {
        "architecture": PROGRAMS[machine][0],
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        # the first process of a namespace does not notice other signals: pid_namespaces(7)
        "config": {"Entrypoint": ["/pause"], "StopSignal": "SIGKILL"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "ttp"}],
    }
    text = json.dumps(config, sort_keys=True).encode()
    digest = hashlib.sha256(text).hexdigest()
    tag = f"{NAME}:{digest[:12]}"
    name = f"{digest}.json"
    manifest = [{"Config": name, "RepoTags": [tag], "Layers": ["layer.tar"]}]
    files = {"manifest.json": json.dumps(manifest).encode(), name: text, "layer.tar": layer}
    return Image(tag, _tar(files))


def program(machine: str) -> bytes:
    """A static executable of one segment: headers and instructions, mapped as they are."""
    _, number, code = PROGRAMS[machine]
    start = HEADER + SEGMENT
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian, version 1
    executable, version = 2, 1
    sizes = (HEADER, SEGMENT, 1, 0, 0, 0)
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH", executable, number, version, BASE + start, HEADER, 0, 0, *sizes
    )
    load, read_and_execute, size = 1, 5, start + len(code)
    segment = struct.pack("<IIQQQQQQ", load, read_and_execute, 0, BASE, BASE, size, size, BASE)
    return header + segment + code


def _tar(files: dict[str, bytes]) -> bytes:
    """A tar archive (POSIX ustar) that is the same whenever and wherever it is made."""
    blocks = []
    for name, content in files.items():
        head = struct.pack(
            "100s8s8s8s12s12s8s1s100s6s2s",
            *(name.encode(), b"0000755", b"0000000", b"0000000", b"%011o" % len(content)),
            *(b"%011o" % 0, b" " * 8, b"0", b"", b"ustar", b"00"),
        ).ljust(512, b"\0")
        total = b"%06o\0 " % sum(head)
        blocks += [head[:148] + total + head[156:], content, bytes(-len(content) % 512)]
    return b"".join(blocks) + bytes(1024)
