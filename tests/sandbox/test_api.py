"""What the endpoints answer to each request, without a socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from .direct import Service, document

if TYPE_CHECKING:
    from aiokeyless.sandbox.api import Answer

USER = "C0FFEE"
CREATE = f"/v2/users/{USER}/operations"
PENDING = f"/v2/users/{USER}/operations/pending"
ATTEMPTS = f"/v2/users/{USER}/authentications"
EXTERNAL = f"/v2/users/{USER}/external-user"
DEVICES = f"/v2/users/{USER}/devices"


def create(service: Service, **fields: object) -> Answer:
    return service.ask("POST", CREATE, json.dumps(fields).encode())


@pytest.fixture
def service() -> Service:
    return Service()


# What is asked for is there


def test_creation_answers_success_and_stores_a_pending_operation(service: Service) -> None:
    answer = create(service, operationId="txn-1", operationPayload="Pay 5", externalUserId="ann")
    assert (answer.status, document(answer)) == (200, {"success": True})
    operation = service.store.operations["txn-1"]
    assert (operation.user_id, operation.operation_payload, operation.external_user_id) == (USER, "Pay 5", "ann")
    assert service.created == [operation]


def test_only_the_operation_id_is_required(service: Service) -> None:
    assert create(service, operationId="txn-1").status == 200
    operation = service.store.operations["txn-1"]
    assert (operation.operation_payload, operation.external_user_id) == (None, None)


def test_fields_that_the_service_does_not_know_are_passed_over(service: Service) -> None:
    assert create(service, operationId="txn-1", colour={"deep": [1]}).status == 200


def test_query_is_passed_over(service: Service) -> None:
    create(service, operationId="txn-1")
    assert service.ask("GET", "/v2/operations/txn-1?verbose=1/2").status == 200


def test_attempts_of_a_user_are_answered(service: Service) -> None:
    create(service, operationId="a/b c", externalUserId="ann+1@example.com/é")
    service.store.fail("a/b c", error_code=30003)
    create(service, operationId="c")
    service.store.fail("c", error_code=30004)
    external = f"/v2/external-users/{quote('ann+1@example.com/é', safe='')}/authentications"
    for target, owner, codes in [
        (ATTEMPTS, {"userId": USER}, [30004, 30003]),
        (f"{ATTEMPTS}?operationId=a%2Fb%20c", {"userId": USER}, [30003]),
        (f"{ATTEMPTS}?verbose=1&operationId=a%2Fb+c&operationId=c", {"userId": USER}, [30003]),
        (f"{ATTEMPTS}?operationId=", {"userId": USER}, []),
        (external, {"externalUserId": "ann+1@example.com/é"}, [30003]),
        (f"{external}?operationId=c", {"externalUserId": "ann+1@example.com/é"}, []),
    ]:
        answer = service.ask("GET", target, content_type="")
        [content] = document(answer)["content"]
        attempts = content.pop("authentications")
        assert (answer.status, content, [each["errorCode"] for each in attempts]) == (200, owner, codes), target


@pytest.mark.parametrize(
    "target",
    [
        *(f"/v2/users/{user_id}/authentications" for user_id in (USER, "c0ffee")),
        *(f"/v2/external-users/{external_user_id}/authentications" for external_user_id in ("ANN", USER)),
        "/v2/users/BAD/authentications?operationId=a",
    ],
)
def test_attempts_of_an_unknown_user_are_not_found(service: Service, target: str) -> None:
    service.store.create("F00", "a", external_user_id="ann")
    answer = service.ask("GET", target)
    assert (answer.status, document(answer)) == (404, {"error": "user not found"})


@pytest.mark.parametrize(
    "target",
    ["/v2/users/%zz/authentications", f"{ATTEMPTS}?operationId=%ff", "/v2/external-users//authentications"],
)
def test_telemetry_that_is_not_encoded_as_utf8_is_a_bad_request(service: Service, target: str) -> None:
    create(service, operationId="a")
    assert service.ask("GET", target).status == 400


# Refusals


@pytest.mark.parametrize("key", ["", "KEY", "key ", "ke", "keyy", "k\xe9y", "\udcff"])
def test_wrong_key_is_unauthorized(service: Service, key: str) -> None:
    answer = service.ask("POST", CREATE, b'{"operationId": "a"}', api_key=key)
    assert answer.status == 401
    assert not service.store.operations
    assert "X-Api-Key" in document(answer)["error"]


def test_unknown_operation_is_not_found(service: Service) -> None:
    answer = service.ask("GET", "/v2/operations/nothing")
    assert (answer.status, document(answer)) == (404, {"error": "no such operation"})


def test_taken_id_conflicts_and_changes_nothing(service: Service) -> None:
    create(service, operationId="a", operationPayload="Pay 5")
    answer = create(service, operationId="a", operationPayload="Pay 9000")
    assert answer.status == 409
    assert service.store.operations["a"].operation_payload == "Pay 5"
    assert len(service.created) == 1
    assert "Pay" not in document(answer)["error"]


@pytest.mark.parametrize(
    "target",
    [
        *("", "/", "*", "/v2", "/v2/", "/v2/users", "/v2/operations", "/v2/operations/a/", "/v2/operations/a/b"),
        *("//v2/operations/a", "/v1/operations/a", "/V2/operations/a", "/keyless/v2/operations/a"),
        *("/v2%2Foperations/a", "/v2/operations%2Fa", "http://127.0.0.1/v2/operations/a"),
        *(f"{CREATE}/", f"{CREATE}/approved", f"{PENDING}/", f"{ATTEMPTS}/"),
        *(f"/v2/users/{USER}/operations%2Fpending", f"/v2/users%2F{USER}/operations/pending"),
        "/v2/external-users/ann/operations/pending",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_paths_are_not_found(service: Service, method: str, target: str) -> None:
    create(service, operationId="a")
    assert service.ask(method, target, b'{"operationId": "b"}').status == 404
    assert list(service.store.operations) == ["a"]


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("/v2/operations/a", "GET"),
        (PENDING, "GET"),
        (ATTEMPTS, "GET"),
        (CREATE, "POST"),
        (f"/v2/users/{USER}", "DELETE"),
        (f"/v2/users/{USER}%2Foperations", "DELETE"),  # an encoded slash belongs to the id
        ("/v2/external-users/authentications", "DELETE"),
        (EXTERNAL, "POST, PATCH"),
        (DEVICES, "GET"),
        (f"{DEVICES}/a%2Fb", "DELETE"),
        ("/customers/sandbox/.well-known/jwks.json", "GET"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "get", "BREW"])
def test_other_methods_are_not_allowed(service: Service, method: str, target: str, allowed: str) -> None:
    create(service, operationId="a")
    if method in allowed.split(", "):
        return
    answer = service.ask(method, target, b'{"operationId": "b"}')
    assert answer.status == 405
    assert answer.headers["Allow"] == allowed
    assert list(service.store.operations) == ["a"]


@pytest.mark.parametrize("user_id", ["", "c0ffee", "C0FFEe", "XYZ", "C0%20FFEE", "C0FFEE%0A", "%EF%BC%A1", "%C3", "%"])
@pytest.mark.parametrize("target", ["/v2/users/{}/operations", "/v2/users/{}/operations/pending"])
def test_user_id_that_is_not_upper_case_hex_is_a_bad_request(service: Service, target: str, user_id: str) -> None:
    method = "GET" if target.endswith("pending") else "POST"
    assert service.ask(method, target.format(user_id), b'{"operationId": "a"}').status == 400
    assert not service.store.operations


def test_user_id_may_be_percent_encoded(service: Service) -> None:
    create(service, operationId="a")
    assert document(service.ask("GET", "/v2/users/%430FFE%45/operations/pending")) == [{"operationId": "a"}]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"operationId=a", b'{"operationId": "a"', b'{"operationId": "a"} {}', b"[]", b'"a"', b"null", b"{}"),
        *(b'{"operation_id": "a"}', b'{"operationid": "a"}', b'{"operationId": ""}', b'{"operationId": null}'),
        *(b'{"operationId": 7}', b'{"operationId": ["a"]}', b'{"operationId": "\\ud800"}', b'{"operationId": "\xff"}'),
        *(b"\xef\xbb\xbf" + b'{"operationId": "a"}', '{"operationId": "a"}'.encode("utf-16")),
        b'{"operationId": "a", "operationPayload": null}',
        b'{"operationId": "a", "operationPayload": {"amount": 5}}',
        b'{"operationId": "a", "externalUserId": null}',
        b'{"operationId": "a", "externalUserId": 12}',
        b'{"operationId": "a", "colour": "\xff"}',
        b'{"operationId": "a", "colour": ' + b"[" * 100_000,
    ],
)
def test_body_that_is_no_operation_is_a_bad_request(service: Service, body: bytes) -> None:
    answer = service.ask("POST", CREATE, body)
    assert answer.status == 400
    assert document(answer)["error"].startswith("the body is not an operation: ")
    assert not service.store.operations
    assert not service.created


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        *((json, 200) for json in ("application/json", "Application/JSON", " application/json ;charset=utf-8")),
        *((other, 415) for other in ("", "text/json", "application/jsonp", "application/problem+json")),
        *((form, 415) for form in ("application/x-www-form-urlencoded", "text/plain; application/json")),
    ],
)
def test_body_must_be_declared_json(service: Service, content_type: str, status: int) -> None:
    answer = service.ask("POST", CREATE, b'{"operationId": "a"}', content_type=content_type)
    assert answer.status == status
    assert len(service.store.operations) == (status == 200)


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/v2/operations/a"), ("GET", PENDING), ("GET", ATTEMPTS), ("POST", CREATE)],
    ids=["one", "list", "attempts", "new"],
)
def test_accept_must_admit_json(service: Service, method: str, target: str) -> None:
    assert service.ask(method, target, b'{"operationId": "a"}', accept="text/html").status == 406
    assert not service.store.operations


@pytest.mark.parametrize(
    ("accept", "admits"),
    [
        *((admits, True) for admits in ("", " , ", "APPLICATION/Json", "application/*", "*/*")),
        *((admits, True) for admits in ("text/html, application/json;q=0.1", "application/json; charset=utf-8")),
        *((other, False) for other in ("text/html", "text/*", "*", "application/jsonp", "application/problem+json")),
        ("text/html;note=application/json", False),
    ],
)
def test_accept_admits_json_by_its_name_or_a_range(service: Service, accept: str, admits: bool) -> None:
    assert service.ask("GET", PENDING, accept=accept).status == (200 if admits else 406)


def test_what_is_wrong_first_decides(service: Service) -> None:
    create(service, operationId="a")
    request: dict[str, str] = {"api_key": "no", "accept": "text/html", "content_type": "text/html"}
    target, body = "/v2/users/xyz/operations", b'{"operationId": "a"}'
    assert service.ask("PUT", target, body, **request).status == 401
    del request["api_key"]
    assert service.ask("PUT", target, body, **request).status == 405
    assert service.ask("POST", target, body, **request).status == 406
    del request["accept"]
    assert service.ask("POST", target, body, **request).status == 415
    del request["content_type"]
    assert service.ask("POST", target, body, **request).status == 400
    assert service.ask("POST", CREATE, body, **request).status == 409


# Operation ids in the path


@pytest.mark.parametrize(
    "operation_id",
    [
        *("/", "..", ".", "%", "%2F", "%252F", "a+b", "a b", "a/b?c#d%2F é", "a;b=c:d@e!$&'()*,"),
        *("pending", "../users/C0FFEE/operations/pending", "\U0001f9d1\u200d\U0001f680", "e\u0301", "\x00\r\n"),
    ],
)
@pytest.mark.parametrize("safe", ["", ":@!$&'()*+,;="])
def test_any_operation_id_comes_back_the_same(service: Service, operation_id: str, safe: str) -> None:
    create(service, operationId=operation_id)
    answer = service.ask("GET", f"/v2/operations/{quote(operation_id, safe=safe)}")
    assert answer.status == 200
    assert document(answer)["operationId"] == operation_id


@pytest.mark.parametrize(
    "segment",
    ["", "%", "a%", "%zz", "%4", "%FF", "%C3%28", "%ED%A0%80", "%u0041", "a#b", "a b", "é", "\udcff", "\udcc3\udca9"],
)
def test_segment_that_is_not_percent_encoded_utf8_is_a_bad_request(service: Service, segment: str) -> None:
    assert service.ask("GET", f"/v2/operations/{segment}").status == 400
