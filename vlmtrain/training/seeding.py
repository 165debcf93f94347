"""Random seeds that depend only on their purpose."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*key: object) -> None:
    """Seed torch for one purpose, independently of random numbers drawn before."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
