"""The waits of one client, in memory: a pure machine, and the asyncio around it."""
