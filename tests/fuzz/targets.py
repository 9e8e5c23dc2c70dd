"""The readers of bytes from outside, each with what it promises for any bytes: a target raises where one is broken.

A reader returns a struct or raises one of its documented errors. What it returned is compared with what the standard
library reads in the same bytes: no approval may come from bytes that do not say so, and what is written again is read
as the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
import signing
from cryptography.hazmat.primitives.asymmetric import ec
from multidict import CIMultiDict

from aiokeyless._http import protocol
from aiokeyless._http.protocol import RawAnswer
from aiokeyless._http.redaction import Redaction
from aiokeyless._rules.approval import Verdict, evaluate
from aiokeyless._rules.backoff import requested_pause
from aiokeyless._token import Expectation, KeySet, read_token, verify
from aiokeyless.errors import ConfigurationError, DecodeError, InvalidRequestError, SignatureError, StatusError
from aiokeyless.models import Secret
from aiokeyless.ticket import ApprovalTicket
from aiokeyless.worker.decisions import fail, fail_unreadable
from aiokeyless.worker.messages import (
    EVENT_VERSION,
    REQUEST_VERSION,
    ApprovalEvent,
    ApprovalRequest,
    Delivery,
    FailureReason,
    Message,
    read_event,
    read_request,
    read_rest,
)
from aiokeyless.worker.nats.event_keys import EventKeys, is_about

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiokeyless.models import Operation

KEY: Final = "sdk-key-0123456789"
REDACTION: Final = Redaction(Secret(KEY))
NOW: Final = datetime(2026, 11, 24, 12, tzinfo=UTC)

OPERATION_ID: Final = "txn-1"
USER_ID: Final = "C0FFEE"
PAYLOAD: Final = "Pay 40"
EXTERNAL_USER_ID: Final = "ada"
TICKET: Final = ApprovalTicket.for_operation(
    OPERATION_ID, user_id=USER_ID, operation_payload=PAYLOAD, external_user_id=EXTERNAL_USER_ID, created_at=NOW
)


def plain(data: bytes | str) -> Any:
    """Return the JSON as the standard library reads it, or None where it is none.

    Bytes that are no UTF-8 may be in what no reader uses, such as unknown fields.
    """
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None


def digest(payload: str | None) -> str:
    return hashlib.sha256((payload or "").encode("utf-8", "surrogatepass")).hexdigest()


# -- answers


def answered(data: bytes) -> RawAnswer:
    return RawAnswer(200, {}, data)


def operation(data: bytes) -> None:
    """An operation, and what counts as its approval."""
    try:
        found = protocol.read(protocol.GET_OPERATION, "/", answered(data), REDACTION)
    except DecodeError:
        return
    assert repr(found)
    assert found.created_at is None or found.created_at.tzinfo is UTC
    said = plain(data)
    if found.is_approved:
        assert said["state"] == "approved"
        assert said["result"] is True
        assert not has_duplicate_keys(data)
    if evaluate(found, OPERATION_ID) is Verdict.APPROVED:
        assert found.is_approved
        assert said["operationId"] == OPERATION_ID
    if evaluate(found, OPERATION_ID, TICKET) is Verdict.APPROVED:
        assert evaluate(found, OPERATION_ID) is Verdict.APPROVED
        assert said["userId"].encode("utf-8", "surrogatepass").upper() == USER_ID.encode()  # of bytes: of ASCII alone
        assert said["operationPayload"] == PAYLOAD
        assert said["externalUserId"] == EXTERNAL_USER_ID
    again = protocol.read(protocol.GET_OPERATION, "/", answered(on_the_wire(found)), REDACTION)
    assert again == found


def on_the_wire(found: Operation) -> bytes:
    """Return an operation as the service would write it."""
    key = {} if found.api_key is None else {"apiKey": found.api_key.reveal()}
    names = {"node_id": "nodeId", "user_id": "userId", "external_user_id": "externalUserId", "auth_type": "authType"}
    names |= {"operation_id": "operationId", "operation_payload": "operationPayload"}
    fields = {names.get(name, name): value for name, value in found.to_dict().items()}
    return json.dumps(fields | key).encode()


def has_duplicate_keys(data: bytes) -> bool:
    """Return whether any object in the JSON has a key twice."""
    counts: list[bool] = []
    json.loads(data, object_pairs_hook=lambda pairs: counts.append(len(dict(pairs)) < len(pairs)))
    return any(counts)


def pending_operations(data: bytes) -> None:
    """The list of pending operations."""
    try:
        found = protocol.read(protocol.GET_PENDING, "/", answered(data), REDACTION)
    except DecodeError:
        return
    assert [each.operation_id for each in found] == [each["operationId"] for each in plain(data)]
    again = protocol.read(protocol.GET_PENDING, "/", answered(msgspec.json.encode(found)), REDACTION)
    assert again == found


def created(data: bytes) -> None:
    """The answer to a create."""
    try:
        answer = protocol.read(protocol.POST_OPERATION, "/", answered(data), REDACTION)
    except DecodeError:
        return
    assert plain(data)["success"] is answer.success
    assert not has_duplicate_keys(data)


def authentications(data: bytes) -> None:
    """Telemetry's attempts."""
    try:
        found = protocol.read(protocol.GET_AUTHENTICATIONS, "/", answered(data), REDACTION)
    except DecodeError:
        return
    attempts = [attempt for user in plain(data)["content"] for attempt in user["authentications"]]
    assert len(found.attempts) == len(attempts)
    for attempt in found.attempts:
        assert attempt.failed or attempt.result in {None, "APPROVED"}
        assert json.dumps(attempt.to_dict())


ENDPOINTS: Final[tuple[protocol.Endpoint[Any], ...]] = (protocol.GET_OPERATION, protocol.POST_OPERATION)


def refusal(data: bytes) -> None:
    """An answer with a status that is no success: a line with the status, header lines, an empty line, the body."""
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.decode("utf-8", "surrogateescape").split("\n")
    status = int(first) if first.isascii() and first.isdecimal() and len(first) == 3 else 500
    headers = CIMultiDict([(name, value) for name, _, value in (line.partition(":") for line in lines)])
    for endpoint in ENDPOINTS:
        if status in endpoint.success:
            continue
        try:
            protocol.read(endpoint, "/v2/operations", RawAnswer(status, headers, body), REDACTION)
        except StatusError as error:
            check_refusal(error, status)
        else:
            raise AssertionError(f"{status} was read as a success")


def check_refusal(error: StatusError, status: int) -> None:
    assert error.status == status
    assert error.is_transient == (status in {408, 425, 429} or status // 100 == 5)
    assert error.retry_after is None or 0.0 <= error.retry_after < math.inf
    assert 0.0 <= requested_pause(error) <= 120.0
    for text in (error.detail, error.request_id):
        assert text is None or (0 < len(text) <= 200 and text.isprintable())
    assert str(error).isprintable()
    assert KEY not in f"{error} {error.detail} {error.request_id}"


# -- what was saved


def ticket(data: bytes) -> None:
    """A ticket, as bytes and as text."""
    for text in (data, data.decode("utf-8", "surrogateescape")):
        try:
            found = ApprovalTicket.from_json(text)
        except ConfigurationError as error:
            assert error.argument  # noqa: PT017  # an error is one of the two correct results
            continue
        said = plain(text)
        assert found.operation_id == said["operation_id"]
        assert found.user_id == said["user_id"].upper()
        assert found.payload_sha256 == said["payload_sha256"]
        assert found.external_user_id == said.get("external_user_id")
        assert found.remaining() >= 0.0
        assert ApprovalTicket.from_json(found.to_json()) == found


# -- the worker's messages

ROOM_FOR_EVENT: Final = 8 << 10  # bytes
FIELDS: Final = frozenset(ApprovalRequest.__struct_fields__)


def read(data: bytes) -> Delivery:
    return read_request(message(data), longest_wait=86400.0, largest_request=1 << 20)


def message(data: bytes) -> Message:
    return Message(body=data, stored_at=NOW, number=1, is_untried=True)


def request(data: bytes) -> None:
    """A request to a worker, and the event about it where it is none."""
    try:
        delivery = read(data)
    except InvalidRequestError as error:
        _, context = read_rest(data)
        event = fail_unreadable(message(data), error, now=NOW).event
    else:
        context = delivery.request.context
        event = fail(delivery, FailureReason.CONFLICT, "", now=NOW).event
        check_request(delivery, plain(data))
    encoded = msgspec.json.encode(event)
    assert msgspec.json.encode(read_event(encoded)) == encoded
    assert len(encoded) <= len(data) + ROOM_FOR_EVENT
    assert plain(bytes(context)) == plain(bytes(event.context))


def check_request(delivery: Delivery, said: Mapping[str, Any]) -> None:
    ticket = delivery.ticket
    operation_id = said["operation_id"]
    assert said["version"] == REQUEST_VERSION
    assert said.keys() <= FIELDS
    assert ticket.operation_id == operation_id
    assert ticket.user_id == said["user_id"].upper()
    assert ticket.external_user_id == said.get("external_user_id")
    assert ticket.payload_sha256 == digest(said.get("operation_payload"))
    assert delivery.request.operation_payload == said.get("operation_payload")
    assert plain(bytes(delivery.request.context)) == said.get("context")
    assert ticket.created_at <= NOW
    assert timedelta() <= ticket.expires_at - ticket.created_at <= timedelta(days=1)
    asked_again = msgspec.structs.replace(delivery.request, user_id=ticket.user_id, created_at=ticket.created_at)
    again = read(msgspec.json.encode(asked_again))
    assert (again.ticket, again.request.operation_payload) == (ticket, delivery.request.operation_payload)


def event(data: bytes) -> None:
    """An event of a worker."""
    try:
        found: ApprovalEvent = read_event(data)
    except msgspec.DecodeError:
        return
    said = plain(data)
    assert said["version"] == EVENT_VERSION
    assert said["outcome"] == found.outcome
    assert said.get("operation_id") == found.operation_id
    assert said.get("payload_sha256") == found.payload_sha256
    assert plain(bytes(found.context)) == said.get("context")
    assert is_about(data, found)
    encoded = msgspec.json.encode(found)
    assert msgspec.json.encode(read_event(encoded)) == encoded


SECRETS: Final = ("0123456789abcdef" * 2, "fedcba9876543210" * 2)
KEYS: Final = EventKeys(*SECRETS)
FLEET: Final = "keyless"


def signature(data: bytes) -> None:
    """The signature of an event: a line with it, and the event; and what the right signature becomes by that line."""
    line, _, signed = data.partition(b"\n")
    header = line.decode("utf-8", "surrogateescape")
    genuine = genuine_signatures(signed)
    right = KEYS.sign(signed, fleet=FLEET)
    assert right == genuine[0]
    at = len(line) % len(right)
    changed = (right + header, header + right, right[:at] + header + right[at:], right[:at] + header, right[:-1])
    for each in (header, *changed):
        assert KEYS.verify(signed, each, fleet=FLEET) == (each in genuine)
    assert not KEYS.verify(signed + b" ", right, fleet=FLEET)
    assert not KEYS.verify(signed, right, fleet="other")


def genuine_signatures(signed: bytes) -> list[str]:
    texts = []
    for secret in SECRETS:
        key_id = hashlib.sha256(b"aiokeyless event key id\0" + secret.encode()).hexdigest()[:16]
        message = b"aiokeyless event\0" + FLEET.encode() + b"\0" + signed
        texts.append(f"v1 {key_id} {hmac.new(secret.encode(), message, 'sha256').hexdigest()}")
    return texts


# -- signed transactions

SIGNER: Final = ec.derive_private_key(0xF00D, ec.SECP256R1())
JWK: Final = signing.ec_jwk(SIGNER)
EXPECTED: Final = Expectation(
    user_id=USER_ID,
    transaction_data=PAYLOAD,
    external_user_id=EXTERNAL_USER_ID,
    issuer=None,
    audience=None,
    max_age=300.0,
    leeway=30.0,
)


def signed_transaction(data: bytes) -> None:
    """A token as text, and a token that is correctly signed: a line with its header, and its claims."""
    with contextlib.suppress(SignatureError):
        read_token(data.decode("latin-1"))
    header, _, claims = data.partition(b"\n")
    message = f"{signing.encoded(header)}.{signing.encoded(claims)}"
    text = f"{message}.{signing.encoded(signing.sign_es256(message.encode(), SIGNER))}"
    key = KeySet(json.dumps({"keys": [JWK]}).encode()).find("k1")
    assert key is not None
    try:
        token = read_token(text)
        found = verify(token, key, EXPECTED, NOW.timestamp())
    except SignatureError:
        return
    said, head = plain(claims), plain(header)
    assert not has_duplicate_keys(claims)
    assert not has_duplicate_keys(header)
    assert (head["alg"], head["kid"]) == ("ES256", token.key_id)
    assert not head.keys() & {"b64", "crit", "jku", "jwk", "x5c", "x5u", "zip"}
    assert said["sub"].encode().upper() == USER_ID.encode()
    assert (said["td"], said["external_user_id"]) == (PAYLOAD, EXTERNAL_USER_ID)
    assert "aud" not in said
    assert type(said["iat"]) is int
    assert timedelta(seconds=-30) <= NOW - found.issued_at <= timedelta(seconds=330)
    assert found.signed_sha256 == hashlib.sha256(message.encode()).hexdigest()


def keys_of_a_tenant(data: bytes) -> None:
    """A key set, and each key in it that may verify."""
    try:
        found = KeySet(data)
    except ValueError:
        return
    keys = [key for key in plain(data)["keys"] if isinstance(key, dict)]
    for key_id in {str(key["kid"]) for key in keys if isinstance(key.get("kid"), str)}:
        if found.find(key_id) is not None:
            [key] = [key for key in keys if key.get("kid") == key_id]
            assert (key["kty"], key.get("crv")) in {("EC", "P-256"), ("RSA", None)}
            assert key.get("use", "sig") == "sig"
            assert not key.keys() & {"d", "p", "q", "k"}


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        *(operation, pending_operations, created, authentications, refusal),
        *(ticket, request, event, signature, signed_transaction, keys_of_a_tenant),
    )
}


def check(name: str, data: bytes) -> None:
    """Run a target; what it raises names the target and its input."""
    try:
        TARGETS[name](data)
    except BaseException as error:
        error.add_note(f"target {name}, input {data!r}")
        raise
