"""Approvals in Django's synchronous views. In a project the model is in `models.py`, and the last line in `urls.py`."""

import os
import uuid
from contextlib import suppress

from django.db import close_old_connections, models, transaction
from django.http import HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.urls import path
from django.views.decorators.http import require_POST

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
)
from aiokeyless.sync import KeylessClient

EXPIRES_IN = 120.0  # seconds for an approval; tests set fewer

keyless = KeylessClient(lambda: os.environ["KEYLESS_API_KEY"])  # manage.py imports this module, and needs no key


class Payment(models.Model):
    """A payment: the state changes once, from asked to approved, timed out or refused."""

    order = models.CharField(max_length=100)
    user_id = models.CharField(max_length=128)
    ticket = models.TextField()
    state = models.CharField(max_length=10, default="asked")

    class Meta:
        """The user is asked about an order once, however often the browser repeats it."""

        app_label = "payments"
        unique_together = (("order", "user_id"),)

    def decide(self, state: str) -> str:
        """Decide it before anybody is told: the first outcome counts, and a late approval changes nothing."""
        if Payment.objects.filter(pk=self.pk, state="asked").update(state=state) and state == "approved":
            print(f"{self.order}: pay", flush=True)  # once: after a crash right here, repeat it under the same order
        self.refresh_from_db()
        return str(self.state)


@require_POST  # a link on another site asks nobody: a GET needs no CSRF token
@transaction.non_atomic_requests  # the payment is stored before the phone is asked
def pay(request: HttpRequest, order: str) -> JsonResponse:
    """Ask the phone of the user whom your login stored in the session, and never of one whom the browser names."""
    user, payload = request.session["user_id"], "Pay 40 to Alice"
    new = ApprovalTicket.for_operation(
        str(uuid.uuid4()), user_id=user, operation_payload=payload, expires_in=EXPIRES_IN, require_auth_type="biom"
    )
    found, _ = Payment.objects.get_or_create(order=order, user_id=user, defaults={"ticket": new.to_json()})
    if found.state == "asked":
        operation_id = ApprovalTicket.from_json(found.ticket).operation_id
        with suppress(AlreadyApprovedError):  # the answer to this question, which `payment` finds
            keyless.create_operation(user, operation_id=operation_id, operation_payload=payload, if_exists="resume")
    return JsonResponse({"state": found.state})


@transaction.non_atomic_requests  # with ATOMIC_REQUESTS, it would hold a transaction
def payment(request: HttpRequest, order: str) -> JsonResponse:
    """Answer once a payment is decided, or that it is pending: the page then asks again."""
    found = get_object_or_404(Payment, order=order, user_id=request.session["user_id"])
    state = found.state
    if state == "asked":
        close_old_connections()  # a wait needs none
        try:
            approved = keyless.hold_for_approval(ApprovalTicket.from_json(found.ticket), seconds=25)
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
