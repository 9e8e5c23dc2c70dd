"""The commands that drive a sandbox that runs, against the one of the test's loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from raw_server import RawServer

from aiokeyless import SignatureError, __version__
from aiokeyless.cli import drive
from aiokeyless.cli.app import CommandError, app
from aiokeyless.sandbox.control import ENDPOINTS, IDENTITY

from .terminal import create, json_of, output_of

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox


USER = "C0FFEE"


async def printed(*arguments: str) -> str:
    return await output_of("sandbox", *arguments)


async def printed_json(*arguments: str) -> Any:
    return await json_of("sandbox", *arguments)


async def refusal(*arguments: str) -> str:
    with pytest.raises(CommandError) as refused:
        await app.run_async(["sandbox", *arguments])
    return str(refused.value)


def test_each_endpoint_has_a_command_and_each_command_an_endpoint() -> None:
    assert {name for name in app["sandbox"] if not name.startswith("-")} == ENDPOINTS.keys()


# What they do


async def test_an_operation_is_listed_declined_and_approved(service: Sandbox) -> None:
    assert await printed("list") == "No operations.\n"
    await create(service, "a\u202e", operation_payload="Pay 5", external_user_id="ann")
    assert await printed("decline", "a\u202e") == (
        "a\\u202e is declined: the user left the scan (30003). It stays pending.\n"
    )
    assert "(30004)" in await printed("decline", "a\u202e", "--code", "30004")
    assert "declined: failed (99)" in await printed("decline", "a\u202e", "--code", "99")
    assert await printed("decline", "--user", USER) == (
        "An attempt without an operation id failed: the user left the scan (30003).\n"
    )
    approved = await printed("approve", "a\u202e", "--auth-type", "pin")
    assert approved == "a\\u202e is approved by PIN.\n"
    table = await printed("list", "--user", "c0ffee", "--state", "approved")
    assert [word in table for word in ("a\\u202e", "approved", USER, "Pay 5", "ann")] == [True] * 5


async def test_machines_get_json(service: Sandbox) -> None:
    options = ("--user", "c0ffee", "--payload", "Pay 5", "--external-user-id", "ann")
    operation = await printed_json("approve", "a", *options)
    assert (operation["user_id"], operation["operation_payload"], operation["is_approved"]) == (USER, "Pay 5", True)
    assert operation["external_user_id"] == "ann"
    assert "api_key" not in operation
    attempt = await printed_json("decline", "b", "--user", USER, "--auth-type", "pin")
    assert (attempt["error_code"], attempt["auth_type"]) == (30003, "pin")
    [listed] = (await printed_json("list"))["operations"]
    assert listed == {name: value for name, value in operation.items() if name != "is_approved"}
    assert (await printed_json("enroll", USER))["user_id"] == USER
    assert await printed_json("rotate") == {"key_id": "sandbox-2"}
    assert (await printed_json("sign", "a")).keys() == {"token"}
    for command in ("fail", "drop", "recover"):
        assert await printed_json(command) == {"done": True}
    assert await printed_json("unlock", USER) == {"done": True}
    assert not service._faults  # nothing public tells which are left


async def test_the_service_fails_as_it_is_told_until_it_recovers(service: Sandbox) -> None:
    assert await printed("fail", "--times", "1") == "The service answers 503 to the next request.\n"
    options = ("--status", "429", "--retry-after", "2", "--method", "POST", "--stored")
    assert await printed("fail", *options) == (
        "The service answers 429 to each POST request, until: aiokeyless sandbox recover.\n"
    )
    assert await printed("drop", "--times", "2") == "The service drops the connection of the next 2 requests.\n"
    await printed("drop", "--method", "POST", "--stored")
    get, post, drop, drop_post = service._faults  # nothing public tells
    assert get.answer is not None
    assert (get.answer.status, get.left, get.method, get.stored) == (503, 1, None, False)
    assert post.answer is not None
    assert (post.answer.status, post.left, post.method, post.stored) == (429, float("inf"), "POST", True)
    assert post.answer.headers["Retry-After"] == "2"
    assert (drop.answer, drop.left, drop.method, drop.stored) == (None, 2, None, False)
    assert (drop_post.answer, drop_post.left, drop_post.method, drop_post.stored) == (None, float("inf"), "POST", True)
    assert await printed("recover") == "The service works.\n"
    assert not service._faults


async def test_a_user_is_enrolled_and_unlocked(service: Sandbox) -> None:
    enrolled = await printed("enroll", "c0ffee", "--external-user-id", "ann")
    assert f"  Enrolled   {USER}\n  Device     " in enrolled
    async with service.client() as client:
        assert (await client.get_user("ann")).user_id == USER
    for _ in range(5):
        service.fail_authentication("a", user_id=USER)
    assert "is locked out for" in await refusal("approve", "a", "--user", USER)
    assert await printed("unlock", "c0ffee") == f"User {USER} is unlocked.\n"
    assert service.approve("a", user_id=USER).is_approved


async def test_a_token_is_printed_for_verify(service: Sandbox) -> None:
    service.approve("a", user_id=USER, operation_payload="Pay 5")
    token = (await printed("sign", "a")).strip()
    command = ("verify", token, "--tenant", "sandbox", "--user", USER, "--data", "Pay 5")
    assert "Pay 5" in await output_of(*command)
    wrong = (await printed("sign", "a", "--tampered")).strip()
    with pytest.raises(SignatureError) as refused:
        await app.run_async(["verify", wrong, *command[2:-1], "Pay 5 (tampered)"])
    assert refused.value.reason == "bad_signature"
    assert await printed("rotate") == "sandbox-2\n"
    assert await output_of(*command), "the earlier key is still published"
    assert await printed("rotate", "--retire") == "sandbox-3\n"
    with pytest.raises(SignatureError) as refused:
        await app.run_async(command)
    assert refused.value.reason == "unknown_key"


# What can go wrong


@pytest.mark.usefixtures("service")
async def test_what_the_sandbox_refuses_is_an_error_that_says_why() -> None:
    assert await refusal("approve", "a") == (
        "there is no operation 'a'; create it first, or name its user if the phone is to create it"
    )


async def test_a_wrong_key_names_the_variables(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    monkeypatch.setenv("KEYLESS_API_KEY", "wrong-key")
    message = await refusal("list")
    assert message.startswith(f"the sandbox at {service.url} has another key; export both variables")
    assert "wrong-key" not in message
    monkeypatch.delenv("KEYLESS_API_KEY")  # then it is the default one
    assert await printed("list") == "No operations.\n"


ELSEWHERE = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"
ANOTHER_VERSION = f"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{IDENTITY}: 9\r\n\r\n[]".encode()


async def test_what_is_no_sandbox_of_this_version_is_one_error_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(ELSEWHERE, ANOTHER_VERSION) as server:
        monkeypatch.setenv("KEYLESS_BASE_URL", server.url)
        assert (await refusal("recover")).startswith(f"the server at {server.url} is not a sandbox; start one with:")
        assert (
            await refusal("list") == f"the sandbox at {server.url} is that of aiokeyless 9; start it with {__version__}"
        )
    assert (await refusal("recover")).startswith(f"no sandbox answers at {server.url}; start one with:")


@pytest.mark.parametrize(
    ("variable", "value"), [("KEYLESS_BASE_URL", "http://example.com"), ("KEYLESS_API_KEY", "no\tkey")]
)
async def test_a_variable_that_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert (await refusal("list")).startswith(f"${variable} is wrong: ")
    assert not service.requests


async def test_the_key_of_a_tenant_goes_to_no_address_that_was_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(ANOTHER_VERSION) as server:
        monkeypatch.setattr(drive, "DEFAULT_PORT", int(server.url.rpartition(":")[2]))
        monkeypatch.setenv("KEYLESS_API_KEY", "key-of-a-tenant")
        await refusal("list")
    [head] = server.heads
    assert b"\r\nX-Api-Key: sandbox-key\r\n" in head
    assert b"key-of-a-tenant" not in head
