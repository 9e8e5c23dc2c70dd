"""The API as tables: which ids travel and how, which status is which error, and what no answer can bring about."""

from __future__ import annotations

import html
import json
import math
import pickle
import time
import unicodedata
from contextlib import suppress
from email.utils import formatdate
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.pretty import pretty_repr
from yarl import URL

from aiokeyless._http.protocol import (
    ADDRESSES,
    DELETE_USER,
    GET_AUTHENTICATIONS,
    GET_DEVICES,
    GET_EXTERNAL_AUTHENTICATIONS,
    GET_EXTERNAL_USERS,
    GET_OPERATION,
    GET_PENDING,
    POST_EXTERNAL_USER,
    POST_OPERATION,
    Endpoint,
    RawAnswer,
    Request,
    create_operation,
    get_authentications,
    get_external_authentications,
    get_operation,
    get_pending_operations,
    read,
    retry_after,
)
from aiokeyless._http.redaction import MAX_DETAIL, Redaction
from aiokeyless._validation import (
    check_base_url,
    check_external_user_id,
    check_operation_id,
    check_region,
    check_text,
    check_user_id,
    read_api_key,
)
from aiokeyless.errors import (
    AuthenticationError,
    BadRequestError,
    CachedAnswerError,
    ConfigurationError,
    ConflictStatusError,
    DecodeError,
    InvalidIdentifierError,
    KeylessError,
    NotAcceptableError,
    NotFoundError,
    NotJsonError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    StatusError,
    UnsupportedMediaTypeError,
)
from aiokeyless.models import (
    Authentication,
    Authentications,
    ExternalUser,
    NewOperation,
    Operation,
    PendingOperation,
    Region,
    Secret,
    SuccessAnswer,
)

KEY = "k3y/with+blanks and=\"quotes\" & <tags> 'n' 100%\\"
PATH = "/v2/operations/txn-1"
ENDPOINTS: dict[str, Endpoint[Any]] = {
    "operation": GET_OPERATION,
    "pending": GET_PENDING,
    "create": POST_OPERATION,
    "attempts": GET_AUTHENTICATIONS,
    "link": POST_EXTERNAL_USER,
    "users": GET_EXTERNAL_USERS,
    "devices": GET_DEVICES,
    "deletion": DELETE_USER,
}
WIRE: dict[str, Any] = {
    "id": 1,
    "timestamp": "2020-01-02T03:04:05.68",
    "nodeId": "text",
    "userId": "0123456789ABCDEF",
    "apiKey": "sdk-key-0123456789",
    "operationId": "txn-1",
    "result": True,
    "state": "approved",
}
GOOD = {
    "operation": json.dumps(WIRE).encode(),
    "pending": b'[{"operationId": "a", "operationPayload": "b"}, {"operationId": "c"}]',
    "create": b'{"success": true}',
    # As in the documentation.
    "attempts": b"""
        {"page": {"number": 0, "size": 20, "totalElements": 1, "totalPages": 1},
         "content": [{"userId": "A1B2C3D4E5F6",
                      "authentications": [{"createdAt": "2025-05-21T10:34:00.000", "result": "APPROVED", "errorCode": 0,
                                           "operationId": "op-789", "deviceId": "device-abc", "authType": "biom"}]}]}
    """.strip(),
    "link": b"""
        {"sdkCustomerId": 1, "userId": "0123456789ABCDEF", "externalUserId": "text",
         "createdAt": "2025-08-06T15:04:05.242194378", "updatedAt": "2025-08-06T15:04:05.242194378"}
    """.strip(),
    "users": b'[{"userId": "AB", "biometricPublicSigningKey": "a2V5", "createdAt": "t", "updatedAt": "t"}]',
    "devices": b"""
        [{"userId": "AB", "sdkCustomerId": 1, "publicSigningKey": "a2V5", "publicEncryptionKey": "a2V6",
          "state": "ACTIVE", "createdAt": "t", "osVersion": "15", "sdkVersion": "5", "deletedAt": "t"}]
    """.strip(),
    "deletion": b'{"success": true}',
}
PAGE = b"<!doctype html><html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
every_endpoint = pytest.mark.parametrize("name", list(ENDPOINTS))


def answered(
    status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, name: str = "operation", key: str = KEY
) -> Any:
    return read(ENDPOINTS[name], PATH, RawAnswer(status, headers or {}, body), Redaction(Secret(key)))


def failed(status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, key: str = KEY) -> StatusError:
    with pytest.raises(StatusError) as caught:
        answered(status, body, headers, key=key)
    return caught.value


def undecoded(body: bytes, name: str = "operation", **headers: str) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        answered(200, body, headers, name=name)
    return caught.value


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (201, "a success that the API does not document, so it does not count as one; check base_url and the proxies"),
        (299, "a success that the API does not document, so it does not count as one; check base_url and the proxies"),
        (300, "a redirect, not followed since that would send the API key to another host; check base_url"),
        (399, "a redirect, not followed since that would send the API key to another host; check base_url"),
        (407, "from a proxy; check its URL, user name and password"),
        (408, "a temporary failure; try again later"),
        (425, "a temporary failure; try again later"),
    ],
)
def test_status_without_a_class_of_its_own_says_what_to_do(status: int, advice: str) -> None:
    error = failed(status, headers={"Location": "https://evil.example"})
    assert str(error) == f"GET {PATH} answered {status}: {advice}"


# -- identifiers


def travels(operation_id: str) -> bool:
    """Say, independently of the code, whether the design lets an operation id travel."""
    return (
        1 <= len(operation_id) <= 512
        and operation_id not in {".", ".."}
        and all(unicodedata.category(character) not in {"Cc", "Cs"} for character in operation_id)
    )


@pytest.mark.parametrize(
    ("operation_id", "message"),
    [
        *((None, "must be a string, not NoneType"), (1, "must be a string, not int")),
        *((b"txn-1", "must be a string, not bytes"), ("", "1 to 512 characters, not 0")),
        *(("x" * 513, "1 to 512 characters, not 513"), (".", "must not be '.'"), ("..", "must not be '..'")),
        *(("a\nb", "control characters"), ("a\r\nX-Api-Key: other", "control characters")),
        *(("\x00", "control characters"), ("a\x7f", "control characters"), ("a\x85", "control characters")),
        *(("a\ud800", "lone surrogates"), ("\udfff" * 512, "lone surrogates")),
    ],
)
def test_an_operation_id_that_cannot_travel_is_refused_by_name(operation_id: Any, message: str) -> None:
    for build in (
        check_operation_id,
        get_operation,
        lambda bad: create_operation("AB", NewOperation(operation_id=bad)),
    ):
        with pytest.raises(InvalidIdentifierError) as caught:
            build(operation_id)
        assert str(caught.value).startswith("operation_id must ")
        assert message in str(caught.value)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1100
    for check in (check_external_user_id, get_external_authentications):
        with pytest.raises(InvalidIdentifierError, match=r"^external_user_id must ") as caught:
            check(operation_id)
        assert message in str(caught.value)
    if operation_id is not None:
        with pytest.raises(InvalidIdentifierError, match=r"^operation_id must "):
            get_authentications("AB", operation_id)


@pytest.mark.parametrize(
    ("operation_id", "segment"),
    [
        *(("txn-20250521-001", "txn-20250521-001"), ("a/b", "a%2Fb"), ("../users/AB", "..%2Fusers%2FAB")),
        *(("a?b=c#d", "a%3Fb%3Dc%23d"), ("100%", "100%25"), ("%2F", "%252F"), ("%2e%2e", "%252e%252e")),
        *(("a b", "a%20b"), ("a+b", "a%2Bb"), ("é", "%C3%A9"), ("e\u0301", "e%CC%81"), ("\uff15", "%EF%BC%95")),
        *(("😀", "%F0%9F%98%80"), ("...", "..."), ("a\\b;c:d@e&f", "a%5Cb%3Bc%3Ad%40e%26f"), ("~._-", "~._-")),
        ("x" * 512, "x" * 512),
    ],
)
def test_an_operation_id_is_percent_encoded_as_one_segment(operation_id: str, segment: str) -> None:
    request = get_operation(operation_id)
    assert request.path == f"/v2/operations/{segment}"
    assert (request.endpoint, request.body, request.query) == (GET_OPERATION, None, "")
    assert get_external_authentications(operation_id).path == f"/v2/external-users/{segment}/authentications"
    assert get_authentications("AB", operation_id).query == f"operationId={segment}"


awkward = st.text(st.sampled_from(list("./?#%\\ :@&=+;2eEfF~\u2028\u200b\u202eé\ufeff😀\x00\n\x7f\x9f\ud800\udfffx")))


@given(st.text() | awkward | st.integers(500, 520).map(lambda length: "é" * length))
@example(".")
@example("..")
def test_every_allowed_id_comes_back_from_its_path_and_no_other_gets_one(operation_id: str) -> None:
    if not travels(operation_id):
        with pytest.raises(InvalidIdentifierError):
            get_operation(operation_id)
        return
    url = f"https://api.keyless.io{get_operation(operation_id).path}"
    assert url.isascii()
    parts = urlsplit(url)
    assert (parts.query, parts.fragment) == ("", "")
    segments = parts.path.split("/")
    assert segments[:-1] == ["", "v2", "operations"]
    assert unquote(segments[-1]) == operation_id


@pytest.mark.parametrize(
    "user_id",
    [
        *(None, 1, b"AB", "", "xyz", "AB ", " AB", "AB\n", "A/B", "..", "AB-CD", "0xAB", "\u0660\u0661"),
        *("\uff21\uff22", "\ud800", "A" * 513),
    ],
)
def test_a_user_id_that_is_not_hex_is_refused_by_name(user_id: Any) -> None:
    for build in (
        check_user_id,
        get_pending_operations,
        get_authentications,
        lambda bad: create_operation(bad, NewOperation(operation_id="a")),
    ):
        with pytest.raises(InvalidIdentifierError, match=r"^user_id must be .*hex digits.*, not ") as caught:
            build(user_id)
        assert str(caught.value).isprintable()


@given(st.from_regex(r"[0-9a-fA-F]{1,512}", fullmatch=True))
def test_a_user_id_is_sent_in_upper_case(user_id: str) -> None:
    assert check_user_id(user_id) == user_id.upper()
    assert get_pending_operations(user_id).path == f"/v2/users/{user_id.upper()}/operations/pending"
    assert create_operation(user_id, NewOperation(operation_id="a")).path == f"/v2/users/{user_id.upper()}/operations"


# -- requests


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        (NewOperation(operation_id="a"), '{"operationId":"a"}'),
        (NewOperation(operation_id="a", operation_payload="p"), '{"operationId":"a","operationPayload":"p"}'),
        (NewOperation(operation_id="a", external_user_id="e"), '{"operationId":"a","externalUserId":"e"}'),
        (
            NewOperation(operation_id="a/b", operation_payload='"$500"\n', external_user_id="é"),
            '{"operationId":"a/b","operationPayload":"\\"$500\\"\\n","externalUserId":"é"}',
        ),
        (NewOperation(operation_id="a", operation_payload=""), '{"operationId":"a","operationPayload":""}'),
    ],
    ids=["id", "payload", "external id", "all, awkward", "empty is not absent"],
)
def test_a_create_sends_these_bytes_and_leaves_out_what_is_absent(operation: NewOperation, body: str) -> None:
    request = create_operation("ab", operation)
    assert (request.endpoint, request.path) == (POST_OPERATION, "/v2/users/AB/operations")
    assert request.body == body.encode()


@pytest.mark.parametrize("operation_id", [None, "a"])
def test_attempts_are_asked_for_by_a_get_without_a_body(operation_id: str | None) -> None:
    query = "" if operation_id is None else "operationId=a"
    assert get_authentications("ab", operation_id) == Request(
        GET_AUTHENTICATIONS, "/v2/users/AB/authentications", None, query
    )
    assert get_external_authentications("Ann", operation_id) == Request(
        GET_EXTERNAL_AUTHENTICATIONS, "/v2/external-users/Ann/authentications", None, query
    )


def test_only_the_lists_may_be_large() -> None:
    assert {name: endpoint.max_body for name, endpoint in ENDPOINTS.items()} == {
        "operation": 1 << 20,
        "pending": 16 << 20,
        "create": 1 << 20,
        "attempts": 16 << 20,
        "link": 1 << 20,
        "users": 16 << 20,
        "devices": 16 << 20,
        "deletion": 1 << 20,
    }
    methods = ["GET", "GET", "POST", "GET", "POST", "GET", "GET", "DELETE"]
    assert [endpoint.method for endpoint in ENDPOINTS.values()] == methods


def test_a_request_that_names_an_external_user_shows_its_route_alone() -> None:
    request = get_external_authentications("ann@example.com")
    assert request.shown_path == "/v2/external-users/{externalUserId}/authentications"
    assert repr(request) == f"<Request GET {request.shown_path}>"
    assert "ann" not in pretty_repr(request)
    assert get_operation("ann").shown_path == "/v2/operations/ann"


# -- arguments


@pytest.mark.parametrize("text", [1, b"x", ["x"], True])
def test_a_text_that_is_none_is_refused_by_name(text: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^operation_payload must be a string or None, not \w+$"):
        check_text(text, "operation_payload")


def test_a_text_that_json_cannot_carry_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigurationError, match=r"^operation_payload must .* lone surrogate$") as caught:
        check_text("secret\ud800", "operation_payload")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("text", [None, "", "Approve\n\x00 é 😀"])
def test_any_other_text_is_left_alone(text: str | None) -> None:
    assert check_text(text, "operation_payload") == text


@pytest.mark.parametrize(
    ("key", "message"),
    [
        *((None, "no API key: pass api_key or set KEYLESS_API_KEY"), ("", "api_key is empty")),
        *((" \t\r\n", "api_key is empty"), (b"hunter2", "api_key must be a string, not bytes")),
        *((7, "api_key must be a string, not int"), ("hunter2\nX: y", "api_key must be printable ASCII")),
        *(("hunter2\x00", "api_key must be printable ASCII"), ("hunter2\x7f", "api_key must be printable ASCII")),
        *(("hunter2é", "api_key must be printable ASCII"), ("hunter2\u200b", "api_key must be printable ASCII")),
        *(("“hunter2”", "api_key must be printable ASCII"), ("hunter2\ud800", "api_key must be printable ASCII")),
        ("hunter2\thunter2", "api_key must be printable ASCII"),
    ],
)
def test_a_bad_key_is_refused_and_never_shown(key: Any, message: str) -> None:
    refused = read_api_key(key)
    assert isinstance(refused, ConfigurationError)
    assert str(refused).startswith(message)
    assert "hunter2" not in str(refused)
    assert str(refused).isprintable()


@pytest.mark.parametrize("key", ["key", " key", "key\n", "\t key \r\n", "\xa0key\u2003"])
def test_blanks_around_a_key_are_stripped(key: str) -> None:
    assert read_api_key(key) == Secret("key")
    assert read_api_key(f" {KEY} ") == Secret(KEY)


@pytest.mark.parametrize("region", ["EU", "europe", "", None, 1, [], "eu "])
def test_an_unknown_region_is_refused_with_the_known_ones_named(region: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^region must be one of eu, us, latam, sg, not .* base_url$"):
        check_region(region)


@pytest.mark.parametrize("region", list(Region))
def test_every_region_has_an_address_that_is_good_as_a_base_url(region: Region) -> None:
    assert check_region(region.value) is region
    assert check_region(region) is region
    assert check_base_url(ADDRESSES[region]) == ADDRESSES[region]


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://api.keyless.io", "https://api.keyless.io"),
        ("https://api.keyless.io/", "https://api.keyless.io"),
        ("https://api.keyless.io//", "https://api.keyless.io"),
        (" https://api.keyless.io\n", "https://api.keyless.io"),
        ("HTTPS://API.keyless.io:443/X", "https://api.keyless.io/X"),
        ("https://gw.example/keyless", "https://gw.example/keyless"),
        ("https://gw.example/keyless/", "https://gw.example/keyless"),
        ("https://gw.example:8443/a/b...c/.hidden", "https://gw.example:8443/a/b...c/.hidden"),
        ("https://gw.example/a%20b", "https://gw.example/a%20b"),
        ("https://gw.example/v2/keyless", "https://gw.example/v2/keyless"),
        ("https://gw.example/keyless-v2", "https://gw.example/keyless-v2"),
        ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://LOCALHOST:80", "http://localhost"),
        ("http://127.0.0.1:8080/x", "http://127.0.0.1:8080/x"),
        ("http://127.8.8.8", "http://127.8.8.8"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_a_good_base_url_is_written_in_one_way_and_keeps_its_path(url: str, good: str) -> None:
    assert check_base_url(url) == good


BLANKS = "must not contain blanks, control characters or backslashes"
QUERY = "must not contain a query or a fragment"
DOTS = "must not contain '.' or '..' segments"
USERINFO = "must not contain userinfo"
VERSION = "must not end in /v2, since each path of the API begins with it"
HTTPS = "must be https: http would send the API key unencrypted"


def because(message: str, *urls: Any) -> list[tuple[Any, str]]:
    return [(url, message) for url in urls]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        *because("must be a string, not NoneType", None),
        *because("must be a string, not bytes", b"https://api.keyless.io"),
        *because("must be an absolute URL such as https://", "", "api.keyless.io", "//api.keyless.io", "/v2"),
        *because("must be an absolute URL such as https://", "https:api.keyless.io", "https:///v2"),
        *because("is not a valid URL", "https://:443"),
        *because("must be an absolute URL such as https://", "ftp://api.keyless.io", "file:///etc/passwd"),
        *because(HTTPS, "http://api.keyless.io", "http://127.0.0.1.evil.example", "http://localhost.evil.example"),
        *because(HTTPS, "http://127.1", "http://0.0.0.0", "http://10.0.0.1", "http://[::2]"),
        *because("must not contain userinfo; pass the key as api_key", "https://hunter2@api.keyless.io"),
        *because(USERINFO, "https://user:hunter2@api.keyless.io", "https://@api.keyless.io"),
        *because(USERINFO, "http://localhost@evil.example"),
        *because(QUERY, "https://api.keyless.io?key=hunter2", "https://api.keyless.io/?", "https://api.keyless.io#"),
        *because(QUERY, "https://api.keyless.io/#hunter2"),
        *because(DOTS, "https://api.keyless.io/..", "https://api.keyless.io/a/../b", "https://api.keyless.io/."),
        *because(DOTS, "https://api.keyless.io/%2e%2E/b"),
        *because(
            BLANKS, "https://api keyless.io", "https://api.keyless.io/\n/x", "https://api.keyless.io\\@evil.example"
        ),
        *because(
            BLANKS, "https://api.keyless.io\x00", "https://api.keyless.io/\u200b", "https://api.keyless.io/\ud800"
        ),
        *because("is not a valid URL", "https://api.keyless.io:port", "https://api.keyless.io:70000", "https://[::1"),
        *because(f"{VERSION}; write https://", "https://api.keyless.io/v2"),
        *because(f"{VERSION}; write https://gw", "https://gw.example/keyless/v2//"),
    ],
)
def test_a_bad_base_url_is_refused_with_the_reason(url: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_base_url(url)
    assert str(caught.value).startswith(f"base_url {message}")
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).isprintable()


@given(st.text() | st.text(st.sampled_from("https:/@.[]%2eE#?\\ 17localhost")).map(lambda rest: "https://" + rest))
def test_any_base_url_is_accepted_or_a_configuration_error(url: str) -> None:
    try:
        good = check_base_url(url)
    except ConfigurationError:
        return
    parts = urlsplit(good)
    assert parts.scheme in {"http", "https"}
    assert parts.hostname
    assert "@" not in parts.netloc
    assert (parts.query, parts.fragment) == ("", "")


PLAIN_HOST = "must have an unambiguous host"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        # Brackets: urlsplit reads the address in them and drops the rest, yarl raises.
        *because("is not a valid URL", "http://[::1].evil.example", "https://[::1].evil.example"),
        *because("is not a valid URL", "https://[::1].evil.example:443", "http://[::1]evil"),
        *because("is not a valid URL", "http://[::1]\u3002evil.example", "http://evil[::1]", "http://[::1]]"),
        *because("is not a valid URL", "http://[[::1]]", "http://[::1]:80evil", "https://::1]", "https://[:::]"),
        *because("is not a valid URL", "http://[127.0.0.1]"),
        *because(PLAIN_HOST, "https://[v1.evil]"),
        # Zones: urlsplit keeps %25, yarl decodes it.
        *because(PLAIN_HOST, "http://[::1%eth0]", "http://[::1%25eth0]", "https://[fe80::1%25eth0]"),
        *because(PLAIN_HOST, "https://api.keyless.io%2f.evil.example", "https://api.keyless.io%00.evil.example"),
        *because(PLAIN_HOST, "https://api.keyless.io;.evil.example", "https://api.keyless.io,evil.example"),
        *because(PLAIN_HOST, 'https://api.keyless.io".evil.example', "https://*.keyless.io"),
        # IDNA: yarl maps them to names in ASCII, urlsplit leaves them as they are.
        *because(PLAIN_HOST, "http://\uff4cocalhost", "http://\u24dbocalhost", "http://127\u30020\u30020\u30021"),
        *because(PLAIN_HOST, "http://\u2460\u2461\u2466.0.0.1", "https://api\u3002keyless.io"),
        *because(PLAIN_HOST, "https://\u212aeyless.io", "https://b\xfccher.example"),
        *because("is not a valid URL", "https://" + "\xe9" * 60 + ".example"),
        # Labels that say that they encode a name, and encode none.
        *because("is not a valid URL", "https://xn--a.com", "https://api.XN--0.example", "https://xn--.com"),
        *because("is not a valid URL", "https://xn---.com"),
        # Labels that the resolver raises on, and not with an OSError.
        *because(PLAIN_HOST, "https://a..b", "https://.a.b", "https://a.b..", "http://localhost.."),
        *because(PLAIN_HOST, f"https://{'a' * 64}.example"),
        # Ports: yarl takes what int() takes.
        *because(PLAIN_HOST, "https://gw.example:", "https://gw.example:0"),
        *because("is not a valid URL", "https://gw.example:+1", "https://gw.example:-1", "https://gw.example:1_0"),
        *because("is not a valid URL", "https://gw.example:\u0663", "https://gw.example:443:80"),
        # Spellings of 127.0.0.1 and localhost that only a resolver takes for them.
        *because(HTTPS, "http://127.000.000.001", "http://0x7f.0.0.1", "http://2130706433", "http://localhost."),
        *because(HTTPS, "http://127.0.0.1."),
    ],
)
def test_a_host_that_can_be_read_in_two_ways_is_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_base_url(url)
    assert str(caught.value).startswith(f"base_url {message}")


@pytest.mark.parametrize(
    "url",
    [
        *("https://xn--bcher-kva.example", "https://my_gateway.example.", "https://1.2.3.4:65535"),
        *(f"https://{'a' * 63}.example", "https://[::ffff:192.0.2.1]:0443", "http://[0:0:0:0:0:0:0:1]:8080"),
    ],
)
def test_a_host_that_can_be_read_in_one_way_is_good(url: str) -> None:
    assert check_base_url(url) == url


@given(
    st.sampled_from(["http://", "https://"]),
    st.lists(
        st.sampled_from(["[", "]", "::1", ":", "%25", "%", "127.0.0.1", "localhost", ".", "evil", "@", "80", "0", "+"])
        | st.characters(),
        min_size=1,
        max_size=7,
    ).map("".join),
)
@example("http://", "[::1].evil")
@example("https://", "xn--a.com")
def test_the_host_that_is_checked_is_the_one_that_is_connected_to(scheme: str, authority: str) -> None:
    try:
        good = check_base_url(scheme + authority)
    except ConfigurationError:
        return
    connected, checked = URL(good), urlsplit(good)
    assert (connected.raw_host, connected.explicit_port) == (checked.hostname, checked.port) or (
        ip_address(connected.raw_host or "") == ip_address(checked.hostname or "")
    )
    assert (connected.raw_host or "").encode("idna")  # as a resolver does, without an error
    assert connected.host  # as the transport reads it, without an error
    if connected.scheme == "http":
        assert connected.raw_host == "localhost" or ip_address(connected.raw_host or "").is_loopback


# -- statuses


@pytest.mark.parametrize(
    ("status", "kind", "transient"),
    [
        *((100, StatusError, False), (199, StatusError, False), (300, StatusError, False), (301, StatusError, False)),
        *((302, StatusError, False), (304, StatusError, False), (307, StatusError, False), (399, StatusError, False)),
        *((400, BadRequestError, False), (401, AuthenticationError, False), (402, StatusError, False)),
        *((403, PermissionDeniedError, False), (404, NotFoundError, False), (405, StatusError, False)),
        *((406, NotAcceptableError, False), (407, StatusError, False), (408, StatusError, True)),
        *((409, ConflictStatusError, False), (410, StatusError, False), (413, StatusError, False)),
        *((415, UnsupportedMediaTypeError, False), (418, StatusError, False), (421, StatusError, False)),
        *((425, StatusError, True), (429, RateLimitError, True), (451, StatusError, False), (499, StatusError, False)),
        *((500, ServerError, True), (501, ServerError, True), (502, ServerError, True), (503, ServerError, True)),
        *((504, ServerError, True), (520, ServerError, True), (599, ServerError, True), (600, StatusError, False)),
        (999, StatusError, False),
    ],
)
def test_a_status_is_this_error_and_passes_or_not(status: int, kind: type[StatusError], transient: bool) -> None:
    for name, endpoint in ENDPOINTS.items():
        with pytest.raises(StatusError) as caught:
            answered(status, GOOD[name], name=name)  # a good body makes no bad status good
        assert type(caught.value) is kind
        assert caught.value.is_transient is transient
        assert pickle.loads(pickle.dumps(caught.value)).is_transient is transient  # noqa: S301  # our own
        assert (caught.value.status, caught.value.path) == (status, PATH)
        assert caught.value.method == endpoint.method
        assert str(caught.value).startswith(f"{endpoint.method} {PATH} answered {status}: ")


# -- what an error says about its body


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        *((b"", None), (b" \r\n\t", None), (b"\x00\x01", None)),
        *((b'{"error": "no such user"}', '{"error": "no such user"}'), (b"two\r\n  lines", "two lines")),
        *((PAGE, PAGE.decode()), (b"a\x00b\x1b[31m\xe2\x80\xaec", "a b [31m c"), (b"\xff\xfe", "��")),
        *(("é😀".encode(), "é😀"), (b"x" * 201, "x" * 200), ("é".encode() * (1 << 19), "é" * 200)),
    ],
)
def test_detail_is_two_hundred_printable_characters_of_the_body(body: bytes, detail: str | None) -> None:
    error = failed(500, body)
    assert error.detail == detail
    assert detail is None or detail not in str(error)


def echoes(key: str) -> dict[str, str]:
    """Spell a key in the ways in which services and gateways quote what they were sent."""
    in_json = json.dumps(key)[1:-1]
    percent = quote(key, safe="")
    return {
        "raw": key,
        "JSON": in_json,
        "JSON with slashes": in_json.replace("/", "\\/"),
        "JSON for HTML": in_json.replace("<", "\\u003c").replace(">", "\\u003E").replace("&", "\\u0026"),
        "JSON for all": "".join(c if c.isalnum() else f"\\u{ord(c):04X}" for c in key),
        "URL": percent,
        "URL in lower case": "".join(c if c.isalnum() else quote(c, safe="").lower() for c in key),
        "URL path": quote(key),
        "form": quote_plus(key),
        "HTML": html.escape(key),
        "HTML, no quotes": html.escape(key, quote=False),
        "HTML in decimals": "".join(c if c.isalnum() else f"&#{ord(c)};" for c in key),
        "HTML in hex": "".join(c if c.isalnum() else f"&#x{ord(c):02X};" for c in key),
        "XML": html.escape(key).replace("&#x27;", "&apos;"),
    }


@pytest.mark.parametrize("form", list(echoes(KEY)))
def test_the_key_is_struck_out_in_every_form_in_which_it_may_be_echoed(form: str) -> None:
    echo = echoes(KEY)[form]
    assert failed(401, f"bad key {echo}, sorry: {echo}".encode()).detail == "bad key ***, sorry: ***"


@pytest.mark.parametrize("form", list(echoes(KEY)))
def test_the_key_is_struck_out_of_the_request_id_too(form: str) -> None:
    echo = echoes(KEY)[form]
    assert failed(401, headers={"X-Request-Id": f"id-{echo}"}).request_id == "id-***"
    with pytest.raises(NotJsonError) as caught:
        answered(200, PAGE, {"X-Request-Id": f"id-{echo}"})
    assert caught.value.request_id == "id-***"


@pytest.mark.parametrize("form", list(echoes(KEY)))
def test_no_half_of_the_key_is_left_by_the_cut(form: str) -> None:
    echo = echoes(KEY)[form]
    for before in range(100, MAX_DETAIL + 3):
        detail = failed(401, ("." * before + echo).encode()).detail
        assert detail == ("." * before + "***")[:MAX_DETAIL]
    assert failed(401, (echo * 500).encode()).detail == ("***" * 500)[:MAX_DETAIL]


OPTIONAL = {"externalUserId": "ann", "operationPayload": "Pay", "authType": "biom"}
TEXTS: dict[str, Any] = {  # an answer of each endpoint that answers texts
    "operation": WIRE | OPTIONAL,
    "pending": {"operationId": "a"} | OPTIONAL,
    "attempts": json.loads(GOOD["attempts"])["content"][0]["authentications"][0],
    "link": json.loads(GOOD["link"]),
    "users": json.loads(GOOD["users"])[0],
    "devices": json.loads(GOOD["devices"])[0],
}


def with_texts(name: str, texts: dict[str, Any]) -> bytes:
    bodies: dict[str, Any] = {
        "operation": texts,
        "pending": [{"operationId": "b"}, texts],
        "attempts": {"content": [{"authentications": [{}, texts]}]},
        "link": texts,
        "users": [texts],
        "devices": [texts],
    }
    return json.dumps(bodies[name]).encode()


@pytest.mark.parametrize("form", list(echoes(KEY)))
@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_that_repeats_the_key_is_refused_and_not_shown(name: str, form: str) -> None:
    echo = echoes(KEY)[form]
    for field, text in TEXTS[name].items():
        if isinstance(text, str) and field != "apiKey":
            error = undecoded(with_texts(name, TEXTS[name] | {field: f"v1 {echo}!"}), name)
            assert type(error) is DecodeError
            assert not error.is_transient
            assert str(error).endswith("with JSON of another shape: it repeats the API key; check base_url or upgrade")
            assert error.__context__ is error.__cause__ is None


def test_an_answer_that_repeats_the_key_in_escapes_alone_is_refused() -> None:
    body = with_texts("operation", WIRE | {"operationId": "?"})
    escapes = "".join(f"\\u{ord(character):04x}" for character in KEY)
    assert "it repeats the API key" in str(undecoded(body.replace(b"?", escapes.encode())))


def test_the_sdk_key_may_be_the_same_key() -> None:
    assert answered(200, with_texts("operation", WIRE | {"apiKey": KEY})).api_key == Secret(KEY)


def test_a_key_that_is_a_placeholder_may_be_in_an_answer_by_chance() -> None:
    body = with_texts("operation", WIRE | {"operationId": "test-key-1"})
    assert answered(200, body, key="test-ke").operation_id == "test-key-1"
    with pytest.raises(DecodeError, match="repeats the API key"):
        answered(200, body, key="test-key")


def test_a_key_with_blanks_is_struck_out_where_lines_were_folded() -> None:
    assert failed(401, b"bad key a \r\n b!", key="a  b").detail == "bad key ***!"
    assert failed(401, b"bad key a%20%20b!", key="a  b").detail == "bad key ***!"


def test_a_key_without_letters_and_digits_is_not_shown_either() -> None:
    key = "+/+/+/+/"
    assert failed(401, f"bad key {key}!".encode(), key=key).detail == "bad key ***!"
    with pytest.raises(DecodeError, match="repeats the API key"):
        answered(200, with_texts("operation", WIRE | {"operationId": key}), key=key)


def test_what_only_resembles_the_key_stays() -> None:
    assert failed(401, b"a&amp;b a+b aXb", key="a/b").detail == "a&amp;b a+b aXb"
    assert failed(401, b"aXb a.b", key="a.b").detail == "aXb ***"
    assert failed(401, b"ABC abc", key="abc").detail == "ABC ***"


keys = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=4, max_size=40)


@given(keys, st.text(max_size=300), st.text(max_size=300), st.data())
def test_no_key_is_ever_in_a_detail_or_a_request_id(key: str, before: str, after: str, data: st.DataObject) -> None:
    echo = data.draw(st.sampled_from(sorted(echoes(key).values())))
    text = (before + echo + after).encode("utf-8", "replace")
    error = failed(401, text, {"X-Request-Id": before + echo + after}, key=key)
    for shown in (error.detail, error.request_id):
        assert shown is None or (len(shown) <= MAX_DETAIL and shown.isprintable())
        if "*" not in key:  # else the stars themselves may spell it
            assert shown is None or (key not in shown and echo not in shown)
    assert key not in str(error) or key in str(failed(401))


@pytest.mark.parametrize(
    ("headers", "request_id"),
    [
        *(({}, None), ({"X-Request-Id": ""}, None), ({"X-Request-Id": "a"}, "a"), ({"X-Correlation-Id": "b"}, "b")),
        *(({"X-Amzn-RequestId": "c"}, "c"), ({"X-Amzn-Trace-Id": "Root=1-d"}, "Root=1-d"), ({"CF-Ray": "e"}, "e")),
        *(({"CF-Ray": "e", "X-Request-Id": "a"}, "a"), ({"X-Request-Id": "", "CF-Ray": "e"}, "e")),
        *(({"X-Request-Id": "a\tb\x1b\udcff"}, "a b"), ({"X-Request-Id": "x" * 1000}, "x" * 200)),
    ],
)
def test_the_id_of_the_exchange_is_found_in_the_usual_headers(headers: dict[str, str], request_id: str | None) -> None:
    assert failed(500, headers=headers).request_id == request_id
    assert undecoded(PAGE, **headers).request_id == request_id


# -- Age


@pytest.mark.parametrize(("status", "body"), [(200, json.dumps(WIRE | {"state": "pending"}).encode()), (404, b"")])
@pytest.mark.parametrize(
    ("age", "is_old"),
    [
        *(("0", False), ("1", False), ("2", True), (" 120 ", True), ("120, 0", True), ("0, 120", False)),
        *(("soon", False), ("-5", False), ("", False), ("9" * 5000, True)),
    ],
)
def test_what_a_cache_stored_over_a_second_ago_does_not_say_that_there_is_no_approval(
    status: int, body: bytes, age: str, is_old: bool
) -> None:
    with pytest.raises(CachedAnswerError) if is_old else suppress(NotFoundError):
        answered(status, body, {"Age": age})


def test_an_approval_and_what_is_no_answer_about_an_operation_count_whatever_their_age() -> None:
    old = {"Age": "120"}
    assert answered(200, GOOD["operation"], old).is_approved
    assert answered(200, GOOD["pending"], old, name="pending")
    assert type(failed(503, headers=old)) is ServerError
    with pytest.raises(NotFoundError):
        answered(404, b"", old, name="devices")
    with pytest.raises(NotJsonError):
        answered(200, PAGE, old)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "a cache with what it stored 120 s ago; let it store nothing of this API"),
        ({"Via": f"1.1 varnish {KEY}\x00"}, "a cache (Via: 1.1 varnish ***) with what it stored 120 s ago; let"),
    ],
)
def test_the_error_names_the_cache(headers: dict[str, str], words: str) -> None:
    with pytest.raises(CachedAnswerError) as caught:
        answered(404, b"", {"Age": "120", **headers})
    assert str(caught.value).startswith(f"GET {PATH} was answered by {words}")


# -- Retry-After

NOW = "Tue, 24 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("0", 0.0), ("120", 120.0), (" 7 ", 7.0), ("1.5", 1.5), ("007", 7.0), ("999999999999999", 999999999999999.0)),
        *(("9" * 5000, None), ("-5", None), ("+5", None), ("1e3", None), ("inf", None), ("nan", None), ("1,5", None)),
        *(("\u0665", None), ("soon", None), ("", None), (",", None), ("Tue, 24 Nov 2026 12:01:40 GMT", 100.0)),
        *(("Tuesday, 24-Nov-26 12:01:40 GMT", 100.0), ("Tue, 24 Nov 2026 14:01:40 +0200", 100.0)),
        *(("Tue, 24 Nov 2026 12:01:40 -0000", 100.0), ("Tue, 24 Nov 2026 11:00:00 GMT", 0.0)),
        *(("Mon, 01 Jan 0001 00:00:00 GMT", 0.0), ("Tue, 31 Feb 2026 12:00:00 GMT", None)),
        *(("Tue, 24 Nov 2026 99:00:00 GMT", None), ("Tue, 24 Nov 99999 12:00:00 GMT", None)),
        ("Tue, 24 Nov 2026 12:00:00 +9999999", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_by_the_servers_own_clock(text: str, seconds: float | None) -> None:
    assert retry_after({"Retry-After": text, "Date": NOW}) == seconds
    assert failed(503, headers={"Retry-After": text, "Date": NOW}).retry_after == seconds


@pytest.mark.parametrize("headers", [{}, {"Date": "garbage"}, {"Date": ""}])
def test_a_date_with_no_date_to_compare_it_with_counts_from_this_machines_clock(headers: dict[str, str]) -> None:
    got = retry_after({"Retry-After": formatdate(time.time() + 100, usegmt=True), **headers})
    assert got is not None
    assert 90 < got <= 100


def test_a_date_without_a_zone_is_utc_in_every_local_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "FAR-9")
    time.tzset()
    try:
        assert retry_after({"Retry-After": "Tue, 24 Nov 2026 12:01:40 -0000", "Date": NOW}) == 100.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_no_retry_after_is_none() -> None:
    assert retry_after({}) is None
    assert failed(503, headers={"Date": NOW}).retry_after is None


dates = st.lists(
    st.sampled_from(
        ["Tue,", "Tue", "24", "Nov", "2026", "0", "99999", "12:00:00", "12", "25:61", "GMT", "+2500", "-", ","]
    )
).map(" ".join)


@given(st.text() | dates, st.none() | st.text() | dates)
def test_no_retry_after_raises_or_is_negative(text: str, date: str | None) -> None:
    got = retry_after({"Retry-After": text} | ({} if date is None else {"Date": date}))
    assert got is None or (got >= 0 and math.isfinite(got))


# -- good answers


def test_the_good_answers_are_decoded() -> None:
    operation = answered(200, GOOD["operation"])
    assert isinstance(operation, Operation)
    assert (operation.operation_id, operation.is_approved) == ("txn-1", True)
    assert operation.api_key == Secret("sdk-key-0123456789")
    assert answered(200, GOOD["pending"], name="pending") == [
        PendingOperation(operation_id="a", operation_payload="b"),
        PendingOperation(operation_id="c"),
    ]
    assert answered(200, b"[]", name="pending") == []
    assert answered(200, GOOD["create"], name="create") == SuccessAnswer(success=True)
    [attempt] = answered(200, GOOD["attempts"], name="attempts").attempts
    assert attempt == Authentication(
        created_at="2025-05-21T10:34:00.000",
        result="APPROVED",
        error_code=0,
        operation_id="op-789",
        device_id="device-abc",
        auth_type="biom",
    )


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ("{}", Authentication()),
        ('{"errorCode": null, "result": null, "createdAt": null}', Authentication()),
        ('{"errorCode": 30004, "new": {"a": 1}}', Authentication(error_code=30004)),
        ('{"errorCode": "30004"}', Authentication(error_code=30004)),
        ('{"errorCode": 3.0004e4, "authType": "iris"}', Authentication(error_code=30004, auth_type="iris")),
        ('{"errorCode": -1, "result": ""}', Authentication(error_code=-1, result="")),
    ],
)
def test_any_field_of_an_attempt_may_be_missing(attempt: str, expected: Authentication) -> None:
    body = f'{{"content": [{{"authentications": [{attempt}]}}]}}'.encode()
    assert answered(200, body, name="attempts").attempts == (expected,)


@pytest.mark.parametrize(
    ("page", "truncated"),
    [
        *(("", False), (', "page": null', False), (', "page": {}', False)),
        *((', "page": {"number": 0, "totalPages": 0}', False), (', "page": {"number": 0, "totalPages": 1}', False)),
        *((', "page": {"number": 0, "totalPages": 2}', True), (', "page": {"totalPages": 2}', True)),
        (', "page": {"number": 1, "totalPages": 2}', False),
    ],
)
def test_attempts_are_truncated_where_there_are_more_pages(page: str, truncated: bool) -> None:
    got = answered(200, f'{{"content": []{page}}}'.encode(), name="attempts")
    assert got == Authentications(truncated=truncated)


def test_attempts_of_several_entries_are_joined() -> None:
    body = b'{"content": [{"authentications": [{"errorCode": 1}]}, {"authentications": [{"errorCode": 2}]}]}'
    assert [attempt.error_code for attempt in answered(200, body, name="attempts").attempts] == [1, 2]


@every_endpoint
def test_a_success_is_read_with_any_content_type_and_blanks_around_it(name: str) -> None:
    answered(200, GOOD[name], {"Content-Type": "text/plain"}, name=name)
    answered(200, b"\r\n " + GOOD[name] + b" \n", name=name)


def test_201_is_a_success_of_a_create_alone() -> None:
    assert answered(201, GOOD["create"], name="create") == SuccessAnswer(success=True)
    assert answered(201, GOOD["link"], name="link").external_user_id == "text"
    for name in ENDPOINTS.keys() - {"create", "link"}:
        with pytest.raises(StatusError) as caught:
            answered(201, GOOD[name], name=name)
        assert caught.value.status == 201


@every_endpoint
@pytest.mark.parametrize("status", [202, 203, 204, 206, 207, 226, 299])
def test_no_other_2xx_is_a_success(name: str, status: int) -> None:
    with pytest.raises(StatusError, match="a success that the API does not document") as caught:
        answered(status, GOOD[name], name=name)
    assert type(caught.value) is StatusError
    assert not caught.value.is_transient


TWICE = [
    b'"result": false, "result": true',
    b'"result": true, "result": true',
    b'"result": true, "r\\u0065sult": true',
    b'"result": true, "new": {"a": 1, "a": 2}',
]


@pytest.mark.parametrize("fields", TWICE)
def test_an_approval_with_a_key_that_occurs_twice_is_none(fields: bytes) -> None:
    error = undecoded(GOOD["operation"].replace(b'"result": true', fields))
    assert type(error) is DecodeError
    assert "with JSON of another shape: an object has the same key twice; check" in str(error)


@pytest.mark.parametrize("body", [b'{"success": false, "success": true}', b'{"success": true, "success": true}'])
def test_a_confirmation_with_a_key_that_occurs_twice_is_none(body: bytes) -> None:
    assert type(undecoded(body, "create")) is DecodeError


def test_a_pending_answer_may_have_a_key_twice_since_it_approves_nothing() -> None:
    twice = GOOD["operation"][:-1] + b', "state": "pending"}'
    assert answered(200, twice).state == "pending"


@pytest.mark.parametrize("value", ["1", "1.0", "-1", "1e3", "0.5", "123456789012345678901234567890", "null", '"1"'])
@pytest.mark.parametrize("name", ["id", "timestamp", "nodeId"])
def test_what_decides_nothing_is_any_number_or_text_or_none(name: str, value: str) -> None:
    got = answered(200, json.dumps(WIRE | {name: json.loads(value)}).encode())
    assert got.is_approved
    assert {got.id, got.timestamp, got.node_id} >= {json.loads(value)}


@pytest.mark.parametrize("value", [True, [], {}])
@pytest.mark.parametrize("name", ["id", "timestamp", "nodeId"])
def test_what_decides_nothing_is_nothing_else(name: str, value: object) -> None:
    undecoded(json.dumps(WIRE | {name: value}).encode())


@pytest.mark.parametrize("state", ["approved", "pending"])
@pytest.mark.parametrize("key", ["null", None])
def test_an_answer_need_not_carry_the_sdk_key(key: str | None, state: str) -> None:
    wire = {name: value for name, value in WIRE.items() if name != "apiKey"} | {"state": state}
    body = json.dumps(wire | ({} if key is None else {"apiKey": None})).encode()
    got = answered(200, body)
    assert got.api_key is None
    assert (got.state, got.result) == (state, True)


def test_pairs_of_surrogates_are_text() -> None:
    body = GOOD["operation"].replace(b'"nodeId": "text"', b'"nodeId": "\\ud83d\\ude00"')
    assert answered(200, body).node_id == "😀"


# -- 2xx that are none


def deep(opening: bytes) -> bytes:
    return opening * 100_000


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" \n", PAGE, b"OK", b"\xff\xfe\x00", b"{", b"[", b"[{", b'{"success": true', b'{"success": true}}'),
        *(b"[1, <html>", b"nul", b"NaN", b"[NaN]", b'{"success": NaN}', b'[{"operationId": -Infinity}]', b"'single'"),
        *(b'{"operationId": "\xff"}', b'[{"operationId": "\xff"}]', b'[{"operationId": "\xed\xa0\x80"}]'),
        *(b'["\\ud800"]', b'{"success": true, "success": tru}', deep(b"["), deep(b'{"a":'), deep(b'{"success":[')),
        *(deep(b"[[") + b"1" + b"]]" * 100_000, b"\xef\xbb\xbf{}", b"\x1f\x8b\x08"),
    ],
)
def test_a_2xx_that_is_not_json_is_distinguished_from_json_of_another_shape(body: bytes) -> None:
    for name, endpoint in ENDPOINTS.items():
        error = undecoded(body, name)
        assert type(error) is NotJsonError
        assert error.is_transient
        assert str(error).startswith(f"{endpoint.method} {PATH} answered 200 with ")
        assert ("an empty body" in str(error)) is (not body.strip())
        assert str(error).isprintable()
        assert "nginx" not in str(error)


def test_a_good_answer_with_a_bottomless_field_is_not_json() -> None:
    assert type(undecoded(GOOD["operation"][:-1] + b', "new": ' + deep(b"["))) is NotJsonError


@pytest.mark.parametrize("name", ["operation", "pending", "attempts"])
def test_a_body_cut_anywhere_is_not_json(name: str) -> None:
    for length in range(len(GOOD[name])):
        assert type(undecoded(GOOD[name][:length], name)) is NotJsonError


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("operation", b"{}", "Object missing required field `userId`"),
        ("operation", b"[]", "Expected `object`, got `array`"),
        ("operation", b'{"error": "hunter2"}', "Object missing required field `userId`"),
        ("operation", GOOD["operation"].replace(b"true", b'"hunter2"'), "Expected `bool`, got `str` - at `$.result`"),
        ("operation", GOOD["operation"].replace(b"true", b"null"), "Expected `bool`, got `null` - at `$.result`"),
        ("operation", GOOD["operation"].replace(b'"approved"', b"7"), "Expected `str`, got `int` - at `$.state`"),
        (
            "operation",
            GOOD["operation"].replace(b'"sdk-key-0123456789"', b'["hunter2"]'),
            "Expected `str`, got `list` - at `$.apiKey`",
        ),
        ("pending", b"{}", "Expected `array`, got `object`"),
        ("pending", b'[{"operationId": "a"}, {}]', "Object missing required field `operationId` - at `$[1]`"),
        ("pending", b'[{"operationId": null}]', "Expected `str`, got `null` - at `$[0].operationId`"),
        ("attempts", b"[]", "Expected `object`, got `array`"),
        ("attempts", b'{"error": "hunter2"}', "Object missing required field `content`"),
        ("attempts", b'{"content": [{}]}', "Object missing required field `authentications` - at `$.content[0]`"),
        (
            "attempts",
            b'{"content": [{"authentications": [{"errorCode": "hunter2"}]}]}',
            "Expected `int | null`, got `str` - at `$.content[0].authentications[0].errorCode`",
        ),
        ("create", b"{}", "Object missing required field `success`"),
        ("create", b'{"success": "true"}', "Expected `bool`, got `str` - at `$.success`"),
        ("create", b'{"success": 1}', "Expected `bool`, got `int` - at `$.success`"),
        ("create", b"true", "Expected `object`, got `bool`"),
    ],
)
def test_json_of_another_shape_says_where_it_differs_and_shows_no_value(name: str, body: bytes, reason: str) -> None:
    error = undecoded(body, name)
    assert type(error) is DecodeError
    assert not error.is_transient
    method = ENDPOINTS[name].method
    assert str(error) == f"{method} {PATH} answered 200 with JSON of another shape: {reason}; check base_url or upgrade"
    assert (error.status, error.method, error.path) == (200, method, PATH)


def test_an_error_keeps_no_body_alive_in_its_cause() -> None:
    for error in (undecoded(PAGE), undecoded(b"{}"), failed(500, PAGE)):
        assert error.__cause__ is None
        assert error.__context__ is None


# -- whatever comes

fields = st.fixed_dictionaries(
    {},
    optional={
        name: st.just(value) | st.none() | st.text() | st.integers() | st.booleans() | st.floats()
        for name, value in {**WIRE, "success": True, "operationPayload": "p"}.items()
    },
)
bodies = (
    st.binary()
    | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text() | fields, st.lists, max_leaves=6).map(
        lambda value: json.dumps(value).encode()
    )
    | st.builds(
        lambda body, cut, junk: body[:cut] + junk,
        st.sampled_from(list(GOOD.values())),
        st.integers(0, 250),
        st.binary(),
    )
)
headers_of_any_kind = st.dictionaries(
    st.sampled_from(["Retry-After", "Date", "X-Request-Id", "CF-Ray"]), st.text() | dates, max_size=3
)


@every_endpoint
@given(status=st.integers(100, 599) | st.integers() | st.just(200), headers=headers_of_any_kind, body=bodies)
@example(status=200, headers={}, body=deep(b"["))
@example(status=200, headers={}, body=b'{"id": ' + b"1" * 5000)
@example(status=200, headers={}, body=GOOD["operation"].replace(b"1,", b"1" * 5000 + b",", 1))
@example(status=500, headers={}, body=deep(b"["))
def test_no_answer_raises_anything_but_the_two_documented_roots(
    name: str, status: int, headers: dict[str, str], body: bytes
) -> None:
    got: object
    try:
        got = answered(status, body, headers, name=name)
    except (DecodeError, StatusError) as error:
        got = error
    assert isinstance(got, StatusError) is (status not in ({200, 201} if name in {"create", "link"} else {200}))
    assert isinstance(got, KeylessError | Operation | SuccessAnswer | ExternalUser | list | None)
    if isinstance(got, KeylessError):
        assert str(got).isprintable()
    if isinstance(got, StatusError):
        assert got.retry_after is None or got.retry_after >= 0
        assert got.detail is None or (len(got.detail) <= MAX_DETAIL and got.detail.isprintable())


# What error reporters print


def test_neither_a_request_nor_an_answer_shows_its_body() -> None:
    request = create_operation("c0ffee", NewOperation(operation_id="txn-1", operation_payload="Pay 40"))
    answer = RawAnswer(200, {}, GOOD["operation"])
    assert repr(request) == "<Request POST /v2/users/C0FFEE/operations>"
    assert pretty_repr(request) == "Request(path='/v2/users/C0FFEE/operations')"
    assert repr(answer) == f"<RawAnswer 200, {len(answer.body)} bytes>"
    assert pretty_repr(answer) == f"RawAnswer(status=200, size={len(answer.body)})"
