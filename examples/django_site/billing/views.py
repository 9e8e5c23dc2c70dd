"""Views of Django that ask, and answer a long poll."""

import os
import uuid

from django.core.exceptions import PermissionDenied
from django.db import close_old_connections, transaction
from django.http import Http404, HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.urls import path
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
    KeylessError,
)
from aiokeyless.sync import KeylessClient

from .models import Payment

PAYLOAD = "Pay 40 to Alice"  # your site makes it of the order
EXPIRES_IN = 120.0  # seconds for an approval; tests set fewer

keyless = KeylessClient(lambda: os.environ["KEYLESS_API_KEY"])  # manage.py imports this module, and needs no key


def user_of(request: HttpRequest) -> str:
    """Return the user whom your login stored in the session, by their id at Keyless."""
    if user := request.session.get("user_id"):
        return str(user)
    raise PermissionDenied


@require_POST  # which Django's middleware keeps other sites from
@transaction.non_atomic_requests  # the payment is stored before the phone is asked
def pay(request: HttpRequest, order: str) -> JsonResponse:
    """Ask the user's phone about an order, once, however often the browser repeats it.

    Your site looks up whose order it is. Here, it is of the user who asks first.
    """
    user = user_of(request)
    new = ApprovalTicket.for_operation(
        str(uuid.uuid4()), user_id=user, operation_payload=PAYLOAD, expires_in=EXPIRES_IN, require_auth_type="biom"
    )
    found, _ = Payment.objects.get_or_create(order=order, defaults={"user_id": user, "ticket": new.to_json()})
    if found.user_id != user:
        raise Http404
    state, ticket = found.state, ApprovalTicket.from_json(found.ticket)
    if state == "asked" and ticket.remaining():
        try:
            keyless.create_operation(
                user, operation_id=ticket.operation_id, operation_payload=PAYLOAD, if_exists="resume"
            )
            # here, notify the phone
        except AlreadyApprovedError:
            pass  # `payment` finds the approval
        except KeylessError as error:
            if not error.is_transient:
                raise
            state = "not asked"  # perhaps: the browser asks once more
    return JsonResponse({"state": state})


@never_cache
@transaction.non_atomic_requests  # with ATOMIC_REQUESTS, it would hold a transaction
def payment(request: HttpRequest, order: str) -> JsonResponse:
    """Answer once a payment is decided, or that it is pending: the page then asks again."""
    found = get_object_or_404(Payment, order=order, user_id=user_of(request))
    state = found.state
    if state == "asked":
        close_old_connections()  # a wait needs none; CONN_MAX_AGE keeps it nevertheless
        ticket = ApprovalTicket.from_json(found.ticket)
        try:
            approved = keyless.hold_for_approval(ticket, seconds=25, if_missing="wait")
            state = "pending" if approved is None else found.decide("approved")
        except ApprovalUnknownError:  # perhaps approved: the page asks again in a while, which polls once more
            state = "unknown"
        except ApprovalTimeoutError:
            state = found.decide("timed out")
        except ApprovalError:  # a PIN, or an answer about something else
            state = found.decide("refused")
        except ClientClosedError:  # the server stops: the page asks the next one
            state = "pending"
    return JsonResponse({"state": state})


urlpatterns = [path("payments/<order>/pay", pay), path("payments/<order>", payment)]
