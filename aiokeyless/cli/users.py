"""``aiokeyless users`` and ``aiokeyless devices``: enrolled users, their external ids, and their devices."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import App, Parameter

from aiokeyless._validation import check_external_user_id, check_public_signing_key
from aiokeyless.errors import ConflictError, NotFoundError

from .app import AsJson, CommandError, UserId, Yes, app, ask, explain_interruption, open_client, validator
from .error_messages import quote
from .render import new_console, print_facts, print_json, print_list, print_object, print_result

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from aiokeyless.models import ExternalUser, User

users: Final = App(
    name="users",
    help="Find, link and delete users.",
    help_epilogue="Example:\n  aiokeyless users get account-1042",
)
devices: Final = App(
    name="devices",
    help="List and remove the devices of a user.",
    help_epilogue="Example:\n  aiokeyless devices list C0FFEE",
)
app.command(users)
app.command(devices)

ExternalId = Annotated[
    str,
    Parameter(
        name="EXTERNAL_ID",
        validator=validator(check_external_user_id),
        help="Your own id of the user; no personal data, and different from others in more than case.",
    ),
]
DeviceKey = Annotated[str, Parameter(name="KEY", validator=validator(check_public_signing_key))]

_DELETED: Final = {"deleted": True}
_TAKEN: Final = (
    "the user has an external id already, or another user has this one; to give the user another id: aiokeyless users "
    "relink"
)


@contextmanager
def _report_missing(what: str) -> Iterator[None]:
    """Turn a 404 into an error that names what does not exist."""
    try:
        yield
    except NotFoundError:
        raise CommandError(f"there is no {what}") from None


def _explain_interruption(external_id: str) -> AbstractContextManager[None]:
    return explain_interruption(
        f"the user may have this external id; to check: aiokeyless users find {quote(external_id)}"
    )


@users.command(help_epilogue="Example:\n  aiokeyless users find account-1042")
async def find(external_id: ExternalId, /, *, as_json: AsJson = False) -> None:
    """List the users who have an external id; the search ignores case."""
    async with open_client(as_json=as_json) as client:
        found = await client.find_users(external_id)
    rows = [{"User": user.user_id, "Created": user.created_at, "Updated": user.updated_at} for user in found]
    nothing = "No user has this external id."
    print_list({"users": [user.to_dict() for user in found]}, rows, nothing, as_json=as_json)


@users.command(help_epilogue="Example:\n  aiokeyless create $(aiokeyless users get account-1042) --payload 'Log in?'")
async def get(external_id: ExternalId, /, *, as_json: AsJson = False) -> None:
    """Print the id of the one user who has an external id; none, or several, is an error."""
    async with open_client(as_json=as_json) as client:
        with _report_missing("user with this external id"):
            user: User = await client.get_user(external_id)
    print_result(user.to_dict(), user.user_id, as_json=as_json)


@users.command(help_epilogue="Example:\n  aiokeyless users link C0FFEE account-1042")
async def link(user_id: UserId, external_id: ExternalId, /, *, as_json: AsJson = False) -> None:
    """Give a user an external id; a user has at most one."""
    async with open_client(as_json=as_json) as client:
        try:
            with _report_missing("such user"), _explain_interruption(external_id):
                linked = await client.create_external_user(user_id, external_id)
        except ConflictError:
            raise CommandError(f"{_TAKEN} {user_id} {quote(external_id)}") from None
    _print_link(linked, as_json=as_json)


@users.command(help_epilogue="Example:\n  aiokeyless users relink C0FFEE account-2000")
async def relink(user_id: UserId, external_id: ExternalId, /, *, as_json: AsJson = False) -> None:
    """Give a user another external id."""
    async with open_client(as_json=as_json) as client:
        with _report_missing("such user"), _explain_interruption(external_id):
            linked = await client.update_external_user(user_id, external_id)
    _print_link(linked, as_json=as_json)


def _print_link(linked: ExternalUser, *, as_json: bool) -> None:
    facts = {"User": linked.user_id, "External": linked.external_user_id, "Updated": linked.updated_at}
    print_object(linked.to_dict(), facts, bold="User", as_json=as_json)


@users.command(help_epilogue="Example:\n  aiokeyless users unlink account-1042 --yes")
async def unlink(external_id: ExternalId, /, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete an external id, in its exact case; the user stays."""
    _confirm("Delete this external id?", yes=yes)
    async with open_client(as_json=as_json) as client:
        await client.delete_external_user(external_id)
    print_result(_DELETED, "The external id is deleted.", as_json=as_json)


@users.command(help_epilogue="Example:\n  aiokeyless users delete C0FFEE")
async def delete(user_id: UserId, /, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a user permanently, with their devices and their enrolment."""
    _confirm(f"Delete user {user_id.upper()} permanently, with all devices?", yes=yes)
    async with open_client(as_json=as_json) as client:
        with _report_missing("such user"):
            await client.delete_user(user_id)
    print_result(_DELETED, f"User {user_id.upper()} is deleted.", as_json=as_json)


@devices.command(name="list", help_epilogue="Example:\n  aiokeyless devices list C0FFEE")
async def list_devices(user_id: UserId, /, *, as_json: AsJson = False) -> None:
    """List the devices of a user."""
    async with open_client(as_json=as_json) as client:
        with _report_missing("such user"):
            found = await client.get_devices(user_id)
    console = new_console()
    if as_json:
        print_json(console, {"devices": [device.to_dict() for device in found]})
        return
    if not found:
        console.print(f"User {user_id.upper()} has no device.")
    for device in found:
        facts = {
            "Device": device.public_signing_key,
            "State": device.state,
            "Since": device.created_at,
            "System": device.os_version,
            "SDK": device.sdk_version,
            "Removed": device.deleted_at,
        }
        print_facts(console, facts, bold="Device")
        console.print()


@devices.command(help_epilogue="Example:\n  aiokeyless devices remove C0FFEE MFkwEwYHKoZIzj0CAQ== --yes")
async def remove(
    user_id: UserId, public_signing_key: DeviceKey, /, *, yes: Yes = False, as_json: AsJson = False
) -> None:
    """Remove a device of a user, such as a lost phone: it can approve nothing from then on.

    Args:
        public_signing_key: The device, as "devices list" shows it.
    """
    _confirm(f"Remove this device of user {user_id.upper()}?", yes=yes)
    async with open_client(as_json=as_json) as client:
        with _report_missing("such device or user"):
            await client.delete_device(user_id, public_signing_key)
    print_result(_DELETED, "The device is deleted.", as_json=as_json)


def _confirm(question: str, *, yes: bool) -> None:
    """Ask on the terminal, unless `yes`.

    Raises:
        CommandError: The answer is not yes, or stdin is not a terminal.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError("this must be confirmed, and stdin is not a terminal; pass --yes")
    if not ask(question):
        raise CommandError("nothing was deleted")
