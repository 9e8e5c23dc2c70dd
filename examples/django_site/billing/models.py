"""The record of the payments."""

from django.db import models


class Payment(models.Model):
    """A payment: its state changes once, from asked to approved, timed out or refused."""

    order = models.CharField(max_length=100, unique=True)  # the user is asked about it once
    user_id = models.CharField(max_length=128)
    ticket = models.TextField()
    state = models.CharField(max_length=10, default="asked")

    def decide(self, state: str) -> str:
        """Store an outcome before anybody is told: the first one counts, and an approval after it changes nothing."""
        if Payment.objects.filter(pk=self.pk, state="asked").update(state=state) and state == "approved":
            print(f"{self.order}: pay", flush=True)  # once: after a crash right here, repeat it under the same order
        self.refresh_from_db()
        return str(self.state)
