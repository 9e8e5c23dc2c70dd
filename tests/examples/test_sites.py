"""Programs of the examples that answer browsers, in processes of their own: one approval pays once, and never late."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from chromium import chromium
from example_server import ExampleServer
from waiting import until

from aiokeyless import ApprovalTicket
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
PLACES = ("places", "billing_place")


class Program(NamedTuple):
    """How a program is started, and where it is asked."""

    file: str
    database: str  # the variable that names its file
    table: str
    ask: str
    answer: str
    place: str  # the statements that store an order, or its new text
    time: Callable[[datetime], object] = datetime.timestamp  # as the table has it
    has_users: bool = True
    no_login: int = 401


PLACE = """
    CREATE TABLE IF NOT EXISTS orders (id PRIMARY KEY, user_id, text);
    INSERT INTO orders VALUES (:order, :user, :text) ON CONFLICT DO UPDATE SET text = excluded.text
"""
PROGRAMS = {
    "examples/sync/flask_app.py": Program(
        "tests/examples/servers/flask_site.py", "FLASK_PAYMENTS_DB", "payments", "/payments/{}", "/payments/{}", PLACE
    ),
    "examples/django_site/billing/views.py": Program(
        "tests/examples/servers/django_site.py",
        "PAYMENTS_DB",
        "billing_payment",
        "/payments/{}/pay",
        "/payments/{}",
        """
        INSERT OR IGNORE INTO billing_customer (user_id) VALUES (:user);
        INSERT INTO billing_order (number, customer_id, text)
            SELECT :order, id, :text FROM billing_customer WHERE user_id = :user
            ON CONFLICT DO UPDATE SET text = excluded.text
        """,
        lambda at: at.strftime("%Y-%m-%d %H:%M:%S.%f"),
        no_login=403,
    ),
    "examples/shutdown/approvals.py": Program(
        "examples/shutdown/aiohttp_app.py",
        "APPROVALS_DB",
        "approvals",
        "/approvals/{}",
        "/approvals/{}",
        PLACE,
        has_users=False,
    ),
}


class Site(ExampleServer):
    """Such a program, its database, and what browsers and phones do."""

    def __init__(self, program: Program, sandbox: Sandbox, folder: Path) -> None:
        self.sandbox = sandbox
        self.program = program
        self._database = folder / "payments.sqlite3"
        folders = [str(ROOT / "examples" / folder) for folder in ("django_site", "sync")]
        path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
        settings = {program.database: str(self._database), "PYTHONPATH": path, "FLASK_SECRET_KEY": "of the sessions"}
        super().__init__(ROOT / program.file, sandbox, folder, port="PORT", **settings)
        self.begin()

    def begin(self) -> None:
        """Begin another test: what was asked before does not count."""
        self._before = {*self.sandbox.operations}
        self._told = self._pushes()
        self.sandbox.requests.clear()
        self.sandbox.recover()
        for table in (self.program.table, *PLACES):
            with contextlib.suppress(sqlite3.OperationalError):  # there is none before the first request
                self.record(f"DELETE FROM {table}")  # noqa: S608  # a constant

    def _pushes(self) -> int:
        return self.log.read_text().count("push to C0FFEE: ") if self.log.exists() else 0

    @property
    def told(self) -> int:
        """How often the phone was told in this test."""
        return self._pushes() - self._told

    def record(self, statements: str, **values: object) -> list[Any]:
        """Execute statements in the site's database."""
        with closing(sqlite3.connect(self._database, isolation_level=None)) as record:
            return [record.execute(each, values).fetchall() for each in statements.split(";")][-1]

    def place(self, order: str, text: str = "Pay 40 to Alice", user: str = "C0FFEE") -> None:
        """Store an order, or its new text."""
        self.record(self.program.place, order=order, text=text, user=user)

    @property
    def asked(self) -> list[str]:
        """The operations of this test."""
        return [operation for operation in self.sandbox.operations if operation not in self._before]

    async def ask(self, order: str, user: str = "C0FFEE", **form: str) -> str | int:
        """Ask about an order of a user's, after placing it; return its state, or the status if there is none."""
        self.place(order)
        return await self.repeat(order, user, **form)

    async def repeat(self, order: str, user: str = "C0FFEE", **form: str) -> str | int:
        """Ask about an order."""
        return await self._request("POST", self.program.ask.format(order), user, form)

    async def answer(self, order: str, user: str = "C0FFEE") -> str | int:
        """Wait for the answer of a long poll."""
        return await self._request("GET", self.program.answer.format(order), user, {})

    async def _request(self, method: str, path: str, user: str, form: dict[str, str]) -> str | int:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:
            if self.program.has_users and user:
                async with browser.get(f"{self.url}/login/{user}") as logged_in:
                    logged_in.raise_for_status()
            async with browser.request(method, f"{self.url}{quote(path)}", data=form) as answer:
                return str((await answer.json())["state"]) if answer.status == 200 else answer.status

    def approve(self, number: int = 0, auth_type: str = "biom") -> None:
        """Approve the operation of this number."""
        self.sandbox.approve(self.asked[number], auth_type=auth_type)

    def end_time(self, ago: float = 0.0) -> None:
        """Let the time of all open orders be up, since so many seconds."""
        end = datetime.now(UTC) - timedelta(seconds=ago)
        table, ends = self.program.table, self.program.time(end)
        for [stored] in self.record(f"SELECT ticket FROM {table}"):  # noqa: S608  # a constant
            ticket = msgspec.structs.replace(ApprovalTicket.from_json(stored), expires_at=end).to_json()
            change = f"UPDATE {table} SET ticket = :ticket, ends = :ends WHERE ticket = :stored"  # noqa: S608  # as above
            self.record(change, ticket=ticket, ends=ends, stored=stored)

    async def restart(self, number: signal.Signals) -> None:
        await self.end(number)
        await self.start()

    def paid(self, order: str) -> int:
        return self.log.read_text().count(f"{order!r}: pay\n")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PROGRAMS)
async def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Site]:
    async with Sandbox() as sandbox, Site(PROGRAMS[request.param], sandbox, tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
def site(running: Site) -> Site:
    running.begin()
    return running


async def test_an_approval_after_the_timeout_counts_for_nothing(site: Site) -> None:
    await site.ask("late")
    site.end_time()
    assert await site.answer("late") == "timed out"
    site.approve()
    assert [await site.answer("late"), await site.ask("late")] == ["timed out"] * 2
    assert (site.paid("late"), len(site.asked)) == (0, 1)


async def test_a_pin_is_refused_for_good(site: Site) -> None:
    await site.ask("pin")
    site.approve(auth_type="pin")
    assert [await site.answer("pin") for _ in range(2)] == ["refused"] * 2
    assert site.paid("pin") == 0


@pytest.mark.parametrize("running", [name for name in PROGRAMS if PROGRAMS[name].has_users], indirect=True)
async def test_an_approval_is_of_the_user_who_asked_and_of_no_other(site: Site) -> None:
    site.place("of another", user="BAD")
    await site.ask("own", user_id="BAD")
    site.approve()
    assert site.sandbox.operations[site.asked[0]].user_id == "C0FFEE"
    assert [await site.answer("own", user="BAD"), await site.ask("own", user="BAD")] == [404, 404]
    assert await site.answer("own") == "approved"
    assert (site.paid("own"), len(site.asked)) == (1, 1)


@pytest.mark.parametrize("running", [name for name in PROGRAMS if PROGRAMS[name].has_users], indirect=True)
async def test_nobody_asks_or_reads_without_a_login(site: Site) -> None:
    await site.ask("logged in")
    assert [await site.answer("logged in", user=""), await site.ask("new", user="")] == [site.program.no_login] * 2
    assert len(site.asked) == 1


async def test_an_approval_is_of_the_tab_that_asked(site: Site) -> None:
    await site.ask("tab-1")
    await site.ask("tab-2")
    site.approve(1)
    site.end_time()
    assert [await site.answer("tab-1"), await site.answer("tab-2")] == ["timed out", "approved"]
    assert [site.paid("tab-1"), site.paid("tab-2")] == [0, 1]


async def test_an_approval_outlives_its_process_wherever_that_ends(site: Site) -> None:
    site.sandbox.latency = 600
    asking = asyncio.create_task(site.ask("restart"))
    await until(lambda: len(site.asked) == 1)
    await site.restart(signal.SIGTERM)
    await asyncio.gather(asking, return_exceptions=True)
    site.sandbox.latency = 0
    assert await site.ask("restart") == "asked"  # as a browser that got no answer does
    waiting = asyncio.create_task(site.answer("restart"))
    await until(lambda: site.sandbox.requests[-1].method == "GET")
    await site.restart(signal.SIGKILL)
    await asyncio.gather(waiting, return_exceptions=True)
    site.approve()
    assert await site.answer("restart") == "approved"
    await site.restart(signal.SIGKILL)
    assert await site.answer("restart") == "approved"
    assert (site.paid("restart"), len(site.asked)) == (1, 1)


async def test_a_browser_that_asks_twice_at_once_is_told_the_same_and_pays_once(site: Site) -> None:
    assert await asyncio.gather(*[site.ask("twice") for _ in range(3)]) == ["asked"] * 3
    answers = asyncio.gather(*[site.answer("twice") for _ in range(2)])
    await until(lambda: site.sandbox.requests[-1].method == "GET")
    site.approve()
    assert await answers == ["approved"] * 2
    assert (site.paid("twice"), len(site.asked), site.told) == (1, 1, 1)


async def test_an_approval_that_an_outage_hides_at_the_deadline_pays_nothing_later(site: Site) -> None:
    await site.ask("outage")
    site.approve()
    site.end_time()
    site.sandbox.fail_next(503, times=None, method="GET")
    assert await site.answer("outage") == "timed out"
    site.sandbox.recover()
    assert await site.answer("outage") == "timed out"
    assert site.paid("outage") == 0


async def test_an_approval_that_nobody_asked_for_in_time_pays_nothing(site: Site) -> None:
    await site.ask("tab closed")
    site.approve()
    site.end_time(ago=2)
    assert [await site.answer("tab closed"), await site.repeat("tab closed")] == ["timed out"] * 2
    assert site.paid("tab closed") == 0


async def test_an_approval_that_is_found_while_the_browser_is_on_its_way_pays(site: Site) -> None:
    await site.ask("on its way")
    site.approve()
    site.end_time(ago=-0.3)
    assert await site.answer("on its way") == "approved"
    assert site.paid("on its way") == 1


async def test_an_order_that_changed_is_not_asked_about_again_and_not_paid(site: Site) -> None:
    await site.ask("changed")
    site.place("changed", "Pay 4000 to Mallory")
    assert [await site.repeat("changed"), len(site.asked)] == [409, 1]
    site.approve()
    assert [await site.answer("changed") for _ in range(2)] == ["refused"] * 2
    assert site.paid("changed") == 0


async def test_an_order_that_changes_while_the_page_waits_is_not_paid(site: Site) -> None:
    await site.ask("changing")
    waiting = asyncio.create_task(site.answer("changing"))
    await until(lambda: site.sandbox.requests[-1].method == "GET")
    site.place("changing", "Pay 4000 to Mallory")
    site.approve()
    assert await waiting == "refused"
    assert site.paid("changing") == 0


async def test_of_fifty_orders_at_once_a_phone_is_asked_about_three(site: Site) -> None:
    orders = [f"crowd-{number}" for number in range(50)]
    for order in orders:
        site.place(order)
    users = ["C0FFEE", "c0ffee"] if site.program.has_users else ["C0FFEE"]
    answers = await asyncio.gather(*[site.repeat(order, users[n % len(users)]) for n, order in enumerate(orders)])
    assert Counter(answers) == {"asked": 3, 429: 47}
    assert len(site.asked) == site.told == 3
    assert site.record(f"SELECT count(*) FROM {site.program.table}") == [(3,)]  # noqa: S608  # a constant


async def test_an_answered_question_makes_room_for_another_one_and_so_does_one_whose_time_is_up(site: Site) -> None:
    assert [await site.ask(order) for order in ("1st", "2nd", "3rd", "4th")] == [*["asked"] * 3, 429]
    site.approve()
    assert await site.answer("1st") == "approved"
    assert [await site.ask("5th"), await site.ask("6th")] == ["asked", 429]
    site.end_time()
    assert await site.ask("7th") == "asked"


async def test_two_pages_of_a_user_wait_at_once(site: Site) -> None:
    await site.ask("pages")
    waiting = [asyncio.create_task(site.answer("pages")) for _ in range(5)]
    await until(lambda: sum(each.done() for each in waiting) == 3)
    assert [each.result() for each in waiting if each.done()] == [429] * 3
    site.approve()
    assert sorted(map(str, await asyncio.gather(*waiting))) == [*["429"] * 3, *["approved"] * 2]
    assert await site.answer("pages") == "approved"


async def test_pages_of_one_customer_occupy_three_threads_while_keyless_is_slow(site: Site) -> None:
    await site.ask("told")
    site.sandbox.latency = 8
    asking = [asyncio.create_task(site.ask("slow")) for _ in range(20)]
    await until(lambda: sum(each.done() for each in asking) == 17)
    site.sandbox.latency = 0
    assert Counter(await asyncio.gather(*asking)) == {429: 17, "asked": 3}
    assert (len(site.asked), site.told) == (2, 2)


async def test_the_phone_is_told_again_only_if_the_answer_to_the_create_was_lost(site: Site) -> None:
    site.sandbox.drop_next(stored=True, method="POST")
    site.sandbox.drop_next(times=None, method="GET")
    assert [await site.ask("lost"), site.told] == [503, 0]
    site.sandbox.recover()
    assert [await site.repeat("lost") for _ in range(3)] == ["asked"] * 3
    assert (len(site.asked), site.told) == (1, 1)


async def test_a_number_with_a_line_break_forges_no_line_of_the_log(site: Site) -> None:
    number = "a': pay\n'b"
    await site.ask(number)
    site.approve()
    assert await site.answer(number) == "approved"
    assert (site.paid("b"), site.paid(number)) == (0, 1)


async def test_an_outage_while_it_asks_is_said_and_the_next_click_asks(site: Site) -> None:
    site.sandbox.fail_next(503, times=None)
    assert await site.ask("down") == 503
    site.sandbox.recover()
    site.sandbox.fail_next(403, times=None)  # what does not pass by itself
    assert await site.ask("down") == 500
    site.sandbox.recover()
    waiting = asyncio.create_task(site.answer("down"))  # as another tab does, which was not told
    await until(lambda: site.sandbox.requests[-1].status == 404)
    assert await site.ask("down") == "asked"
    site.approve()
    assert await waiting == "approved"
    assert (site.paid("down"), len(site.asked)) == (1, 1)


async def test_nobody_is_asked_after_the_time_is_up(site: Site) -> None:
    site.sandbox.fail_next(503, times=None)
    await site.ask("over")
    site.sandbox.recover()
    site.end_time()
    assert [await site.ask("over"), await site.answer("over"), await site.ask("over")] == ["asking", *["timed out"] * 2]
    assert site.asked == []


async def test_a_link_asks_nobody(site: Site) -> None:
    assert await site.answer("link") in {404, "not asked"}
    assert not site.sandbox.requests


EVIL = """
    <form method="post" action="{0}"></form>
    <script>
        fetch("{0}", {{method: "POST", mode: "no-cors", credentials: "include"}}).then(() => document.forms[0].submit())
    </script>
"""


@pytest.mark.browser
@pytest.mark.parametrize("running", [name for name in PROGRAMS if PROGRAMS[name].has_users], indirect=True)
async def test_in_one_browser_neither_another_site_nor_another_account_asks_or_reads(site: Site) -> None:
    url = f"{site.url}{site.program.ask.format('mine')}"

    async def evil(_request: web.Request) -> web.Response:
        return web.Response(text=EVIL.format(url), content_type="text/html")

    app = web.Application()
    app.router.add_get("/", evil)
    site.place("mine")
    site.place("of another", user="BEEF")
    async with chromium() as browser, TestServer(app, host="localhost") as server:
        page = await browser.new_page()
        await page.goto(f"{site.url}/login/C0FFEE")
        await page.goto(str(server.make_url("/")))
        await page.wait_for_url(url)  # of the form; the site answers that nobody is logged in
        assert site.asked == []
        assert (await page.request.post(url)).ok
        await page.goto(f"{site.url}/login/BEEF")  # another account in the same browser
        answers = [await page.request.post(url), await page.request.get(f"{site.url}/payments/mine")]
        assert [answer.status for answer in answers] == [404, 404]
    assert len(site.asked) == 1
