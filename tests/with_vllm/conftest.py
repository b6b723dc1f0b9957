"""Tests that need vLLM: `make test-vllm` runs them, in an environment of its own."""

import importlib.util
import os
import sys
from pathlib import Path

# Before vLLM is imported. One process: otherwise each engine starts another.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

sys.path.insert(0, str(Path(__file__).parent.parent / "export"))

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
