"""The table of failed creates against the pure function."""

from __future__ import annotations

import pytest
from ambiguity_cases import CASES, AmbiguityCase

from aiokeyless._rules.ambiguity import may_have_taken_effect


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_failure_may_have_taken_effect_as_the_table_says(case: AmbiguityCase) -> None:
    assert may_have_taken_effect(case.error) is case.may_have_taken_effect
