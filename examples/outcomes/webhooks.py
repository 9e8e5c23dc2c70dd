"""Outcomes as signed webhooks, as Standard Webhooks 1.0.0 says: a reader that posts each one until it is received."""

import asyncio
import base64
import hmac
import logging
import os
import time
from hashlib import sha256

import aiohttp
import msgspec

from aiokeyless.worker import Broker, next_outcome
from aiokeyless.worker.sqlite import SqliteBroker

log = logging.getLogger("webhooks")


async def post_outcomes(broker: Broker, http: aiohttp.ClientSession, url: str, secret: str) -> None:
    """Post each outcome to an address, and post it again later after anything but a 2xx."""
    key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    if len(key) < 24:
        raise ValueError("the secret must be the base64 of at least 24 random bytes")
    while True:
        try:
            async with next_outcome(broker, "webhooks") as event:
                body = msgspec.json.encode(
                    {"type": f"approval.{event.outcome}", "timestamp": event.decided_at, "data": event}
                )
                name, now = f"msg_{sha256(body).hexdigest()}", int(time.time())
                signature = base64.b64encode(hmac.digest(key, f"{name}.{now}.".encode() + body, "sha256")).decode()
                headers = {"webhook-id": name, "webhook-timestamp": f"{now}", "webhook-signature": f"v1,{signature}"}
                async with http.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                    if answer.status // 100 != 2:
                        raise aiohttp.ClientResponseError(answer.request_info, (), status=answer.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("the webhook is sent again later: %s %s", type(error).__name__, error)


async def main() -> None:
    """Post the outcomes of a file's workers."""
    headers = {"content-type": "application/json"}
    http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20), headers=headers)
    async with http, SqliteBroker(os.environ["KEYLESS_FILE"]) as broker:
        await post_outcomes(broker, http, os.environ["WEBHOOK_URL"], os.environ["WEBHOOK_SECRET"])


if __name__ == "__main__":
    asyncio.run(main())
