"""Building blocks that several connectors share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .base import Features

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


def mlp(widths: list[int], activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear layers with the given `widths` and an activation between consecutive layers."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for before, after in zip(widths[1:], widths[2:], strict=False):
        layers += [activation(), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def blocks(x: Tensor, height: int, width: int | None = None) -> Tensor:
    """Cut a raster grid into blocks of `height` x `width` patches, squares by default; raster order within each.

    ``(B, H, W, C)`` -> ``(B, H / height, W / width, height * width, C)``.
    """
    width = height if width is None else width
    return x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3).flatten(3, 4)


def each_image(function: Callable[[Tensor], Tensor], x: Tensor, grids: Sequence[tuple[int, int]] | None) -> Tensor:
    """Apply `function`, ``(B, H, W, C)`` -> ``(B, n, ...)``, to a batch; or, if `grids` are given, to each image.

    The images are then packed as in `PackedFeatures`, ``(N, C)``, and so are the results, ``(K, ...)``.
    """
    if grids is None:
        return function(x)
    images = x.split([height * width for height, width in grids])
    return torch.cat([function(image.unflatten(0, grid)[None])[0] for image, grid in zip(images, grids, strict=True)])


def padded(x: Tensor, grids: Sequence[tuple[int, int]] | None) -> tuple[Tensor, Tensor | None]:
    """Return one sequence of patches per image, ``(B, S, C)``, and a mask ``(B, S)`` that is True at patches.

    x is ``(B, H, W, C)``, or ``(N, C)`` packed with its `grids`. The mask is None if all sequences are equally long.
    """
    if grids is None:
        return x.flatten(1, 2), None
    lengths = [height * width for height, width in grids]
    x = pad_sequence(x.split(lengths), batch_first=True)
    if min(lengths) == max(lengths):
        return x, None
    return x, torch.arange(max(lengths), device=x.device) < torch.tensor(lengths, device=x.device)[:, None]


def sequences(features: Features) -> tuple[Tensor, Tensor | None]:
    """Concatenate prefix and patches of each image, ``(B, S, C)``, with the mask of `padded`."""
    x, real = padded(features.patches, features.grids)
    if features.prefix is None:
        return x, real
    x = torch.cat([features.prefix, x], dim=1)
    return x, None if real is None else F.pad(real, (features.prefix.shape[1], 0), value=True)


class Attention(nn.Module):
    """Multi-head attention with separate projections, ``num_heads`` heads of ``head_dim``.

    q ``(B, T, q_dim)``, k and v ``(B, S, kv_dim)`` -> ``(B, T, out_dim)``. `mask` is boolean, True where
    attention is allowed, broadcastable to ``(B, num_heads, T, S)``. qk_norm: whether the queries and keys of each head
    pass through LayerNorm.
    """

    def __init__(
        self,
        q_dim: int,
        kv_dim: int,
        num_heads: int,
        head_dim: int,
        out_dim: int,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
    ):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.head_dim, self.dropout = num_heads, head_dim, dropout
        self.q = nn.Linear(q_dim, inner, bias=bias)
        self.k = nn.Linear(kv_dim, inner, bias=bias)
        self.v = nn.Linear(kv_dim, inner, bias=bias)
        self.out = nn.Linear(inner, out_dim, bias=bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (self.q(q), self.k(k), self.v(v))
        )
        dropout = self.dropout if self.training else 0.0
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(x.transpose(1, 2).flatten(2))


# Names of the parts of `Attention` in torch's nn.MultiheadAttention, which packs q, k and v into one matrix.
MULTIHEAD_ATTENTION = ((r"attn\.[qkv]\.(weight|bias)", r"attn.in_proj_\1"), (r"attn\.out\.", "attn.out_proj."))


def init_multihead_attention(attention: Attention) -> None:
    """Initialize as nn.MultiheadAttention does: Xavier over q, k and v as one matrix; biases are zero."""
    width, fan_in = attention.q.weight.shape
    bound = (6 / (3 * width + fan_in)) ** 0.5
    for projection in (attention.q, attention.k, attention.v):
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)


def init_linears(module: nn.Module, std: float = 0.02, truncated: bool = False) -> None:
    """Initialize all linear layers: normal with `std`, or truncated at +-2 if `truncated` (as in timm); zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            (nn.init.trunc_normal_ if truncated else nn.init.normal_)(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Sequential):
    """Convolution without bias (size-preserving at stride 1), LayerNorm2d, and an optional activation."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = None,
    ):
        convolution = nn.Conv2d(in_dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, LayerNorm2d(out_dim), *([activation()] if activation else []))


class SqueezeExcite(nn.Module):
    """Scale each channel of ``(B, C, H, W)`` by a gate that is computed from the channel means."""

    def __init__(self, dim: int, hidden_dim: int, activation: type[nn.Module], gate: type[nn.Module]):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc1(x.mean((2, 3), keepdim=True))
        return x * self.gate(self.fc2(self.activation(scale)))


def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine table ``(height*width, dim)``; the first half encodes the column (MAE's code)."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (height, width)), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
