"""The reference side of `training_speed.py`: Hugging Face's or TRL's trainer with LlavaForConditionalGeneration.

    python benchmarks/hf_trainer.py JOB.json

It uses its best settings: conversations tokenized in advance, no gradients for frozen parts, grouping of rows by length
if lengths differ, images decoded in workers, its own bf16 autocast, and no saving or logging. Its `torch_compile` is
not used, because it was slower with varying lengths. It runs on a GPU if there is one.
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
        images = [Image.open(self.images / name).convert("RGB") for record in records for name in record["images"]]
        if images:
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt").pixel_values
        return batch


class Clock(TrainerCallback):
    """Writes the end time of each step and the peak memory so far. The steps in `waits` end when the GPU has ended."""

    def __init__(self, file: Path, waits: tuple[int, ...]):
        self.file, self.waits = file.open("w"), waits

    def on_train_begin(self, *arguments, **options) -> None:
        self._write(0)

    def on_step_end(self, arguments, state, control, **options) -> None:
        self._write(state.global_step)

    def _write(self, step: int) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu and step in self.waits:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()
        self.file.write(json.dumps({"step": step, "time": time.time(), "peak": peak}) + "\n")
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


def load_model(job: dict) -> LlavaForConditionalGeneration:
    """The model of a job. What trains is in fp32; the rest is in the precision that the job stores weights in."""
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["stored"]]
    model = LlavaForConditionalGeneration.from_pretrained(job["model"], dtype=stored)
    model.requires_grad_(False)
    parts = {"connector": "multi_modal_projector", "llm": "language_model", "vision": "vision_tower"}
    for part in job["trained"]:
        if part == "llm" and job["lora"]:
            continue
        getattr(model.model, parts[part]).float().requires_grad_(True)
        if part == "llm":
            model.lm_head.float().requires_grad_(True)
            model.tie_weights()
    if job["lora"]:
        from peft import LoraConfig, inject_adapter_in_model

        language = model.model.language_model
        targets = [name for name, layer in language.named_modules() if isinstance(layer, torch.nn.Linear)]
        inject_adapter_in_model(LoraConfig(**job["lora"], target_modules=targets), language)
        for name, parameter in language.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    return model


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    on_gpu, in_bf16 = torch.cuda.is_available(), job["precision"] == "bf16"
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_model(job).to(device)
    processor = AutoProcessor.from_pretrained(job["model"])
    samples, collator = Samples(Path(job["samples"])), Collator(processor, Path(job["images"]))
    # Weights of both precisions need autocast. Otherwise the loss is in fp32.
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=in_bf16 and job["stored"] == "bf16"):
        batch = {
            name: tensor.to(device) for name, tensor in collator([samples[i] for i in range(job["batch_size"])]).items()
        }
        logits = model(**batch).logits[:, :-1].float()
        logits[..., job["vocabulary"] :] = -torch.inf  # tokens that only the export has
        first = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
    del logits, batch
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    out = Path(job["out"])
    (out / "first.json").write_text(json.dumps({"loss": first}))
    options = dict(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=in_bf16,
        tf32=True if on_gpu else None,
        use_cpu=not on_gpu,
        dataloader_num_workers=job["workers"],
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if job["group_by_length"] else "random",
        length_column_name="length",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock(out / "clock.jsonl", (job["warmup"], job["steps"]))
    shared = {"model": model, "data_collator": collator, "callbacks": [clock]}
    build_trainer(job["trainer"], options, samples, processor, shared).train()


if __name__ == "__main__":
    main()
