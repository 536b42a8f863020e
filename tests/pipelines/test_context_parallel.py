"""Diffusers' Ulysses context parallelism over two CPU processes."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from typing import Any

import pytest
import torch

GNA = {"window": (1.0, 0.4, 0.4), "block_size": 16, "dense_steps": 0, "min_tokens": 0}


def _work(rank: int, port: int, results: Any) -> None:
    try:
        _generate(rank, port, results)
    except BaseException:
        results.put(traceback.format_exc())  # or the test would wait for a result in vain
        raise


def _generate(rank: int, port: int, results: Any) -> None:
    import torch.distributed as dist
    from diffusers import ContextParallelConfig
    from tiny_pipelines import TINY_PIPELINES, run_tiny

    from dit_accel import accelerate_pipeline, acceleration_report

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]  # diffusers divides by it
    build, arguments = TINY_PIPELINES["wan"]
    arguments = arguments | {"max_sequence_length": 32}  # older diffusers split the text too
    pipe = build()
    accelerate_pipeline(pipe, "gna", **GNA)
    alone = run_tiny(pipe, arguments)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    shared = run_tiny(pipe, arguments)
    report = acceleration_report(pipe)

    build, arguments = TINY_PIPELINES["flux"]
    joint = build()
    joint.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    accelerate_pipeline(joint, "gna", **GNA)
    try:
        run_tiny(joint, arguments)
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    if rank == 0:
        error = float((shared - alone).abs().max())
        results.put((error, report.sparse_density, list(report.notes), refused))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ulysses_gives_the_same_video_and_joint_text_is_refused():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_work, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        result = results.get(timeout=300)
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    assert not isinstance(result, str), result
    error, density, notes, refused = result
    assert error < 1e-5
    assert density < 1
    assert any("context parallelism" in note for note in notes)
    assert refused.startswith("ContextParallelError")
