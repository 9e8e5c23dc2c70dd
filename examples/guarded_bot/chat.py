"""Chat with the guarded bot in a terminal: no token, no phone, no network.

It runs `bot.py` as it is, beside a sandbox in place of Keyless and a small Bot API server in place of Telegram.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

from bot_api import TOKEN, BotApiServer, Message

from aiokeyless.sandbox import Sandbox

CHAT, USER = 1001, "C0FFEE"  # of the person at the terminal, in Telegram and in Keyless


async def main(auto_approve: float | None) -> None:
    """Let the person at the terminal and the bot talk, until the input ends."""
    async with Sandbox(auto_approve=auto_approve) as sandbox, BotApiServer() as telegram:
        telegram.shown = show
        async with program(sandbox, telegram) as bot:
            print(f"Send /transfer 40 alice, and approve it on the phone: {sandbox.url} (Ctrl-C ends)", flush=True)
            lines = asyncio.create_task(say(telegram))
            ended = asyncio.create_task(bot.wait())
            await asyncio.wait({lines, ended}, return_when=asyncio.FIRST_COMPLETED)
            lines.cancel()
            if ended.done():
                raise SystemExit(f"the bot ended with status {bot.returncode}")


def show(message: Message) -> None:
    """Print what the bot says now; an edit is a line of its own."""
    print("bot:", " | ".join(message.text.splitlines()), flush=True)


@contextlib.asynccontextmanager
async def program(sandbox: Sandbox, telegram: BotApiServer) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run the bot in a process of its own; its log is printed only if it ends by itself."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        settings = {
            "BOT_API_URL": telegram.url,
            "BOT_DB": str(Path(folder, "guarded_bot.sqlite3")),
            "BOT_TOKEN": TOKEN,
            "KEYLESS_API_KEY": sandbox.api_key,
            "KEYLESS_BASE_URL": sandbox.url,
            "KEYLESS_USERS": json.dumps({CHAT: USER}),
        }
        bot = await asyncio.create_subprocess_exec(
            sys.executable, str(Path(__file__).with_name("bot.py")), env=os.environ | settings, stderr=log
        )
        try:
            yield bot
        finally:
            if bot.returncode is None:
                bot.terminate()
                await bot.wait()
            else:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace"))


async def say(telegram: BotApiServer) -> None:
    """Send each line of the input to the bot."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str]()

    def read() -> None:
        line = "\n"
        while line:  # an empty one is the end
            line = sys.stdin.readline()
            with contextlib.suppress(RuntimeError):  # the loop is closed: the program ends
                loop.call_soon_threadsafe(lines.put_nowait, line)

    threading.Thread(target=read, daemon=True).start()  # a read of the terminal cannot be cancelled
    while line := await lines.get():
        if line.strip():
            await telegram.say(CHAT, line.strip())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--auto-approve", type=float, metavar="SECONDS", help="let a simulated user approve")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args().auto_approve))
