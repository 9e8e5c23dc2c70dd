"""Feed the targets with ever new inputs, guided by coverage: ``nox -s fuzz -- --seconds 60``.

Atheris instruments the package and decides which inputs are worth changing further; `mutations` changes JSON as such.
An input that breaks a promise is printed with its target: put it into that target's folder of ``corpus``, and fix.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import atheris

with atheris.instrument_imports(include=["aiokeyless", "fuzz.targets"]):
    from .targets import TARGETS, check

from .corpus import inputs_of
from .mutations import mutate

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = sorted(TARGETS)
GENERIC = 0.2  # share of the inputs that libFuzzer changes by its own means
#: Share of the inputs that are made from the committed ones: libFuzzer forgets those whose like it saw in the package,
#: and does not see what msgspec does.
COMMITTED = 0.5
LARGEST = 8192  # bytes of an input


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s fuzz --", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=int, default=60, help="how long; default: 60")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; 0, the default: another each time")
    parser.add_argument("--target", choices=NAMES, action="append", help="may be repeated; default: all")
    options = parser.parse_args()
    fuzz(options.target or NAMES, Path(tempfile.mkdtemp()), seconds=options.seconds, seed=options.seed)


def fuzz(names: Sequence[str], folder: Path, *, seconds: int, seed: int) -> None:
    """Fuzz the targets until the time is up; ends the process."""
    # The first byte of an input says which target it is for.
    committed = [bytes([number]) + data for number, name in enumerate(names) for data in inputs_of(name)]
    for number, data in enumerate(committed):
        (folder / str(number)).write_bytes(data)

    def run(data: bytes) -> None:
        if data:
            name = names[data[0] % len(names)]
            try:
                check(name, data[1:])
            except BaseException:  # whatever it was, Atheris reports it without the input
                print(f"\ntarget {name}, input {data[1:]!r}", file=sys.stderr)  # noqa: T201  # Atheris shows no notes
                raise

    def changed(data: bytes, largest: int, seed: int) -> bytes:
        random = Random(seed)  # noqa: S311
        if not data or random.random() < GENERIC:
            return bytes(atheris.Mutate(data, largest))
        if random.random() < COMMITTED:
            data = random.choice(committed)
        return data[:1] + mutate(data[1:], random)[: largest - 1]

    limits = (f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-timeout=60", f"-seed={seed}")
    output = (f"-artifact_prefix={folder}/", "-verbosity=0", "-print_final_stats=1")
    atheris.Setup([sys.argv[0], *limits, *output, str(folder)], run, custom_mutator=changed)
    atheris.Fuzz()


main()
