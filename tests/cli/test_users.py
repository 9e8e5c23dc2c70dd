"""``aiokeyless users``, ``devices`` and ``verify``."""

from __future__ import annotations

import io
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from cyclopts import CycloptsError

from aiokeyless import AmbiguousUserError, SignatureError, SignatureReason
from aiokeyless.cli.app import CommandError, app
from aiokeyless.cli.error_messages import describe

from .terminal import Terminal, json_of, output_of

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

USER = "C0FFEE"
TEXT = "Pay 40 EUR to J\u00f6rg"

pytestmark = pytest.mark.looptime


# Users


async def test_a_user_is_linked_found_relinked_and_unlinked(service: Sandbox) -> None:
    service.enroll(USER)
    assert "External   account-1042\n" in await output_of("users", "link", "c0ffee", "account-1042")
    assert await output_of("users", "get", "account-1042") == f"{USER}\n"
    assert USER in await output_of("users", "find", "ACCOUNT-1042")
    assert "External   account-1\n" in await output_of("users", "relink", USER, "account-1")
    assert await output_of("users", "find", "account-1042") == "No user has this external id.\n"
    deleted = await output_of("users", "unlink", "account-1", "--yes")
    assert deleted == "The external id is deleted.\n"
    assert await output_of("users", "find", "account-1") == "No user has this external id.\n"


async def test_machines_get_json(service: Sandbox) -> None:
    service.enroll(USER)
    link = await json_of("users", "link", USER, "ann")
    assert (link["sdk_customer_id"], link["user_id"], link["external_user_id"]) == (1, USER, "ann")
    assert (await json_of("users", "relink", USER, "anne"))["external_user_id"] == "anne"
    user = await json_of("users", "get", "anne")
    assert await json_of("users", "find", "anne") == {"users": [user]}
    [device] = (await json_of("devices", "list", USER))["devices"]
    for arguments in (
        ("devices", "remove", USER, device["public_signing_key"]),
        ("users", "unlink", "anne"),
        ("users", "delete", USER),
    ):
        assert await json_of(*arguments, "--yes") == {"deleted": True}


async def test_devices_are_listed_and_removed(service: Sandbox) -> None:
    key = service.enroll(USER).public_signing_key
    listed = await output_of("devices", "list", USER)
    assert f"Device     {key}\n" in listed
    assert "State      ACTIVE\n" in listed
    assert "Removed" not in listed
    assert await output_of("devices", "remove", USER, key, "--yes") == "The device is deleted.\n"
    assert await output_of("devices", "list", USER) == f"User {USER} has no device.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("users", "get", "nobody"), "there is no user with this external id"),
        (("users", "link", "BEEF", "bob"), "there is no such user"),
        (("users", "relink", "BEEF", "bob"), "there is no such user"),
        (("users", "delete", "BEEF", "--yes"), "there is no such user"),
        (("devices", "list", "BEEF"), "there is no such user"),
        (("devices", "remove", USER, "key", "--yes"), "there is no such device or user"),
        (("users", "link", USER, "it's"), "users relink C0FFEE 'it'\"'\"'s'"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
async def test_what_is_not_there_is_named(service: Sandbox, arguments: tuple[str, ...], message: str) -> None:
    service.enroll(USER, external_user_id="ann")
    with pytest.raises(CommandError) as caught:
        await app.run_async(arguments)
    assert message in str(caught.value)


async def test_several_users_of_an_id_are_an_error(service: Sandbox) -> None:
    service.enroll(USER, external_user_id="ann")
    service.enroll("BEEF", external_user_id="Ann")
    with pytest.raises(AmbiguousUserError):
        await app.run_async(("users", "get", "ann"))


@pytest.mark.parametrize("arguments", [("users", "find", ".."), ("devices", "remove", USER, ""), ("users", "get", "")])
async def test_an_id_that_cannot_be_sent_is_a_usage_error(service: Sandbox, arguments: tuple[str, ...]) -> None:
    with pytest.raises(CycloptsError):
        await app.run_async((*arguments,), exit_on_error=False, print_error=False)
    assert service.requests == []


# Deleting asks


async def test_a_deletion_is_asked_for_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    service.enroll(USER)
    handler = signal.getsignal(signal.SIGINT)
    for answer in ("no\n", "\n", ""):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        with pytest.raises(CommandError, match="nothing was deleted"):
            await app.run_async(("users", "delete", "c0ffee"))
    assert service.requests == []
    assert "Delete user C0FFEE permanently, with all devices? Type yes: " in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Terminal("Yes\n"))
    assert await output_of("users", "delete", USER) == f"User {USER} is deleted.\n"
    assert signal.getsignal(signal.SIGINT) is handler


async def test_ctrl_c_ends_the_question(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    class Interrupted(Terminal):
        def readline(self, *_: object) -> str:  # type: ignore[override]  # mypy takes that of bytes
            signal.raise_signal(signal.SIGINT)
            raise AssertionError

    service.enroll(USER)
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        await app.run_async(("users", "delete", USER))
    assert signal.getsignal(signal.SIGINT) is handler
    assert service.requests == []


async def test_without_a_terminal_a_deletion_needs_the_option(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    for arguments in (("users", "delete", USER), ("users", "unlink", "ann"), ("devices", "remove", USER, "key")):
        with pytest.raises(CommandError, match="pass --yes"):
            await app.run_async(arguments)
    assert service.requests == []


# Signed transactions


def signed(service: Sandbox) -> tuple[str, ...]:
    service.approve("a", user_id=USER, operation_payload=TEXT, external_user_id="ann")
    return ("verify", service.sign("a"), "--tenant", service.tenant, "--user", "c0ffee")


async def test_a_token_is_verified(service: Sandbox) -> None:
    arguments = signed(service)
    text = await output_of(*arguments, "--data", TEXT, "--external-user-id", "ann")
    for line in (f"Signed     {TEXT}\n", f"By         {USER}\n", "External   ann\n", "Key        sandbox-1\n"):
        assert line in text
    proved = await json_of(*arguments, "--data", TEXT)
    assert (proved["user_id"], proved["transaction_data"]) == (USER, TEXT)
    assert proved["signed_sha256"] in text
    service.approve("b", user_id="BEEF", operation_payload=TEXT)
    more = ("verify", service.sign("b"), "--tenant", service.tenant, "--user", "BEEF", "--data", TEXT)
    assert "External" not in await output_of(*more)


async def test_a_token_that_is_refused_is_an_error(service: Sandbox) -> None:
    with pytest.raises(SignatureError) as caught:
        await app.run_async((*signed(service), "--data", "Pay 9000 EUR"))
    assert caught.value.reason is SignatureReason.WRONG_DATA
    assert describe(caught.value) == str(caught.value)
    with pytest.raises(SignatureError) as caught:
        await app.run_async(("verify", "a.b.c", "--tenant", "another", "--user", USER, "--data", TEXT))
    assert caught.value.reason is SignatureReason.MALFORMED


async def test_a_token_for_an_audience_is_verified_for_that_one_alone(service: Sandbox) -> None:
    service.approve("a", user_id=USER, operation_payload=TEXT)
    token = service.sign("a", claims={"aud": "shop"})
    arguments = ("verify", token, "--tenant", service.tenant, "--user", USER, "--data", TEXT)
    assert f"By         {USER}\n" in await output_of(*arguments, "--audience", "shop")
    for refused in (arguments, (*arguments, "--audience", "bank")):
        with pytest.raises(SignatureError) as caught:
            await app.run_async(refused)
        assert caught.value.reason is SignatureReason.WRONG_AUDIENCE


async def test_verify_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    arguments = (*signed(service), "--data", TEXT)
    monkeypatch.setitem(sys.modules, "aiokeyless.signatures", None)
    with pytest.raises(CommandError, match='install the extra "jwt"'):
        await app.run_async(arguments)
