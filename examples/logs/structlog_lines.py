"""The library's log lines through structlog, as JSON beside those of the application."""

import asyncio
import logging
import sys

import structlog

from aiokeyless import KeylessClient

SHARED: list[structlog.types.Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso"),
]


def configure_logging() -> None:
    """Send the lines of all libraries, and the application's own, through one formatter."""
    structlog.configure(
        processors=[*SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=SHARED,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])


async def main(operation_ids: list[str]) -> None:
    """Wait for some operations."""
    log = structlog.get_logger("shop")
    async with KeylessClient() as client:
        async for outcome in client.wait_for_approvals(operation_ids):
            log.info("wait ended", operation_id=outcome.operation_id, approved=outcome.operation is not None)


if __name__ == "__main__":
    configure_logging()
    asyncio.run(main(sys.argv[1:]))
