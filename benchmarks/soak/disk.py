"""A small disk of its own, which can be filled; it takes a user who may mount one."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """Mount a disk of this size until the end of the block.

    Raises:
        PermissionError: This user may not mount one.
    """
    with tempfile.TemporaryDirectory(prefix="aiokeyless-disk-", dir="/tmp") as place:  # for a short path
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place]
        done = subprocess.run(mount, check=False, capture_output=True, text=True)  # noqa: S603  # our own words
        if done.returncode != 0:
            raise PermissionError(done.stderr)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)  # noqa: S603, S607  # of the system


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave no room on a disk until the end of the block."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()
