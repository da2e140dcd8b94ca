"""Compile the hot path with mypyc, in place: the same Python, without its interpreter.

    .venv/bin/python scripts/compile.py             unless that has been done
    .venv/bin/python scripts/compile.py --current   only remove what other sources became
    .venv/bin/python scripts/compile.py --remove    run the sources again

Each module's library lies beside its source and is imported instead of it. Without a C compiler
nothing is compiled, and everything works as well, at a higher cost (docs/adr/0017).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"
BUILD = ROOT / "build" / "compiled"
STAMP = BUILD / "stamp"
GROUP = "serverlessllm"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
PACKAGE = SOURCES / "serverlessllm"
# What every request goes through; `edge/response.py` has async generators, which mypyc has not.
MODULES = (
    *(f"edge/{name}.py" for name in (
        "connection", "errors", "known", "limits", "link", "quick", "receiver", "relay",
        "request", "states", "steps", "upstream", "wire",
    )),
    "openai/nesting.py",
    *(f"openai/request/{name}.py" for name in ("checks", "parse", "read")),
    *(f"orchestrator/{name}.py" for name in (
        "rest/call", "rest/guard", "rest/inference", "rest/quota", "rest/routes",
        "router", "tallies", "timing",
    )),
    "telemetry/metrics.py",
)  # fmt: skip


def main() -> None:
    """Compile, or remove what was compiled."""
    parser = argparse.ArgumentParser(description="Compile the hot path in place.")
    parser.add_argument("--current", action="store_true", help="remove what is out of date")
    parser.add_argument("--remove", action="store_true", help="remove what was compiled")
    asked = parser.parse_args()
    if is_compiled() and not asked.remove:
        return
    remove()
    if not (asked.current or asked.remove) and can_compile():
        say(f"compiling {len(MODULES)} modules of the hot path, once")
        build()
        STAMP.write_text(fingerprint())


def can_compile() -> bool:
    """Whether this machine has what it takes; else says what is missing."""
    missing = []
    if shutil.which(os.environ.get("CC", "cc")) is None:
        missing.append("gcc")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("python3-dev")
    if missing:
        say(f"the hot path runs interpreted; to compile it: apt-get install {' '.join(missing)}")
    return not missing


def is_compiled() -> bool:
    """Whether what was compiled is of these sources; any of them may matter to the compiler."""
    return STAMP.exists() and STAMP.read_text() == fingerprint() and all(map(Path.exists, made()))


def fingerprint() -> str:
    """Of everything that decides what comes out."""
    known = hashlib.sha256(f"{sys.version} {PACKAGE}".encode())
    for source in sorted([*PACKAGE.rglob("*.py"), ROOT / "constraints.txt", Path(__file__)]):
        known.update(source.read_bytes())
    return known.hexdigest()


def made() -> list[Path]:
    """The libraries, one a module and what they share."""
    modules = [(PACKAGE / name).with_suffix(SUFFIX) for name in MODULES]
    return [*modules, SOURCES / f"{GROUP}__mypyc{SUFFIX}"]


def remove() -> None:
    """Let the sources be imported."""
    for library in SOURCES.rglob(f"*{SUFFIX}"):
        library.unlink()
    STAMP.unlink(missing_ok=True)


def build() -> None:
    """Translate, compile, put in place; what goes wrong is said by whoever finds it."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    os.chdir(ROOT)
    BUILD.mkdir(parents=True, exist_ok=True)
    paths = [str((PACKAGE / name).relative_to(ROOT)) for name in MODULES]
    extensions = mypycify(
        ["--config-file=pyproject.toml", *paths],
        opt_level="3",
        debug_level="0",
        multi_file=True,
        target_dir=str(BUILD),
        group_name=GROUP,
    )
    distribution = Distribution(
        {"name": GROUP, "package_dir": {"": "src"}, "ext_modules": extensions}
    )
    command = distribution.get_command_obj("build_ext")
    command.inplace = True
    command.build_temp = str(BUILD)
    command.parallel = os.cpu_count()
    command.ensure_finalized()
    command.run()


def say(text: str) -> None:
    """Tell whoever waits."""
    print(f"compile: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
