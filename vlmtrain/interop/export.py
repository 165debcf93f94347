"""Export of a model folder to a Hugging Face folder, after checking that both give the same logits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image

from ..connectors.qformer import QFormer
from ..data.processor import Batch, Processor
from ..data.records import IMAGE_MARK, Conversation, Turn
from ..files import check_new_folder
from ..model import VLMWrapper
from ..reporting.card import write_export_card
from .blip import as_blip
from .fitting import DoesNotFit, relative_difference, tolerance
from .llava import Exported, as_llava

FORMATS = ("hf", "llava", "blip2", "vlmtrain")


class Export(NamedTuple):
    """Result of an export: the class, the difference of its logits from the source's, and known deviations."""

    folder: str
    model_class: str
    largest_relative_difference: float
    remarks: tuple[str, ...]


def export(source: Path, out: Path, form: str = "hf") -> Export:
    """Export the model folder `source` to `out`.

    form: ``llava`` is the class of LLaVA-1.5 or LLaVA-NeXT and ``blip2`` that of BLIP-2 or InstructBLIP, which
    transformers loads without vlmtrain; ``vlmtrain`` is a class that ``import vlmtrain`` registers; ``hf`` is the first
    of them that fits. Raises ValueError with the reason if the form does not fit.
    """
    if form not in FORMATS:
        raise ValueError(f"--format {form}: expected one of {', '.join(FORMATS)}")
    check_new_folder(out, "OUT_DIR")
    model, processor = VLMWrapper.from_pretrained(source), Processor.from_pretrained(source)
    exported, difference = _chosen(model, processor, form)
    transformers.utils.logging.disable_progress_bar()
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    exported.model.save_pretrained(partial)
    exported.processor.save_pretrained(partial)
    write_export_card(source, partial, type(exported.model).__name__, difference, exported.remarks)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    return Export(str(out), type(exported.model).__name__, difference, exported.remarks)


def _chosen(model: VLMWrapper, processor: Processor, form: str) -> tuple[Exported, float]:
    """The first class allowed by `form` that gives the same logits, and the difference of the logits."""
    remarks: tuple[str, ...] = ()
    if form != "vlmtrain":
        try:
            takes_queries = form == "blip2" or (form == "hf" and isinstance(model.connector, QFormer))
            exported = (as_blip if takes_queries else as_llava)(model, processor)
            return exported, _checked(model, processor, exported)
        except DoesNotFit as error:
            if form != "hf":
                raise
            remarks = (f"loads only after 'import vlmtrain': {error}",)
    from .own import as_own

    exported = as_own(model, processor)
    return exported._replace(remarks=(*remarks, *exported.remarks)), _checked(model, processor, exported)


@torch.no_grad()
def _checked(model: VLMWrapper, processor: Processor, exported: Exported) -> float:
    """Difference of the logits for a question about an image. Raises DoesNotFit if it is more than rounding."""
    batch = probe(processor)
    text = {"text_ids": batch.text_ids, "text_mask": batch.text_mask}
    expected = model(batch.input_ids, batch.images, batch.is_image, tiles=batch.tiles, **text)
    found = hf_logits(exported, batch)[..., : expected.shape[-1]]
    difference = relative_difference(found, expected)
    if not difference <= tolerance(expected.dtype):
        raise DoesNotFit(
            f"{type(exported.model).__name__} gives different logits from {type(model.llm).__name__} (by "
            f"{difference:.1g} relative to the largest): it does not scale or cap them as that class does "
            "(--format vlmtrain supports all models)"
        )
    return difference


def probe(processor: Processor) -> Batch:
    """A question about a noise image whose aspect ratio differs from the encoder's."""
    height, width = processor.geometry.size
    pixels = torch.randint(0, 256, (height, width + width // 2, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(pixels.to(torch.uint8).numpy())
    question = Turn("user", f"{IMAGE_MARK}\nWhat is this?")
    return processor.collate([processor.prompt(Conversation("probe", (question,), (_Shown(picture),)))])


class _Shown(NamedTuple):
    """An image that is already in memory."""

    picture: Image.Image

    def load(self) -> Image.Image:
        return self.picture

    def size(self) -> tuple[int, int]:
        return self.picture.height, self.picture.width


def hf_logits(exported: Exported, batch: Batch) -> torch.Tensor:
    """Logits ``(B, T, V)`` of a Hugging Face model for one of our batches with images."""
    options = {"pixel_values": batch.images}
    if exported.model.config.model_type == "vlmtrain":
        if batch.tiles is not None:
            options["image_cuts"] = torch.tensor(batch.tiles)
        if batch.text_ids is not None:
            options |= {"text_ids": batch.text_ids, "text_mask": batch.text_mask}
    elif batch.text_ids is not None:
        options |= {"qformer_input_ids": batch.text_ids, "qformer_attention_mask": batch.text_mask.long()}
    elif batch.tiles is not None:
        views = batch.images.split([tiles.views for tiles in batch.tiles])
        options["pixel_values"] = torch.nn.utils.rnn.pad_sequence(list(views), batch_first=True)
        options["image_sizes"] = torch.tensor([(tiles.height, tiles.width) for tiles in batch.tiles])
    ids = batch.input_ids.masked_fill(batch.is_image, exported.model.config.image_token_id)
    return exported.model(input_ids=ids, use_cache=False, **options).logits
