"""Vision encoders: images in, `VisionFeatures` on an explicit grid out.

Two providers share one interface. An encoder has an image size, a grid, a width, a normalization and a hidden layer
whose features it returns. It keeps prefix tokens (CLS, registers) separate from the patches.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..connectors import VisionFeatures
from ..errors import first_line, nearest, some
from ..files import read_object
from .loading import know_blip_towers, load_hf_config, load_hf_model, load_strictly


class VisionEncoder(nn.Module):
    """Base class of both providers.

    image_size: ``(H, W)`` in pixels; grid: ``(H, W)`` in patches; width: number of feature channels;
    layer: which hidden state is returned, as in Hugging Face's ``hidden_states[layer]``, where 1 is the output of
    the first block and -1 that of the last block (before any final norm); levels: additional layers, shallow to deep,
    for connectors that read several.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    width: int
    layer: int
    levels: list[int]
    num_blocks: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    def _check_geometry(self, key: str = "vision.image_size") -> None:
        """Raise ValueError, naming `key`, if the image size is not a multiple of the patch size.

        The encoder's own size is exempt: an incomplete edge is then ignored.
        """
        for side, patch in zip(self.image_size, self.patch_size):
            if side < patch or side % patch:
                raise ValueError(
                    f"{key}={self.image_size[0]}x{self.image_size[1]} is not a multiple of the "
                    f"encoder's patch size {patch}: use, for example, {max(1, round(side / patch)) * patch}"
                )

    def resize(self, image_size: int | tuple[int, int], key: str = "vision.image_size") -> None:
        """Change the image size; a learned position table is interpolated bicubically.

        Raises ValueError, naming `key`, for a size that is not a multiple of the patch size.
        """
        before, self.image_size = self.image_size, _pair(image_size)
        if self.image_size != before:
            self._check_geometry(key)
            self._resize(before)

    def _resize(self, before: tuple[int, int]) -> None:
        """Adapt the encoder to a changed `image_size`."""
        raise NotImplementedError

    def _set_layers(self, layer: int, levels: Sequence[int] | None) -> None:
        _block_index(layer, self.num_blocks)
        for level in levels or ():
            _block_index(level, self.num_blocks, "vision.levels")
        self.layer = layer
        self.levels = list(levels or ())

    def give_levels(self, count: int) -> None:
        """Return `count` additional hidden layers, as required by a connector, unless they are already set.

        The layers are evenly spaced up to `layer`, or over the complete encoder if that is too shallow. Raises
        ValueError if a different number is set.
        """
        if not self.levels and count:
            depth = _block_index(self.layer, self.num_blocks) + 1
            last = depth if depth >= count else self.num_blocks
            if last < count:
                raise ValueError(f"the connector reads {count} hidden layers, but the encoder has {last}")
            self.levels = [last * (i + 1) // count for i in range(count)]
        if count and len(self.levels) != count:
            raise ValueError(
                f"the connector reads {count} hidden layers, but vision.levels={self.levels} lists {len(self.levels)}"
            )

    def _as_features(self, state: Callable[[int], Tensor]) -> VisionFeatures:
        """Split the hidden states ``(B, P + H*W, C)`` of the returned layers into prefix and raster grids."""
        height, width = self.grid
        tokens = state(self.layer)
        num_prefix = tokens.shape[1] - height * width
        assert num_prefix >= 0, f"{tokens.shape[1]} tokens for a {height}x{width} grid"

        def grid_of(tokens: Tensor) -> Tensor:
            return tokens[:, num_prefix:].unflatten(1, (height, width))

        prefix = tokens[:, :num_prefix] if num_prefix else None
        return VisionFeatures(grid_of(tokens), prefix, tuple(grid_of(state(level)) for level in self.levels))

    def forward(self, images: Tensor) -> VisionFeatures:
        """Map normalized images ``(B, 3, H, W)`` to features."""
        raise NotImplementedError

    @property
    def architecture(self) -> dict:
        """Plain values that, with weights, image size and layers, define the encoder's function; stored by `save`."""
        raise NotImplementedError

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the architecture and the weights `state` (this module's full state dict) into `folder`."""
        raise NotImplementedError


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _block_index(layer: int, num_blocks: int, key: str = "vision.layer") -> int:
    """Index of the block whose output is ``hidden_states[layer]`` of ``num_blocks + 1`` states."""
    index = layer - 1 if layer > 0 else num_blocks + layer
    if layer == 0 or not 0 <= index < num_blocks:
        raise ValueError(
            f"{key}={layer} is out of range for an encoder of {num_blocks} blocks: "
            f"expected 1..{num_blocks} or -{num_blocks}..-1"
        )
    return index


class OpenClipVision(VisionEncoder):
    """The image tower of an open_clip model: its own ViT, or a timm one (SigLIP, EVA)."""

    def __init__(self, visual: nn.Module, config: dict, layer: int, levels: Sequence[int] | None = None):
        super().__init__()
        self.visual = visual
        self.config = config
        self.image_size = _pair(config["vision_cfg"]["image_size"])
        self.image_mean = tuple(config["image_mean"])
        self.image_std = tuple(config["image_std"])
        trunk = getattr(visual, "trunk", visual)
        if hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed"):
            blocks, self.width = trunk.blocks, trunk.embed_dim
            self.patch_size = _pair(trunk.patch_embed.patch_size)
        elif hasattr(visual, "transformer"):
            blocks, self.width = visual.transformer.resblocks, visual.transformer.width
            self.patch_size = _pair(visual.patch_size)
        else:
            raise ValueError(f"open_clip's {type(trunk).__name__} has no patch grid: use a ViT")
        self.num_blocks = len(blocks)
        self._set_layers(layer, levels)
        # The tensors of a trunk (class token, position table) may be used only inside its forward: under ZeRO-3
        # they are gathered there and nowhere else. So its forward is replaced by the intermediate-features pass.
        self._is_timm = trunk is not visual
        trunk.forward = trunk.forward_intermediates

    @classmethod
    def build(
        cls,
        name: str | None = None,
        pretrained: str | None = None,
        model_config: dict | None = None,
        image_size: int | tuple[int, int] | None = None,
        layer: int = -2,
        levels: Sequence[int] | None = None,
    ) -> OpenClipVision:
        """Build an open_clip image tower.

        name: an open_clip model name; alternatively, pass `model_config` (open_clip's own schema).
        pretrained: an open_clip weights tag or a file; None means random weights.
        image_size: in pixels; if it differs from the model's own size, the position table is interpolated.
        """
        import open_clip
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        if (name is None) == (model_config is None):
            raise ValueError("vision=open_clip requires exactly one of vision.name and vision.model_config")
        if model_config is not None:
            _check_model_config(model_config)
            config = copy.deepcopy(dict(model_config))
            config["vision_cfg"]["image_size"] = image_size or config["vision_cfg"]["image_size"]
            config |= {"image_mean": list(OPENAI_DATASET_MEAN), "image_std": list(OPENAI_DATASET_STD)}
            encoder = cls(cls._build_visual(config), config, layer, levels)
            if image_size is not None:
                encoder._check_geometry()
            return encoder
        try:
            config = open_clip.get_model_config(name)
        except Exception as error:  # for hf-hub: and local-dir: names that cannot be read
            raise ValueError(f"vision.name={name}: open_clip cannot read its config: {first_line(error)}") from None
        if config is None:
            raise ValueError(f"vision.name={name} is not an open_clip model.{nearest(name, open_clip.list_models())}")
        own = _pair(config["vision_cfg"]["image_size"])
        size = image_size if image_size is None or isinstance(image_size, int) else tuple(image_size)
        here = torch.get_default_device()
        # without open_clip's warning about random weights, which are intended if `pretrained` is None
        logging.disable(logging.WARNING if pretrained is None else logging.NOTSET)
        try:
            model = open_clip.create_model(name, pretrained=pretrained, force_image_size=size, device=here)
        except Exception as error:  # open_clip can raise any exception for a tag, download or file that does not load
            if pretrained is None:
                raise ValueError(f"vision.name={name}: open_clip cannot build it: {first_line(error)}") from None
            raise ValueError(
                f"vision.pretrained={pretrained}: open_clip cannot load these weights of {name} "
                f"({first_line(error)}): expected a file, or one of its tags: "
                f"{some(open_clip.list_pretrained_tags_by_model(name)) or 'there are none'}"
            ) from None
        finally:
            logging.disable(logging.NOTSET)
        config["vision_cfg"]["image_size"] = list(_pair(model.visual.image_size))
        config["quick_gelu"] = any(type(m).__name__ == "QuickGELU" for m in model.visual.modules())
        preprocess = open_clip.get_model_preprocess_cfg(model)
        config |= {"image_mean": list(preprocess["mean"]), "image_std": list(preprocess["std"])}
        encoder = cls(model.visual, config, layer, levels)
        if encoder.image_size != own:
            encoder._check_geometry()
        return encoder

    @staticmethod
    def _build_visual(config: dict) -> nn.Module:
        from open_clip.model import _build_vision_tower

        options = dict(config["vision_cfg"])
        visual = _build_vision_tower(config["embed_dim"], options, config.get("quick_gelu", False))
        if hasattr(visual, "trunk"):
            visual.set_input_size(_pair(options["image_size"]))
        return visual

    def forward(self, images: Tensor) -> VisionFeatures:
        blocks = sorted({_block_index(layer, self.num_blocks) for layer in (self.layer, *self.levels)})
        options = {"indices": blocks, "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"}
        if self._is_timm:
            found = self.visual.trunk(images, return_prefix_tokens=True, **options)
            states = [torch.cat(state[::-1], 1) if isinstance(state, tuple) else state for state in found]
        else:
            out = self.visual(images, output_extra_tokens=True, **options)
            pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"])
            states = [torch.cat(pair, 1) for pair in pairs]
        by_block = dict(zip(blocks, states))
        return self._as_features(lambda layer: by_block[_block_index(layer, self.num_blocks)])

    def _resize(self, before: tuple[int, int]) -> None:
        self.config = copy.deepcopy(self.config)
        self.config["vision_cfg"]["image_size"] = list(self.image_size)
        if self._is_timm:
            self.visual.trunk.set_input_size(self.image_size)
            return
        old = before[0] // self.patch_size[0], before[1] // self.patch_size[1]
        table = self.visual.positional_embedding
        prefix, patches = table.data.split([len(table) - old[0] * old[1], old[0] * old[1]])
        patches = patches.float().unflatten(0, old).permute(2, 0, 1)[None]
        patches = F.interpolate(patches, self.grid, mode="bicubic", antialias=True, align_corners=False)
        resized = torch.cat([prefix, patches[0].flatten(1).T.to(prefix.dtype)])
        self.visual.positional_embedding = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.visual.image_size, self.visual.grid_size = self.image_size, self.grid

    def pooled(self, images: Tensor) -> Tensor:
        """The tower's image embedding ``(B, embed_dim)``, as contrastive training uses it (not normalized)."""
        if not self._is_timm:
            return self.visual(images, indices=[self.num_blocks - 1])["image_features"]
        final, _ = self.visual.trunk(images, indices=[self.num_blocks - 1])
        return self.visual.head(self.visual.trunk.forward_head(final))

    @property
    def architecture(self) -> dict:
        tower = {key: value for key, value in self.config["vision_cfg"].items() if key != "image_size"}
        return {"open_clip": tower, "quick_gelu": bool(self.config.get("quick_gelu"))}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"layer": self.layer, "levels": self.levels, "model_config": self.config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype) -> OpenClipVision:
        file = folder / "config.json"
        saved = read_object(file)
        try:
            visual = cls._build_visual(saved["model_config"])
            encoder = cls(visual, saved["model_config"], saved["layer"], saved["levels"])
        except Exception as error:  # open_clip and timm can raise anything
            raise ValueError(f"{file} describes no encoder that can be built: {first_line(error)}") from None
        load_strictly(encoder, folder / "model.safetensors")
        return encoder.to(dtype)


def _check_model_config(config: Mapping) -> None:
    """Raise ValueError for a key that is not of open_clip's schema, or for one without which no tower can be built."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg
    from open_clip.model import CLIP, CustomTextCLIP

    schema = {*inspect.signature(CLIP.__init__).parameters, *inspect.signature(CustomTextCLIP.__init__).parameters}
    known = {
        "": schema - {"self"} | {"custom_text", "multimodal_cfg"},
        "vision_cfg.": {f.name for f in fields(CLIPVisionCfg)},
        "text_cfg.": {f.name for f in fields(CLIPTextCfg)},
    }
    for prefix, names in known.items():
        section = config if not prefix else config.get(prefix[:-1]) or {}
        for key in section:
            if key not in names:
                raise ValueError(f"unknown key 'vision.model_config.{prefix}{key}'.{nearest(str(key), names)}")
    for key in ("embed_dim", "vision_cfg"):
        if key not in config:
            raise ValueError(f"vision.model_config.{key} is missing: open_clip's schema has embed_dim and vision_cfg")


# Keys of a Hugging Face configuration that record its origin and version. The dtype is that of the weights.
_PROVENANCE = ("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")


class HFVision(VisionEncoder):
    """A Hugging Face vision model (CLIP, SigLIP, DINOv2, ViT, ...), or the vision tower of a CLIP-like one."""

    def __init__(self, encoder: nn.Module, geometry: dict, layer: int, levels: Sequence[int] | None = None):
        super().__init__()
        self.encoder = encoder
        self.geometry = geometry
        config = encoder.config
        self.image_size = _pair(geometry["image_size"] or config.image_size)
        self.patch_size = _pair(config.patch_size)
        self.width = config.hidden_size
        self.image_mean, self.image_std = tuple(geometry["image_mean"]), tuple(geometry["image_std"])
        if self.image_size != _pair(config.image_size):
            self._check_geometry()
        self.num_blocks = config.num_hidden_layers
        self._set_layers(layer, levels)
        self._resize(self.image_size)

    @classmethod
    def build(
        cls,
        path: str,
        image_size: int | tuple[int, int] | None = None,
        layer: int = -2,
        levels: Sequence[int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        dtype: torch.dtype = torch.float32,
        weights: bool = True,
        trust_remote_code: bool = False,
    ) -> HFVision:
        """Load from a Hub ID or a folder; without `weights`, build only the architecture.

        image_size: in pixels; None means the preprocessor's crop size, or else the model's own size.
        image_mean, image_std: None means those of ``preprocessor_config.json``.
        """
        from transformers.utils import cached_file

        know_blip_towers()
        trust = {"trust_remote_code": trust_remote_code}
        config = load_hf_config(path, "vision.path", **trust)
        config = getattr(config, "vision_config", config)
        found = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        preprocessor = json.loads(Path(found).read_text()) if found else {}
        mean, std = image_mean or preprocessor.get("image_mean"), image_std or preprocessor.get("image_std")
        if not mean or not std:
            raise ValueError(
                f"'{path}' has no preprocessor_config.json with image_mean and image_std: "
                "set vision.image_mean and vision.image_std"
            )
        geometry = {"image_size": image_size or _preprocessor_size(preprocessor)}
        geometry |= {"image_mean": list(mean), "image_std": list(std)}
        cls._check_grid(config, geometry, path, **trust)
        if weights:
            encoder = load_hf_model("AutoModel", path, config=config, dtype=dtype, **trust)
        else:
            encoder = transformers.AutoModel.from_config(config, **trust).to(dtype)
        return cls(encoder, geometry, layer, levels)

    @classmethod
    def _check_grid(cls, config, geometry: dict, path: str, **trust: bool) -> None:
        """Raise ValueError unless the model of a configuration returns a grid of patches from every block.

        It runs on the meta device, without weights.
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

    def _resize(self, before: tuple[int, int]) -> None:
        self.geometry = {**self.geometry, "image_size": list(self.image_size)}
        # Only some classes need this argument; DINOv2 always interpolates.
        takes_flag = "interpolate_pos_encoding" in inspect.signature(self.encoder.forward).parameters
        resized = self.image_size != _pair(self.encoder.config.image_size)
        self._options = {"interpolate_pos_encoding": True} if takes_flag and resized else {}

    def forward(self, images: Tensor) -> VisionFeatures:
        out = self.encoder(images, output_hidden_states=True, **self._options)
        return self._as_features(lambda layer: out.hidden_states[layer])

    @property
    def architecture(self) -> dict:
        config = json.loads(self.encoder.config.to_json_string(use_diff=False))
        return {"hf": {key: value for key, value in config.items() if key not in _PROVENANCE}}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
        self.encoder.save_pretrained(folder, state_dict=state)
        (folder / "vlmtrain.json").write_text(
            json.dumps({"layer": self.layer, "levels": self.levels, "geometry": self.geometry}, indent=2) + "\n"
        )

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> HFVision:
        saved = read_object(folder / "vlmtrain.json")
        load_hf_config(str(folder), "vision", trust_remote_code)
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        encoder = load_hf_model("AutoModel", str(folder), is_ours=True, **options)
        try:
            return cls(encoder, saved["geometry"], saved["layer"], saved["levels"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder / 'vlmtrain.json'} does not fit the encoder: {first_line(error)}") from None


def _preprocessor_size(preprocessor: dict) -> int | None:
    for key in ("crop_size", "size"):
        size = preprocessor.get(key)
        if isinstance(size, dict) and "height" in size:
            return [size["height"], size["width"]]
        if isinstance(size, int) and preprocessor.get("do_center_crop", True):
            return size
    return None


def build_vision(provider: str, dtype: torch.dtype = torch.float32, weights: bool = True, **options) -> VisionEncoder:
    """Build the encoder of `provider` (``open_clip`` or ``hf``).

    weights: False skips loading published weights, to inspect sizes (best under ``torch.device("meta")``).
    """
    if provider == "hf":
        return HFVision.build(**options, dtype=dtype, weights=weights)
    if not weights:
        options["pretrained"] = None
    return OpenClipVision.build(**options).to(dtype)


def load_vision(folder: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> VisionEncoder:
    """Load an encoder that was written by `VisionEncoder.save`."""
    if (folder / "vlmtrain.json").exists():
        return HFVision.from_folder(folder, dtype, trust_remote_code)
    return OpenClipVision.from_folder(folder, dtype)
