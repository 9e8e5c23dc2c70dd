"""``aiokeyless verify``: verifies that a user signed a text on their phone."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from aiokeyless._validation import check_tenant, check_user_id

from .app import AsJson, CommandError, Seconds, app, open_client, validator
from .render import print_object


@app.command(
    help_epilogue="""\
Example, for a sandbox:
  aiokeyless verify eyJhbGciOi... --tenant sandbox --user C0FFEE --data "Pay 40\""""
)
async def verify(
    token: Annotated[str, Parameter(name="TOKEN")],
    /,
    *,
    tenant: Annotated[str, Parameter(validator=validator(check_tenant))],
    user: Annotated[str, Parameter(validator=validator(check_user_id))],
    data: str,
    external_user_id: str | None = None,
    audience: str | None = None,
    max_age: Seconds = 300.0,
    as_json: AsJson = False,
) -> None:
    """Verify a transaction that a user signed on their phone.

    A signature is evidence beside an approval, and never replaces one. A token can be verified more than once.

    Args:
        token: The token that the app handed over.
        tenant: Your tenant's name: the NAME in the address of its keys, /customers/NAME/.well-known/jwks.json.
        user: The user who must have signed, in hex.
        data: The text that the user must have signed, byte by byte.
        external_user_id: Your own id of the user that the token must name; not compared if left out.
        audience: The aud that the token must have; if left out, a token with one is refused.
        max_age: Seconds that may have passed since the user signed.
    """
    try:
        from aiokeyless.signatures import TransactionVerifier  # noqa: PLC0415  # needs an extra
    except ModuleNotFoundError:
        raise CommandError('verify needs PyJWT: install the extra "jwt"') from None
    async with open_client(as_json=as_json) as client:
        verifier = TransactionVerifier(client, tenant=tenant, audience=audience, max_age=max_age)
        signed = await verifier.verify(token, user_id=user, transaction_data=data, external_user_id=external_user_id)
    facts = {
        "Signed": signed.transaction_data,
        "By": signed.user_id,
        "External": signed.external_user_id,
        "At": f"{signed.issued_at:%Y-%m-%d %H:%M:%S} UTC",
        "Key": signed.key_id,
        "SHA-256": signed.signed_sha256,
    }
    print_object(signed.to_dict(), facts, bold="Signed", as_json=as_json)
