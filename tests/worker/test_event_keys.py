"""Event keys: only what a worker signed passes, keys can be rotated, and no message or repr holds a key."""

from __future__ import annotations

import copy
import pickle
import traceback
from typing import TYPE_CHECKING

import pytest

from aiokeyless import ConfigurationError
from aiokeyless.worker import EventKeys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OLD, NEW = "old-" * 8, "new-" * 8
EVENT = b'{"outcome": "approved"}'
KEYS = EventKeys(OLD)
SIGNATURE = KEYS.sign(EVENT, fleet="keyless")


def test_what_was_signed_passes() -> None:
    assert KEYS.are_of(EVENT, SIGNATURE, fleet="keyless")


@pytest.mark.parametrize(
    ("data", "signature", "fleet"),
    [
        (b'{"outcome": "failed"}', SIGNATURE, "keyless"),
        (EVENT, SIGNATURE, "staging"),
        (EVENT, None, "keyless"),
        (EVENT, "", "keyless"),
        (EVENT, SIGNATURE.replace("v1", "v2"), "keyless"),
        (EVENT, SIGNATURE[:-1], "keyless"),
        (EVENT, SIGNATURE + "0", "keyless"),
        (EVENT, SIGNATURE[:-1] + "\u00e9", "keyless"),
        (EVENT, EventKeys(NEW).sign(EVENT, fleet="keyless"), "keyless"),
        (EVENT, SIGNATURE.rpartition(" ")[0], "keyless"),
    ],
)
def test_anything_else_does_not(data: bytes, signature: str | None, fleet: str) -> None:
    assert not KEYS.are_of(data, signature, fleet=fleet)


def test_a_signature_never_changes_from_release_to_release() -> None:
    assert SIGNATURE == "v1 d1136499c395ca36 b4cf6e582a83461627ea345a529dbebb641d5f0d9f5eab4baa1bb6709ffbbe3d"


def test_the_first_key_signs_and_each_is_accepted_so_that_keys_can_be_rotated() -> None:
    both, rotated = EventKeys(OLD, NEW), EventKeys(NEW, OLD)
    assert both.sign(EVENT, fleet="a") == EventKeys(OLD).sign(EVENT, fleet="a")
    assert rotated.sign(EVENT, fleet="a") == EventKeys(NEW).sign(EVENT, fleet="a")
    for keys in (both, rotated):
        for signer in (OLD, NEW):
            assert keys.are_of(EVENT, EventKeys(signer).sign(EVENT, fleet="a"), fleet="a")


def test_files_hold_a_key_a_line(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(f"\n{NEW}\n")
    second.write_text(OLD)
    keys = EventKeys.from_files(first, str(second))
    assert keys.sign(EVENT, fleet="a") == EventKeys(NEW).sign(EVENT, fleet="a")
    assert keys.are_of(EVENT, EventKeys(OLD).sign(EVENT, fleet="a"), fleet="a")


def test_the_environment_holds_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYLESS_EVENT_KEY", raising=False)
    assert EventKeys.from_environment() is None
    monkeypatch.setenv("KEYLESS_EVENT_KEY", " ")
    assert EventKeys.from_environment() is None
    monkeypatch.setenv("KEYLESS_EVENT_KEY", f"{NEW} {OLD}")
    keys = EventKeys.from_environment()
    assert keys is not None
    assert keys.sign(EVENT, fleet="a") == EventKeys(NEW).sign(EVENT, fleet="a")


def from_file(tmp_path: Path, content: bytes) -> EventKeys:
    path = tmp_path / "key"
    path.write_bytes(content)
    return EventKeys.from_files(path)


SECRET = "s3cret" * 5


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda _: EventKeys(), "there is no event key"),
        (lambda _: EventKeys(OLD, SECRET), "event key 2 must be 32 or more printable ASCII characters"),
        (lambda _: EventKeys(SECRET + " " + SECRET), "event key 1 must be"),
        (lambda _: EventKeys(SECRET + "\u00e9" * 9), "event key 1 must be"),
        (lambda folder: from_file(folder, SECRET.encode()), "event key 1 must be"),
        (lambda folder: from_file(folder, b"\n"), "there is no event key"),
        (lambda folder: from_file(folder, SECRET.encode() + b"\xff"), "it is not ASCII text"),
        (lambda folder: EventKeys.from_files(folder / "none"), "none: No such file or directory"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(
    tmp_path: Path, read: Callable[[Path], EventKeys], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        read(tmp_path)
    assert SECRET not in str(caught.value)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    library = [frame for frame in frames.stack if "event_keys.py" in frame.filename and "tests" not in frame.filename]
    assert library
    assert SECRET not in str([frame.locals for frame in library])


def test_keys_are_not_shown_and_do_not_leave_the_process() -> None:
    assert OLD not in repr(KEYS)
    for leave in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            leave(KEYS)
