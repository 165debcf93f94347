"""The configuration of models that no class of transformers can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


class VLMTrainConfig(PreTrainedConfig):
    """What each part of the model is built from.

    text_config: the language model's own configuration; vision: provider, layers and architecture of the encoder;
    connector: its name, widths and options; fusion: the same, None for concatenation; image_token_id: ID of the image
    token, which may lie outside the vocabulary.
    """

    model_type = "vlmtrain"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    when_read: ClassVar[Callable[[], None]] = staticmethod(lambda: None)
    """Called before a configuration is read; `registration` registers the model class here."""

    text_config: dict | PreTrainedConfig | None = None
    vision: dict | None = None
    connector: dict | None = None
    fusion: dict | None = None
    image_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        cls.when_read()
        return super().from_dict(config_dict, **kwargs)
