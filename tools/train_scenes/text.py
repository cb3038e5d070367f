"""A small T5 encoder for training, and its tokenizer of whole words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from fastvar_trt.export.models.t5 import T5Config, position_bias
from fastvar_trt.runtime.manifest import TOKENIZER_FILE

_MASKED = -3e4
_SPECIAL = ("<pad>", "</s>", "<unk>")


def word_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """Whole words, in lower case, and T5's end mark; the vocabulary is that of the captions."""
    split = pre_tokenizers.Split(Regex(r"[a-z]+|[^a-z\s]"), "removed", invert=True)
    words = {word for caption in captions for word, _ in split.pre_tokenize_str(caption.lower())}
    vocab = {word: i for i, word in enumerate((*_SPECIAL, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def token_batch(tokenizer: Tokenizer, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Padded tokens int64 [B, T], and how many there are [B]."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(captions))]
    batch = torch.zeros(len(ids), length, dtype=torch.long)
    for row, own in zip(batch, ids, strict=True):
        row[: len(own)] = torch.tensor(own)
    return batch, torch.tensor([len(own) for own in ids])


def text_mask(counts: Tensor, length: int) -> Tensor:
    """What is added to scores, for how many tokens there are [B]: fp32 [B, 1, 1, T]."""
    return ((torch.arange(length, device=counts.device) >= counts[:, None]).float() * _MASKED)[:, None, None]


class RMSNorm(nn.Module):
    """`T5LayerNorm`, and Infinity's `FastRMSNorm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _SelfAttention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.width, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)


class _Attention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.SelfAttention = _SelfAttention(config, has_bias)
        self.layer_norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        hidden, own = self.layer_norm(x), self.SelfAttention
        q, k, v = (part(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (own.q, own.k, own.v))
        return x + own.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2))


class _Dense(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.width, config.mlp_width, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)


class _FeedForward(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = _Dense(config)
        self.layer_norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        hidden, own = self.layer_norm(x), self.DenseReluDense
        return x + own.wo(F.gelu(own.wi_0(hidden), approximate="tanh") * own.wi_1(hidden))


class _Block(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_Attention(config, has_bias), _FeedForward(config)])


class _Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(config, i == 0) for i in range(config.depth))
        self.final_layer_norm = RMSNorm(config.width, config.norm_eps)


def _looking_around(config: T5Config) -> Tensor:
    """Position biases [buckets, H] by which heads look back, ahead, around and everywhere, in turn.

    Like ALiBi's slopes (arXiv 2108.12409). From T5's own, which are near 0, a small encoder takes thousands of steps to
    find out which words stand side by side.
    """
    length = config.max_distance
    buckets = torch.arange(config.num_buckets).float()[:, None]
    bucket_of = position_bias(dataclasses.replace(config, text_length=length), buckets)[0].long()
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    size = torch.zeros(config.num_buckets).scatter_reduce(
        0, bucket_of.flatten(), distance.abs().flatten().float(), "mean", include_self=False
    )
    ahead = torch.arange(config.num_buckets) >= config.num_buckets // 2
    looks = [
        torch.where(ahead, -5 - 0.3 * size, -0.7 * size),
        torch.where(ahead, -0.7 * size, -5 - 0.3 * size),
        -0.3 * size,
        torch.zeros_like(size),
    ]
    return torch.stack([looks[head % len(looks)] for head in range(config.num_heads)], dim=1)


class T5Encoder(nn.Module):
    """`T5EncoderModel` with gated GELU: tokens [B, T] and their counts [B] -> features [B, T, C].

    Parameter names are Hugging Face's.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.width)
        self.encoder = _Stack(config)
        for name, parameter in self.named_parameters():  # `T5PreTrainedModel._init_weights`
            fan_in = parameter.shape[-1]
            if name.endswith("SelfAttention.q.weight"):
                nn.init.normal_(parameter, std=(config.width * config.head_dim) ** -0.5)
            elif "relative_attention_bias" in name:
                parameter.data = _looking_around(config)
            elif parameter.ndim == 2 and name != "shared.weight":
                nn.init.normal_(parameter, std=fan_in**-0.5)

    def forward(self, ids: Tensor, counts: Tensor) -> Tensor:
        config = self.config
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # type: ignore[union-attr,index]
        bias = position_bias(dataclasses.replace(config, text_length=ids.shape[1]), table)
        bias = bias + text_mask(counts, ids.shape[1])  # [B, H, T, T]
        x = self.shared(ids)
        for block in self.encoder.block:
            attention, feed_forward = block.layer  # type: ignore[misc]
            x = feed_forward(attention(x, bias))
        return self.encoder.final_layer_norm(x)


def write_text_encoder(folder: Path, model: T5Encoder, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder of T5: `config.json`, `model.safetensors` in fp16, and the tokenizer."""
    config = model.config
    folder.mkdir()
    save_file({name: p.detach().half().cpu() for name, p in model.state_dict().items()}, folder / "model.safetensors")
    data = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": config.width,
        "d_kv": config.head_dim,
        "num_heads": config.num_heads,
        "d_ff": config.mlp_width,
        "num_layers": config.depth,
        "vocab_size": config.vocab_size,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / TOKENIZER_FILE))
