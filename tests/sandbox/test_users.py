"""Users and devices of the sandbox: what the endpoints answer, and what a phone that was removed can still do."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from aiokeyless.errors import AmbiguousUserError, ConfigurationError, ConflictError, NotFoundError
from aiokeyless.sandbox.store import OperationStore

from .direct import Service, document

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

USER = "C0FFEE"
OTHER = "BEEF"
EXTERNAL = f"/v2/users/{USER}/external-user"
ANN = b'{"externalUserId": "ann"}'


@pytest.fixture
def service() -> Service:
    service = Service()
    service.store.users.enroll(USER)
    return service


TIME = "2020-01-02T03:04:05.242194378"


# The endpoints


def test_a_link_is_answered_field_by_field(service: Service) -> None:
    created = service.ask("POST", EXTERNAL, ANN)
    link = {"sdkCustomerId": 1, "userId": USER, "externalUserId": "ann", "createdAt": TIME, "updatedAt": TIME}
    assert (created.status, document(created)) == (201, link)
    changed = service.ask("PATCH", EXTERNAL, b'{"externalUserId": "anne"}')
    assert (changed.status, document(changed)) == (200, {**link, "externalUserId": "anne"})


def test_users_are_found_in_any_case_and_unlinked_in_their_own(service: Service) -> None:
    service.ask("POST", EXTERNAL, ANN)
    found = service.ask("GET", "/v2/external-users/ANN/users")
    assert found.status == 200
    [user] = document(found)
    assert user.pop("biometricPublicSigningKey")
    assert user == {"userId": USER, "createdAt": TIME, "updatedAt": TIME}
    gone = service.ask("DELETE", "/v2/external-users/ANN")
    assert (gone.status, gone.body, dict(gone.headers)) == (204, b"", {})
    assert document(service.ask("GET", "/v2/external-users/ann/users")) != []
    service.ask("DELETE", "/v2/external-users/ann")
    assert document(service.ask("GET", "/v2/external-users/ann/users")) == []


def test_a_taken_external_id_and_a_second_one_conflict(service: Service) -> None:
    service.store.users.enroll(OTHER)
    assert service.ask("POST", EXTERNAL, ANN).status == 201
    assert service.ask("POST", EXTERNAL, b'{"externalUserId": "anne"}').status == 409
    assert service.ask("POST", f"/v2/users/{OTHER}/external-user", ANN).status == 409
    assert service.ask("POST", f"/v2/users/{OTHER}/external-user", b'{"externalUserId": "Ann"}').status == 201
    assert [user["userId"] for user in document(service.ask("GET", "/v2/external-users/ann/users"))] == [USER, OTHER]


def test_devices_are_answered_field_by_field_and_removed_by_their_key(service: Service) -> None:
    devices = service.ask("GET", f"/v2/users/{USER}/devices")
    [device] = document(devices)
    assert device.pop("publicEncryptionKey")
    key = device.pop("publicSigningKey")
    shown = {"osVersion": "sandbox", "sdkVersion": "sandbox", "state": "ACTIVE"}
    assert device == {"userId": USER, "sdkCustomerId": 1, "createdAt": TIME, **shown}
    path = f"/v2/users/{USER}/devices/{quote(key, safe='')}"
    removed = service.ask("DELETE", path)
    assert (removed.status, document(removed)) == (200, {"success": True})
    assert service.ask("DELETE", path).status == 404
    assert document(service.ask("GET", f"/v2/users/{USER}/devices")) == []


def test_a_deleted_user_is_gone_with_everything(service: Service) -> None:
    service.ask("POST", EXTERNAL, ANN)
    deleted = service.ask("DELETE", f"/v2/users/{USER}")
    assert (deleted.status, document(deleted)) == (200, {"success": True})
    assert document(service.ask("GET", "/v2/external-users/ann/users")) == []
    for method, path, body in (
        ("DELETE", f"/v2/users/{USER}", b""),
        ("GET", f"/v2/users/{USER}/devices", b""),
        ("DELETE", f"/v2/users/{USER}/devices/key", b""),
        ("POST", EXTERNAL, ANN),
        ("PATCH", EXTERNAL, ANN),
    ):
        assert service.ask(method, path, body).status == 404


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"[]", b'"ann"', b'{"externalUserId": ""}', b'{"externalUserId": null}'),
        *(b'{"externalUserId": 1}', b'{"external_user_id": "ann"}', b'{"externalUserId": "\xff"}'),
        b'{"externalUserId": "ann"',
    ],
)
def test_a_body_that_is_no_external_user_is_a_bad_request(service: Service, method: str, body: bytes) -> None:
    answer = service.ask(method, EXTERNAL, body)
    assert answer.status == 400
    assert document(answer)["error"].startswith("the body is not an external user")
    assert service.store.users.external_id(USER) is None


# Telemetry


def test_telemetry_knows_users_who_are_enrolled_and_their_external_ids(service: Service) -> None:
    assert service.ask("GET", f"/v2/users/{OTHER}/authentications").status == 404
    service.store.users.enroll(USER, "ann")
    service.store.approve("a", user_id=USER)
    for path in (f"/v2/users/{USER}/authentications", "/v2/external-users/ann/authentications"):
        [of_user] = document(service.ask("GET", path))["content"]
        assert [attempt["operationId"] for attempt in of_user["authentications"]] == ["a"]
    assert service.ask("GET", "/v2/external-users/ANN/authentications").status == 404, "case matters here"


# Who is enrolled


async def test_a_user_is_enrolled_on_one_device_by_their_first_operation(client: KeylessClient) -> None:
    with pytest.raises(NotFoundError):
        await client.get_devices(USER)
    await client.create_operation(USER)
    assert len(await client.get_devices(USER)) == 1
    await client.create_external_user(USER, "ann")
    assert (await client.get_user("ann")).user_id == USER


async def test_a_removed_phone_approves_nothing_until_enrolled_again(sandbox: Sandbox, client: KeylessClient) -> None:
    ticket = await client.create_operation(USER)
    first = (await client.get_devices(USER))[0]
    second = sandbox.enroll(USER)
    assert second.public_signing_key != first.public_signing_key
    await client.delete_device(USER, first.public_signing_key)
    assert await client.get_devices(USER) == [second]
    await client.delete_device(USER, second.public_signing_key)
    for attempt in (sandbox.approve, sandbox.fail_authentication):
        with pytest.raises(ConfigurationError, match="has no device: enroll them again"):
            attempt(ticket.operation_id)
    assert sandbox.authentications == []
    sandbox.enroll(USER)
    assert sandbox.approve(ticket.operation_id).is_approved


async def test_a_deleted_user_can_be_asked_and_cannot_approve(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.enroll(USER, external_user_id="ann")
    await client.delete_user(USER)
    assert await client.find_users("ann") == []
    ticket = await client.create_operation(USER)  # what the service answers here is not documented
    with pytest.raises(ConfigurationError, match="has no device"):
        sandbox.approve(ticket.operation_id)
    sandbox.enroll(USER)
    assert sandbox.approve(ticket.operation_id).is_approved


async def test_an_enrolment_may_name_and_rename_a_user(sandbox: Sandbox, client: KeylessClient) -> None:
    device = sandbox.enroll(USER.lower(), external_user_id="ann")
    assert device.user_id == USER
    link = await client.get_user("ann")
    sandbox.enroll(USER, external_user_id="anne")
    assert (await client.get_user("anne")).created_at == link.created_at
    sandbox.enroll(USER)
    assert (await client.get_user("anne")).user_id == USER
    with pytest.raises(ConflictError):
        await client.create_external_user(USER, "ann")
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        sandbox.enroll(OTHER, external_user_id="anne")
    await client.create_operation(OTHER)
    await client.update_external_user(OTHER, "ANNE")
    with pytest.raises(AmbiguousUserError):
        await client.get_user("anne")


@pytest.mark.parametrize(
    ("user_id", "external_user_id", "argument"),
    [("xyz", None, "user_id"), (USER, "", "external_user_id"), (USER, "\ud800", "external_user_id")],
)
def test_what_cannot_be_enrolled_names_its_argument(user_id: str, external_user_id: str | None, argument: str) -> None:
    users = OperationStore().users
    with pytest.raises(ConfigurationError) as caught:
        users.enroll(user_id, external_user_id)
    assert caught.value.argument == argument
    assert not users.exists(USER)
