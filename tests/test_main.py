"""The entry point: with its extra and without; and what importing the library imports."""

from __future__ import annotations

import importlib
import runpy
import signal
import subprocess
import sys

import pytest

import aiokeyless.__main__
from aiokeyless import __version__, _interruption
from aiokeyless.__main__ import main


@pytest.mark.parametrize("missing", ["cyclopts", "rich"])
def test_without_the_extra_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    block(monkeypatch, missing)
    assert main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f'aiokeyless: the command line needs {missing}: install the extra "cli" of the checkout, '
        'by pip install "path/to/aiokeyless[cli]"\n'
    )


def test_another_missing_module_is_not_reported_as_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    block(monkeypatch, "contextlib")
    with pytest.raises(ModuleNotFoundError, match="contextlib"):
        main()


@pytest.mark.parametrize("name", ["aiokeyless", "aiokeyless.exe", "-m"])
def test_ctrl_c_while_the_library_is_imported_for_the_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", [f"bin/{name}"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "aiokeyless", "demo"])
    importlib.reload(_interruption)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr() == ("", "aiokeyless: interrupted\n")
    sys.excepthook(LookupError, LookupError("no such thing"), None)
    assert capsys.readouterr() == ("", "LookupError: no such thing\n")


@pytest.mark.parametrize("arguments", [["shop.py"], ["bin/pytest"], ["-m", "shop"], [""], []])
def test_another_programs_ctrl_c_is_reported_by_python(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", arguments[:1])
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments])  # in python -m shop, its package may import this one
    importlib.reload(_interruption)
    assert sys.excepthook is sys.__excepthook__


def test_ctrl_c_while_the_command_starts_is_one_line() -> None:
    program = """
import sys

class Interrupting:
    def find_spec(self, name, *_rest):
        if name == "msgspec":  # the first that takes long
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
sys.argv = ["aiokeyless"]
from aiokeyless.__main__ import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "aiokeyless: interrupted\n")


def block(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in list(sys.modules):
        if name == "aiokeyless.cli" or name.startswith(("aiokeyless.cli.", f"{module}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)


def test_python_dash_m_is_the_same_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["aiokeyless", "--version"])
    with pytest.raises(SystemExit) as end:
        # not run_module: pytest rewrites the assertions of plugins' packages, and its loader has no code to give
        runpy.run_path(aiokeyless.__main__.__file__, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"aiokeyless {__version__}\n"


def test_neither_the_library_nor_its_pytest_plugin_imports_what_it_does_not_need() -> None:
    program = """
import sys, aiokeyless
from aiokeyless._tracing import context_without_traces, current_traceparent
context_without_traces()
assert current_traceparent() is None
ours = {"aiokeyless.cli", "aiokeyless.__main__", "aiokeyless.sandbox"}
print({*ours, "aiohttp.web", "cyclopts", "opentelemetry", "rich"} & sys.modules.keys())
import pytest, pytest_asyncio
before = {*sys.modules}
import aiokeyless.pytest_plugin
print({*sys.modules} - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n{'aiokeyless.pytest_plugin'}\n"
