"""The committed inputs: a folder for each target, a file for each input."""

from __future__ import annotations

from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).with_name("corpus")


def inputs_of(target: str) -> list[bytes]:
    """Return the inputs of one target, in the order of their names."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
