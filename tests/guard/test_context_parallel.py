"""The guard under diffusers' Ulysses context parallelism, over two CPU processes."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
import warnings
from typing import Any

import pytest
import torch

GNA = {"window": (1.0, 0.4, 0.4), "block_size": 16, "dense_steps": 0, "min_tokens": 0}


def _work(rank: int, port: int, results: Any) -> None:
    try:
        results.put((rank, _generate(rank, port)))
    except BaseException:
        results.put((rank, traceback.format_exc()))  # or the test would wait in vain
        raise


def _decisions(pipe: Any) -> list[tuple[Any, ...]]:
    from dit_accel import acceleration_report

    report = acceleration_report(pipe)
    shares = [(call.step, call.layer, call.reason, call.repaired) for call in report.calls]
    return [(r.step, r.layer, r.tripped, r.dense) for r in report.guard.records] + shares


def _generate(rank: int, port: int) -> dict[str, Any]:
    import torch.distributed as dist
    from diffusers import ContextParallelConfig
    from tiny_pipelines import TINY_PIPELINES, run_tiny

    from dit_accel import QualityGuard, accelerate_pipeline, acceleration_report

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]  # diffusers divides by it
    build, arguments = TINY_PIPELINES["wan"]
    arguments = arguments | {"max_sequence_length": 32}  # older diffusers split the text too
    pipe = build()
    accelerate_pipeline(pipe, "gna", **GNA, guard=QualityGuard(action="report", every=2))
    run_tiny(pipe, arguments)
    errors = sorted(e for r in acceleration_report(pipe).guard.records for e in r.errors)
    # Between two errors, so that rounding does not decide, and one rank's head trips alone.
    middle = len(errors) // 2
    amid = (errors[middle - 1] + errors[middle]) / 2
    accelerate_pipeline(pipe, "gna", **GNA, guard=QualityGuard(max_error=amid, every=2))
    alone = run_tiny(pipe, arguments)
    expected = _decisions(pipe)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    shared = run_tiny(pipe, arguments)
    found = {
        "expected": expected,
        "decided": _decisions(pipe),
        "error": float((shared - alone).abs().max()),
    }
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_two_ranks_decide_alike_for_all_heads():
    """Each rank attends with one of the two heads, and knows of both."""
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
    for result in found.values():
        assert not isinstance(result, str), result
        assert result["decided"] == result["expected"]
        assert result["error"] < 1e-5
    tripped = [row[2] for row in found[0]["expected"] if isinstance(row[2], tuple)]
    assert (0,) in tripped or (1,) in tripped, "a head of one rank alone"
