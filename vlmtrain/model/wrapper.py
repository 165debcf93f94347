"""`VLMWrapper`: vision encoder, connector and language model as one model."""

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

    Any part may be None where a training stage does without it. `forward` gives logits, `generate`
    continues prompts; both take what `vlmtrain.data.Processor` makes.
    """

    def __init__(self, vision: VisionEncoder | None, connector: nn.Module | None, llm: nn.Module | None):
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.llm = llm
        if vision is not None and connector is not None and connector.in_dim not in (vision.width, (vision.width,)):
            raise ValueError(f"the connector takes features {connector.in_dim} wide, the encoder gives {vision.width}")
        if llm is not None and connector is not None and connector.out_dim != hidden_width(llm):
            raise ValueError(
                f"the connector makes tokens {connector.out_dim} wide, the LLM is {hidden_width(llm)} wide"
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
        """Token ids ``(B, T)`` and pictures ``(N, 3, H, W)`` to the language model's input ``(B, T, D)``.

        features: what the encoder made of `images`, if that was done elsewhere. tiles: how each picture is cut, where
        `images` are views. text_ids, text_mask: ``(N, L)``, what a connector that reads text reads with each of them.
        """
        text = self.llm.get_input_embeddings()(input_ids)
        if self.connector is None:
            assert is_image is None, "pictures, but no connector"
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
        """Logits of the next token, ``(B, T, V)``; with `keep` ``(B, T)`` bool, of those positions only, ``(K, V)``.

        Rows are padded on the right, if at all: under causal attention no real position sees padding,
        so no mask is needed. A packed row comes with its `positions` ``(1, T)`` and `boundaries` ``(S + 1,)``, for a
        language model that `attend_in_segments` has prepared.
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
        """Continue prompts. Takes rows padded on the right, with their `lengths` ``(B,)``.

        options go to Hugging Face's ``generate`` (``max_new_tokens``, ``do_sample``, ``eos_token_id``,
        ``streamer``, ...). Returns the new token ids ``(B, new)``.
        """
        embeddings = self.embed(input_ids, images, is_image, None, tiles, text_ids, text_mask)
        rows, width = input_ids.shape
        if lengths is None:
            lengths = torch.full((rows,), width, device=input_ids.device)
        # generation wants the padding on the left: roll each row's end to the right edge
        shift = (torch.arange(width, device=lengths.device)[None] - (width - lengths)[:, None]) % width
        embeddings = embeddings.gather(1, shift.unsqueeze(-1).expand_as(embeddings))
        mask = torch.arange(width, device=lengths.device)[None] >= (width - lengths)[:, None]
        return self.llm.generate(inputs_embeds=embeddings, attention_mask=mask.long(), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all parts and a manifest into `folder`; `from_pretrained` reads it back."""
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
        """Load a model folder. Raises ValueError naming the file or tensor that is missing or does not fit."""
        folder = Path(folder)
        saved = read_manifest(folder)
        return cls(*(load_part(name, folder, dtype) if name in saved else None for name in PARTS)).eval()
