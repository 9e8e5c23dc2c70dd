"""What Flask runs in `test_sites.py`: the program of the examples, with a login."""

from __future__ import annotations

import os

from flask import session
from flask_app import app


@app.get("/login/<user_id>")
def log_in(user_id: str) -> str:
    """Log a user in."""
    session["user_id"] = user_id
    return ""


if __name__ == "__main__":
    app.run(port=int(os.environ["PORT"]))
