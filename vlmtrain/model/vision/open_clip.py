"""Vision encoders of open_clip."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MethodType

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ...connectors import VisionFeatures
from ...errors import first_line, nearest, some
from ...visual import Size
from .base import VisionEncoder, as_size, block_index


class OpenClipVision(VisionEncoder):
    """The image tower of an open_clip model: its own ViT, or a timm model (SigLIP, EVA, ConvNeXt).

    The blocks of a ConvNeXt, or of another timm model with stages, are its stages. Their grids differ: `patch_size`,
    which is the stride, and `width` are those of the stage whose output is returned.
    """

    provider = "open_clip"

    def __init__(self, visual: nn.Module, config: dict, layer: int, levels: Sequence[int] | None = None):
        super().__init__()
        self.visual = visual
        self.config = config
        self.image_size = as_size(config["vision_cfg"]["image_size"])
        self.image_mean = tuple(config["image_mean"])
        self.image_std = tuple(config["image_std"])
        trunk = getattr(visual, "trunk", visual)
        self.block_path, self._shapes = _blocks(visual, self.image_size)
        self.num_blocks = len(self._shapes)
        self.set_layers(layer, levels)
        # The tensors of a trunk (class token, position table) may be used only inside its forward: under ZeRO-3
        # they are gathered there and nowhere else. So its forward is replaced by the intermediate-features pass.
        self._is_timm = trunk is not visual
        trunk.forward = trunk.forward_intermediates
        if not self._is_timm:
            visual._embeds = MethodType(_embeds, visual)
        self._let_interpolate()

    @classmethod
    def build(
        cls,
        name: str | None = None,
        pretrained: str | None = None,
        model_config: dict | None = None,
        image_size: int | Size | None = None,
        layer: int = -2,
        levels: Sequence[int] | None = None,
        weights: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> OpenClipVision:
        """Build an open_clip image tower.

        name: an open_clip model name; alternatively, pass `model_config` (open_clip's own schema).
        pretrained: an open_clip weights tag or a file; None means random weights.
        image_size: in pixels; if it differs from the model's own size, the position table is interpolated.
        """
        import open_clip
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        pretrained = pretrained if weights else None
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
            return encoder.to(dtype)
        try:
            config = open_clip.get_model_config(name)
        except Exception as error:  # for hf-hub: and local-dir: names that cannot be read
            raise ValueError(f"vision.name={name}: open_clip cannot read its config: {first_line(error)}") from None
        if config is None:
            raise ValueError(f"vision.name={name} is not an open_clip model.{nearest(name, open_clip.list_models())}")
        own = as_size(config["vision_cfg"]["image_size"])
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
        config["vision_cfg"]["image_size"] = list(as_size(model.visual.image_size))
        config["quick_gelu"] = any(type(m).__name__ == "QuickGELU" for m in model.visual.modules())
        preprocess = open_clip.get_model_preprocess_cfg(model)
        config |= {"image_mean": list(preprocess["mean"]), "image_std": list(preprocess["std"])}
        encoder = cls(model.visual, config, layer, levels)
        if encoder.image_size != own:
            encoder._check_geometry()
        return encoder.to(dtype)

    @staticmethod
    def _build_visual(config: dict) -> nn.Module:
        from open_clip.model import _build_vision_tower

        options = dict(config["vision_cfg"])
        visual = _build_vision_tower(config["embed_dim"], options, config.get("quick_gelu", False))
        if hasattr(getattr(visual, "trunk", None), "set_input_size"):
            visual.set_input_size(as_size(options["image_size"]))
        return visual

    def set_layers(self, layer: int, levels: Sequence[int] | None) -> None:
        super().set_layers(layer, levels)
        shape, *others = (self._shapes[block_index(each, self.num_blocks)] for each in (self.layer, *self.levels))
        self.width, self.patch_size = shape
        if any(other != shape for other in others):
            grids = "; ".join(f"{width} channels at a stride of {stride[0]}" for width, stride in self._shapes)
            raise ValueError(
                f"the levels {self.levels} do not have the grid and width of vision.layer={layer}: the stages of "
                f"{type(self.visual.trunk).__name__} have {grids}. Use a ViT, or a connector that reads no levels"
            )

    def forward(self, images: Tensor) -> VisionFeatures:
        blocks = sorted({block_index(layer, self.num_blocks) for layer in (self.layer, *self.levels)})
        options = {"indices": blocks, "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"}
        if self.has_stages:
            found = self.visual.trunk(images, **{**options, "output_fmt": "NCHW"})
            states = [state.flatten(2).mT.contiguous() for state in found]
        elif self._is_timm:
            found = self.visual.trunk(images, return_prefix_tokens=True, **options)
            states = [torch.cat(state[::-1], 1) if isinstance(state, tuple) else state for state in found]
        else:
            out = self.visual(images, output_extra_tokens=True, **options)
            pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"])
            states = [torch.cat(pair, 1) for pair in pairs]
        by_block = dict(zip(blocks, states))
        return self.as_features(lambda layer: by_block[block_index(layer, self.num_blocks)], images)

    @property
    def has_stages(self) -> bool:
        return self.block_path.endswith(".stages")

    def _let_interpolate(self) -> None:
        """Make a ViT of timm interpolate its position table for images of other sizes, as ``dynamic_img_size`` does."""
        trunk = self.visual.trunk if self._is_timm else None
        if hasattr(trunk, "dynamic_img_size") and getattr(trunk, "rope", None) is None:
            from timm.layers import Format

            trunk.dynamic_img_size, embed = True, trunk.patch_embed
            embed.flatten, embed.output_fmt = False, Format.NHWC
            embed.img_size = None  # sizes are not checked: an incomplete edge is ignored

    def _resize(self, before: Size) -> None:
        self.config = copy.deepcopy(self.config)
        self.config["vision_cfg"]["image_size"] = list(self.image_size)
        if self.has_stages:
            return
        if self._is_timm:
            self.visual.trunk.set_input_size(self.image_size)
            self._let_interpolate()
            return
        old, table = self.grid_of(before), self.visual.positional_embedding
        resized = _resized(table.data, old, self.grid)
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

    def describe(self) -> dict:
        return {"layer": self.layer, "levels": self.levels, "model_config": self.config}

    @classmethod
    def from_description(cls, saved: Mapping) -> OpenClipVision:
        visual = cls._build_visual(saved["model_config"])
        return cls(visual, saved["model_config"], saved["layer"], saved["levels"])


def _blocks(visual: nn.Module, image_size: Size) -> tuple[str, list[tuple[int, Size]]]:
    """Path of the blocks of a tower, and of each the width and the patch size, or stride, of its output.

    Raises ValueError for a tower without a grid.
    """
    trunk = getattr(visual, "trunk", visual)
    if hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed"):
        return "visual.trunk.blocks", [(trunk.embed_dim, as_size(trunk.patch_embed.patch_size))] * len(trunk.blocks)
    if hasattr(visual, "transformer"):
        blocks = visual.transformer
        return "visual.transformer.resblocks", [(blocks.width, as_size(visual.patch_size))] * len(blocks.resblocks)
    try:
        return "visual.trunk.stages", _stage_shapes(trunk, image_size)
    except Exception as error:  # models of other kinds can raise anything
        raise ValueError(
            f"open_clip's {type(trunk).__name__} has no patch grid ({first_line(error)}): use a ViT or a ConvNeXt"
        ) from None


def _stage_shapes(trunk: nn.Module, image_size: Size) -> list[tuple[int, Size]]:
    """Width and stride of each stage of a timm model, held to what its stages return.

    It runs on the meta device, without weights.
    """
    shapes = [(found["num_chs"], as_size(found["reduction"])) for found in trunk.feature_info]
    trunk.forward = trunk.forward_intermediates
    tensors = {name: each.to("meta") for name, each in (*trunk.named_parameters(), *trunk.named_buffers())}
    images = torch.empty(1, 3, *image_size, device="meta", dtype=next(trunk.parameters()).dtype)
    with torch.no_grad():
        found = functional_call(trunk, tensors, images, {"intermediates_only": True, "output_fmt": "NCHW"})
    returned = [tuple(state.shape[1:]) for state in found]
    if len(trunk.stages) != len(shapes) or returned != [
        (width, image_size[0] // stride[0], image_size[1] // stride[1]) for width, stride in shapes
    ]:
        raise ValueError(f"its stages return {returned}")
    return shapes


def _resized(table: Tensor, old: Size, new: Size) -> Tensor:
    """A position table ``(P + H*W, C)`` whose grid `old` is interpolated to `new`; the first P rows are unchanged."""
    prefix, patches = table.split([len(table) - old[0] * old[1], old[0] * old[1]])
    patches = patches.float().unflatten(0, old).permute(2, 0, 1)[None]
    patches = F.interpolate(patches, new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, patches[0].flatten(1).T.to(prefix.dtype)])


def _embeds(visual: nn.Module, images: Tensor) -> Tensor:
    """Embed images of any size, as open_clip's ViT embeds those of its own size.

    It replaces a method of the tower, because under ZeRO-3 its tensors may be used only inside its forward.
    """
    x = visual.conv1(images)
    grid, table = x.shape[2:], visual.positional_embedding
    x = x.reshape(*x.shape[:2], -1).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding.view(1, 1, -1).expand(len(x), -1, -1).to(x.dtype), x], dim=1)
    if tuple(grid) != tuple(visual.grid_size):
        table = _resized(table, visual.grid_size, grid)
    return visual.ln_pre(visual.patch_dropout(x + table.to(x.dtype)))


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
