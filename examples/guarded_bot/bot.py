"""A Telegram bot that moves money only after its owner has approved on the phone: `/transfer 40 alice`.

Each chat waits in its own handler, all of them on one client. On any error nothing is transferred, and the chat is
told so; also that a later approval changes nothing, since an operation of Keyless cannot be cancelled.
"""

import asyncio
import json
import logging
import os
import re
import sqlite3
from contextlib import closing

from aiogram import Bot, Dispatcher, F, html
from aiogram.client.default import DefaultBotProperties
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import AiogramError, TelegramBadRequest, TelegramRetryAfter
from aiogram.filters import Command, CommandObject
from aiogram.types import Message

import aiokeyless

# The payee as it may stand in a text on a phone: no line break, no letter that is invisible or looks like another one.
ORDER = re.compile(r"(?=.*[1-9])([0-9]{1,6}(?:\.[0-9]{2})?) +([A-Za-z][A-Za-z .'-]{0,39})")
USAGE = "Send /transfer 40 alice, and approve it on your phone."
TOO_LATE = "Nothing was transferred. If you approve it later, nothing is transferred either."
SETTLED = {
    "paid": "This command was carried out before, and is not carried out again.",
    "closed": "This command was closed before, and nothing was transferred. Send a new one.",
}
EDITS_APART = 0.05  # seconds, for all chats together: Telegram allows a bot about 30 messages a second
GRACE = 5.0  # seconds in which the chats are told that the bot stops

_LOGGER = logging.getLogger(__name__)


class Record:
    """The state of each command, on disk: a row that changes once, from asked to paid or to closed.

    The id of an operation makes asking idempotent, and is not a lock on what follows from the approval: money moves
    only when the row changes to paid.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database  # in autocommit
        database.execute(
            "CREATE TABLE IF NOT EXISTS commands (id TEXT PRIMARY KEY, user TEXT, payload TEXT, state TEXT)"
        )

    def ask(self, operation_id: str, user: str, payload: str) -> str:
        """Store a command before its approval is requested, unless it is stored already; return its state."""
        row = (operation_id, user, payload)
        self._database.execute("INSERT OR IGNORE INTO commands VALUES (?, ?, ?, 'asked')", row)
        return self.state(operation_id)

    def state(self, operation_id: str) -> str:
        """Return the state of a stored command: asked, paid or closed."""
        query = "SELECT state FROM commands WHERE id = ?"
        return str(self._database.execute(query, (operation_id,)).fetchone()[0])

    def settle(self, operation_id: str, state: str) -> bool:
        """Change a command from asked to paid or to closed; return whether this call changed it."""
        query = "UPDATE commands SET state = ? WHERE id = ? AND state = 'asked'"
        return self._database.execute(query, (state, operation_id)).rowcount == 1


class Teller:
    """Handles orders from Telegram users, which `users` maps to Keyless users; shows progress every few seconds."""

    def __init__(
        self,
        client: aiokeyless.KeylessClient,
        users: dict[int, str],
        record: Record,
        *,
        lifetime: float = 120,
        edit_every: float = 5,
    ) -> None:
        self.transfers: list[tuple[str, str, str]] = []  # what a bank would do: user, amount, payee
        self._client = client
        self._record = record
        self._users = users
        self._lifetime = lifetime
        self._edit_every = edit_every
        self._next_edit = 0.0
        self._asked: dict[str, asyncio.Task[object]] = {}  # by Keyless user: one request at a time

    def dispatcher(self) -> Dispatcher:
        """Return the dispatcher for aiogram. It handles private chats only, since transfers are private."""
        dispatcher = Dispatcher()
        dispatcher.message.register(self.transfer, Command("transfer"), F.chat.type == "private")
        dispatcher.shutdown.register(self.stop)
        return dispatcher

    async def transfer(self, message: Message, command: CommandObject, bot: Bot) -> None:
        """Handle `/transfer AMOUNT PAYEE`, from the order to its end."""
        user = self._users.get(message.from_user.id) if message.from_user else None
        order = ORDER.fullmatch(command.args or "")
        task = asyncio.current_task()
        if user is None or task is None:
            await message.answer("This bot does not know you.")
        elif order is None:
            await message.answer(USAGE)
        elif user in self._asked:
            await message.answer("Another transfer waits for you. Approve it, or let its time run out.")
        else:
            self._asked[user] = task
            try:
                # Unique to this command: if Telegram delivers it again, it is the same operation.
                operation_id = f"transfer-{bot.id}-{message.chat.id}-{message.message_id}"
                await self._settle(message, operation_id, user, order[1], order[2])
            finally:
                del self._asked[user]

    async def _settle(self, message: Message, operation_id: str, user: str, amount: str, payee: str) -> None:
        payload = f"Transfer {amount} to {payee}"
        title = f"<b>{html.quote(payload)}</b>"
        if (state := self._record.ask(operation_id, user, payload)) != "asked":
            await message.answer(f"{title}\n{SETTLED[state]}")
            return
        shown = await message.answer(f"{title}\nApprove it on your phone.")
        clock = asyncio.get_running_loop().time
        next_edit = clock() + self._edit_every

        async def progress(update: aiokeyless.ApprovalUpdate) -> None:
            nonlocal next_edit
            if update.next_poll_in is None or clock() < max(next_edit, self._next_edit):
                return
            next_edit, self._next_edit = clock() + self._edit_every, clock() + EDITS_APART
            try:
                await shown.edit_text(f"{title}\n{news(update)}: {ticket.remaining():.0f} s left.")
            except TelegramRetryAfter as error:
                self._next_edit = clock() + error.retry_after
            except Exception:  # a message that was deleted, a gateway's page: it is only progress
                _LOGGER.info("progress was not shown", exc_info=True)

        try:
            ticket = await self._ask(operation_id, user, payload)
            await self._client.wait_for_approval(ticket, on_poll=progress, explain=True)
            state, end = "paid", "Approved and transferred."
        except aiokeyless.KeylessError as error:
            _LOGGER.warning("%s: %s", operation_id, error)
            state, end = "closed", f"{explain(error)} {TOO_LATE}"
        if not self._record.settle(operation_id, state):  # another delivery, in another process, was first
            end = SETTLED[self._record.state(operation_id)]
        elif state == "paid":
            self.transfers.append((user, amount, payee))
        await self._say(shown, f"{title}\n{end}")

    async def _ask(self, operation_id: str, user: str, payload: str) -> aiokeyless.ApprovalTicket:
        """Create the operation, or resume it if an earlier delivery of the command created it."""
        try:
            return await self._client.create_operation(
                user,
                operation_id=operation_id,
                operation_payload=payload,
                expires_in=self._lifetime,
                if_exists="resume",
                require_auth_type="biom",
            )
        except aiokeyless.AlreadyApprovedError as error:
            return error.ticket  # by the record it was asked, and neither paid nor closed

    async def _say(self, shown: Message, text: str) -> None:
        for _ in range(3):
            try:
                await shown.edit_text(text)
            except TelegramBadRequest:  # the message was deleted
                await shown.answer(text)
            except AiogramError as error:
                await asyncio.sleep(getattr(error, "retry_after", 1.0))
                continue
            return

    async def stop(self) -> None:
        """End all waits and update their messages, as far as Telegram accepts that in time."""
        await self._client.aclose()
        if tasks := set(self._asked.values()):
            _, late = await asyncio.wait(tasks, timeout=GRACE)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def news(update: aiokeyless.ApprovalUpdate) -> str:
    """Return what the chat is told of a wait that goes on: whose turn it is, Keyless's or the user's."""
    if update.error is not None:
        return "Keyless does not answer, still trying"
    reasons = [attempt.reason for attempt in update.attempts if attempt.failed and attempt.reason]
    return f"Your phone tells us that {reasons[-1]}; please try again" if reasons else "Waiting for your approval"


def explain(error: aiokeyless.KeylessError) -> str:
    """Return the text for the chat about a transfer that was not made: it says what is wrong, and blames nobody."""
    match error:
        case aiokeyless.ApprovalUnknownError():
            return "Keyless is not reachable: your approval could not be checked."
        case aiokeyless.ApprovalTimeoutError():
            return "Not approved in time."
        case aiokeyless.ApprovalError() | aiokeyless.ConflictError():
            return "What Keyless holds for this command is not this transfer."
        case aiokeyless.ClientClosedError():
            return "The bot was stopped."
        case (
            aiokeyless.TransportError()
            | aiokeyless.DecodeError()
            | aiokeyless.ServerError()
            | aiokeyless.StatusError(status=408 | 425 | 429)
        ):
            return "Keyless is not reachable."
    return "Keyless refuses this bot."  # its key, its configuration: for who runs it, and logged


async def main() -> None:
    """Run until SIGINT or SIGTERM."""
    logging.basicConfig(level=logging.INFO)
    users = {int(telegram): keyless for telegram, keyless in json.loads(os.environ["KEYLESS_USERS"]).items()}
    api = TelegramAPIServer.from_base(os.environ.get("BOT_API_URL", "https://api.telegram.org"))
    session = AiohttpSession(api=api, timeout=10)
    with closing(sqlite3.connect(os.environ.get("BOT_DB", "guarded_bot.sqlite3"), isolation_level=None)) as database:
        async with aiokeyless.KeylessClient() as client:
            bot = Bot(os.environ["BOT_TOKEN"], session=session, default=DefaultBotProperties(parse_mode="HTML"))
            await Teller(client, users, Record(database)).dispatcher().start_polling(bot)


if __name__ == "__main__":
    asyncio.run(main())
