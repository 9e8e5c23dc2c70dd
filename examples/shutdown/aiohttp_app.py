"""A long poll on aiohttp.web: `python aiohttp_app.py`."""

import os

from aiohttp import web
from approvals import USER, ask, state

from aiokeyless import KeylessClient

routes = web.RouteTableDef()
CLIENT = web.AppKey("client", KeylessClient)


@routes.post("/approvals/{order}")
async def create(request: web.Request) -> web.Response:
    """Ask the user."""
    answer, status = await ask(request.app[CLIENT], USER, request.match_info["order"])
    return web.json_response(answer, status=status)


@routes.get("/approvals/{order}")
async def approval(request: web.Request) -> web.Response:
    """Answer a long poll."""
    answer, status = await state(request.app[CLIENT], USER, request.match_info["order"])
    return web.json_response(answer, status=status)


async def make_client(app: web.Application) -> None:
    """Make the client."""
    app[CLIENT] = KeylessClient()


async def close_client(app: web.Application) -> None:
    """Close the client before aiohttp waits for the requests; on_cleanup and cleanup_ctx come after that."""
    await app[CLIENT].aclose()


app = web.Application()
app.add_routes(routes)
app.on_startup.append(make_client)
app.on_shutdown.append(close_client)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
