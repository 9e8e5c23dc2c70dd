"""The errors of an application's transactions, in the same words for each driver. It imports none of them."""

from __future__ import annotations

from aiokeyless.errors import BrokerError, ConfigurationError


def outside_transaction(example: str) -> ConfigurationError:
    """Return the error of a submit on a connection without a transaction.

    Args:
        example: How to begin one with this driver.
    """
    return ConfigurationError(
        "the connection must be in a transaction, so that the request is stored if and only if that commits: submit "
        f"inside {example}",
        argument="broker",
    )


def inside_transaction(schema: str) -> ConfigurationError:
    """Return the error of reading on a connection that is in a transaction."""
    return ConfigurationError(
        "the connection must be in no transaction, since next_outcome begins one; in one of your own, use the function "
        f"{schema}.next_outcome",
        argument="broker",
    )


def rolled_back(reason: object, savepoint: str) -> BrokerError:
    """Return the error of a body whose transaction has failed.

    Args:
        reason: The driver's error.
        savepoint: What to use for statements that may fail.
    """
    return BrokerError(
        "the transaction of an outcome was rolled back, and the outcome comes again: a statement of the body failed, "
        f"or broke a constraint that is checked at the end ({reason}); for what may fail, use {savepoint}"
    )


def ended_by_body() -> ConfigurationError:
    """Return the error of a body that has ended its transaction itself."""
    return ConfigurationError(
        "the body of next_outcome must not end its transaction: what it did after that is rolled back"
    )


def not_confirmed(reason: object) -> BrokerError:
    """Return the error of a commit whose result is unknown."""
    return BrokerError(
        "the transaction of an outcome was not committed, as far as is known; if it was not, the outcome comes again: "
        f"{reason}"
    )


def missing_schema(schema: str) -> BrokerError:
    """Return the error of a schema that a worker has not prepared."""
    return BrokerError(
        f"the schema {schema!r} is missing, or older than this library: run aiokeyless worker --prepare as a user that "
        "may create it"
    )


def first_line(error: Exception) -> str:
    """Return the message of a driver's error, without the values that details and contexts quote."""
    return str(error).partition("\n")[0] or type(error).__name__
