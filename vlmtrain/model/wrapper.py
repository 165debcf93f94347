"""`VLMWrapper`: vision encoder, connector and language model in one module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..connectors import VisionFeatures
from ..tiling import Tiles
from .attention import segment_arguments
from .concatenation import concatenate
from .folder import read_manifest, write_manifest
from .llm import hidden_width
from .parts import PARTS, load_part, module_state, part_facts, save_part
from .vision import VisionEncoder


class VLMWrapper(nn.Module):
    """A vision encoder, a connector and a causal language model, joined by token concatenation.

    Any part may be None if a training stage does not need it. `forward` returns logits and `generate` continues
    prompts; both take the tensors of a `Batch` from `vlmtrain.data.Processor`.
    """

    def __init__(self, vision: VisionEncoder | None, connector: nn.Module | None, llm: nn.Module | None):
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.llm = llm
        if vision is not None and connector is not None and connector.in_dim not in (vision.width, (vision.width,)):
            raise ValueError(
                f"the connector expects features of width {connector.in_dim}, got {vision.width} from the encoder"
            )
        if llm is not None and connector is not None and connector.out_dim != hidden_width(llm):
            raise ValueError(
                f"the connector makes tokens of width {connector.out_dim}, but the LLM has width {hidden_width(llm)}"
            )

    def embed(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        is_image: Tensor | None,
        features: VisionFeatures | None = None,
        tiles: Sequence[Tiles] | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Map token ids ``(B, T)`` and images ``(N, 3, H, W)`` to the language model's input ``(B, T, D)``.

        features: the encoder's features of `images`, if they were computed elsewhere. tiles: how each image is cut, if
        `images` are views. text_ids, text_mask: ``(N, L)``, the text for each of `images` if the connector reads text.
        """
        text = self.llm.get_input_embeddings()(input_ids)
        if self.connector is None:
            assert is_image is None, "images, but no connector"
            return text
        if features is None:
            features = self.vision(images)
        options = {} if tiles is None else {"tiles": tiles}
        if text_ids is not None:
            options |= {"text_ids": text_ids, "text_mask": text_mask}
        visual = self.connector(features, **options)
        return concatenate(text, visual, is_image)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        is_image: Tensor | None,
        features: VisionFeatures | None = None,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
        boundaries: Tensor | None = None,
        tiles: Sequence[Tiles] | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, ``(B, T, V)``; with `keep` ``(B, T)`` bool, only of those positions, ``(K, V)``.

        Rows are padded on the right: under causal attention no real position sees padding, so no mask is needed.
        A packed row requires its `positions` ``(1, T)`` and `boundaries` ``(S + 1,)``, and a language model prepared
        by `attend_in_segments`.
        """
        embeddings = self.embed(input_ids, images, is_image, features, tiles, text_ids, text_mask)
        options = {} if boundaries is None else {"position_ids": positions, **segment_arguments(boundaries)}
        kept = 0 if keep is None else keep
        return self.llm(inputs_embeds=embeddings, use_cache=False, logits_to_keep=kept, **options).logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        is_image: Tensor | None,
        lengths: Tensor | None = None,
        tiles: Sequence[Tiles] | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        **options,
    ) -> Tensor:
        """Continue prompts. Rows are padded on the right, with their `lengths` ``(B,)``.

        options are passed to Hugging Face's ``generate`` (``max_new_tokens``, ``do_sample``, ``eos_token_id``,
        ``streamer``, ...). Returns the new token ids ``(B, new)``.
        """
        embeddings = self.embed(input_ids, images, is_image, None, tiles, text_ids, text_mask)
        rows, width = input_ids.shape
        if lengths is None:
            lengths = torch.full((rows,), width, device=input_ids.device)
        # generation requires padding on the left: roll each row's end to the right edge
        shift = (torch.arange(width, device=lengths.device)[None] - (width - lengths)[:, None]) % width
        embeddings = embeddings.gather(1, shift.unsqueeze(-1).expand_as(embeddings))
        mask = torch.arange(width, device=lengths.device)[None] >= (width - lengths)[:, None]
        return self.llm.generate(inputs_embeds=embeddings, attention_mask=mask.long(), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save all parts and a manifest in `folder`; `from_pretrained` loads them."""
        folder = Path(folder)
        manifest = {}
        for name in PARTS:
            module = getattr(self, name)
            if module is not None:
                state = module_state(module)
                save_part(name, module, folder / name, state)
                manifest[name] = part_facts(state)
        write_manifest(folder, manifest)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> VLMWrapper:
        """Load a model folder. Raises ValueError with the file or tensor that is missing or does not fit."""
        folder = Path(folder)
        saved = read_manifest(folder)
        return cls(*(load_part(name, folder, dtype) if name in saved else None for name in PARTS)).eval()
