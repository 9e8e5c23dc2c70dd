"""The guarded bot on a Bot API server, a sandbox and the real clock: what goes wrong first, then many chats at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
import time
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiogram import Bot
from aiogram.client.default import DefaultBotProperties
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiohttp import web
from tenacity import wait_fixed

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "guarded_bot"))

import bot as example  # examples are programs, not a package
from bot_api import TOKEN, ApiError, BotApiServer, refusal
from leaks import tasks_since
from waiting import PATIENCE, until

from aiokeyless._waits import explanation

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox


ALICE, BOB, STRANGER = 1001, 1002, 1003
PROGRAM = Path(example.__file__)
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


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """The record of all bots of a test, on disk."""
    with closing(sqlite3.connect(tmp_path / "record.sqlite3", isolation_level=None)) as database:
        yield database


class Session(AiohttpSession):
    """Closes at once: on loopback there is no TLS to take leave of, for which aiogram's waits."""

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


@asynccontextmanager
async def running(
    telegram: BotApiServer,
    client: KeylessClient,
    database: sqlite3.Connection,
    *,
    users: dict[int, str] = USERS,
    lifetime: float = 60.0,
    edit_every: float = 0.2,
) -> AsyncGenerator[example.Teller]:
    """Run the bot as its `main` does; the block ends by stopping it."""
    teller = example.Teller(client, users, example.Record(database), lifetime=lifetime, edit_every=edit_every)
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


def operation_ids(sandbox: Sandbox) -> list[str]:
    return list(sandbox.operations)


async def test_order_that_nobody_approves_transfers_nothing_and_says_so(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection
) -> None:
    async with running(telegram, client, database, lifetime=0.3) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        message = await telegram.read(ALICE, "Not approved in time.")
        assert message.text == f"Transfer 40 to alice\nNot approved in time. {TOO_LATE}"
        assert teller.transfers == []


async def test_a_pin_transfers_nothing(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    async with running(telegram, client, database) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == 1)
        sandbox.approve(*operation_ids(sandbox), auth_type="pin")
        await telegram.read(ALICE, TOO_LATE)
        assert teller.transfers == []


async def test_late_approval_is_no_answer_to_the_next_question(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    async with running(telegram, client, database, lifetime=0.6) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, "Not approved in time.")
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == 2)
        sandbox.approve(operation_ids(sandbox)[0])
        await telegram.read(ALICE, "Not approved in time.")
        assert teller.transfers == []


async def test_the_bot_survives_an_outage_of_keyless(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    async with running(telegram, client, database) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: client.statistics.polls > 0)
        sandbox.fail_next(503, None)
        await telegram.read(ALICE, "Keyless does not answer, still trying: ")
        sandbox.approve(operation_ids(sandbox)[0])
        sandbox.recover()
        await telegram.read(ALICE, "Approved and transferred.")
        assert teller.transfers == [("A11CE0", "40", "alice")]


@pytest.mark.parametrize(
    ("status", "copy"),
    [
        (401, "Keyless refuses this bot."),
        (403, "Keyless refuses this bot."),
        (429, "Keyless is not reachable."),
        (503, "Keyless is not reachable."),
        (None, "Keyless is not reachable."),
    ],
)
async def test_nothing_is_transferred_where_keyless_cannot_be_asked_and_the_chat_learns_why(
    telegram: BotApiServer, database: sqlite3.Connection, sandbox: Sandbox, status: int | None, copy: str
) -> None:
    async with sandbox.client(max_attempts=1) as client, running(telegram, client, database) as teller:
        if status is None:
            sandbox.drop_next(None)
        else:
            sandbox.fail_next(status, None)
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, f"{copy} {TOO_LATE}")
        assert teller.transfers == []


async def test_user_whose_face_did_not_match_or_who_left_the_scan_is_asked_to_try_again_and_may_approve(
    telegram: BotApiServer,
    client: KeylessClient,
    database: sqlite3.Connection,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explanation, "PENDING_FOR", 0.05)
    monkeypatch.setattr(explanation, "INTERVAL", 0.05)
    async with running(telegram, client, database, lifetime=600) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == 1)
        [operation_id] = operation_ids(sandbox)
        sandbox.fail_authentication(operation_id, error_code=30004)
        await telegram.read(ALICE, "Your phone tells us that the face did not match; please try again: ")
        sandbox.fail_authentication(operation_id, error_code=30003)
        await telegram.read(ALICE, "Your phone tells us that the user left the scan; please try again: ")
        sandbox.approve(operation_id)
        await telegram.read(ALICE, "Approved and transferred.")
        assert teller.transfers == [("A11CE0", "40", "alice")]


async def test_approval_of_something_else_transfers_nothing(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    lies: list[dict[str, object]] = [{"operation_payload": "Transfer 1 to bob"}, {"user_id": "B0B"}, {"result": False}]
    users = {chat: f"{chat:02X}" for chat in range(1, len(lies) + 1)}
    async with running(telegram, client, database, users=users) as teller:
        for chat in users:
            await telegram.say(chat, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == len(lies))
        for operation_id, lie in zip(operation_ids(sandbox), lies, strict=True):
            sandbox.tamper(operation_id, **{"state": "approved", "result": True, **lie})
        await telegram.read_all(list(users), TOO_LATE)
        assert teller.transfers == []


FAULTS: dict[str, Callable[[Sandbox, bool], None]] = {
    "dropped": lambda sandbox, stored: sandbox.drop_next(stored=stored, method="POST"),
    "503": lambda sandbox, stored: sandbox.fail_next(503, stored=stored, method="POST"),
    "a page": lambda sandbox, stored: sandbox.fail_next(200, stored=stored, method="POST", body=b"<html>"),
    "nothing wrong": lambda _sandbox, _stored: None,
}
faults = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())


@faults
@pytest.mark.parametrize("stored", [False, True], ids=["lost", "stored"])
async def test_command_that_is_delivered_again_amid_faults_transfers_once(
    telegram: BotApiServer,
    client: KeylessClient,
    database: sqlite3.Connection,
    sandbox: Sandbox,
    fault: Callable[[Sandbox, bool], None],
    *,
    stored: bool,
) -> None:
    async with running(telegram, client, database) as teller:
        fault(sandbox, stored)
        command = await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == 1)
        sandbox.approve(operation_ids(sandbox)[0])
        await telegram.read(ALICE, "Approved and transferred.")
        for _again in range(2):
            sandbox.recover()
            fault(sandbox, stored)
            said = len(telegram.messages)
            await telegram.deliver(command)
            await until(lambda: len(telegram.messages) > said)  # noqa: B023  # awaited in this turn
            await telegram.read(ALICE, "This command was carried out before")
        assert len(teller.transfers) == len(sandbox.operations) == 1


async def test_command_that_is_delivered_twice_at_once_transfers_once(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    async with running(telegram, client, database) as teller:
        command = await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.deliver(command)
        await telegram.read(ALICE, "Another transfer waits for you.")
        await until(lambda: len(sandbox.operations) == 1)
        sandbox.approve(operation_ids(sandbox)[0])
        await until(lambda: ends(telegram)[0] == "Approved and transferred.")
        assert len(teller.transfers) == len(sandbox.operations) == 1


REPORTED_ONCE = ["Approved and transferred.", example.SETTLED["paid"]]


def ends(telegram: BotApiServer) -> list[str]:
    """The last lines of what the chats read."""
    return [message.text.splitlines()[-1] for message in telegram.messages]


@faults
async def test_two_bots_that_get_one_command_transfer_once(
    telegram: BotApiServer,
    client: KeylessClient,
    database: sqlite3.Connection,
    sandbox: Sandbox,
    fault: Callable[[Sandbox, bool], None],
) -> None:
    """While a new version is rolled out there are two; both see the approval at the same moment."""
    async with (
        BotApiServer() as telegram_too,
        running(telegram, client, database) as teller,
        running(telegram_too, client, database) as teller_too,
    ):
        fault(sandbox, False)  # noqa: FBT003  # not stored
        await telegram_too.deliver(await telegram.say(ALICE, "/transfer 40 alice"))
        await until(lambda: client.statistics.waiting == 2)
        sandbox.approve(operation_ids(sandbox)[0])
        await until(lambda: sorted(ends(telegram) + ends(telegram_too)) == REPORTED_ONCE)
        assert len(teller.transfers + teller_too.transfers) == len(sandbox.operations) == 1


@faults
async def test_approval_whose_outcome_was_never_learned_transfers_once(
    telegram: BotApiServer,
    client: KeylessClient,
    database: sqlite3.Connection,
    sandbox: Sandbox,
    fault: Callable[[Sandbox, bool], None],
) -> None:
    operation_id, user, payload = f"transfer-42-{ALICE}-1", USERS[ALICE], "Transfer 40 to alice"
    assert example.Record(database).ask(operation_id, user, payload) == "asked"
    await client.create_operation(user, operation_id=operation_id, operation_payload=payload)
    sandbox.approve(operation_id)
    async with running(telegram, client, database) as teller:
        fault(sandbox, False)  # noqa: FBT003
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, "Approved and transferred.")
        assert teller.transfers == [("A11CE0", "40", "alice")]
    assert len(sandbox.operations) == 1


async def test_approval_that_came_while_the_bot_was_down_transfers_once(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox, tmp_path: Path
) -> None:
    command = await ask_and_be_killed(telegram, sandbox, tmp_path)
    sandbox.approve(operation_ids(sandbox)[0])
    async with running(telegram, client, database) as teller:
        await telegram.deliver(command)
        await telegram.read(ALICE, "Approved and transferred.")
        await telegram.deliver(command)
        await telegram.read(ALICE, "This command was carried out before")
        assert len(teller.transfers) == len(sandbox.operations) == 1


async def test_question_that_outlived_the_bot_is_answered_once(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox, tmp_path: Path
) -> None:
    command = await ask_and_be_killed(telegram, sandbox, tmp_path)
    async with running(telegram, client, database) as teller:
        await telegram.deliver(command)
        await until(lambda: client.statistics.waiting == 1)
        sandbox.approve(operation_ids(sandbox)[0])
        await telegram.read(ALICE, "Approved and transferred.")
        assert len(teller.transfers) == len(sandbox.operations) == 1


async def ask_and_be_killed(telegram: BotApiServer, sandbox: Sandbox, folder: Path) -> dict[str, Any]:
    """Run the program until it has asked, and kill it; return the command."""
    environment = os.environ | settings(telegram, sandbox, folder)
    program = await asyncio.create_subprocess_exec(sys.executable, str(PROGRAM), env=environment)
    try:
        command = await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == 1 and telegram.calls.count("getUpdates") > 1)
    finally:
        program.kill()
        await program.wait()
    telegram.calls.clear()
    return command


def settings(telegram: BotApiServer, sandbox: Sandbox, folder: Path) -> dict[str, str]:
    """The environment of the program."""
    return {
        "BOT_TOKEN": TOKEN,
        "BOT_API_URL": telegram.url,
        "BOT_DB": str(folder / "record.sqlite3"),
        "KEYLESS_USERS": json.dumps(USERS),
        "KEYLESS_API_KEY": sandbox.api_key,
        "KEYLESS_BASE_URL": sandbox.url,
    }


async def test_refused_command_stays_refused_though_it_is_delivered_and_approved_again(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    async with running(telegram, client, database, lifetime=0.3) as teller:
        command = await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, "Not approved in time.")
        sandbox.approve(operation_ids(sandbox)[0])
        await telegram.deliver(command)
        await telegram.read(ALICE, "This command was closed before, and nothing was transferred.")
        assert teller.transfers == []


async def test_operation_of_another_under_the_commands_id_transfers_nothing(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    await client.create_operation(
        USERS[ALICE], operation_id=f"transfer-42-{ALICE}-1", operation_payload="Transfer 1 to bob"
    )
    sandbox.approve(operation_ids(sandbox)[0])
    async with running(telegram, client, database) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, f"What Keyless holds for this command is not this transfer. {TOO_LATE}")
        assert teller.transfers == []


async def test_final_poll_without_an_answer_is_no_fault_of_the_user(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    sandbox.fail_next(503, None, method="GET")
    async with running(telegram, client, database, lifetime=0.5) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await telegram.read(ALICE, f"Keyless is not reachable: your approval could not be checked. {TOO_LATE}")
        assert teller.transfers == []


async def test_user_is_asked_one_question_at_a_time(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    async with running(telegram, client, database):
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == 1)
        await telegram.say(ALICE, "/transfer 9000 mallory")
        await telegram.read(ALICE, "Another transfer waits for you.")
        assert len(sandbox.operations) == 1


async def test_a_malformed_order_starts_no_operation(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    commands = [
        "/transfer",
        "/transfer alice 40",
        "/transfer 0.00 alice",
        "/transfer -40 alice",
        "/transfer 40 alice\nand more",
        "/transfer 40 alice\N{RIGHT-TO-LEFT OVERRIDE}bob",
    ]
    async with running(telegram, client, database):
        for command in commands:
            await telegram.say(ALICE, command)
        await telegram.say(STRANGER, "/transfer 40 alice")
        await until(lambda: len(telegram.messages) > len(commands))
    answers = sorted((message.chat, message.text) for message in telegram.messages)
    assert answers == [(ALICE, example.USAGE)] * len(commands) + [(STRANGER, "This bot does not know you.")]
    assert not sandbox.operations


async def test_group_is_no_place_for_an_order(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    async with running(telegram, client, database):
        await telegram.say(ALICE, "/transfer 40 alice", group=True)
        await telegram.say(ALICE, "/transfer")
        await telegram.read(ALICE, example.USAGE)
    assert len(telegram.messages) == 1
    assert not sandbox.operations


async def test_users_text_is_shown_as_text(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    payee = "<b>alice</i> & [bob](tg://user?id=1) *_`"
    async with running(telegram, client, database, edit_every=0.05):
        await telegram.say(ALICE, f"/transfer 40 {payee}")
        await telegram.read(ALICE, "Waiting for your approval: ")
        sandbox.approve(operation_ids(sandbox)[0])
        message = await telegram.read(ALICE, "Approved and transferred.")
    assert {text.splitlines()[0] for text in message.texts} == {f"Transfer 40 to {payee}"}


async def test_telegram_failing_at_progress_does_not_end_the_wait(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    failures = [
        refusal(ApiError(429, "Too Many Requests: retry after 1", retry_after=1)),
        web.Response(status=502, text="<html>Bad gateway</html>", content_type="text/html"),
        refusal(ApiError(403, "Forbidden: bot was blocked by the user")),
    ]
    telegram.broken = lambda method: failures.pop() if method == "editMessageText" and failures else None
    async with running(telegram, client, database, edit_every=0.05) as teller:
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: not failures)
        sandbox.approve(operation_ids(sandbox)[0])
        await telegram.read(ALICE, "Approved and transferred.")
        assert len(teller.transfers) == 1


async def test_the_end_is_reported_also_where_the_message_was_deleted(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    async with running(telegram, client, database):
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: len(sandbox.operations) == 1)  # the message comes before the question
        [message] = telegram.messages
        message.deleted = True
        sandbox.approve(operation_ids(sandbox)[0])
        assert (await telegram.read(ALICE, "Approved and transferred.")) is not message


async def test_stopping_ends_every_wait_notifies_the_chats_and_leaves_nothing(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection
) -> None:
    before = asyncio.all_tasks()
    async with running(telegram, client, database) as teller:
        for chat in USERS:
            await telegram.say(chat, "/transfer 40 alice")
        await until(lambda: client.statistics.waiting == len(USERS))
    assert [message.text.splitlines()[1] for message in telegram.messages] == [f"The bot was stopped. {TOO_LATE}"] * 2
    assert teller.transfers == []
    await until(lambda: not tasks_since(before))


async def test_stopping_does_not_wait_for_a_telegram_that_hangs(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "GRACE", 0.2)
    async with running(telegram, client, database, edit_every=60):
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: client.statistics.waiting == 1)
        flood = ApiError(429, "Too Many Requests: retry after 600", retry_after=600)
        telegram.broken = lambda method: refusal(flood) if method == "editMessageText" else None
        began = time.monotonic()
    assert time.monotonic() - began < 60  # Telegram asked for 600


async def test_program_takes_its_settings_from_the_environment_and_ends_at_sigterm(
    telegram: BotApiServer, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings(telegram, sandbox, tmp_path).items():
        monkeypatch.setenv(name, value)
    program = asyncio.create_task(example.main())
    await telegram.say(ALICE, "/transfer 40 alice")
    await until(lambda: len(sandbox.operations) == 1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(program, PATIENCE)
    await telegram.read(ALICE, "The bot was stopped.")


async def test_message_is_edited_seldom_however_often_keyless_is_asked(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection
) -> None:
    async with running(telegram, client, database, edit_every=0.3):
        began = time.monotonic()
        await telegram.say(ALICE, "/transfer 40 alice")
        await until(lambda: client.statistics.polls > 30)
        edits = telegram.calls.count("editMessageText")
        assert 1 <= edits <= (time.monotonic() - began) / 0.3 + 1


async def test_many_chats_wait_at_once_and_edits_are_few(
    telegram: BotApiServer, client: KeylessClient, database: sqlite3.Connection, sandbox: Sandbox
) -> None:
    users = {chat: f"{chat:06X}" for chat in range(1, 201)}
    async with running(telegram, client, database, users=users, lifetime=600, edit_every=0.5) as teller:
        began = time.monotonic()
        for chat in users:
            await telegram.say(chat, f"/transfer {chat} alice")
        await until(lambda: client.statistics.waiting == len(users))
        await until(lambda: "editMessageText" in telegram.calls)  # the message of any of them
        edits = telegram.calls.count("editMessageText")
        assert edits <= (time.monotonic() - began) / example.EDITS_APART + 1
        for operation_id in operation_ids(sandbox):
            sandbox.approve(operation_id)
        await telegram.read_all(list(users), "Approved and transferred.")
    assert sorted(teller.transfers) == sorted((users[chat], f"{chat}", "alice") for chat in users)


async def test_chat_in_a_terminal_runs_the_bot_without_telegram_and_without_a_phone() -> None:
    chat = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", str(PROGRAM.with_name("chat.py")), "--auto-approve", "0.1"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    said = ""
    async with asyncio.timeout(PATIENCE):
        chat.stdin.write(b"/transfer 40 alice\n")
        while "Approved and transferred." not in said:
            said += (line := await chat.stdout.readline()).decode()
            assert line, said
        chat.stdin.close()
        assert await chat.wait() == 0
    assert "bot: Transfer 40 to alice | Approve it on your phone.\n" in said
