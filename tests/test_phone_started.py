"""The program of docs/howto/resuming.md for the phone: what an app makes up under its id pays nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aiokeyless import OperationMismatchError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless.sandbox import Sandbox

PAGE = (Path(__file__).parents[1] / "docs" / "howto" / "resuming.md").read_text()
PROGRAM = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[-1]
OPERATION = "txn-20250521-001"
APPROVAL: dict[str, Any] = {"user_id": "0123456789ABCDEF", "operation_payload": "Pay 40 to Alice"}

pytestmark = pytest.mark.looptime


@pytest.fixture
def run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Awaitable[None]]:
    """The page's program, without its last line."""
    monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
    names: dict[str, Any] = {"__name__": "program"}
    exec(PROGRAM.rpartition("asyncio.run(")[0], names)  # noqa: S102  # our own page
    main: Callable[[], Awaitable[None]] = names["main"]
    return main


async def test_the_face_of_the_user_on_this_payload_pays(
    sandbox: Sandbox, run: Callable[[], Awaitable[None]], capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox.approve(OPERATION, **APPROVAL)
    await run()
    assert capsys.readouterr().out == "approved: pay\n"


@pytest.mark.parametrize(
    "made_up",
    [
        {"auth_type": "pin"},
        {"user_id": "BAD"},
        {"user_id": "BAD", "external_user_id": "alice"},
        {"operation_payload": "Pay 1 to Alice"},
        {"operation_payload": None},
    ],
    ids=str,
)
async def test_what_an_app_makes_up_pays_nothing(
    sandbox: Sandbox,
    run: Callable[[], Awaitable[None]],
    capsys: pytest.CaptureFixture[str],
    made_up: dict[str, str | None],
) -> None:
    sandbox.enroll("BAD")  # an enrolment can carry the operation, too
    sandbox.approve(OPERATION, **APPROVAL | made_up)
    with pytest.raises(OperationMismatchError):
        await run()
    assert not capsys.readouterr().out
