"""The record of the orders and their payments."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from django.db import models, transaction

from aiokeyless import ApprovalTicket

LATE = timedelta(seconds=2)  # after an approval's time, for a browser on its way: what is found later pays nothing
OPEN = ("asking", "asked")  # asking: the answer to the create may be lost, and the phone was not told


class Customer(models.Model):
    """A user, by their id at Keyless, in upper case."""

    user_id = models.CharField(max_length=128, unique=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Begin a transaction while nobody else has one about this customer: an UPDATE locks in each database."""
        with transaction.atomic():
            Customer.objects.filter(pk=self.pk).update(user_id=self.user_id)
            yield


class Order(models.Model):
    """An order, which your site may change. Before it does, it locks the customer."""

    number = models.CharField(max_length=100, unique=True)
    customer = models.ForeignKey(Customer, models.CASCADE)
    text = models.TextField()  # what the user approves


class Payment(models.Model):
    """A payment: its state changes from asking to asked, and once to approved, timed out or refused."""

    order = models.OneToOneField(Order, models.PROTECT)  # the user is asked about it once
    customer = models.ForeignKey(Customer, models.CASCADE)
    ticket = models.TextField()
    ends = models.DateTimeField()
    state = models.CharField(max_length=10, default="asking")

    @property
    def is_late(self) -> bool:
        """Whether an approval that is found now pays nothing."""
        return bool(datetime.now(UTC) > self.ends + LATE)

    def is_about(self, order: Order) -> bool:
        """Return whether the user was asked for exactly this order, as it is now."""
        ticket = ApprovalTicket.from_json(self.ticket)
        is_same_text = ticket.payload_sha256 == sha256(order.text.encode()).hexdigest()
        return is_same_text and bool(order.customer_id == self.customer_id)

    def decide(self, state: str) -> str:
        """Store an outcome before anybody is told: the first one counts, and it must be about the order of now."""
        with self.customer.locked():
            order = Order.objects.get(pk=self.order_id)
            if state == "approved" and self.is_late:
                state = "timed out"
            elif state == "approved" and not self.is_about(order):
                state = "refused"
            # Your site stores what else follows from a payment here, in the same transaction.
            changed = Payment.objects.filter(pk=self.pk, state__in=OPEN).update(state=state)
        if changed and state == "approved":
            print(f"{order.number!r}: pay", flush=True)  # once: after a crash right here, repeat it under this number
        self.refresh_from_db()
        return str(self.state)


class Hold(models.Model):
    """A browser that waits. Those of a killed process count until their end."""

    customer = models.ForeignKey(Customer, models.CASCADE)
    ends = models.DateTimeField()
