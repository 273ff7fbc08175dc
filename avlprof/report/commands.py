"""The commands that repeat a run and its report."""

from __future__ import annotations

import shlex
from pathlib import Path

from avlprof.runs import RunMeta


def trace_command(meta: RunMeta, samples: int, out: Path) -> str:
    """The `avlprof trace` that gives such a run; what has its default value is left out."""
    words = ["avlprof", "trace", "--model", meta.model]
    if meta.task == "pictures":
        words += ["--image", "PICTURE", "--prompt", "PROMPT"]
    else:
        words += ["--task", meta.task, "--samples", str(samples)]
        words += ["--split", meta.split] if meta.split not in ("", "search") else []
    words += ["--max-new-tokens", str(meta.max_new_tokens)] if meta.max_new_tokens else []
    words += ["--forced"] if meta.forced else []
    words += ["--policy", meta.policy.split()[0]] if meta.policy else []
    words += ["--rows", meta.rows] if meta.rows != "default" else []
    words += ["--vision-rows", str(meta.vision_rows)] if meta.vision_rows != 64 else []
    words += ["--per-head"] if meta.per_head else []
    words += ["--history", f"{meta.history:g}"] if meta.history is not None else []
    words += ["--dtype", meta.dtype, "--out", str(out)]
    return shlex.join(words)


def report_command(out: Path, policy: str, against: Path | None) -> str:
    """The `avlprof report` that gives such a page."""
    words = ["avlprof", "report", str(out)]
    words += ["--policy", policy] if policy else []
    words += ["--against", str(against)] if against else []
    return shlex.join([*words, "-o", "report.html"])
