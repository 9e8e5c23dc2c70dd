"""The guarded bot on a Bot API server, a sandbox and the real clock: what goes wrong first, then many chats at once."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiogram import Bot
from aiogram.client.default import DefaultBotProperties
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiohttp import web
from tenacity import wait_fixed

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "guarded_bot"))

import bot as example  # examples are programs, not a package
from bot_api_server import TOKEN, ApiError, BotApiServer, refusal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

ALICE, BOB, STRANGER = 1001, 1002, 1003
USERS = {ALICE: "A11CE0", BOB: "B0B000"}
TOO_LATE = "Nothing was transferred. If you approve it later, nothing is transferred either."


@pytest.fixture
async def telegram() -> AsyncGenerator[BotApiServer]:
    async with BotApiServer() as server:
        yield server


@pytest.fixture
async def client(sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
    async with sandbox.client(schedule=wait_fixed(0.02)) as client:
        yield client


class Session(AiohttpSession):
    """Closes at once: on loopback there is no TLS to take leave of, for which aiogram's waits."""

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


@asynccontextmanager
async def running(
    telegram: BotApiServer,
    client: KeylessClient,
    *,
    users: dict[int, str] = USERS,
    lifetime: float = 60.0,
    edit_every: float = 0.2,
) -> AsyncGenerator[example.Teller]:
    """Run the bot as its `main` does; the block ends by stopping it."""
    teller = example.Teller(client, users, lifetime=lifetime, edit_every=edit_every)
    session = Session(api=TelegramAPIServer.from_base(telegram.url))
    bot = Bot(TOKEN, session=session, default=DefaultBotProperties(parse_mode="HTML"))
    dispatcher = teller.dispatcher()
    polling = asyncio.create_task(dispatcher.start_polling(bot, handle_signals=False))
    await until(lambda: "getUpdates" in telegram.calls)
    try:
        yield teller
    finally:
        await dispatcher.stop_polling()
        await polling


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def operation_ids(sandbox: Sandbox) -> list[str]:
    return list(sandbox.operations)


async def test_order_that_nobody_approves_transfers_nothing_and_says_so(
    telegram: BotApiServer, client: KeylessClient
) -> None:
    async with running(telegram, client, lifetime=0.3) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        message = await telegram.read(ALICE, "Not approved in time.")
        assert message.text == f"Transfer 40 to alice\nNot approved in time. {TOO_LATE}"
        assert teller.transfers == []


async def test_late_approval_is_no_answer_to_the_next_question(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with running(telegram, client, lifetime=0.6) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, "Not approved in time.")
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, "Approve it on your phone.")
        await until(lambda: len(sandbox.operations) == 2)
        sandbox.approve(operation_ids(sandbox)[0])
        await telegram.read(ALICE, "Not approved in time.")
        assert teller.transfers == []


async def test_bot_waits_out_a_keyless_that_is_down_for_a_while(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with running(telegram, client) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: client.statistics.polls > 0)
        sandbox.fail_next(503, None)
        await telegram.read(ALICE, "Keyless does not answer, still trying: ")
        sandbox.approve(operation_ids(sandbox)[0])
        sandbox.recover()
        await telegram.read(ALICE, "Approved and transferred.")
        assert teller.transfers == [("A11CE0", "40", "alice")]


async def test_nothing_is_transferred_where_keyless_cannot_be_asked(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    sandbox.fail_next(401)
    async with running(telegram, client) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, f"Your approval cannot be asked for or checked. {TOO_LATE}")
        assert teller.transfers == []


async def test_approval_of_something_else_transfers_nothing(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    lies: list[dict[str, object]] = [{"operation_payload": "Transfer 1 to bob"}, {"user_id": "B0B"}, {"result": False}]
    users = {chat: f"{chat:02X}" for chat in range(1, len(lies) + 1)}
    async with running(telegram, client, users=users) as teller:
        for chat in users:
            await telegram.say(chat, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == len(lies))
        for operation_id, lie in zip(operation_ids(sandbox), lies, strict=True):
            sandbox.tamper(operation_id, **{"state": "approved", "result": True, **lie})
        await telegram.read_all(list(users), TOO_LATE)
        assert teller.transfers == []


async def test_command_that_is_delivered_again_asks_no_second_time(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with running(telegram, client) as teller:
        command = await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, "Approve it on your phone.")
        await until(lambda: len(sandbox.operations) == 1)
        sandbox.approve(operation_ids(sandbox)[0])
        await telegram.read(ALICE, "Approved and transferred.")
        await telegram.deliver(command)
        await telegram.read(ALICE, "This command was taken before")
        assert len(teller.transfers) == len(sandbox.operations) == 1


async def test_user_is_asked_one_question_at_a_time(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with running(telegram, client):
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, "Approve it on your phone.")
        await until(lambda: len(sandbox.operations) == 1)  # the message comes before the question
        await telegram.say(ALICE, "/transfer 9000 mallory")
        await telegram.read(ALICE, "Another transfer waits for you.")
        assert len(sandbox.operations) == 1


async def test_what_is_no_order_asks_nobody(telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox) -> None:
    commands = [
        "/transfer",
        "/transfer alice 40",
        "/transfer 0.00 alice",
        "/transfer -40 alice",
        "/transfer 40 alice\nand more",
        "/transfer 40 alice\N{RIGHT-TO-LEFT OVERRIDE}bob",
    ]
    async with running(telegram, client):
        for command in commands:
            await telegram.say(ALICE, command)
        await telegram.say(STRANGER, "/transfer 40 alice")
        await until(lambda: len(telegram.messages) > len(commands))
    answers = sorted((message.chat, message.text) for message in telegram.messages)
    assert answers == [(ALICE, example.USAGE)] * len(commands) + [(STRANGER, "This bot does not know you.")]
    assert not sandbox.operations


async def test_group_is_no_place_for_an_order(telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox) -> None:
    async with running(telegram, client):
        await telegram.say(ALICE, "/transfer 40 alice", group=True)
        await telegram.say(ALICE, "/transfer")
        await telegram.read(ALICE, example.USAGE)
    assert len(telegram.messages) == 1
    assert not sandbox.operations


async def test_users_text_is_shown_as_text(telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox) -> None:
    payee = "<b>alice</i> & [bob](tg://user?id=1) *_`"
    async with running(telegram, client, edit_every=0.05):
        await telegram.say(ALICE, f"/transfer 40 {payee}")
        await telegram.read(ALICE, "Waiting for your approval: ")
        sandbox.approve(operation_ids(sandbox)[0])
        message = await telegram.read(ALICE, "Approved and transferred.")
    assert {text.splitlines()[0] for text in message.texts} == {f"Transfer 40 to {payee}"}


async def test_telegram_failing_at_progress_does_not_end_the_wait(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    failures = [
        refusal(ApiError(429, "Too Many Requests: retry after 1", retry_after=1)),
        web.Response(status=502, text="<html>Bad gateway</html>", content_type="text/html"),
        refusal(ApiError(403, "Forbidden: bot was blocked by the user")),
    ]
    telegram.broken = lambda method: failures.pop() if method == "editMessageText" and failures else None
    async with running(telegram, client, edit_every=0.05) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: not failures)
        sandbox.approve(operation_ids(sandbox)[0])
        await telegram.read(ALICE, "Approved and transferred.")
        assert len(teller.transfers) == 1


async def test_end_is_told_also_where_the_message_was_deleted(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with running(telegram, client):
        await telegram.say(ALICE, "/transfer 40 alice")
        message = await telegram.read(ALICE, "Approve it on your phone.")
        message.deleted = True
        await until(lambda: len(sandbox.operations) == 1)
        sandbox.approve(operation_ids(sandbox)[0])
        assert (await telegram.read(ALICE, "Approved and transferred.")) is not message


async def test_stopping_ends_every_wait_tells_the_chats_and_leaves_nothing(
    telegram: BotApiServer, client: KeylessClient
) -> None:
    before = asyncio.all_tasks()
    async with running(telegram, client) as teller:
        for chat in USERS:
            await telegram.say(chat, "/transfer 40 alice")
        await until(lambda: client.statistics.waiting == len(USERS))
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert [message.text.splitlines()[1] for message in telegram.messages] == [f"The bot was stopped. {TOO_LATE}"] * 2
    assert teller.transfers == []
    await until(lambda: {task for task in asyncio.all_tasks() if not in_server(task)} <= before)


def in_server(task: asyncio.Task[object]) -> bool:
    """Whether a task is a connection of one of the two servers, which live in this loop too."""
    return "RequestHandler" in repr(task)


async def test_stopping_does_not_wait_for_a_telegram_that_hangs(
    telegram: BotApiServer, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "GRACE", 0.2)
    async with running(telegram, client, edit_every=60):
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: client.statistics.waiting == 1)
        flood = ApiError(429, "Too Many Requests: retry after 600", retry_after=600)
        telegram.broken = lambda method: refusal(flood) if method == "editMessageText" else None
        began = time.monotonic()
    assert time.monotonic() - began < 2


async def test_program_takes_its_settings_from_the_environment_and_ends_at_sigterm(
    telegram: BotApiServer, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"BOT_TOKEN": TOKEN, "BOT_API_URL": telegram.url, "KEYLESS_USERS": json.dumps(USERS)}
    for name, value in {**settings, "KEYLESS_API_KEY": sandbox.api_key, "KEYLESS_BASE_URL": sandbox.url}.items():
        monkeypatch.setenv(name, value)
    program = asyncio.create_task(example.main())
    await telegram.say(ALICE, "/transfer 40 alice")
    await until(lambda: len(sandbox.operations) == 1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(program, 5)
    await telegram.read(ALICE, "The bot was stopped.")


async def test_message_is_edited_seldom_however_often_keyless_is_asked(
    telegram: BotApiServer, client: KeylessClient
) -> None:
    async with running(telegram, client, edit_every=0.3):
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: client.statistics.waiting == 1)
        began = time.monotonic()
        await until(lambda: client.statistics.polls > 30)
        edits = telegram.calls.count("editMessageText")
        assert 1 <= edits <= (time.monotonic() - began) / 0.3 + 1


async def test_many_chats_wait_at_once_and_edits_are_few(
    telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    users = {chat: f"{chat:06X}" for chat in range(1, 201)}
    async with running(telegram, client, users=users, edit_every=0.5) as teller:
        began = time.monotonic()
        for chat in users:
            await telegram.say(chat, f"/transfer {chat} alice")
        await until(lambda: client.statistics.waiting == len(users))
        await telegram.read(1, "Waiting for your approval: ")
        edits = telegram.calls.count("editMessageText")
        assert edits <= (time.monotonic() - began) / example.EDITS_APART + 1
        for operation_id in operation_ids(sandbox):
            sandbox.approve(operation_id)
        await telegram.read_all(list(users), "Approved and transferred.")
    assert sorted(teller.transfers) == sorted((users[chat], f"{chat}", "alice") for chat in users)
