"""Runs a function in several gloo processes on the CPU and collects what each returns."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

PATIENCE_S = 600


def start(rank: int, count: int, port: int, seconds: float = PATIENCE_S) -> None:
    """Join the processes' group; diffusers divides by the number of accelerators."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    patience = timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=count, timeout=patience
    )
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]


def _work(function: Callable[[], Any], rank: int, count: int, port: int, results: Any) -> None:
    import torch.distributed as dist

    try:
        start(rank, count, port)
        found = function()
        dist.barrier()
        results.put((rank, found))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))  # or the test would wait in vain
        raise


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(function: Callable[[], Any], count: int = 2) -> list[Any]:
    """Return what ``function()`` returns on each rank; a string is a traceback."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_work, args=(function, rank, count, port, results))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    try:
        found = dict(results.get(timeout=PATIENCE_S) for _ in ranks)
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    return [found[rank] for rank in range(count)]
