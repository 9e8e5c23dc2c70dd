"""MCP's extension for tasks: the model calls a tool once, and its host polls the task until the phone has decided.

A host without the extension gets the tool itself.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

from gate import Answer, Gate, Transfer
from mcp.server import ServerRequestContext
from mcp.server.context import CallNext, HandlerResult
from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver import require_client_extension
from mcp.shared.exceptions import MCPError
from mcp.types import INVALID_PARAMS, CallToolRequestParams, CancelTaskRequestParams, GetTaskRequestParams
from pydantic import ValidationError

IDENTIFIER = "io.modelcontextprotocol/tasks"

Context: TypeAlias = ServerRequestContext[Gate]
#: Goes on with a request for so many seconds, and acts once it is approved; returns also what the model is to know.
Proceed: TypeAlias = Callable[[Gate, Transfer, str | None, float], Awaitable[tuple[Answer, str]]]


class PhoneTasks(Extension):
    """Makes each call of one tool a task, whose id is the request's.

    Args:
        tool: The tool's name.
        proceed: What the tool does.
    """

    identifier = IDENTIFIER

    def __init__(self, tool: str, proceed: Proceed) -> None:
        self._tool = tool
        self._proceed = proceed

    def methods(self) -> Sequence[MethodBinding]:
        """Return what a host may call."""
        return [
            MethodBinding("tasks/get", GetTaskRequestParams, self._get),
            MethodBinding("tasks/cancel", CancelTaskRequestParams, self._cancel),
        ]

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: Context, call_next: CallNext
    ) -> HandlerResult:
        """Answer a call with a task, once the request is stored."""
        capabilities = ctx.session.client_capabilities
        if params.name != self._tool or not capabilities or IDENTIFIER not in (capabilities.extensions or {}):
            return await call_next(ctx)
        try:
            transfer = Transfer.model_validate(params.arguments)
        except ValidationError:
            return await call_next(ctx)  # which says what is wrong with the arguments
        answer, _ = await self._proceed(ctx.lifespan_context, transfer, None, 0.1)
        return {"resultType": "task"} | self._find(ctx, answer.request)[1]

    async def _get(self, ctx: Context, params: GetTaskRequestParams) -> HandlerResult:
        transfer, task = self._find(ctx, params.task_id)
        answer, text = await self._proceed(ctx.lifespan_context, transfer, params.task_id, 5)
        if answer.state in {"pending", "unreachable"}:
            return task
        return task | {"status": "completed", "result": {"content": [{"type": "text", "text": text}]}}

    async def _cancel(self, ctx: Context, params: CancelTaskRequestParams) -> HandlerResult:
        self._find(ctx, params.task_id)
        ctx.lifespan_context.cancel(params.task_id)
        return {}

    def _find(self, ctx: Context, request: str) -> tuple[Transfer, dict[str, Any]]:
        """Return what a task is for, and the task as a host gets it while it goes on."""
        require_client_extension(ctx, IDENTIFIER)
        if (found := ctx.lifespan_context.find(request)) is None:
            raise MCPError(INVALID_PARAMS, "Failed to retrieve task: Task not found")
        transfer, ticket = found
        return transfer, {
            "taskId": request,
            "status": "working",
            "statusMessage": "Ask the user to look at the phone.",
            "createdAt": ticket.created_at.isoformat(),
            "lastUpdatedAt": datetime.now(UTC).isoformat(),
            "ttlMs": int((ticket.expires_at - ticket.created_at).total_seconds() * 1000),
            "pollIntervalMs": 1000,
        }
