"""`promises.md` has each sentence of the interface, and the cases that try it or the reason why none does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import FunctionType

from aiokeyless.worker.broker import ApplicationSide, Broker, OutcomeDelivery

FOLDER = Path(__file__).parent
ROWS = re.findall(r"^\| (.+) \| (.+) \|$", (FOLDER / "promises.md").read_text(), re.MULTILINE)[1:]
CASES = {file.name: file.read_text() for file in FOLDER.glob("test_*.py") if file != Path(__file__)}


def sentences() -> list[str]:
    """Return what the methods promise; the errors that they raise are up to each broker's own tests."""
    found = []
    for method in (each for side in (OutcomeDelivery, ApplicationSide, Broker) for each in vars(side).values()):
        if isinstance(method, FunctionType) and (text := inspect.getdoc(method)):
            text = re.sub(r"\n(Args|Returns):\n *|\nRaises:.*", "\n\n", text, flags=re.DOTALL)
            found += re.split(r"(?<=\.)\s+(?=[A-Z])|\n\s*\n|\n +(?=\w+: )", text)
    return [" ".join(sentence.split()) for sentence in found if sentence.strip()]


def test_each_promise_has_its_cases_and_each_case_runs_on_each_storage_that_its_facts_allow() -> None:
    promises = zip(sentences(), ROWS, strict=True)
    assert [promise for promise, (beginning, _) in promises if not promise.startswith(beginning)] == []
    for file, name in re.findall(r"`(\w+\.py)::(test_\w+)`", str(ROWS)):
        case = re.search(rf"\n((?:@.*\n)*)async def {name}\(\s*(?:opened|broker|storage): ", CASES[file])
        assert case, name
        assert "skip" not in case[1]
    # A storage that a case names would be one that others cannot be tried in place of.
    for file, text in CASES.items():
        assert not re.search(r'parametrize\(\s*"storage"|pytest\.skip|\b(?i:sqlite|nats|postgres)', text), file
