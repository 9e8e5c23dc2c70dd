"""What the phone's page is shown: the phones of the users, their history and the requests, within bounds."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from waiting import spin_until

from .phone_page import OTHER, USER, create, events, get, picture

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox


async def test_operation_is_shown_on_its_users_phone(http: aiohttp.ClientSession, page: aiohttp.ClientSession) -> None:
    await create(http, operationPayload="Pay 5", externalUserId="ann@example.com")
    await create(http, "b", OTHER)
    shown = await picture(page)
    assert [phone["user"] for phone in shown["phones"]] == [USER, OTHER]
    [first], [second] = (phone["pending"] for phone in shown["phones"])
    assert first.pop("key") != second["key"]
    assert first.pop("at") <= second["at"]
    assert first == {"operationId": "a", "operationPayload": "Pay 5", "externalUserId": "ann@example.com"}
    assert (second["operationPayload"], second["externalUserId"]) == (None, None)


@pytest.mark.looptime
async def test_what_happens_is_shown_as_it_happens(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    async with events(page) as stream:
        assert (await stream.next())["phones"] == []
        await create(http)
        shown = await stream.until(lambda shown: shown["phones"])
        key = shown["phones"][0]["pending"][0]["key"]
        await create(http, "b")
        shown = await stream.until(lambda shown: len(shown["phones"][0]["pending"]) == 2)
        assert [card["operationId"] for card in shown["phones"][0]["pending"]] == ["b", "a"]
        sandbox.forget("b")
        shown = await stream.until(lambda shown: len(shown["phones"][0]["pending"]) == 1)
        assert shown["history"] == []
        sandbox.fail_authentication("a")
        sandbox.approve("a", auth_type="pin")
        sandbox.approve("a")
        shown = await stream.until(lambda shown: not shown["phones"][0]["pending"])
        assert shown["history"][0].pop("at") >= shown["history"][1].pop("at")
        common = {"key": key, "user": USER, "text": None}
        assert shown["history"] == [
            {**common, "authType": "pin", "errorCode": 0, "reason": None},
            {**common, "authType": "biom", "errorCode": 30004, "reason": "the face did not match"},
        ]


async def test_attempt_for_what_a_phone_creates_is_in_history(sandbox: Sandbox, page: aiohttp.ClientSession) -> None:
    sandbox.fail_authentication("of the phone", user_id=USER)
    [entry] = (await picture(page))["history"]
    assert (entry["key"], entry["text"], entry["user"]) == (None, None, USER)


async def test_history_has_a_texts_start_and_the_latest_attempts(sandbox: Sandbox, page: aiohttp.ClientSession) -> None:
    for number in range(60):
        sandbox.approve(str(number), user_id=USER, operation_payload=f"{number:02} " + "p" * 1200)
    shown = (await picture(page))["history"]
    texts = [f"{number} {'p' * 117}… (1,203 characters in all)" for number in range(59, 9, -1)]
    assert [entry["text"] for entry in shown] == texts


async def test_phone_alone_shows_nothing_of_others(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    await create(http, "secret-of-the-other", OTHER)
    await create(http, "secret-too", OTHER)
    sandbox.approve("secret-too")
    shown = await picture(page, user=USER.lower())
    assert [phone["user"] for phone in shown["phones"]] == [USER]
    assert (shown["history"], shown["requests"]) == ([], [])
    assert "secret" not in json.dumps(shown)
    assert OTHER not in json.dumps(shown)


async def test_the_phone_of_an_unknown_user_is_empty(page: aiohttp.ClientSession) -> None:
    empty: dict[str, Any] = {
        "externalUserId": None,
        "removed": False,
        "lockedFor": 0,
        "pending": [],
        "more": 0,
    }
    assert (await picture(page, user="ABC"))["phones"] == [{"user": "ABC", **empty}]


async def test_enrolled_user_has_a_phone_until_it_is_removed(sandbox: Sandbox, page: aiohttp.ClientSession) -> None:
    sandbox.enroll(USER, external_user_id="ann")
    [phone] = (await picture(page))["phones"]
    assert (phone["user"], phone["externalUserId"], phone["removed"]) == (USER, "ann", False)
    async with sandbox.client() as client:
        await client.delete_user(USER)
    [phone] = (await picture(page))["phones"]
    assert (phone["externalUserId"], phone["removed"]) == (None, True)


async def test_user_that_is_not_hex_is_a_bad_request(page: aiohttp.ClientSession) -> None:
    async with page.get("/sandbox/page/events?user=%3Cb%3E") as response:
        assert response.status == 400


@pytest.mark.looptime
async def test_journal_is_shown_latest_first_with_status_and_duration(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    sandbox.latency = 0.25
    await create(http)
    sandbox.drop_next(method="POST")
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await create(http, "b")
    asking = asyncio.create_task(get(http))
    await spin_until(lambda: len(sandbox.requests) == 3)
    shown = await picture(page)
    assert [(each["method"], each["status"], each["duration"]) for each in shown["requests"]] == [
        ("GET", None, 0),
        ("POST", None, pytest.approx(0.25)),
        ("POST", 200, pytest.approx(0.25)),
    ]
    await asking
    sandbox.latency = 0
    for number in range(15):
        await get(http, str(number))
    shown = await picture(page)
    assert [each["path"] for each in shown["requests"]] == [f"/v2/operations/{n}" for n in range(14, 2, -1)]


async def test_picture_has_no_key(sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession) -> None:
    await create(http)
    await get(http)
    shown = json.dumps(await picture(page))
    assert sandbox.api_key not in shown
    assert "sandbox-sdk-key" not in shown


async def test_only_the_latest_operations_and_the_start_of_a_text_are_shown(
    http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    for number in range(23):
        await create(http, str(number), operationPayload="p" * 2001)
    [phone] = (await picture(page))["phones"]
    assert [card["operationId"] for card in phone["pending"]] == [str(number) for number in range(22, 2, -1)]
    assert {card["operationPayload"] for card in phone["pending"]} == {"p" * 2000 + "… (2,001 characters in all)"}
    assert phone["more"] == 3


async def test_the_latest_users_are_shown_in_order(http: aiohttp.ClientSession, page: aiohttp.ClientSession) -> None:
    users = [f"AB{number:02}" for number in range(24)]
    for user in users:
        await create(http, user, user)
    await create(http, "again", users[1])
    await create(http, "one more", "FF")
    assert [phone["user"] for phone in (await picture(page))["phones"]] == [*users[1:], "FF"]
