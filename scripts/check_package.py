"""Look into wheel and sdist, and try the wheel in a bare environment of each Python that is here.

    make package                       # builds both into dist/ and runs this
    python scripts/check_package.py dist

A bare environment holds the wheel and what the command line needs (typer, rich, packaging), but no
torch: every file compiles, every help page opens, and `clex doctor` says what is missing. The whole
library out of the wheel, without extras, is what `make test-oldest` and `make test-newest` run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.11", "3.12", "3.13")
IN_WHEEL = (
    "clex/py.typed",
    "clex/assets/tiny-llama/model.safetensors",
    "clex/assets/tiny-neox/model.safetensors",
    "clex/assets/books/test.jsonl.gz",
    "clex/assets/smollm2-dynamics/clex.safetensors",
    "clex/assets/smollm2-dynamics/clex_config.json",
    "clex/assets/smollm2-layers/clex.safetensors",
    "clex/assets/smollm2-layers/clex_config.json",
    "clex/assets/report/page.html",
    "licenses/LICENSE",
    "licenses/NOTICE",
)
IN_SDIST = ("src/clex/__init__.py", "tests/conftest.py", "docs/log.md", "CHANGELOG.md", "Makefile")
NOT_IN_WHEEL = ("tests/", "docs/", "examples/", ".pyc")
# 21 MB are models and books; a file that strayed in would show.
LARGEST = 28 * 2**20


def main() -> None:
    """Check everything; the exit code is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where wheel and sdist are")
    args = parser.parse_args()
    (wheel,), (sdist,) = args.folder.glob("*.whl"), args.folder.glob("*.tar.gz")
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    wrong = [*_contents(wheel, sdist)]
    pythons = _pythons()
    for version in VERSIONS:
        if version not in pythons:
            print(f"Python {version}: not here, not tried")
            continue
        found = list(_bare(wheel, pythons[version]))
        print(f"Python {version}: {'; '.join(found) or 'compiles, helps, and names what it needs'}")
        wrong += found
    if wrong:
        sys.exit("\n".join(wrong))


def _contents(wheel: Path, sdist: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    with tarfile.open(sdist) as archive:
        sources = archive.getnames()
    for wanted, there, path in ((IN_WHEEL, names, wheel), (IN_SDIST, sources, sdist)):
        for name in wanted:
            if not any(entry.endswith(name) for entry in there):
                yield f"{path.name} lacks {name}"
    for name in names:
        if name.startswith(NOT_IN_WHEEL) or name.endswith(NOT_IN_WHEEL):
            yield f"{wheel.name} holds {name}"
    for path in (wheel, sdist):
        if path.stat().st_size > LARGEST:
            yield f"{path.name} has {path.stat().st_size:,} bytes, more than {LARGEST:,}"


def _pythons() -> dict[str, str]:
    """Interpreters by version: this one, those on the PATH, those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in VERSIONS:
        own = sys.version_info[:2] == tuple(map(int, version.split(".")))
        installed = [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
        for python in ([sys.executable] if own else []) + [f"python{version}", *installed]:
            if _answers(python):
                found[version] = python
                break
    return found


def _answers(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def _bare(wheel: Path, python: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        binary = Path(folder) / "bin"
        pip = [binary / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, "typer", "rich", "packaging"], check=True)
        subprocess.run([*pip, "--no-deps", wheel.resolve()], check=True)

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [binary / words[0], *words[1:]], capture_output=True, text=True, cwd=folder
            )

        compiled = run("python", "-m", "compileall", "-q", *Path(folder).glob("lib/*/*/clex"))
        if compiled.returncode:
            yield f"{python}: {compiled.stdout.strip()}"
        for command in ("", "extend", "eval ppl", "compare", "export", "generate", "doctor"):
            helped = run("clex", *command.split(), "--help")
            if helped.returncode or "Usage" not in helped.stdout:
                yield f"{python}: clex {command} --help: {helped.stderr.strip()[-200:]}"
        doctor = run("clex", "doctor", "--json")
        if doctor.returncode != 1:
            yield f"{python}: clex doctor without torch: exit code {doctor.returncode}"
            return
        checks = {check["name"]: check for check in json.loads(doctor.stdout)["checks"]}
        if checks["torch"]["detail"] != "is not installed" or checks["typer"]["state"] != "ok":
            yield f"{python}: clex doctor without torch: {checks['torch']}"


if __name__ == "__main__":
    main()
