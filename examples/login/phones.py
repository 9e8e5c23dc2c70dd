"""Links an account to its owner's phone: `python phones.py alice@example.com`, run by somebody who checked who asks.

An app is not believed when it says whose phone it is on. Keyless says which user enrolled, or authenticated, under an
operation id that is given out once.
"""

import asyncio
import os
import secrets
import sqlite3
import sys
import time

from aiokeyless import KeylessClient

ACCOUNTS = {"alice@example.com": "account-1", "bob@example.com": "account-2"}  # a real site has a table of them
OFFER = 600.0  # seconds for which an operation id can link an account


def open_record() -> sqlite3.Connection:
    """Open the record of users, which each process of the site shares."""
    record = sqlite3.connect(os.environ.get("LOGIN_DB", "login.sqlite3"), isolation_level=None)  # statements commit
    record.execute("CREATE TABLE IF NOT EXISTS users (account PRIMARY KEY, user_id UNIQUE, phone)")
    record.execute("CREATE TABLE IF NOT EXISTS offers (id PRIMARY KEY, account, ends)")
    return record


def offer(record: sqlite3.Connection, account: str) -> str:
    """Return an operation id that links the account once. Whoever has it decides which phone: show it to the owner."""
    operation_id = secrets.token_urlsafe(16)
    record.execute("INSERT INTO offers VALUES (?, ?, ?)", (operation_id, account, time.time() + OFFER))
    return operation_id


async def link(client: KeylessClient, record: sqlite3.Connection, operation_id: str) -> str:
    """Wait until a phone used an offered id, and link the account to its user, in place of an earlier one."""
    query = "SELECT account, ends FROM offers WHERE id = ? AND ends > ?"
    offered = record.execute(query, (operation_id, time.time())).fetchone()
    if offered is None:
        raise PermissionError("this id was never offered, is used, or is too old")
    account, ends = offered
    # A bare id accepts any user: who it is, is the question.
    operation = await client.wait_for_approval(operation_id, timeout=ends - time.time(), if_missing="wait")
    user_id = operation.user_id.upper()
    devices = [device for device in await client.get_devices(user_id) if device.deleted_at is None]
    phone = devices[0].public_signing_key if len(devices) == 1 else None  # of several, one may be a backup
    with record:
        record.execute("BEGIN IMMEDIATE")
        if record.execute("DELETE FROM offers WHERE id = ?", (operation_id,)).rowcount == 0:
            raise PermissionError("this id was used meanwhile")
        change = "INSERT INTO users VALUES (?, ?, ?) ON CONFLICT (account) DO UPDATE SET user_id = ?, phone = ?"
        record.execute(change, (account, user_id, phone, user_id, phone))  # IntegrityError: another account's user
    return user_id


async def main(email: str) -> None:
    """Link the account with this address."""
    record = open_record()
    operation_id = offer(record, ACCOUNTS[email])
    print(f"Within 10 minutes, enroll or authenticate with the operation id {operation_id}", flush=True)
    async with KeylessClient() as client:
        print(f"{email} is user {await link(client, record, operation_id)}")
    record.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
