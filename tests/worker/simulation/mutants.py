"""Breakages of workers and of the broker in SQLite that the simulator must find.

In the folder ``tests``: ``python -m worker.simulation.mutants`` applies each to a copy of the package, and runs the
simulator against it until a promise is broken.
"""

from __future__ import annotations

import sys
from typing import Final

from simulation.mutants import main, read_breakages

#: Of each file: what takes the place of which text, and what is wrong then.
_BREAKAGES: Final = {
    "worker/sqlite/store.py": (
        (
            "SET decided_at = ? WHERE id = ? AND name = ? AND decided_at IS NULL",
            "SET decided_at = ? WHERE id = ? AND name = ?",
            "a second decision replaces the first",
        ),
        (
            'lambda: self._connection.execute("BEGIN IMMEDIATE"))\n            with committing(self._connection):',
            "lambda: None)\n            with __import__('contextlib').nullcontext():",
            "a process that dies leaves half of its work",
        ),
        (
            '"UPDATE waiting SET deliveries = deliveries + 1, due_at = ? WHERE id IN',
            '"UPDATE waiting SET deliveries = deliveries + 1, due_at = 1e12 + ? WHERE id IN',
            "what a dead worker had is never delivered again",
        ),
        (
            "(now + max(_HANDED_ON, outcome_pause(failures + 1)), failures + 1, reader, id_)",
            "(now, failures + 1, reader, id_)",
            "a reader's outcome is in two hands",
        ),
        (
            '"DELETE FROM unread WHERE reader = ? AND id =',
            "\"DELETE FROM unread WHERE ? <> '' AND id =",
            "what one reader has handled is lost to the others",
        ),
        (
            '    ("DELETE FROM request WHERE id > ? AND id <= ? AND decided_at < ?", LONGEST_WAIT),\n',
            "",
            "requests are kept for ever",
        ),
        (
            "self._due(up_to) if untried is None else self._by_order(up_to, untried)",
            "self._ids('SELECT id FROM waiting WHERE due_at <= ? ORDER BY failures DESC LIMIT ?', self._now(), up_to)",
            "bad requests go first",
        ),
        (
            "w.answered OR json_extract(j.value, '$[4]') = :answered",
            "w.answered OR json_extract(j.value, '$[4]') IN (:answered, 3)",
            "a create counts as a good answer",
        ),
        (
            '(Standing.CREATED, " DESC")',
            '(Standing.CREATED, "")',
            "the oldest of those that were only created goes first",
        ),
        (
            "(now, request.version)",
            "(now + 2.0, request.version)",
            "a new request is asked for two seconds late",
        ),
        ("return True if found[0] == new.digest else None", "return True", "another request counts as the same"),
        (
            "AND w.deliveries = json_extract(j.value, '$[2]')\"",
            "AND w.deliveries >= json_extract(j.value, '$[2]')\"",
            "a late delivery puts off another's next poll",
        ),
        (
            'SET decided_at = ? WHERE id = ? AND name = ? AND decided_at IS NULL", (now, *row)',
            'SET decided_at = ? WHERE id = ? AND decided_at IS NULL", (now, row.id)',
            "an outcome of what a failover lost is another's",
        ),
        (
            '"SELECT asked IS NOT NULL FROM request WHERE id = ? AND name = ? AND decided_at IS NULL", row\n',
            '"SELECT asked IS NOT NULL FROM request WHERE id = ? AND decided_at IS NULL", row[:1]\n',
            "a claim of what a failover lost is another's",
        ),
        (
            (
                '"DELETE FROM unread WHERE reader = ? AND id = (SELECT id FROM request WHERE id = ? AND name = ?)",\n'
                "            (unread.reader, *unread.row),\n"
            ),
            '"DELETE FROM unread WHERE reader = ? AND id = ?", (unread.reader, unread.row.id)\n',
            "who has handled what a failover lost has handled another one",
        ),
        (
            'SET asked = NULL WHERE id = ? AND name = ? AND asked = ?", (*row, number)',
            'SET asked = NULL WHERE id = ? AND name = ?", row',
            "a delivery that outlasted its lease gives back another one's claim",
        ),
        (
            '"SELECT CASE WHEN EXISTS (SELECT 1 FROM reader WHERE name = ?)"',
            '"SELECT CASE WHEN EXISTS (SELECT 1 FROM reader WHERE name = ?) OR EXISTS (SELECT 1 FROM outcome)"',
            "a reader that is deleted under its process waits for ever",
        ),
        (
            "FROM unread WHERE reader = ? ORDER BY id LIMIT ?",
            "FROM unread WHERE reader = ? AND failures = 0 ORDER BY id LIMIT ?",
            "outcomes that fail are not shown as unread",
        ),
        (
            "oldest_unread_age={reader: self._age(oldest)",
            "oldest_unread_age={reader: 0.0",
            "nobody sees for how long nobody has read",
        ),
        ("now + max(MOST_PUT_OFF, lease)", "now + 1e6", "a clock that is set back holds requests up"),
    ),
    "_rules/order.py": (
        (
            "return (polls + 1 - self._lead) // 2",
            "return 0",
            "new requests wait for all that were created and then failed",
        ),
    ),
    "worker/decisions.py": (
        ("        if grace_left > 0.0:", "        if grace_left > 1e9:", "an unanswered final poll is not repeated"),
        (
            "FailureReason.POLL_REFUSED if may_exist else FailureReason.REJECTED",
            "FailureReason.REJECTED",
            "an operation that may exist counts as rejected",
        ),
        ("was_final = is_final(delivery, polled_at)", "was_final = False", "a request has no end"),
        ("return max(MIN_DELAY, min(delay, delivery.ticket.remaining(now)))", "return delay", "the final poll is late"),
        ("answered=answered, asked=asked, detail", "answered=True, asked=asked, detail", "no answer counts as one"),
        (
            "        if delivery.is_started_by_phone:  # nothing",
            "        if False:  # nothing",
            "the worker creates what the phone is to start",
        ),
        (
            "return delivery.request if delivery.message.has_only_failed else None",
            "return None",
            "the phone is not told after a lost answer",
        ),
        (
            "return delivery.request if delivery.message.has_only_failed else None",
            "return delivery.request",
            "each delivery tells the phone",
        ),
    ),
    "worker/grace.py": (
        (
            "delivery.message.stored_at, self._started_at)",
            "delivery.message.stored_at)",
            "the grace ends before workers begin",
        ),
        ("            self._absences.append(", "            print(", "the grace ends while the worker is frozen"),
        ("min(sum(times, _NONE), _ABSENT)", "sum(times, _NONE)", "a broker that flaps delays outcomes forever"),
    ),
    "worker/processor.py": (
        (
            "claim = await self._broker.claim(delivery.message)",
            "claim = Claim.NEW",
            "the user is asked without a claim",
        ),
        ("elif await self._broker.has_claim(delivery.message):", "else:", "an approval from before the request counts"),
        (
            "claim is Claim.HELD or may_have_taken_effect(error) or",
            "claim is Claim.HELD or",
            "a lost answer to a create gives the claim back",
        ),
        (
            "if claim is Claim.HELD or not await self._broker.unclaim(delivery.message):",
            "if not await self._broker.unclaim(delivery.message):",
            "a request's own operation is a conflict",
        ),
        (
            "if not has_token or not isinstance(step, Decided) or step.event.answered is not False:",
            "if False:",
            "each poll is repeated",
        ),
        ("_LATE_REPEATS: Final = 2", "_LATE_REPEATS: Final = 0", "a final poll after the grace is sent once"),
        (
            "if not is_final(delivery, self._clock()):\n            return await self._create_claimed",
            "if True:\n            return await self._create_claimed",
            "a user is asked after a claim that outlasted the deadline",
        ),
        (
            " | ClientClosedError) and not error.is_transient:",
            " | ClientClosedError):",
            "the refusal of a key that was replaced holds all requests",
        ),
        (
            "get_operation(operation_id), is_renewal=is_renewal)",
            "get_operation(operation_id))",
            "all polls go to the host that the service has left",
        ),
        (
            "step, found = await self._poll_again(delivery, step.delay), ExchangeResult.ANSWERED",
            "step, found = await asyncio.sleep(step.delay, Next.CREATE), ExchangeResult.ANSWERED",
            "a create is repeated without a poll",
        ),
        (
            "step = step._replace(created=delivery.request)",
            "pass",
            "the phone is not told of what a repeated create finds",
        ),
    ),
    "worker/announcements.py": (
        (
            "asyncio.timeout(CALL_WITHIN), self._room",
            "asyncio.timeout(None), self._room",
            "a push that hangs has no end",
        ),
        (
            "        except (Exception, asyncio.CancelledError):  # of",
            "        except (TimeoutError, asyncio.CancelledError):  # of",
            "what a push raises is not handled",
        ),
    ),
    "worker/serving.py": (
        (
            "            self._announcements.add(decision.created)",
            "            self._announcements._on_created(decision.created).send(None)",
            "what a push raises ends the delivery",
        ),
        (
            "            await self._give_back(message, _REFUSED_FOR)\n",
            "",
            "an outcome that did not fit on the disk comes again after its lease",
        ),
        (
            "        except (KeylessError, UnavailableError):  # the worker's or the broker's, and not the request's\n",
            "        except KeylessError:\n",
            "a broker that is away ends requests",
        ),
        (
            "            finally:  # the operation is there, whatever the broker says\n    ",
            "            finally:\n                pass\n",
            "the phone is not told if the put-off is not confirmed",
        ),
        (
            "return self._age(message) >= self._claims_last or await self._broker.has_claim(message)",
            "return False",
            "the event says that nobody was asked",
        ),
        (
            "            self._reporter.take_failure = str(error)\n",
            "",
            "a worker whose takes fail says that it is well",
        ),
        (
            "self._silences, self._reporter.take_failure = 0, None",
            "self._silences = 0",
            "a worker that takes again says that it cannot",
        ),
        (
            "except UnavailableError as error:\n            self._silences += 1",
            "except RefusedError as error:\n            self._silences += 1",
            "a broker that vanishes ends workers",
        ),
    ),
    "worker/messages.py": (
        (
            "return 0 < self.number - 1 <= self.failures",
            "return 0 < self.failures",
            "the phone is told again after polls that failed",
        ),
    ),
    "worker/applications.py": (
        (
            "    except BaseException:  # after a cancellation, too, the outcome must come again\n",
            "    except Exception:\n",
            "an outcome is not put off after a cancellation",
        ),
    ),
    "worker/sqlite/broker.py": (
        (
            "with suppress(TimeoutError):",
            "with suppress(TimeoutError, asyncio.CancelledError):",
            "a wait for a change loses its cancellation",
        ),
    ),
    "worker/sqlite/schema.py": (
        (
            "        if connection.in_transaction:\n",
            "        if connection.in_transaction or __import__('sys').exc_info()[0]:\n",
            "a full disk ends workers",
        ),
    ),
    "worker/approval_worker.py": (
        (
            "lease = self._limits.longest_delivery + _MARGIN",
            "lease = self._limits.longest_delivery / 4",
            "a delivery that hangs outlasts its lease",
        ),
    ),
    "worker/sqlite/failures.py": (
        (
            "sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, ",
            "sqlite3.SQLITE_LOCKED, ",
            "a file that cannot be written for a while ends workers",
        ),
    ),
    "worker/tables.py": (
        (
            "                await chore.run()\n",
            "                for each in [*self._chores()][::-1]:\n                    await each.run()\n",
            "a step of the housekeeping that fails stops the others",
        ),
        (
            "pause = min(pause, _TRIES_AGAIN)",
            "pause = 1e9",
            "a step of the housekeeping that has failed is not repeated",
        ),
        (
            "except Exception as error:  # noqa: BLE001  # even",
            "except UnavailableError as error:  # even",
            "a step of the housekeeping that fails ends without a word",
        ),
        ("_FAILS_FOR: Final = 60.0", "_FAILS_FOR: Final = 1e9", "nobody sees that a step of the housekeeping fails"),
    ),
    "worker/monitoring.py": (
        (
            "except UnavailableError as error:\n            self._silence = str(error)\n",
            "except UnavailableError as error:\n            self._on_loss(BrokerError(str(error)))\n",
            "an inspection that is not answered ends the worker",
        ),
    ),
    "worker/broker.py": (
        (
            "LONGEST_PAUSE: Final = 300.0",
            "LONGEST_PAUSE: Final = 1e6",
            "an outcome that has failed for long comes again after hours",
        ),
    ),
    "_http/keys.py": (
        (
            "error.key_was_good = self._current is not None",
            "error.key_was_good = False",
            "a key function that fails for a while ends workers",
        ),
    ),
    "_http/transport.py": (
        (
            "elif isinstance(response, _Response) and not is_renewal:",
            "elif False:",
            "polls go on at the host that the service has left",
        ),
    ),
}
MUTANTS: Final = read_breakages(_BREAKAGES)
SIMULATOR: Final = "worker.simulation"


if __name__ == "__main__":
    sys.exit(main(MUTANTS, 60.0, description=__doc__, simulator=SIMULATOR))
