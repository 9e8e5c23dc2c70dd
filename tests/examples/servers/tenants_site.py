"""What uvicorn runs in `test_many_tenants.py`: the application of the examples, with a login."""

from __future__ import annotations

import os
from typing import Annotated

import tenants
import tenants_app
import uvicorn
from fastapi import Header

tenants.READS_EVERY = 0.2
tenants_app.EXPIRES_IN = float(os.environ.get("EXPIRES_IN", "120"))
app = tenants_app.app


@app.get("/")
async def status() -> str:
    return "open"


def log_in(tenant: Annotated[str, Header()], user: Annotated[str, Header()]) -> tenants_app.Login:
    return tenants_app.Login(tenant, user)


app.dependency_overrides[tenants_app.login] = log_in

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]))
