"""BLIP-2's first stage: a Q-Former trained on captions, without a language model (Li et al., 2023, section 3.2).

Three losses of equal weight use three attention masks of one Q-Former, which queries and text share:

    contrastive   queries and text separately         similarity of the image's nearest query and the caption's [CLS]
    matching      bidirectional over queries + text   do image and caption match?
    generation    causal text that sees the queries   next-token prediction of the caption, starting at [DEC]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..batch import Batch
from ..connectors import Features, VisionFeatures
from ..connectors.layers import init_linears
from ..connectors.qformer import EPS, QFormerCore, Words
from ..model import VLMWrapper
from ..settings import Vision
from .base import Objective
from .gathering import Share, all_numbers

# Published code: widths, temperature and smoothing of lavis/models/blip2_models/blip2_qformer.py.
EMBED_DIM = 256
TEMPERATURE = 0.07
SMOOTHING = 0.1
EXCLUDED = -1.0e4


class Losses(NamedTuple):
    """This rank's part of each loss, summed over its pairs."""

    contrastive: Tensor
    matching: Tensor
    generation: Tensor


class Pairs(NamedTuple):
    """Images and texts of this rank, of which the first `count` are not padding, and their positions in the step.

    vision: ``(B, N, C)``; ids, mask: ``(B, T)``; mine ``(count,)``: positions among all pairs of the step.
    """

    vision: Tensor
    ids: Tensor
    mask: Tensor
    count: int
    share: Share
    mine: Tensor


class QFormerPretraining(Objective):
    """Contrastive, matching and generation losses of a Q-Former, each a mean over the step.

    The connector's ``ln_vision``, if it has one, is trained as well. Owns the heads; the text head is tied to the word
    embeddings of the connector (published code: BERT's tied head). Contrastive candidates, including this rank's own,
    carry no gradient; the images used for matching do.
    """

    needs = ("vision", "connector", "objective")
    compares_samples = True
    sees_pictures_as_tokens = False

    def __init__(self, hidden_size: int, vocabulary: int):
        super().__init__()
        self.vision_proj, self.text_proj = (nn.Linear(hidden_size, EMBED_DIM) for _ in range(2))
        self.itm_head = nn.Linear(hidden_size, 2)
        self.temperature = Temperature()
        self.text_head = TextHead(hidden_size, vocabulary)
        self.generate = vocabulary - 1  # [DEC], see data.connector_text

    @classmethod
    def build(
        cls, vision: Vision, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, nn.Module]
    ) -> QFormerPretraining:
        embedding = getattr(getattr(parts["connector"], "core", None), "embedding", None)
        if embedding is None:
            raise ValueError(
                "objective=qformer_pretraining trains a connector that reads captions: use connector=qformer and "
                "connector_text.read=answer"
            )
        return cls(embedding.words.embedding_dim, embedding.words.num_embeddings)

    def forward(self, model: VLMWrapper, batch: Batch, features: Features | None) -> Tensor:
        return sum(self.losses(model, batch, features))

    def losses(self, model: VLMWrapper, batch: Batch, features: Features | None) -> Losses:
        # Drawn first, while the generator state of the first rank does not depend on the number of ranks.
        seed = int(torch.randint(2**62, ()))
        if features is None:
            features = model.encode(batch.visual)
        core, (ids, mask) = model.connector.core, batch.visual.texts
        count = int((batch.weights.sum(1) > 0).sum())  # padding rows without weight come last
        words = int(mask[:count, 1:].sum())
        counts, all_words, widths, seeds = zip(*all_numbers([count, words, ids.shape[1], seed], ids.device))
        share = Share.of(list(counts))
        pairs = Pairs(model.connector.read(features), ids, mask, count, share, share.mine(ids.device))
        to_text, to_image = self.similarities(core, pairs)
        others = [_draw(scores.detach(), pairs, seeds[0], i) for i, scores in enumerate((to_image, to_text))]
        # a mean over the tokens of the step, as the other two losses are means over its pairs
        scale = share.total / max(1, sum(all_words))
        return Losses(
            sum(_cross_entropy(scores, pairs.mine) for scores in (to_text, to_image)) / 2,
            self.matching(core, pairs, max(widths), *others),
            self.generation(core, pairs) * scale,
        )

    def similarities(self, core: QFormerCore, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Similarities image-to-text and text-to-image, each ``(count, N)``, divided by the temperature."""
        seen, heard = core(pairs.vision), core(None, pairs.ids, pairs.mask[:, None])
        images = F.normalize(self.vision_proj(seen).float(), dim=-1)[: pairs.count]
        texts = F.normalize(self.text_proj(heard[:, 0]).float(), dim=-1)[: pairs.count]
        all_images, all_texts = pairs.share.gather(images.detach()), pairs.share.gather(texts.detach())
        return self.temperature(_nearest(images, all_texts)), self.temperature(_nearest(all_images, texts).T)

    def matching(self, core: QFormerCore, pairs: Pairs, width: int, others: Tensor, other_texts: Tensor) -> Tensor:
        """Matching loss, summed: for each pair the mean over the pair itself, a negative image and a negative text.

        others, other_texts ``(count,)``: positions of the sampled negatives.
        """
        count, share = pairs.count, pairs.share
        vision = pairs.vision[:count]
        marked = F.pad(pairs.ids.masked_fill(~pairs.mask, -1)[:count], (0, width - pairs.ids.shape[1]), value=-1)
        all_vision, all_marked = share.gather(vision), share.gather(marked)
        ids = torch.cat([marked, marked, all_marked[other_texts]])
        asked = torch.cat([vision, all_vision[others], vision])
        states = core(asked, ids.clamp(min=0), _with_queries(core, ids >= 0)[:, None])
        logits = self.itm_head(states[:, : core.num_queries]).float().mean(1)
        # a step of one pair has no negative: the pair itself is drawn and labeled as a match
        labels = torch.cat([torch.ones_like(pairs.mine, dtype=torch.bool), others == pairs.mine])
        labels = torch.cat([labels, other_texts == pairs.mine]).long()
        return F.cross_entropy(logits, labels, reduction="sum") / 3

    def generation(self, core: QFormerCore, pairs: Pairs) -> Tensor:
        """Negative log-likelihood of the caption tokens with label smoothing, summed."""
        queries, width = core.num_queries, pairs.ids.shape[1]
        sight = _with_queries(core, pairs.mask)[:, None].repeat(1, queries + width, 1)
        sight[:, :queries, queries:] = False
        sight[:, queries:, queries:] &= torch.ones_like(sight[0, queries:, queries:]).tril()
        start = torch.full_like(pairs.ids[:, :1], self.generate)
        states = core(pairs.vision, torch.cat([start, pairs.ids[:, 1:]], dim=1), sight)[:, queries:-1]
        keep = pairs.mask[:, 1:].clone()
        keep[pairs.count :] = False
        logits = self.text_head(states[keep], core.embedding.words)
        return _cross_entropy(logits.float(), pairs.ids[:, 1:][keep])

    def rehearse(self, connector: nn.Module, features: VisionFeatures, ids: Tensor) -> tuple[Tensor, ...]:
        """Run all forward passes on texts `ids` ``(B, T)``, to measure their cost without data or weights."""
        core, vision = connector.core, connector.read(features)
        apart = core(vision), core(None, ids)
        matched = core(vision.repeat(3, 1, 1), ids.repeat(3, 1))
        states = core(vision, ids)[:, core.num_queries : -1]
        return *apart, matched, self.text_head(states.flatten(0, 1), core.embedding.words)

    def load_bert(self, state_dict: Mapping[str, Tensor]) -> None:
        """Initialize the text head from Hugging Face's ``BertForMaskedLM``. Raises ValueError if shapes differ."""
        self.text_head.load_bert(state_dict)


class Temperature(nn.Module):
    """The learned divisor of similarities; learned directly, not as its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([TEMPERATURE]))

    def forward(self, similarities: Tensor) -> Tensor:
        return similarities / self.value.float()


class TextHead(nn.Module):
    """BERT's head: states ``(K, D)`` to logits ``(K, V)``, tied to the word embeddings `words`."""

    def __init__(self, hidden_size: int, vocabulary: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        init_linears(self)

    def forward(self, states: Tensor, words: Words) -> Tensor:
        return words(None, self.norm(F.gelu(self.dense(states)))) + self.bias

    def load_bert(self, state_dict: Mapping[str, Tensor]) -> None:
        names = {"dense": "transform.dense", "norm": "transform.LayerNorm", "bias": "bias"}
        for name, own in self.state_dict().items():
            first, _, rest = name.partition(".")
            theirs = ".".join(filter(None, ("cls.predictions", names[first], rest)))
            tensor = state_dict[theirs]
            if tensor.shape[1:] != own.shape[1:] or (tensor.shape != own.shape and name != "bias"):
                raise ValueError(
                    f"this BERT's {theirs} has shape {tuple(tensor.shape)}, expected the text head's {tuple(own.shape)}"
                )
            own[: len(tensor)].copy_(tensor)


def _nearest(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine similarity ``(M, K)`` of each text ``(K, E)`` to the nearest query of each image ``(M, Q, E)``."""
    return torch.einsum("mqe,ke->mkq", images, texts).max(-1).values


def _draw(scores: Tensor, pairs: Pairs, seed: int, number: int) -> Tensor:
    """Sample a negative for each row of ``(count, N)``, with probabilities given by the softmax of the scores.

    Each row of the step has its own random number, so its negative does not depend on which rank holds the row.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(2, pairs.share.total, generator=generator, dtype=torch.float64)[number].to(scores.device)
    own = torch.arange(scores.shape[1], device=scores.device) == pairs.mine[:, None]
    chances = scores.double().masked_fill(own, EXCLUDED).softmax(-1).cumsum(-1)
    return torch.searchsorted(chances, draws[pairs.mine, None], right=True)[:, 0].clamp(max=scores.shape[1] - 1)


def _with_queries(core: QFormerCore, mask: Tensor) -> Tensor:
    """Prepend all queries to a text mask: ``(B, T)`` -> ``(B, queries + T)``."""
    return torch.cat([mask.new_ones(len(mask), core.num_queries), mask], dim=1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=SMOOTHING)
