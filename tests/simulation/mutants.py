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
        "if operation.state == _STATE_PENDING:",
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
        "return evaluate(answer, operation_id, ticket)",
        "verdict = evaluate(answer, operation_id, ticket)\n"
        "        return verdict if isinstance(verdict, Verdict) else Verdict.PENDING",
        "an answer that is rejected is waited out",
    ),
    Mutant(
        "_rules/outcome.py",
        "return Verdict.TRANSIENT\n    if isinstance(answer, NotFoundError):",
        "return Verdict.FAILED\n    if isinstance(answer, NotFoundError):",
        "a transient failure ends the wait",
    ),
    Mutant(
        "_rules/outcome.py",
        "if was_seen:",
        "if False:",
        "an operation that was seen is believed to be gone",
    ),
    Mutant(
        "_rules/outcome.py",
        "if may_be_missing:",
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
        'and the proxies.\n    """\n\n    @property\n    def is_transient(self) -> bool:\n',
        'and the proxies.\n    """\n\n    @property\n    def is_not_transient(self) -> bool:\n',
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
        "_waits/dispatch.py",
        "if not circuit.is_calm:\n            ready_at",
        "if False:\n            ready_at",
        "an open circuit lets polls through",
    ),
    Mutant(
        "_waits/dispatch.py",
        "if self._circuit.state is CircuitState.OPEN:\n            # One",
        "if True:\n            # One",
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
        "_waits/machine.py",
        "wait.deadline = now + (patience if had_expired else timeout)",
        "wait.deadline = now + 3.0 + (patience if had_expired else timeout)",
        "waits end three seconds late",
    ),
    Mutant(
        "_waits/machine.py",
        "(wait.had_expired or is_final(wait.deadline - now))",
        "is_final(wait.deadline - now)",
        "an expired ticket is polled on and on",
    ),
    Mutant(
        "_waits/poller.py",
        "age=max(0.0, age or 0.0),",
        "age=age or 0.0,",
        "a clock that is behind makes tickets live longer",
    ),
    Mutant(
        "_waits/machine.py",
        "self._deadlines.schedule(wait, wait.deadline + FINAL_POLL_TIMEOUT)",
        "self._deadlines.schedule(wait, wait.deadline + 10.0)",
        "a final poll that hangs is waited for too long",
    ),
    Mutant(
        "_rules/final.py",
        "return delay if (delay if is_awaited else 0.0) < left else None",
        "return None",
        "a final poll that fails is not repeated",
    ),
    Mutant(
        "_waits/machine.py",
        "if wait.final is poll:\n                _update(wait, now, answer)",
        "if poll.final:\n                _update(wait, now, answer)",
        "the final poll of one wait ends the others",
    ),
    # -- sharing and leaving
    Mutant(
        "_waits/machine.py",
        "if not polled.live:\n            self._stop_polling(polled)",
        "if False:\n            self._stop_polling(polled)",
        "polling goes on for nobody",
    ),
    Mutant(
        "_waits/holds.py",
        "call_later(LEASE, self._expire",
        "call_later(0.0, self._expire",
        "the end of a hold ends its wait",
    ),
    Mutant(
        "_waits/state.py",
        "return not wait.done() and (wait.phase is WaitPhase.POLLING or wait.final is self)",
        "return False",
        "the deadline of one wait cuts the poll of the others off",
    ),
    Mutant(
        "_waits/dispatch.py",
        "if polled.poll is None:\n                self._enqueue(polled)",
        "if True:\n                self._enqueue(polled)",
        "an operation is polled twice at once",
    ),
    Mutant(
        "_waits/dispatch.py",
        "if len(self._slots) >= slots or self._retries_wait():  # 2",
        "if len(self._slots) > slots or self._retries_wait():  # 2",
        "one poll too many is in flight",
    ),
    Mutant(
        "_waits/machine.py",
        "wait.attempt += 1\n            self._dispatcher.schedule(polled, now + delay)\n            good.append(wait)",
        "wait.attempt += 1\n            polled.due = now + delay\n            good.append(wait)",
        "the slowest schedule of waits that share polls counts",
    ),
    Mutant(
        "_waits/holds.py",
        "lease = self._leases.get(target)\n",
        "lease = None\n",
        "each hold polls at once",
    ),
    Mutant(
        "_waits/machine.py",
        "if answer is None and poll.is_overdue:",
        "if False:",
        "a poll that hangs is no failure",
    ),
    Mutant(
        "_waits/timer_queue.py",
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
        "return not self._is_final and (",
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
