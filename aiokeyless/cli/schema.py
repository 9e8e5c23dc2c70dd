"""``aiokeyless schema``: the JSON Schema of the worker's messages, for applications in other languages."""

from __future__ import annotations

import json
import sys
from typing import Literal

from .app import app


@app.command(
    help_epilogue="""\
Example:
  aiokeyless schema request > approval-request.schema.json"""
)
def schema(message: Literal["request", "event"], /) -> None:
    """Print the JSON Schema of a message between applications and the worker.

    A worker checks more than a schema can express. It answers a request that it
    refuses with an event that gives the reason.

    Args:
        message: The request for an approval, or the event that says how it ended.
    """
    from aiokeyless.worker import ApprovalEvent, ApprovalRequest  # noqa: PLC0415  # only when used
    from aiokeyless.worker.schema import message_schema  # noqa: PLC0415  # as above

    kind = ApprovalRequest if message == "request" else ApprovalEvent
    sys.stdout.write(f"{json.dumps(message_schema(kind), indent=2)}\n")
