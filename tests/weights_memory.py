"""Run by `test_weights_memory.py` in environments of their own: the memory of a bundle's sessions, as JSON.

python weights_memory.py BUNDLE build|off|require
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime

from fastvar_trt.runtime import Pipeline


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


bundle, engines = sys.argv[1:]
if engines == "build":
    from fastvar_trt.export.build.registry import build_targets

    build_targets(Path(bundle), "cpu")
else:
    before = anonymous_bytes()
    with Pipeline.load(bundle, engines=engines, num_threads=1) as pipe:
        assert pipe.backend.describe()["prepacked"] == (engines == "require")
        pipe.generate([1])
        used = anonymous_bytes() - before - pipe.num_buffer_bytes
    print(json.dumps({"onnxruntime": onnxruntime.__version__, "anonymous_bytes": used}))
