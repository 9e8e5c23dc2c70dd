"""The endpoints over a store, without a socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aiokeyless.sandbox.api import Answer, KeylessApi
from aiokeyless.sandbox.store import OperationStore

if TYPE_CHECKING:
    from aiokeyless.models import Operation


class Service:
    """The endpoints over a store, asked as a well-behaved client asks unless a test says otherwise."""

    def __init__(self) -> None:
        self.store = OperationStore(clock=lambda: 1_577_934_245_242_194_378)
        self.created: list[Operation] = []
        self.api = KeylessApi(self.store, "key", self.created.append)

    def ask(self, method: str, target: str, body: bytes = b"", **changed: str) -> Answer:
        fields = {"api_key": "key", "accept": "application/json", "content_type": "application/json", **changed}
        return self.api.answer(method, target, body=body, **fields)


def document(answer: Answer) -> Any:
    assert answer.headers["Content-Type"] == "application/json"
    return json.loads(answer.body)
