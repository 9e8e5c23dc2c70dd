"""One word for one thing: words that were replaced do not come back, in names or in prose.

The words that replaced them are at home in docs/glossary.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
FOLDERS = ("aiokeyless", "tests", "benchmarks", "examples", "docs")  # the tests of a wheel have only some beside them
SUFFIXES = {".py", ".md", ".html", ".toml"}


class Replaced(NamedTuple):
    """A word that is not used any more.

    Attributes:
        pattern: Matches it in a line whose names were split into their parts: ``_last_look`` reads ``last look``.
        instead: What to write.
        where: Matches the start of the paths in which the word had the meaning that is named differently now.
    """

    pattern: str
    instead: str
    where: str = ""


IN_MEMORY = r"(aiokeyless|tests)/(_rules|_poller)/"
WORKER = r"(aiokeyless|tests)/worker/"

# Some words that were replaced are missing here, as they mean too much else in English: held, down, part, join, want,
# land, came, listed.
REPLACED = [
    Replaced(r"look(s|ed|ing)?", "poll; for anything else: check, search, read, appear"),
    Replaced(r"(un)?watch(es|ed|ing)?", "PolledOperation; for anything else: observe, update, at risk"),
    Replaced(r"agendas?", "TimerQueue, or: queue"),
    Replaced(r"book(ed|ing|ings)", "scheduled_at, schedule"),
    Replaced(r"health", "circuit", where=IN_MEMORY),
    Replaced(r"judg(e|es|ed|ing)", "evaluate, or: decide", where=r"(aiokeyless|tests|docs)/"),
    Replaced(r"distrust(s|ed)?", "Rejection, reject"),
    Replaced(r"pupils?|lessons?|teach(es|ing)?", "learners, observation, record_observation"),
    Replaced(r"overtime", "deadline_passed, past the deadline"),
    Replaced(r"patient", "before_deadline", where=IN_MEMORY),
    Replaced(r"end unanswered", "finish_poll"),
    Replaced(r"attends?|untaken", "process, backlog", where=WORKER),
    Replaced(r"spac(ing|ings)", "load shedding, factor", where=WORKER),
    Replaced(r"mend(s|ed|ing)?", "fix"),
    Replaced(r"nobody knows", "unknown"),
    Replaced(r"whoever", "a plain noun: the caller, the application, a reader"),
    Replaced(r"in the order of their coming", "in the order in which they started"),
    Replaced(r"rightly", "correctly"),
    Replaced(r"people", "approval_times, users", where="benchmarks/"),
    Replaced(r"spending|toll", "cpu_cost, cost", where="benchmarks/"),
    Replaced(r"rivals?", "baselines", where="benchmarks/"),
    Replaced(r"shapes", "decoders", where="benchmarks/"),
    Replaced(r"(words|screen)\.py", "app.py, messages.py, render.py"),
]

# Names that keep one of these words: public ones of ours, and those of others.
KEPT = re.compile(r"watch_approval|TestWatchApproval|HealthCheck|suppress_health_check|watchdog")

PARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|_")  # where a name is made of several words


def read(line: str) -> str:
    """Return the words of a line: names that are kept are left out, the others are split into their parts."""
    return PARTS.sub(" ", KEPT.sub("", line)).lower()


def replaced_in(path: str, text: str) -> Iterator[str]:
    """Yield each use of a replaced word in a file, and what to write instead."""
    here = [(re.compile(rf"\b({word.pattern})\b"), word.instead) for word in REPLACED if re.match(word.where, path)]
    any_of_them = re.compile(rf"\b({'|'.join(pattern.pattern for pattern, _ in here)})\b")
    for number, line in enumerate(text.splitlines(), 1):
        words = read(line)
        if any_of_them.search(words):
            for pattern, instead in here:
                for found in pattern.finditer(words):
                    yield f"{path}:{number}: {found[0]!r} is now: {instead}"


def sources() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    yield ROOT / "pyproject.toml"
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES and "_build" not in path.parts:  # what Sphinx made of the documentation
                yield path


def test_replaced_words_do_not_come_back() -> None:
    uses = [
        use
        for path in sorted(sources())
        if path != Path(__file__)
        for use in replaced_in(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not uses, f"{len(uses)} words that were replaced are back:\n" + "\n".join(uses)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("README.md", "Look again."),
        ("aiokeyless/client.py", "    def _last_look(self) -> None:"),
        ("tests/test_client.py", "class TestRule1FirstLook:"),
        ("examples/checkout/shop.html", "const again = lookAgain;"),
        ("aiokeyless/_poller/poller.py", "self._watches: dict[str, Watch] = {}"),
        ("aiokeyless/_rules/circuit.py", "class Health:"),
        ("benchmarks/waits.py", "from .people import PEOPLE"),
        ("docs/worker.md", "approved or not, nobody knows"),
    ],
)
def test_a_replaced_word_is_found_in_prose_and_in_names(path: str, line: str) -> None:
    assert next(replaced_in(path, f"\n{line}\n")).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("README.md", "async for update in client.watch_approval(ticket):"),
        ("README.md", "people approve on their phones"),
        ("tests/_poller/test_poller.py", "settings(suppress_health_check=[HealthCheck.too_slow])"),
        ("aiokeyless/worker/healthz.py", "class HealthServer:"),
        ("aiokeyless/errors.py", "raise LookupError"),
    ],
)
def test_words_with_another_meaning_are_left_alone(path: str, line: str) -> None:
    assert not list(replaced_in(path, line))
