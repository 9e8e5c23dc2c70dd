"""``aiokeyless sandbox``: runs a Keyless service until Ctrl-C or SIGTERM. drive.py has the commands that drive it."""

from __future__ import annotations

import asyncio
import errno
import shlex
from datetime import datetime
from typing import TYPE_CHECKING, Final

from cyclopts import App

from .app import CommandError, JsonFlag, OptionalDelay, Port, app, stop_on_signals
from .render import new_console, print_command, print_fact, print_json, print_line, print_title

if TYPE_CHECKING:
    from rich.console import Console

    from aiokeyless.sandbox import RequestRecord, Sandbox

#: "FACE" on the keypad of a phone.
DEFAULT_PORT: Final = 3223
DEFAULT_KEY: Final = "sandbox-key"
_LOOPBACK: Final = "127.0.0.1"


sandbox: App = App(
    name="sandbox",
    help="""\
Run a local Keyless service, with a phone in your browser; or drive it.

Without a command, it runs a service until Ctrl-C or SIGTERM. That follows the
documentation, keeps everything in memory, and prints each request. The commands
drive the service at KEYLESS_BASE_URL, or else on the default port.""",
    help_epilogue="""\
Example, with two terminals:
  aiokeyless sandbox
and, in the other one, the export line that it prints, then
  aiokeyless create C0FFEE --operation-id order-7 --payload "Pay 40 to Alice"
  aiokeyless sandbox approve order-7
  aiokeyless wait order-7

Example, as a service for tests:
  aiokeyless sandbox --port 8080 --api-key test-key --auto-approve 2""",
)
app.command(sandbox)


@sandbox.default
async def serve(
    *,
    port: Port = DEFAULT_PORT,
    api_key: str = DEFAULT_KEY,
    auto_approve: OptionalDelay = None,
    host: str = _LOOPBACK,
    as_json: JsonFlag = False,
) -> None:
    """Run a local Keyless service.

    Args:
        port: Port to listen on; 0 chooses a free one.
        api_key: Key that requests must carry.
        auto_approve: Seconds after which a simulated user approves each operation; if left out, only you approve.
        host: Address to listen on. Anyone who can reach it can approve.
        as_json: Print one JSON object once the service runs, and nothing else.
    """
    from aiokeyless.sandbox import Sandbox  # noqa: PLC0415  # a server: only the commands that serve should load it

    # None ends it.
    requests: asyncio.Queue[RequestRecord | None] = asyncio.Queue()
    on_request = None if as_json else requests.put_nowait
    service = Sandbox(port, api_key, auto_approve, host, on_request)
    try:
        await service.start()
    except OSError as error:
        raise CommandError(_describe_failure(error, host, port)) from None
    try:
        with stop_on_signals(lambda: requests.put_nowait(None)):
            console = new_console()
            if as_json:
                print_json(console, {"url": service.url, "api_key": api_key, "environment": _list_variables(service)})
            else:
                _print_instructions(console, service, auto_approve, host)
            while (request := await requests.get()) is not None:
                _print_request(console, request)
    finally:
        await service.aclose()


def _describe_failure(error: OSError, host: str, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {port} is in use; stop the process that uses it, or choose another: aiokeyless sandbox --port 0"
            )
        case errno.EACCES:
            return f"no permission to use port {port}; choose another: aiokeyless sandbox --port 0"
    return f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port"


def _list_variables(service: Sandbox) -> dict[str, str]:
    return {"KEYLESS_BASE_URL": service.url, "KEYLESS_API_KEY": service.api_key}


def _print_instructions(console: Console, service: Sandbox, auto_approve: float | None, host: str) -> None:
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in _list_variables(service).items())
    print_title(console, "aiokeyless sandbox", "A Keyless service on this machine, for trials and tests.")
    print_fact(console, "Phone", f"{service.url}/  (open it in a browser, and approve there)")
    if auto_approve is not None:
        print_fact(console, "User", f"simulated, approves each operation after {auto_approve:g} s")
    if host != _LOOPBACK:
        print_fact(console, "Listens", f"on {host}: anyone who can reach it can approve", "bold")
    console.print()
    console.print("In another terminal:")
    console.print()
    print_command(console, f"export {variables}")
    print_command(console, 'aiokeyless create C0FFEE --payload "Pay 40 to Alice" --json > ticket.json')
    print_command(console, "aiokeyless wait --ticket ticket.json")
    console.print()
    console.print("Without a browser: aiokeyless sandbox approve, decline, fail, ... (aiokeyless sandbox --help).")
    console.print("Ctrl-C stops it.")
    console.print()


def _print_request(console: Console, request: RequestRecord) -> None:
    status = "-" if request.status is None else request.status
    print_line(console, f"  {datetime.now().astimezone():%H:%M:%S}  {status!s:<3}  {request.method:<4} {request.path}")
