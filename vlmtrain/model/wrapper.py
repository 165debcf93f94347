"""`VLMWrapper`: vision encoder, connector, fusion and language model in one module."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Cache

from ..batch import Batch
from ..connectors import Connector, Features, PackedFeatures
from ..connectors.base import are_several
from ..visual import Visual
from .attention import attention_arguments, follow_rules
from .deep_levels import at_prefill, receive_levels
from .encoder_decoder import decoder_logits, generate_answers
from .folder import read_manifest, write_manifest
from .fusion import Concatenation, Fused, Fusion, VisualTokens
from .llm import hidden_width
from .logits import logits_at
from .media import Media, call_before_blocks
from .parts import PARTS, load_part, module_state, part_facts, save_part
from .rotary import rows_of_positions
from .vision import VisionEncoder


class VLMWrapper(nn.Module):
    """A vision encoder, a connector and a language model, decoder-only or encoder-decoder, joined by a fusion.

    Any part may be None if a training stage does not need it; without a fusion, visual tokens are concatenated with the
    text. ``model(batch)`` returns logits and ``model.generate(batch)`` continues prompts, for a `Batch` of
    `vlmtrain.data.Processor`.
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        connector: Connector | None,
        llm: nn.Module | None,
        fusion: Fusion | None = None,
    ):
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.fusion = Concatenation(hidden_width(llm)) if fusion is None and llm is not None else fusion
        self.llm = llm
        if vision is not None and connector is not None and connector.in_dim not in (vision.width, (vision.width,)):
            raise ValueError(
                f"the connector expects features of width {connector.in_dim}, got {vision.width} from the encoder"
            )
        if llm is not None and connector is not None:
            if connector.out_dim != self.fusion.media_width:
                whose = "the LLM has" if self.fusion.media_width == hidden_width(llm) else "the fusion takes"
                raise ValueError(
                    f"the connector makes tokens of width {connector.out_dim}, but {whose} width "
                    f"{self.fusion.media_width}"
                )
            receive_levels(llm, self.fusion.num_added(connector.num_added))
            call_before_blocks(llm, self.fusion.before_blocks, self.fusion.reading)

    def encode(self, visual: Visual, known: Sequence[Features | None] | None = None) -> Features | tuple[Features, ...]:
        """The encoder's features of the images of a batch. known: see `VisionEncoder.encode_all`."""
        given = {} if known is None else {"known": known}
        return self.vision.encode_all(visual.normalized().pixels, visual.calls, visual.chunks, **given)

    def connect(self, features: Features | tuple[Features, ...], visual: Visual) -> VisualTokens:
        """The visual tokens of the placements of a batch, from the encoder's features of its items."""
        options = {}
        packed = isinstance(features[0] if are_several(features) else features, PackedFeatures)
        if packed or self.connector.joins:
            options["calls"] = visual.calls
        if visual.texts is not None:
            options |= {"text_ids": visual.texts.ids, "text_mask": visual.texts.mask}
        if self.connector.joins:
            options |= {"placements": visual.placements, "frames": visual.frames}
        found = self.connector(features, **options)
        tokens, *levels = (
            each.reshape(-1, each.shape[-1])
            for each in ((found,) if isinstance(found, Tensor) else (found[0], *found[1]))
        )
        planned = sum(placement.tokens for placement in visual.placements)
        if visual.items and len(tokens) != planned:
            raise ValueError(
                f"{type(self.connector).__name__} returned {len(tokens)} tokens, but its num_tokens says {planned}"
            )
        return VisualTokens(tokens, tuple(levels))

    def embed(self, input_ids: Tensor, visual: Visual | None, features: Features | None = None) -> Fused:
        """Map token ids ``(B, T)`` and what is shown beside them to the language model's input.

        features: the encoder's features of the items, if they were computed elsewhere. Of several encoders, those with
        None are computed here.
        """
        text = self.llm.get_input_embeddings()(input_ids)
        if self.connector is None:
            assert visual is None or not visual.items, "images, but no connector"
            return Fused(text)
        if visual is None:
            raise ValueError("the batch has no visual: its processor was built for a model without an encoder")
        if features is None:
            features = self.encode(visual)
        elif are_several(features) and any(each is None for each in features):
            features = self.encode(visual, features)
        fused = self.fusion(text, self.connect(features, visual), visual)
        expected = self.fusion.num_added(self.connector.num_added)
        if len(fused.added) != expected:
            raise ValueError(f"{type(self.fusion).__name__} added {len(fused.added)} levels, expected {expected}")
        if (fused.media is None) == bool(self.fusion.before_blocks):
            raise ValueError(f"{type(self.fusion).__name__} must return media if it has layers that read them")
        return fused

    def forward(
        self,
        batch: Batch,
        features: Features | None = None,
        keep: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits of the next token, ``(B, T, V)``; with `keep`, only of some positions, ``(K, V)``.

        Of an encoder-decoder model, only the decoder's positions have logits: ``(B, Td, V)``.

        Rows are padded on the right: under causal attention no real position sees padding, so no mask is needed. A
        packed row requires a language model prepared by `attend_in_segments`. features: see `embed`. keep: positions
        ``(K,)`` in the flattened batch, as in `Targets`. cache: an empty one, which receives the keys and values of all
        positions.
        """
        if not isinstance(batch, Batch):
            raise TypeError(f"expected a Batch of vlmtrain.data.Processor, got {type(batch).__name__}")
        fused = self.embed(batch.input_ids, batch.visual, features)
        rules = batch.prefix, batch.branch, batch.bidirectional
        options = attention_arguments(batch.boundaries, *rules, segments=batch.segments)
        follow_rules(self.llm, options)
        if batch.decoder is not None:
            return decoder_logits(self.llm, fused.embeddings, batch.decoder, keep)
        if batch.boundaries is not None:
            options["position_ids"] = batch.positions if batch.positions.ndim == 2 else batch.text_positions
        options |= fused.visual_options(self.llm)
        if cache is not None:
            options["past_key_values"] = cache
        with (
            rows_of_positions(self.llm, batch.positions, batch.lengths),
            logits_at(self.llm, keep, batch.input_ids.shape) as kept,
            self._reading(fused.media),
        ):
            options |= {"use_cache": cache is not None, "logits_to_keep": kept}
            return self.llm(inputs_embeds=fused.embeddings, **options).logits

    def _reading(self, media: Media | None, **options) -> AbstractContextManager:
        """Context in which the language model runs with the media of a batch, see `Reading.of`."""
        return nullcontext() if media is None else self.fusion.reading.of(media, **options)

    @torch.no_grad()
    def generate(self, batch: Batch, features: Features | None = None, **options) -> Tensor:
        """Continue the prompts of a batch.

        features: see `embed`. options are passed to Hugging Face's ``generate`` (``max_new_tokens``, ``do_sample``,
        ``eos_token_id``, ``streamer``, ...). Returns the new token ids ``(B, new)``.
        """
        fused = self.embed(batch.input_ids, batch.visual, features)
        if batch.decoder is not None:
            return generate_answers(self.llm, fused.embeddings, batch.decoder, **options)
        width, lengths = batch.input_ids.shape[1], batch.lengths
        columns = torch.arange(width, device=lengths.device)[None]
        # generation requires padding on the left: roll each row's end to the right edge
        shift = (columns - (width - lengths)[:, None]) % width
        embeddings = fused.embeddings.gather(1, shift.unsqueeze(-1).expand_as(fused.embeddings))
        mask = columns >= (width - lengths)[:, None]
        given = {"prefix": batch.prefix, "branch": batch.branch, "bidirectional": batch.bidirectional}
        given |= fused.visual_options(self.llm)
        for name, tensor in given.items():
            if isinstance(tensor, Tensor) and tensor.ndim == 2:
                given[name] = tensor.to(shift.device).gather(1, shift)
        follow_rules(self.llm, [name for name, tensor in given.items() if tensor is not None])
        positions = batch.positions
        if positions is not None:
            positions = positions.gather(-1, shift.expand_as(positions))
        rows = rows_of_positions(self.llm, positions, lengths)
        reading = self._reading(fused.media and fused.media.at(shift), continues=True)
        with rows, reading, at_prefill(self.llm, len(embeddings), **given):
            return self.llm.generate(inputs_embeds=embeddings, attention_mask=mask.long(), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save all parts and a manifest in `folder`; `from_pretrained` loads them."""
        folder = Path(folder)
        manifest = {}
        for name in PARTS:
            module = getattr(self, name)
            if module is not None and type(module) is not Concatenation:
                state = module_state(module)
                save_part(name, module, folder / name, state)
                manifest[name] = part_facts(state)
        write_manifest(folder, manifest)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> VLMWrapper:
        """Load a model folder. Raises ValueError with the file or tensor that is missing or does not fit."""
        folder = Path(folder)
        saved = read_manifest(folder)
        return cls(**{name: load_part(name, folder, dtype) if name in saved else None for name in PARTS}).eval()
