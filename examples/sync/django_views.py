"""Approvals in Django's synchronous views; `urlpatterns` belongs to the project's `urls.py`."""

from django.contrib.sessions.backends.base import SessionBase
from django.db import close_old_connections, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST

from aiokeyless import (
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
)
from aiokeyless.sync import KeylessClient

keyless = KeylessClient()


class Request(HttpRequest):  # type: ignore[misc]  # Django has no types
    """A request with the session that Django's middleware gives it."""

    session: SessionBase


@require_POST  # type: ignore[untyped-decorator]  # a link on another site asks nobody: a GET needs no CSRF token
def pay(request: Request) -> JsonResponse:
    """Ask the phone of the user whom your login stored in the session, and never of one whom the browser names."""
    ticket = keyless.create_operation(
        request.session["user_id"], operation_payload="Pay 40 to Alice", require_auth_type="biom"
    )
    request.session["ticket"] = ticket.to_json()
    return JsonResponse({"id": ticket.operation_id})


@transaction.non_atomic_requests  # type: ignore[untyped-decorator]  # with ATOMIC_REQUESTS, it would hold a transaction
def payment(request: Request) -> JsonResponse:
    """Answer once it is approved, or that it is pending: the page then asks again."""
    ticket = ApprovalTicket.from_json(request.session["ticket"])
    close_old_connections()  # the session's: a wait needs none
    try:
        approved = keyless.hold_for_approval(ticket, seconds=25)
    except ApprovalUnknownError:  # perhaps approved: the page asks again in a while, which polls once more
        return JsonResponse({"state": "unknown"})
    except ApprovalTimeoutError:
        return JsonResponse({"state": "timed out"})
    except ApprovalError:  # a PIN, or an answer about something else
        return JsonResponse({"state": "refused"})
    except ClientClosedError:  # the server stops: the page asks the next one
        return JsonResponse({"state": "pending"})
    return JsonResponse({"state": "pending" if approved is None else "approved"})


urlpatterns = [path("pay", pay), path("payment", payment)]
