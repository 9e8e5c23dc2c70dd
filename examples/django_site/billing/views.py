"""Views of Django that ask, and answer a long poll."""

import os
import uuid
from datetime import UTC, datetime

from django.core.exceptions import PermissionDenied
from django.db import close_old_connections, transaction
from django.http import HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.urls import path
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ClientClosedError,
    KeylessError,
)
from aiokeyless.sync import KeylessClient

from .models import OPEN, Customer, Order, Payment

EXPIRES_IN = 120.0  # seconds for an approval; tests set fewer
QUESTIONS, HOLDS = 3, 2  # of one user at once: nobody rings a phone all day, or occupies all threads
TOO_MANY = "Too many pages of yours wait already. Close one, or ask again in a second."

keyless = KeylessClient(lambda: os.environ["KEYLESS_API_KEY"])  # manage.py imports this module, and needs no key


def customer_of(request: HttpRequest) -> Customer:
    """Return the user whom your login stored in the session, by their id at Keyless."""
    try:
        customer: Customer = Customer.objects.get(user_id=str(request.session.get("user_id")).upper())
    except Customer.DoesNotExist:
        raise PermissionDenied from None
    return customer


@require_POST  # which Django's middleware keeps other sites from
@transaction.non_atomic_requests  # the payment is stored before the phone is asked
def pay(request: HttpRequest, number: str) -> JsonResponse:
    """Ask the user's phone about an order, once, however often the browser repeats it."""
    customer = customer_of(request)
    with customer.locked():
        order = get_object_or_404(Order, number=number, customer=customer)
        found = Payment.objects.filter(order=order).first()
        if found is None:  # before asking
            if customer.payment_set.filter(state__in=OPEN, ends__gt=datetime.now(UTC)).count() >= QUESTIONS:
                return refuse(429, "Your phone shows three questions. Answer one of them first.")
            new = ApprovalTicket.for_operation(
                str(uuid.uuid4()),
                user_id=customer.user_id,
                operation_payload=order.text,
                expires_in=EXPIRES_IN,
                require_auth_type="biom",
            )
            found = Payment.objects.create(order=order, customer=customer, ticket=new.to_json(), ends=new.expires_at)
    if not found.is_about(order):
        return refuse(409, "This order has changed since you were asked. Ask about it under a new number.")
    state, ticket = found.state, ApprovalTicket.from_json(found.ticket)
    if state == "asking" and ticket.remaining():
        try:
            with customer.place("asks", QUESTIONS) as is_free:
                if not is_free:
                    return refuse(429, TOO_MANY)
                keyless.create_operation(
                    customer.user_id, operation_id=ticket.operation_id, operation_payload=order.text, if_exists="resume"
                )
        except AlreadyApprovedError:
            pass  # `payment` finds the approval
        except KeylessError as error:
            if not error.is_transient:
                raise
            return JsonResponse({"state": "not asked"}, status=503)  # perhaps: the browser asks once more
        state = "asked"
        if Payment.objects.filter(pk=found.pk, state="asking").update(state=state):
            notify_phone(ticket)
    return JsonResponse({"state": state})


def refuse(status: int, sentence: str) -> JsonResponse:
    """Return an answer that says why."""
    return JsonResponse({"error": sentence}, status=status)


def notify_phone(ticket: ApprovalTicket) -> None:
    """Send a push notification: your own function. It is called once, after the operation is there."""
    print(f"push to {ticket.user_id}: {ticket.operation_id}", flush=True)


@never_cache
@transaction.non_atomic_requests  # with ATOMIC_REQUESTS, it would hold a transaction
def payment(request: HttpRequest, number: str) -> JsonResponse:
    """Answer once a payment is decided, or that it is pending: the page then asks again."""
    customer = customer_of(request)
    found = get_object_or_404(Payment, order__number=number, customer=customer)
    state = found.state
    if state in OPEN and found.is_late:
        state = found.decide("timed out")
    elif state in OPEN:
        with customer.place("waits", HOLDS) as is_free:
            if not is_free:
                return refuse(429, TOO_MANY)
            close_old_connections()  # a wait needs none; CONN_MAX_AGE keeps it nevertheless
            state = wait(found)
    return JsonResponse({"state": state})


def wait(found: Payment) -> str:
    """Wait for a piece of the time, and return the state."""
    try:
        ticket = ApprovalTicket.from_json(found.ticket)
        approved = keyless.hold_for_approval(ticket, seconds=25, if_missing="wait")
        return "pending" if approved is None else found.decide("approved")
    except ApprovalTimeoutError:  # also if it is unknown: nobody finds an approval later
        return found.decide("timed out")
    except ApprovalError:  # a PIN, or an answer about something else
        return found.decide("refused")
    except ClientClosedError:  # the server stops: the page asks the next one
        return "pending"


urlpatterns = [path("payments/<number>/pay", pay), path("payments/<number>", payment)]
