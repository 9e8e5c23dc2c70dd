"""The three streams and the consumer that workers use: made if they are missing, else checked.

Their settings carry the guarantees. So a worker refuses an existing stream with other settings, and never changes it:
that is up to the operator of the broker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from aiokeyless.errors import BrokerError
from aiokeyless.worker.messages import Outcome

from .failures import broker_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.js import JetStreamContext

    from .fleet import Fleet

    _Checks: TypeAlias = tuple[tuple[str, Callable[[Any, Any], bool], str], ...]

_SERVICE: Final = "aiokeyless-service"  # the key in a stream's metadata
#: A limit that is none.
UNLIMITED: Final = -1
_NAME_IN_USE: Final = 10058  # the broker's code: there is a stream of this name, with other settings
#: The broker's codes while servers of a cluster are offline or unknown to its leader, or it has no leader.
_CLUSTER_INCOMPLETE: Final = frozenset({10004, 10005, 10008, 10009})
_ACK_TOKENS: Final = 9
_LONG_ACK_TOKENS: Final = 11
#: Pull requests that may wait at the consumer. A worker has a few at a time, and there may be a hundred workers.
_MAX_WAITING: Final = 8192


@dataclass
class _Consumer(ConsumerConfig):
    """The consumer's settings, with those that nats-py does not know."""

    max_expires: int | None = None
    priority_groups: list[str] | None = None


class StreamSettings(NamedTuple):
    """What an operator may choose.

    Attributes:
        replicas: Servers of the cluster that hold each message: 1, 3 or 5. None means 1 for a stream that is made, and
            any number for an existing one. Default: None.
        duplicate_window: Seconds for which a stream remembers its messages. In that time, a request that is published
            twice counts once, an outcome is published once, and an operation id belongs to one request. No wait may be
            longer. Default: 86400, a day.
        max_age: Seconds for which outcomes are kept for applications that are away; at least `duplicate_window`.
            Default: 604800, a week.
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
        ack_wait: Seconds after which the broker repeats a delivery that is neither acknowledged nor extended.
        service: Base URL of the service that the workers of the fleet ask; empty if it is not known yet.

    Returns:
        The duplicate window in force, in seconds, which bounds `expires_in`.

    Raises:
        BrokerError: One of them has other settings, or cannot be made; or the fleet asks another service.
    """
    try:
        requests = await _stream(stream, _requests(fleet, settings, service), ())
        if service:
            await _serve(stream, fleet, (requests.metadata or {}).get(_SERVICE), service)
        outcomes = await _stream(stream, _outcomes(fleet, settings), _KEPT)
        window = min(requests.duplicate_window, outcomes.duplicate_window)
        await _stream(stream, _claims(fleet, settings, window), _CLAIMS)
        await _consumer(stream, fleet, ack_wait)
    except nats.js.errors.APIError as error:
        raise BrokerError(_refusal(error, fleet)) from None
    except nats.errors.Error as error:
        raise BrokerError(
            f"the broker did not answer a JetStream request ({type(error).__name__}): is JetStream on, are most "
            f"servers of a cluster up, and may this user publish to {fleet.prefix}.>, $JS.ACK.>, "
            f"{fleet.name}.approvals.* and {fleet.name}.claims.*?"
        ) from None
    return window


def _refusal(error: nats.js.errors.APIError, fleet: Fleet) -> str:
    if error.err_code in _CLUSTER_INCOMPLETE:
        return (
            f"the broker's cluster is incomplete ({error.description}): start again when all of its servers are up; "
            "there must be as many as replicas"
        )
    if not isinstance(error, nats.js.errors.ServiceUnavailableError):
        return f"the broker refused to make a stream or its consumer: {error.description}"
    return (
        f"the broker has no JetStream at {fleet.prefix}: start it with -js, enable JetStream for this account, or "
        "correct the prefix"
    )


async def restore_consumer(stream: JetStreamContext, fleet: Fleet, *, ack_wait: float) -> None:
    """Make the consumer again if it was deleted.

    Raises:
        BrokerError: It has other settings now, or its stream is gone.
        UnavailableError: The broker has no leader for it just now.
    """
    with broker_errors():
        try:
            await _consumer(stream, fleet, ack_wait)
        except nats.js.errors.NotFoundError:
            raise BrokerError(f"the stream {fleet.requests} is gone, and the requests in it") from None


def _requests(fleet: Fleet, settings: StreamSettings, service: str) -> StreamConfig:
    return _config(
        settings,
        name=fleet.requests,
        description="Requests for approvals, until they are decided",
        subjects=[fleet.request_subject],
        retention=RetentionPolicy.WORK_QUEUE,  # a message stays until its ack, which ends its wait
        metadata={_SERVICE: service} if service else {},
    )


def _outcomes(fleet: Fleet, settings: StreamSettings) -> StreamConfig:
    return _config(
        settings,
        name=fleet.outcomes,
        description="How requests for approvals ended",
        subjects=[fleet.outcome_subject(outcome) for outcome in Outcome],
        retention=RetentionPolicy.LIMITS,  # any number of applications may read them, each at its own pace
        max_age=max(settings.max_age, settings.duplicate_window),
    )


def _claims(fleet: Fleet, settings: StreamSettings, window: float) -> StreamConfig:
    return _config(
        settings._replace(duplicate_window=window),
        name=fleet.claims,
        description="Which request an operation id belongs to",
        subjects=[fleet.claim_subject("*")],
        retention=RetentionPolicy.LIMITS,
        max_age=window,
    )


def _config(settings: StreamSettings, **own: Any) -> StreamConfig:
    window, replicas = settings.duplicate_window, settings.replicas or 1
    return StreamConfig(storage=StorageType.FILE, num_replicas=replicas, duplicate_window=window, **own)


async def _serve(stream: JetStreamContext, fleet: Fleet, owner: str | None, service: str) -> None:
    """Record the service of the fleet's first worker, and refuse a worker of another one."""
    if owner is None:
        config = (await request(stream, f"STREAM.INFO.{fleet.requests}"))["config"]
        config["metadata"] = {**config.get("metadata", {}), _SERVICE: service}
        await request(stream, f"STREAM.UPDATE.{fleet.requests}", **config)
    elif owner != service:
        raise BrokerError(
            f"the fleet {fleet.name!r} on this broker belongs to {owner}, and this worker to {service}: give it "
            f"another name, or set the metadata {_SERVICE} of the stream {fleet.requests}"
        )


def is_delivery(reply: str, stream: str, consumer: str) -> bool:
    """Return whether the stream delivered a message with this reply subject to the consumer.

    Any user with the permission can publish to an inbox, but no client may publish with such a reply subject.

    Args:
        reply: The reply subject of the message: ``$JS.ACK.<stream>.<consumer>`` and five more tokens. It may also have
            a domain and an account in front of the stream; then at least five more tokens follow.
        stream: Name of the stream.
        consumer: Name of the consumer.
    """
    tokens = reply.split(".")
    if tokens[:2] != ["$JS", "ACK"]:
        return False
    names = tokens[2:4] if len(tokens) == _ACK_TOKENS else tokens[4:6] if len(tokens) >= _LONG_ACK_TOKENS else []
    return names == [stream, consumer]


async def _stream(stream: JetStreamContext, wanted: StreamConfig, checks: _Checks) -> StreamConfig:
    name = wanted.name or ""
    try:
        found = (await stream.stream_info(name)).config
    except nats.js.errors.NotFoundError:
        try:
            found = (await stream.add_stream(wanted)).config  # no conflict if the settings are the same
        except nats.js.errors.APIError as error:
            if error.err_code != _NAME_IN_USE:
                raise
            found = (await stream.stream_info(name)).config  # another worker has made it in the meantime
    refuses = found.discard == DiscardPolicy.NEW
    checks += () if refuses else _DROPPING
    checks += () if refuses and found.discard_new_per_subject else _DROPPING_EACH
    _check(f"stream {name}", found, wanted, _STREAM + checks)
    return found


async def request(stream: JetStreamContext, subject: str, **asked: object) -> dict[str, Any]:
    """Return an answer of JetStream's API with all that it says. nats-py's own methods leave some of it out."""
    body = msgspec.json.encode(asked) if asked else b""
    return await stream._api_request(f"{stream._prefix}.{subject}", body, timeout=stream._timeout)  # noqa: SLF001  # as above


async def _consumer(stream: JetStreamContext, fleet: Fleet, ack_wait: float) -> None:
    wanted = ConsumerConfig(
        durable_name=fleet.consumer,
        description="Workers that wait for approvals",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait,
        max_deliver=UNLIMITED,  # each delivery is a poll, and their number has no limit
        max_ack_pending=UNLIMITED,  # each wait is an unacknowledged message
        max_waiting=_MAX_WAITING,
    )
    try:
        answer = await request(stream, f"CONSUMER.INFO.{fleet.requests}.{fleet.consumer}")
        found: ConsumerConfig | None = _Consumer.from_response(answer["config"])
    except nats.js.errors.NotFoundError:
        found = (await stream.add_consumer(fleet.requests, wanted)).config
    _check(f"consumer {fleet.consumer} of stream {fleet.requests}", found, wanted, _CONSUMER)


def _check(what: str, found: object, wanted: object, checks: _Checks) -> None:
    wrong = [
        f"{setting} is {getattr(found, setting)}, and must be {must.format(wanted)}"
        for setting, is_right, must in checks
        if not is_right(getattr(found, setting, None), wanted)
    ]
    if wrong:
        raise BrokerError(
            f"{what} exists with other settings: {'; '.join(wrong)}; change it, or delete it once it is empty"
        )


def _is_unlimited(value: int | None, _want: object) -> bool:
    return (value or UNLIMITED) < 0


def _is_unset(value: object, _want: object) -> bool:
    return not value


#: Checks of a stream: a setting, whether its value suits the wanted one, and the requirement to report if not.
_STREAM: Final[_Checks] = (
    ("subjects", lambda value, want: set(value or ()) == set(want.subjects), "{0.subjects}"),
    ("retention", lambda value, want: value == want.retention, "{0.retention.value}"),
    ("storage", lambda value, want: value == want.storage, "{0.storage.value}"),
    ("duplicate_window", lambda value, want: value >= want.duplicate_window, "{0.duplicate_window:g} or more"),
    ("num_replicas", lambda value, want: want.num_replicas in {1, value}, "{0.num_replicas}"),
    ("max_age", lambda value, want: not value or bool(want.max_age), "unlimited: messages would vanish"),
    ("max_age", lambda value, want: not value or value >= want.duplicate_window, "{0.duplicate_window:g} or more"),
    ("allow_rollup_hdrs", _is_unset, "off: by them a publisher removes what others published"),
    ("allow_msg_ttl", _is_unset, "off: by it a publisher has messages vanish"),
    ("subject_transform", _is_unset, "unset: workers and readers find messages by their subjects"),
    ("no_ack", _is_unset, "off"),
)
#: Checks of a stream that does not refuse new messages; and of one that does not do so for each subject.
_DROPPING: Final[_Checks] = tuple(
    (limit, _is_unlimited, "unlimited: what is over it is dropped from the old end")
    for limit in ("max_msgs", "max_bytes")
)
_DROPPING_EACH: Final[_Checks] = (("max_msgs_per_subject", _is_unlimited, "unlimited, likewise"),)
#: Checks of the streams of outcomes and claims.
_KEPT: Final[_Checks] = (("max_msg_size", _is_unlimited, "unlimited: what is over it would never be stored"),)
#: Checks of the stream of claims. Once it forgets an outcome, a repeated request would count as a new one.
_CLAIMS: Final[_Checks] = (
    *_KEPT,
    ("max_age", lambda value, want: 0 < (value or 0.0) <= want.max_age, "{0.max_age:g}, the duplicate window"),
)
#: Checks of the consumer. Its ack policy needs none: a work queue has only consumers with explicit acks.
_CONSUMER: Final[_Checks] = (
    ("ack_wait", lambda value, want: (value or 0.0) >= want.ack_wait, "{0.ack_wait:g} or more"),
    ("max_deliver", _is_unlimited, "unlimited"),
    ("max_ack_pending", _is_unlimited, "unlimited"),
    *(
        (setting, _is_unset, "unset")
        for setting in (
            "filter_subject",
            "filter_subjects",
            "deliver_subject",
            "headers_only",
            "pause_until",
            "backoff",
            "max_expires",
            "priority_groups",
        )
    ),
)
