"""Ask a user to approve something on their phone, and wait for it.

`KeylessClient()` takes the key from ``$KEYLESS_API_KEY``, and the API's address from ``$KEYLESS_REGION`` or
``$KEYLESS_BASE_URL``.
"""

import asyncio

from aiokeyless import ApprovalTicket, ApprovalTimeoutError, KeylessClient


def push(ticket: ApprovalTicket) -> None:
    """Send your app's push notification here."""
    print(f"push to the phone of {ticket.user_id}")


async def main() -> None:
    """Pay if the user approves within a minute."""
    async with KeylessClient() as client:
        try:
            operation = await client.request_approval(
                "0123456789ABCDEF",
                operation_payload="Pay 40 EUR to Alice",
                expires_in=60,
                require_auth_type="biom",  # a face: a PIN does not pay
                on_created=push,
            )
        except ApprovalTimeoutError:  # not a denial: it can still be approved later
            print("Not paid, and a later approval pays for nothing.")
        else:
            print(f"Approved ({operation.auth_type}): pay.")


asyncio.run(main())
