"""The three streams and the consumer that workers use: made where they are missing, else checked.

Their settings carry the guarantees, so an existing stream with others is refused and never changed: that is left to the
operator of the broker.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NamedTuple

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from aiokeyless.errors import BrokerError
from aiokeyless.worker.logs import log
from aiokeyless.worker.messages import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nats.js import JetStreamContext

    from .fleet import Fleet

_TENANT: Final = "aiokeyless-tenant"  # the key in a stream's metadata
_SERVICE: Final = "aiokeyless-service"
_UNLIMITED: Final = -1
_OF_THE_STREAM: Final = ("max_msgs", "max_bytes")  # limits of the whole, and not of a subject
_NAME_IN_USE: Final = 10058  # the broker's code: there is a stream of this name, with other settings
_ACK_TOKENS: Final = 9
_LONG_ACK_TOKENS: Final = 11
#: Pull requests that may wait at the consumer: a worker has a few at a time, and there may be a hundred workers.
_MAX_WAITING: Final = 8192


class StreamSettings(NamedTuple):
    """What an operator may choose.

    Attributes:
        replicas: Servers of the cluster that hold each message: 1, 3 or 5; None: 1 where a stream is made, and any
            number where it is there. Default: None.
        duplicate_window: Seconds for which a stream remembers what it has: within it a request that is published
            twice is one, an outcome is published once, an operation id belongs to one request. No wait may be longer.
            Default: 86400, a day.
        max_age: Seconds for which outcomes are kept for applications that are away; `duplicate_window`, where that is
            more. Default: 604800, a week.
    """

    replicas: int | None = None
    duplicate_window: float = 24 * 3600.0
    max_age: float = 7 * 24 * 3600.0


async def prepare(
    stream: JetStreamContext,
    fleet: Fleet,
    settings: StreamSettings,
    *,
    ack_wait: float,
    service: str,
) -> float:
    """Make or check the streams and the consumer.

    Args:
        stream: The broker's JetStream.
        fleet: The fleet.
        settings: What the operator chose.
        ack_wait: Seconds after which a delivery that was not acknowledged is repeated: longer than one takes at most.
        service: Base URL of the service that the workers of the fleet ask.

    Returns:
        Seconds of the duplicate window that is in force, which bounds `expires_in`.

    Raises:
        BrokerError: One of them has other settings, or cannot be made; or the fleet is another tenant's.
    """
    try:
        requests = await _stream(stream, _requests(fleet, settings, service))
        _check_owner(requests, fleet, service)
        outcomes = await _stream(stream, _outcomes(fleet, settings))
        window = min(requests.duplicate_window, outcomes.duplicate_window)
        claims = await _stream(stream, _claims(fleet, settings, window))
        _check(f"stream {fleet.claims}", _claims_differences(claims, window))
        await _consumer(stream, fleet, ack_wait)
    except nats.js.errors.ServiceUnavailableError:
        raise BrokerError(_no_jetstream(fleet)) from None
    except nats.js.errors.APIError as error:
        raise BrokerError(f"the broker refused to make a stream or its consumer: {error.description}") from None
    except nats.errors.Error as error:
        raise BrokerError(
            f"the broker did not answer a JetStream request ({type(error).__name__}): is JetStream on, and may this "
            f"user publish to {fleet.api_prefix}.>, $JS.ACK.>, {fleet.name}.approvals.* and {fleet.name}.claims.*?"
        ) from None
    return window


def _no_jetstream(fleet: Fleet) -> str:
    if fleet.domain is None and fleet.prefix is None:
        return "the broker has no JetStream: start it with -js, or enable JetStream for this account"
    return f"the broker has no JetStream at {fleet.api_prefix}: check the domain or the prefix"


async def restore_consumer(stream: JetStreamContext, fleet: Fleet, *, ack_wait: float) -> None:
    """Make the consumer again if it was deleted; while the broker has no leader for it, do nothing.

    Raises:
        BrokerError: It has other settings now, or its stream is gone.
    """
    try:
        await _consumer(stream, fleet, ack_wait)
    except nats.js.errors.NotFoundError:
        raise BrokerError(f"the stream {fleet.requests} is gone, and the requests in it") from None
    except nats.errors.Error as error:
        log(logging.WARNING, "broker.unsettled", {"error": f"{type(error).__name__}: {error}"})


def _requests(fleet: Fleet, settings: StreamSettings, service: str) -> StreamConfig:
    return StreamConfig(
        name=fleet.requests,
        description="Requests for approvals, until they are decided",
        subjects=[fleet.request_subject],
        retention=RetentionPolicy.WORK_QUEUE,  # a message is there as long as its wait lasts, and goes with its ack
        storage=StorageType.FILE,
        num_replicas=settings.replicas or 1,
        duplicate_window=settings.duplicate_window,
        metadata={key: value for key, value in ((_SERVICE, service), (_TENANT, fleet.tenant)) if value},
    )


def _outcomes(fleet: Fleet, settings: StreamSettings) -> StreamConfig:
    return StreamConfig(
        name=fleet.outcomes,
        description="How requests for approvals ended",
        subjects=[fleet.outcome_subject(outcome) for outcome in Outcome],
        retention=RetentionPolicy.LIMITS,  # any number of applications may read them, each at its own pace
        storage=StorageType.FILE,
        num_replicas=settings.replicas or 1,
        duplicate_window=settings.duplicate_window,
        max_age=max(settings.max_age, settings.duplicate_window),
    )


def _claims(fleet: Fleet, settings: StreamSettings, window: float) -> StreamConfig:
    return StreamConfig(
        name=fleet.claims,
        description="Which request an operation id belongs to",
        subjects=[fleet.claim_subject("*")],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        num_replicas=settings.replicas or 1,
        duplicate_window=window,
        max_age=window,
    )


def _check_owner(requests: StreamConfig, fleet: Fleet, service: str) -> None:
    """Refuse a fleet whose requests are for another service or tenant: it would ask their users, and approve for them.

    A stream that an operator made may not say which service it is for. Then that cannot be compared. The tenant always
    is: all tenants of a region have one base URL.
    """
    found = requests.metadata or {}
    if (owner := found.get(_SERVICE, service)) != service:
        raise BrokerError(
            f"the fleet {fleet.name!r} on this broker belongs to {owner}, and this worker to {service}: "
            "give it another name"
        )
    if (tenant := found.get(_TENANT)) == fleet.tenant:
        return
    if tenant is None:
        raise BrokerError(
            f"the fleet {fleet.name!r} on this broker belongs to no tenant, and this worker to {fleet.tenant!r}: set "
            f"the metadata {_TENANT} of the stream {fleet.requests}, name no tenant, or give the fleet another name"
        )
    own = "names none" if fleet.tenant is None else f"to {fleet.tenant!r}"
    raise BrokerError(
        f"the fleet {fleet.name!r} on this broker belongs to the tenant {tenant!r}, and this worker {own}: "
        "name that one, or give the fleet another name"
    )


def is_delivery(reply: str, stream: str, consumer: str) -> bool:
    """Return whether a message with this reply subject is what the stream delivered to the consumer.

    An inbox takes messages from any user who may publish to it; but no client may publish with such a reply.

    Args:
        reply: The reply subject of the message: ``$JS.ACK.<stream>.<consumer>`` and five more tokens, or with a domain
            and an account in front of the stream, and at least five more.
        stream: Name of the stream.
        consumer: Name of the consumer.
    """
    tokens = reply.split(".")
    if tokens[:2] != ["$JS", "ACK"]:
        return False
    names = tokens[2:4] if len(tokens) == _ACK_TOKENS else tokens[4:6] if len(tokens) >= _LONG_ACK_TOKENS else []
    return names == [stream, consumer]


def _claims_differences(found: StreamConfig, window: float) -> Iterator[str]:
    if not 0 < (found.max_age or 0.0) <= window:
        # The outcome is forgotten by then: the same request again would pass for the first, and be approved again.
        yield f"max age is {found.max_age:g} s, not the duplicate window of {window:g} s"


def _wanted_consumer(fleet: Fleet, ack_wait: float) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=fleet.consumer,
        description="Workers that wait for approvals",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait,
        max_deliver=_UNLIMITED,  # a delivery is a poll: there are as many as it takes
        max_ack_pending=_UNLIMITED,  # each wait is an unacknowledged message
        max_waiting=_MAX_WAITING,
    )


async def _stream(stream: JetStreamContext, wanted: StreamConfig) -> StreamConfig:
    assert wanted.name is not None  # noqa: S101  # ours have one
    try:
        found = (await stream.stream_info(wanted.name)).config
    except nats.js.errors.NotFoundError:
        found = await _made(stream, wanted)
    _check(f"stream {wanted.name}", _stream_differences(found, wanted))
    return found


async def _made(stream: JetStreamContext, wanted: StreamConfig) -> StreamConfig:
    """Make a stream. Where another worker makes it at the same time, return what that one made."""
    try:
        return (await stream.add_stream(wanted)).config  # the same settings twice are no conflict
    except nats.js.errors.APIError as error:
        if error.err_code != _NAME_IN_USE:
            raise
        assert wanted.name is not None  # noqa: S101  # ours have one
        return (await stream.stream_info(wanted.name)).config


def _stream_differences(found: StreamConfig, wanted: StreamConfig) -> Iterator[str]:
    if sorted(found.subjects or []) != sorted(wanted.subjects or []):
        yield f"subjects are {found.subjects}, not {wanted.subjects}"
    for name in ("retention", "storage"):
        if getattr(found, name) != getattr(wanted, name):
            yield f"{name} is {getattr(found, name)}, not {getattr(wanted, name).value}"
    if found.duplicate_window < wanted.duplicate_window:
        yield f"duplicate window is {found.duplicate_window:g} s, less than {wanted.duplicate_window:g} s"
    if wanted.num_replicas not in {1, found.num_replicas}:
        yield f"replicas are {found.num_replicas}, not {wanted.num_replicas}"
    if found.max_age and (not wanted.max_age or found.max_age < wanted.duplicate_window):
        yield f"max age is {found.max_age:g} s: messages would vanish before their time"
    for name in (*_OF_THE_STREAM, "max_msgs_per_subject"):
        # Where new messages are refused, a subject's own old ones are dropped all the same, unless that is chosen too.
        refuses = found.discard == DiscardPolicy.NEW and (found.discard_new_per_subject or name in _OF_THE_STREAM)
        if (getattr(found, name) or _UNLIMITED) > 0 and not refuses:
            yield f"{name} is {getattr(found, name)}, and what is over it is dropped from the old end"
    yield from _unstorable(found, wanted)


def _unstorable(found: StreamConfig, wanted: StreamConfig) -> Iterator[str]:
    """Return what would keep messages from being stored, or let a publisher remove them."""
    if found.allow_rollup_hdrs:
        yield "it allows rollup headers, by which a publisher removes what others published"
    if found.no_ack:
        yield "it acknowledges nothing"
    if wanted.retention is RetentionPolicy.LIMITS and (found.max_msg_size or _UNLIMITED) > 0:
        yield f"max_msg_size is {found.max_msg_size}, and an outcome or a claim over it would never be stored"


async def _consumer(stream: JetStreamContext, fleet: Fleet, ack_wait: float) -> None:
    wanted = _wanted_consumer(fleet, ack_wait)
    try:
        found = (await stream.consumer_info(fleet.requests, fleet.consumer)).config
    except nats.js.errors.NotFoundError:
        found = (await stream.add_consumer(fleet.requests, wanted)).config
    assert found is not None  # noqa: S101  # the broker tells it
    _check(f"consumer {fleet.consumer} of stream {fleet.requests}", _consumer_differences(found, wanted))


def _consumer_differences(found: ConsumerConfig, wanted: ConsumerConfig) -> Iterator[str]:
    # Its ack policy is not checked: a work queue has no consumers but those with explicit acks.
    if (found.ack_wait or 0.0) < (wanted.ack_wait or 0.0):
        yield f"ack wait is {found.ack_wait:g} s, less than a delivery may take, {wanted.ack_wait:g} s"
    for name in ("max_deliver", "max_ack_pending"):
        if (getattr(found, name) or _UNLIMITED) > 0:
            yield f"{name} is {getattr(found, name)}, not unlimited"
    if found.filter_subject or found.filter_subjects:
        yield "it filters subjects"
    if found.deliver_subject:
        yield "it pushes, and workers pull"
    if found.headers_only:
        yield "it delivers headers only"
    if found.pause_until:
        yield f"it is paused until {found.pause_until}"
    if found.backoff:
        yield "it has a backoff, which would take the place of ack wait"


def _check(what: str, differences: Iterator[str]) -> None:
    if found := "; ".join(differences):
        raise BrokerError(f"{what} exists with other settings: {found}; change it, or delete it once it is empty")
