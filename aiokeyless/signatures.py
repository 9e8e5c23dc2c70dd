"""`TransactionVerifier`: verifies what a user signed on the phone. Needs the extra "jwt".

This module fetches and keeps the keys. `_token.py` decides what a token proves.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final

from ._validation import check_required_text, check_tenant, check_text, check_user_id, finite_seconds
from .client import KeylessClient
from .errors import (
    ClientClosedError,
    ConfigurationError,
    DecodeError,
    SignatureError,
    SignatureReason,
    StatusError,
    TransportError,
)
from .models import SignedTransaction

try:
    import jwt

    from ._token import Expectation, KeySet, read_token, verify
# The package "jwt" is another one, so name the extra.
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        f'aiokeyless.signatures needs {_missing.name}: install the extra "jwt"', name=_missing.name
    ) from _missing

__all__ = ["SignedTransaction", "TransactionVerifier"]

#: Seconds for which a key set is kept.
_LIFETIME: Final = 24 * 3600.0
#: Seconds between fetches for a ``kid`` that is not in the key set, or while the key set is too old.
_REFRESH: Final = 300.0
#: Seconds between fetches while there is no key set.
_RETRY: Final = 10.0
#: Seconds from the start of a fetch for which a known key waits for it, since it may have been revoked.
_KNOWN_WAITS: Final = 1.0


class TransactionVerifier:
    """Verifies transactions that users signed on their phones.

    A signature is evidence of who approved what. It never replaces an approval: a token has no operation id, and can be
    verified more than once. To accept a token once, store `SignedTransaction.signed_sha256` under a unique index.

    This was not tried against the live service, and the vendor's pages contradict each other about algorithms and
    ``kid``.

    Use one verifier per process: it keeps the tenant's public keys for 24 hours. A token with an unknown ``kid`` causes
    a fetch. Anybody can make such tokens, so there is at most one fetch in 5 minutes.

    Args:
        client: Fetches the public keys from the well-known path of its `base_url`, without the API key.
        tenant: The tenant's name, as in that path.
        max_age: Seconds that may have passed since the user signed. Default: 300.
        leeway: Seconds by which the phone's clock may differ. Default: 30.
        issuer: The ``iss`` that a token must have. Default: not compared.
        audience: The ``aud`` that a token must have. Default: none; a token with an ``aud`` is refused.

    Raises:
        ConfigurationError: An argument is wrong.

    Example:
        >>> verifier = TransactionVerifier(client, tenant="acme")
        >>> signed = await verifier.verify(token, user_id="C0FFEE", transaction_data="Pay 40 EUR to Alice")
    """

    def __init__(
        self,
        client: KeylessClient,
        *,
        tenant: str,
        max_age: float = 300.0,
        leeway: float = 30.0,
        issuer: str | None = None,
        audience: str | None = None,
    ) -> None:
        self._client = client
        self._tenant = check_tenant(tenant)
        self._max_age = finite_seconds(max_age, "max_age")
        self._leeway = finite_seconds(leeway, "leeway", zero=True)
        self._issuer = check_text(issuer, "issuer")
        self._audience = check_text(audience, "audience")
        self._keys: KeySet | None = None
        self._stale_at = -math.inf
        self._next_fetch_at = -math.inf
        # The failure of the last fetch; None if it succeeded.
        self._failure: Exception | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._fetch_began = -math.inf

    async def verify(
        self, token: str, *, user_id: str, transaction_data: str, external_user_id: str | None = None
    ) -> SignedTransaction:
        """Verify a token that your backend received from the phone.

        Args:
            token: The token, a JWT in compact form.
            user_id: The user who must have signed, in hex of either case.
            transaction_data: The text that the user must have signed, compared byte by byte, without normalization.
            external_user_id: Your own id of the user that the token must name. Default: not compared.

        Returns:
            What the token proves.

        Raises:
            ConfigurationError: An argument is wrong.
            SignatureError: The token is refused; its ``reason`` says why.
            ClientClosedError: The client is closed, and the token's key is not known.

        Source: Keyless documentation, "JWT verification best practice".
        """
        expected = Expectation(
            user_id=check_user_id(user_id),
            transaction_data=check_required_text(transaction_data, "transaction_data"),
            external_user_id=check_text(external_user_id, "external_user_id"),
            issuer=self._issuer,
            audience=self._audience,
            max_age=self._max_age,
            leeway=self._leeway,
        )
        if not isinstance(token, str):
            raise ConfigurationError(f"token must be a string, not {type(token).__name__}", argument="token")
        parsed = read_token(token)
        key = await self._get_key(parsed.key_id)
        return verify(parsed, key, expected, time.time())

    async def _get_key(self, key_id: str) -> jwt.PyJWK:
        """Return the key with a ``kid``, after a fetch if one is due.

        Raises:
            SignatureError: There is no such key, or the last fetch failed, or none may be made yet.
            ClientClosedError: The client is closed, and the key is not known.
        """
        # Whether a fetch tells if there is such a key. If the last one was too recent, the key may be newer than it.
        is_asked = self._fetching is not None or self._is_fetch_due(key_id)
        if self._find(key_id) is None:
            if self._fetching is not None:
                await asyncio.shield(self._fetching)
            if self._is_fetch_due(key_id):
                await asyncio.shield(self._start_fetch())
        elif self._is_fetch_due(key_id):
            # A known key does not wait for an address that hangs.
            fetching = self._start_fetch()
            left = self._fetch_began + _KNOWN_WAITS - asyncio.get_running_loop().time()
            await asyncio.wait({fetching}, timeout=max(0.0, left))
        key = self._find(key_id)
        if key is not None:
            return key
        if isinstance(self._failure, ClientClosedError):
            raise self._failure.with_traceback(None)
        if self._failure is not None or not is_asked:
            raise SignatureError(SignatureReason.KEYS_UNAVAILABLE) from self._failure
        raise SignatureError(SignatureReason.UNKNOWN_KEY)

    def _is_fetch_due(self, key_id: str) -> bool:
        now = asyncio.get_running_loop().time()
        return now >= self._next_fetch_at and (now >= self._stale_at or self._find(key_id) is None)

    def _find(self, key_id: str) -> jwt.PyJWK | None:
        return None if self._keys is None else self._keys.find(key_id)

    def _start_fetch(self) -> asyncio.Task[None]:
        """Return the fetch that concurrent verifications share, and that none of them cancels."""
        if self._fetching is None:
            self._fetch_began = asyncio.get_running_loop().time()
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        """Fetch the key set. If that fails, keep the current one."""
        clock = asyncio.get_running_loop().time
        # A fetch for an unknown ``kid``, though the key set is not too old.
        is_extra = clock() < self._stale_at
        try:
            self._keys = KeySet(await self._client.get_key_set(self._tenant))
        except ClientClosedError as error:
            self._failure = error
        except (DecodeError, StatusError, TransportError, ValueError) as error:
            self._failure = error.with_traceback(None)
            self._next_fetch_at = clock() + (_RETRY if self._keys is None else _REFRESH)
        else:
            self._failure = None
            self._stale_at = clock() + _LIFETIME
            if is_extra:
                self._next_fetch_at = clock() + _REFRESH
        finally:
            self._fetching = None
