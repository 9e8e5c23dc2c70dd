"""The record of examples/message_handler.py, seen from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


class PaymentRecord:
    """Its states, and the money that moved, in the transaction that marks a payment as paid."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database  # in autocommit
        database.executescript("""
            CREATE TABLE payments (id PRIMARY KEY, user_id, asked_at, state);
            CREATE TABLE moved (id TEXT);
            CREATE TRIGGER move AFTER UPDATE ON payments WHEN NEW.state = 'paid' BEGIN
                INSERT INTO moved VALUES (NEW.id);
            END;
        """)

    @property
    def states(self) -> dict[str, str]:
        """The state of each payment."""
        return dict(self.database.execute("SELECT id, state FROM payments"))

    @property
    def moved(self) -> list[str]:
        """The payments whose money moved, once for each time."""
        return [str(payment) for (payment,) in self.database.execute("SELECT id FROM moved")]
