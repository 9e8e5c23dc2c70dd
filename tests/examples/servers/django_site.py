"""What Django runs in `test_sites.py`: the program of the examples, with a login and a database."""

from __future__ import annotations

import os

from django.conf import settings

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["127.0.0.1"],
    SECRET_KEY="of the sessions",
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ["PAYMENTS_DB"],
            "ATOMIC_REQUESTS": True,
        }
    },
    INSTALLED_APPS=["billing"],
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
)

import django  # noqa: E402  # it needs the settings

django.setup()

from billing.models import Customer, Hold, Order, Payment  # noqa: E402
from billing.views import urlpatterns as of_the_example  # noqa: E402
from django.core.management import execute_from_command_line  # noqa: E402
from django.db import connection  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.urls import path  # noqa: E402


def log_in(request: HttpRequest, user_id: str) -> HttpResponse:
    """Log a user in."""
    request.session["user_id"] = user_id
    return HttpResponse()


urlpatterns = [*of_the_example, path("login/<user_id>", log_in)]

if __name__ == "__main__":
    if not connection.introspection.table_names():
        with connection.schema_editor() as editor:
            for model in (Customer, Order, Payment, Hold):
                editor.create_model(model)
    execute_from_command_line(["manage.py", "runserver", "--noreload", f"127.0.0.1:{os.environ['PORT']}"])
