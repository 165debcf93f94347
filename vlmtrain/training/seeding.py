"""Random numbers that depend on their purpose alone."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*key: object) -> None:
    """Seed torch for one purpose, so that what comes before does not shift it."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
