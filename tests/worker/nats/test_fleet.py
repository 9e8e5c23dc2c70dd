"""The names of a fleet: they never change from release to release, and never meet those of another fleet."""

from __future__ import annotations

from typing import Any

import pytest

from aiokeyless import ConfigurationError
from aiokeyless.worker import Outcome
from aiokeyless.worker.nats import Fleet


def names(fleet: Fleet) -> list[str]:
    return [
        fleet.requests,
        fleet.outcomes,
        fleet.claims,
        fleet.consumer,
        fleet.request_subject,
        *(fleet.outcome_subject(outcome) for outcome in Outcome),
        fleet.claim_subject("*"),
    ]


def test_names_never_change() -> None:
    assert names(Fleet()) == [
        "KEYLESS_REQUESTS",
        "KEYLESS_OUTCOMES",
        "KEYLESS_CLAIMS",
        "keyless-approvals",
        "keyless.approvals.request",
        "keyless.approvals.approved",
        "keyless.approvals.expired",
        "keyless.approvals.failed",
        "keyless.claims.*",
    ]


def test_two_fleets_share_no_name() -> None:
    assert not set(names(Fleet(name="a"))) & set(names(Fleet(name="a-b")))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"name": name} for name in ("", "Keyless", "a.b", "a b", "a*", "a>", "-a", "a_b", "a" * 33, "\u00e9", 7)),
        *({"prefix": prefix} for prefix in ("", "a..b", ".a", "a.", "a.*", "a b", "a.>", 7)),
    ],
)
def test_what_cannot_be_in_a_name_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Fleet(**wrong)
    assert caught.value.argument in wrong
