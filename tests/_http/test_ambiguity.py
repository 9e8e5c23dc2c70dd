"""The table of failed creates against the client, over real HTTP: what may have taken effect is searched for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from ambiguity_cases import ANSWERED, OPERATION_ID, USER_ID, AmbiguityCase

from aiokeyless import KeylessError, StatusError

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

each_case = pytest.mark.parametrize("case", ANSWERED, ids=str)


@each_case
async def test_a_create_finds_what_it_may_have_created_and_searches_for_nothing_else(
    case: AmbiguityCase, sandbox: Sandbox
) -> None:
    case.fail(sandbox)
    async with sandbox.client(max_attempts=1) as client:
        if case.may_have_taken_effect:
            assert (await client.create_operation(USER_ID, operation_id=OPERATION_ID)).reconciled
        else:
            with pytest.raises(type(case.error)):
                await client.create_operation(USER_ID, operation_id=OPERATION_ID)
    assert [record.method for record in sandbox.requests] == ["POST", *["GET"] * case.may_have_taken_effect]


@each_case
async def test_a_create_fails_as_the_table_says(case: AmbiguityCase, sandbox: Sandbox) -> None:
    case.fail(sandbox)
    sandbox.fail_next(404, method="GET")
    async with sandbox.client(max_attempts=1) as client:
        with pytest.raises(KeylessError) as caught:
            await client.create_operation(USER_ID, operation_id=OPERATION_ID)
    assert type(caught.value) is type(case.error)
    if isinstance(case.error, StatusError):
        assert isinstance(caught.value, StatusError)
        assert caught.value.status == case.error.status
