"""Random models in published formats: LLaVA, BLIP-2 and InstructBLIP of Hugging Face, and single projectors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from tests.integration.tiny_parts import (
    HF_VISION,
    LLMS,
    LOOK,
    SIDE,
    WIDE,
    byte_tokenizer,
    flan_t5,
    stir,
    t5_tokenizer,
)
from vlmtrain.data.records import IMAGE_MARK, VIDEO_MARK
from vlmtrain.interop.fitting import relative_difference
from vlmtrain.model import VLMWrapper

KINDS = ("weight", "bias")
SQUARE = {"height": SIDE, "width": SIDE}
BICUBIC = {**LOOK, "resample": 3}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
PROCESSORS = {
    "crop": lambda: CLIPImageProcessorPil(**BICUBIC, size={"shortest_edge": SIDE}, crop_size=SQUARE),
    "squash": lambda: CLIPImageProcessorPil(**BICUBIC, size=SQUARE, do_center_crop=False),
    "pad": lambda: LlavaImageProcessorPil(**BICUBIC, size=SQUARE, do_center_crop=False, do_pad=True),
    "tiles": lambda: LlavaNextImageProcessorPil(
        **BICUBIC, size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    ),
    "tiles alone": lambda: LlavaOnevisionImageProcessorPil(**BICUBIC, size=SQUARE, image_grid_pinpoints=PINPOINTS),
}
# as in the published ones: images first, then videos, then text, only from items
ITEMS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q: ' }}{% else %}{{ 'A: ' }}{% endif %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def build_llava(
    folder: Path, kind: str = "llava", vision: str = "clip", llm: str = "llama", fit: str = "crop", **options
) -> nn.Module:
    """Write a random LLaVA in Hugging Face's format."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer("always")
    marks = [IMAGE_MARK, VIDEO_MARK] if kind == "llava_onevision" else [IMAGE_MARK]
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    template = options.pop("template", ITEMS)
    config = LLMS[llm](vocab_size=len(tokenizer) + 3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    strategy = "full" if vision == "siglip" else "default"
    model_class, config_class, processor_class = {
        "llava": (LlavaForConditionalGeneration, LlavaConfig, LlavaProcessor),
        "llava_next": (LlavaNextForConditionalGeneration, LlavaNextConfig, LlavaNextProcessor),
        "llava_onevision": (
            LlavaOnevisionForConditionalGeneration,
            LlavaOnevisionConfig,
            LlavaOnevisionProcessor,
        ),
    }[kind]
    more = {} if kind == "llava" else {"image_grid_pinpoints": PINPOINTS}
    if kind == "llava_onevision":
        more |= {"vision_aspect_ratio": "anyres_max_2", "vision_feature_layer": -1}
        more["video_token_index"] = tokenizer.convert_tokens_to_ids(VIDEO_MARK)
    else:
        more["image_seq_length"] = 16
    given = {
        "vision_config": HF_VISION[vision]().config,
        "text_config": config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    model = stir(model_class(config_class(**{**given, **more, **options})))
    model.save_pretrained(folder)
    prefix, told = int(strategy == "default"), {"vision_feature_select_strategy": strategy, "chat_template": template}
    if kind == "llava_onevision":
        videos = LlavaOnevisionVideoProcessor(**BICUBIC, size=SQUARE)
        told |= {"num_image_tokens": 16 + prefix, "vision_aspect_ratio": "anyres_max_2"}
        processor = processor_class(PROCESSORS["tiles alone"](), tokenizer, videos, **told)
    else:
        pictures = PROCESSORS["tiles" if kind == "llava_next" else fit]()
        told |= {"patch_size": 8, "num_additional_image_tokens": prefix}
        processor = processor_class(pictures, tokenizer, **told)
    processor.save_pretrained(folder)
    return model


def reading_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer("always")
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<pad>"})
    frame = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=frame)
    return tokenizer


def build_blip(folder: Path, kind: str = "blip-2", llm: str = "opt", end: int | None = None, **options) -> nn.Module:
    """Write a random BLIP-2 or InstructBLIP in Hugging Face's format. end: the end of answers, if not </s>."""
    torch.manual_seed(0)
    flan = llm == "flan_t5"
    tokenizer = t5_tokenizer() if flan else byte_tokenizer("always")
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right" if flan else "left"
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": end or 2}
    rows = len(tokenizer) + 3
    text = flan_t5(vocab_size=rows).config if flan else LLMS[llm](vocab_size=rows, **ids)
    reads = kind == "instructblip"
    classes = (
        (InstructBlipConfig, InstructBlipVisionConfig, InstructBlipQFormerConfig, InstructBlipForConditionalGeneration)
        if reads
        else (Blip2Config, Blip2VisionConfig, Blip2QFormerConfig, Blip2ForConditionalGeneration)
    )
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    words = {"vocab_size": len(reading_tokenizer()) + 1, "max_position_embeddings": 48} if reads else {}
    config = classes[0](
        vision_config=classes[1](**WIDE).to_dict(),
        qformer_config=classes[2](**{**shape, **words, **options}).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=3,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    model = classes[3](config)
    if flan:
        model.language_model.lm_head.weight = nn.Parameter(torch.randn(rows, 32))
    stir(model).save_pretrained(folder)
    pictures = BlipImageProcessorPil(**LOOK, size=SQUARE)
    if reads:
        InstructBlipProcessor(pictures, tokenizer, reading_tokenizer(), 3).save_pretrained(folder)
    else:
        Blip2Processor(pictures, tokenizer, 3).save_pretrained(folder)
    return model


def build_parts(folder: Path, depth: int = 2) -> dict[str, Path]:
    """Write a random LLaVA, and its projector as LLaVA publishes it, with the parts that it connects.

    Returns the arguments of `import_model` for the projector.
    """
    activation = "linear" if depth == 1 else "gelu"
    model = build_llava(folder / "hf", projector_hidden_act=activation, vision_feature_layer=-2)
    model.model.vision_tower.save_pretrained(folder / "clip")
    PROCESSORS["crop"]().save_pretrained(folder / "clip")
    llm = AutoModelForCausalLM.from_config(model.config.text_config)
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.lm_head.load_state_dict(model.lm_head.state_dict())
    llm.save_pretrained(folder / "vicuna")
    tokenizer = byte_tokenizer("always")
    tokenizer.chat_template = ITEMS
    tokenizer.save_pretrained(folder / "vicuna")
    first, second = (getattr(model.model.multi_modal_projector, f"linear_{number}") for number in (1, 2))
    state = {f"{place}.{kind}": getattr(layer, kind) for place, layer in ((0, first), (2, second)) for kind in KINDS}
    if depth == 1:
        state = {"weight": second.weight @ first.weight, "bias": second(first.bias)}
    (folder / "llava").mkdir()
    file = folder / "llava" / "mm_projector.bin"
    torch.save({f"model.mm_projector.{name}": tensor.detach() for name, tensor in state.items()}, file)
    said = {"mm_vision_tower": str(folder / "clip"), "mm_vision_select_layer": -2, "image_aspect_ratio": None}
    file.with_name("config.json").write_text(json.dumps(said))
    return {"source": file, "llm": str(folder / "vicuna")}


def build_shuffling(folder: Path, kind: str) -> dict[str, Path]:
    """The same for a random projector of InternVL's or nanoVLM's."""
    told, wide = build_parts(folder), 4 * 16
    shapes = {"MP.proj.weight": (32, wide)}
    if kind == "internvl":
        shapes = {"0.weight": (wide,), "0.bias": (wide,), "1.weight": (32, wide), "1.bias": (32,)}
        shapes = {f"mlp1.{n}": s for n, s in {**shapes, "3.weight": (32, 32), "3.bias": (32,)}.items()}
    told["source"].with_name("config.json").unlink()
    told["source"] = told["source"].with_suffix(".safetensors")
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, told["source"])
    return {**told, "vision": str(folder / "clip")}


@torch.no_grad()
def shuffling_difference(folder: Path, told: dict[str, Path], kind: str) -> float:
    """How far an image's tokens are from the published computation, with squares of patches concatenated by hand."""
    images, state = torch.randn(2, 3, SIDE, SIDE), load_file(told["source"])
    hidden = HF_VISION["clip"]().from_pretrained(folder / "clip")(images, output_hidden_states=True)
    grid = hidden.hidden_states[-1][:, 1:].unflatten(1, (4, 4))
    tokens = [grid[:, r : r + 2, c : c + 2].flatten(1) for r in (0, 2) for c in (0, 2)]
    expected = torch.stack(tokens, 1)
    if kind == "nanovlm":
        expected = expected @ state["MP.proj.weight"].T
    else:
        wide = expected.shape[-1:]
        expected = nn.functional.layer_norm(expected, wide, state["mlp1.0.weight"], state["mlp1.0.bias"])
        expected = nn.functional.gelu(expected @ state["mlp1.1.weight"].T + state["mlp1.1.bias"])
        expected = expected @ state["mlp1.3.weight"].T + state["mlp1.3.bias"]
    model = VLMWrapper.from_pretrained(folder / "model")
    return relative_difference(model.connector(model.vision(images)), expected)
