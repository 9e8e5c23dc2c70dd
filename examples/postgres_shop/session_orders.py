"""The reader in synchronous code, with a session of SQLAlchemy: what it adds is committed with the outcome."""

from collections.abc import Callable

from sqlalchemy.orm import Session

from aiokeyless.sync import next_outcome
from aiokeyless.worker import ApprovalEvent


def read(session: Session, settle: Callable[[Session, ApprovalEvent], None]) -> None:
    """Settle orders as their outcomes come; the session commits after each, if nothing was raised."""
    while True:
        with next_outcome(session, "shop") as event:
            settle(session, event)
