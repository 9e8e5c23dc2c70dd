"""Breakages of workers and of the broker in SQLite that the simulator must find.

In the folder ``tests``: ``python -m worker.simulation.mutants`` applies each to a copy of the package, and runs the
simulator against it until a promise is broken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from simulation.mutants import PACKAGE, Mutant, apply

MUTANTS: Final = (
    # -- the broker
    Mutant(
        "worker/sqlite/store.py",
        "SET decided_at = ? WHERE id = ? AND name = ? AND decided_at IS NULL",
        "SET decided_at = ? WHERE id = ? AND name = ?",
        "a second decision replaces the first",
    ),
    Mutant(
        "worker/sqlite/store.py",
        'lambda: self._connection.execute("BEGIN IMMEDIATE"))\n            with committing(self._connection):',
        "lambda: None)\n            with __import__('contextlib').nullcontext():",
        "a process that dies leaves half of its work",
    ),
    Mutant(
        "worker/sqlite/store.py",
        '"UPDATE waiting SET deliveries = deliveries + 1, due_at = ? WHERE id IN',
        '"UPDATE waiting SET deliveries = deliveries + 1, due_at = 1e12 + ? WHERE id IN',
        "what a dead worker had is never delivered again",
    ),
    Mutant(
        "worker/sqlite/store.py",
        "(now + max(_HANDED_ON, outcome_pause(failures + 1)), failures + 1, reader, id_)",
        "(now, failures + 1, reader, id_)",
        "a reader's outcome is in two hands",
    ),
    Mutant(
        "worker/sqlite/store.py",
        '"DELETE FROM unread WHERE reader = ? AND id =',
        "\"DELETE FROM unread WHERE ? <> '' AND id =",
        "what one reader has handled is lost to the others",
    ),
    Mutant(
        "worker/sqlite/store.py",
        '    ("DELETE FROM request WHERE id > ? AND id <= ? AND decided_at < ?", LONGEST_WAIT),\n',
        "",
        "requests are kept for ever",
    ),
    Mutant(
        "worker/sqlite/store.py",
        "return self._deliver(self._due(up_to) if untried is None else self._probes(up_to, untried), lease)",
        "return self._deliver(self._ids('SELECT id FROM waiting WHERE due_at <= ? ORDER BY failures DESC LIMIT ?', "
        "self._now(), up_to), lease)",
        "bad requests go first",
    ),
    Mutant(
        "worker/sqlite/store.py",
        "w.answered OR json_extract(j.value, '$[4]') = 0",
        "w.answered OR json_extract(j.value, '$[4]') IN (0, 3)",
        "a create counts as a good answer",
    ),
    Mutant(
        "worker/sqlite/store.py",
        '(Standing.CREATED, " DESC")',
        '(Standing.CREATED, "")',
        "the oldest of those that were only created goes first",
    ),
    Mutant(
        "worker/sqlite/store.py",
        'FROM request WHERE id = last_insert_rowid()", (now,)',
        'FROM request WHERE id = last_insert_rowid()", (now + 2.0,)',
        "a new request is asked for two seconds late",
    ),
    Mutant(
        "worker/sqlite/store.py",
        "return True if found[0] == new.digest else None",
        "return True",
        "another request counts as the same",
    ),
    Mutant(
        "worker/sqlite/store.py",
        "AND w.deliveries = json_extract(j.value, '$[2]')\"",
        "AND w.deliveries >= json_extract(j.value, '$[2]')\"",
        "a late delivery puts off another's next poll",
    ),
    Mutant(
        "_rules/probes.py",
        "return (probes + 1 - self._lead) // 2",
        "return 0",
        "new requests wait for all that were created and then failed",
    ),
    # -- decisions
    Mutant(
        "worker/decisions.py",
        "        if left > 0.0:",
        "        if left > 1e9:",
        "an unanswered final poll is not repeated",
    ),
    Mutant(
        "worker/decisions.py",
        "FailureReason.POLL_REFUSED if may_exist else FailureReason.REJECTED",
        "FailureReason.REJECTED",
        "an operation that may exist counts as rejected",
    ),
    Mutant(
        "worker/decisions.py",
        "was_final = is_final(delivery, polled_at)",
        "was_final = False",
        "a request has no end",
    ),
    Mutant(
        "worker/decisions.py",
        "return max(MIN_DELAY, min(delay, delivery.ticket.remaining(now)))",
        "return delay",
        "the final poll is late",
    ),
    Mutant(
        "worker/decisions.py",
        "answered=verdict is Verdict.PENDING, asked=asked)",
        "answered=True, asked=asked)",
        "no answer counts as one",
    ),
    Mutant(
        "worker/decisions.py",
        "        if delivery.is_started_by_phone:  # nothing",
        "        if False:  # nothing",
        "the worker creates what the phone is to start",
    ),
    Mutant(
        "worker/decisions.py",
        "asked or delivery.is_started_by_phone",
        "asked",
        "the user whom the application asked was not asked",
    ),
    # -- exchanges
    Mutant(
        "worker/processor.py",
        "claim = await self._broker.claim(delivery.message)",
        "claim = Claim.NEW",
        "the user is asked without a claim",
    ),
    Mutant(
        "worker/processor.py",
        "elif await self._broker.has_claim(delivery.message):",
        "else:",
        "an approval from before the request counts",
    ),
    Mutant(
        "worker/processor.py",
        "claim is Claim.HELD or may_have_taken_effect(error) or",
        "claim is Claim.HELD or",
        "a lost answer to a create gives the claim back",
    ),
    Mutant(
        "worker/processor.py",
        "if claim is Claim.HELD or not await self._broker.unclaim(delivery.message):",
        "if not await self._broker.unclaim(delivery.message):",
        "a request's own operation is a conflict",
    ),
    Mutant(
        "worker/processor.py",
        "            if self._circuit.is_probed or not isinstance(step, Decided) or step.event.answered is not False:\n"
        "                break\n",
        "",
        "each poll is repeated",
    ),
    Mutant(
        "worker/processor.py",
        "_LATE_REPEATS: Final = 2",
        "_LATE_REPEATS: Final = 0",
        "a final poll after the grace is sent once",
    ),
    # -- announcements
    Mutant(
        "worker/announcements.py",
        "asyncio.timeout(CALL_WITHIN), self._room",
        "asyncio.timeout(None), self._room",
        "a push that hangs has no end",
    ),
    Mutant(
        "worker/announcements.py",
        "        except (Exception, asyncio.CancelledError):  # of",
        "        except (TimeoutError, asyncio.CancelledError):  # of",
        "what a push raises is not handled",
    ),
    Mutant(
        "worker/serving.py",
        "            self._announcements.add(decision.created)",
        "            self._announcements._on_created(decision.created).send(None)",
        "what a push raises ends the delivery",
    ),
    Mutant(
        "worker/decisions.py",
        "return delivery.request if delivery.message.has_only_failed else None",
        "return None",
        "the phone is not told after a lost answer",
    ),
    Mutant(
        "worker/decisions.py",
        "return delivery.request if delivery.message.has_only_failed else None",
        "return delivery.request",
        "each delivery tells the phone",
    ),
    Mutant(
        "worker/messages.py",
        "return 0 < self.number - 1 <= self.failures",
        "return 0 < self.failures",
        "the phone is told again after polls that failed",
    ),
    # -- the end of asyncio.run, which cancels all tasks
    Mutant(
        "worker/batches.py",
        "        self._running = None\n        self._start()\n",
        "        self._running = None\n        if not _running.cancelled():\n            self._start()\n",
        "calls of a clean-up wait for a batch that was cancelled",
    ),
    Mutant(
        "worker/applications.py",
        "    except BaseException:  # after a cancellation, too, the outcome must come again\n",
        "    except Exception:\n",
        "an outcome is not put off after a cancellation",
    ),
    Mutant(
        "worker/sqlite/broker.py",
        "        with suppress(TimeoutError):\n            async with asyncio.timeout(most):",
        "        with suppress(TimeoutError, asyncio.CancelledError):\n            async with asyncio.timeout(most):",
        "a wait for a change loses its cancellation",
    ),
    # -- ids that are given out again, disks that are full, readers that are deleted, put-offs that are lost
    Mutant(
        "worker/sqlite/store.py",
        'SET decided_at = ? WHERE id = ? AND name = ? AND decided_at IS NULL", (now, *row)',
        'SET decided_at = ? WHERE id = ? AND decided_at IS NULL", (now, row.id)',
        "an outcome of what a failover lost is another's",
    ),
    Mutant(
        "worker/sqlite/store.py",
        '"SELECT asked IS NOT NULL FROM request WHERE id = ? AND name = ? AND decided_at IS NULL", row\n',
        '"SELECT asked IS NOT NULL FROM request WHERE id = ? AND decided_at IS NULL", row[:1]\n',
        "a claim of what a failover lost is another's",
    ),
    Mutant(
        "worker/sqlite/store.py",
        '"DELETE FROM unread WHERE reader = ? AND id = (SELECT id FROM request WHERE id = ? AND name = ?)",\n'
        "            (unread.reader, *unread.row),\n",
        '"DELETE FROM unread WHERE reader = ? AND id = ?", (unread.reader, unread.row.id)\n',
        "who has handled what a failover lost has handled another one",
    ),
    Mutant(
        "worker/sqlite/store.py",
        "WHERE w.name = json_extract(j.value, '$[1]') AND w.deliveries",
        "WHERE w.deliveries",
        "a put-off of what a failover lost is another's",
    ),
    Mutant(
        "worker/sqlite/store.py",
        'SET asked = NULL WHERE id = ? AND name = ? AND asked = ?", (*row, number)',
        'SET asked = NULL WHERE id = ? AND name = ?", row',
        "a delivery that outlasted its lease gives back another one's claim",
    ),
    Mutant(
        "worker/sqlite/store.py",
        '"SELECT CASE WHEN EXISTS (SELECT 1 FROM reader WHERE name = ?)"',
        '"SELECT CASE WHEN EXISTS (SELECT 1 FROM reader WHERE name = ?) OR EXISTS (SELECT 1 FROM outcome)"',
        "a reader that is deleted under its process waits for ever",
    ),
    Mutant(
        "worker/sqlite/schema.py",
        "        if connection.in_transaction:\n",
        "        if connection.in_transaction or __import__('sys').exc_info()[0]:\n",
        "a full disk ends workers",
    ),
    Mutant(
        "worker/serving.py",
        "            await self._give_back(message, _REFUSED_FOR)\n",
        "",
        "an outcome that did not fit on the disk comes again after its lease",
    ),
    Mutant(
        "worker/serving.py",
        "        except (KeylessError, UnavailableError):  # the worker's or the broker's, and not the request's\n",
        "        except KeylessError:\n",
        "a broker that is away ends requests",
    ),
    Mutant(
        "worker/serving.py",
        "            finally:  # the operation is there, whatever the broker says\n    ",
        "            finally:\n                pass\n",
        "the phone is not told if the put-off is not confirmed",
    ),
    Mutant(
        "worker/approval_worker.py",
        "lease = self._limits.longest_delivery + _MARGIN",
        "lease = self._limits.longest_delivery / 4",
        "a delivery that hangs outlasts its lease",
    ),
    Mutant(
        "worker/processor.py",
        "if not is_final(delivery, self._clock()):\n            return await self._create_claimed",
        "if True:\n            return await self._create_claimed",
        "a user is asked after a claim that outlasted the deadline",
    ),
    # -- keys that rotate, and requests that are created and then ask for a pause
    Mutant(
        "worker/processor.py",
        " | ClientClosedError) and not error.is_transient:",
        " | ClientClosedError):",
        "the refusal of a key that was replaced holds all requests",
    ),
    Mutant(
        "worker/processor.py",
        "self._rate.record_failure(now, self._circuit,",
        "if (pause := requested_pause(error)) and not self._circuit.record_pause(now, pause): "
        "self._rate.record_failure(now, self._circuit,",
        "the pause that one request is asked for holds all",
    ),
    # -- serving
    Mutant(
        "worker/serving.py",
        "asked = not is_kept or await self._broker.has_claim(message)",
        "asked = False",
        "the event says that nobody was asked",
    ),
)


def is_found(mutant: Mutant, seconds: float) -> tuple[bool, str]:
    """Return whether the simulator finds a breakage, and the last line of what it said.

    Args:
        mutant: The breakage.
        seconds: Of computing, at most.
    """
    tests = Path(__file__).parents[2]
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
        command = [sys.executable, "-m", "worker.simulation", "--seconds", f"{seconds:g}", "--seed", "1", "--briefly"]
        done = subprocess.run(command, cwd=root / "tests", env=environment, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode != 0, said[-1] if said else ""


def main() -> int:
    """Run the command; its exit code is 1 if one is not found."""
    parser = argparse.ArgumentParser(prog="simulate_worker_mutants", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of computing, for each (default: 60)")
    parser.add_argument("--only", default="", help="those whose reason or file contains this text")
    options = parser.parse_args()
    missed = 0
    for mutant in (mutant for mutant in MUTANTS if options.only in f"{mutant.file} {mutant.why}"):
        found, said = is_found(mutant, options.seconds)
        missed += not found
        print(f"{'found ' if found else 'MISSED'} {mutant.file}: {mutant.why}\n       {said:.150}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
