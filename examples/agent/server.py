"""An MCP server with a tool that moves money, behind a person's face: on stdio, or with ``--http`` on a port."""

import os
import sqlite3
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing

from gate import Amount, Answer, Gate, Name, Transfer
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from phone_tasks import PhoneTasks

from aiokeyless import KeylessClient

TEXTS = {
    "approved": "{payload}: done.",
    "spent": "{payload}: done before.",
    "pending": "Not decided yet: the user has not approved on their phone. Call again with this request: {request}",
    "timed_out": "Nothing was transferred: the user did not approve in time. Ask the user before you try again.",
    "refused": "Nothing was transferred, and nothing will be for this request.",
    "unreachable": "Nothing was transferred: Keyless is not reachable. Call again later with this request: {request}",
}


async def proceed(gate: Gate, wanted: Transfer, request: str | None, seconds: float) -> tuple[Answer, str]:
    """Go on with a transfer for so many seconds, and make it once it is approved; return also a text for the model."""
    answer = await gate.hold(wanted, request=request, seconds=seconds)
    if answer.state == "approved":
        if gate.spend(wanted, answer.request):
            print(f"{wanted.payload}: done", file=sys.stderr)  # a bank's place; the request is its idempotency key
        else:
            answer = await gate.hold(wanted, request=answer.request, seconds=seconds)
    return answer, TEXTS[answer.state].format(payload=wanted.payload, request=answer.request)


def make_server(client: KeylessClient | None = None, path: str = "agent.sqlite3", user_id: str = "C0FFEE") -> MCPServer:
    """Return the server.

    Args:
        client: The client to use. Default: one of the server's own, set up by the environment.
        path: The file of the record.
        user_id: The user that this server asks.
    """

    @asynccontextmanager
    async def lifespan(_server: MCPServer[Gate]) -> AsyncGenerator[Gate]:
        """Open the record and the client."""
        with closing(sqlite3.connect(path, isolation_level=None)) as record:
            if client is not None:
                yield Gate(client, record, user_id)
                return
            async with KeylessClient() as own:
                yield Gate(own, record, user_id)

    server = MCPServer("bank", lifespan=lifespan, extensions=[PhoneTasks("transfer", proceed)])

    @server.tool(structured_output=False)
    async def transfer(amount: Amount, recipient: Name, context: Context[Gate], request: str | None = None) -> str:
        """Transfer euros to a recipient, once the user has approved on their phone by face recognition.

        Args:
            amount: Euros, at most 1000.
            recipient: Name of the recipient.
            request: What an earlier call with the same arguments answered, to go on waiting for it.
            context: The request's context; the SDK passes it.
        """
        gate = context.request_context.lifespan_context
        _, text = await proceed(gate, Transfer(amount=amount, recipient=recipient), request, 50)
        return text

    return server


if __name__ == "__main__":
    bank = make_server(None, os.environ.get("AGENT_DB", "agent.sqlite3"), os.environ.get("AGENT_USER", "C0FFEE"))
    if "--http" in sys.argv:
        bank.run("streamable-http", port=int(os.environ.get("AGENT_PORT", "8000")))
    else:
        bank.run("stdio")
