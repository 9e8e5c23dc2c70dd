"""Every check of this project, one session each: ``nox -l`` names them, ``nox -s lint`` runs one.

Each session has an environment of its own. Where there is one already, ``nox --no-venv`` runs in that; .ci/run does so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import chain
from pathlib import Path
from typing import Final

import nox
from nox.command import CommandFailed
from packaging.requirements import Requirement
from packaging.version import Version

nox.needs_version = ">=2025.5.1"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types"]

ROOT: Final = Path(__file__).parent

#: What needs a browser, a cluster or minutes, too.
COMPLETE: Final = ("-m", "")
#: Programs with processes and loops of their own: once is enough.
ONCE: Final = "browser or cluster or chaos or slow"
WITHOUT_PROGRAMS: Final = ("--ignore=tests/examples",)

#: The ways in which the suite runs: arguments for pytest, and the environment.
LEGS: Final[dict[str, tuple[tuple[str, ...], dict[str, str]]]] = {
    "plain": ((), {}),
    "complete": (COMPLETE, {}),
    # One set is behind looptime's back: that plugin changes the loops of unmarked tests too.
    "real_clock": (("-p", "no:looptime_plugin", "-m", "real_clock"), {}),
    # uvloop's clock does not move.
    # Tasks that begin to run when they are made; from Python 3.12 on.
    "eager": (("-m", f"not ({ONCE})", *WITHOUT_PROGRAMS), {"TEST_LOOP": "eager"}),
    "uvloop": (("-m", f"not (looptime or {ONCE})", *WITHOUT_PROGRAMS), {"TEST_LOOP": "uvloop"}),
}


def pythons() -> list[str]:
    """Return the versions of Python on this machine that the library supports."""
    versions = [f"3.{minor}" for minor in range(11, 30)]
    return [version for version in versions if _runs(f"python{version}")]


def _runs(program: str) -> bool:
    # A shim of a version manager is found, too, where there is no such version.
    found = shutil.which(program)
    return found is not None and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0  # noqa: S603


PYTHONS: Final = pythons()

#: More failures than this are no accident of timing.
FEW: Final = 5


def install(session: nox.Session, *arguments: str) -> None:
    """Install into the session's environment; with ``--no-venv`` there is one already, with everything in it."""
    if session.venv_backend != "none":
        session.install("-q", *arguments)


def pytest(
    session: nox.Session, *arguments: str, env: dict[str, str] | None = None, run_by: tuple[str, ...] = ("python",)
) -> None:
    """Run tests, and leave nothing behind in the checkout.

    Where few fail, these run once more, alone. What passes then is reported as flaky: a bug, but no reason to refuse
    a change that has nothing to do with it.
    """
    home = Path(session.create_tmp()).resolve()
    cache = home / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    left = {"PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_STORAGE_DIRECTORY": str(home / "hypothesis")} | (env or {})
    command = (*run_by, "-m", "pytest", "-o", f"cache_dir={cache}", "-q", *arguments, *session.posargs)
    try:
        session.run(*command, env=left)
    except CommandFailed:
        failed = failed_tests(cache)
        if not 0 < len(failed) <= FEW:
            raise
        session.warn("failed, and run once more: " + ", ".join(failed))
        session.run(*command, "-n", "0", "--last-failed", "--last-failed-no-failures=none", env=left)
        session.warn("FLAKY, which is a bug to fix: " + ", ".join(failed))


def failed_tests(cache: Path) -> list[str]:
    """Return the tests that failed in the last run, from pytest's cache."""
    record = cache / "v" / "cache" / "lastfailed"
    return sorted(json.loads(record.read_text())) if record.exists() else []


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules and format, and the layers of the package."""
    install(session, "-e", ".", "ruff>=0.14", "import-linter>=2.5")
    session.run("ruff", "check", "--no-cache", ".")
    session.run("ruff", "format", "--no-cache", "--check", ".")
    session.run("lint-imports", "--no-cache")


@nox.session
def types(session: nox.Session) -> None:
    """Run mypy --strict over everything, pyright over the package and the examples."""
    install(session, "-e", ".[dev]")
    session.run("mypy", "--cache-dir", os.devnull)
    session.run("pyright")


@nox.session
def public_types(session: nox.Session) -> None:
    """Demand of every public name a type that needs no inferring; fails below 100 %."""
    # Installed and not editable, and from elsewhere: pyright takes the package from where users have it.
    session.install("-q", ".[cli,nats,otel]", "pytest", "pytest-asyncio", "pyright>=1.1.410")
    with session.chdir(session.create_tmp()):
        session.run("pyright", "--verifytypes", "aiokeyless", "--ignoreexternal")


@nox.session(python=PYTHONS)
@nox.parametrize("leg", list(LEGS), ids=list(LEGS))
def tests(session: nox.Session, leg: str) -> None:
    """Run the suite: `plain` as in the README, or one of the other legs."""
    install(session, "-e", ".[dev]")
    arguments, env = LEGS[leg]
    pytest(session, *arguments, env=env)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the complete suite with branch coverage, which must be 100 %."""
    install(session, "-e", ".[dev]")
    folder = Path(session.create_tmp()).resolve() / "coverage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data = {"COVERAGE_FILE": str(folder / "data")}
    # Not by pytest --cov: our own pytest plugin loads the package before that starts to measure.
    pytest(session, *COMPLETE, env=data, run_by=("coverage", "run"))
    session.run("coverage", "combine", "-q", env=data)
    session.run("coverage", "report", env=data)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the suite on the lowest versions of the dependencies that pyproject.toml allows."""
    session.install("-q", "-e", ".[dev]")
    # Without regard to what a framework of the examples or a tool needs, which may be newer.
    session.install("-q", *lowest_bounds())
    pytest(session, *WITHOUT_PROGRAMS)


def lowest_bounds() -> list[str]:
    """Return the lower bounds of the runtime dependencies, those of the extras for users too, as exact versions."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    extras = dict(project["optional-dependencies"])
    # OpenTelemetry's SDK works with the API of its own version only.
    for_tests = [text for text in extras.pop("dev") if text.startswith("opentelemetry-")]
    needed = [Requirement(text) for text in chain(project["dependencies"], *extras.values(), for_tests)]
    return [f"{need.name}=={bound.version}" for need in needed for bound in need.specifier if bound.operator == ">="]


@nox.session(python=PYTHONS[-1:])
def wheel(session: nox.Session) -> None:
    """Run the suite against the built wheel, out of reach of the source tree."""
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    tree = folder / "tree"
    tree.mkdir(parents=True)
    session.install("-q", "build")
    session.run("python", "-m", "build", "-q", "--wheel", "--outdir", str(folder / "dist"), str(ROOT))
    [built] = (folder / "dist").glob("*.whl")
    session.install("-q", "--force-reinstall", "--no-deps", str(built))
    session.install("-q", f"{built}[dev]")
    archive = folder / "tree.tar"
    pages = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
    what = ("pyproject.toml", *pages, "benchmarks", "docs", "examples", "tests")
    session.run("git", "archive", "HEAD", "-o", str(archive), *what, external=True)
    shutil.unpack_archive(archive, tree, filter="data")
    # On tasks that start when they are created, where there are any: all else is what the other sessions run too.
    leg = "eager" if Version(str(session.python)) >= Version("3.12") else "plain"
    arguments, env = LEGS[leg]
    with session.chdir(tree):
        pytest(session, *arguments, *WITHOUT_PROGRAMS, env=env)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a link or a name that does not exist is an error."""
    install(session, "-e", ".[dev]")
    folder = Path(session.create_tmp()).resolve() / "html"
    session.run("sphinx-build", "-q", "-n", "-W", "--keep-going", "-b", "html", "-E", "docs", str(folder))


@nox.session
def simulate(session: nox.Session) -> None:
    """Try to lose an approval, in stories made up from seeds: ``nox -s simulate -- --seconds 600 --seed N``.

    Without arguments: the seeds that have ever failed and some more, which must pass; and a minute of fresh ones. What
    these find is reported: a bug, of the library or of the checker, but seldom of the change at hand.
    """
    install(session, "-e", ".[dev]")
    command, env = ("python", "-m", "tests.simulation"), {"PYTHONDONTWRITEBYTECODE": "1"}
    if session.posargs:
        session.run(*command, *session.posargs, env=env)
        return
    session.run(*command, "--known", env=env)
    session.run(*command, "--seed", "0", "--stories", "300", env=env)
    try:
        session.run(*command, "--seconds", "60", env=env)
    except CommandFailed:
        session.warn("A FRESH SEED BROKE A PROMISE, which is a bug to fix: see above")


@nox.session
def simulate_mutants(session: nox.Session) -> None:
    """Break copies of the library in many ways, and demand of the simulator that it finds nearly all of them."""
    install(session, "-e", ".[dev]")
    session.run("python", "-m", "tests.simulation.mutants", *session.posargs, env={"PYTHONDONTWRITEBYTECODE": "1"})


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Run every benchmark in short; arguments after -- take the place of --quick."""
    install(session, "-e", ".[dev]")
    session.run("python", "-m", "benchmarks", *(session.posargs or ["--quick"]))


@nox.session
def fuzz(session: nox.Session) -> None:
    """Feed what reads bytes with ever new ones; arguments after --: --seconds 60, --seed 1, --target operation."""
    session.install("-q", "-e", ".[nats]")
    try:
        # Of this session only: there are wheels for few platforms, and to build one takes a compiler with libFuzzer.
        session.install("-q", "--only-binary", "atheris", "atheris>=3")
    except CommandFailed:
        session.skip("there is no wheel of atheris for this Python and this platform")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    folder.mkdir()
    env = {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)}
    with session.chdir("tests"):
        session.run("python", "-m", "fuzz", *session.posargs, env=env)


#: The share of mutants that the tests must notice; tests/mutants.md says why the others are not noticed.
NOTICED: Final = 0.95


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the rules in small ways, one at a time, and demand that tests notice: ``-- 'aiokeyless._rules.rate.*'``."""
    install(session, "-e", ".[dev]", "mutmut>=3.8.1")
    tree = Path(session.create_tmp()).resolve() / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("aiokeyless", "benchmarks", "docs", "tests"):
        shutil.copytree(ROOT / name, tree / name)
    shutil.copy(ROOT / "pyproject.toml", tree)
    with session.chdir(tree):
        session.run("python", "-m", "mutmut", "run", *session.posargs)
        if not session.posargs:  # which are printed with their results
            session.run("python", "-m", "mutmut", "results")
        session.run("python", "-m", "mutmut", "export-cicd-stats", silent=True)
    counted = json.loads((tree / "mutants" / "mutmut-cicd-stats.json").read_text())
    noticed = sum(counted[kind] for kind in ("killed", "timeout"))
    missed = sum(counted[kind] for kind in ("survived", "no_tests", "suspicious", "segfault"))
    session.log(f"{noticed} of {noticed + missed} mutants were noticed; in {tree}, mutmut show NAME prints one")
    if noticed < NOTICED * (noticed + missed):
        session.error(f"less than {NOTICED:.0%} of the mutants were noticed")
