"""Outcomes for other systems: webhooks, Keycloak and SQL, each with the other side as its own pages say."""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
import re
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from factors import ApprovingSandbox
from postgres_server import shared_server
from signing import rsa_jwk, rsa_key, sign_rs256, token, with_changes
from standardwebhooks import Webhook, WebhookVerificationError
from waiting import until

from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker, submit_approval
from aiokeyless.worker.sqlite import SqliteBroker

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "outcomes"
sys.path.insert(0, str(EXAMPLE))
import keycloak  # noqa: E402  # from the folder of the example
import webhooks  # noqa: E402

sys.path.remove(str(EXAMPLE))

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiokeyless import ApprovalTicket

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # 24 bytes


class Receiver:
    """Somebody's server: it keeps what it verified by the reference library, and answers as a test says."""

    def __init__(self, *answers: int) -> None:
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.answers = list(answers)

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.text()
        event: dict[str, Any] = Webhook(SECRET).verify(body, dict(request.headers))  # also checks the time
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body.replace("approved", "failed"), dict(request.headers))
        self.received.append((request.headers["webhook-id"], event))
        status = self.answers.pop(0) if self.answers else 204
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status == 302 else {})


async def test_an_outcome_is_a_signed_webhook_and_is_sent_again_until_it_is_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = Receiver(500, 302)
    app = web.Application()
    app.router.add_post("/hook", receiver.receive)
    file = tmp_path / "keyless.db"
    async with (
        TestServer(app) as server,
        ApprovingSandbox("biom") as sandbox,
        sandbox.client() as client,
        SqliteBroker(file) as broker,
        ApprovalWorker(client, f"sqlite:{file}"),
    ):
        monkeypatch.setenv("KEYLESS_FILE", str(file))
        monkeypatch.setenv("WEBHOOK_URL", str(server.make_url("/hook")))
        monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
        sending = asyncio.create_task(webhooks.main())
        await submit_approval(broker, "C0FFEE", operation_id="order-7", operation_payload="Pay 40 to Alice")
        await until(lambda: len(receiver.received) == 3)
        await submit_approval(broker, "C0FFEE", operation_id="order-8")
        await until(lambda: len(receiver.received) == 4)
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
    names, events = zip(*receiver.received, strict=True)
    assert len({*names[:3]}) == 1
    assert names[3] != names[0]
    assert all("." not in name for name in names)  # the separator of what is signed
    assert [event["data"]["operation_id"] for event in events] == ["order-7"] * 3 + ["order-8"]
    assert {event["type"] for event in events} == {"approval.approved"}


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        SECRET + "\n",
        SECRET.replace("9", "-"),
        SECRET[:-1],
        "whsec_" + "change me please, now: " * 2,
    ],
    ids=["empty", "no key", "short", "line break", "another alphabet", "cut off", "words"],
)
async def test_a_secret_that_anybody_could_guess_or_that_is_mistyped_signs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("KEYLESS_FILE", str(tmp_path / "keyless.db"))
    monkeypatch.setenv("WEBHOOK_URL", "http://127.0.0.1:1/hook")
    monkeypatch.setenv("WEBHOOK_SECRET", secret)
    async with SqliteBroker(tmp_path / "keyless.db"):
        with pytest.raises(ValueError, match=r"(?i)base64|padding"):
            await webhooks.main()


# -- Keycloak's side, as its Server Administration Guide has it

CALLBACK = "/realms/shop/protocol/openid-connect/ext/ciba/auth/callback"


class Keycloak:
    """The realm "shop": it delegates logins, and takes one result for each bearer token that it gave out."""

    channel: TestClient[web.Request, web.Application]

    def __init__(self) -> None:
        self.results: dict[str, list[Any]] = {}
        self.status = 200
        app = web.Application()
        app.router.add_post(CALLBACK, self.take_result)
        app.router.add_get("/realms/shop/protocol/openid-connect/certs", self.show_keys)
        self.server = TestServer(app)

    async def show_keys(self, _request: web.Request) -> web.Response:
        return web.json_response({"keys": [rsa_jwk(use="enc", alg="RSA-OAEP", kid="e1"), rsa_jwk()]})

    def signed(self, token: str, **changes: Any) -> str:
        """Return a token of this name as Keycloak makes it."""
        issuer = os.environ["KEYCLOAK_REALM"]
        claims = {"iss": issuer, "aud": issuer, "azp": "fern", "jti": token, "exp": time.time() + 120, "typ": "Bearer"}
        return jwt.encode(claims | changes, rsa_key(), "RS256", {"kid": "r1"})

    async def delegate(self, user: str = "alice", token: str = "token", **changes: Any) -> int:  # noqa: S107  # no secret
        """Delegate a login of the client "fern"."""
        self.results[token] = []
        return await self.post(f"Bearer {self.signed(token)}", login_hint=user, **changes)

    async def post(self, authorization: str, **changes: Any) -> int:
        body = {
            "scope": "openid email offline_access email",  # as the client asked, and its default ones
            "login_hint": "alice",
            "is_consent_required": False,
            "binding_message": "W4SCT",
        }
        headers = {"Authorization": authorization}
        async with self.channel.post("/delegate", json=body | changes, headers=headers) as answer:
            return answer.status

    async def take_result(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/json"
        bearer = request.headers["Authorization"].removeprefix("Bearer ")
        token = jwt.decode(bearer, options={"verify_signature": False})["jti"]
        self.results[token].append((await request.json())["status"])
        return web.Response(status=self.status if len(self.results[token]) == 1 else 403)

    async def gets(self, status: str, token: str = "token") -> None:  # noqa: S107
        await until(lambda: self.results[token] == [status])


@asynccontextmanager
async def delegating(sandbox: Sandbox) -> AsyncGenerator[Keycloak]:
    """Run a realm, and the channel to which it delegates logins."""
    realm = Keycloak()
    async with sandbox, realm.server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KEYLESS_BASE_URL", sandbox.url)
            patch.setenv("KEYLESS_API_KEY", sandbox.api_key)
            patch.setenv("KEYCLOAK_REALM", str(realm.server.make_url("/realms/shop")))
            async with TestClient(TestServer(keycloak.make_app())) as realm.channel:
                yield realm


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("sandbox", "status"),
    [(ApprovingSandbox("biom"), "SUCCEED"), (ApprovingSandbox("pin"), "UNAUTHORIZED"), (Sandbox(), "UNAUTHORIZED")],
    ids=["face", "pin", "nobody"],
)
async def test_keycloak_gets_the_result_of_a_login_once(sandbox: Sandbox, status: str) -> None:
    async with delegating(sandbox) as realm:
        assert await realm.delegate() == 201
        await until(lambda: realm.results["token"] != [])
        [operation] = sandbox.operations.values()
        assert operation.user_id == "C0FFEE"
    assert realm.results == {"token": [status]}


CONSENT = "and allow openid email offline_access"


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("changes", "payload"),
    [
        ({}, "Log in to fern, W4SCT"),
        ({"binding_message": None}, "Log in to fern"),
        ({"is_consent_required": True}, f"Log in to fern, W4SCT, {CONSENT}"),
        ({"is_consent_required": True, "binding_message": None}, f"Log in to fern, {CONSENT}"),
        # A parameter that the client added, and Keycloak passes on after its own
        ({"is_consent_required": "false"}, f"Log in to fern, W4SCT, {CONSENT}"),
    ],
)
async def test_the_user_sees_which_client_wants_the_login_and_each_scope_that_keycloak_stores_a_consent_for(
    changes: dict[str, Any], payload: str
) -> None:
    sandbox = ApprovingSandbox("biom")
    async with delegating(sandbox) as realm:
        assert await realm.delegate(**changes) == 201
        await realm.gets("SUCCEED")
    assert [operation.operation_payload for operation in sandbox.operations.values()] == [payload]


@pytest.mark.looptime
async def test_a_consent_that_cannot_be_shown_is_refused_and_nobody_is_asked() -> None:
    sandbox = Sandbox()
    async with delegating(sandbox) as realm:
        assert await realm.delegate(is_consent_required=True, scope=None) == 201
        await realm.gets("UNAUTHORIZED")
    assert not sandbox.operations


async def test_keycloak_is_refused_a_login_of_an_unknown_user_and_nobody_is_asked() -> None:
    sandbox = Sandbox()
    async with delegating(sandbox) as realm:
        assert await realm.delegate("mallory") == 404
    assert not sandbox.operations


@pytest.mark.looptime
async def test_only_a_token_that_keycloak_signed_for_itself_rings_a_phone() -> None:
    sandbox = Sandbox()
    async with delegating(sandbox) as realm:
        public = rsa_key().public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
        claims = jwt.decode(realm.signed("token"), options={"verify_signature": False})
        head = {"alg": "RS256", "kid": "r1"}
        forged = [
            *("", "token", "e30.e30.", realm.signed("token").rpartition(".")[0] + ".x"),
            *(realm.signed("token", **{name: value}) for name, value in (("aud", "account"), ("iss", "x"), ("exp", 1))),
            token(with_changes(claims, {"exp": ...}), head, sign_rs256),
            token(claims, head, lambda text: sign_rs256(text, rsa_key(2048, "mallory"))),
            token(claims, head | {"kid": "r2"}, sign_rs256),
            token(claims, head | {"alg": "none"}, lambda _: b""),
            token(claims, head | {"alg": "HS256"}, lambda text: hmac.digest(public, text, "sha256")),
        ]
        assert [await realm.post(f"Bearer {each}") for each in forged] == [401] * len(forged)
        assert await realm.delegate() == 201
        await until(lambda: len(sandbox.operations) == 1)
    assert len(sandbox.operations) == 1


async def test_a_server_that_stops_refuses_the_logins_that_wait(capsys: pytest.CaptureFixture[str]) -> None:
    sandbox = Sandbox()
    async with delegating(sandbox) as realm:
        assert await realm.delegate() == 201
        await until(lambda: len(sandbox.operations) == 1)
        await until(lambda: "push to C0FFEE" in capsys.readouterr().out)
    assert realm.results == {"token": ["UNAUTHORIZED"]}


@pytest.mark.looptime
async def test_a_push_that_fails_refuses_its_login_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_ticket: ApprovalTicket) -> None:
        raise OSError("the push service is away")

    monkeypatch.setattr(keycloak, "notify_phone", fail)
    async with delegating(ApprovingSandbox("biom")) as realm:
        for token in ("token-1", "token-2"):
            assert await realm.delegate(token=token) == 201
            await realm.gets("UNAUTHORIZED", token)


@pytest.mark.looptime
async def test_no_log_has_the_bearer_token_of_a_login(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever has it can post that the user has approved."""
    async with delegating(ApprovingSandbox("biom")) as realm:
        realm.status = 400
        assert await realm.delegate(token="s3cret") == 201
        await until(lambda: "did not take the result" in caplog.text)
    assert "s3cret" not in caplog.text


# -- SQL alone

PAGE = ROOT / "docs" / "howto" / "tell-other-systems.md"
STATEMENTS = re.findall(r"^```sql\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
ORDERS = """
CREATE TABLE orders (id text PRIMARY KEY, user_id text, payload text, state text);
INSERT INTO orders VALUES ('order-7', '0123456789ABCDEF', 'Pay 40 EUR to Alice', 'asked');
"""


@pytest.mark.parametrize(("factor", "state"), [("biom", "paid"), ("pin", "not paid")])
async def test_psql_asks_and_pays(factor: str, state: str) -> None:
    server = shared_server()
    database = server.new_database()
    ask, add_reader, pay = STATEMENTS

    async def psql(statement: str) -> list[list[str]]:
        return await asyncio.to_thread(server.execute, statement, database)

    async def is_handled() -> bool:
        await psql(pay)
        return await psql("SELECT state FROM orders") != [["asked"]]

    async with (
        ApprovingSandbox(factor) as sandbox,
        sandbox.client() as client,
        ApprovalWorker(client, server.url(database)),
    ):
        await psql(ORDERS)
        await psql(add_reader)
        assert await psql(ask) == [["f"]]  # it was not there before
        await until(is_handled)
    assert await psql("SELECT state FROM orders") == [[state]]
    assert await psql("SELECT count(*) FROM keyless.unread") == [["0"]]
