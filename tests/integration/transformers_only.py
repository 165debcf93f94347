"""Run exported folders with transformers alone. Arguments: a file of jobs, and a path for the output.

A job is {"folder", "backend", "questions": [[{"role", "content"}, ...], ...], "pictures": [[file, ...], ...]}; for each
question, the output has the prompt's ids, the logits and the greedy answer, alone and in one batch with the others. A
third argument allows vlmtrain to be imported, and imports it.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from pathlib import Path

ALONE = len(sys.argv) < 4
if ALONE:
    sys.modules["vlmtrain"] = None  # from here on, importing it is an error
else:
    import vlmtrain  # noqa: F401

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, FuyuProcessor, IdeficsProcessor

transformers.logging.set_verbosity_error()
NEW = 12


def prompt(processor, question: list) -> str:
    """BLIP-2's processors have no template; published ones get only the text."""
    speaker = processor if processor.chat_template else processor.tokenizer
    if speaker.chat_template is None:
        return "".join(item.get("text", "") for item in question[-1]["content"])
    return speaker.apply_chat_template(question, add_generation_prompt=True, tokenize=False)


def pieces(question: list, images: list) -> list:
    """Texts and images in turn, as IDEFICS's processor takes a conversation."""
    found, shown = [""], iter(images)
    for number, turn in enumerate(question):
        start = "User: " if turn["role"] == "user" else "Assistant: "
        items = [{"text": ("\n" if number else "") + start}, *turn["content"], {"text": "<end_of_utterance>"}]
        for item in items:
            if item.get("type") == "image":
                found += [next(shown), ""]
            else:
                found[-1] += item["text"]
    found[-1] += "\nAssistant:"
    return [each for each in found if each]


def inputs(processor, questions: list, pictures: list):
    images = [[Image.open(file) for file in files] for files in pictures]
    if isinstance(processor, IdeficsProcessor):
        return processor(text=[pieces(*each) for each in zip(questions, images)])
    text = [prompt(processor, question) for question in questions]
    seen = {"images": images} if any(images) else {}
    if isinstance(processor, FuyuProcessor):
        seen["return_legacy_image_output"] = False
    return processor(text=text, **seen, padding=True, return_tensors="pt")


@torch.no_grad()
def answer(model, processor, questions: list, pictures: list) -> list[dict]:
    batch = inputs(processor, questions, pictures)
    more, prompts = {}, batch["input_ids"].shape[1]
    decodes = not getattr(model.config, "use_decoder_only_language_model", True)
    if decodes:  # logits after the decoder's start token, which generation returns as well
        start = model.config.text_config.decoder_start_token_id
        more["decoder_input_ids"], prompts = torch.full((len(batch["input_ids"]), 1), start), 1
    elif "mm_token_type_ids" not in batch:  # models that do not make rows of positions themselves
        more["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # counted as in generation
    logits = model(**batch, **more).logits
    ids = model.generate(**batch, max_new_tokens=NEW)[:, prompts:]
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), logits, ids)
    return [
        {
            "ids": row[mask].tolist(),
            "logits": one if decodes else one[mask],
            "answer": processor.decode(new, skip_special_tokens=True),
            "pixels": batch["pixel_values"][0] if "image_attention_mask" in batch else batch.get("pixel_values"),
        }
        for row, mask, one, new in rows
    ]


def main() -> None:
    found = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_pretrained(job["folder"]).eval()
        backend = {"backend": job["backend"]} if job["backend"] else {}
        processor = AutoProcessor.from_pretrained(job["folder"], **backend)
        if job.get("images_backend"):  # there is no video processor for Pillow, which `backend` would look for
            pillow = {"backend": job["images_backend"]}
            processor.image_processor = AutoImageProcessor.from_pretrained(job["folder"], **pillow)
        questions, pictures = job["questions"], job["pictures"]
        alone = [answer(model, processor, [q], [p])[0] for q, p in zip(questions, pictures)]
        found.append(
            {
                "class": type(model).__name__,
                "module": type(model).__module__.split(".")[0],
                "alone": alone,
                "batch": answer(model, processor, questions, pictures) if job.get("together", True) else alone,
            }
        )
    torch.save(found, sys.argv[2])


main()
