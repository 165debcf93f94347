"""`vss`: a Mamba layer that scans the patches in several directions (VL-Mamba, 2024)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .base import Connector, VisionFeatures
from .checks import require_choice, require_grid, require_positive
from .layers import mlp

CHUNK = 64  # number of positions whose states are kept at once for the backward pass


def selective_scan(x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """h_t = exp(step_t a) h_{t-1} + step_t b_t x_t; y_t = c_t . h_t (Mamba, section 3.2), in float32.

    x and step ``(B, T, D)``, a ``(D, S)``, b and c ``(B, T, S)`` -> ``(B, T, D)``.
    """
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for piece in zip(*(tensor.split(CHUNK, dim=1) for tensor in (x, step, b, c)), strict=True):
        # States are recomputed in the backward pass: a state is S times as large as its output.
        output, state = checkpoint(_scan_chunk, state, a, *piece, use_reentrant=False, preserve_rng_state=False)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def _scan_chunk(state: Tensor, a: Tensor, x: Tensor, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(step[:, t, :, None] * a)
        state = decay * state + (step[:, t] * x[:, t])[:, :, None] * b[:, t, None]
        outputs.append((state @ c[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=1), state


class MambaMixer(nn.Module):
    """One Mamba layer (Mamba, 2023, section 3.4; names and initialization of the published code).

    ``(B, T, dim)`` -> ``(B, T, dim)``, causal along T.
    """

    def __init__(self, dim: int, state_size: int, expand: int, kernel: int):
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.sizes = (rank, state_size, state_size)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel, padding=kernel - 1, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state_size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():  # initial steps are log-uniform between 0.001 and 0.1
            step = torch.exp(torch.rand(inner) * math.log(0.1 / 0.001) + math.log(0.001)).clamp(min=1e-4)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        length = x.shape[1]
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :length].transpose(1, 2))
        step, b, c = self.x_proj(x).split(self.sizes, dim=-1)
        step = F.softplus(self.dt_proj(step)).float()
        y = selective_scan(x.float(), step, -torch.exp(self.A_log.float()), b.float(), c.float())
        y = (y + x.float() * self.D.float()) * F.silu(gate.float())
        return self.out_proj(y.to(x.dtype))


def scan_orders(height: int, width: int, scan: str, device: torch.device | None = None) -> Tensor:
    """Raster indices in the order of each scan: ``(2 or 4, height*width)``.

    bidirectional: along rows, forwards and backwards. cross: along rows and along columns, each in both directions.
    """
    raster = torch.arange(height * width, device=device)
    orders = [raster]
    if scan == "cross":
        orders.append(raster.reshape(height, width).T.flatten())
    return torch.stack([order for forward in orders for order in (forward, forward.flip(0))])


class VSS(Connector):
    """Vision selective scan (VL-Mamba, arXiv 2403.13600, section 3.2).

    ``(B, H, W, in_dim)`` -> ``(B, H*W, out_dim)``. head=l2 (VSS-L2): a = linear(x), then
    linear(norm(scan(gelu(a)) + a)), with width `hidden_size` (None: out_dim). head=mlp (VSS-MLP): a two-layer MLP
    over norm(scan(x) + x), where the scan has the width of the features. scan=bidirectional (BSM) or cross (CSM).

    No code is published. Choices where the paper does not specify: LayerNorm; one Mamba layer shared by all directions
    (the paper says "one mamba layer"); the directions are summed, as in VMamba; the Mamba layer uses Mamba's
    defaults (16 states, expansion 2, convolution of 4).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        head: str = "l2",
        scan: str = "bidirectional",
        hidden_size: int | None = None,
        state_size: int = 16,
        expand: int = 2,
        kernel: int = 4,
    ):
        super().__init__(in_dim, out_dim)
        require_choice(head, ("l2", "mlp"), "head")
        require_choice(scan, ("bidirectional", "cross"), "scan")
        hidden_size = out_dim if hidden_size is None else hidden_size
        require_positive(hidden_size=hidden_size, state_size=state_size, expand=expand, kernel=kernel)
        self.scan = scan
        dim = hidden_size if head == "l2" else in_dim
        self.proj = nn.Linear(in_dim, dim) if head == "l2" else None
        self.mixer = MambaMixer(dim, state_size, expand, kernel)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim) if head == "l2" else mlp([dim, hidden_size, out_dim])

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        require_grid(height, width)
        return height, width

    def scanned(self, x: Tensor, height: int, width: int) -> Tensor:
        """Apply all scans to ``(B, H*W, C)``, restore raster order and sum them."""
        orders = scan_orders(height, width, self.scan, x.device)
        y = self.mixer(x[:, orders].flatten(0, 1)).unflatten(0, (len(x), len(orders)))
        back = orders.argsort(dim=1)[None, :, :, None].expand_as(y)
        return y.gather(2, back).sum(1)

    def forward(self, features: VisionFeatures) -> Tensor:
        patches = self.check(features)
        grid, x = patches.shape[1:3], patches.flatten(1, 2)
        if self.proj is None:
            return self.head(self.norm(self.scanned(x, *grid) + x))
        x = self.proj(x)
        return self.head(self.norm(self.scanned(F.gelu(x), *grid) + x))
