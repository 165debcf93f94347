"""Names of settings in other trainers (Hugging Face Trainer, TRL, LLaVA, Lightning), and what replaces them here.

Also keys that exist only in some sources or with some choices, and where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ..errors import nearest

_KEYS = {
    ("lr", "learning_rate", "max_lr", "peak_lr", "base_lr"): "stages.STAGE.train.PART",
    ("mm_projector_lr", "projector_lr", "connector_lr"): "stages.STAGE.train.connector",
    ("mm_vision_tower_lr", "vision_tower_lr", "vision_lr"): "stages.STAGE.train.vision",
    ("llm_lr", "backbone_lr", "language_model_lr"): "stages.STAGE.train.llm",
    ("per_device_train_batch_size", "train_micro_batch_size_per_gpu"): "stages.STAGE.micro_batch_size",
    ("train_batch_size", "global_batch_size"): "stages.STAGE.batch_size",
    ("per_device_eval_batch_size", "eval_batch_size"): "validation.batch_size",
    ("num_fewshot",): "validation.shots",
    ("num_train_epochs", "max_epochs", "num_epochs"): "stages.STAGE.epochs",
    ("max_train_steps", "num_train_steps"): "stages.STAGE.max_steps",
    ("warmup_steps", "num_warmup_steps", "lr_warmup_steps"): "stages.STAGE.schedule.warmup_steps",
    ("warmup_ratio",): "stages.STAGE.schedule.warmup_ratio",
    ("lr_scheduler_type", "lr_scheduler", "scheduler", "schedule"): "stages.STAGE.schedule.name",
    ("min_lr",): "stages.STAGE.schedule.min_lr",
    ("weight_decay",): "stages.STAGE.optimizer.weight_decay",
    ("betas", "adam_beta1", "adam_beta2"): "stages.STAGE.optimizer.betas",
    ("eps", "adam_epsilon"): "stages.STAGE.optimizer.eps",
    ("optim", "optimizer", "optimizer_name"): "stages.STAGE.optimizer.name",
    ("ema", "ema_decay"): "stages.STAGE.ema",
    ("clip_grad_norm", "gradient_clip_val", "grad_clip"): "stages.STAGE.max_grad_norm",
    ("bf16", "torch_dtype", "dtype", "mixed_precision"): "precision",
    ("deepspeed", "strategy", "zero_stage"): "engine",
    ("model_name_or_path", "base_model", "pretrained_model_name_or_path", "model_path"): "llm.path",
    ("vision_tower", "vision_model", "image_encoder"): "vision.path",
    ("mm_projector_type", "projector", "projector_type"): "connector",
    ("mm_vision_select_layer",): "vision.layer",
    ("pretrain_mm_mlp_adapter",): "init_from",
    ("output_dir", "save_dir", "default_root_dir", "logging_dir"): "run_dir",
    ("data_path", "train_file", "dataset", "dataset_name", "train_data"): "data.SPLIT",
    ("validation_file", "eval_file", "eval_dataset", "val_data"): "data.validation",
    ("image_folder", "image_root", "image_dir", "media_dir"): "data.images",
    ("model_max_length", "max_seq_length", "max_seq_len", "cutoff_len"): "stages.STAGE.max_length",
    ("image_aspect_ratio",): "stages.STAGE.image_fit",
    ("image_grid_pinpoints",): "stages.STAGE.image_tiles",
    ("conv_mode", "conv_version", "version"): "stages.STAGE.template",
    ("dataloader_num_workers", "num_workers", "num_proc"): "workers",
    ("save_steps", "save_strategy", "every_n_train_steps"): "stages.STAGE.save_every",
    ("save_total_limit", "save_top_k"): "stages.STAGE.keep_last",
    ("eval_steps", "evaluation_strategy", "eval_strategy", "val_check_interval"): "stages.STAGE.validate_every",
    ("early_stopping_patience",): "stages.STAGE.early_stopping",
    ("load_best_model_at_end",): "stages.STAGE.keep_best",
    ("metric_for_best_model", "monitor"): "stages.STAGE.best_metric",
    ("report_to", "logger", "tracker", "trackers"): "loggers",
    ("project", "wandb_name"): "wandb_project",
    ("lora_enable", "use_lora", "use_peft", "lora_alpha", "lora_dropout", "peft_config"): "stages.STAGE.lora.PART",
    ("lora_r", "lora_rank"): "stages.STAGE.lora.PART.rank",
    ("load_in_4bit", "use_qlora", "bits", "quantization"): "stages.STAGE.lora.PART.quantize",
    ("attn_implementation", "use_flash_attention_2", "flash_attn"): "llm.attn_implementation",
    ("packing",): "stages.STAGE.layout",
    ("torch_compile",): "compile",
}
_NOTES = {
    ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum_steps"): (
        "Gradient accumulation follows from stages.STAGE.batch_size (samples per step over all ranks) and "
        "stages.STAGE.micro_batch_size (per rank)."
    ),
    (
        *("freeze_backbone", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower"),
        *("mm_tunable_parts", "freeze_vision_tower", "freeze_llm", "freeze_vit", "freeze_aligner"),
    ): "A part is frozen with stages.STAGE.train.PART=null and trained with a learning rate.",
    ("resume_from_checkpoint", "ckpt_path", "resume"): "A run resumes if its command is run again.",
    ("overwrite_output_dir",): "Delete the run folder, or set another run_dir.",
    ("run_name",): "A run is named after its run_dir.",
    ("logging_steps", "log_every_n_steps"): "Every step is logged.",
    ("group_by_length", "group_by_modality_length"): "Rows of similar length always run together.",
    ("train_on_inputs", "assistant_only_loss", "completion_only_loss"): "Only the assistant's turns are trained.",
    ("devices", "num_nodes", "n_gpu", "nproc_per_node", "accelerator"): "torchrun sets the number of processes.",
    ("tf32",): "TF32 is always used on GPUs.",
    ("fp16",): "fp16 is not offered; use precision=bf16.",
    ("fsdp",): "FSDP is not offered; engine=zero3 shards the weights.",
    ("load_in_8bit",): "8-bit weights are not offered; stages.STAGE.lora.PART.quantize=nf4 stores them in 4 bits.",
    ("label_smoothing_factor", "label_smoothing"): "Label smoothing is not supported.",
    ("neftune_noise_alpha",): "NEFTune is not supported.",
    ("sequence_parallel", "sequence_parallel_size", "tensor_parallel_size"): "Model parallelism is not supported.",
    ("push_to_hub",): "vlmtrain push uploads a model folder.",
    ("final_norm",): "Only vision=hf has it.",
    **{
        (name,): f"Only sources of documents have it: data.SPLIT={{path: ..., {name}: ...}}."
        for name in ("max_images", "min_image_bytes", "one_image_share", "train_first_text", "min_similarity")
        + ("next_image", "random_window")
    },
    **{
        (name,): f"Only sources of data=mimic_it have it: data.SPLIT={{path: ..., {name}: ...}}."
        for name in ("related_ids", "max_examples")
    },
}


def _by_name(table: dict[tuple[str, ...], str]) -> dict[str, str]:
    return {name: found for names, found in table.items() for name in names}


KEYS, NOTES = _by_name(_KEYS), _by_name(_NOTES)
"""The key that replaces a name, or a note where no key does. STAGE and PART stand for the name of a stage or a part."""


def suggestion(key: str, known: Iterable[str]) -> str:
    """What to use instead of an unknown key, as a sentence that starts with a space; empty if nothing is similar."""
    parent, _, name = key.rpartition(".")
    known = list(known)
    elsewhere = sorted((each for each in known if each.endswith(f".{name}")), key=lambda each: each[:7] != "stages.")
    if elsewhere and not parent:
        return f" Did you mean '{elsewhere[0]}'?"
    if name.lower() in KEYS or name.lower() in NOTES:
        found = f"Use {KEYS[name.lower()]}." if name.lower() in KEYS else NOTES[name.lower()]
        return f" {found.replace('STAGE', key.split('.')[1]) if key.startswith('stages.') else found}"
    siblings = [each for each in known if each.rpartition(".")[0] == parent]
    names = [each.rpartition(".")[2] for each in siblings]
    close = difflib.get_close_matches(name, names, 1, cutoff=0.8)
    of_stages = {each.rpartition(".")[2]: each for each in reversed(known) if each.startswith("stages.")}
    if not parent and not close and (staged := difflib.get_close_matches(name, of_stages, 1, cutoff=0.8)):
        return f" Did you mean '{of_stages[staged[0]]}'?"
    close = close or difflib.get_close_matches(name, names, 1)
    if close:
        return f" Did you mean '{parent}.{close[0]}'?" if parent else f" Did you mean '{close[0]}'?"
    further = nearest(key, [each for each in known if each not in siblings])
    return further or (f" The keys of {parent} are {', '.join(dict.fromkeys(names))}." if parent and names else "")
