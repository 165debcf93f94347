"""Fusion: how visual tokens enter the language model.

    fuse(text embeddings, visual tokens, visual) -> Fused

`FUSIONS` maps exact names to the classes. A fusion with weights of its own is trained as the part ``fusion``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..registry import Registry
from ..visual import Visual
from .blocks import block_list
from .encoder_decoder import is_encoder_decoder
from .experts import routing_of
from .gated_layer import GATES, STYLES, GatedLayer
from .llm import hidden_width
from .media import Media, Reading


class VisualTokens(NamedTuple):
    """Output of the connector for a batch.

    tokens: ``(K, D)``, those of all placements in reading order. levels: each ``(K, D)``, for the first blocks of the
    language model.
    """

    tokens: Tensor
    levels: tuple[Tensor, ...] = ()


class Fused(NamedTuple):
    """Input of the language model.

    embeddings: ``(B, T, D)``. added: each ``(K, D)``, added to the output of the first, second, ... block at the K
    positions of visual_mask ``(B, T)``, in training and when a prompt is first read. media: what the fusion's layers
    between the blocks attend to.
    """

    embeddings: Tensor
    added: tuple[Tensor, ...] = ()
    visual_mask: Tensor | None = None
    media: Media | None = None

    def visual_options(self, llm: nn.Module) -> dict[str, Any]:
        """Arguments of a language model that adds levels at visual positions, or has experts for them."""
        options: dict[str, Any] = {"levels": self.added} if self.added else {}
        if self.added or routing_of(llm) is not None:
            nowhere = self.embeddings.new_zeros(self.embeddings.shape[:2], dtype=torch.bool)
            options["visual_mask"] = nowhere if self.visual_mask is None else self.visual_mask
        return options


class Fusion(nn.Module):
    """Base class of fusions.

    A subclass implements `forward`. It may have weights and options; `width` is that of the language model.

    in_text: whether visual tokens take positions in the text; if not, each image takes a single one.
    has_weights: whether it has weights, which a stage trains at the connector's learning rate by default.
    media_width: width of the visual tokens.
    """

    in_text = True
    has_weights = False

    def __init__(self, width: int):
        super().__init__()
        self.width = self.media_width = width
        self.config: dict = {}  # name and options, set by `build_fusion`
        self.reading = Reading()

    @classmethod
    def facts(cls, llm: nn.Module, media_width: int) -> dict[str, Any]:
        """The arguments that follow from the parts that are fused, a language model and visual tokens of this width."""
        return {"width": hidden_width(llm)}

    @classmethod
    def takes(cls, vision_width: int | tuple[int, ...], width: int) -> int:
        """Width of the visual tokens for an encoder, or several, and a language model of these widths."""
        return width

    @property
    def before_blocks(self) -> dict[int, nn.Module]:
        """The layers that read `Fused.media`, by the number of the block of the language model that they precede."""
        return {}

    def num_added(self, levels: int) -> int:
        """Number of levels in `Fused.added`, for a connector with that many `levels`."""
        return levels

    def forward(self, text: Tensor, tokens: VisualTokens, visual: Visual) -> Fused:
        """Fuse the embeddings `text` ``(B, T, D)`` of the token ids with the visual tokens of the batch.

        A batch without images has tokens of a stand-in. They must have no effect, but must stay in the graph, and as
        many tensors must be returned as for other batches, so that all ranks make the same calls in both passes.
        """
        raise NotImplementedError


class Concatenation(Fusion):
    """Visual tokens take the place of the text embeddings at their positions (LLaVA, 2023, section 4.1).

    Levels are added to the outputs of the first blocks at the same positions (DeepStack, Meng et al., 2024;
    Qwen3-VL, published code). attention: which positions see each other, one of `vlmtrain.visual.ATTENTION`, which the
    processor says in each batch.
    """

    def __init__(self, width: int, attention: str | None = None):
        super().__init__(width)
        self.attention = attention

    def forward(self, text: Tensor, tokens: VisualTokens, visual: Visual) -> Fused:
        if visual.items:
            embeddings = text.masked_scatter(visual.mask.unsqueeze(-1), tokens.tokens.to(text.dtype))
        else:
            embeddings = text + 0.0 * tokens.tokens.sum().to(text.dtype)
        return Fused(embeddings, tokens.levels, visual.mask)


class GatedCrossAttention(Fusion):
    """Text attends to visual tokens in gated layers between the blocks of the language model (Flamingo, 2022).

    An image takes one position in the text, the embedding of its mark. Its tokens have the width of the encoder. A
    position attends to the last image at or before it within its own sample, or to all of them.

    style: how the layers are built and placed, ``openflamingo`` (layer norm, feed-forward layers of 4 times the width
    with GELU, before every n-th block), ``idefics`` (RMSNorm, SwiGLU of the language model's width, before the first
    block and every n-th after it) or ``mllama`` (the same, before every n-th block, with the language model's number of
    heads of keys and values). every: n. attend: ``last`` or ``all``. heads, head_dim: None for those of the style:
    8 of 64, or those of the language model. on_text: whether the feed-forward layers run where a position sees no
    image, as in OpenFlamingo and IDEFICS; if not, text without images has the logits of the language model alone.
    qk_norm, gates: see `GatedLayer`.
    """

    in_text = False
    has_weights = True
    block_path = "layers"

    def __init__(
        self,
        width: int,
        media_width: int,
        llm: Mapping[str, Any],
        style: str = "openflamingo",
        every: int = 4,
        attend: str = "last",
        heads: int | None = None,
        head_dim: int | None = None,
        on_text: bool = True,
        qk_norm: bool = False,
        gates: str = "scalar",
    ):
        super().__init__(width)
        blocks = llm["blocks"]
        choices = {"style": (style, STYLES), "attend": (attend, ("last", "all")), "gates": (gates, GATES)}
        choices |= {"on_text": (on_text, (True, False)), "qk_norm": (qk_norm, (True, False))}
        for option, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"fusion.{option}={value}: expected one of {', '.join(map(str, known))}")
        for option, value in (("every", every), ("heads", heads), ("head_dim", head_dim)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"fusion.{option}={value}: expected a whole number of at least 1")
        self.media_width, self.attend, self.style, self.every = media_width, attend, style, every
        built = STYLES[style]
        if llm["heads"] is None and (built.grouped or built.shape is None):
            raise ValueError(f"fusion.style={style} has the heads of the language model, but this one has no attention")
        usual = built.shape or (llm["heads"], width // llm["heads"])
        heads, head_dim = heads or usual[0], head_dim or usual[1]
        self.numbers = [number for number in range(blocks) if (number + built.offset) % every == 0]
        if not self.numbers:
            raise ValueError(f"fusion.every={every}: the language model has only {blocks} blocks")
        kv_heads = llm["kv_heads"] if built.grouped else heads
        if heads % kv_heads:
            raise ValueError(
                f"fusion.heads={heads}: expected a multiple of the language model's {kv_heads} key/value heads"
            )
        sizes = (width, media_width, heads, kv_heads, head_dim, llm["intermediate_size"], llm["norm_eps"])
        self.layers = nn.ModuleList(GatedLayer(built, *sizes, on_text, qk_norm, gates) for _ in self.numbers)

    @classmethod
    def facts(cls, llm: nn.Module, media_width: int) -> dict[str, Any]:
        if is_encoder_decoder(llm.config):
            raise ValueError(
                f"fusion=gated_cross_attention needs a decoder-only language model, got {type(llm).__name__}: use "
                "fusion=concatenation"
            )
        config, width = llm.config.get_text_config(), hidden_width(llm)
        heads = getattr(config, "num_attention_heads", None)  # none in Mamba
        inner = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        own = {
            "blocks": block_list(llm)[1],
            "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "intermediate_size": next(filter(None, inner), 4 * width),
            "norm_eps": getattr(config, "rms_norm_eps", None) or 1e-6,
        }
        return {"width": width, "media_width": media_width, "llm": own}

    @classmethod
    def takes(cls, vision_width: int | tuple[int, ...], width: int) -> int:
        return vision_width if isinstance(vision_width, int) else width

    @property
    def before_blocks(self) -> dict[int, nn.Module]:
        return dict(zip(self.numbers, self.layers))

    def num_added(self, levels: int) -> int:
        if levels:
            raise ValueError(
                "fusion=gated_cross_attention does not add levels to the blocks of the language model: use another "
                "connector, or connector.levels=0"
            )
        return 0

    def forward(self, text: Tensor, tokens: VisualTokens, visual: Visual) -> Fused:
        counts = [placement.tokens for placement in visual.placements] or [len(tokens.tokens)]
        media, seen = pad_sequence(tokens.tokens.split(counts), batch_first=True), visual.seen
        order = torch.arange(seen.images.shape[1], device=text.device)
        first, last = seen.first.unsqueeze(-1), seen.last.unsqueeze(-1)
        shown = order == last if self.attend == "last" else (first <= order) & (order <= last)
        mask = shown.repeat_interleave(media.shape[1], -1)
        if len(set(counts)) > 1:
            real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            mask = mask & real.to(text.device)[seen.images].flatten(1).unsqueeze(1)
        sees = (seen.last >= 0).unsqueeze(-1)
        return Fused(text, media=Media(media.to(text.dtype), seen.images, sees, mask | ~sees))


CONCATENATION = "concatenation"
FACTS = ("width", "media_width", "llm")
FUSIONS: Registry[Fusion] = Registry(
    "fusion",
    Fusion,
    {CONCATENATION: Concatenation, "gated_cross_attention": GatedCrossAttention},
    "__init__",
    fixed=FACTS,
)
register = FUSIONS.register


def build_fusion(name: str, **arguments) -> Fusion:
    """Build the fusion `name` from its `Fusion.facts` and its options. Raises ValueError for unknown ones."""
    FUSIONS.check_options(name, [argument for argument in arguments if argument not in FACTS])
    fusion = FUSIONS[name](**arguments)
    fusion.config = {"name": name, **arguments}
    return fusion
