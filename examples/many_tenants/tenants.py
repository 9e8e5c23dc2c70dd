"""The tenants in the application's database, and what runs for each: it follows the table, without a restart."""

import asyncio
import logging
import os
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

import aiohttp
from sqlalchemy import ForeignKey, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aiokeyless import ConfigurationError, KeylessClient
from aiokeyless.shutdown import Closable

T = TypeVar("T", bound=Closable)
log = logging.getLogger("tenants")
DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql:///shop")
READS_EVERY = 5.0  # seconds: until then, changes of the table have no effect

engine = create_async_engine(
    DATABASE_URL.replace("postgresql:", "postgresql+asyncpg:", 1),
    pool_pre_ping=True,
    hide_parameters=True,  # errors would quote keys and tickets
    connect_args={"timeout": 10, "command_timeout": 10},
)
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Table(DeclarativeBase):
    """What all tables are made from."""


class Tenant(Table):
    """A tenant."""

    __tablename__ = "tenants"

    # In logs, metrics and schemas (`keyless_` and it, 50 characters at most): [a-z0-9_]{1,42}, and of no person.
    name: Mapped[str] = mapped_column(primary_key=True)
    api_key: Mapped[str]  # a real site encrypts it, with a key from elsewhere
    region: Mapped[str] = mapped_column(server_default="eu")
    base_url: Mapped[str | None]  # in place of the region's: a sandbox's, for tests
    state: Mapped[str] = mapped_column(server_default="active")  # then draining: nobody is asked; or suspended

    @property
    def place(self) -> tuple[str, str | None]:
        """Where its users are asked."""
        return self.region, self.base_url


class Approval(Table):
    """What a user was asked, and how it ended."""

    __tablename__ = "approvals"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    order_id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    ticket: Mapped[str]
    state: Mapped[str] = mapped_column(default="asking")  # then asked; approved, refused or timed out


def make_client(tenant: Tenant, session: aiohttp.ClientSession | None = None) -> KeylessClient:
    """Make the client of a tenant, with a session of its own by default."""
    region = None if tenant.base_url else tenant.region
    return KeylessClient(
        lambda: tenant.api_key, region=region, base_url=tenant.base_url, session=session, name=tenant.name
    )


class Registry(Generic[T]):
    """What runs for each tenant that is not suspended, such as its client. It follows the table."""

    def __init__(self, make: Callable[[Tenant], T]) -> None:
        self._make = make
        self._running: dict[str, tuple[Tenant, T]] = {}
        self._closing: set[asyncio.Task[object]] = set()
        self._not_made: dict[str, str] = {}  # the errors that were logged
        self._following: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        await self._read()
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all, and make nothing any more."""
        self._following.cancel()
        await asyncio.gather(*self._closing, *(each.aclose() for _, each in self._running.values()))

    def get(self, name: str, *, to_ask: bool = False) -> T | None:
        """Return what runs for a tenant; None if nothing does, or if nobody may be asked."""
        tenant, each = self._running.get(name, (None, None))
        return None if to_ask and tenant and tenant.state != "active" else each

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(READS_EVERY)
            try:
                await self._read()
            except Exception as error:  # noqa: BLE001  # whatever it is, what runs goes on
                log.warning("tenants are not read: %r", error)

    async def _read(self) -> None:
        async with sessions() as session:
            rows = await session.scalars(select(Tenant).where(Tenant.state != "suspended"))
            now = {tenant.name: tenant for tenant in rows}
        for name, (tenant, each) in [*self._running.items()]:
            if name in now and now[name].place == tenant.place:
                tenant.api_key, tenant.state = now[name].api_key, now[name].state
            else:  # an old place never gets a new key
                del self._running[name]
                closing = asyncio.create_task(each.aclose())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        not_made, self._not_made = self._not_made, {}
        for name in now.keys() - self._running.keys():
            try:
                self._running[name] = now[name], self._make(now[name])
            except ConfigurationError as error:  # such as an unknown region: of this tenant alone
                self._not_made[name] = str(error)
                if not_made.get(name) != str(error):  # and not at each reading
                    log.warning("tenant %s: %s", name, error)
