"""Event keys: only what a worker signed passes, keys can be rotated, and no message or repr holds a key."""

from __future__ import annotations

import copy
import pickle
import secrets
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from error_reports import reports

from aiokeyless import ConfigurationError
from aiokeyless.ticket import payload_digest
from aiokeyless.worker import Outcome
from aiokeyless.worker.nats import EventKeys
from aiokeyless.worker.nats.event_keys import is_about

from ..reading import an_event  # noqa: TID252

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OLD, NEW = "old-" * 8, "new-" * 8
EVENT = b'{"outcome": "approved"}'
KEYS = EventKeys(OLD)
UNTYPED: Any = EventKeys  # as from code that no type checker has seen
SIGNATURE = KEYS.sign(EVENT, fleet="keyless")


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
    assert not KEYS.verify(data, signature, fleet=fleet)


def test_a_signature_never_changes_from_release_to_release() -> None:
    assert SIGNATURE == "v1 d1136499c395ca36 b4cf6e582a83461627ea345a529dbebb641d5f0d9f5eab4baa1bb6709ffbbe3d"


def test_the_first_key_signs_and_each_is_accepted_so_that_keys_can_be_rotated() -> None:
    both, rotated = EventKeys(OLD, NEW), EventKeys(NEW, OLD)
    assert both.sign(EVENT, fleet="a") == EventKeys(OLD).sign(EVENT, fleet="a")
    assert rotated.sign(EVENT, fleet="a") == EventKeys(NEW).sign(EVENT, fleet="a")
    for keys in (both, rotated):
        for signer in (OLD, NEW):
            assert keys.verify(EVENT, EventKeys(signer).sign(EVENT, fleet="a"), fleet="a")


def test_files_hold_a_key_a_line(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(f"\n{NEW}\n")
    second.write_text(OLD)
    keys = EventKeys.from_files(first, str(second))
    assert keys.sign(EVENT, fleet="a") == EventKeys(NEW).sign(EVENT, fleet="a")
    assert keys.verify(EVENT, EventKeys(OLD).sign(EVENT, fleet="a"), fleet="a")


def test_the_environment_holds_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYLESS_EVENT_KEY", raising=False)
    assert EventKeys.from_environment() is None
    monkeypatch.setenv("KEYLESS_EVENT_KEY", " ")
    assert EventKeys.from_environment() is None
    monkeypatch.setenv("KEYLESS_EVENT_KEY", f"{NEW} {OLD}")
    keys = EventKeys.from_environment()
    assert keys is not None
    assert keys.sign(EVENT, fleet="a") == EventKeys(NEW).sign(EVENT, fleet="a")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda _: EventKeys(), "there is no event key"),
        (lambda _: EventKeys(OLD, "short"), "event key 2 must be 32 or more printable ASCII characters"),
        (lambda _: EventKeys(OLD + " " + NEW), "event key 1 must be 32"),
        (lambda _: EventKeys(OLD + "\u00e9"), "event key 1 must be 32"),
        (lambda _: UNTYPED(OLD, NEW.encode()), "event key 2 must be text, not bytes"),
        (lambda path: EventKeys.from_files(path("short")), "event key 1 must be 32"),
        (lambda path: EventKeys.from_files(path("\n")), "there is no event key"),
        (lambda path: EventKeys.from_files(path(OLD + "\u00e9")), "event key 1 must be 32"),
        (lambda path: EventKeys.from_files(path(OLD).parent / "none"), "none: No such file or directory"),
        (lambda path: UNTYPED.from_files(path(OLD), None), "from None: expected str, bytes or os.PathLike"),
        (lambda path: EventKeys.from_files(path(OLD), "a\0b"), "embedded null byte"),
    ],
)
def test_what_is_no_key_is_refused_with_the_reason(
    tmp_path: Path, read: Callable[[Callable[[str], Path]], EventKeys], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        read(partial(written, tmp_path))
    assert caught.value.argument in {"keys", "paths"}


def written(folder: Path, content: str) -> Path:
    path = folder / "key"
    path.write_text(content, encoding="utf-8")
    return path


# Made here, so that no line of source that a reporter quotes holds it.
SECRET = secrets.token_hex(32)
MISTAKES: dict[str, Callable[[Path], object]] = {
    "bytes": lambda _: UNTYPED(SECRET.encode()),
    "a key and None": lambda _: UNTYPED(SECRET, None),
    "a list": lambda _: UNTYPED([SECRET]),
    "a blank in it": lambda _: EventKeys(SECRET + " " + SECRET),
    "the second one too short": lambda _: EventKeys(SECRET, "short"),
    "a file that is not ASCII": lambda folder: EventKeys.from_files(written(folder, SECRET + "\u00e9")),
    "a file with a key too short": lambda folder: EventKeys.from_files(written(folder, SECRET + "\nshort")),
    "a file and None": lambda folder: UNTYPED.from_files(written(folder, SECRET), None),
    "a file and none": lambda folder: EventKeys.from_files(written(folder, SECRET), folder / "none"),
    "a file and a folder": lambda folder: EventKeys.from_files(written(folder, SECRET), folder),
    "a file and an odd name": lambda folder: EventKeys.from_files(written(folder, SECRET), "a\0b"),
    "the environment": lambda _: EventKeys.from_environment(),
    "text that is signed": lambda _: UNTYPED(SECRET).sign("text", fleet="a"),
    "no fleet that signs": lambda _: UNTYPED(SECRET).sign(b"", fleet=None),
    "text that is checked": lambda _: verifies(EventKeys(SECRET), "text", "a"),
    "no fleet that checks": lambda _: verifies(EventKeys(SECRET), b"", None),
    "a pickle": lambda _: pickle.dumps(EventKeys(SECRET)),
}


def verifies(keys: EventKeys, data: Any, fleet: Any) -> bool:
    return keys.verify(data, keys.sign(b"", fleet="a"), fleet=fleet)


@pytest.mark.parametrize("make", MISTAKES.values(), ids=MISTAKES.keys())
def test_no_report_of_a_mistake_shows_a_key(
    tmp_path: Path, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYLESS_EVENT_KEY", f"{SECRET} short")
    with pytest.raises((ConfigurationError, TypeError, AttributeError)) as caught:
        make(tmp_path)
    error = caught.value
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next  # the caller's own frames know the key
    assert traceback is not None
    assert SECRET not in repr(error.__context__)  # an error of decoding has what it could not decode
    for name, text in reports(error.with_traceback(traceback)).items():
        assert type(error).__name__ in text
        assert SECRET not in text, name


def test_keys_are_not_shown_and_do_not_leave_the_process() -> None:
    assert OLD not in repr(KEYS)
    for leave in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            leave(KEYS)


def an_event_with(**changed: object) -> bytes:
    return msgspec.json.encode(an_event(**changed))


@pytest.mark.parametrize(
    ("data", "is_it"),
    [
        (an_event_with(), True),
        (an_event_with(outcome=Outcome.EXPIRED, deliveries=9), True),
        (b'{"version": 2}', True),
        (an_event_with(operation_id="another"), False),
        (an_event_with(user_id="DEAD"), False),
        (an_event_with(external_user_id="another"), False),
        (an_event_with(payload_sha256=payload_digest("Pay 4000")), False),
        (an_event_with(context=msgspec.Raw(b"1")), False),
        (b"", False),
    ],
)
def test_what_a_worker_signed_about_another_request_is_told_apart(data: bytes, is_it: bool) -> None:
    assert is_about(data, an_event()) is is_it
