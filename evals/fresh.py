"""Measure in a fresh process: what loading or a run takes, apart from what this process has already imported and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from compress.errors import CompressError

_BEFORE = r"""
import json, re, sys, time

request = json.loads(sys.argv[1])

def resident(key="VmRSS"):
    return 1024 * int(re.search(key + r":\s+(\d+)", open("/proc/self/status").read())[1])
"""
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # glibc gives freed tensors back at once: a peak is what was in use


def in_fresh_process(code: str, request: Any, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a script in a process of its own and return the JSON object on its last line.

    The script finds ``request``, which is plain data, the modules ``json``, ``sys`` and ``time``, and ``resident()``, which gives
    the bytes of the process in memory, or their peak for ``resident("VmHWM")`` (both on Linux only).
    """
    command = [sys.executable, "-c", _BEFORE + code, json.dumps(request)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if child.returncode:
        raise CompressError(f"a fresh process failed ({(child.stderr.strip() or 'no message').splitlines()[-1]}).")
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found
