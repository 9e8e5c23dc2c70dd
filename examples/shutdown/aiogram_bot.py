"""A Telegram bot whose handlers wait: `python aiogram_bot.py`."""

import asyncio
import os

from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.types import Message

from aiokeyless import ApprovalError, ApprovalUnknownError, ClientClosedError, KeylessClient

client = KeylessClient()
dispatcher = Dispatcher()
handlers: set[asyncio.Task[object] | None] = set()


@dispatcher.message()
async def pay(message: Message) -> None:
    """Wait for an approval; aiogram runs this in a task of its own."""
    task = asyncio.current_task()
    handlers.add(task)
    try:
        await client.request_approval("C0FFEE", operation_payload=message.text, require_auth_type="biom")
        await message.answer("Approved.")
    except ApprovalUnknownError:  # a real bot stores the ticket, and looks again
        await message.answer("Perhaps approved: nothing is paid until we know.")
    except ApprovalError:  # time is up, a PIN, or an answer about something else
        await message.answer("Not approved: nothing is paid.")
    except ClientClosedError:
        await message.answer("The bot was stopped: nothing is paid.")
    finally:
        handlers.discard(task)


@dispatcher.shutdown()
async def stop() -> None:
    """Close the client, and let the handlers answer: the bot's session is open until this returns."""
    await client.aclose()
    if tasks := [task for task in handlers if task is not None]:
        await asyncio.wait(tasks, timeout=5)


async def main() -> None:
    """Run the bot until it is stopped."""
    server = TelegramAPIServer.from_base(os.environ.get("BOT_API_URL", "https://api.telegram.org"))
    await dispatcher.start_polling(Bot(os.environ["BOT_TOKEN"], session=AiohttpSession(api=server)))


if __name__ == "__main__":
    asyncio.run(main())
