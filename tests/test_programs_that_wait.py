"""All programs that wait for an approval, in pages and examples: what it must not do there, and which test asks that.

A new program gets a row. One that answers a browser can be one of `examples/test_sites.py`.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TESTS = Path(__file__).parent
ROOT = TESTS.parent

LATE, PIN, USER = "approved after the timeout", "a PIN", "another user"
TAB, RESTART, TWICE = "another tab", "a restart in between", "the browser asks twice at once"
CASES = (LATE, PIN, USER, TAB, RESTART, TWICE)

Row = dict[str, str]  # for each case a test that asks for it, or else why it cannot occur


def asked_in(file: str, *names: str) -> Row:
    """Return the row of a program whose tests are in one file, most of them; they come in the order of the cases."""
    row = zip(CASES, names, strict=True)
    return {case: f"{file}::{name}" if name.startswith("test_") else name for case, name in row}


SITE: Final = asked_in(
    "examples/test_sites.py",
    "test_an_approval_after_the_timeout_counts_for_nothing",
    "test_a_pin_is_refused_for_good",
    "test_an_approval_is_of_the_user_who_asked_and_of_no_other",
    "test_an_approval_is_of_the_tab_that_asked",
    "test_an_approval_outlives_its_process_wherever_that_ends",
    "test_a_browser_that_asks_twice_at_once_is_told_the_same_and_pays_once",
)
#: The outcome is the worker's, who decides once.
WORKER: Final = {
    LATE: "worker/conformance/test_decisions.py::test_the_first_of_two_decisions_is_kept_whichever_delivery_it_is_of",
    PIN: "worker/test_decisions.py::test_an_operation_that_a_pin_approved_is_no_face_and_says_so",
    USER: "worker/test_decisions.py::"
    "test_an_answer_about_something_else_or_that_contradicts_itself_has_failed_and_says_why",
    TAB: "each request has an operation of its own",
    RESTART: "worker/conformance/test_requests.py::test_what_is_stored_is_there_for_the_next_process",
    TWICE: "worker/conformance/test_requests.py::test_the_same_request_twice_is_one_also_if_only_created_at_differs",
}
PAGES = {PIN: "test_docs.py::test_no_program_of_the_docs_that_acts_on_an_approval_takes_a_pin"}
NOTHING = dict.fromkeys(CASES, "nothing follows from what it shows")

TABLE: Mapping[str, Row] = {
    "README.md#1": PAGES,
    "examples/agent/gate.py": asked_in(
        "examples/test_agent.py",
        "test_request_that_nobody_approves_ends_and_a_late_approval_counts_for_nothing",
        "test_a_pin_makes_no_transfer",
        "test_an_approval_of_one_user_is_neither_found_nor_spent_by_another_on_the_same_record",
        "test_changed_arguments_are_refused_under_the_old_request",
        "test_two_processes_on_one_record_ask_once_and_act_once",
        "test_repeated_calls_ask_once_and_go_on",
    ),
    "examples/agent/graph.py": WORKER
    | {
        PIN: "examples/test_agent_frameworks.py::test_an_outcome_before_its_thread_parks_comes_again",
        USER: "examples/test_agent_frameworks.py::test_an_outcome_of_something_else_makes_a_thread_do_nothing",
        RESTART: "examples/test_agent_frameworks.py::test_a_thread_parks_and_another_process_resumes_it",
    },
    "examples/agent/guard.py": asked_in(
        "test_guard.py",
        "test_an_approval_after_the_timeout_does_nothing",
        "test_a_pin_lets_nothing_act_now_or_later",
        "test_an_answer_about_something_else_is_refused",
        "test_an_approval_serves_no_other_arguments",
        "test_of_two_processes_that_go_on_one_acts",
        "test_of_two_processes_that_go_on_one_acts",
    ),
    "examples/checkout/shop.py": asked_in(
        "examples/test_checkout.py",
        "test_an_approval_after_the_timeout_pays_for_nothing",
        "test_an_answer_that_does_not_match_is_refused_for_good",
        "test_no_user_sees_anothers_order",
        "test_many_tabs_that_learn_of_one_approval_ship_once",
        "test_a_killed_backend_loses_no_wait",
        "test_many_clicks_on_pay_ask_once",
    ),
    "examples/django_site/billing/views.py": SITE,
    "examples/event_worker/payments.py": asked_in(
        "examples/test_event_worker.py",
        "test_late_approval_revives_nothing_even_when_the_event_comes_again",
        "test_a_pin_pays_nothing_whoever_submitted_the_request",
        "test_approval_of_something_else_that_bears_a_payment_as_its_context_is_no_verdict",
        "test_another_payment_under_the_same_id_is_refused_and_takes_nothing_from_the_first",
        "test_application_that_was_away_misses_nothing",
        "test_event_that_comes_twice_is_one_operation_and_has_one_verdict",
    ),
    "examples/four_eyes.py": asked_in(
        "test_four_eyes.py",
        "test_one_is_not_enough_and_a_late_second_neither",
        "test_an_approval_by_a_pin_or_of_something_else_is_no_voice",
        "test_an_approval_by_a_pin_or_of_something_else_is_no_voice",
        "each payment has questions of its own",
        "test_after_a_process_that_stops_the_next_one_pays",
        "test_a_payment_decided_twice_at_once_is_paid_once",
    ),
    "examples/guarded_bot/bot.py": asked_in(
        "examples/test_guarded_bot.py",
        "test_refused_command_stays_refused_though_it_is_delivered_and_approved_again",
        "test_a_pin_transfers_nothing",
        "test_operation_of_another_under_the_commands_id_transfers_nothing",
        "test_late_approval_is_no_answer_to_the_next_question",
        "test_question_that_outlived_the_bot_is_answered_once",
        "test_command_that_is_delivered_twice_at_once_transfers_once",
    ),
    "examples/login/login.py": asked_in(
        "examples/test_login.py",
        "test_approval_after_the_end_logs_nobody_in",
        "test_a_pin_logs_nobody_in",
        "test_answer_about_another_user_is_refused",
        "test_approval_logs_in_the_browser_that_asked_and_no_other",
        "test_login_survives_a_server_that_is_killed",
        "test_one_approval_counts_once_however_often_it_is_asked_about",
    ),
    "examples/login/phones.py": asked_in(
        "examples/test_login.py",
        "test_an_offer_links_once_and_not_after_its_time",
        "it asks who the user is, and a PIN says so, too",
        "test_an_attacker_who_sends_a_victims_ids_takes_over_nothing",
        "test_an_attacker_who_sends_a_victims_ids_takes_over_nothing",
        "whoever runs it runs it again, which offers a new id",
        "test_an_offer_links_once_and_not_after_its_time",
    ),
    "examples/logs/dict_config.py": NOTHING,
    "examples/logs/structlog_lines.py": NOTHING,
    "examples/many_tenants/tenants_app.py": asked_in(
        "examples/test_many_tenants.py",
        "test_an_approval_after_the_timeout_counts_for_nothing",
        "test_a_pin_is_refused_for_good",
        "test_an_order_is_of_the_user_and_of_the_tenant_that_asked",
        "each order has an operation of its own",
        "test_open_waits_of_all_tenants_end_at_a_signal_and_the_next_process_goes_on",
        "test_an_order_that_is_asked_about_twice_at_once_is_one_operation",
    ),
    "examples/message_handler.py": asked_in(
        "examples/test_message_handler.py",
        "test_an_approval_after_the_timeout_pays_nothing",
        "test_a_pin_pays_nothing",
        "test_another_payment_under_the_id_is_rejected_and_takes_nothing_from_the_first",
        "test_another_payment_under_the_id_is_rejected_and_takes_nothing_from_the_first",
        "test_a_message_whose_client_closes_is_paid_by_the_next_one",
        "test_a_message_that_is_delivered_twice_at_once_is_asked_about_once_and_decided_once",
    ),
    "examples/observability/load.py": NOTHING,
    "examples/outcomes/keycloak.py": {
        PIN: "examples/test_outcomes.py::test_keycloak_gets_the_result_of_a_login_once",
    },
    "examples/outcomes/webhooks.py": WORKER,
    "examples/paid_once.py": asked_in(
        "test_paid_once.py",
        "test_an_approval_after_the_timeout_pays_nothing",
        "test_a_pin_pays_nothing_now_or_later",
        "test_operation_of_other_content_under_the_orders_id_pays_nothing",
        "each order has an operation of its own",
        "test_approval_that_came_while_the_process_was_down_pays_once",
        "test_any_calls_under_any_faults_pay_once",
    ),
    "examples/postgres_shop/django_orders.py": WORKER,
    "examples/postgres_shop/driver_orders.py": WORKER
    | {PIN: "worker/postgres/test_families.py::test_the_examples_reader_of_each_driver_settles_what_fits"},
    "examples/postgres_shop/session_orders.py": WORKER
    | {
        PIN: "worker/postgres/test_families.py::"
        "test_the_examples_reader_of_sessions_settles_what_fits_and_goes_on_after_a_lost_connection"
    },
    "examples/postgres_shop/settle.py": WORKER
    | {
        PIN: "examples/test_postgres_shop.py::test_a_pin_pays_nothing_whoever_submitted_the_request",
        RESTART: "examples/test_postgres_shop.py::test_each_order_is_paid_once_whatever_is_killed",
    },
    "examples/quickstart.py": PAGES,
    "examples/shutdown/aiogram_bot.py": {
        PIN: "examples/test_shutdown_recipes.py::"
        "test_a_pin_is_no_approval_for_a_bot_and_a_bot_that_waits_stops_and_says_so",
    },
    "examples/shutdown/approvals.py": SITE | {USER: "it has one user"},
    "examples/sync/celery_tasks.py": asked_in(
        "examples/test_howto.py",
        "test_a_task_that_is_delivered_again_decides_nothing_anew",
        "test_synchronous_code_waits_in_a_background_loop_and_ends",
        "a task has the ticket of one user",
        "each task has a ticket of its own",
        "examples/test_servers.py::test_the_task_of_a_killed_process_runs_again",
        "test_a_task_that_is_delivered_again_decides_nothing_anew",
    ),
    "examples/sync/flask_app.py": SITE,
    "examples/sync/script.py": {
        PIN: "examples/test_howto.py::test_synchronous_code_waits_in_a_background_loop_and_ends",
    },
    "examples/taskiq_tasks.py": asked_in(
        "examples/test_taskiq.py",
        "test_a_task_that_is_delivered_again_decides_nothing_anew",
        "test_a_task_waits_in_pieces_until_its_ticket_is_decided",
        "a task has the ticket of one user",
        "each task has a ticket of its own",
        "test_a_task_waits_in_pieces_until_its_ticket_is_decided",
        "test_a_task_that_is_delivered_again_decides_nothing_anew",
    ),
    "examples/temporal/activities.py": asked_in(
        "examples/test_temporal.py",
        "test_a_timeout_is_a_result_and_a_late_approval_changes_it_for_no_one",
        "test_a_pin_transfers_nothing",
        "test_an_answer_about_something_else_is_final_and_a_closed_client_is_not",
        "each workflow has an operation of its own",
        "test_another_worker_goes_on_with_the_ticket_and_asks_nobody_again",
        "test_transfer_that_is_repeated_happens_once",
    ),
    "docs/howto/declined.md#1": PAGES,
    "docs/howto/observability.md#1": PAGES,
    "docs/howto/resuming.md#1": PAGES
    | {
        LATE: "nothing waits for a ticket again",
        USER: "each ticket names its user",
        TAB: "each task has a ticket of its own",
        RESTART: "the wait ends with its process, as the page says",
        TWICE: "each ticket has one task",
    },
    "docs/howto/resuming.md#2": PAGES
    | {
        LATE: "examples/test_howto.py::test_a_program_that_resumes_is_not_ended_by_an_expired_ticket",
        USER: "each ticket names its user",
        TAB: "each request has a ticket of its own",
        RESTART: "examples/test_howto.py::test_a_program_that_resumes_is_not_ended_by_an_expired_ticket",
        TWICE: "examples/test_howto.py::test_two_processes_that_resume_at_once_report_an_approval_once",
    },
    "docs/howto/resuming.md#3": PAGES,
    "docs/howto/running-workers.md#1": NOTHING,
    "docs/howto/sync.md#1": NOTHING,
    "docs/howto/timeouts.md#1": PAGES,
    "docs/index.md#1": PAGES,
    "docs/tutorial.md#1": {
        LATE: "examples/test_tutorial.py::test_tutorial_works_as_written",
        PIN: "examples/test_tutorial.py::test_a_pin_logs_nobody_in",
        USER: "examples/test_tutorial.py::test_tutorial_works_as_written",
        TAB: "examples/test_tutorial.py::test_tutorial_works_as_written",
        RESTART: "a restart loses all logins, as the page says",
        TWICE: "each click asks about a login of its own",
    },
    "docs/why-not-a-loop.md#2": NOTHING,
    "docs/why-not-a-loop.md#3": NOTHING,
}


class Source(NamedTuple):
    """A program."""

    name: str
    code: str

    @property
    def calls(self) -> dict[str, set[str | None]]:
        """The waits that it calls, with the names of their arguments; and what reads outcomes."""
        waits = re.compile(r"request_approval|(wait|hold)_for_approvals?|watch_approval|next_outcome|ApprovalEvent")
        found: dict[str, set[str | None]] = {}
        for node in ast.walk(ast.parse(self.code)):
            match node:
                case ast.Call(ast.Attribute(attr=name) | ast.Name(name), keywords=keywords) if waits.fullmatch(name):
                    found.setdefault(name, set()).update(keyword.arg for keyword in keywords)
                case ast.ImportFrom(names=names):
                    found |= {alias.name: set() for alias in names if alias.name == "ApprovalEvent"}
        return found

    @property
    def cases(self) -> set[str]:
        """What can occur. If each question has a new id and one wait, nothing can be asked about it again."""
        asks_anew = self.calls.keys() == {"request_approval"} and "operation_id" not in self.calls["request_approval"]
        return {PIN} if asks_anew else {*CASES}


def sources() -> Iterator[Source]:
    """All programs but tests. What a page shows of an example, below a comment, is in the examples."""
    programs = [path for path in sorted((ROOT / "examples").rglob("*.py")) if not path.name.startswith("test_")]
    for path in programs:
        yield Source(path.relative_to(ROOT).as_posix(), path.read_text())
    fence = re.compile(r"(?<! -->\n)^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        own = (textwrap.dedent(block) for _, block in fence.findall(page.read_text()))
        for number, code in enumerate(own, start=1):
            if "def test_" not in code:
                yield Source(f"{page.relative_to(ROOT).as_posix()}#{number}", code)


def test_each_program_that_waits_has_a_row_with_all_that_can_occur() -> None:
    waiting = {source.name: source.cases for source in sources() if source.calls}
    assert {name: {*row} for name, row in TABLE.items()} == waiting


def test_each_test_of_the_table_exists() -> None:
    named = {test for row in TABLE.values() for test in row.values() if "::" in test}
    assert len(named) > 50
    for test in named:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text(), test
