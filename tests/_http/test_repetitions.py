"""The quota of repetitions at work: an outage gets few requests more than there are calls, and each call says so."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from raw_server import failure

from aiokeyless import (
    ConflictError,
    KeylessClient,
    KeylessError,
    NotFoundError,
    ServerError,
    StatusError,
    TransportError,
)
from aiokeyless.events import RequestEnded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless.events import Event
    from aiokeyless.sandbox import Sandbox

    Call = Callable[[KeylessClient], Awaitable[object]]

pytestmark = [pytest.mark.platform, pytest.mark.looptime]

USER = "C0FFEE"
CALLS = 300
BUSY = ServerError(status=503, method="GET", path="/")
NOT_REPEATED = "; it was not repeated, as too many calls of this client fail"
NOT_CHECKED = "; whether it took effect was not checked, as too many calls of this client fail"


async def fail_all(call: Callable[[], Awaitable[object]]) -> list[KeylessError]:
    """Make all calls, no more at once than a listening socket takes, and return their errors."""
    slots = asyncio.Semaphore(50)

    async def make() -> KeylessError:
        async with slots:
            return await failure(call())

    return await asyncio.gather(*(make() for _ in range(CALLS)))


def use_up(client: KeylessClient) -> None:
    """Leave no token."""
    quota = client._open().transport.quota
    while quota.take(BUSY):
        pass


@pytest.mark.parametrize(("fault", "goal"), [("503", 1.5), ("dropped", 2.0)])
async def test_creates_that_meet_an_outage_are_not_multiplied(
    sandbox: Sandbox, client: KeylessClient, fault: str, goal: float
) -> None:
    if fault == "503":
        sandbox.fail_next(503, times=None)
    else:
        sandbox.drop_next(times=None)
    errors = await fail_all(lambda: client.create_operation(USER))
    assert CALLS < sandbox.request_count < goal * CALLS
    assert sum(NOT_CHECKED in str(error) for error in errors) >= CALLS - 60


async def test_reads_that_meet_an_outage_are_not_multiplied(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.fail_next(503, times=None)
    errors = await fail_all(lambda: client.get_operation("a"))
    assert sandbox.request_count == CALLS + 60
    assert sum(NOT_REPEATED in str(error) for error in errors) > CALLS - 60


async def test_lone_failure_is_repeated_and_checked_as_ever(sandbox: Sandbox, client: KeylessClient) -> None:
    for number in range(40):
        sandbox.fail_next(503, method="POST")
        await client.create_operation(USER, operation_id=f"{number}")
        for _ in range(2):
            await client.get_operation(f"{number}")
    assert sandbox.request_count == 40 * (3 + 2)


REPEATED: dict[str, Call] = {
    "get_operation": lambda client: client.get_operation("a"),
    "get_authentications": lambda client: client.get_authentications(user_id=USER),
    "find_users": lambda client: client.find_users("ann"),
    "update_external_user": lambda client: client.update_external_user(USER, "ann"),
    "delete_external_user": lambda client: client.delete_external_user("ann"),
}


@pytest.mark.parametrize("name", REPEATED)
async def test_call_without_a_token_ends_with_its_first_error(
    sandbox: Sandbox, client: KeylessClient, name: str
) -> None:
    use_up(client)
    sandbox.fail_next(503)
    error = await failure(REPEATED[name](client))
    assert isinstance(error, ServerError)
    assert str(error).endswith(f"answered 503: the service failed; try again later{NOT_REPEATED}")
    assert error.failures == ()
    assert len(sandbox.requests) == 1


async def test_call_with_one_token_ends_with_its_second_error(sandbox: Sandbox, client: KeylessClient) -> None:
    use_up(client)
    sandbox.approve("b", user_id=USER)
    await client.get_operation("b")
    sandbox.fail_next(503, times=2)
    error = await failure(client.get_operation("a"))
    assert str(error).endswith(NOT_REPEATED)
    assert isinstance(error, ServerError)
    assert [type(earlier) for earlier in error.failures] == [ServerError]
    assert NOT_REPEATED not in str(error.failures[0])


@pytest.mark.parametrize("method", [KeylessClient.create_operation, KeylessClient.request_approval])
async def test_create_without_a_token_says_that_it_was_not_checked(
    sandbox: Sandbox, client: KeylessClient, method: Callable[..., Awaitable[object]]
) -> None:
    use_up(client)
    sandbox.drop_next(stored=True)
    error = await failure(method(client, USER, operation_id="a"))
    assert isinstance(error, TransportError)
    assert str(error).endswith(f"got no answer (ServerDisconnectedError); try again later{NOT_CHECKED}")
    assert error.sent
    assert error.operation_id == "a"
    sandbox.fail_next(409, stored=True)  # of a gateway that sent it twice
    doubt = await failure(method(client, USER))
    assert isinstance(doubt, StatusError)
    assert str(doubt).endswith(f'operation_id={doubt.operation_id!r} and if_exists="resume"{NOT_CHECKED}')
    assert len(sandbox.requests) == 2


@pytest.mark.parametrize(("tokens", "requests"), [(1, "POST GET"), (2, "POST GET GET"), (3, "POST GET GET POST")])
async def test_request_that_outlasts_an_outage_pays_for_each_of_its_requests(
    sandbox: Sandbox, client: KeylessClient, tokens: int, requests: str
) -> None:
    sandbox.approve("b", user_id=USER)
    use_up(client)
    for _ in range(tokens):
        await client.get_operation("b")
    sandbox.requests.clear()
    sandbox.fail_next(503, times=2)
    sandbox.fail_next(503, method="POST")
    error = await failure(client.request_approval(USER))
    assert str(error).endswith(NOT_CHECKED if tokens == 3 else NOT_REPEATED)
    assert [record.method for record in sandbox.requests] == requests.split()


async def test_create_that_certainly_failed_says_that_it_was_not_repeated(
    sandbox: Sandbox, client: KeylessClient
) -> None:
    use_up(client)
    sandbox.fail_next(429)
    assert str(await failure(client.create_operation(USER))).endswith(NOT_REPEATED)
    assert len(sandbox.requests) == 1


async def test_check_that_finds_the_operation_gives_no_token_back(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.approve("b", user_id=USER)
    use_up(client)
    await client.get_operation("b")
    sandbox.drop_next(method="POST", stored=True)
    assert (await client.create_operation(USER)).reconciled
    sandbox.fail_next(503)
    assert str(await failure(client.get_operation("b"))).endswith(NOT_REPEATED)


async def test_check_and_its_own_repetition_take_one_token_each(sandbox: Sandbox) -> None:
    ended: list[tuple[str, int]] = []

    def listen(event: Event) -> None:
        if isinstance(event, RequestEnded):
            ended.append((event.method, event.attempt))

    async with sandbox.client(listeners=[listen]) as client:
        use_up(client)
        sandbox.approve("b", user_id=USER)
        for _ in range(3):
            await client.get_operation("b")
        ended.clear()
        sandbox.drop_next(method="POST")
        sandbox.fail_next(503, method="GET")
        await client.create_operation(USER)
        assert ended == [("POST", 1), ("GET", 1), ("GET", 2), ("POST", 2)]
        sandbox.fail_next(503)
        assert str(await failure(client.get_operation("b"))).endswith(NOT_REPEATED)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.get_operation("b"),
        lambda client: client.create_operation(USER),
        lambda client: client.delete_external_user("ann"),
    ],
    ids=["a GET", "a create", "a delete"],
)
async def test_call_that_succeeds_at_once_gives_a_token_back(
    sandbox: Sandbox, client: KeylessClient, call: Call
) -> None:
    sandbox.approve("b", user_id=USER)
    sandbox.enroll(USER, external_user_id="ann")
    use_up(client)
    await call(client)
    sandbox.fail_next(503)
    await client.get_operation("b")


@pytest.mark.parametrize(
    "call",
    [lambda client: client.create_operation(USER), lambda client: client.delete_external_user("ann")],
    ids=["a create", "a delete"],
)
async def test_call_that_succeeds_later_gives_none_back(sandbox: Sandbox, client: KeylessClient, call: Call) -> None:
    sandbox.approve("b", user_id=USER)
    sandbox.enroll(USER, external_user_id="ann")
    use_up(client)
    for _ in range(2):
        await client.get_operation("b")
    sandbox.fail_next(503, method="POST")
    sandbox.fail_next(503, times=2, method="DELETE")
    await call(client)  # takes two
    sandbox.recover()
    sandbox.fail_next(503)
    assert str(await failure(client.get_operation("b"))).endswith(NOT_REPEATED)


async def test_resumption_after_a_conflict_takes_no_token(client: KeylessClient) -> None:
    await client.create_operation(USER, operation_id="a")
    use_up(client)
    assert (await client.create_operation(USER, operation_id="a", if_exists="resume")).reconciled
    assert isinstance(await failure(client.create_operation(USER, operation_id="a")), ConflictError)


async def test_failure_that_is_not_transient_takes_no_token(sandbox: Sandbox, client: KeylessClient) -> None:
    await asyncio.gather(*(failure(client.get_operation("a")) for _ in range(100)))
    sandbox.fail_next(503)
    assert isinstance(await failure(client.get_operation("a")), NotFoundError)
