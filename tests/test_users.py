"""Users and devices, against a service that was written from the documentation alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import aiohttp
import pytest
from raw_server import RawServer, answer, refused
from strict_service import KEY, TIME, StrictService

from aiokeyless import (
    AmbiguousUserError,
    ConflictError,
    DecodeError,
    Device,
    ExternalUser,
    InvalidIdentifierError,
    KeylessClient,
    NotFoundError,
    ServerError,
    TransportError,
    User,
)
from aiokeyless.events import RequestEnded

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from aiokeyless.events import Event

pytestmark = pytest.mark.looptime

USER = "C0FFEE"
OTHER = "BEEF"
PERSONAL = "ann@example.com"
CONFLICT = answer(b"taken", status=b"409 Conflict")
BUSY = answer(b"", status=b"503 Busy")
MISSING = answer(b"", status=b"404 Not Found")
EMPTY = answer(b"[]")
LINK = b'{"sdkCustomerId":1,"userId":"%b","externalUserId":"%b","createdAt":"t","updatedAt":"t"}'
LINKED = answer(LINK % (b"C0FFEE", b"ann"), status=b"201 Created")
FOUND = answer(b'[{"userId":"c0ffee","biometricPublicSigningKey":"k","createdAt":"t1","updatedAt":"t2"}]')


@pytest.fixture
async def service() -> AsyncGenerator[StrictService]:
    async with StrictService() as running:
        yield running
    assert running.complaints == []


@pytest.fixture
async def client(service: StrictService) -> AsyncGenerator[KeylessClient]:
    async with KeylessClient(KEY, base_url=service.url) as client:
        yield client


# The methods, one by one


async def test_a_user_gets_an_external_id_and_is_found_by_it(service: StrictService, client: KeylessClient) -> None:
    service.enroll(USER)
    assert await client.create_external_user(USER.lower(), "ann") == ExternalUser(
        sdk_customer_id=1, user_id=USER, external_user_id="ann", created_at=TIME, updated_at=TIME
    )
    found = [User(user_id=USER, biometric_public_signing_key="a2V5", created_at=TIME, updated_at=TIME)]
    assert await client.find_users("ann") == found
    assert [await client.get_user("ann")] == found
    assert await client.find_users("bob") == []


async def test_an_external_id_is_changed_and_deleted(service: StrictService, client: KeylessClient) -> None:
    service.enroll(USER)
    await client.create_external_user(USER, "ann")
    assert (await client.update_external_user(USER, "anne")).external_user_id == "anne"
    await client.delete_external_user("ANNE")  # deleting does not ignore case
    assert service.external_ids == {USER: "anne"}
    await client.delete_external_user("anne")
    await client.delete_external_user("anne")  # nothing to delete is no error
    assert service.external_ids == {}


@pytest.mark.parametrize("external_user_id", ["a/b?c#d%2F é", "+", "...", "a\u202eb", "x" * 512])
async def test_an_id_is_one_segment(service: StrictService, client: KeylessClient, external_user_id: str) -> None:
    service.enroll(USER)
    await client.create_external_user(USER, external_user_id)
    assert (await client.get_user(external_user_id)).user_id == USER
    await client.delete_external_user(external_user_id)
    assert service.external_ids == {}


async def test_a_device_is_listed_and_removed_by_its_key(service: StrictService, client: KeylessClient) -> None:
    key = service.enroll(USER)
    assert set("+/=") & set(key), "a key that must be encoded"
    other = service.enroll(USER, b"the other phone")
    devices = await client.get_devices(USER.lower())
    assert devices[0] == Device(
        user_id=USER,
        sdk_customer_id=1,
        public_signing_key=key,
        public_encryption_key="YW5vdGhlciBrZXk=",
        state="ACTIVE",
        created_at=TIME,
        os_version="15",
    )
    await client.delete_device(USER, key)
    assert [device.public_signing_key for device in await client.get_devices(USER)] == [other]
    with pytest.raises(NotFoundError):
        await client.delete_device(USER, key)


async def test_a_user_is_deleted_once(service: StrictService, client: KeylessClient) -> None:
    service.enroll(USER)
    await client.delete_user(USER.lower())
    assert service.devices == {}
    for call in (client.delete_user(USER), client.get_devices(USER), client.update_external_user(USER, "ann")):
        with pytest.raises(NotFoundError):
            await call


async def test_a_second_external_id_is_a_conflict(service: StrictService, client: KeylessClient) -> None:
    service.enroll(USER)
    await client.create_external_user(USER, "ann")
    with pytest.raises(ConflictError):
        await client.create_external_user(USER, "anne")
    assert service.external_ids == {USER: "ann"}
    assert len(service.requests) == 2, "after a conflict on the first attempt nothing is searched"


# The user of an external id


async def test_no_user_of_an_external_id_is_not_found(client: KeylessClient) -> None:
    with pytest.raises(NotFoundError, match="no user has this external user id") as caught:
        await client.get_user(PERSONAL)
    assert caught.value.status == 404
    assert caught.value.path == "/v2/external-users/{externalUserId}/users"


async def test_two_users_whose_ids_differ_in_case_are_ambiguous(service: StrictService, client: KeylessClient) -> None:
    for user, external_user_id in ((USER, "ann"), (OTHER, "ANN")):
        service.enroll(user)
        await client.create_external_user(user, external_user_id)
    with pytest.raises(AmbiguousUserError, match="2 users") as caught:
        await client.get_user("Ann")
    assert caught.value.user_ids == (USER, OTHER)


# What may have taken effect


async def test_a_link_whose_answer_is_lost_is_found(service: StrictService, client: KeylessClient) -> None:
    service.enroll(USER)
    service.lose = [True]
    assert await client.create_external_user(USER, "ann") == ExternalUser(
        user_id=USER, external_user_id="ann", created_at=TIME, updated_at=TIME
    )
    assert [request.split()[0] for request in service.requests] == ["POST", "GET"]


class Talk:
    """A link of "ann" to the user against a server that answers this and then that."""

    def __init__(self, *answers: bytes) -> None:
        self.server = RawServer(*answers)

    async def create(self, **options: int) -> ExternalUser:
        async with self.server as server, KeylessClient("key", base_url=server.url, **options) as client:  # type: ignore[arg-type]  # numbers
            return await client.create_external_user(USER, "ann")


async def test_listeners_are_told_which_attempt_each_exchange_of_a_deletion_was() -> None:
    events: list[Event] = []
    async with (
        RawServer(BUSY, MISSING) as server,
        KeylessClient("key", base_url=server.url, listeners=[events.append]) as client,
    ):
        await client.delete_user(USER)
    assert [event.attempt for event in events if isinstance(event, RequestEnded)] == [1, 2]


async def test_a_link_that_did_not_take_effect_is_sent_again() -> None:
    talk = Talk(BUSY, EMPTY, LINKED)
    assert (await talk.create()).sdk_customer_id == 1
    assert talk.server.methods == ["POST", "GET", "POST"]


async def test_after_a_conflict_and_a_lost_link_the_search_is_repeated_until_a_replica_has_it() -> None:
    talk = Talk(BUSY, EMPTY, CONFLICT, EMPTY, EMPTY, FOUND)
    assert (await talk.create()).created_at == "t1"
    assert talk.server.methods == ["POST", "GET", "POST", "GET", "GET", "GET"]


async def test_a_conflict_with_the_link_of_another_user_stays_one() -> None:
    others = answer(b'[{"userId":"BEEF","biometricPublicSigningKey":"k","createdAt":"t","updatedAt":"t"}]')
    with pytest.raises(ConflictError, match="to change the link: update_external_user"):
        await Talk(BUSY, others, CONFLICT, *[others] * 7, CONFLICT, others).create()


@pytest.mark.parametrize("about", [(b"BEEF", b"ann"), (b"C0FFEE", b"Ann")], ids=["another user", "another id"])
async def test_an_answer_about_another_link_proves_nothing(about: tuple[bytes, bytes]) -> None:
    talk = Talk(answer(LINK % about, status=b"201 Created"), FOUND)
    assert (await talk.create()).external_user_id == "ann"
    assert talk.server.methods == ["POST", "GET"]
    async with RawServer(answer(LINK % about)) as server, KeylessClient("key", base_url=server.url) as client:
        with pytest.raises(DecodeError, match="answered about another user"):
            await client.update_external_user(USER, "ann")


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"404 Not Found"])
async def test_a_link_that_cannot_be_searched_fails_as_the_ambiguous_one(status: bytes) -> None:
    with pytest.raises(ServerError) as caught:
        await Talk(BUSY, answer(b"", status=status)).create()
    assert caught.value.method == "POST"
    assert caught.value.__cause__ is not None


DELETIONS: dict[str, Callable[[KeylessClient, str], Awaitable[None]]] = {
    "external user": lambda client, _key: client.delete_external_user("ann"),
    "user": lambda client, _key: client.delete_user(USER),
    "device": lambda client, key: client.delete_device(USER, key),
}
deletions = pytest.mark.parametrize("delete", DELETIONS.values(), ids=DELETIONS.keys())


@deletions
async def test_a_deletion_whose_answer_is_lost_is_repeated_and_succeeds(
    service: StrictService, client: KeylessClient, delete: Callable[[KeylessClient, str], Awaitable[None]]
) -> None:
    key = service.enroll(USER)
    await client.create_external_user(USER, "ann")
    service.lose = [True]
    await delete(client, key)
    assert [request.split()[0] for request in service.requests] == ["POST", "DELETE", "DELETE"]
    assert service.external_ids == {} or service.devices == {USER: []}


@deletions
async def test_a_missing_one_is_not_found_after_a_failure_that_had_no_effect(
    delete: Callable[[KeylessClient, str], Awaitable[None]],
) -> None:
    limited = answer(b"", status=b"429 Slow")
    async with RawServer(limited, MISSING) as server, KeylessClient("key", base_url=server.url) as client:
        with pytest.raises(NotFoundError):
            await delete(client, "key")


@pytest.mark.parametrize("body", [b'{"success": false}', b"{}", b'{"success": 1}', b"[]"])
async def test_a_deletion_without_success_is_no_success(body: bytes) -> None:
    async with RawServer(answer(body)) as server, KeylessClient("key", base_url=server.url) as client:
        with pytest.raises(DecodeError):
            await client.delete_user(USER)


async def test_a_deletion_that_may_have_arrived_says_so_when_its_repetition_cannot_connect() -> None:
    async def answer_and_leave(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BUSY)
        await server.stop_listening()

    server = RawServer(answer_and_leave)
    async with server, KeylessClient("key", base_url=server.url) as client:
        with pytest.raises(TransportError) as caught:
            await client.delete_user(USER)
    assert caught.value.sent
    async with KeylessClient("key", base_url=refused(), max_attempts=1) as client:
        with pytest.raises(TransportError) as caught:
            await client.delete_user(USER)
    assert not caught.value.sent


async def test_a_deletion_on_a_borrowed_session_is_repeated_by_aiohttp_too(service: StrictService) -> None:
    """Its 404 may be a second one: to prevent that, we would have to replace the middlewares of the session."""
    service.enroll(USER)
    service.lose = [True]
    async with (
        aiohttp.ClientSession() as session,
        KeylessClient(KEY, base_url=service.url, session=session) as client,
    ):
        with pytest.raises(NotFoundError):
            await client.delete_user(USER)
    assert service.requests == [f"DELETE /v2/users/{USER}"] * 2
    assert service.devices == {}


# What is shown


async def test_no_message_and_no_log_line_shows_an_external_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aiokeyless")
    shown = []
    async with (
        RawServer(MISSING, answer(b"[]"), answer(b"{}"), BUSY) as server,
        KeylessClient("key", base_url=server.url, max_attempts=1) as client,
    ):
        for call in (
            client.find_users(PERSONAL),
            client.get_user(PERSONAL),
            client.find_users(PERSONAL),
            client.delete_external_user(PERSONAL),
            client.get_authentications(external_user_id=PERSONAL),
            client.find_users(f"{PERSONAL}\0"),
        ):
            with pytest.raises(Exception) as caught:  # noqa: PT011  # each has another one
                await call
            shown.append(f"{caught.value!r} {vars(caught.value)}")
    link = ExternalUser(user_id=USER, external_user_id=PERSONAL, created_at=TIME, updated_at=TIME)
    text = " ".join([*shown, repr(link), caplog.text])
    assert "ann" not in text
    assert "{externalUserId}" in text
    assert f"external_user_id=<{len(PERSONAL)} characters>" in text


async def test_what_cannot_be_sent_is_refused_before_anything_is_sent() -> None:
    async with KeylessClient("key", base_url="http://localhost:9") as client:
        for call in (
            client.create_external_user("xyz", "ann"),
            client.create_external_user(USER, ""),
            client.update_external_user(USER, ".."),
            client.find_users("\ud800"),
            client.delete_external_user("x" * 513),
            client.get_devices(""),
            client.delete_device(USER, ""),
            client.delete_user("../users"),
        ):
            with pytest.raises(InvalidIdentifierError):
                await call
