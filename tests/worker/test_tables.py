"""The brokers in SQL databases have Python's numbers."""

from __future__ import annotations

import re
from importlib.resources import files

from aiokeyless._rules.order import Standing
from aiokeyless.worker.broker import ExchangeResult
from aiokeyless.worker.sqlite import schema, store

POSTGRES = files("aiokeyless.worker.postgres.migrations").joinpath("0001.sql").read_text(encoding="utf-8")


def test_postgres_names_the_numbers_of_results_and_the_most_failures_as_python_has_them() -> None:
    named = {f"result_{result.name.lower()}": result for result in ExchangeResult if result.name != "CREATED"}
    numbers = {**named, "most_failures": store._MOST_FAILURES}
    declared = re.findall(r"\b(result_\w+|most_failures) constant integer := (\d+);", POSTGRES)
    assert set(declared) == {(name, str(int(number))) for name, number in numbers.items()}
    assert re.findall(r"\bfailures \+ 1, \d|\bmine\.result = \d|\bWHEN \d", POSTGRES) == []


def test_the_order_while_polls_fail_is_that_of_their_standing() -> None:
    order = r"WHEN (?:w\.)?answered THEN (\d) WHEN (?:w\.)?deliveries(?: > 0)? THEN (\d) ELSE (\d) END"
    expected = tuple(str(int(standing)) for standing in (Standing.ANSWERED, Standing.CREATED, Standing.UNTRIED))
    for sql in (POSTGRES, schema._MIGRATIONS[0], store._RANKED):
        assert set(re.findall(order, sql)) == {expected}
