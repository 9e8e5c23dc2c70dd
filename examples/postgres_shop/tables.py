"""The shop's tables: an order, and a payment for each order that its customer approved."""

import os

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql:///shop")


class Table(DeclarativeBase):
    """What all tables are made from."""


class Order(Table):
    """An order. Its id is its operation's id at Keyless, too."""

    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str]  # who must approve, in Keyless: a real shop has it from the customer's enrolment
    text: Mapped[str]  # what the customer is asked to approve
    state: Mapped[str] = mapped_column(default="asked")  # then paid or not paid


class Payment(Table):
    """A payment, for the job that makes them at the bank. The order's id is the bank's idempotency key."""

    __tablename__ = "payments"

    order_id: Mapped[str] = mapped_column(ForeignKey("orders.id"), primary_key=True)
