"""`Pipeline`: a bundle, loaded, that draws images."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.backends import Backend, create_backend
from fastvar_trt.runtime.chain import Chain, ChainOutputs, plan_batches
from fastvar_trt.runtime.conditions import ClassCondition, Condition, TextCondition, numbers, pad_rows
from fastvar_trt.runtime.errors import BackendError, RequestError
from fastvar_trt.runtime.manifest import Manifest, check_files, read_manifest
from fastvar_trt.runtime.noise import MAX_SEED, uniform_noise
from fastvar_trt.runtime.text import PromptTokenizer, TextEncoder


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """Images and what led to them.

    Attributes:
        images: uint8 [N, H, W, 3], RGB.
        tokens: per step, int32 [N, L], or bits uint8 [N, L, bits].
        f_hat: fp32 [N, C_vae, h_K, w_K], what the decoder ran on.
        timings: graph name -> ms, summed over the batches that the images were split into.
        logits: per step, fp32 [N, L, V] or [N, L, bits, 2], after guidance; None unless asked for.
        float_images: fp32 [N, 3, H, W] in [0, 1], RGB; None unless asked for.
    """

    images: NDArray[Any]
    tokens: list[NDArray[Any]]
    f_hat: NDArray[Any]
    timings: dict[str, float]
    logits: list[NDArray[Any]] | None = None
    float_images: NDArray[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Preview:
    """Images in the making, decoded after a scale.

    Attributes:
        scale: the step after which they were decoded.
        start: number of the first of them; the images of a call may travel in several batches.
        images: uint8 [n, H, W, 3], RGB.
        result: what `generate` returns, in the last item of `Pipeline.stream`; None before.
    """

    scale: int
    start: int
    images: NDArray[Any]
    result: GenerationResult | None = None


_MIN_TEMPERATURE = 1e-3  # below, logits divided by it overflow


class Pipeline:
    """A loaded bundle. Use it as a context manager.

    Every method may be called from any thread at any time, but not from the callbacks of `generate`. Calls that compute
    (`generate`, `stream`, `encode`) take turns batch by batch: a batch holds the pipeline's lock while its graphs run,
    and they share buffers and device memory. `close` waits for the batch that is running; the calls that wait behind it
    raise `RequestError`. Two pipelines of one process share nothing but ONNX Runtime's arena, which is thread-safe.
    """

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.backend = backend
        self._lock = threading.Lock()
        self._chains: dict[int, Chain] = {}
        self._text_encoder: TextEncoder | None = None
        self._tokenizer = PromptTokenizer(bundle, manifest)
        self._closed = False
        self._noise_shapes = {
            graph.scale: spec.shape[1:]
            for graph in manifest.chain(manifest.batches[0])
            for spec in graph.inputs
            if graph.scale is not None and spec.name == names.UNIFORM
        }

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str | Backend = "onnxruntime",
        device: str | None = None,
        num_threads: int | None = None,
        engines: str = "auto",
        capture: bool | None = None,
        check: str = "full",
    ) -> Pipeline:
        """Open a bundle and make its graphs ready to run.

        Args:
            bundle: the folder that fastvar-export wrote.
            backend: `onnxruntime`, `tensorrt_rtx`, `tensorrt`, or an object that implements `Backend`.
            device: where the backend runs; default: `cpu` for onnxruntime, `cuda` for TensorRT. `cuda:N` names a GPU.
            num_threads: threads of one operator on the CPU; default: one per core that this process may use.
            engines: `auto` uses what `fastvar build` made for this device, `off` never does, `require` raises
                where there is nothing.
            capture: on a GPU, whether chains are captured as CUDA graphs; default: with TensorRT, yes.
            check: `full` compares the SHA-256 of every file (engines too) with the one on record, `size` their
                sizes only.

        Raises:
            BundleError: a bundle that is incomplete, damaged or of another format version.
            BackendError: a backend that is not installed, or that cannot run this bundle.
        """
        if check not in ("full", "size"):
            raise RequestError(f"check: got {check!r}, expected 'full' or 'size'")
        path = Path(bundle)
        manifest = read_manifest(path)
        check_files(path, manifest, hashes=check == "full")
        if isinstance(backend, str):
            backend = create_backend(backend, device, num_threads, engines, capture)
        pipeline = cls(path, manifest, backend)
        try:
            backend.open(path, manifest.precision, check_hashes=check == "full")
            for batch in manifest.batches:
                pipeline._chains[batch] = Chain(backend, manifest, batch)
        except BaseException:
            backend.close()
            raise
        return pipeline

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_buffer_bytes(self) -> int:
        """Memory of requests, modulations, keys and values, caches and results, of all batch sizes used so far."""
        text = 0 if self._text_encoder is None else self._text_encoder.num_buffer_bytes
        return text + sum(chain.num_buffer_bytes for chain in self._chains.values())

    def close(self) -> None:
        """Release the graphs; may be called twice. ONNX Runtime keeps the memory of activations for the next load."""
        with self._lock:
            if not self._closed:
                self.backend.activate()
            self._closed = True
            for chain in self._chains.values():
                chain.close()
            self._chains.clear()
            self._text_encoder = None
            self.backend.close()

    def generate(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str | None] | None = None,
        text_features: Sequence[NDArray[Any]] | None = None,
        negative_text_features: Sequence[NDArray[Any] | None] | None = None,
        h_div_w: float | None = None,
        seeds: int | Sequence[int] = 0,
        cfg: float | Sequence[float] | NDArray[Any] | None = None,
        temperature: float | Sequence[float] | NDArray[Any] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        greedy: bool = False,
        noise: Mapping[int, NDArray[Any]] | None = None,
        return_logits: bool = False,
        return_float_images: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
        preview_scales: Collection[int] = (),
        on_preview: Callable[[Preview], None] = lambda preview: None,
    ) -> GenerationResult:
        """Draw one image per label or text.

        An image depends on its own condition, seed and sampling values only, not on its neighbours or on the
        batch sizes of the bundle, up to the rounding of the backend's kernels.

        Args:
            labels: N class indices, for a model of classes.
            prompts: N texts, for a model of text whose bundle has its text encoder.
            negative_prompts: N texts to keep away from; None or empty, for all or for one: the model's own.
            text_features: in place of prompts: N arrays [tokens, width], the text encoder's last hidden state without
                padding.
            negative_text_features: the same of N negative prompts; None, for all or for one: the model's own.
            h_div_w: height over width that the pictures shall have; a bundle holds one, and this checks it.
            seeds: one per image, or one for all: then image i gets seed + i.
            cfg: guidance scale; default: the manifest's. VAR ramps it linearly over the scales; for Infinity it may
                be an array [N, scales].
            temperature: divides the logits (Infinity's tau); above 0; may be an array [N, scales].
            top_k: how many of the likeliest tokens may be drawn, at most the manifest's `max_top_k`; 0 for all
                of them, where the bundle allows it.
            top_p: the smallest set of likeliest tokens with this total probability may be drawn; 0 or 1: all.
            greedy: take the likeliest token; seeds, top_k and top_p are then without effect.
            noise: scale -> U[0, 1) float32 [N, tokens] or [N, tokens, bits], in place of what the seeds give.
            return_logits: fill `GenerationResult.logits`.
            return_float_images: fill `GenerationResult.float_images`.
            should_stop: asked between scales (before the launch, where the chain is captured as a CUDA graph).
            preview_scales: scales after which the images are also decoded as far as they are: computed ones before
                the last. Each costs one run of the decoder, and the chain is then not launched as a CUDA graph.
            on_preview: called with each, in this thread and between two scales: what it does delays the images.
                Neither it nor should_stop may use the pipeline, which is theirs to wait for.
            (cfg, temperature, top_k and top_p may be one value per image, None for the default.)

        Raises:
            RequestError: a value out of range; the message gives the range.
            BackendError: the backend failed, or the model's logits were not finite.
            CancelledError: `should_stop` said so.
        """
        self._check_aspect(h_div_w)
        count, condition_of = self._subjects(labels, prompts, negative_prompts, text_features, negative_text_features)
        request = self._request(count, cfg, temperature, top_k, top_p, greedy)
        seed_list = self._seeds(seeds, count)
        optional = [
            name for name, wanted in ((names.LOGITS, return_logits), (names.IMAGE, return_float_images)) if wanted
        ]
        self._check_previews(preview_scales)
        given = None if noise is None else self._given_noise(noise, count)
        condition = condition_of()
        outputs: list[ChainOutputs] = []
        start = 0
        for batch in plan_batches(count, self.manifest.batches):
            part = slice(start, start + batch)
            kept = min(batch, count - start)

            def preview(scale: int, pixels: NDArray[Any], start: int = start, kept: int = kept) -> None:
                on_preview(Preview(scale, start, pixels[:kept]))

            of_batch = self._noise(seed_list, part) if given is None else {k: rows[part] for k, rows in given.items()}
            with self._lock:
                if self._closed:
                    raise RequestError("the pipeline is closed; load the bundle again")
                outputs.append(
                    self._chains[batch].run(
                        condition.inputs(part, batch),
                        {k: pad_rows(rows, batch) for k, rows in of_batch.items()},
                        {name: pad_rows(values[part], batch) for name, values in request.items()},
                        optional,
                        should_stop,
                        preview_scales,
                        preview,
                    )
                )
            start += batch
        for i, f_hat in enumerate(np.concatenate([o.f_hat for o in outputs])[:count]):
            if not np.isfinite(f_hat).all():
                raise BackendError(
                    f"image {i}: the model's logits are not finite: cfg {request[names.CFG][i].max():g} is too large, "
                    f"or its activations exceed {self.manifest.precision}"
                )
        return _merge(outputs, count)

    def stream(self, *arguments: Any, preview_scales: Collection[int], **options: Any) -> Iterator[Preview]:
        """Draw as `generate` does, and hand out the images in the making.

        They are drawn in a thread of their own, which does not wait for whoever reads them: a slow reader, or one that
        calls `generate` meanwhile, holds nobody up. Closing the iterator stops the drawing before its next scale.

        Args:
            arguments, options: those of `generate`, but for `should_stop` and `on_preview`.
            preview_scales: scales after which the images are decoded.

        Yields:
            One `Preview` per batch and scale, and one with the images and the `result`.

        Raises:
            RequestError, BackendError: as `generate`, when the first item is asked for or later.
        """
        items: queue.SimpleQueue[Preview | BaseException] = queue.SimpleQueue()
        stop = threading.Event()

        def draw() -> None:
            try:
                result = self.generate(
                    *arguments,
                    preview_scales=preview_scales,
                    on_preview=items.put,
                    should_stop=stop.is_set,
                    **options,
                )
                items.put(Preview(self.manifest.resolved_plan.steps[-1], 0, result.images, result))
            except BaseException as error:
                items.put(error)

        thread = threading.Thread(target=draw, name="fastvar-stream", daemon=True)
        thread.start()
        try:
            while True:
                item = items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.result is not None:
                    return
        finally:
            stop.set()
            thread.join()

    def warm_up(self) -> None:
        """Draw one image per batch size; where there is a text encoder, load it and its tokenizer: the first request of
        a service then takes what the later ones take (on a GPU, chains are captured here), and no file is read later.

        Raises:
            BackendError: the backend failed, or prompts need a package that is not installed.
        """
        model = self.manifest.model
        for batch in self.manifest.batches:
            if model.family == "var":
                self.generate([0] * batch)
            else:
                self.generate(text_features=[np.zeros((1, model.text_width), dtype=np.float32)] * batch)
        if self.manifest.text_encoder is not None:
            self._tokenizer.load()
            self.encode_tokens([0])

    def _check_previews(self, scales: Collection[int]) -> None:
        allowed = self.manifest.preview_scales
        wrong = [scale for scale in scales if scale not in allowed or isinstance(scale, bool)]
        if wrong:
            raise RequestError(
                f"preview_scales: got {wrong[0]!r}, expected of {', '.join(map(str, allowed))} (the computed scales "
                "before the last)"
            )

    def _noise(self, seeds: list[int], part: slice) -> dict[int, NDArray[Any]]:
        return {
            k: np.stack([uniform_noise(seed, k, shape) for seed in seeds[part]])
            for k, shape in self._noise_shapes.items()
        }

    def _given_noise(self, noise: Mapping[int, NDArray[Any]], count: int) -> dict[int, NDArray[Any]]:
        arrays = {}
        for k, shape in self._noise_shapes.items():
            if k not in noise:
                raise RequestError(f"noise: scale {k} is missing")
            arrays[k] = numbers(f"noise[{k}]", noise[k], "float32")
            if arrays[k].shape != (count, *shape) or not ((arrays[k] >= 0) & (arrays[k] < 1)).all():
                raise RequestError(f"noise[{k}]: got {arrays[k].shape}, expected {(count, *shape)}, 0 to below 1")
        return arrays

    def check(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str | None] | None = None,
        text_features: Sequence[NDArray[Any]] | None = None,
        negative_text_features: Sequence[NDArray[Any] | None] | None = None,
        seeds: int | Sequence[int] = 0,
        cfg: Any = None,
        temperature: Any = None,
        top_k: Any = None,
        top_p: Any = None,
        preview_scales: Collection[int] = (),
    ) -> None:
        """That `generate` would take these arguments. Computes nothing, and waits for no batch that runs.

        Raises:
            RequestError: a value out of range.
        """
        count, _ = self._subjects(labels, prompts, negative_prompts, text_features, negative_text_features)
        self._request(count, cfg, temperature, top_k, top_p, greedy=False)
        self._seeds(seeds, count)
        self._check_previews(preview_scales)

    def _subjects(
        self,
        labels: Sequence[int] | None,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str | None] | None,
        text_features: Sequence[NDArray[Any]] | None,
        negative_text_features: Sequence[NDArray[Any] | None] | None,
    ) -> tuple[int, Callable[[], Condition]]:
        """How many images are asked for, and what makes their condition: of prompts, the text encoder's work."""
        if prompts is None and negative_prompts is None:
            condition = self._condition(labels, text_features, negative_text_features)
            return len(condition), lambda: condition
        if text_features is not None or negative_text_features is not None:
            raise RequestError("give prompts or text_features, not both")
        ids, negative_ids = self._token_ids(prompts, negative_prompts)
        if labels is not None:
            raise RequestError("this bundle draws from text: give prompts or text_features, and no labels")
        return len(ids), lambda: self._condition(None, *self._encode(ids, negative_ids))

    def _check_aspect(self, h_div_w: float | None) -> None:
        model = self.manifest.model
        held = model.image_height / model.image_width
        if h_div_w is not None and not abs(h_div_w - held) <= 0.02 * held:
            raise RequestError(
                f"h_div_w: got {h_div_w:g}, this bundle holds {held:.3g} ({model.image_width}x{model.image_height}); "
                "export another with --h-div-w"
            )

    def encode(
        self, prompts: Sequence[str] | None, negative_prompts: Sequence[str | None] | None = None
    ) -> tuple[list[NDArray[Any]], list[NDArray[Any] | None] | None]:
        """The text encoder's features of prompts, as `generate` takes them; to draw of one prompt many times.

        The first call loads the text encoder.

        Raises:
            RequestError: a bundle without text encoder, or a prompt that is empty or too long.
            BackendError: the text encoder cannot be loaded or run.
        """
        return self._encode(*self._token_ids(prompts, negative_prompts))

    def _encode(
        self, ids: list[list[int]], negative_ids: list[list[int] | None] | None
    ) -> tuple[list[NDArray[Any]], list[NDArray[Any] | None] | None]:
        features = [self.encode_tokens(item) for item in ids]
        if negative_ids is None:
            return features, None
        return features, [None if item is None else self.encode_tokens(item) for item in negative_ids]

    def _token_ids(
        self, prompts: Sequence[str] | None, negative_prompts: Sequence[str | None] | None
    ) -> tuple[list[list[int]], list[list[int] | None] | None]:
        """The tokens of prompts and of negative prompts, where there are any."""
        if self.manifest.text_encoder is None:
            what = (
                "draws classes: give labels"
                if self.manifest.model.family == "var"
                else "has no text encoder: give text_features, or export with --text-encoder"
            )
            raise RequestError(f"this bundle {what}")
        if prompts is None or isinstance(prompts, str) or len(prompts) == 0:
            raise RequestError(f"prompts: got {prompts!r}, expected a list of at least one text")
        if negative_prompts is not None and (
            isinstance(negative_prompts, str) or len(negative_prompts) != len(prompts)
        ):
            raise RequestError(f"negative_prompts: expected a list of one per prompt ({len(prompts)})")
        token_ids = self._tokenizer.token_ids
        ids = [token_ids(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        if negative_prompts is None:
            return ids, None
        return ids, [
            token_ids(prompt, f"negative prompt {i}") if prompt else None for i, prompt in enumerate(negative_prompts)
        ]

    def encode_tokens(self, ids: Sequence[int]) -> NDArray[Any]:
        """The text encoder's features of one prompt's tokens: fp32 [tokens, width].

        Raises:
            BackendError: they are not finite.
        """
        encoder = self._encoder()
        with self._lock:
            if self._closed:
                raise RequestError("the pipeline is closed; load the bundle again")
            features = encoder.encode(ids)
        if not np.isfinite(features).all():
            raise BackendError(f"the text encoder's features are not finite: they exceed {self.manifest.precision}")
        return features

    def _encoder(self) -> TextEncoder:
        with self._lock:
            if self._closed:
                raise RequestError("the pipeline is closed; load the bundle again")
            if self._text_encoder is None:
                self.backend.activate()
                self._text_encoder = TextEncoder(self.backend, self.bundle, self.manifest)
            return self._text_encoder

    def _condition(
        self,
        labels: Sequence[int] | None,
        text_features: Sequence[NDArray[Any]] | None,
        negative_text_features: Sequence[NDArray[Any] | None] | None,
    ) -> Condition:
        model = self.manifest.model
        if model.family == "var":
            if labels is None or text_features is not None or negative_text_features is not None:
                raise RequestError("this bundle draws classes: give labels, and no text")
            return ClassCondition.of(model, labels)
        if text_features is None or labels is not None:
            raise RequestError("this bundle draws from text: give prompts or text_features, and no labels")
        return TextCondition.of(model, text_features, negative_text_features)

    def _request(
        self, count: int, cfg: Any, temperature: Any, top_k: Any, top_p: Any, greedy: bool
    ) -> dict[str, NDArray[Any]]:
        model, sampling = self.manifest.model, self.manifest.sampling
        num_scales = len(self.manifest.schedule)

        def finite(name: str, value: Any, dtype: str, default: float) -> NDArray[Any]:
            if value is None:
                value = default
            elif isinstance(value, list | tuple):
                value = [default if item is None else item for item in value]
            array = numbers(name, value, dtype)
            if not np.isfinite(array).all():
                raise RequestError(f"{name}: got {value}, expected finite numbers")
            return array

        def per_image(name: str, value: Any, dtype: str, default: float) -> NDArray[Any]:
            array = finite(name, value, dtype, default)
            if array.shape not in ((), (count,)):
                raise RequestError(f"{name}: got {array.shape}, expected one value or one per image ({count})")
            return np.broadcast_to(array, (count,))

        def per_scale(name: str, value: Any, default: float) -> NDArray[Any]:
            array = finite(name, value, "float32", default)
            if array.shape in ((), (count,)):
                array = array[..., None]
            elif array.ndim != 2 or array.shape[0] not in (1, count) or array.shape[1] != num_scales:
                raise RequestError(
                    f"{name}: got {array.shape}, expected one value, one per image ({count}), or per image and scale "
                    f"({count}, {num_scales})"
                )
            return np.broadcast_to(array, (count, num_scales))

        cfg_array = per_scale("cfg", cfg, sampling.cfg)
        temperatures = per_scale("temperature", temperature, sampling.temperature)
        if (temperatures < _MIN_TEMPERATURE).any():
            raise RequestError(
                f"temperature: got {temperature}, expected {_MIN_TEMPERATURE} or more (for the likeliest token, use "
                "greedy)"
            )
        top_ps = per_image("top_p", top_p, "float32", sampling.top_p)
        if ((top_ps < 0) | (top_ps > 1)).any():
            raise RequestError(f"top_p: got {top_p}, expected 0 to 1")
        if top_k is not None and model.family != "var":
            raise RequestError("top_k: this model draws bits, which have two values; use top_p or greedy")
        top_ks = per_image("top_k", top_k, "int64", sampling.top_k)
        limit = sampling.max_top_k
        too_large = (top_ks < 0) | (top_ks > limit) | ((top_ks == 0) & (limit < model.vocab_size))
        if too_large.any() and not greedy:
            raise RequestError(
                f"top_k: got {top_k}, this bundle takes {0 if limit == model.vocab_size else 1} to {limit}; export "
                f"with --max-top-k (0 for all {model.vocab_size}) for more"
            )
        return {
            names.CFG: cfg_array,
            names.TEMPERATURE: temperatures,
            names.TOP_K: np.where((top_ks == 0) | too_large, limit, top_ks),
            # At 1 the rounding of the cumulative sum would still cut the tail: 2 cuts nothing.
            names.TOP_P: np.where((top_ps == 0) | (top_ps == 1), np.float32(2), top_ps),
            names.GREEDY: np.full(count, greedy, dtype=np.bool_),
        }

    @staticmethod
    def _seeds(seeds: int | Sequence[int], count: int) -> list[int]:
        if isinstance(seeds, int | np.integer):
            listed = [int(seeds) + i for i in range(count)]
        elif isinstance(seeds, Sequence | np.ndarray) and all(isinstance(seed, int | np.integer) for seed in seeds):
            listed = [int(seed) for seed in seeds]
        else:
            raise RequestError(f"seeds: got {seeds!r}, expected whole numbers: one, or one per image")
        if len(listed) != count:
            raise RequestError(f"seeds: got {len(listed)}, expected one, or one per image ({count})")
        for seed in listed:
            if not 0 <= seed <= MAX_SEED:
                raise RequestError(f"seed: got {seed}, expected 0 to 2**64 - 1")
        return listed


def _merge(outputs: list[ChainOutputs], count: int) -> GenerationResult:
    """The batches as one result, without the rows that padded the last one."""

    def rows(parts: list[Any]) -> NDArray[Any]:
        return np.concatenate(parts)[:count]

    def per_step(parts: list[Any]) -> list[NDArray[Any]]:
        return [rows(list(step)) for step in zip(*parts, strict=True)]

    first = outputs[0]
    return GenerationResult(
        images=rows([o.pixels for o in outputs]),
        tokens=per_step([o.tokens for o in outputs]),
        f_hat=rows([o.f_hat for o in outputs]),
        timings={name: sum(o.timings[name] for o in outputs) for name in first.timings},
        logits=None if first.logits is None else per_step([o.logits for o in outputs]),
        float_images=None if first.image is None else rows([o.image for o in outputs]),
    )
