"""Parts of a check of GPUs, for the test of the processes that they run in, which import them by name."""

from __future__ import annotations

import os
import time

from fastvar_trt.tools.gpu_check.sections import Results


def hang() -> Results:
    time.sleep(600)
    return []


def crash() -> Results:
    os.abort()


def succeed() -> Results:
    return [{"pid": os.getpid()}]
