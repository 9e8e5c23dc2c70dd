"""A small Bot API server on loopback: as much of Telegram as a bot needs that answers texts and edits its answers.

The bot is tried with it (`chat.py`) and tested with it, without a token and without Telegram.

It refuses what Telegram refuses (a wrong token, markup that does not parse, an edit that changes nothing), and shows a
message as a person sees it.

Source: https://core.telegram.org/bots/api
"""

from __future__ import annotations

import asyncio
import time
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, Self

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

TOKEN = "42:loopback"  # noqa: S105  # of no real bot
_TAGS = frozenset({"b", "i", "u", "s", "code", "pre", "a"})
_PATIENCE = 60.0  # seconds, against hangs only


class ApiError(Exception):
    """What the server answers in place of a result: Telegram's error code, its description and its parameters."""

    def __init__(self, code: int, description: str, **parameters: object) -> None:
        super().__init__(description)
        self.code = code
        self.parameters = parameters


class Message:
    """A message of the bot: what it says, and what it said before."""

    def __init__(self, number: int, chat: int, text: str) -> None:
        self.number = number
        self.chat = chat
        self.texts = [text]
        self.deleted = False

    @property
    def text(self) -> str:
        """What it says now."""
        return self.texts[-1]


class BotApiServer:
    """Serves one bot; `say` is a person who writes to it, `message` is what that person reads."""

    def __init__(self) -> None:
        self.url = ""
        self.messages: list[Message] = []
        self.calls: list[str] = []
        self.broken: Callable[[str], web.Response | None] = lambda _method: None  # an answer in place of the usual one
        self.shown: Callable[[Message], None] = lambda _message: None  # told of each message and of each edit
        self._updates: list[dict[str, Any]] = []
        self._last_update = 0
        self._last_message = 0
        self._change = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        """Listen on a free port; `url` is then the server's address."""
        application = web.Application()
        application.router.add_post("/bot{token}/{method}", self._serve)
        self._runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    # -- what users do

    async def say(self, chat: int, text: str, *, group: bool = False) -> dict[str, Any]:
        """Write to the bot, in a private chat or in a group; return the update, for `deliver`."""
        self._last_message += 1
        person = {"id": chat, "is_bot": False, "first_name": f"Person {chat}"}
        return await self.deliver(
            {
                "message_id": self._last_message,
                "date": int(time.time()),
                "chat": {"id": -chat, "type": "group", "title": "Group"} if group else {"id": chat, "type": "private"},
                "from": person,
                "text": text,
                "entities": [{"type": "bot_command", "offset": 0, "length": len(text.split(maxsplit=1)[0])}],
            }
        )

    async def deliver(self, message: dict[str, Any]) -> dict[str, Any]:
        """Hand a message to the bot, as Telegram also does with one whose delivery was not confirmed."""
        async with self._change:
            self._last_update += 1
            self._updates.append({"update_id": self._last_update, "message": message})
            self._change.notify_all()
        return message

    async def read(self, chat: int, words: str) -> Message:
        """Wait until the last message in a chat has these words, and return it."""
        return (await self.read_all([chat], words))[0]

    async def read_all(self, chats: list[int], words: str) -> list[Message]:
        """Wait until the last message in each chat has these words, and return them."""

        def last() -> list[Message]:
            shown = {message.chat: message for message in self.messages}
            return [shown[chat] for chat in chats if chat in shown and words in shown[chat].text]

        try:
            async with asyncio.timeout(_PATIENCE), self._change:
                await self._change.wait_for(lambda: len(last()) == len(chats))
        except TimeoutError:
            raise AssertionError(f"no {words!r} in {[message.texts for message in self.messages]}") from None
        return last()

    # -- the methods of the API

    async def _serve(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        self.calls.append(method)
        if (answer := self.broken(method)) is not None:
            return answer
        try:
            result = await self._call(method, request.match_info["token"], await request.post())
        except ApiError as error:
            return refusal(error)
        return web.json_response({"ok": True, "result": result})

    async def _call(self, method: str, token: str, form: Mapping[str, object]) -> object:
        if token != TOKEN:
            raise ApiError(401, "Unauthorized")
        arguments = {name: str(value) for name, value in form.items()}
        match method:
            case "getMe":
                return {"id": 42, "is_bot": True, "first_name": "Bot", "username": "guarded_bot"}
            case "getUpdates":
                return await self._get_updates(int(arguments.get("offset", 0)), float(arguments["timeout"]))
            case "sendMessage":
                return await self._send(int(arguments["chat_id"]), arguments)
            case "editMessageText":
                return await self._edit(int(arguments["message_id"]), arguments)
        raise ApiError(404, "Not Found")

    async def _get_updates(self, offset: int, seconds: float) -> list[dict[str, Any]]:
        async with self._change:
            self._updates = [update for update in self._updates if update["update_id"] >= offset]
            try:
                async with asyncio.timeout(seconds):
                    await self._change.wait_for(lambda: self._updates)
            except TimeoutError:
                return []
            return list(self._updates)

    async def _send(self, chat: int, arguments: dict[str, str]) -> dict[str, Any]:
        self._last_message += 1
        message = Message(self._last_message, chat, rendered(arguments))
        self.messages.append(message)
        return await self._changed(message)

    async def _edit(self, number: int, arguments: dict[str, str]) -> dict[str, Any]:
        found = [message for message in self.messages if message.number == number and not message.deleted]
        if not found:
            raise ApiError(400, "Bad Request: message to edit not found")
        text = rendered(arguments)
        if text == found[0].text:
            raise ApiError(400, "Bad Request: message is not modified")
        found[0].texts.append(text)
        return await self._changed(found[0])

    async def _changed(self, message: Message) -> dict[str, Any]:
        self.shown(message)
        async with self._change:
            self._change.notify_all()
        chat = {"id": message.chat, "type": "private"}
        return {"message_id": message.number, "date": int(time.time()), "chat": chat, "text": message.text}


def refusal(error: ApiError) -> web.Response:
    """Return the answer that Telegram gives with an error."""
    body = {"ok": False, "error_code": error.code, "description": str(error), "parameters": error.parameters}
    return web.json_response(body, status=error.code)


def rendered(arguments: dict[str, str]) -> str:
    """Return a text as it is shown."""
    if arguments.get("parse_mode") != "HTML":
        return arguments["text"]
    reader = _Reader()
    reader.feed(arguments["text"])
    reader.close()
    if reader.open:
        raise ApiError(400, f"Bad Request: can't parse entities: <{reader.open[-1]}> is not closed")
    return reader.text


class _Reader(HTMLParser):
    """Reads the markup that Telegram knows, and refuses any other."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002  # the name that pyright wants
        if tag not in _TAGS:
            raise ApiError(400, f'Bad Request: can\'t parse entities: Unsupported start tag "{tag}"')
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise ApiError(400, f'Bad Request: can\'t parse entities: unexpected end tag "{tag}"')

    def handle_data(self, data: str) -> None:
        self.text += data
