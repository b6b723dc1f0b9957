"""Draws the picture of the architecture from the imports. Where it fails, one of them is wrong."""

import ast
from fnmatch import fnmatchcase
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "clex"

# Ground first: a module imports only from lines above its own. Names are those inside clex, ""
# is the package itself, and a name in full goes before a pattern.
PICTURE = (
    ("version", "errors"),
    ("config", "files", "rope"),
    ("run_folder", "digests", "decoding", "processes"),
    ("kernels.switch", "kernels.layout"),
    ("kernels.*_triton",),
    ("kernels.*",),
    ("kernels",),
    ("temperature", "solvers", "positions"),
    ("fields", "scaling.post"),
    ("scaling.base",),
    ("scaling.*",),
    ("scaling.clex",),
    ("scaling",),
    ("catalogue",),
    ("hf.fused",),
    ("hf.rotary", "hf.alibi"),
    ("hf.cache_scale",),
    ("hf.forward_pass", "hf.generation"),
    ("hf.discovery",),
    ("hf.extend",),
    ("hf.cache",),
    ("hf.session",),
    ("hf.specimens",),
    ("hf.families",),
    ("hf.models", "hf.adapter"),
    ("hf.checkpoint",),
    ("hf.skeleton",),
    ("hf.official",),
    ("hf.loss",),
    ("hf",),
    ("inspection",),
    ("shards", "shapes"),
    ("data", "training_log"),
    ("layer_bytes",),
    ("planning", "selection"),
    ("training",),
    ("evaluation.haystacks",),
    ("evaluation.statistics", "evaluation.token_bytes"),
    ("evaluation.scores", "evaluation.alignment"),
    ("evaluation.perplexity", "evaluation.jsonl", "evaluation.retrieval"),
    ("evaluation.*",),
    ("evaluation",),
    ("start", "plan_report"),
    ("search",),
    ("evaluation.heatmap",),
    ("measured",),
    ("run",),
    ("needles",),
    ("evaluation.harness",),
    ("comparison.recipe", "comparison.statistics"),
    ("comparison.plan",),
    ("comparison.measures",),
    ("comparison.summary", "comparison.writing"),
    ("comparison.*",),
    ("comparison",),
    ("serving.length_classes",),
    ("serving.vllm_plugin", "serving.vllm_requests"),
    ("serving.vllm_models",),
    ("serving",),
    ("export.factors", "export.families", "export.record", "export.scores"),
    ("export.fixed", "export.gguf_blocks"),
    ("export.queries", "export.gguf_file", "export.gguf_header"),
    ("export.hf",),
    ("export.source", "export.card", "export.gguf_copy", "export.gguf_convert"),
    ("export.vllm",),
    ("export.engines",),
    ("export.parity", "export.workflow"),
    ("export",),
    ("demo", "demo.*", "conversation", "doctor"),
    ("cli.app",),
    ("cli.*",),
    ("cli",),
    ("__main__", ""),
)

# Stricter than the picture: these import from the named modules alone.
ONLY = {"fields": {"config", "errors", "rope"}}

# transformers re-initialises or casts every module whose class is called so.
FORBIDDEN_IN_CLASS_NAMES = ("RotaryEmbedding", "LayerNorm", "RMSNorm")


def modules(source: Path) -> dict[str, Path]:
    """Module names inside the package, "" for its own __init__."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(module: str) -> int | None:
    lines = [(pattern, index) for index, line in enumerate(PICTURE) for pattern in line]
    fits = [(pattern != module, index) for pattern, index in lines if fnmatchcase(module, pattern)]
    return min(fits)[1] if fits else None


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    # The package that relative imports start from: the file's folder.
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root, _, rest = alias.name.partition(".")
                if root == "clex":
                    found.add(rest)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                base += (node.module or "").split(".") if node.module else []
            elif (node.module or "").split(".")[0] == "clex":
                base = (node.module or "").split(".")[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in known else ".".join(base))
    return found - {module}


def violations(source: Path) -> list[str]:
    known = modules(source)
    wrong = []
    for module, path in known.items():
        own = layer(module)
        if own is None:
            wrong.append(f"{module or 'clex'} is in no layer of the picture")
            continue
        for target in sorted(imports(module, path, known)):
            other = layer(target)
            if target not in known or other is None:
                wrong.append(f"{module} imports {target}, which is not in the package")
            elif other >= own or target not in ONLY.get(module, {target}):
                wrong.append(f"{module or 'clex'} imports {target or 'clex'}, which is not below")
    return wrong


def bad_class_names(source: Path) -> list[str]:
    return [
        f"{path.name}: {node.name}"
        for path in modules(source).values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(part in node.name for part in FORBIDDEN_IN_CLASS_NAMES)
    ]


def test_imports_follow_the_picture() -> None:
    assert len(modules(SOURCE)) > 10, "no sources found"
    assert not violations(SOURCE), "\n".join(violations(SOURCE))


def test_no_class_has_a_name_that_transformers_reinitialises() -> None:
    assert not bad_class_names(SOURCE)


def test_the_check_sees_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "scaling").mkdir()
    files = {
        "errors.py": "",
        "config.py": "from .errors import x\nfrom .rope import y\n",
        "rope.py": "def f():\n    import clex.scaling.base\n",
        "temperature.py": "from . import config, rope\n",
        "fields.py": "from .temperature import x\n",
        "scaling/base.py": "from ..config import x\nfrom clex.hf import y\nimport torch\n",
        "scaling/yarn.py": "from .base import Scaling\nfrom .clex import Clex\n",
        "scaling/linear.py": "from .yarn import Yarn\n",
        "scaling/clex.py": "from ..fields import x\nclass MyRMSNorm: pass\n",
        "helpers.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert violations(tmp_path) == [
        "config imports rope, which is not below",
        "fields imports temperature, which is not below",
        "helpers is in no layer of the picture",
        "rope imports scaling.base, which is not below",
        "scaling.base imports hf, which is not in the package",
        "scaling.linear imports scaling.yarn, which is not below",
        "scaling.yarn imports scaling.clex, which is not below",
    ]
    assert bad_class_names(tmp_path) == ["clex.py: MyRMSNorm"]
