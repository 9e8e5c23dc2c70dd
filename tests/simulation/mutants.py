"""Breakages of the library that the simulator must find: what proves that it would find a real one.

``python -m tests.simulation.mutants`` applies each to a copy of the package, in a folder of its own, and runs the
simulator against it until a promise is broken, for five minutes of computing at most.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import aiokeyless

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PACKAGE: Final = Path(aiokeyless.__file__).parent


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


#: Of each file: what takes the place of which text, and what is wrong then.
_BREAKAGES: Final = {
    "_rules/ambiguity.py": (("return error.sent", "return False", "a lost answer is followed by the same request"),),
    "_rules/approval.py": (
        ("if operation.operation_id != operation_id:", "if False:", "the answer about another operation counts"),
        ("if not is_same_user(operation.user_id, ticket.user_id):", "if False:", "another user's approval counts"),
        ("if payload_digest(operation", "if False and (operation", "the approval of another payload counts"),
        ("if ticket.external_user_id and", "if False and", "the approval of another external user counts"),
        ("state == STATE_PENDING", "state != OperationState.APPROVED", "an unknown state is waited out"),
        (
            "if operation.state == STATE_PENDING:",
            "if operation.result is True:\n        return Verdict.APPROVED\n    if operation.state == STATE_PENDING:",
            "a pending operation whose result is true counts",
        ),
    ),
    "_rules/backoff.py": (
        ("return min(error.retry_after, MAX_PAUSE)", "return 0.0", "the pause that a 429 asks for is ignored"),
        ("if error.status == 503 else 0.0", "if False else 0.0", "the pause that a 503 asks for is ignored"),
        ("error_delay(_MANY)", "MAX_PAUSE", "a 503 holds its operation for as long as it asks for"),
        (
            "wait_exponential(multiplier=0.25, max=2.5) + wait_random_exponential(multiplier=0.25, max=2.5)",
            "wait_exponential(multiplier=0.05, max=0.5) + wait_random_exponential(multiplier=0.05, max=0.5)",
            "failures are retried five times as fast",
        ),
        ("if is_refusal or since_good > SHORT:", "if True:", "an operation backs off for long although others go on"),
    ),
    "_rules/budget.py": (
        ("GAIN: Final = 40", "GAIN: Final = 4000", "one good answer pays for hundreds of failures"),
        ("PER_WAIT: Final = 3", "PER_WAIT: Final = 12", "an outage costs four times as many requests"),
        ("PER_SECOND: Final = 5.0", "PER_SECOND: Final = 1e-6", "after an outage polls wait for tokens for ever"),
        ("PER_SECOND_LATER: Final = 1.0", "PER_SECOND_LATER: Final = 5.0", "a long outage gets as many as a short one"),
        (
            "        self._failed_at = now\n",
            "        self._failed_at = now\n        self._spent -= 1.0\n",
            "failures cost nothing",
        ),
    ),
    "_rules/final.py": (
        ("_TOO_LATE: Final = 0.5", "_TOO_LATE: Final = 0.0", "a final poll starts when it can hardly be answered"),
    ),
    "_rules/outcome.py": (
        (
            "return evaluate(answer, operation_id, ticket)",
            (
                "verdict = evaluate(answer, operation_id, ticket)\n"
                "        return verdict if isinstance(verdict, Verdict) else Verdict.PENDING"
            ),
            "an answer that is rejected is waited out",
        ),
        ("        return Verdict.TRANSIENT\n", "        return Verdict.FAILED\n", "a transient failure ends the wait"),
        (
            "(was_seen and is_odd)",
            "(was_seen and is_odd and not isinstance(error, NotFoundError))",
            "an operation that was seen is believed to be gone",
        ),
        (
            "(was_seen and is_odd)",
            "(was_seen and isinstance(error, NotFoundError))",
            "a gateway's page ends the waits for operations that were seen",
        ),
        (
            "(was_seen and is_odd)",
            "(was_seen and is_odd and getattr(error, 'status', 0) != 401)",
            "a function that returns the old key for a moment ends the waits",
        ),
        ("(was_seen and is_odd)", "is_odd", "an error before the operation was seen is waited out"),
        ("= 60.0", "= 6000.0", "a wait without a deadline waits out a key that is not allowed"),
        ("if may_be_missing and", "if False and", "an operation that the phone will create is not waited for"),
        ("YOUNG: Final = 5.0", "YOUNG: Final = 0.5", "a replica that lags ends the wait"),
    ),
    "_rules/quota.py": (
        ("if self._tokens < cost:", "if False:", "single calls are repeated in an outage, however many fail"),
    ),
    "_rules/rate.py": (
        (
            "self._tokens = max(self._tokens - 1.0",
            "_ = max(self._tokens - 1.0",
            "polls are not counted against the rate",
        ),
        ("_MANY_REFUSED: Final = 14", "_MANY_REFUSED: Final = 1", "each refusal is taken for the tenant's limit"),
        ("_MANY_REFUSED: Final = 14", "_MANY_REFUSED: Final = 41", "the limit of a tenant is never found"),
        ("if not was_good:", "if False:", "an operation that is refused again and again slows all others down"),
    ),
    "_rules/slots.py": (
        ("SLOW: Final = 1.0", "SLOW: Final = 10.0", "a poll that hangs keeps its slot"),
        ("return max(slots, min(4 * slots, 256))", "return slots", "final polls have to wait for each other"),
    ),
    "_http/creation.py": (
        ("APPROVED and not self._id_is_new:", "APPROVED and False:", "an approval from before the request counts"),
        ("if not self._is_ours(found):", "if False:", "another operation is taken for this one"),
        ('== (self._operation.operation_payload or "")', "is not None", "another payload is taken for this one"),
        ("return not self._is_final and (", "return (", "what was not checked is sent again"),
        ("is None and not self._resumes:", "is None:", "nothing is resumed"),
        ("is None and not self._resumes:", "is None and False:", "what was there before is resumed unasked"),
        ("        if id_is_new:\n", "        if False:\n", "a create that a proxy repeats is a conflict"),
    ),
    "_http/keys.py": (
        ("= self._current is not None", "= False", "a function for the key that fails once ends the waits"),
    ),
    "_http/protocol.py": (
        ("_read_age(answer.headers) > _MAX_AGE", "False", "what a cache stored hides an approval"),
        (
            "_refuse_duplicate_keys(body)\n    return operation",
            "pass\n    return operation",
            "an approval that also says the opposite counts",
        ),
    ),
    "_http/transport.py": (
        ('if endpoint.method != "GET" or error.had_begun:', "if True:", "a poll on a dead connection fails"),
        (
            "self._session_of_new_connections = _make_session(headers, settings, force_close=True)",
            "self._session_of_new_connections = self._session",
            "a poll on a dead connection is asked once more on another dead one",
        ),
        ('endpoint.method != "GET" or error', "error", "a create whose connection is lost is sent again unchecked"),
        ("if is_first and endpoint", "if endpoint", "a create is sent again on another dead connection"),
        (
            "elif isinstance(response, _Response) and not",
            "elif False and not",
            "connections to a host that fails are kept",
        ),
        ("_MAX_AGE: Final = 60.0", "_MAX_AGE: Final = 6000.0", "connections are used for ever"),
        ("if self._api_keys.is_replaced(key):", "if False:", "the refusal of a key that was replaced ends the waits"),
    ),
    "_waits/dispatch.py": (
        (
            "ready_at = max(self._rate.ready_at(now), self._budget.ready_at(now))",
            "ready_at = self._rate.ready_at(now)",
            "polls need no token",
        ),
        (
            "ready_at = max(self._rate.paused_until, self._budget.ready_at(now))",
            "ready_at = self._rate.paused_until",
            "final polls go all at once without a token",
        ),
        (
            "            # One final poll at a time.",
            "            return ready_at\n            # One final poll at a time.",
            "final polls need a token",
        ),
        ("if not poll.is_over and ends_at", "if ends_at < 0.0 and ends_at", "a pause lets all final polls through"),
        ("self._budget.take_renewal(now)", "False", "polls go on using the connections to a host that fails"),
        ("if polled.poll is None:", "if True:", "an operation is polled twice at once"),
        (">= self._max_in_flight:  # 2", "> self._max_in_flight:  # 2", "one poll too many is in flight"),
        ("if self._window.limit < math.inf:", "if False:", "a service gets more polls at once than it answers in time"),
        ("self._final_queued.remove(polled)", "pass", "an operation gets one final poll, whatever becomes of it"),
    ),
    "_waits/holds.py": (
        ("call_later(LEASE, self._expire", "call_later(0.0, self._expire", "the end of a hold ends its wait"),
        ("lease = self._leases.get(target)\n", "lease = None\n", "each hold polls at once"),
        (
            "            lease.expiry.cancel()\n            lease.expiry = None\n        try:",
            "            lease.expiry = None\n        try:",
            "a wait ends ten seconds after its first hold, held or not",
        ),
        ("if lease.holders:", "if False:", "the first of two holders that leaves ends the wait of both"),
        ("ends_within = lease", "ends_within = False and lease", "a hold returns nothing although its ticket expires"),
        ("self._poller.stop(lease.wait)", "pass", "a wait that nobody holds goes on"),
    ),
    "_waits/machine.py": (
        ("answer, was_seen=poll.polled.was_seen)", "answer, was_seen=False)", "a gateway's pages cost no tokens"),
        ("if self._held:", "if False:", "what a 503 holds does not go on when another operation is answered well"),
        ("if is_refusal else 0.0)", ")", "a final poll is not repeated in its time if a 503 asks for a pause"),
        ("polled.poll is None and polled is not poll.polled:", "True:", "an operation that a 503 held is polled twice"),
        ("wait.deadline = now + (", "wait.deadline = now + 3.0 + (", "waits end three seconds late"),
        ("(wait.had_expired or is_final", "(is_final", "an expired ticket is polled on and on"),
        (
            "wait.deadline + FINAL_POLL_TIMEOUT)",
            "wait.deadline + 10.0)",
            "a final poll that hangs is waited for too long",
        ),
        ("if may_start(wait.deadline - again_at):", "if False:", "a final poll that fails is not repeated"),
        (
            "if wait.final_poll is poll:\n                _update(wait, now, answer)",
            "if poll.final:\n                _update(wait, now, answer)",
            "the final poll of one wait ends the others",
        ),
        ("if not polled.live:", "if False:", "polling goes on for nobody"),
        (
            "            self._dispatcher.schedule(polled, now + delay)\n            good.append(wait)",
            "            polled.due = now + delay\n            good.append(wait)",
            "the slowest schedule of waits that share polls counts",
        ),
        ("if answer is None and poll.is_overdue:", "if False:", "a poll that hangs is no failure"),
        (
            "if late > unseen + STOOD_STILL and",
            "if False and",
            "a loop that stood still across a deadline sends no final poll",
        ),
        (
            "if isinstance(answer, Operation) and verdict is Verdict.APPROVED:",
            "if isinstance(answer, Operation) and verdict is Verdict.APPROVED and wait in result.served:",
            "an approval counts only for waits that its poll was sent for",
        ),
        (
            " and polled.poll in (None, poll):",
            ":",
            "a final poll that fails beside a poll that hangs sets its next time",
        ),
        ("wait.final_poll = None\n        if", "if", "a wait whose final poll failed gets no other one"),
        ("if poll.polled is polled:", "if False:", "a final poll goes on after the last wait"),
        ("wait.updates.close()", "pass", "a caller with a handler is not told of the end"),
        ("if poll.polled in passed and", "if False and", "a poll from before the deadline goes on for nobody"),
        ("self._deadlines.remove(wait)", "pass", "the deadline of a wait that has ended stays"),
        (
            "elif wait not in result.served:",
            "elif False:",
            "a pending answer counts for waits that came after its poll",
        ),
    ),
    "_waits/poller.py": (
        ("age=max(0.0, age or 0.0),", "age=age or 0.0,", "a clock that is behind makes tickets live longer"),
    ),
    "_waits/state.py": (
        ("-= wait.phase is WaitPhase.POLLING", "-= 1", "a wait that ends after its deadline stops the others' polls"),
    ),
    "_waits/timer_queue.py": (
        ("if entry.when > now or", "if entry.when > now - 0.5 or", "everything is half a second late"),
    ),
    "errors.py": (
        ("frozenset({408, 425, 429})", "frozenset({425, 429})", "a 408 ends the wait"),
        (
            'and the proxies.\n    """\n\n    @property\n    def is_transient(self) -> bool:\n',
            'and the proxies.\n    """\n\n    @property\n    def is_not_transient(self) -> bool:\n',
            "the page of a gateway ends the wait",
        ),
    ),
    "models.py": ((" and self.result is True", "", "an approval whose result is false counts"),),
}


def read_breakages(breakages: Mapping[str, Sequence[tuple[str, str, str]]]) -> tuple[Mutant, ...]:
    """Return the breakages of a table."""
    return tuple(Mutant(file, *breakage) for file, of_file in breakages.items() for breakage in of_file)


MUTANTS: Final = read_breakages(_BREAKAGES)


def apply(mutant: Mutant, package: Path) -> None:
    """Break a copy of the package.

    Args:
        mutant: The breakage.
        package: The copy.
    """
    path = package / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


class Search(NamedTuple):
    """How a breakage was searched for.

    Attributes:
        is_found: Whether it was found.
        stories: How many stories were tried.
        said: The last line of what the simulator said: the broken promise.
    """

    is_found: bool
    stories: int
    said: str


def search(mutant: Mutant, seconds: float, *, simulator: str = "simulation") -> Search:
    """Search for a breakage by a simulator, for so many seconds of computing at most."""
    tests = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(PACKAGE, root / "aiokeyless", ignore=shutil.ignore_patterns("__pycache__"))
        for package in ("simulation", "worker/simulation"):
            shutil.copytree(tests / package, root / "tests" / package)
        shutil.copy(tests / "worker" / "__init__.py", root / "tests" / "worker")
        apply(mutant, root / "aiokeyless")
        # Not measured by a coverage run that this is part of: the copy is gone when that reports.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        environment |= {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", simulator, "--seconds", f"{seconds:g}", "--seed", "1", "--briefly"]
        done = subprocess.run(command, cwd=root / "tests", env=environment, capture_output=True, text=True, check=False)
    stories = re.search(r"stories (\d+)|(\d+) stories", done.stdout)
    said = (done.stdout + done.stderr).strip().splitlines()
    return Search(
        done.returncode != 0, 1 if stories is None else int(stories[1] or stories[2]), said[-1] if said else ""
    )


def main(
    mutants: Sequence[Mutant] = MUTANTS,
    seconds: float = 300.0,
    *,
    description: str | None = __doc__,
    simulator: str = "simulation",
) -> int:
    """Run the command; its exit code is 1 if one is not found."""
    parser = argparse.ArgumentParser(description=description)
    help_of_seconds = f"of computing, for each breakage (default: {seconds:g})"
    parser.add_argument("--seconds", type=float, default=seconds, help=help_of_seconds)
    parser.add_argument("--only", default="", help="those whose reason or file contains this text")
    options = parser.parse_args()
    chosen = [mutant for mutant in mutants if options.only in f"{mutant.file} {mutant.why}"]
    missed = 0
    for mutant in chosen:
        is_found, stories, said = search(mutant, options.seconds, simulator=simulator)
        missed += not is_found
        how = f"{stories} stories" if is_found else "MISSED"
        print(f"{how}: {mutant.file}: {mutant.why}\n       {said:.150}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
