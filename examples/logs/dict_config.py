"""The library's log lines with `logging.config`: five waits, and an outage of Keyless is two lines."""

import asyncio
import logging.config
import sys

from aiokeyless import KeylessClient

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {"aiokeyless": {"level": "INFO", "handlers": ["stderr"], "propagate": False}},
}


async def main(operation_ids: list[str]) -> None:
    """Wait for some operations."""
    async with KeylessClient() as client:
        async for outcome in client.wait_for_approvals(operation_ids):
            print(outcome.operation_id, "not approved" if outcome.operation is None else "approved")


if __name__ == "__main__":
    logging.config.dictConfig(LOGGING)
    asyncio.run(main(sys.argv[1:]))
