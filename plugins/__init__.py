"""Our operators: names, numpy oracle, torch definitions, ONNX function bodies, CUDA kernels.

Domain `fastvar`, version 1. The cache operator of FastVAR is three (arXiv 2503.23367, cached token restoration):

- `PivotalTokens(x; keep)`: which tokens carry the most high-frequency energy;
- `GatherTokens(x, indices)`: those tokens' rows;
- `RestoreTokens(computed, indices, cached; h, w, cached_h, cached_w)`: the computed rows, scattered over
  the area-interpolated cache of an earlier scale.

Two more are layers of the decoder that targets compute in different ways:

- `GroupNorm(x, weight, bias; num_groups, epsilon)`;
- `UpsampleConv(x, weight, bias)`: nearest-neighbour doubling, then a 3x3 convolution.

This package holds names only, so importing it costs nothing; the definitions are in `oracle` (numpy), `torch_ops`
(torch), `onnx_functions` and, for single targets, `cuda_functions` and `tensorrt_functions` (onnxscript).
"""

DOMAIN = "fastvar"
VERSION = 1

PIVOTAL_TOKENS = "PivotalTokens"
GATHER_TOKENS = "GatherTokens"
RESTORE_TOKENS = "RestoreTokens"
GROUP_NORM = "GroupNorm"
UPSAMPLE_CONV = "UpsampleConv"
CACHE_OPERATORS = (PIVOTAL_TOKENS, GATHER_TOKENS, RESTORE_TOKENS)
OPERATORS = (*CACHE_OPERATORS, GROUP_NORM, UPSAMPLE_CONV)
