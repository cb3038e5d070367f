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
    CheckpointError,
    ExportError,
    FastVARError,
    PlanError,
    RequestError,
)
from fastvar_trt.runtime.manifest import Manifest, read_manifest
from fastvar_trt.runtime.pipeline import GenerationResult, Pipeline
from fastvar_trt.runtime.plan import PruningPlan, ResolvedPlan, load_plan

__all__ = [
    "BackendError",
    "BundleError",
    "CheckpointError",
    "ExportError",
    "FastVARError",
    "GenerationResult",
    "Manifest",
    "Pipeline",
    "PlanError",
    "PruningPlan",
    "RequestError",
    "ResolvedPlan",
    "load_plan",
    "read_manifest",
]
