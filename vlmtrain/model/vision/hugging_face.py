"""Vision encoders of Hugging Face Transformers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from ...connectors import VisionFeatures
from ...errors import first_line
from ...files import read_object
from ...visual import Size
from ..blocks import block_list
from ..loading import know_blip_towers, load_hf_config, load_hf_model
from .base import VisionEncoder, as_size, block_index
from .checkpoint import facts, read_preprocessor
from .hunyuan import HunyuanVision
from .native import NativeVision
from .qwen import Qwen2VLVision, Qwen3VLVision, Qwen25VLVision
from .siglip2 import Siglip2NaflexVision

TOWERS = (Qwen2VLVision, Qwen25VLVision, Qwen3VLVision, Siglip2NaflexVision, HunyuanVision)
NATIVE: dict[str, type[NativeVision]] = {kind: tower for tower in TOWERS for kind in tower.model_types}


class HFVision(VisionEncoder):
    """A Hugging Face vision model (CLIP, SigLIP, DINOv2, ViT, ...), or the vision tower of a CLIP-like one.

    final_norm: whether `layer`, then -1, is the model's ``last_hidden_state``, after its final norm.
    """

    provider = "hf"

    def __init__(
        self,
        encoder: nn.Module,
        geometry: dict,
        layer: int,
        levels: Sequence[int] | None = None,
        final_norm: bool = False,
    ):
        super().__init__()
        if final_norm and layer != -1:
            raise ValueError(f"vision.final_norm=true with vision.layer={layer}: the norm follows the last layer, -1")
        self.encoder = encoder
        self.geometry = geometry
        self.final_norm = final_norm
        config = encoder.config
        self.image_size = as_size(geometry["image_size"] or config.image_size)
        self.patch_size = as_size(config.patch_size)
        self.width = config.hidden_size
        self.image_mean, self.image_std = tuple(geometry["image_mean"]), tuple(geometry["image_std"])
        if self.image_size != as_size(config.image_size):
            self._check_geometry()
        self.num_blocks = config.num_hidden_layers
        self.set_layers(layer, levels)
        self._resize(self.image_size)

    @classmethod
    def build(
        cls,
        path: str,
        image_size: int | Size | None = None,
        layer: int = -2,
        levels: Sequence[int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        final_norm: bool = False,
        dtype: torch.dtype = torch.float32,
        weights: bool = True,
        trust_remote_code: bool = False,
    ) -> VisionEncoder:
        """Load from a Hub ID or a folder; without `weights`, build only the architecture.

        image_size: in pixels; None means the preprocessor's crop size, or else the model's own size.
        image_mean, image_std: None means those of ``preprocessor_config.json``. final_norm: see the class.

        A model whose tower has native resolution (see `NATIVE`) becomes an encoder of that class.
        """
        know_blip_towers()
        trust = {"trust_remote_code": trust_remote_code}
        config = load_hf_config(path, "vision.path", **trust)
        if config.model_type in NATIVE:
            if final_norm:
                raise ValueError(f"vision.final_norm=true: {NATIVE[config.model_type].__name__} does not support it")
            look = {"image_size": image_size, "image_mean": image_mean, "image_std": image_std}
            options = {"layer": layer, "levels": levels, "dtype": dtype, "weights": weights, **look, **trust}
            return NATIVE[config.model_type].build(path, **options)
        config = getattr(config, "vision_config", config)
        preprocessor, look = read_preprocessor(path, image_mean, image_std)
        geometry = {"image_size": image_size or _preprocessor_size(preprocessor), **look}
        cls._check_grid(config, geometry, path, final_norm, **trust)
        if weights:
            encoder = load_hf_model("AutoModel", path, config=config, dtype=dtype, **trust)
        else:
            encoder = transformers.AutoModel.from_config(config, **trust).to(dtype)
        return cls(encoder, geometry, layer, levels, final_norm)

    @classmethod
    def _check_grid(cls, config, geometry: dict, path: str, final_norm: bool, **trust: bool) -> None:
        """Raise ValueError unless the model of a configuration returns a grid of patches from every block.

        With `final_norm`, its last state must differ from the output of its last block. It runs on the meta device,
        without weights.
        """
        with torch.device("meta"):
            name = type(config).__name__.removesuffix("Config")
            try:
                model = transformers.AutoModel.from_config(config, **trust).eval()
                name = type(model).__name__
                encoder = cls(model, geometry, -1, range(1, config.num_hidden_layers + 1))
                features = encoder(torch.empty(2, 3, *encoder.image_size))
                grids = {tuple(grid.shape) for grid in (features.patches, *features.levels)}
                if grids != {(2, *encoder.grid, encoder.width)}:
                    raise ValueError(f"its blocks return {sorted(grids)}")
            except Exception as error:  # other kinds of models can raise anything
                if "multiple of the encoder's patch size" in str(error):
                    raise
                raise ValueError(
                    f"vision.path={path}: {name} does not return one grid of patches from every block "
                    f"({first_line(error)}): use a ViT, such as CLIP's, SigLIP's or DINOv2's"
                ) from None
            if final_norm:
                out = model(torch.empty(1, 3, *as_size(config.image_size)), output_hidden_states=True)
                if out.last_hidden_state is out.hidden_states[-1]:
                    raise ValueError(f"vision.final_norm=true: {name} applies no norm to the output of its last block")

    def _resize(self, before: Size) -> None:
        self.geometry = {**self.geometry, "image_size": list(self.image_size)}
        # Only some classes need this argument; DINOv2 always interpolates.
        self._takes_flag = "interpolate_pos_encoding" in inspect.signature(self.encoder.forward).parameters

    def forward(self, images: Tensor) -> VisionFeatures:
        resized = tuple(images.shape[2:]) != as_size(self.encoder.config.image_size)
        options = {"interpolate_pos_encoding": True} if self._takes_flag and resized else {}
        blocks = {block_index(layer, self.num_blocks) for layer in (self.layer, *self.levels)}
        if max(blocks) < self.num_blocks - 1 and not any(p.requires_grad for p in self.encoder.parameters()):
            states = self._first_states(blocks, images, options)
            return self.as_features(lambda layer: states[block_index(layer, self.num_blocks)], images)
        out = self.encoder(images, output_hidden_states=True, **options)
        states = (*out.hidden_states[:-1], out.last_hidden_state) if self.final_norm else out.hidden_states
        return self.as_features(lambda layer: states[layer], images)

    def _first_states(self, blocks: set[int], images: Tensor, options: dict) -> dict[int, Tensor]:
        """The outputs of some blocks of a frozen encoder, of which the later blocks do not run."""
        states: dict[int, Tensor] = {}

        def keep(number: int, block: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            states[number] = output if isinstance(output, Tensor) else output[0]
            if number == max(blocks):
                raise _Reached

        modules = self.encoder.get_submodule(block_list(self.encoder)[0])
        hooks = [modules[number].register_forward_hook(partial(keep, number)) for number in blocks]
        try:
            self.encoder(images, **options)
        except _Reached:
            return states
        finally:
            for hook in hooks:
                hook.remove()
        raise AssertionError("the encoder has other blocks")

    @property
    def architecture(self) -> dict:
        return {"hf": facts(self.encoder.config), **self._norm}

    def describe(self) -> dict:
        return {**self._chosen, "encoder": self.encoder.config.to_dict()}

    @property
    def _chosen(self) -> dict:
        return {"layer": self.layer, "levels": self.levels, "geometry": self.geometry, **self._norm}

    @property
    def _norm(self) -> dict:
        return {"final_norm": True} if self.final_norm else {}

    @classmethod
    def from_description(cls, saved: Mapping) -> HFVision:
        know_blip_towers()
        encoder = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**saved["encoder"]))
        return cls(encoder, saved["geometry"], saved["layer"], saved["levels"], saved.get("final_norm", False))

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
        self.encoder.save_pretrained(folder, state_dict=state)
        (folder / "vlmtrain.json").write_text(json.dumps({"provider": self.provider, **self._chosen}, indent=2) + "\n")

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> HFVision:
        saved = read_object(folder / "vlmtrain.json")
        load_hf_config(str(folder), "vision", trust_remote_code)
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        encoder = load_hf_model("AutoModel", str(folder), is_ours=True, **options)
        try:
            return cls(encoder, saved["geometry"], saved["layer"], saved["levels"], saved.get("final_norm", False))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder / 'vlmtrain.json'} does not fit the encoder: {first_line(error)}") from None


class _Reached(Exception):
    """The last block that is needed has run."""


def _preprocessor_size(preprocessor: dict) -> int | None:
    for key in ("crop_size", "size"):
        size = preprocessor.get(key)
        if isinstance(size, dict) and "height" in size:
            return [size["height"], size["width"]]
        if isinstance(size, int) and preprocessor.get("do_center_crop", True):
            return size
    return None
