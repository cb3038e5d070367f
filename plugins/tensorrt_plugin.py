"""The cache operator as plugins of enterprise TensorRT: the CUDA kernels, compiled ahead of time into the engine.

An engine with them needs neither Python nor this package to run. A plugin launches one kernel and has no workspace, so
`PivotalTokens` is three of them. Written against the API of TensorRT 10.13 (`tensorrt.plugin`); it has not been run.
Never used with TensorRT for RTX, which has no plugins.

No `from __future__ import annotations` here: `tensorrt.plugin` reads the annotations as types.
"""

import functools
from typing import Any

from fastvar_trt.plugins import DOMAIN
from fastvar_trt.plugins.cuda_kernels import compile_kernels
from fastvar_trt.runtime.errors import UnavailableError

TOKEN_MEAN, TOKEN_SCORE, SELECT_TOKENS = "TokenMean", "TokenScore", "SelectTokens"
RESTORE_TOKENS_ADD = "RestoreTokensAdd"
_PTX_ARCHITECTURE = "sm_80"  # PTX runs on this and all later architectures


@functools.cache
def register_plugins() -> None:
    """Make the plugins known to TensorRT in this process; later calls do nothing.

    Raises:
        UnavailableError: enterprise TensorRT or NVRTC is not installed.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise UnavailableError(f"tensorrt cannot be imported ({error}); pip install 'fastvar-trt[tensorrt]'") from error
    Launch = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]  # checked by aot_impl
    ptx = compile_kernels(_PTX_ARCHITECTURE, ptx=True)
    suffix = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}

    def launch(name: str, grid: tuple[Any, Any], block: tuple[int, int], sizes: list[Any]) -> tuple[Any, ...]:
        parameters = trtp.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y = grid
        parameters.block_x, parameters.block_y = block
        parameters.shared_mem = 0
        return name, ptx, parameters, trtp.SymIntExprs.from_tuple([trtp.SymInt32(size) for size in sizes])

    @trtp.register(f"{DOMAIN}::{TOKEN_MEAN}")
    def token_mean(x: trtp.TensorDesc) -> trtp.TensorDesc:
        batch, _, channels = x.shape_expr
        return trtp.from_shape_expr((batch, channels), dtype=trt.float32)

    @trtp.aot_impl(f"{DOMAIN}::{TOKEN_MEAN}")
    def token_mean_aot(x: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int) -> Launch:
        batch, length, channels = x.shape_expr
        return launch(f"token_mean_{suffix[x.dtype]}", (trtp.cdiv(channels, 32), batch), (32, 16), [length, channels])

    @trtp.register(f"{DOMAIN}::{TOKEN_SCORE}")
    def token_score(x: trtp.TensorDesc, mean: trtp.TensorDesc) -> trtp.TensorDesc:
        batch, length, _ = x.shape_expr
        return trtp.from_shape_expr((batch, length), dtype=trt.float32)

    @trtp.aot_impl(f"{DOMAIN}::{TOKEN_SCORE}")
    def token_score_aot(
        x: trtp.TensorDesc, mean: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> Launch:
        batch, length, channels = x.shape_expr
        grid = (trtp.cdiv(batch * length, 8), 1)
        return launch(f"token_score_{suffix[x.dtype]}", grid, (32, 8), [batch, length, channels])

    @trtp.register(f"{DOMAIN}::{SELECT_TOKENS}")
    def select_tokens(score: trtp.TensorDesc, keep: int) -> trtp.TensorDesc:
        return trtp.from_shape_expr((score.shape_expr[0], keep), dtype=trt.int64)

    @trtp.aot_impl(f"{DOMAIN}::{SELECT_TOKENS}")
    def select_tokens_aot(score: trtp.TensorDesc, keep: int, outputs: tuple[trtp.TensorDesc], tactic: int) -> Launch:
        batch, length = score.shape_expr
        return launch("select_tokens", (batch, 1), (1024, 1), [length, keep])

    @trtp.register(f"{DOMAIN}::GatherTokens")
    def gather_tokens(x: trtp.TensorDesc, indices: trtp.TensorDesc) -> trtp.TensorDesc:
        return trtp.from_shape_expr((*indices.shape_expr, x.shape_expr[2]), dtype=x.dtype)

    @trtp.aot_impl(f"{DOMAIN}::GatherTokens")
    def gather_tokens_aot(
        x: trtp.TensorDesc, indices: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> Launch:
        batch, length, channels = x.shape_expr
        keep = indices.shape_expr[1]
        return launch(f"gather_tokens_{suffix[x.dtype]}", (keep, batch), (128, 1), [length, keep, channels])

    @trtp.register(f"{DOMAIN}::RestoreTokens")
    def restore_tokens(
        computed: trtp.TensorDesc,
        indices: trtp.TensorDesc,
        cached: trtp.TensorDesc,
        h: int,
        w: int,
        cached_h: int,
        cached_w: int,
    ) -> trtp.TensorDesc:
        batch, _, channels = computed.shape_expr
        return trtp.from_shape_expr((batch, h * w, channels), dtype=computed.dtype)

    @trtp.aot_impl(f"{DOMAIN}::RestoreTokens")
    def restore_tokens_aot(
        computed: trtp.TensorDesc,
        indices: trtp.TensorDesc,
        cached: trtp.TensorDesc,
        h: int,
        w: int,
        cached_h: int,
        cached_w: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> Launch:
        batch, keep, channels = computed.shape_expr
        sizes = [keep, channels, h, w, cached_h, cached_w]
        return launch(f"restore_tokens_{suffix[computed.dtype]}", (h * w, batch), (128, 1), sizes)

    @trtp.register(f"{DOMAIN}::{RESTORE_TOKENS_ADD}")
    def restore_tokens_add(
        computed: trtp.TensorDesc,
        indices: trtp.TensorDesc,
        cached: trtp.TensorDesc,
        residual: trtp.TensorDesc,
        h: int,
        w: int,
        cached_h: int,
        cached_w: int,
    ) -> trtp.TensorDesc:
        return residual.like()

    @trtp.aot_impl(f"{DOMAIN}::{RESTORE_TOKENS_ADD}")
    def restore_tokens_add_aot(
        computed: trtp.TensorDesc,
        indices: trtp.TensorDesc,
        cached: trtp.TensorDesc,
        residual: trtp.TensorDesc,
        h: int,
        w: int,
        cached_h: int,
        cached_w: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> Launch:
        batch, keep, channels = computed.shape_expr
        sizes = [keep, channels, h, w, cached_h, cached_w]
        return launch(f"restore_tokens_add_{suffix[computed.dtype]}", (h * w, batch), (128, 1), sizes)
