"""Initializes the process group with DeepSpeed, for the ranks of torchrun or a single process."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from packaging.version import Version

from ...distributed.world import World, prepare_process

KNOWN_DEEPSPEED = ("0.19.8", "0.20")  # from the first (inclusive) to the second (exclusive)


def join_world(timeout: float = 3600.0) -> World:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    timeout: maximum time in seconds that a rank waits for the others.
    """
    has_gpu = prepare_process()
    if "RANK" not in os.environ:  # torch selects a free port for port 0
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import deepspeed

    check_version(deepspeed.__version__)
    if not has_gpu:
        # gloo is sufficient: the shared-memory kernel would take a minute to compile
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    _rejoin_after_restart("nccl" if has_gpu else "gloo", device, limit)
    deepspeed.init_distributed(dist_backend="nccl" if has_gpu else "gloo", verbose=False, timeout=limit)
    return World(dist.get_rank(), dist.get_world_size(), device)


def check_version(version: str) -> None:
    """Raise ValueError for a DeepSpeed version whose private attributes may differ from those that this folder uses.

    The state of ZeRO-1 and 2 is read from ``_hp_mapping`` and ``_dp_group`` of parameters, that of ZeRO-3 from their
    ``ds_shape``, ``ds_tensor`` and ``ds_process_group``, and from ``sub_group_to_group_id`` and
    ``fp32_partitioned_groups_flat`` of the optimizer. There is no public API for them.
    """
    first, end = map(Version, KNOWN_DEEPSPEED)
    if not first <= Version(version) < end:
        raise ValueError(
            f"DeepSpeed {version} is installed: expected at least {first} and below {end}, as vlmtrain uses private "
            f"attributes of it; pip install 'deepspeed>={first},<{end}'"
        )


def _rejoin_after_restart(backend: str, device: torch.device, timeout: timedelta) -> None:
    """After a restart by torchrun on a single node, form the process group under a new prefix of the store.

    torchrun keeps its store across restarts, and with it the addresses of dead ranks (PyTorch issue 135712). With
    several nodes, each counts its own restarts; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun open a new
    store.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not attempt or not shared or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    options = {"device_id": device} if device.type == "cuda" and size > 1 else {}
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, **options)
