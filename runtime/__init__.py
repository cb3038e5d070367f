"""The runtime: chains the graphs of a bundle with the KV cache and the token cache. Needs neither torch nor onnx.

```python
from fastvar_trt.runtime import Pipeline

with Pipeline.load("bundle") as pipe:
    result = pipe.generate(labels=[207, 88], seeds=[0, 1], cfg=1.5, top_k=900, top_p=0.96)
```
"""

from fastvar_trt.runtime.errors import (
    BackendError,
    BundleError,
    CancelledError,
    CheckpointError,
    ExportError,
    FastVARError,
    OutOfMemoryError,
    OverloadedError,
    PlanError,
    RequestError,
)
from fastvar_trt.runtime.manifest import Manifest, read_manifest
from fastvar_trt.runtime.pipeline import GenerationResult, Pipeline, Preview
from fastvar_trt.runtime.plan import PruningPlan, ResolvedPlan
from fastvar_trt.runtime.precision import Precision
from fastvar_trt.runtime.request import Request
from fastvar_trt.runtime.service import ImageRequest, ImageResult, Metrics, Service, Ticket

__all__ = [
    "BackendError",
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "ExportError",
    "FastVARError",
    "GenerationResult",
    "ImageRequest",
    "ImageResult",
    "Manifest",
    "Metrics",
    "OutOfMemoryError",
    "OverloadedError",
    "Pipeline",
    "PlanError",
    "Precision",
    "Preview",
    "PruningPlan",
    "Request",
    "RequestError",
    "ResolvedPlan",
    "Service",
    "Ticket",
    "read_manifest",
]
