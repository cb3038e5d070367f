"""`Pipeline`: a bundle, loaded, that draws images."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.auxiliary import AuxiliaryGraph
from fastvar_trt.runtime.backends import Backend, Buffer, create_backend
from fastvar_trt.runtime.chain import Chain, ChainOutputs, memory_of, plan_batches
from fastvar_trt.runtime.errors import BackendError, RequestError
from fastvar_trt.runtime.given import EncodedPicture, ImageEncoder, given_tensors
from fastvar_trt.runtime.manifest import Manifest, Role, Variant, check_files, read_manifest
from fastvar_trt.runtime.request import (
    Request,
    batch_inputs,
    check_inputs,
    check_picture,
    check_request,
    example_requests,
    requests_of,
)
from fastvar_trt.runtime.text import PromptTokenizer, PromptTokens, TextEncoder, check_unreplaced


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
        warnings: what was not drawn as asked, per image: of prompts that were cut off.
    """

    images: NDArray[Any]
    tokens: list[NDArray[Any]]
    f_hat: NDArray[Any]
    timings: dict[str, float]
    logits: list[NDArray[Any]] | None = None
    float_images: NDArray[Any] | None = None
    warnings: Sequence[Sequence[str]] = ()


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


_SAME_RATIO = 0.02  # of height over width
_TEXTS = "", "negative_"  # of a request: prefixes of its features
_Encoder = TypeVar("_Encoder", bound=AuxiliaryGraph)


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
        self._chains: dict[tuple[str, int], Chain] = {}  # by variant and batch size
        self._memory: Buffer | None = None  # that the chains share
        self._encoders: dict[str | None, Any] = {}  # of pictures by variant; None: of texts
        self._tokenizer = PromptTokenizer(bundle, manifest)
        self._closed = False

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str | Backend = "onnxruntime",
        device: str | None = None,
        check: str = "full",
        **options: Any,
    ) -> Pipeline:
        """Open a bundle and make its graphs ready to run.

        Args:
            bundle: the folder that fastvar-export wrote.
            backend: `onnxruntime`, `tensorrt_rtx`, `tensorrt`, another that was registered, or an object that
                implements `Backend`.
            device: where the backend runs; default: `cpu` for onnxruntime, `cuda` for TensorRT. `cuda:N` names a GPU.
            check: `full` compares the SHA-256 of every file (engines too) with the one on record, `size` their
                sizes only.
            options: the backend's own, as `runtime.backends.BACKENDS` lists them: for onnxruntime on the CPU
                `num_threads` (of one operator; default: one per core that this process may use) and `engines` (`auto`
                uses what `fastvar build` made for this processor, `off` never does, `require` raises where there is
                nothing); on a GPU `capture` (whether chains are captured as CUDA graphs; default: with TensorRT, yes)
                and for TensorRT `kernel_cache` (folder of compiled kernels, or `off`); everywhere `low_memory` (text
                encoder and decoder are there only while they run; chains are then not captured).

        Raises:
            BundleError: a bundle that is incomplete, damaged or of another format version.
            BackendError: a backend that is not installed, or that cannot run this bundle.
            RequestError: another `check`, or options beside a backend that is an object.
        """
        if check not in ("full", "size"):
            raise RequestError(f"check: got {check!r}, expected 'full' or 'size'")
        path = Path(bundle)
        manifest = read_manifest(path)
        check_inputs(manifest)
        check_files(path, manifest, hashes=check == "full")
        if isinstance(backend, str):
            backend = create_backend(backend, device, **options)
        elif device is not None or options:
            given = ["device"] * (device is not None) + list(options)
            raise RequestError(f"{given[0]}: has no effect on a backend that is given as an object; make it with it")
        pipeline = cls(path, manifest, backend)
        try:
            backend.open(path, manifest, check_hashes=check == "full")
            chains = [variant.chain(batch) for variant in manifest.variants for batch in manifest.batches]
            pipeline._memory = memory_of(backend, chains)
            # The largest first: what engines share then never has to grow. Chains of other variants are loaded when
            # they are first drawn with.
            for batch in sorted(manifest.batches, reverse=True):
                pipeline._chain(manifest.default, batch)
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
    def buffer_shapes(self) -> dict[tuple[str, int], dict[str, tuple[int, ...]]]:
        """(Variant, batch size) -> shape of every buffer, of every chain that is loaded."""
        return {key: chain.buffer_shapes for key, chain in list(self._chains.items())}

    @property
    def num_buffer_bytes(self) -> int:
        """Memory of requests, modulations, keys and values, caches and results, of all batch sizes."""
        shared = 0 if self._memory is None else self._memory.shape[0]
        return shared + sum(own.num_buffer_bytes for own in [*self._encoders.values(), *self._chains.values()])

    @property
    def capture_problems(self) -> tuple[str, ...]:
        """Why chains that the backend was asked to capture as CUDA graphs are run without; empty where none is."""
        chains = list(self._chains.values())  # others may be loaded meanwhile
        return tuple(dict.fromkeys(problem for chain in chains for problem in chain.capture_problems))

    def close(self) -> None:
        """Release the graphs; may be called twice. ONNX Runtime keeps the memory of activations for the next load."""
        with self._lock:
            if not self._closed:
                self.backend.activate()
            self._closed = True
            for chain in self._chains.values():
                chain.close()
            self._chains.clear()
            self._memory = None
            self._encoders.clear()
            self.backend.close()

    def generate(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str | None] | None = None,
        text_features: Sequence[NDArray[Any]] | None = None,
        negative_text_features: Sequence[NDArray[Any] | None] | None = None,
        text_tokens: Sequence[int] | None = None,
        negative_text_tokens: Sequence[int | None] | None = None,
        seeds: int | Sequence[int] = 0,
        cfg: float | Sequence[float | None] | NDArray[Any] | None = None,
        temperature: float | Sequence[float | None] | NDArray[Any] | None = None,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        greedy: bool = False,
        image: NDArray[Any] | Sequence[NDArray[Any]] | None = None,
        mask: NDArray[Any] | Sequence[NDArray[Any] | None] | None = None,
        keep_scales: int | Sequence[int | None] | None = None,
        paste: bool = True,
        size: str | None = None,
        h_div_w: float | None = None,
        variant: str | None = None,
        noise: Mapping[int, NDArray[Any]] | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Draw one image per label or text: `draw`, with a list per value in place of a list of requests.

        Args:
            labels: N class indices, for a model of classes.
            prompts: N texts, for a model of text whose bundle has its text encoder.
            negative_prompts: N texts to keep away from; None or empty, for all or for one: the model's own.
            text_features: in place of prompts: N arrays [tokens, width], the text encoder's last hidden state without
                padding.
            negative_text_features: the same of N negative prompts; None, for all or for one: the model's own.
            text_tokens: of models that read padding, how many of each one's features are none.
            negative_text_tokens: the same of negative ones.
            seeds: one per image, or one for all: then image i gets seed + i.
            cfg: guidance scale; default: the manifest's. VAR ramps it linearly over the scales; it may be an array
                [N, scales].
            temperature: divides the logits (Infinity's tau); above 0; may be an array [N, scales].
            top_k: how many of the likeliest tokens may be drawn, at most the manifest's `max_top_k`; 0 for all
                of them, where the bundle allows it.
            top_p: the smallest set of likeliest tokens with this total probability may be drawn; 0 or 1: all.
            greedy: take the likeliest token; seeds, top_k and top_p are then without effect.
            image: uint8 [H, W, 3], RGB, as large as what is drawn (`runtime.pictures` makes it so): of bundles with an
                image encoder. One for all, or a list.
            mask: bool [H, W], where the image is drawn anew; elsewhere it is kept. One for all, or a list.
            keep_scales: how many of the first scales are the image's everywhere; the others are drawn, but for what a
                mask keeps.
            paste: outside of the mask, take the image's own pixels in `images`; float_images and f_hat are as drawn.
            size: of the pictures, `1024x576`; one that the bundle holds. Default: that of its first variant.
            h_div_w: height over width, in place of a size.
            variant: the name of the variant; default: the bundle's first.
            noise: scale -> U[0, 1) float32 [N, tokens] or [N, tokens, bits], in place of what the seeds give.
            options: those of `draw`. (cfg, temperature, top_k and top_p may be one value per image, None for the
                default.)

        Raises:
            RequestError: a value out of range; the message gives the range.
            BackendError: the backend failed, or the model's logits were not finite.
            CancelledError: `should_stop` said so.
        """
        chosen = self.variant(variant, h_div_w=h_div_w, size=size)
        requests = requests_of(
            len(chosen.schedule),
            {
                "label": labels,
                "prompt": prompts,
                "negative_prompt": negative_prompts,
                "text_features": text_features,
                "negative_text_features": negative_text_features,
                "text_tokens": text_tokens,
                "negative_text_tokens": negative_text_tokens,
            },
            seeds,
            {
                "cfg": cfg,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "greedy": greedy,
                "image": image,
                "mask": mask,
                "keep_scales": keep_scales,
                "paste": paste,
            },
            noise,
        )
        return self.draw(requests, variant=chosen.name, **options)

    def draw(
        self,
        requests: Sequence[Request],
        *,
        variant: str | None = None,
        return_logits: bool = False,
        return_float_images: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
        preview_scales: Collection[int] = (),
        on_preview: Callable[[Preview], None] = lambda preview: None,
    ) -> GenerationResult:
        """Draw one image per request.

        An image depends on its own request only, not on its neighbours or on the batch sizes of the bundle, up to the
        rounding of the backend's kernels.

        Args:
            requests: at least one.
            variant: the name of the bundle's variant; default: its first.
            return_logits: fill `GenerationResult.logits`.
            return_float_images: fill `GenerationResult.float_images`.
            should_stop: asked between scales (before the launch, where the chain is captured as a CUDA graph).
            preview_scales: scales after which the images are also decoded as far as they are: computed ones before
                the last. Each costs one run of the decoder, and the chain is then not launched as a CUDA graph.
            on_preview: called with each, in this thread and between two scales: what it does delays the images.
                Neither it nor should_stop may use the pipeline, which is theirs to wait for.

        Raises:
            RequestError: a value out of range; the message gives the range.
            BackendError: the backend failed, or the model's logits were not finite.
            CancelledError: `should_stop` said so.
        """
        chosen = self.variant(variant)
        prompts = self._checked(requests, chosen, preview_scales)
        encoded = self._with_pictures(self._all_encoded(requests, prompts), chosen)
        wanted = [role for role, asked in ((Role.LOGITS, return_logits), (Role.IMAGE, return_float_images)) if asked]
        outputs = self._run(chosen, encoded, wanted, should_stop, preview_scales, on_preview)
        for i, finite in enumerate(np.concatenate([o.finite for o in outputs])[: len(encoded)]):
            if not finite:
                cfg = np.max(self.manifest.sampling.cfg if requests[i].cfg is None else requests[i].cfg)
                raise BackendError(
                    f"image {i}: the model's logits are not finite: cfg {cfg:g} is too large, or its activations "
                    f"exceed {self.manifest.precision}"
                )
        merged = _merge(outputs, len(encoded))
        for image, request in zip(merged.images, requests, strict=True):
            if request.image is not None and request.mask is not None and request.paste:
                from fastvar_trt.runtime.pictures import pasted  # needs Pillow, without which all else draws

                image[...] = pasted(image, request.image, request.mask.astype(bool))
        warnings = [[tokens.warning for tokens in pair if tokens and tokens.warning] for pair in prompts]
        return dataclasses.replace(merged, warnings=warnings)

    def _run(
        self,
        variant: Variant,
        requests: Sequence[Request],
        wanted: Collection[Role],
        should_stop: Callable[[], bool],
        preview_scales: Collection[int],
        on_preview: Callable[[Preview], None],
    ) -> list[ChainOutputs]:
        """Encoded requests, batch by batch; the last one's rows are repeated where a batch is larger than they are."""
        outputs = []
        start = 0
        for batch in plan_batches(len(requests), self.manifest.batches):
            part = requests[start : start + batch]
            kept = len(part)

            def preview(scale: int, pixels: NDArray[Any], start: int = start, kept: int = kept) -> None:
                on_preview(Preview(scale, start, pixels[:kept]))

            inputs = batch_inputs(self.manifest, variant, [*part, *[part[-1]] * (batch - kept)])
            with self._lock:
                self._check_open()
                chain = self._chain(variant, batch)
                outputs.append(chain.run(inputs, wanted, should_stop, preview_scales, preview))
            start += batch
        return outputs

    def stream(self, *arguments: Any, preview_scales: Collection[int], **options: Any) -> Iterator[Preview]:
        """Draw as `generate` does, and hand out the images in the making.

        They are drawn in a thread of their own, which does not wait for whoever reads them: a slow reader, or one that
        calls `generate` meanwhile, holds nobody up. Closing the iterator stops the drawing before its next scale.

        Args:
            arguments: those of `generate`.
            options: likewise, but for `should_stop` and `on_preview`.
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
                sizes = {name: options.get(name) for name in ("h_div_w", "size")}
                variant = self.variant(options.get("variant"), **sizes)
                items.put(Preview(variant.computed_scales[-1], 0, result.images, result))
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
        """Draw one batch of every size with every variant; where there are encoders, load them, and the tokenizer.

        The first request of a service then takes what the later ones take (on a GPU, chains are captured here), and no
        file is read later, but where text encoder and decoder are loaded on demand.

        Raises:
            BackendError: the backend failed, or prompts need a package that is not installed.
        """
        for variant in self.manifest.variants:
            for batch in self.manifest.batches:
                self.draw(example_requests(self.manifest, batch), variant=variant.name)
        for variant in self.manifest.variants:
            if variant.takes_pictures:
                self.encode_image(np.zeros((variant.image_height, variant.image_width, 3), np.uint8), variant.name)
        if self.manifest.text_encoder is not None:
            self._tokenizer.load()
            self.encode_tokens([0])

    def check(
        self, requests: Sequence[Request], *, variant: str | None = None, preview_scales: Collection[int] = ()
    ) -> None:
        """That `draw` would take these. Computes nothing, and waits for no batch that runs.

        Raises:
            RequestError: a value out of range.
        """
        self._checked(requests, self.variant(variant), preview_scales)

    def _chain(self, variant: Variant, batch: int) -> Chain:
        """A chain, loaded at its first use; with the lock held."""
        key = variant.name, batch
        if key not in self._chains:
            assert self._memory is not None
            if variant is not self.manifest.default:  # what is loaded now is read from the folder
                check_unreplaced(self.bundle, self.manifest)
            self.backend.activate()
            tolerance = self.manifest.own_precision.tolerance
            self._chains[key] = Chain(self.backend, variant.chain(batch), tolerance, self._memory)
        return self._chains[key]

    def variant(self, name: str | None = None, *, h_div_w: float | None = None, size: str | None = None) -> Variant:
        """The variant of that name, size, or height over width; the default where none is asked for.

        Raises:
            RequestError: the bundle holds none such.
        """
        variants = self.manifest.variants
        if name is not None:
            variants = tuple(variant for variant in variants if variant.name == name)
            if not variants:
                known = ", ".join(variant.name for variant in self.manifest.variants)
                raise RequestError(f"variant: got {name!r}, this bundle holds {known}")
        if size is not None:
            if size not in self.manifest.sizes:
                raise RequestError(f"size: got {size!r}, this bundle draws {', '.join(self.manifest.sizes)}")
            variants = tuple(variant for variant in variants if variant.size == size)
            if not variants:
                raise RequestError(f"size: got {size!r}, the variant {name} has another")
        if h_div_w is None:
            return variants[0]
        for variant in variants:
            if abs(h_div_w - variant.h_div_w) <= _SAME_RATIO * variant.h_div_w:
                return variant
        held = ", ".join(f"{v.h_div_w:.3g} ({v.image_width}x{v.image_height})" for v in variants)
        raise RequestError(f"h_div_w: got {h_div_w:g}, this bundle holds {held}; export another with --h-div-w")

    def _checked(
        self, requests: Sequence[Request], variant: Variant, preview_scales: Collection[int]
    ) -> list[tuple[PromptTokens | None, PromptTokens | None]]:
        """Check requests, and give the tokens of each one's prompt and negative prompt, where it has them."""
        if not requests:
            raise RequestError("requests: got none, expected at least one")
        found = []
        for i, request in enumerate(requests):
            try:
                check_request(self.manifest, variant, request)
                prompts = ((name, getattr(request, name)) for name in ("prompt", "negative_prompt"))
                tokens, negative = (self._tokenizer.tokens(text, name) if text else None for name, text in prompts)
            except RequestError as error:
                if len(requests) == 1:
                    raise
                raise RequestError(f"image {i}: {error}") from error
            found.append((tokens, negative))
        allowed = variant.preview_scales
        wrong = [scale for scale in preview_scales if scale not in allowed or isinstance(scale, bool)]
        if wrong:
            raise RequestError(
                f"preview_scales: got {wrong[0]!r}, expected some of {', '.join(map(str, allowed))} (the computed "
                "scales before the last)"
            )
        return found

    def encode_image(self, image: NDArray[Any], variant: str | None = None) -> EncodedPicture:
        """The tokens of a picture, to edit it many times: `runtime.given.given_tensors` makes a `Request.given` of it.

        Args:
            image: uint8 [H, W, 3], RGB, as large as what the variant draws.
            variant: its name; default: the bundle's first.

        Raises:
            RequestError: a bundle without image encoder, or a picture of another size.
            BackendError: its tokens' features are not finite.
        """
        chosen = self.variant(variant)
        check_picture(chosen, Request(image=image, keep_scales=1))
        return self._encode_images([image], chosen)[0]

    def _encode_images(self, images: Collection[NDArray[Any]], variant: Variant) -> list[EncodedPicture]:
        if not images:
            return []
        with self._encoder(variant.name, lambda: ImageEncoder(self.backend, variant)) as encoder:
            found = [encoder.encode(image) for image in images]
        self._check_features("image", [picture.f_hat for picture in found])
        return found

    def _with_pictures(self, requests: Sequence[Request], variant: Variant) -> list[Request]:
        """The requests with given tokens in place of pictures, each of which is encoded once."""
        images = {id(request.image): request.image for request in requests if request.image is not None}
        pictures = dict(zip(images, self._encode_images(images.values(), variant), strict=True))
        found = []
        for request in requests:
            if request.image is not None:
                given = given_tensors(variant, pictures[id(request.image)], request.mask, request.keep_scales)
                request = dataclasses.replace(request, image=None, mask=None, keep_scales=None, given=given)
            found.append(request)
        return found

    def _all_encoded(
        self, requests: Sequence[Request], prompts: Sequence[tuple[PromptTokens | None, PromptTokens | None]]
    ) -> list[Request]:
        """The requests with the text encoder's features in place of prompts."""
        named = [(i, name, own) for i, pair in enumerate(prompts) for name, own in zip(_TEXTS, pair, strict=True)]
        texts = [(i, name, own) for i, name, own in named if own is not None]
        features = self._encode_texts([tokens.ids for _, _, tokens in texts])
        found: list[dict[str, Any]] = [{} for _ in requests]
        for (i, name, tokens), own in zip(texts, features, strict=True):
            found[i] |= {"prompt": None, "negative_prompt": None, f"{name}text_features": own}
            if self.manifest.model.context_tokens:
                found[i][f"{name}text_tokens"] = len(tokens.ids)
        return [dataclasses.replace(request, **own) for request, own in zip(requests, found, strict=True)]

    def encode(
        self, prompts: Sequence[str], negative_prompts: Sequence[str | None] | None = None
    ) -> tuple[list[NDArray[Any]], list[NDArray[Any] | None]]:
        """The text encoder's features of prompts and of negative prompts, to draw of one prompt many times.

        The first call loads the text encoder.

        Raises:
            RequestError: a bundle without text encoder, or a prompt that is empty or too long.
            BackendError: the text encoder cannot be loaded or run.
        """
        conditions = {"prompt": prompts, "negative_prompt": negative_prompts}
        requests = requests_of(len(self.manifest.default.schedule), conditions, 0, {})
        tokens = self._checked(requests, self.manifest.default, ())
        encoded = self._all_encoded(requests, tokens)
        return [r.text_features for r in encoded if r.text_features is not None], [
            r.negative_text_features for r in encoded
        ]

    def encode_tokens(self, ids: Sequence[int]) -> NDArray[Any]:
        """The text encoder's features of one prompt's tokens: fp32 [tokens, width].

        Raises:
            BackendError: they are not finite.
        """
        return self._encode_texts([ids])[0]

    def _encode_texts(self, texts: Collection[Sequence[int]]) -> list[NDArray[Any]]:
        if not texts:
            return []
        with self._encoder(None, lambda: TextEncoder(self.backend, self.manifest)) as encoder:
            features = [encoder.encode(ids) for ids in texts]
        self._check_features("text", features)
        return features

    @contextlib.contextmanager
    def _encoder(self, name: str | None, make: Callable[[], _Encoder]) -> Iterator[_Encoder]:
        """A text or image encoder, loaded at its first use; unloaded after, where it is on demand.

        The lock is held until then: graphs that are on demand share weights while several of them are loaded.
        """
        with self._lock:
            self._check_open()
            if name not in self._encoders or self.backend.low_memory:
                check_unreplaced(self.bundle, self.manifest)  # what is loaded now is read from it
            self.backend.activate()
            if name not in self._encoders:
                self._encoders[name] = make()
            encoder: _Encoder = self._encoders[name]
            try:
                yield encoder
            finally:
                encoder.release()

    def _check_features(self, of: str, features: Sequence[NDArray[Any]]) -> None:
        if not all(np.isfinite(own).all() for own in features):
            raise BackendError(f"the {of} encoder's features are not finite: they exceed {self.manifest.precision}")

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the pipeline is closed; load the bundle again")


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
