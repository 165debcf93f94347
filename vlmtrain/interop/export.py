"""Export of a model folder to a Hugging Face folder, after checking that both give the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from ..batch import Batch
from ..connectors.qformer import QFormer
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, ImageSource, Turn, VideoSource
from ..data.video import FrameSequence
from ..files import check_new_folder, new_folder
from ..model import VLMWrapper
from ..model.encoder_decoder import is_encoder_decoder
from ..model.experts import experts_of
from ..model.fusion import Concatenation
from ..model.rotary import positions_of
from ..model.vision import PatchVision
from ..model.vision.native import NativeVision
from ..reporting.card import write_export_card
from ..visual import CAUSAL
from .blip import as_blip
from .fitting import DoesNotFit, relative_difference, tolerance
from .fuyu import as_fuyu, compare_fuyu
from .idefics import as_idefics, compare_idefics
from .llava import Exported, as_llava, shows_videos
from .molmo2 import as_molmo2, compare_molmo2
from .native import as_native
from .native_parity import compare_native
from .paligemma import as_paligemma, compare_paligemma
from .probes import noise

FORMATS = ("hf", "llava", "blip2", "native", "molmo2", "fuyu", "paligemma", "idefics", "vlmtrain")
_ONLY = {"images": "Molmo2", "prefix": "PaliGemma"}  # models with an attention among the tokens of the prompt


class Export(NamedTuple):
    """Result of an export: the class, the difference of its logits from the source's, and known deviations."""

    folder: str
    model_class: str
    largest_relative_difference: float
    remarks: tuple[str, ...]


def export(source: Path, out: Path, form: str = "hf") -> Export:
    """Export the model folder `source` to `out`.

    form: ``llava`` is the class of LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, ``blip2`` that of BLIP-2 or InstructBLIP,
    ``native`` that of Qwen2-VL, Qwen2.5-VL, Qwen3-VL or HunyuanOCR, ``molmo2`` that of Molmo2, ``fuyu`` that of Fuyu,
    ``paligemma`` that of PaliGemma, and ``idefics`` that of IDEFICS, which transformers loads without vlmtrain;
    ``vlmtrain`` is a class that ``import vlmtrain`` registers; ``hf`` is the first of them that fits. Raises ValueError
    with the reason if the form does not fit.
    """
    if form not in FORMATS:
        raise ValueError(f"--format {form}: expected one of {', '.join(FORMATS)}")
    check_new_folder(out, "OUT_DIR")
    model, processor = VLMWrapper.from_pretrained(source), Processor.from_pretrained(source)
    exported, difference = _chosen(model, processor, form)
    transformers.utils.logging.disable_progress_bar()
    done = Export(str(out), type(exported.model).__name__, difference, exported.remarks)
    with new_folder(out) as partial:
        exported.model.save_pretrained(partial)
        exported.processor.save_pretrained(partial)
        write_export_card(source, partial, *done[1:])
    return done


def _chosen(model: VLMWrapper, processor: Processor, form: str) -> tuple[Exported, float]:
    """The first class allowed by `form` that gives the same logits, and the difference of the logits."""
    for part in ("vision", "connector", "llm"):
        if getattr(model, part) is None:
            raise DoesNotFit(f"the model has no {part}: export a stage that has all three parts")
    if processor.geometry is None:
        raise DoesNotFit("the model's processor does not accept images: export a stage that does")
    kind = form if form != "hf" else _kind(model, processor)
    if processor.attention != CAUSAL and kind not in ("molmo2", "paligemma"):
        raise DoesNotFit(f"fusion.attention={processor.attention}: exported models are causal")
    if form == "vlmtrain" and is_encoder_decoder(model.llm.config):
        raise DoesNotFit(f"{type(model.llm).__name__}: use --format blip2, whose classes have an encoder-decoder model")
    remarks: tuple[str, ...] = ()
    if form != "vlmtrain":
        try:
            if type(model.fusion) is not Concatenation and kind != "idefics":
                raise DoesNotFit(
                    f"fusion={model.fusion.config['name']}: only the class of IDEFICS does not concatenate"
                )
            if experts := experts_of(model.llm):
                raise DoesNotFit(f"llm.visual_experts=[{', '.join(experts)}]: transformers' classes have none")
            if kind != "native" and (positions := positions_of(model.llm)) is not None:
                raise DoesNotFit(f"llm.positions={positions}: the classes of LLaVA and BLIP-2 have ordinary positions")
            if kind != "fuyu" and processor.geometry.newline:
                raise DoesNotFit(f"llm.image_newline={processor.geometry.newline}: only Fuyu's class has such a token")
            if kind != "blip2" and is_encoder_decoder(model.llm.config):
                raise DoesNotFit(f"{type(model.llm).__name__}: only BLIP-2's classes have an encoder-decoder model")
            convert, compare = _CLASSES[kind]
            exported = convert(model, processor)
            return exported, compare(exported, model, processor)
        except DoesNotFit as error:
            in_text = model.fusion.in_text and not is_encoder_decoder(model.llm.config)
            if processor.attention != CAUSAL:
                only = f"fusion.attention={processor.attention} can be exported only as {_ONLY[processor.attention]}"
                raise DoesNotFit(f"{only}: {error}") from error
            if not in_text:
                raise
            if form != "hf":
                raise DoesNotFit(f"{error}; --format vlmtrain supports all models") from error
            remarks = (f"loads only after 'import vlmtrain': {error}",)
    from .own import as_own

    exported = as_own(model, processor)._replace(remarks=remarks)
    return exported, compare_logits(exported, model, processor)


def _kind(model: VLMWrapper, processor: Processor) -> str:
    """The format (see `FORMATS`) of transformers' own classes that suits the model's parts best."""
    if not model.fusion.in_text:
        return "idefics"
    if processor.attention == "images" and processor.geometry.tile_style == "molmo2":
        return "molmo2"
    if processor.attention == "prefix":
        return "paligemma"
    if isinstance(model.vision, NativeVision):
        return "native"
    if isinstance(model.vision, PatchVision):
        return "fuyu"
    return "blip2" if isinstance(model.connector, QFormer) else "llava"


@torch.no_grad()
def compare_logits(exported: Exported, model: VLMWrapper, processor: Processor) -> float:
    """The largest difference of the logits for questions about an image, and about images and a video if supported.

    Raises DoesNotFit if it is more than rounding.
    """
    dtype, worst = next(exported.model.parameters()).dtype, 0.0
    height, width = processor.geometry.size
    image = noise((height, width + width // 2))
    probes: list[tuple[ImageSource | VideoSource, ...]] = [(image,)]
    if exported.model.config.model_type == "llava_onevision" and shows_videos(processor.geometry):
        probes.append((image, FrameSequence((noise((height, width)),) * 2, 1.0), image))
    for media in probes:
        question = Turn("user", f"{IMAGE_MARK}\n" * len(media) + "What is this?")
        batch = processor.collate([processor.prompt(Conversation("probe", (question,), media))])
        batch = batch.to(torch.device("cpu"), dtype)
        expected = model(batch)
        found = _hf_logits(exported, batch)[..., : expected.shape[-1]]
        difference = relative_difference(found, expected)
        if not difference <= tolerance(dtype):
            raise DoesNotFit(
                f"{type(exported.model).__name__} gives different logits from {type(model.llm).__name__} with the same "
                f"weights (by {difference:.1g} relative to the largest): only one of them scales or caps them"
            )
        worst = max(worst, difference)
    return worst


def _hf_logits(exported: Exported, batch: Batch) -> torch.Tensor:
    """Logits ``(B, T, V)``, or of the decoder, of a Hugging Face model for one of our batches with images."""
    visual, pixels, config = batch.visual, batch.visual.pixels[0], exported.model.config
    cuts = [placement.tiles for placement in visual.placements if placement.tiles]
    options: dict = {"pixel_values": pixels}
    ids = batch.input_ids.masked_fill(visual.mask, config.image_token_id)
    if config.model_type == "vlmtrain":
        if cuts:
            options["image_cuts"] = torch.tensor(cuts)
        if not isinstance(pixels, Tensor):  # one image of its own size
            options |= {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor([pixels[0].shape[1:]])}
        more = [images if isinstance(images, Tensor) else torch.stack(images) for images in visual.pixels[1:]]
        options |= {"more_pixel_values": more} if more else {}
        if visual.texts is not None:
            options |= {"text_ids": visual.texts.ids, "text_mask": visual.texts.mask}
    elif visual.texts is not None:
        options |= {"qformer_input_ids": visual.texts.ids, "qformer_attention_mask": visual.texts.mask.long()}
    elif cuts:
        shown = list(zip(visual.placements, pixels.split([len(each.items) for each in visual.placements])))
        images, videos = (
            [views for place, views in shown if (place.frames is not None) == moves] for moves in (False, True)
        )
        options["pixel_values"] = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
        options["image_sizes"] = torch.tensor([(tiles.height, tiles.width) for tiles in cuts])
        if config.model_type == "llava_onevision":
            options["batch_num_images"] = [len(images)]
        if videos:
            options["pixel_values_videos"] = torch.stack(videos)
            moving = torch.tensor([*(place.frames is not None for place in visual.placements), False])
            ids = ids.masked_fill(moving[visual.index], config.video_token_id)  # the last one is for text, index -1
    if batch.decoder is not None:  # of a single prompt
        ids, decoded = ids.split([batch.decoder.encoder_width, batch.decoder.width], 1)
        options["decoder_input_ids"] = decoded
    return exported.model(input_ids=ids, use_cache=False, **options).logits


_CLASSES = {
    "llava": (as_llava, compare_logits),
    "blip2": (as_blip, compare_logits),
    "native": (as_native, compare_native),
    "molmo2": (as_molmo2, compare_molmo2),
    "fuyu": (as_fuyu, compare_fuyu),
    "paligemma": (as_paligemma, compare_paligemma),
    "idefics": (as_idefics, compare_idefics),
}
"""For each format of transformers' own classes, the conversion and the comparison of its result."""
