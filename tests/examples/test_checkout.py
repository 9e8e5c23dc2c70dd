"""The checkout example as its users have it: a real server in a process of its own, a sandbox, and a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Self

import aiohttp
import pytest
import pytest_asyncio
from chromium import chromium, lose_answers
from example_server import ExampleServer
from waiting import PATIENCE, until

from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from playwright.async_api import Browser, Locator, Page
    from playwright.async_api._generated import LocatorAssertions

    from aiokeyless import Operation

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHOP = Path(__file__).parents[2] / "examples" / "checkout" / "shop.py"
FAULTS: dict[str, Callable[[Sandbox], None]] = {
    "dropped": lambda sandbox: sandbox.drop_next(method="POST"),
    "503": lambda sandbox: sandbox.fail_next(503, method="POST"),
    "a page": lambda sandbox: sandbox.fail_next(200, method="POST", body=b"<html>"),
    "nothing wrong": lambda _sandbox: None,
}


class Backend(ExampleServer):
    """The shop, with its database."""

    def __init__(self, sandbox: Sandbox, folder: Path, *, expires_in: float) -> None:
        self.database = folder / "orders.sqlite3"
        settings = {"CHECKOUT_DB": str(self.database), "CHECKOUT_EXPIRES_IN": str(expires_in)}
        super().__init__(SHOP, sandbox, folder, port="CHECKOUT_PORT", **settings)

    def sql(self, statement: str, *values: str) -> None:
        with contextlib.closing(sqlite3.connect(self.database, isolation_level=None)) as database:
            database.execute(statement, values)

    def kept(self, order_id: str) -> list[str]:
        """Return the digests of the evidence of an order."""
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            query = "SELECT signed_sha256 FROM evidence WHERE order_id = ?"
            return [digest for [digest] in database.execute(query, (order_id,))]

    def shipped(self, order_id: str) -> int:
        """Return how many times an order was shipped."""
        return self.log.read_text().count(f"order {order_id} is paid: ship it")


class Customer:
    """A browser without a screen: the requests that the page makes, and the cookies that it keeps."""

    def __init__(self, backend: Backend, http: aiohttp.ClientSession) -> None:
        self.backend = backend
        self.http = http
        self.order: dict[str, object] = {}

    @property
    def order_id(self) -> str:
        return str(self.order["id"])

    async def post(self, path: str, *, origin: str | None = None) -> tuple[int, dict[str, object]]:
        headers = {"Origin": self.backend.url if origin is None else origin}
        async with self.http.post(f"{self.backend.url}{path}", headers=headers) as answer:
            return answer.status, await answer.json()

    async def open_shop(self, after: str = "") -> Self:
        status, self.order = await self.post(f"/order?after={after}")
        assert status == 200
        return self

    async def pay(self) -> int:
        status, _ = await self.post(f"/order/{self.order_id}/pay")
        return status

    async def follow(self) -> list[dict[str, object]]:
        """Return the news of one stream, once it has ended."""
        return [news async for news in self.news()]

    async def news(self) -> AsyncGenerator[dict[str, object]]:
        async with self.http.get(f"{self.backend.url}/order/{self.order_id}/events") as answer:
            assert answer.status == 200
            assert answer.content_type == "text/event-stream"
            async for line in answer.content:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    async def outcome(self) -> object:
        return (await self.follow())[-1]["state"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyless() -> AsyncGenerator[Sandbox]:
    async with Sandbox() as sandbox:
        yield sandbox


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(keyless: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Backend]:
    async with Backend(keyless, tmp_path_factory.mktemp("shop"), expires_in=90) as backend:
        yield backend


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hasty_backend(keyless: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Backend]:
    """One whose customers have hardly any time: where the final poll says all that a test wants to know."""
    async with Backend(keyless, tmp_path_factory.mktemp("hasty"), expires_in=0.3) as backend:
        yield backend


@pytest_asyncio.fixture(loop_scope="module")
async def http() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        yield session


@pytest_asyncio.fixture(loop_scope="module")
async def customer(backend: Backend, http: aiohttp.ClientSession) -> Customer:
    return await Customer(backend, http).open_shop()


@pytest_asyncio.fixture(loop_scope="module")
async def hasty(hasty_backend: Backend, http: aiohttp.ClientSession) -> Customer:
    return await Customer(hasty_backend, http).open_shop()


def asked(sandbox: Sandbox, user_id: object) -> list[Operation]:
    """Return what a user was asked to approve."""
    return [operation for operation in sandbox.operations.values() if operation.user_id == user_id]


@contextlib.contextmanager
def slow(sandbox: Sandbox, latency: float) -> Iterator[None]:
    """Let answers come late, and begin a new journal."""
    sandbox.latency = latency
    sandbox.requests.clear()
    try:
        yield
    finally:
        sandbox.latency = 0


async def follow_into_the_unknown(sandbox: Sandbox, customer: Customer) -> None:
    """Pay, and follow the order to a deadline at which Keyless cannot be asked."""
    await customer.pay()
    sandbox.fail_next(401, None, method="GET")  # also the final poll, which the deadline may send beside the first
    assert await customer.outcome() == "unknown"
    sandbox.recover()


class TestOverHttp:
    async def test_an_approval_pays_the_order(self, keyless: Sandbox, customer: Customer) -> None:
        assert await customer.pay() == 200
        [operation] = asked(keyless, customer.order["user_id"])
        assert operation.operation_payload == customer.order["payload"]
        assert f"push to the phone of {operation.user_id}: {customer.order_id}\n" in customer.backend.log.read_text()
        states = []
        async for news in customer.news():
            states.append(news["state"])
            keyless.approve(customer.order_id)
        assert states[0] == "waiting"
        assert states[-1] == "paid"
        assert (await customer.open_shop()).order["state"] == "paid"

    async def test_what_the_customer_signed_is_kept_once_as_evidence(self, keyless: Sandbox, hasty: Customer) -> None:
        await hasty.pay()
        keyless.approve(hasty.order_id)
        token = keyless.sign(hasty.order_id)

        async def hand_over(token: str, order_id: str = hasty.order_id) -> tuple[int, str]:
            url = f"{hasty.backend.url}/order/{order_id}/evidence"
            async with hasty.http.post(url, json={"token": token}) as answer:
                return answer.status, str((await answer.json()).get("sha256"))

        assert (await hand_over(keyless.sign(hasty.order_id, tampered=True)))[0] == 422
        assert (await hand_over(keyless.sign(hasty.order_id, claims={"sub": "BAD"})))[0] == 422
        assert (await hand_over(token, "another"))[0] == 404
        assert hasty.backend.kept(hasty.order_id) == []
        first, again = await hand_over(token), await hand_over(token)
        assert first[0] == 200
        assert first == again
        assert hasty.backend.kept(hasty.order_id) == [first[1]]
        assert hasty.backend.shipped(hasty.order_id) == 0, "evidence pays for nothing"
        assert await hasty.outcome() == "paid"
        other = await Customer(hasty.backend, hasty.http).open_shop(after=hasty.order_id)
        assert (await hand_over(token, other.order_id))[0] == 422

    async def test_many_clicks_on_pay_ask_once(self, keyless: Sandbox, hasty: Customer) -> None:
        with slow(keyless, 0.2):
            assert await asyncio.gather(*[hasty.pay() for _ in range(5)]) == [200] * 5
        assert len(asked(keyless, hasty.order["user_id"])) == 1
        keyless.approve(hasty.order_id)
        assert await hasty.outcome() == "paid"
        assert await hasty.pay() == 200
        assert len(asked(keyless, hasty.order["user_id"])) == 1

    async def test_a_crash_before_the_ticket_is_stored_asks_once(self, keyless: Sandbox, hasty: Customer) -> None:
        await hasty.pay()
        hasty.backend.sql("UPDATE orders SET state = 'open', ticket = NULL WHERE id = ?", hasty.order_id)
        assert (await hasty.open_shop()).order["state"] == "open"
        assert await hasty.pay() == 200
        assert len(asked(keyless, hasty.order["user_id"])) == 1
        keyless.approve(hasty.order_id)
        assert await hasty.outcome() == "paid"

    async def test_many_tabs_that_learn_of_one_approval_ship_once(self, keyless: Sandbox, hasty: Customer) -> None:
        await hasty.pay()
        keyless.approve(hasty.order_id)
        with slow(keyless, 0.2):
            assert await asyncio.gather(*[hasty.outcome() for _ in range(5)]) == ["paid"] * 5
        assert await hasty.outcome() == "paid"
        assert hasty.backend.shipped(hasty.order_id) == 1

    @pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
    async def test_an_approval_of_a_question_that_was_never_written_down_ships_once(
        self, keyless: Sandbox, hasty: Customer, fault: Callable[[Sandbox], None]
    ) -> None:
        keyless.fail_next(500, method="POST", stored=True)
        keyless.fail_next(500, 3, method="GET")
        assert await hasty.pay() == 503  # it came through, which could not be found out
        keyless.approve(hasty.order_id)
        fault(keyless)
        assert await asyncio.gather(*[hasty.pay() for _ in range(2)]) == [200, 200]
        assert await hasty.outcome() == "paid"
        assert await hasty.pay() == 200
        assert await hasty.outcome() == "paid"
        assert hasty.backend.shipped(hasty.order_id) == len(asked(keyless, hasty.order["user_id"])) == 1

    async def test_an_approval_after_the_timeout_pays_for_nothing(self, keyless: Sandbox, hasty: Customer) -> None:
        await hasty.pay()
        assert await hasty.outcome() == "timed_out"
        keyless.approve(hasty.order_id)
        assert await hasty.pay() == 200
        assert await hasty.outcome() == (await hasty.open_shop()).order["state"] == "timed_out"
        assert hasty.backend.shipped(hasty.order_id) == 0
        assert len(asked(keyless, hasty.order["user_id"])) == 1

    async def test_pay_that_does_not_get_through_can_be_clicked_again(self, keyless: Sandbox, hasty: Customer) -> None:
        keyless.fail_next(429, method="POST", retry_after=60)
        assert await hasty.pay() == 503
        assert (await hasty.open_shop()).order["state"] == "open"
        assert await hasty.pay() == 200
        assert len(asked(keyless, hasty.order["user_id"])) == 1

    @pytest.mark.parametrize(
        "lie", [{"operation_payload": "Pay 1.00 EUR"}, {"user_id": "BAD0"}, {"auth_type": "pin"}, {"result": False}]
    )
    async def test_an_answer_that_does_not_match_is_refused_for_good(
        self, keyless: Sandbox, hasty: Customer, lie: dict[str, object]
    ) -> None:
        await hasty.pay()
        keyless.approve(hasty.order_id)
        keyless.tamper(hasty.order_id, **lie)
        assert await hasty.outcome() == "refused"
        keyless.tamper(hasty.order_id)
        assert await hasty.outcome() == "refused"

    async def test_an_error_of_ours_pays_nothing_and_loses_nothing(self, keyless: Sandbox, hasty: Customer) -> None:
        await follow_into_the_unknown(keyless, hasty)
        keyless.approve(hasty.order_id)
        assert (await hasty.open_shop()).order["state"] == "unknown"
        assert await hasty.outcome() == "paid"

    async def test_an_order_that_was_started_over_is_not_paid_late(self, keyless: Sandbox, hasty: Customer) -> None:
        await follow_into_the_unknown(keyless, hasty)
        old = hasty.order_id
        new = (await hasty.open_shop(after=old)).order_id
        assert new != old
        assert (await hasty.open_shop(after=old)).order_id == new  # clicked twice
        keyless.approve(old)
        assert await hasty.outcome() == "open"
        _, hasty.order = await hasty.post(f"/order/{old}/pay")
        assert await hasty.outcome() == "cancelled"

    async def test_an_order_that_is_started_over_while_its_approval_comes_in_is_not_paid(
        self, keyless: Sandbox, hasty: Customer
    ) -> None:
        await follow_into_the_unknown(keyless, hasty)
        keyless.approve(hasty.order_id)
        with slow(keyless, 1.2):
            stream = asyncio.create_task(hasty.outcome())
            await until(lambda: bool(keyless.requests))
            await hasty.post(f"/order?after={hasty.order_id}")
            assert await stream == "cancelled"

    @pytest.mark.parametrize("approved", [False, True], ids=["only the declined one", "both"])
    async def test_a_customer_who_declines_and_tries_again_pays_once_and_by_the_new_request_only(
        self, keyless: Sandbox, hasty: Customer, *, approved: bool
    ) -> None:
        await hasty.pay()
        old, payload = hasty.order_id, hasty.order["payload"]
        await hasty.post(f"/order/{old}/decline")
        assert (await hasty.open_shop()).order["state"] == "declined"
        for status, order in await asyncio.gather(*[hasty.post(f"/order/{old}/again") for _ in range(2)]):
            assert (status, order["state"], order["asked"]) == (200, "waiting", 2)
            assert order["payload"] == f"{payload}, request 2"
        keyless.approve(old)
        if approved:
            keyless.approve(f"{old}-2")
        assert [await hasty.outcome() for _ in range(2)] == ["paid" if approved else "timed_out"] * 2
        assert len(asked(keyless, hasty.order["user_id"])) == 2
        assert hasty.backend.shipped(old) == approved

    async def test_a_customer_who_left_the_scan_may_still_pay(self, keyless: Sandbox, customer: Customer) -> None:
        await customer.pay()
        keyless.fail_authentication(customer.order_id, 30004)
        keyless.fail_authentication(customer.order_id, 30003)
        status, order = await customer.post(f"/order/{customer.order_id}/again")
        assert (status, order["state"], order["asked"]) == (200, "waiting", 1)
        keyless.approve(customer.order_id)
        assert await customer.outcome() == "paid"

    async def test_an_approval_after_the_customer_declined_pays_nothing_also_if_another_tab_waits_for_it(
        self, keyless: Sandbox, customer: Customer
    ) -> None:
        await customer.pay()
        with slow(keyless, 0.3):
            other_tab = asyncio.create_task(customer.outcome())
            await until(lambda: bool(keyless.requests))
            await customer.post(f"/order/{customer.order_id}/decline")
            keyless.approve(customer.order_id)
            assert await other_tab == "declined"
        assert await customer.outcome() == "declined"
        assert customer.backend.shipped(customer.order_id) == 0
        status, order = await customer.post(f"/order/{customer.order_id}/again")
        assert (status, order["state"], order["asked"]) == (200, "waiting", 2)
        keyless.approve(f"{customer.order_id}-2")
        assert await customer.outcome() == "paid"
        assert customer.backend.shipped(customer.order_id) == 1

    async def test_an_order_under_way_cannot_be_started_over(self, customer: Customer) -> None:
        first = customer.order_id
        assert (await customer.open_shop(after=first)).order_id == first
        await customer.pay()
        assert (await customer.open_shop(after=first)).order_id == first

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "https://127.0.0.1"])
    async def test_a_foreign_page_cannot_pay(self, keyless: Sandbox, customer: Customer, origin: str) -> None:
        status, _ = await customer.post(f"/order/{customer.order_id}/pay", origin=origin)
        assert status == 403
        assert asked(keyless, customer.order["user_id"]) == []

    async def test_the_session_is_out_of_reach_of_scripts_and_of_other_sites(
        self, backend: Backend, http: aiohttp.ClientSession
    ) -> None:
        async with http.post(f"{backend.url}/order", headers={"Origin": backend.url}) as answer:
            order = await answer.json()
            cookie = answer.cookies["session"]
        assert cookie["httponly"] is True
        assert cookie["samesite"] == "lax"
        assert not order.keys() & {"session", "ticket"}

    async def test_no_user_sees_anothers_order(self, keyless: Sandbox, backend: Backend, customer: Customer) -> None:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
            stranger = await Customer(backend, session).open_shop()
            assert stranger.order["user_id"] != customer.order["user_id"]
            status, _ = await stranger.post(f"/order/{customer.order_id}/pay")
            assert status == 404
            async with session.get(f"{backend.url}/order/{customer.order_id}/events") as answer:
                assert answer.status == 404
        assert asked(keyless, customer.order["user_id"]) == []

    async def test_leaving_the_page_stops_the_polls(self, keyless: Sandbox, hasty: Customer) -> None:
        await follow_into_the_unknown(keyless, hasty)
        with slow(keyless, 3.0):
            stream = asyncio.create_task(hasty.follow())
            await until(lambda: bool(keyless.requests))
            stream.cancel()
            async with keyless.client() as client:  # what comes later is answered later
                await client.get_operation(hasty.order_id)
        assert [record.status for record in keyless.requests] == [None, 200]  # nobody was there to be answered

    async def test_stopping_the_backend_ends_open_streams_at_once_and_loses_no_wait(
        self, keyless: Sandbox, backend: Backend, customer: Customer
    ) -> None:
        await customer.pay()
        stream = customer.news()
        assert (await anext(stream))["state"] == "waiting"
        assert await backend.end(signal.SIGTERM) < 30
        assert {news["state"] async for news in stream} <= {"waiting"}
        assert "Traceback" not in backend.log.read_text()
        keyless.approve(customer.order_id)
        await backend.start()
        assert await customer.outcome() == "paid"

    async def test_a_killed_backend_loses_no_wait(self, keyless: Sandbox, backend: Backend, customer: Customer) -> None:
        await customer.pay()
        await backend.end(signal.SIGKILL)
        await backend.start()
        assert (await customer.open_shop()).order["state"] == "waiting"
        keyless.approve(customer.order_id)
        assert await customer.outcome() == "paid"
        await backend.end(signal.SIGKILL)
        await backend.start()
        assert await customer.pay() == 200
        assert await customer.outcome() == "paid"
        assert backend.shipped(customer.order_id) == len(asked(keyless, customer.order["user_id"])) == 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncGenerator[Browser]:
    async with chromium() as browser:
        yield browser


class Visitor:
    """A customer with a browser, of their own cookies, whose console must stay empty of errors."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.errors: list[str] = []

    async def __aenter__(self) -> Self:
        self._context = await self._browser.new_context()
        self._context.set_default_timeout(PATIENCE * 1000)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._context.close()

    async def tab(self, backend: Backend) -> Page:
        page = await self._context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        await page.goto(backend.url)
        return page

    async def user_id(self, page: Page) -> str:
        await shows(page, "open")
        return (await page.locator("#footer").inner_text()).rpartition(" ")[2].rstrip(".")


def expect(locator: Locator) -> LocatorAssertions:
    from playwright.async_api import expect  # only where there is a browser

    return expect(locator)


async def shows(page: Page, state: str) -> None:
    await expect(page.locator("#panel")).to_have_attribute("data-state", state)


async def click(page: Page, label: str) -> None:
    await page.get_by_role("button", name=label).click()


@pytest.mark.browser
class TestInTheBrowser:
    async def test_two_customers_with_three_tabs_outlive_a_kill_and_a_reload_and_end_paid(
        self, keyless: Sandbox, backend: Backend, browser: Browser
    ) -> None:
        async with Visitor(browser) as ada, Visitor(browser) as bob:
            pages = [await ada.tab(backend), await ada.tab(backend), await bob.tab(backend)]
            users = [await ada.user_id(pages[0]), await bob.user_id(pages[2])]
            assert await ada.user_id(pages[1]) == users[0] != users[1]
            await pages[0].get_by_role("button", name="Pay 38.00 EUR").dblclick()
            await click(pages[2], "Pay 38.00 EUR")
            for page in pages:  # Ada's second tab follows without a click
                await shows(page, "waiting")

            await backend.end(signal.SIGKILL)
            for page in pages:
                await expect(page.locator("#note")).to_contain_text("connection is lost")
            await backend.start()
            for page in pages:
                await expect(page.locator("#note")).to_be_hidden(timeout=PATIENCE * 1000)
                await shows(page, "waiting")
                await expect(page.locator("#elapsed")).to_have_text(re.compile(r"^0:(?!00)\d\d$"))

            await pages[2].reload()
            await shows(pages[2], "waiting")
            [of_ada], [of_bob] = asked(keyless, users[0]), asked(keyless, users[1])  # one each: nobody was asked again
            await expect(pages[2].locator("#payload")).to_have_text(str(of_bob.operation_payload))
            keyless.approve(of_ada.operation_id)
            keyless.approve(of_bob.operation_id)
            for page in pages:
                await shows(page, "paid")
            assert [len(asked(keyless, user)) for user in users] == [1, 1]
            assert all("ERR_" in error for error in ada.errors + bob.errors)  # the connection that was lost

    async def test_the_page_asks_again_after_a_lost_answer_a_502_and_an_answer_that_never_comes(
        self, keyless: Sandbox, backend: Backend, browser: Browser
    ) -> None:
        async with Visitor(browser) as visitor:
            page = await visitor.tab(backend)
            user = await visitor.user_id(page)
            await lose_answers(page, "**/events")
            await click(page, "Pay")
            await until(lambda: bool(asked(keyless, user)))
            keyless.approve(*(operation.operation_id for operation in asked(keyless, user)))
            async with asyncio.timeout(45):
                await shows(page, "paid")

    async def test_a_timed_out_order_stays_so_and_one_whose_outcome_is_unknown_is_checked_again(
        self, keyless: Sandbox, hasty_backend: Backend, browser: Browser
    ) -> None:
        async with Visitor(browser) as visitor:
            page = await visitor.tab(hasty_backend)
            user = await visitor.user_id(page)
            await click(page, "Pay")
            await shows(page, "timed_out")
            [late] = asked(keyless, user)
            keyless.approve(late.operation_id)
            await page.reload()
            await shows(page, "timed_out")
            await click(page, "Start over")
            await shows(page, "open")
            keyless.fail_next(401, None, method="GET")
            await click(page, "Pay")
            await shows(page, "unknown")
            keyless.recover()
            [_, operation] = asked(keyless, user)
            keyless.approve(operation.operation_id)
            await click(page, "Check again")
            await shows(page, "paid")
            await page.reload()
            await shows(page, "paid")
            await click(page, "Order another")
            await shows(page, "open")
            assert len(asked(keyless, user)) == 2
            assert visitor.errors == []

    async def test_a_customer_who_leaves_the_scan_may_try_again_and_one_who_cancels_is_asked_anew(
        self, keyless: Sandbox, backend: Backend, browser: Browser
    ) -> None:
        async with Visitor(browser) as visitor:
            page = await visitor.tab(backend)
            user = await visitor.user_id(page)
            await click(page, "Pay")
            await shows(page, "waiting")
            [operation] = asked(keyless, user)
            keyless.fail_authentication(operation.operation_id, 30003)
            await expect(page.locator("#note")).to_contain_text("the user left the scan", timeout=60_000)
            await shows(page, "waiting")
            await click(page, "Cancel")
            await shows(page, "declined")
            await page.reload()
            await shows(page, "declined")
            await click(page, "Try again")
            await shows(page, "waiting")
            await expect(page.locator("#payload")).to_have_text(f"{operation.operation_payload}, request 2")
            keyless.approve(f"{operation.operation_id}-2")
            await shows(page, "paid")
            assert visitor.errors == []

    async def test_a_keyless_that_is_not_reachable_is_named(
        self, keyless: Sandbox, hasty_backend: Backend, browser: Browser
    ) -> None:
        async with Visitor(browser) as visitor:
            page = await visitor.tab(hasty_backend)
            await visitor.user_id(page)
            keyless.fail_next(401, method="POST")
            await click(page, "Pay")
            await expect(page.locator("#note")).to_contain_text("Keyless is not reachable. You have not been charged")
            await click(page, "Pay")
            await shows(page, "timed_out")
            await expect(page.locator("#note")).to_be_hidden()

    async def test_a_lie_is_shown_as_refused_and_text_stays_text(
        self, keyless: Sandbox, hasty_backend: Backend, browser: Browser
    ) -> None:
        async with Visitor(browser) as visitor:
            page = await visitor.tab(hasty_backend)
            user = await visitor.user_id(page)
            hostile = "<img src=x onerror=document.title='owned'>"
            hasty_backend.sql("UPDATE orders SET payload = ? WHERE user_id = ?", hostile, user)
            await page.reload()
            keyless.fail_next(401, None, method="GET")
            await click(page, "Pay")
            await expect(page.locator("#payload")).to_have_text(hostile)
            await shows(page, "unknown")
            [operation] = asked(keyless, user)
            keyless.approve(operation.operation_id)
            keyless.tamper(operation.operation_id, operation_payload="Pay 9000.00 EUR to Mallory")
            keyless.recover()
            await click(page, "Check again")
            await shows(page, "refused")
            assert await page.locator("#panel img").count() == 0
            assert await page.title() == "Fern & Clay"
            assert visitor.errors == []
