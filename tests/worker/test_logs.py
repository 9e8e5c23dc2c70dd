"""Log lines: one line each, whatever is in a name, and JSON where it is asked for."""

from __future__ import annotations

import json
import logging
import math
import time
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from aiokeyless.worker.logs import JsonFormatter, RateLimitedLog, log

if TYPE_CHECKING:
    import pytest

LOGGER = "aiokeyless.worker"


def record_of(event: str, facts: dict[str, object] | None = None, **more: Any) -> logging.LogRecord:
    """The record that a handler gets."""
    records: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger, handler = logging.getLogger(LOGGER), Keeping()
    logger.addHandler(handler)
    logger.propagate = False  # to pytest, which writes lines that it does not show
    try:
        log(logging.WARNING, event, facts, **more)
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
    [record] = records
    return record


def as_json(record: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert "\n" not in line
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def test_a_line_is_an_event_and_its_facts() -> None:
    assert record_of("approval.approved", {"operation_id": "a b", "seconds": 1.5}).getMessage() == (
        'approval.approved operation_id="a b" seconds=1.5'
    )


def test_an_event_without_facts_is_a_line_too() -> None:
    assert record_of("broker.disconnected").getMessage() == "broker.disconnected"


@given(st.text(st.characters(exclude_categories=())))
def test_a_line_stays_a_line_whatever_is_in_a_name(name: str) -> None:
    record = record_of("approval.failed", {"operation_id": name})
    assert record.getMessage().isascii()
    assert record.getMessage().isprintable()
    assert as_json(record)["operation_id"] == name


def test_what_is_no_json_is_written_as_text() -> None:
    record = record_of("approval.failed", {"at": LOGGER, "reason": ValueError("odd")})
    assert record.getMessage().endswith('reason="odd"')
    assert as_json(record)["reason"] == "odd"


def test_handlers_get_the_event_and_the_facts() -> None:
    record: Any = record_of("approval.approved", {"seconds": 1.5})
    assert (record.name, record.event, record.facts) == (LOGGER, "approval.approved", {"seconds": 1.5})


def test_a_line_of_a_level_that_is_off_is_not_formatted() -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise AssertionError("it was")

    log(logging.DEBUG, "keyless.failed", {"error": Unspeakable()})


def test_as_json_a_line_has_the_time_in_utc_the_level_the_event_and_the_facts() -> None:
    record = record_of("approval.approved", {"seconds": 1.5})
    record.created = 1_800_000_000.25
    assert as_json(record) == {
        "at": "2027-01-15T08:00:00.250+00:00",
        "level": "warning",
        "event": "approval.approved",
        "seconds": 1.5,
    }


def test_as_json_a_failure_brings_its_traceback_within_the_line() -> None:
    lines = []
    try:
        math.sqrt(-1)
    except ValueError:
        lines.append(as_json(record_of("delivery.failed", {"message": "m"}, exc_info=True)))
    [line] = lines
    assert line["message"] == "m"
    assert line["exception"].splitlines()[-1].startswith("ValueError: ")


def test_as_json_a_line_of_another_library_has_its_message() -> None:
    record = logging.LogRecord("nats.aio.client", logging.ERROR, __file__, 1, "two\n%s", ("lines",), None)
    line = as_json(record)
    assert (line["level"], line["event"], line["message"]) == ("error", "nats.aio.client", "two\nlines")


def test_what_others_can_cause_at_will_is_logged_at_once_and_then_once_a_minute_with_its_count(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = RateLimitedLog(logging.WARNING, "it.happened")
    for second in (0.0, 0.1, 59.9, 60.0, 60.1, 120.0):
        monkeypatch.setattr(time, "monotonic", lambda now=second: now)
        limited.log({"by": "them"})
    assert caplog.messages == [f'it.happened by="them" count={count}' for count in (1, 3, 2)]
