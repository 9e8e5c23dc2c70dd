"""The guarded bot on a Bot API server, a sandbox and the real clock: what goes wrong first, then many chats at once."""

from __future__ import annotations

import asyncio
import json
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
from bot_api import TOKEN, ApiError, BotApiServer, Message, refusal
from example_process import example_process
from leaks import tasks_since
from unshown import UNSHOWN
from waiting import PATIENCE, until

from aiokeyless._waits import explanation

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox


ALICE, BOB, STRANGER = 1001, 1002, 1003
PROGRAM = Path(example.__file__)
USERS = {ALICE: "A11CE0", BOB: "B0B000"}
TOO_LATE = "Nothing was transferred. If you approve it later, nothing is transferred either."


class Session(AiohttpSession):
    """Closes at once: on loopback there is no TLS to take leave of, for which aiogram's waits."""

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class Bots:
    """Bots with one record on disk, the chat in which they are given orders, and the phone that approves."""

    def __init__(self, telegram: BotApiServer, client: KeylessClient, sandbox: Sandbox, folder: Path) -> None:
        self.telegram = telegram
        self.client = client
        self.sandbox = sandbox
        self.record = folder / "record.sqlite3"
        self.transfers: list[tuple[str, str, str]] = []

    @asynccontextmanager
    async def running(
        self,
        *,
        telegram: BotApiServer | None = None,
        client: KeylessClient | None = None,
        users: dict[int, str] = USERS,
        lifetime: float = 60.0,
        edit_every: float = 0.2,
    ) -> AsyncGenerator[None]:
        """Run a bot as its `main` does; the block ends by stopping it."""
        chats = telegram or self.telegram
        with closing(sqlite3.connect(self.record, isolation_level=None)) as database:
            teller = example.Teller(
                client or self.client, users, example.Record(database), lifetime=lifetime, edit_every=edit_every
            )
            teller.transfers = self.transfers
            session = Session(api=TelegramAPIServer.from_base(chats.url))
            bot = Bot(TOKEN, session=session, default=DefaultBotProperties(parse_mode="HTML"))
            dispatcher = teller.dispatcher()
            polling = asyncio.create_task(dispatcher.start_polling(bot, handle_signals=False))
            await until(lambda: "getUpdates" in chats.calls)
            try:
                yield
            finally:
                await dispatcher.stop_polling()
                await polling

    async def order(self, text: str = "/transfer 40 alice") -> dict[str, Any]:
        """Give an order; return it, so that it can be delivered again."""
        return await self.telegram.say(ALICE, text)

    async def read(self, text: str) -> Message:
        """Wait for a message with this text."""
        return await self.telegram.read(ALICE, text)

    async def asked(self, count: int = 1) -> list[str]:
        """Wait for so many questions, and return their ids."""
        await until(lambda: len(self.sandbox.operations) == count)
        return list(self.sandbox.operations)

    async def approve(self, auth_type: str = "biom") -> None:
        """Approve the only question."""
        self.sandbox.approve(*await self.asked(), auth_type=auth_type)

    @property
    def settings(self) -> dict[str, str]:
        """The environment of the program."""
        return {
            "BOT_TOKEN": TOKEN,
            "BOT_API_URL": self.telegram.url,
            "BOT_DB": str(self.record),
            "KEYLESS_USERS": json.dumps(USERS),
            "KEYLESS_API_KEY": self.sandbox.api_key,
            "KEYLESS_BASE_URL": self.sandbox.url,
        }


@pytest.fixture
async def bots(sandbox: Sandbox, tmp_path: Path) -> AsyncGenerator[Bots]:
    async with BotApiServer() as telegram, sandbox.client(schedule=wait_fixed(0.02)) as client:
        yield Bots(telegram, client, sandbox, tmp_path)


async def test_order_that_nobody_approves_transfers_nothing_and_says_so(bots: Bots) -> None:
    async with bots.running(lifetime=0.3):
        await bots.order()
        message = await bots.read("Not approved in time.")
        assert message.text == f"Transfer 40 to alice\nNot approved in time. {TOO_LATE}"
        assert bots.transfers == []


async def test_a_pin_transfers_nothing(bots: Bots) -> None:
    async with bots.running():
        await bots.order()
        await bots.approve("pin")
        await bots.read(TOO_LATE)
        assert bots.transfers == []


async def test_late_approval_is_no_answer_to_the_next_question(bots: Bots) -> None:
    async with bots.running(lifetime=0.6):
        await bots.order()
        await bots.read("Not approved in time.")
        await bots.order()
        bots.sandbox.approve((await bots.asked(2))[0])
        await bots.read("Not approved in time.")
        assert bots.transfers == []


async def test_the_bot_survives_an_outage_of_keyless(bots: Bots) -> None:
    async with bots.running():
        await bots.order()
        await until(lambda: bots.client.statistics.polls > 0)
        bots.sandbox.fail_next(503, None)
        await bots.read("Keyless does not answer, still trying: ")
        await bots.approve()
        bots.sandbox.recover()
        await bots.read("Approved and transferred.")
        assert bots.transfers == [("A11CE0", "40", "alice")]


@pytest.mark.parametrize(
    ("status", "copy"),
    [
        *((status, "Keyless refuses this bot.") for status in (401, 403)),
        *((status, "Keyless is not reachable.") for status in (429, 503, None)),
    ],
)
async def test_nothing_is_transferred_where_keyless_cannot_be_asked_and_the_chat_learns_why(
    bots: Bots, status: int | None, copy: str
) -> None:
    async with bots.sandbox.client(max_attempts=1) as client, bots.running(client=client):
        if status is None:
            bots.sandbox.drop_next(None)
        else:
            bots.sandbox.fail_next(status, None)
        await bots.order()
        await bots.read(f"{copy} {TOO_LATE}")
        assert bots.transfers == []


async def test_user_whose_face_did_not_match_or_who_left_the_scan_is_asked_to_try_again_and_may_approve(
    bots: Bots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanation, "PENDING_FOR", 0.05)
    monkeypatch.setattr(explanation, "INTERVAL", 0.05)
    async with bots.running(lifetime=600):
        await bots.order()
        [operation_id] = await bots.asked()
        bots.sandbox.fail_authentication(operation_id, error_code=30004)
        await bots.read("Your phone tells us that the face did not match; please try again: ")
        bots.sandbox.fail_authentication(operation_id, error_code=30003)
        await bots.read("Your phone tells us that the user left the scan; please try again: ")
        await bots.approve()
        await bots.read("Approved and transferred.")
        assert bots.transfers == [("A11CE0", "40", "alice")]


async def test_approval_of_something_else_transfers_nothing(bots: Bots) -> None:
    lies: list[dict[str, object]] = [{"operation_payload": "Transfer 1 to bob"}, {"user_id": "B0B"}, {"result": False}]
    users = {chat: f"{chat:02X}" for chat in range(1, len(lies) + 1)}
    async with bots.running(users=users):
        for chat in users:
            await bots.telegram.say(chat, "/transfer 40 alice")
        for operation_id, lie in zip(await bots.asked(len(lies)), lies, strict=True):
            bots.sandbox.tamper(operation_id, **{"state": "approved", "result": True, **lie})
        await bots.telegram.read_all(list(users), TOO_LATE)
        assert bots.transfers == []


FAULTS: dict[str, Callable[[Sandbox, bool], None]] = {
    "dropped": lambda sandbox, stored: sandbox.drop_next(stored=stored, method="POST"),
    "503": lambda sandbox, stored: sandbox.fail_next(503, stored=stored, method="POST"),
    "a page": lambda sandbox, stored: sandbox.fail_next(200, stored=stored, method="POST", body=b"<html>"),
    "nothing wrong": lambda _sandbox, _stored: None,
}
faults = pytest.mark.parametrize("fault", FAULTS)


@faults
@pytest.mark.parametrize("stored", [False, True], ids=["lost", "stored"])
async def test_command_that_comes_again_amid_faults_transfers_once(bots: Bots, fault: str, *, stored: bool) -> None:
    async with bots.running():
        FAULTS[fault](bots.sandbox, stored)
        command = await bots.order()
        await bots.approve()
        await bots.read("Approved and transferred.")
        for _again in range(2):
            bots.sandbox.recover()
            FAULTS[fault](bots.sandbox, stored)
            said = len(bots.telegram.messages)
            await bots.telegram.deliver(command)
            await until(lambda: len(bots.telegram.messages) > said)  # noqa: B023  # awaited in this turn
            await bots.read("This command was carried out before")
        assert len(bots.transfers) == len(bots.sandbox.operations) == 1


async def test_command_that_is_delivered_twice_at_once_transfers_once(bots: Bots) -> None:
    async with bots.running():
        command = await bots.order()
        await bots.telegram.deliver(command)
        await bots.read("Another transfer waits for you.")
        await bots.approve()
        await until(lambda: ends(bots.telegram)[0] == "Approved and transferred.")
        assert len(bots.transfers) == len(bots.sandbox.operations) == 1


REPORTED_ONCE = ["Approved and transferred.", example.SETTLED["paid"]]


def ends(telegram: BotApiServer) -> list[str]:
    """The last lines of what the chats read."""
    return [message.text.splitlines()[-1] for message in telegram.messages]


@faults
async def test_two_bots_that_get_one_command_transfer_once(bots: Bots, fault: str) -> None:
    """While a new version is rolled out there are two; both see the approval at the same moment."""
    async with BotApiServer() as telegram_too, bots.running(), bots.running(telegram=telegram_too):
        FAULTS[fault](bots.sandbox, False)  # noqa: FBT003  # not stored
        await telegram_too.deliver(await bots.order())
        await until(lambda: bots.client.statistics.waiting == 2)
        await bots.approve()
        await until(lambda: sorted(ends(bots.telegram) + ends(telegram_too)) == REPORTED_ONCE)
        assert len(bots.transfers) == len(bots.sandbox.operations) == 1


@faults
async def test_approval_whose_outcome_was_never_learned_transfers_once(bots: Bots, fault: str) -> None:
    operation_id, user, payload = f"transfer-42-{ALICE}-1", USERS[ALICE], "Transfer 40 to alice"
    with closing(sqlite3.connect(bots.record, isolation_level=None)) as database:
        assert example.Record(database).ask(operation_id, user, payload) == "asked"
    await bots.client.create_operation(user, operation_id=operation_id, operation_payload=payload)
    await bots.approve()
    async with bots.running():
        FAULTS[fault](bots.sandbox, False)  # noqa: FBT003
        await bots.order()
        await bots.read("Approved and transferred.")
        assert bots.transfers == [("A11CE0", "40", "alice")]
    assert len(bots.sandbox.operations) == 1


async def test_question_that_outlived_the_bot_is_answered_once(bots: Bots) -> None:
    command = await ask_and_be_killed(bots)
    async with bots.running():
        await bots.telegram.deliver(command)
        await until(lambda: bots.client.statistics.waiting == 1)
        await bots.approve()
        await bots.read("Approved and transferred.")
        assert len(bots.transfers) == len(bots.sandbox.operations) == 1


async def ask_and_be_killed(bots: Bots) -> dict[str, Any]:
    """Run the program until it has asked, and kill it; return the command."""
    async with example_process(str(PROGRAM), folder=PROGRAM.parent, sandbox=bots.sandbox, **bots.settings):
        command = await bots.order()
        await until(lambda: len(bots.sandbox.operations) == 1 and bots.telegram.calls.count("getUpdates") > 1)
    bots.telegram.calls.clear()
    return command


async def test_refused_command_stays_refused_though_it_is_delivered_and_approved_again(bots: Bots) -> None:
    async with bots.running(lifetime=0.3):
        command = await bots.order()
        await bots.read("Not approved in time.")
        await bots.approve()
        await bots.telegram.deliver(command)
        await bots.read("This command was closed before, and nothing was transferred.")
        assert bots.transfers == []


async def test_operation_of_another_under_the_commands_id_transfers_nothing(bots: Bots) -> None:
    await bots.client.create_operation(
        USERS[ALICE], operation_id=f"transfer-42-{ALICE}-1", operation_payload="Transfer 1 to bob"
    )
    await bots.approve()
    async with bots.running():
        await bots.order()
        await bots.read(f"What Keyless holds for this command is not this transfer. {TOO_LATE}")
        assert bots.transfers == []


async def test_final_poll_without_an_answer_is_no_fault_of_the_user(bots: Bots) -> None:
    bots.sandbox.fail_next(503, None, method="GET")
    async with bots.running(lifetime=0.5):
        await bots.order()
        await bots.read(f"Keyless is not reachable: your approval could not be checked. {TOO_LATE}")
        assert bots.transfers == []


async def test_user_is_asked_one_question_at_a_time(bots: Bots) -> None:
    async with bots.running():
        await bots.order()
        await bots.asked()
        await bots.order("/transfer 9000 mallory")
        await bots.read("Another transfer waits for you.")
        assert len(bots.sandbox.operations) == 1


async def test_a_malformed_order_starts_no_operation(bots: Bots) -> None:
    commands = [
        *("/transfer", "/transfer alice 40", "/transfer 0.00 alice", "/transfer -40 alice"),
        *("/transfer 40 alice\nand more", "/transfer 40 <b>alice</i> & [bob](tg://user?id=1)"),
        *(f"/transfer 40 {payee}" for payee in UNSHOWN),
    ]
    async with bots.running():
        for command in commands:
            await bots.order(command)
        await bots.telegram.say(STRANGER, "/transfer 40 alice")
        await until(lambda: len(bots.telegram.messages) > len(commands))
    answers = sorted((message.chat, message.text) for message in bots.telegram.messages)
    assert answers == [(ALICE, example.USAGE)] * len(commands) + [(STRANGER, "This bot does not know you.")]
    assert not bots.sandbox.operations


async def test_group_is_no_place_for_an_order(bots: Bots) -> None:
    async with bots.running():
        await bots.telegram.say(ALICE, "/transfer 40 alice", group=True)
        await bots.order("/transfer")
        await bots.read(example.USAGE)
    assert len(bots.telegram.messages) == 1
    assert not bots.sandbox.operations


async def test_users_text_is_shown_as_text(bots: Bots) -> None:
    payee = "Alice O'Hara-Smith Jr."
    async with bots.running(edit_every=0.05):
        await bots.order(f"/transfer 40 {payee}")
        await bots.read("Waiting for your approval: ")
        await bots.approve()
        message = await bots.read("Approved and transferred.")
    assert {text.splitlines()[0] for text in message.texts} == {f"Transfer 40 to {payee}"}


async def test_telegram_failing_at_progress_does_not_end_the_wait(bots: Bots) -> None:
    failures = [
        refusal(ApiError(429, "Too Many Requests: retry after 1", retry_after=1)),
        web.Response(status=502, text="<html>Bad gateway</html>", content_type="text/html"),
        refusal(ApiError(403, "Forbidden: bot was blocked by the user")),
    ]
    bots.telegram.broken = lambda method: failures.pop() if method == "editMessageText" and failures else None
    async with bots.running(edit_every=0.05):
        await bots.order()
        await until(lambda: not failures)
        await bots.approve()
        await bots.read("Approved and transferred.")
        assert len(bots.transfers) == 1


async def test_a_bug_in_progress_does_not_end_the_wait(bots: Bots, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def fail(update: object) -> None:
        tried.append(update)
        raise ValueError

    monkeypatch.setattr(example, "news", fail)
    async with bots.running():
        await bots.order()
        await until(lambda: len(tried) > 1)
        await bots.approve()
        await bots.read("Approved and transferred.")


async def test_the_end_is_reported_also_where_the_message_was_deleted(bots: Bots) -> None:
    async with bots.running():
        await bots.order()
        await bots.asked()  # the message comes before the question
        [message] = bots.telegram.messages
        message.deleted = True
        await bots.approve()
        assert (await bots.read("Approved and transferred.")) is not message


async def test_stopping_ends_every_wait_notifies_the_chats_and_leaves_nothing(bots: Bots) -> None:
    before = asyncio.all_tasks()
    async with bots.running():
        for chat in USERS:
            await bots.telegram.say(chat, "/transfer 40 alice")
        await until(lambda: bots.client.statistics.waiting == len(USERS))
    assert [message.text.splitlines()[1] for message in bots.telegram.messages] == [
        f"The bot was stopped. {TOO_LATE}"
    ] * 2
    assert bots.transfers == []
    await until(lambda: not tasks_since(before))


async def test_stopping_does_not_wait_for_a_telegram_that_hangs(bots: Bots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "GRACE", 0.2)
    async with bots.running(edit_every=60):
        await bots.order()
        await until(lambda: bots.client.statistics.waiting == 1)
        flood = ApiError(429, "Too Many Requests: retry after 600", retry_after=600)
        bots.telegram.broken = lambda method: refusal(flood) if method == "editMessageText" else None
        began = time.monotonic()
    assert time.monotonic() - began < 60  # Telegram asked for 600


async def test_program_reads_the_environment_and_ends_at_sigterm(bots: Bots, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in bots.settings.items():
        monkeypatch.setenv(name, value)
    program = asyncio.create_task(example.main())
    await bots.order()
    await bots.asked()
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(program, PATIENCE)
    await bots.read("The bot was stopped.")


async def test_message_is_edited_seldom_however_often_keyless_is_asked(bots: Bots) -> None:
    async with bots.running(edit_every=0.3):
        began = time.monotonic()
        await bots.order()
        await until(lambda: bots.client.statistics.polls > 30 and "editMessageText" in bots.telegram.calls)
        edits = bots.telegram.calls.count("editMessageText")
        assert edits <= (time.monotonic() - began) / 0.3 + 1


async def test_many_chats_wait_at_once_and_edits_are_few(bots: Bots) -> None:
    users = {chat: f"{chat:06X}" for chat in range(1, 201)}
    async with bots.running(users=users, lifetime=600, edit_every=0.5):
        began = time.monotonic()
        for chat in users:
            await bots.telegram.say(chat, f"/transfer {chat} alice")
        await until(lambda: bots.client.statistics.waiting == len(users))
        await until(lambda: "editMessageText" in bots.telegram.calls)  # the message of any of them
        edits = bots.telegram.calls.count("editMessageText")
        assert edits <= (time.monotonic() - began) / example.EDITS_APART + 1
        for operation_id in bots.sandbox.operations:
            bots.sandbox.approve(operation_id)
        await bots.telegram.read_all(list(users), "Approved and transferred.")
    assert sorted(bots.transfers) == sorted((users[chat], f"{chat}", "alice") for chat in users)


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
