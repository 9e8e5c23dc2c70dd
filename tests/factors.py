"""A sandbox whose users approve at once, by the factor that a test chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from aiokeyless import Operation


class ApprovingSandbox(Sandbox):
    """It approves each operation as soon as it is created.

    Args:
        factor: ``"biom"`` or ``"pin"``.
    """

    def __init__(self, factor: str) -> None:
        super().__init__(auto_approve=self._approve_by_factor)
        self._factor = factor

    def _approve_by_factor(self, operation: Operation) -> None:
        self.approve(operation.operation_id, auth_type=self._factor)
