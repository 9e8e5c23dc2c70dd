"""A session of yours, for a gateway that demands a client certificate: `python client_certificate.py`."""

import asyncio
import os
import ssl

import aiohttp

from aiokeyless import KeylessClient


def make_tls() -> ssl.SSLContext:
    """Trust your own authority alone, and show your certificate."""
    tls = ssl.create_default_context(cafile=os.environ["GATEWAY_AUTHORITY"])  # without cafile: the system's
    tls.load_cert_chain(os.environ["CLIENT_CERTIFICATE"], os.environ["CLIENT_KEY"])
    return tls


async def main() -> None:
    """Make a call."""
    connector = aiohttp.TCPConnector(ssl=make_tls(), limit=0)  # 0: the client limits its polls itself
    async with (
        aiohttp.ClientSession(connector=connector, trust_env=True) as session,  # the proxy of the environment
        KeylessClient(session=session) as client,
    ):
        print(await client.get_pending_operations("0123456789ABCDEF"))


if __name__ == "__main__":
    asyncio.run(main())
