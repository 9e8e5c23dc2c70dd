"""Files of lines that one process appends to while another reads them, and that survive the writer's death."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Self, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

T = TypeVar("T")


class Writer:
    """Appends lines; each is with the system, and so with all readers, when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: object) -> None:
        """Append a value as a line of JSON."""
        self._file.write(msgspec.json.encode(line) + b"\n")


class Reader(Generic[T]):
    """Reads complete lines of one type, from where it read last; the file need not exist yet."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        self._path = path
        self._decoder = msgspec.json.Decoder(kind)
        self._offset = 0

    def read(self) -> Iterator[T]:
        """Yield the lines that were completed since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield self._decoder.decode(line)
