"""A long poll on aiohttp.web: `python aiohttp_app.py`."""

import os

from aiohttp import web

from aiokeyless import ApprovalTimeoutError, ClientClosedError, KeylessClient

client = KeylessClient()
routes = web.RouteTableDef()


@routes.get("/approvals/{operation_id}")
async def approval(request: web.Request) -> web.Response:
    """Answer once the operation is approved, or that it is pending: the caller then asks again."""
    try:
        await client.wait_for_approval(request.match_info["operation_id"], timeout=25)
    except (ApprovalTimeoutError, ClientClosedError):
        return web.json_response({"state": "pending"})
    return web.json_response({"state": "approved"})


async def close_client(_app: web.Application) -> None:
    """Close the client before aiohttp waits for the requests; on_cleanup and cleanup_ctx come after that."""
    await client.aclose()


app = web.Application()
app.add_routes(routes)
app.on_shutdown.append(close_client)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
