"""The three streams and the consumers: what their settings must be, and how they are made.

The settings carry the guarantees. One table says what each must be. Streams and consumers are made by it, and checked
by it: when a worker or a reader opens, and at each inspection. A worker refuses an existing stream or consumer with
other settings, and never changes it, because that is up to the operator of the broker. A reader corrects its own
consumer, and never deletes it: a new one would get all outcomes again.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec
import nats.errors
import nats.js.errors

from aiokeyless.errors import BrokerError
from aiokeyless.worker.logs import log
from aiokeyless.worker.messages import Outcome

from .failures import reason

if TYPE_CHECKING:
    from nats.js import JetStreamContext

    from .fleet import Fleet

#: Settings of a stream or a consumer, by their names in JetStream's API. Durations are nanoseconds.
Config: TypeAlias = dict[str, Any]

#: Seconds after which the broker repeats a delivery that is neither settled nor extended: about an election.
ACK_WAIT: Final = 6.0
_SERVICE: Final = "aiokeyless-service"  # the key in a stream's metadata
_UNLIMITED: Final = -1
_UNSET: Final[tuple[object, ...]] = (None, False, 0, "", [], {}, "none", "default")
_DURATIONS: Final = frozenset({"ack_wait", "duplicate_window", "inactive_threshold", "max_age", "max_expires"})
_AT_LEAST: Final = frozenset({"ack_wait", "duplicate_window"})
_REFUSABLE: Final = frozenset({"max_msgs", "max_bytes"})
_SECOND: Final = 10**9  # nanoseconds
_NAME_IN_USE: Final = 10058  # the broker's code: there is a stream of this name, with other settings
#: The broker's codes while servers of a cluster are offline or unknown to its leader, or it has no leader.
_CLUSTER_INCOMPLETE: Final = frozenset({10004, 10005, 10008, 10009})
_ACK_TOKENS: Final = 9
_LONG_ACK_TOKENS: Final = 11


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


# -- what must be set


def wanted_streams(fleet: Fleet, settings: StreamSettings, window: float) -> dict[str, Config]:
    """Return what must be set of each stream, by its name, if the duplicate window in force is so many seconds."""
    chosen, in_force = round(settings.duplicate_window * _SECOND), round(window * _SECOND)
    common: Config = {
        **({"num_replicas": settings.replicas} if (settings.replicas or 1) > 1 else {}),
        "storage": "file",
        **dict.fromkeys(("max_msgs", "max_bytes", "max_msgs_per_subject"), _UNLIMITED),
        # By the first two a publisher removes what others published. By the rest, messages are lost or come from
        # elsewhere, or consumers vanish.
        **dict.fromkeys(("allow_rollup_hdrs", "allow_msg_ttl", "no_ack", "sealed", "persist_mode")),
        **dict.fromkeys(("subject_transform", "mirror", "sources", "consumer_limits")),
    }
    requests = {"retention": "workqueue", "duplicate_window": chosen, "max_age": None}  # its ack ends a wait
    kept = {"retention": "limits", "max_msg_size": _UNLIMITED}  # what is larger would never be stored
    outcomes = [fleet.outcome_subject(outcome) for outcome in Outcome]
    # Once this stream forgets an outcome, a repeated request would count as a new one.
    claims = {"subjects": [fleet.claim_subject("*")], "duplicate_window": in_force, "max_age": in_force}
    return {
        fleet.requests: {**common, **requests, "subjects": [fleet.request_subject]},
        fleet.outcomes: {**common, **kept, "subjects": outcomes, "duplicate_window": chosen},
        fleet.claims: {**common, **kept, **claims},
    }


def wanted_consumer(ack_wait: float) -> Config:
    """Return what must be set of a consumer: the workers', or a reader's."""
    return {
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "replay_policy": "instant",
        "ack_wait": round(ack_wait * _SECOND),
        "max_deliver": _UNLIMITED,  # each delivery of a request is a poll
        "max_ack_pending": _UNLIMITED,  # each wait is an unacknowledged message, and so is an outcome that is put off
        **dict.fromkeys(("filter_subject", "filter_subjects", "headers_only", "backoff", "deliver_subject")),
        **dict.fromkeys(("max_expires", "priority_groups", "priority_policy")),
        **dict.fromkeys(("inactive_threshold", "mem_storage", "num_replicas")),  # with these its place may be lost
    }


def describe_wrong(what: str, found: Config, wanted: Config) -> str:
    """Return which settings are wrong, in words; empty if none is."""
    wrong = [
        f"{name} is {_show(name, found.get(name))}, and must be {_show(name, right)}{' or more' * (name in _AT_LEAST)}"
        for name, right in _find_wrong(found, wanted).items()
    ]
    return f"{what} has other settings: {'; '.join(wrong)}" if wrong else ""


def _find_wrong(found: Config, wanted: Config) -> Config:
    return {name: right for name, right in wanted.items() if not _is_right(name, found.get(name), right, found)}


def _is_right(name: str, value: Any, right: Any, found: Config) -> bool:
    if right is None:
        return value in _UNSET
    if right == _UNLIMITED:  # or a limit over which a stream refuses new messages, and does not drop old ones
        return (value is not None and value < 0) or (name in _REFUSABLE and found.get("discard") == "new")
    if name in _AT_LEAST:
        return bool((value or 0) >= right)
    return set(value or ()) == set(right) if isinstance(right, list) else bool(value == right)


def _show(name: str, value: object) -> str:
    if name in _DURATIONS and isinstance(value, int):
        return f"{value / _SECOND:g} s"
    return "unset" if value is None else "unlimited" if value == _UNLIMITED else str(value)


def find_window(*streams: Config) -> float:
    """Return the duplicate window in force, in seconds."""
    return min(int(config.get("duplicate_window", 0)) for config in streams) / _SECOND


# -- made or checked


async def request(stream: JetStreamContext, subject: str, **asked: object) -> dict[str, Any]:
    """Return an answer of JetStream's API with all that it says. nats-py's own methods leave some of it out."""
    body = msgspec.json.encode(asked) if asked else b""
    return await stream._api_request(f"{stream._prefix}.{subject}", body, timeout=stream._timeout)  # noqa: SLF001  # as above


async def prepare(
    stream: JetStreamContext, fleet: Fleet, settings: StreamSettings, *, ack_wait: float, service: str
) -> float:
    """Make or check the streams and the workers' consumer. Return the duplicate window in force, in seconds.

    Raises:
        BrokerError: One of them has other settings, or cannot be made; or the fleet asks another service.
    """
    wanted = wanted_streams(fleet, settings, settings.duplicate_window)
    kept_for = round(max(settings.max_age, settings.duplicate_window) * _SECOND)
    try:
        metadata = {_SERVICE: service} if service else {}
        requests = await _ensure_stream(stream, fleet.requests, wanted[fleet.requests], metadata=metadata)
        if service:
            await _serve(stream, fleet, requests, service)
        outcomes = await _ensure_stream(stream, fleet.outcomes, wanted[fleet.outcomes], max_age=kept_for)
        window = find_window(requests, outcomes)
        await _ensure_stream(stream, fleet.claims, wanted_streams(fleet, settings, window)[fleet.claims])
        consumer = await ensure_workers(stream, fleet, ack_wait)
    except nats.js.errors.APIError as error:
        raise BrokerError(_refusal(error, fleet), may_pass=error.err_code in _CLUSTER_INCOMPLETE) from None
    except nats.errors.Error as error:
        raise BrokerError(
            f"the broker did not answer a JetStream request ({type(error).__name__}): is JetStream on, are most "
            f"servers of a cluster up, and may this user publish to {fleet.prefix}.>, $JS.ACK.>, "
            f"{fleet.name}.approvals.* and {fleet.name}.claims.*?",
            may_pass=True,
        ) from None
    if problem := describe_wrong(f"the consumer {fleet.consumer}", consumer, wanted_consumer(ack_wait)):
        raise BrokerError(f"{problem}; delete it, and the workers make it again")
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


async def ensure_workers(stream: JetStreamContext, fleet: Fleet, ack_wait: float) -> Config:
    """Return the settings of the workers' consumer, which is made if it is missing.

    Raises:
        BrokerError: Its stream is gone.
    """
    try:
        answer = await request(stream, f"CONSUMER.INFO.{fleet.requests}.{fleet.consumer}")
    except nats.js.errors.NotFoundError:
        try:
            answer = await _put_consumer(stream, fleet.requests, fleet.consumer, {}, wanted_consumer(ack_wait))
        except nats.js.errors.NotFoundError:
            raise BrokerError(f"the stream {fleet.requests} is gone, and the requests in it") from None
    config: Config = answer["config"]
    return config


async def ensure_reader(stream: JetStreamContext, fleet: Fleet, name: str) -> None:
    """Make a reader's consumer, or correct its settings. If nothing is to be done, that takes no permission.

    Raises:
        BrokerError: It is missing or wrong, and this reader may not change that; or there is no stream.
    """
    what, found = f"the consumer {name} of {fleet.outcomes}", Config()
    wanted = wanted_consumer(ACK_WAIT)
    with suppress(nats.js.errors.NotFoundError):  # of the consumer; or of the stream, which is reported below
        found = (await request(stream, f"CONSUMER.INFO.{fleet.outcomes}.{name}"))["config"]
    problem = describe_wrong(what, found, wanted) if found else f"{what} is missing"
    if not problem:
        return
    try:
        await _put_consumer(stream, fleet.outcomes, name, found, wanted)
    except nats.js.errors.NotFoundError:
        raise BrokerError("outcomes cannot be read: there is no stream; start a worker first, it makes it") from None
    except nats.js.errors.APIError as error:
        raise BrokerError(
            f"outcomes cannot be read: {problem}; this reader may not change that ({reason(error)}): have an operator "
            "make it so, or read under another name, which gets all outcomes that are kept"
        ) from None
    if found:
        log(logging.WARNING, "reader.corrected", {"problem": problem})


async def _put_consumer(stream: JetStreamContext, of: str, name: str, found: Config, wanted: Config) -> dict[str, Any]:
    """Make a consumer, or correct what is wrong in its settings."""
    # As many pull requests may wait. A worker has one at a time, and there may be many workers.
    settings = {"max_waiting": 8192, **found, **_find_wrong(found, wanted), "durable_name": name}
    config = {key: value for key, value in settings.items() if value is not None}
    return await request(stream, f"CONSUMER.CREATE.{of}.{name}", stream_name=of, config=config)


async def _ensure_stream(stream: JetStreamContext, name: str, wanted: Config, **more: object) -> Config:
    try:
        answer = await request(stream, f"STREAM.INFO.{name}")
    except nats.js.errors.NotFoundError:
        try:  # no conflict if the settings are the same
            answer = await request(stream, f"STREAM.CREATE.{name}", name=name, **_find_wrong({}, wanted), **more)
        except nats.js.errors.APIError as error:
            if error.err_code != _NAME_IN_USE:
                raise
            answer = await request(stream, f"STREAM.INFO.{name}")  # another worker has made it in the meantime
    config: Config = answer["config"]
    if problem := describe_wrong(f"the stream {name}", config, wanted):
        raise BrokerError(f"{problem}; change it, or delete it once it is empty")
    return config


async def _serve(stream: JetStreamContext, fleet: Fleet, config: Config, service: str) -> None:
    """Record the service of the fleet's first worker, and refuse a worker of another one."""
    if _SERVICE not in config.get("metadata", {}):
        config = {**config, "metadata": {**config.get("metadata", {}), _SERVICE: service}}
        await request(stream, f"STREAM.UPDATE.{fleet.requests}", **config)
    check_service(fleet, config, service)


def check_service(fleet: Fleet, requests: Config, service: str) -> None:
    """Refuse a worker of another service than the one that the stream of requests names."""
    owner = requests.get("metadata", {}).get(_SERVICE, service)
    if owner != service:
        raise BrokerError(
            f"the fleet {fleet.name!r} on this broker belongs to {owner}, and this worker to {service}: give it "
            f"another name, or set the metadata {_SERVICE} of the stream {fleet.requests}"
        )


def is_delivery(reply: str, stream: str, consumer: str) -> bool:
    """Return whether the stream delivered a message with this reply subject to the consumer.

    Any user with the permission can publish to an inbox, but no client may publish with such a reply subject. It is
    ``$JS.ACK.<stream>.<consumer>`` and five more tokens. With a domain and an account, more may follow.
    """
    tokens = reply.split(".")
    if tokens[:2] != ["$JS", "ACK"]:
        return False
    names = tokens[2:4] if len(tokens) == _ACK_TOKENS else tokens[4:6] if len(tokens) >= _LONG_ACK_TOKENS else []
    return names == [stream, consumer]
