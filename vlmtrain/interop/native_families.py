"""The published models of native resolution, and the parts of which they consist."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.vision import VisionEncoder
from ..model.vision.hunyuan import HunyuanVision
from ..model.vision.qwen import Qwen2VLVision, Qwen3VLVision, Qwen25VLVision


@dataclass(frozen=True)
class Family:
    """A published model of native resolution.

    model_class, processor_class, images_class, videos_class: classes of transformers; videos_class is None for a model
    that does not support video.
    tower, connector, positions: of this project. llm: ``model_type`` of the ordinary language model with the same
    weights. tower_name: of the tower's module in the class. width_key: of the language model's width in the tower's
    configuration. frame: keys of the configuration with the ids of the tokens around images. image_token, video_token:
    the tokens that stand for images and videos, if the tokenizer does not say which they are.
    """

    model_class: str
    processor_class: str
    images_class: str
    videos_class: str | None
    tower: type[VisionEncoder]
    connector: str
    llm: str
    positions: str
    tower_name: str = "visual"
    width_key: str = "out_hidden_size"
    frame: tuple[str, str] = ("vision_start_token_id", "vision_end_token_id")
    image_token: str = "<|image_pad|>"
    video_token: str | None = "<|video_pad|>"


def _qwen(name: str, videos: str, tower: type[VisionEncoder], connector: str, **options) -> Family:
    names = (f"{name}ForConditionalGeneration", f"{name}Processor", "Qwen2VLImageProcessorPil", videos)
    return Family(*names, tower, connector, **options)


FAMILIES = {
    "qwen2_vl": _qwen(
        "Qwen2VL",
        "Qwen2VLVideoProcessor",
        Qwen2VLVision,
        "qwen2_vl_merger",
        llm="qwen2",
        positions="mrope",
        width_key="hidden_size",
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VL", "Qwen2VLVideoProcessor", Qwen25VLVision, "qwen2_5_vl_merger", llm="qwen2", positions="mrope"
    ),
    "qwen3_vl": _qwen(
        "Qwen3VL",
        "Qwen3VLVideoProcessor",
        Qwen3VLVision,
        "qwen3_vl_merger",
        llm="qwen3",
        positions="interleaved_mrope",
    ),
    "hunyuan_vl": Family(
        "HunYuanVLForConditionalGeneration",
        "HunYuanVLProcessor",
        "HunYuanVLImageProcessorPil",
        None,
        HunyuanVision,
        "hunyuan_merger",
        "hunyuan_v1_dense",
        "xdrope",
        tower_name="vision_tower",
        width_key="text_hidden_size",
        frame=("im_start_id", "im_end_id"),
        video_token=None,
    ),
}
