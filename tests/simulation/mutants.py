"""Breakages of the library that the simulator must find: what proves that it would find a real one.

``python -m tests.simulation.mutants`` applies each to a copy of the package, in a folder of its own, and runs the
simulator against it until a promise is broken, for two minutes of computing at most.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

import aiokeyless

PACKAGE: Final = Path(aiokeyless.__file__).parent
#: At least so many must be found.
FOUND: Final = 43


class Mutant(NamedTuple):
    """A breakage.

    Attributes:
        file: The file, in the package.
        old: A text that occurs in it once.
        new: What takes its place.
        why: What is wrong then.
    """

    file: str
    old: str
    new: str
    why: str


MUTANTS: Final = (
    # -- what counts as an approval
    Mutant(
        "_rules/approval.py",
        "if operation.operation_id != operation_id:",
        "if False:",
        "the answer about another operation counts",
    ),
    Mutant(
        "_rules/approval.py",
        "if not is_same_user(operation.user_id, ticket.user_id):",
        "if False:",
        "another user's approval counts",
    ),
    Mutant(
        "_rules/approval.py",
        "if payload_digest(operation.operation_payload) != ticket.payload_sha256:",
        "if False:",
        "the approval of another payload counts",
    ),
    Mutant(
        "_rules/approval.py",
        "if ticket.external_user_id and operation.external_user_id != ticket.external_user_id:",
        "if False:",
        "the approval of another external user counts",
    ),
    Mutant(
        "_rules/approval.py",
        "if operation.state == OperationState.PENDING:",
        "if operation.state != OperationState.APPROVED:",
        "an unknown state is waited out",
    ),
    Mutant(
        "models.py",
        "return self.state == OperationState.APPROVED and self.result is True",
        "return self.state == OperationState.APPROVED",
        "an approval whose result is false counts",
    ),
    Mutant(
        "models.py",
        "return self.state == OperationState.APPROVED and self.result is True",
        "return self.result is True",
        "a pending operation whose result is true counts",
    ),
    Mutant(
        "_http/protocol.py",
        "        _refuse_duplicate_keys(body)\n    return operation",
        "        pass\n    return operation",
        "an approval that also says the opposite counts",
    ),
    # -- what a poll means
    Mutant(
        "_rules/outcome.py",
        "return Outcome(Result.REJECTED, verdict)",
        "return _PENDING[facts.is_final]",
        "an answer that is rejected is waited out",
    ),
    Mutant(
        "_rules/outcome.py",
        "return _TRANSIENT[facts.is_final]\n    if isinstance(error, NotFoundError):",
        "return _FAILED\n    if isinstance(error, NotFoundError):",
        "a transient failure ends the wait",
    ),
    Mutant(
        "_rules/outcome.py",
        "if facts.was_seen:",
        "if False:",
        "an operation that was seen is believed to be gone",
    ),
    Mutant(
        "_rules/outcome.py",
        "if facts.may_be_missing:",
        "if False:",
        "an operation that the phone will create is not waited for",
    ),
    Mutant(
        "_rules/outcome.py",
        "YOUNG: Final = 5.0",
        "YOUNG: Final = 0.5",
        "a replica that lags ends the wait",
    ),
    Mutant(
        "errors.py",
        "frozenset({408, 425, 429})",
        "frozenset({425, 429})",
        "a 408 ends the wait",
    ),
    Mutant(
        "errors.py",
        "isinstance(self, TransportError | NotJsonError)",
        "isinstance(self, TransportError)",
        "the page of a gateway ends the wait",
    ),
    # -- what a service that fails is spared
    Mutant(
        "_rules/backoff.py",
        "frozenset({429, 503})",
        "frozenset({503})",
        "the pause that a 429 asks for is ignored",
    ),
    Mutant(
        "_rules/backoff.py",
        "wait_exponential(multiplier=0.25, max=2.5) + wait_random_exponential(multiplier=0.25, max=2.5)",
        "wait_exponential(multiplier=0.05, max=0.5) + wait_random_exponential(multiplier=0.05, max=0.5)",
        "failures are retried five times as fast",
    ),
    Mutant(
        "_rules/circuit.py",
        "FAILURES_UNTIL_OPEN: Final = 5",
        "FAILURES_UNTIL_OPEN: Final = 1000",
        "the circuit never opens",
    ),
    Mutant(
        "_rules/circuit.py",
        "return self.limit if now >= self.retry_at() else 0",
        "return self.limit",
        "an open circuit lets polls through",
    ),
    Mutant(
        "_rules/circuit.py",
        "return self.is_probed or now < self.retry_at()",
        "return True",
        "final polls always go one at a time",
    ),
    Mutant(
        "_rules/circuit.py",
        "        self._probes = 0\n        self._probe_at",
        "        self._probe_at",
        "the circuit is open for ever",
    ),
    Mutant(
        "_rules/circuit.py",
        "self._limit = min(self._limit + 1, self._full)",
        "self._limit = min(self._limit, self._full)",
        "after an outage one poll at a time goes on",
    ),
    Mutant(
        "_rules/circuit.py",
        "max(self._probe_at, since + error_delay(self._probes))",
        "since",
        "probes follow each other without a pause",
    ),
    Mutant(
        "_rules/circuit.py",
        "self._limit = 1.0",
        "self._limit = 8.0",
        "eight probes go at once",
    ),
    Mutant(
        "_rules/rate.py",
        "self._tokens = max(self._tokens - 1.0, -max(1.0, rate * _BURST))",
        "pass",
        "polls are not counted against the rate",
    ),
    # -- deadlines
    Mutant(
        "_poller/poller.py",
        "deadline=now + timeout,",
        "deadline=now + timeout + 3.0,",
        "waits end three seconds late",
    ),
    Mutant(
        "_poller/poller.py",
        "is_final = wait.had_expired or wait.deadline <= poll.started_at + RESOLUTION",
        "is_final = wait.deadline <= poll.started_at + RESOLUTION",
        "an expired ticket is polled on and on",
    ),
    Mutant(
        "_poller/poller.py",
        "return max(0.0, (datetime.now(UTC) - ticket.created_at).total_seconds())",
        "return (datetime.now(UTC) - ticket.created_at).total_seconds()",
        "a clock that is behind makes tickets live longer",
    ),
    Mutant(
        "_poller/poller.py",
        "self._deadlines.schedule(wait, wait.deadline + FINAL_POLL_TIMEOUT)",
        "self._deadlines.schedule(wait, wait.deadline + 10.0)",
        "a final poll that hangs is waited for too long",
    ),
    Mutant(
        "_poller/poller.py",
        "self._repeat_final(wait, again, now)",
        "self._end(wait, unknown(wait.record(now)))",
        "a final poll that fails is not repeated",
    ),
    Mutant(
        "_poller/poller.py",
        "if wait.final is poll:\n                self._update(wait, now, answer)",
        "if poll.final:\n                self._update(wait, now, answer)",
        "the final poll of one wait ends the others",
    ),
    # -- sharing and leaving
    Mutant(
        "_poller/poller.py",
        "if not polled.live:\n            self._stop_polling(wait)",
        "if False:\n            self._stop_polling(wait)",
        "polling goes on for nobody",
    ),
    Mutant(
        "_poller/poller.py",
        "if poll.polled is polled and poll is not goes_on:",
        "if poll.polled is polled:",
        "the end of a hold cuts its poll off",
    ),
    Mutant(
        "_poller/state.py",
        "return not wait.done() and (not wait.deadline_passed or wait.final is self)",
        "return False",
        "the deadline of one wait cuts the poll of the others off",
    ),
    Mutant(
        "_poller/dispatch.py",
        "if polled.poll is None:\n                self._enqueue(polled)",
        "if True:\n                self._enqueue(polled)",
        "an operation is polled twice at once",
    ),
    Mutant(
        "_poller/dispatch.py",
        "if len(self.in_flight) >= self._max_in_flight:\n            return None",
        "if len(self.in_flight) > self._max_in_flight:\n            return None",
        "one poll too many is in flight",
    ),
    Mutant(
        "_poller/poller.py",
        "self._dispatcher.schedule(polled, now + min(good))",
        "self._dispatcher.schedule(polled, now + max(good))",
        "the slowest schedule of waits that share polls counts",
    ),
    Mutant(
        "_poller/poller.py",
        "first, attempt = pause.next_poll(schedule, now), pause.attempt",
        "first, attempt = now, pause.attempt",
        "each hold polls at once",
    ),
    Mutant(
        "_poller/poller.py",
        "if poll.overdue else None",
        "if False else None",
        "a poll that hangs is no failure",
    ),
    Mutant(
        "_poller/timer_queue.py",
        "if heap[0].when > now or not",
        "if heap[0].when > now - 0.5 or not",
        "everything is half a second late",
    ),
    # -- creating
    Mutant(
        "_rules/ambiguity.py",
        "return error.sent",
        "return False",
        "a lost answer is followed by the same request",
    ),
    Mutant(
        "_http/creation.py",
        "if found.state == OperationState.APPROVED and not self._id_is_new:",
        "if False:",
        "an approval from before the request counts",
    ),
    Mutant(
        "_http/creation.py",
        "if not self._is_ours(found):",
        "if False:",
        "another operation is taken for this one",
    ),
    Mutant(
        "_http/creation.py",
        'and (found.operation_payload or "") == (self._operation.operation_payload or "")',
        "",
        "another payload is taken for this one",
    ),
    Mutant(
        "_http/creation.py",
        "return not self._given_up and (",
        "return (",
        "what was not checked is sent again",
    ),
)


def apply(mutant: Mutant, package: Path) -> None:
    """Break a copy of the package.

    Args:
        mutant: The breakage.
        package: The copy.
    """
    path = package / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def is_found(mutant: Mutant, seconds: float) -> tuple[bool, str]:
    """Return whether the simulator finds a breakage, and the last line of what it said.

    Args:
        mutant: The breakage.
        seconds: Of computing, at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(PACKAGE, root / "aiokeyless", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(Path(__file__).parent, root / "tests" / "simulation")
        apply(mutant, root / "aiokeyless")
        # Not measured by a coverage run that this is part of: the copy is gone when that reports.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        environment |= {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tests.simulation", "--seconds", f"{seconds:g}", "--seed", "1", "--briefly"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode != 0, said[-1] if said else ""


def main() -> int:
    """Run the command; its exit code is 1 where too few are found."""
    parser = argparse.ArgumentParser(prog="simulate_mutants", description=__doc__)
    parser.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        help="of computing, for each (default: 120)",
    )
    parser.add_argument("--only", help="those whose reason or file contains this text")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only is None or options.only in f"{m.file} {m.why}"]
    missed = []
    for mutant in chosen:
        found, said = is_found(mutant, options.seconds)
        print(
            f"{'found ' if found else 'MISSED'} {mutant.file}: {mutant.why}\n       {said:.150}",
            flush=True,
        )
        if not found:
            missed.append(mutant)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} were found")
    return 0 if len(missed) <= len(MUTANTS) - FOUND else 1


if __name__ == "__main__":
    sys.exit(main())
