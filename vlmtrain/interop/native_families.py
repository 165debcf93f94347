"""The published models of native resolution, and the parts of which they consist."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..data.video_plan import VideoPlan
from ..model.vision import VisionEncoder
from ..model.vision.hunyuan import HunyuanVision
from ..model.vision.qwen import Qwen2VLVision, Qwen3VLVision, Qwen25VLVision

_FREE = ("fps", "frames", "per_item", "token_budget")  # settings of videos that the classes do not fix
_WHERE_SET = ("pixels", "pixels_total", "positions_per_second")  # that a class has or does not have


@dataclass(frozen=True)
class Family:
    """A published model of native resolution.

    model_class, processor_class, images_class, videos_class: classes of transformers; videos_class is None for a model
    that does not support video.
    tower, connector, positions: of this project. llm: ``model_type`` of the ordinary language model with the same
    weights. tower_name: of the tower's module in the class. width_key: of the language model's width in the tower's
    configuration. frame: keys of the configuration with the ids of the tokens around images. image_token, video_token:
    the tokens that stand for images and videos, if the tokenizer does not say which they are. video: how videos are
    shown; imported models may have other rates, numbers of frames and limits.
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
    video: VideoPlan | None = None

    def video_difference(self, plan: VideoPlan | None) -> str | None:
        """The first setting with which a plan shows videos differently from the class, or None."""
        if plan is None:
            return "no settings for videos"
        for name in (field.name for field in fields(VideoPlan)):
            got, own = getattr(plan, name), getattr(self.video, name)
            fits = (got is None) == (own is None) if name in _WHERE_SET else got == own
            is_free = name in _FREE or (name == "time_format" and plan.timestamps != "frame")
            if name == "positions_per_second" and fits and own:
                fits = got == int(got)
            if not (fits or is_free):
                return f"video.{name}={got}"
        return None


def _qwen(name: str, videos: str, tower: type[VisionEncoder], connector: str, **options) -> Family:
    names = (f"{name}ForConditionalGeneration", f"{name}Processor", "Qwen2VLImageProcessorPil", videos)
    return Family(*names, tower, connector, **options)


# transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor; fps: published code (qwen-vl-utils)
_QWEN2_VIDEO = VideoPlan(2.0, 768, "qwen2_vl", pixels=(128 * 28 * 28, 768 * 28 * 28), per_item=2)
_QWEN3_VIDEO = VideoPlan(
    2.0,
    768,
    "qwen3_vl",
    pixels_total=(128 * 32 * 32, 768 * 32 * 32),
    timestamps="frame",
    per_item=2,
)
FAMILIES = {
    "qwen2_vl": _qwen(
        "Qwen2VL",
        "Qwen2VLVideoProcessor",
        Qwen2VLVision,
        "qwen2_vl_merger",
        llm="qwen2",
        positions="mrope",
        width_key="hidden_size",
        video=_QWEN2_VIDEO,
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VL",
        "Qwen2VLVideoProcessor",
        Qwen25VLVision,
        "qwen2_5_vl_merger",
        llm="qwen2",
        positions="mrope",
        video=replace(_QWEN2_VIDEO, positions_per_second=2),
    ),
    "qwen3_vl": _qwen(
        "Qwen3VL",
        "Qwen3VLVideoProcessor",
        Qwen3VLVision,
        "qwen3_vl_merger",
        llm="qwen3",
        positions="interleaved_mrope",
        video=_QWEN3_VIDEO,
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
