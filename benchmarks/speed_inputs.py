"""The inputs of `training_speed.py`: parts, their exports for the Trainer, images and conversations."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shapes(NamedTuple):
    """Hugging Face configurations of an encoder and a language model, each with its model_type."""

    vision: dict
    llm: dict


SMALL = Shapes(
    {
        **{"model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072},
        **{"num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
    },
    {
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
)


@dataclass
class Case:
    """One workload in one precision: the folder of its inputs, and the measurements of each side, one entry per run.

    shapes: architectures of new parts. weights: folder of the models, which cases of the same parts can share; None for
    `folder`. stored: precision of the weight files, and of the Trainer's frozen parts. records: number of samples,
    None for all different. more: settings of our side that the initial model does not depend on. lora: peft's options
    for adapters of the language model, None to train it itself. workers: processes that load data.
    """

    workload: str
    precision: str
    folder: Path
    options: argparse.Namespace
    shapes: Shapes = field(default_factory=lambda: SMALL)
    weights: Path | None = None
    stored: str = "fp32"
    records: int | None = None
    more: list[str] = field(default_factory=list)
    lora: dict | None = None
    workers: int = 1
    sides: dict[str, list[dict]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    line: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return "align" if self.workload == "align" else "instruct"


def prepare(case: Case) -> None:
    """Create the inputs of both sides: a model folder, its export, images and conversations, and our command."""
    options, folder = case.options, case.folder
    needed = case.records or options.batch_size * options.steps
    side = 48 if case.workload == "quickstart" else options.image_size
    records = list(real_records(options, case.stage, needed)) if options.data and side > 48 else None
    if records is None:
        records = list(made_records(case.workload, needed, folder / "source", side))
    (folder / "images").mkdir()
    for record in records:
        for name in images_of(record):
            target = folder / "images" / name.replace("/", "_")
            image = Image.open(record.pop("folder", None) or folder / "source" / name).convert("RGB")
            image.resize((side, side), Image.Resampling.BICUBIC).save(target.with_suffix(".png"))
            record["image"] = target.with_suffix(".png").name
    (folder / "data.json").write_text(json.dumps(records))
    case.line = [
        "recipe=llava_1_5",
        f"stage={case.stage}",
        f"stages.{case.stage}.fresh=[]",
        f"stages.{case.stage}.batch_size={options.batch_size}",
        f"stages.{case.stage}.micro_batch_size={options.batch_size}",
        f"stages.{case.stage}.max_steps={options.steps}",
        f"stages.{case.stage}.gradient_checkpointing=false",
        f"stages.{case.stage}.max_grad_norm=1.0",
        f"stages.{case.stage}.image_fit=squash",
        f"stages.{case.stage}.max_length={512 if case.workload == 'quickstart' else 2048}",
        f"stages.{case.stage}.train.connector=1e-4",
        "data=llava_json",
        f"data.images={folder / 'images'}",
        f"data.{case.stage}={folder / 'data.json'}",
        "data.validation=null",
        "engine=zero0",
        f"precision={case.precision}",
    ]
    case.weights = case.weights or folder
    case.line += ["mini=true"] if case.workload == "quickstart" else parts_line(case)
    build_model(case)
    case.line += [f"init_from={case.weights / 'model'}", *case.more, *options.set]


def parts_line(case: Case) -> list[str]:
    """The two large parts: the given folders, or new ones with random weights."""
    vision, llm = case.options.vision or case.weights / "vision", case.options.llm or case.weights / "llm"
    torch.manual_seed(0)
    if not Path(vision).exists():
        save_vision(case.shapes.vision, vision, case.options.image_size, case.stored)
    if not Path(llm).exists():
        save_llm(case.shapes.llm, llm, case.stored)
    size = f"vision.image_size={case.options.image_size}"
    return ["vision=hf", f"vision.path={vision}", size, "vision.layer=-2", "llm=hf", f"llm.path={llm}"]


def save_vision(shape: dict, folder: Path, image_size: int, stored: str) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**shape)
    config.image_size = image_size
    _save(AutoModel, config, folder, stored)
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": image_size, "width": image_size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(look))


def save_llm(shape: dict, folder: Path, stored: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from vlmtrain.data.shapes import VOCABULARY
    from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer

    tokenizer = build_tiny_tokenizer(VOCABULARY)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    _save(AutoModelForCausalLM, AutoConfig.for_model(**shape, **ids), folder, stored)
    tokenizer.save_pretrained(folder)


def _save(auto_class: type, config, folder: Path, stored: str) -> None:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # initial values of billions of weights
        auto_class.from_config(config, dtype=torch.float32).to(DTYPES[stored]).save_pretrained(folder)


def real_records(options: argparse.Namespace, stage: str, needed: int) -> Iterator[dict]:
    folder = Path(options.data)
    records = [r for r in json.loads((folder / f"{stage}.json").read_text()) if isinstance(r.get("image", ""), str)]
    rng = random.Random(0)
    for record in rng.sample(records, needed) if stage == "align" else talks(rng, records, needed):
        yield {**record, "folder": str(folder / "images" / record["image"])} if "image" in record else record


def talks(rng: random.Random, records: list[dict], needed: int) -> Iterator[dict]:
    """Conversations with the lengths of the mixture, made from the words and images of `records`."""
    words = [word for record in records for turn in record["conversations"] for word in turn["value"].split()]
    words = [word for word in words if "<" not in word]
    for number in range(needed):
        shown = rng.choice([record for record in records if "image" in record])
        turns = []
        for _ in range(min(6, 1 + int(rng.expovariate(1 / 1.2)))):
            length = rng.randint(1, 5) if rng.random() < 0.5 else min(200, int(rng.lognormvariate(3.7, 0.6)))
            asked = " ".join(rng.choices(words, k=rng.randint(6, 14)))
            turns += [
                {"from": "human", "value": asked},
                {"from": "gpt", "value": " ".join(rng.choices(words, k=max(1, length)))},
            ]
        record = {"id": number, "conversations": turns}
        if rng.random() >= 0.06:
            record["image"] = shown["image"]
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        yield record


def made_records(workload: str, needed: int, folder: Path, side: int) -> Iterator[dict]:
    """Procedural images with captions, or conversations made from the words of the captions."""
    from vlmtrain.data.shapes import Shapes

    folder.mkdir()
    source = Shapes("caption", needed, side)
    captions = []
    for number in range(needed):
        conversation = source[number]
        conversation.images[0].load().save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": conversation.turns[-1].text},
        ]
        captions.append({"id": number, "image": f"{number}.png", "conversations": turns})
    yield from captions if workload != "instruct" else talks(random.Random(0), captions, needed)


def images_of(record: dict) -> list[str]:
    return [record["image"]] if "image" in record else []


def build_model(case: Case) -> None:
    """Save the initial model of both sides, in our format and Hugging Face's, and the conversations as token ids."""
    from vlmtrain.data.sources import build_source
    from vlmtrain.interop.llava import as_llava
    from vlmtrain.model import VLMWrapper
    from vlmtrain.objectives import LanguageModelling
    from vlmtrain.settings import compose
    from vlmtrain.training.assembly import build_parts, build_skeleton, build_tokenizer
    from vlmtrain.training.processing import build_processor, image_size_of

    name, folder = case.stage, case.folder
    fresh = "[vision,connector,llm]" if case.workload == "quickstart" else "[connector]"
    settings = compose([*case.line, f"stages.{name}.fresh={fresh}", f"precision={case.stored}"])
    stage, tokenizer = settings.stages[name], build_tokenizer(settings)
    is_built = (case.weights / "export").exists()
    parts = build_skeleton(settings, stage, tokenizer) if is_built else build_parts(settings, stage, None, tokenizer)
    processor = build_processor(settings, stage, parts, LanguageModelling(), tokenizer)
    if not is_built:
        model = VLMWrapper(parts["vision"], parts["connector"], parts["llm"]).eval()
        model.save_pretrained(case.weights / "model")
        processor.save_pretrained(case.weights / "model")
        exported = as_llava(model, processor)
        exported.model.save_pretrained(case.weights / "export")
        exported.processor.save_pretrained(case.weights / "export")
    image_id = json.loads((case.weights / "export" / "config.json").read_text())["image_token_index"]
    source = build_source(settings.data.split(name), image_size_of(parts), settings.seed)
    records = json.loads((folder / "data.json").read_text())
    with (folder / "samples.jsonl").open("w") as file:
        for position in range(len(source)):
            index = source.draw(position)
            tokens = processor.render(source[index])
            ids = tokens.input_ids.masked_fill(tokens.index >= 0, image_id).tolist()
            labels = [-100, *tokens.targets[:-1].tolist()]  # the Hugging Face model shifts the labels
            images = images_of(records[index])
            file.write(json.dumps({"input_ids": ids, "labels": labels, "images": images, "length": len(ids)}) + "\n")
