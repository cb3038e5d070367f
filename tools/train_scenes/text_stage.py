"""Stage 2: the text encoder learns to tell what is in a scene, before any picture is drawn from it.

Its features, and the pooled one that starts and modulates the transformer, then say apart what a caption says: which
solid stands where, in which colour. Learning that from pictures alone takes far longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastvar_trt.export.progress import Progress
from fastvar_trt.tools.scenes.world import (
    COLOURS,
    GROUNDS,
    MATERIALS,
    SHAPES,
    SKIES,
    SLOTS,
    Scene,
    caption,
    random_scene,
)
from fastvar_trt.tools.train_scenes.config import TextConfig, TransformerConfig, fingerprint
from fastvar_trt.tools.train_scenes.text import RMSNorm, T5Encoder, text_mask, token_batch, word_tokenizer
from fastvar_trt.tools.train_scenes.transformer import TextPool
from fastvar_trt.tools.training import Stage

_NONE = "none"
_FRONT = (_NONE, *SLOTS)


def scene_labels(scene: Scene) -> list[int]:
    """What a scene has, as one class per question of `QUESTIONS`."""
    by_slot = {solid.slot: solid for solid in scene.solids}
    front = _NONE if scene.near is None else scene.near.slot
    labels = [GROUNDS.index(scene.ground), SKIES.index(scene.sky), _FRONT.index(front)]
    for slot in SLOTS:
        solid = by_slot.get(slot)
        for values, name in ((SHAPES, "shape"), (COLOURS, "colour"), (MATERIALS, "material")):
            labels.append(0 if solid is None else 1 + values.index(getattr(solid, name)))
    return labels


_OF_PLACE = (len(GROUNDS), len(SKIES), len(_FRONT))
_OF_SLOT = tuple(1 + len(values) for values in (SHAPES, COLOURS, MATERIALS))
QUESTIONS = _OF_PLACE + _OF_SLOT * len(SLOTS)
_HEADS = 4


class TextReader(nn.Module):
    """The text encoder, and the head of the transformer that pools its features, with answers to the questions.

    Every question is answered twice: from the pooled feature, and by a learnt query for each slot that looks at the
    features as the transformer will.
    """

    def __init__(self, text: T5Encoder, config: TransformerConfig) -> None:
        super().__init__()
        self.text = text
        self.text_norm = RMSNorm(config.text.width, config.sizes.norm_eps)
        self.text_proj_for_sos = TextPool(config.sizes)
        self.answers = nn.Linear(config.width, sum(QUESTIONS))
        width = text.config.width
        self.queries = nn.Parameter(torch.randn(1, _HEADS, 1 + len(SLOTS), width // _HEADS))
        self.keys_values = nn.Linear(width, 2 * width)
        self.of_place, self.of_slot = nn.Linear(width, sum(_OF_PLACE)), nn.Linear(width, sum(_OF_SLOT))

    def forward(self, ids: Tensor, counts: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Logits [B, answers] per question, twice."""
        features = self.text_norm(self.text(ids, counts))
        mask = text_mask(counts, ids.shape[1])
        pooled = self.answers(self.text_proj_for_sos(features, mask)).split(QUESTIONS, dim=1)
        kv = self.keys_values(features).unflatten(-1, (2, _HEADS, -1))
        keys, values = kv.permute(2, 0, 3, 1, 4).unbind(0)
        queries = self.queries.expand(len(ids), -1, -1, -1)
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)
        looked_up = [*self.of_place(found[:, 0]).split(_OF_PLACE, dim=1)]
        for slot in range(len(SLOTS)):
            looked_up += self.of_slot(found[:, 1 + slot]).split(_OF_SLOT, dim=1)
        return pooled, looked_up


def captions_tokenizer(config: TextConfig) -> Tokenizer:
    """That of the world's captions."""
    rng = np.random.default_rng([config.seed, 1])
    return word_tokenizer(caption(random_scene(rng, held_out=None), rng) for _ in range(4000))


def _world_sha256(tokenizer: Tokenizer) -> str:
    """What is learnt: the vocabulary, and what captions say of some scenes."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(500)]
    learnt = [sorted(tokenizer.get_vocab()), [(caption(scene, rng), scene_labels(scene)) for scene in scenes]]
    return hashlib.sha256(json.dumps(learnt).encode()).hexdigest()


def train_text(config: TransformerConfig, folder: Path, device: torch.device, progress: Progress) -> Stage[TextReader]:
    """Answer every question from the caption."""
    text = config.text
    tokenizer = captions_tokenizer(text)
    torch.manual_seed(text.seed)
    model = TextReader(T5Encoder(text.sizes(tokenizer.get_vocab_size())), config).to(device)
    of_stage = {**fingerprint(text), "width_of_transformer": config.width, "world_sha256": _world_sha256(tokenizer)}
    stage = Stage("text", model, text.lr, text.steps, of_stage, folder)
    for _ in stage.steps(progress):
        # One solid is learnt at once; which of several is where is not.
        scenes = [random_scene(stage.rng, int(stage.rng.choice([1, 2, 2, 3, 3]))) for _ in range(text.batch)]
        ids, counts = token_batch(tokenizer, [caption(scene, stage.rng) for scene in scenes], text.text_length)
        longest = int(counts.max())
        both = model(ids[:, :longest].to(device), counts.to(device))
        labels = torch.tensor([scene_labels(scene) for scene in scenes], device=device)
        pooled, looked_up = (
            torch.stack([F.cross_entropy(answer, own) for answer, own in zip(answers, labels.T, strict=True)]).sum()
            for answers in both
        )
        (pooled + looked_up).backward()
        stage.record(pooled=pooled, looked_up=looked_up)
    return stage
