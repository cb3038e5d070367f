"""The cache operator of FastVAR: names, numpy oracle, torch definition, ONNX function bodies.

Domain `fastvar`, version 1, three operators (arXiv 2503.23367, cached token restoration):

- `PivotalTokens(x; keep)`: which tokens carry the most high-frequency energy;
- `GatherTokens(x, indices)`: those tokens' rows;
- `RestoreTokens(computed, indices, cached; h, w, cached_h, cached_w)`: the computed rows, scattered over
  the area-interpolated cache of an earlier scale.

This package holds names only, so importing it costs nothing; the definitions are in `oracle` (numpy),
`torch_ops` (torch) and `onnx_functions` (onnxscript).
"""

DOMAIN = "fastvar"
VERSION = 1

PIVOTAL_TOKENS = "PivotalTokens"
GATHER_TOKENS = "GatherTokens"
RESTORE_TOKENS = "RestoreTokens"
OPERATORS = (PIVOTAL_TOKENS, GATHER_TOKENS, RESTORE_TOKENS)
