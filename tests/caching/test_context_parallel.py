"""Caches under diffusers' Ulysses context parallelism, over two CPU processes."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from typing import Any

import pytest
import torch

# Gates that compare shards, gates that don't, and other engines.
CACHES = (
    *("first_block_cache", "teacache", "easycache", "magcache", "seacache", "profiling_cache"),
    *("pab", "unconditional_cache"),
)


def _work(rank: int, port: int, results: Any) -> None:
    try:
        results.put((rank, _generate(rank, port)))
    except BaseException:
        results.put((rank, traceback.format_exc()))  # or the test would wait in vain
        raise


def _generate(rank: int, port: int) -> dict[str, Any]:
    import torch.distributed as dist
    from cache_subjects import ACTIVE, Subject, marks
    from diffusers import ContextParallelConfig

    from dit_accel import accelerate_pipeline, acceleration_report

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]  # diffusers divides by it
    found: dict[str, Any] = {}
    for name in ("wan", "flux"):
        for cache in CACHES:
            subject = Subject(name)
            if name == "wan":
                subject.arguments |= {"max_sequence_length": 32}  # older diffusers split the text
            else:
                subject.arguments |= {"max_sequence_length": 34}  # both ranks get as many tokens
                subject.arguments |= {"height": 256, "width": 256}
            options = ACTIVE[cache]
            if cache == "first_block_cache":
                # A threshold amid the distances, so that ranks that judged alone would part.
                options = {"threshold": 0.12 if name == "wan" else 0.3, "last_steps": 0}
            accelerate_pipeline(subject.pipe, cache, **options)
            branch = "uncond" if cache == "unconditional_cache" else "cond"
            alone = subject.run()
            expected = marks(acceleration_report(subject.pipe), branch)
            parallel = ContextParallelConfig(ulysses_degree=2)
            subject.pipe.transformer.enable_parallelism(config=parallel)
            shared = subject.run()
            decided = marks(acceleration_report(subject.pipe), branch)
            error = float((shared - alone).abs().max())
            found[f"{name} {cache}"] = (expected, decided, error)
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_two_ranks_decide_alike_and_give_the_same_picture():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_work, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        found = dict(results.get(timeout=300) for _ in ranks)
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    assert not any(isinstance(result, str) for result in found.values()), found
    for name, (expected, decided, error) in found[0].items():
        assert decided == expected == found[1][name][1], name
        assert "." in decided, name
        assert error < 1e-4, (name, error)
