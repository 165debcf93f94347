"""Register our class with transformers' Auto classes on ``import vlmtrain``, without importing transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    """Register the configuration and the processor now, or as soon as transformers has loaded its registries."""
    waiting = {}
    for module, action in _ACTIONS.items():
        if module in sys.modules:
            action()
        else:
            waiting[module] = action
    if waiting:
        sys.meta_path.insert(0, _AfterLoading(waiting))


def _register_config() -> None:
    from transformers import AutoConfig

    from .own_config import VLMTrainConfig

    VLMTrainConfig.when_read = staticmethod(_register_model)
    AutoConfig.register(VLMTrainConfig.model_type, VLMTrainConfig, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from .own import VLMTrainProcessor
    from .own_config import VLMTrainConfig

    AutoProcessor.register(VLMTrainConfig, VLMTrainProcessor, exist_ok=True)


def _register_model() -> None:
    """Register the model class, which imports too many modules to load with transformers' registries."""
    from transformers import AutoModelForImageTextToText

    from .own import VLMTrainForConditionalGeneration
    from .own_config import VLMTrainConfig

    AutoModelForImageTextToText.register(VLMTrainConfig, VLMTrainForConditionalGeneration, exist_ok=True)


_ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _AfterLoading(MetaPathFinder):
    """Runs an action after each of the given modules has been imported."""

    def __init__(self, actions: dict[str, Callable[[], None]]):
        self.actions = actions

    def find_spec(self, fullname: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = self.actions.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            action()

        spec.loader.exec_module = load_and_act
        return spec
