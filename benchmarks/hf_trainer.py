"""The reference side of `training_speed.py`: Hugging Face's or TRL's trainer with LlavaForConditionalGeneration.

    python benchmarks/hf_trainer.py JOB.json

It uses its best settings: conversations tokenized in advance, no gradients for frozen parts, grouping of rows by length
if lengths differ, images decoded in a worker, its own bf16 autocast, and no saving or logging. Its `torch_compile` is
not used, because it was slower with varying lengths.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from vlmtrain.distributed.processes import peak_resident_bytes


class Samples(Dataset):
    """Conversations as token ids and labels, with the file names of their images."""

    def __init__(self, file: Path):
        self.records = [json.loads(line) for line in file.read_text().splitlines()]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index]


class Collator:
    """Pads on the right and prepares images with the model's processor."""

    def __init__(self, processor, images: Path):
        self.processor, self.images = processor, images

    def __call__(self, records: list[dict]) -> dict:
        longest = max(len(record["input_ids"]) for record in records)
        batch = {
            name: torch.tensor([record[name] + [fill] * (longest - len(record[name])) for record in records])
            for name, fill in (("input_ids", 0), ("labels", -100))
        }
        lengths = torch.tensor([len(record["input_ids"]) for record in records])
        batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
        pictures = [Image.open(self.images / name).convert("RGB") for record in records for name in record["images"]]
        if pictures:
            batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt").pixel_values
        return batch


class Clock(TrainerCallback):
    """Writes the end time of each step and the peak memory so far."""

    def __init__(self, file: Path):
        self.file = file.open("w")

    def on_train_begin(self, *arguments, **options) -> None:
        self._write(0)

    def on_step_end(self, arguments, state, control, **options) -> None:
        self._write(state.global_step)

    def _write(self, step: int) -> None:
        self.file.write(json.dumps({"step": step, "time": time.time(), "peak": peak_resident_bytes()}) + "\n")
        self.file.flush()


def build_trainer(name: str, options: dict, samples: Samples, processor, shared: dict) -> Trainer:
    """Hugging Face's Trainer, or TRL's SFTTrainer on the same tokens, without its own preparation and packing."""
    if name == "trainer":
        return Trainer(args=TrainingArguments(**options), train_dataset=samples, **shared)
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **options, gradient_checkpointing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
    )
    table = Table.from_list(samples.records)
    return SFTTrainer(args=arguments, train_dataset=table, processing_class=processor, **shared)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(job["model"], dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(job["model"])
    trained = {"connector": "multi_modal_projector", "llm": "language_model", "vision": "vision_tower"}
    model.requires_grad_(False)
    for part in job["trained"]:
        getattr(model.model, trained[part]).requires_grad_(True)
    if "llm" in job["trained"]:
        model.lm_head.requires_grad_(True)
    samples, collator = Samples(Path(job["samples"])), Collator(processor, Path(job["images"]))
    with torch.no_grad():
        batch = collator([samples[i] for i in range(job["batch_size"])])
        logits = model(**batch).logits[:, :-1].float()
        logits[
            ..., model.config.image_token_index
        ] = -torch.inf  # a token that the export adds and our side does not have
        first = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
    out = Path(job["out"])
    options = dict(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=job["precision"] == "bf16",
        use_cpu=True,
        dataloader_num_workers=1,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if job["group_by_length"] else "random",
        length_column_name="length",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    shared = {"model": model, "data_collator": collator, "callbacks": [Clock(out / "clock.jsonl")]}
    build_trainer(job["trainer"], options, samples, processor, shared).train()
    (out / "first.json").write_text(json.dumps({"loss": first}))


if __name__ == "__main__":
    main()
