"""One rank's end is the end of all, soon and with one message."""

from __future__ import annotations

import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from ranks import PATIENCE_S, free_port


def _generate(rank: int, port: int, how: str, results: Any) -> None:
    import torch.distributed as dist
    from tiny_pipelines import TINY_PIPELINES, run_tiny

    from dit_accel import accelerate_pipeline, parallelize_pipeline
    from dit_accel.parallel.launch import together

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE_S)
    )
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(pipe, "gna", window=(1.0, 0.4, 0.4), block_size=16, min_tokens=0)
    parallelize_pipeline(pipe, ulysses=2, timeout_s=20)

    def fail(_pipe: Any, step: int, _time: Any, kwargs: Any) -> Any:
        if rank == 1 and step == 1:
            if how == "killed":
                os._exit(9)
            raise ValueError("no more")
        return kwargs

    try:
        with together():
            run_tiny(pipe, arguments, callback_on_step_end=fail)
        results.put((rank, "went through"))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    results.close()
    results.join_thread()
    os._exit(1)  # as a process that was left alone: nothing to say goodbye to


def _messages(how: str) -> tuple[dict[int, str], list[int | None]]:
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_generate, args=(rank, port, how, results)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        found = dict(results.get(timeout=PATIENCE_S) for _ in range(1 if how == "killed" else 2))
    finally:
        for process in ranks:
            process.join(PATIENCE_S)
            process.kill()
    return found, [process.exitcode for process in ranks]


@pytest.mark.slow
def test_a_killed_rank_ends_the_other():
    found, codes = _messages("killed")
    assert found[0].startswith("ContextParallelError: another rank has ended")
    assert codes == [1, 9]


@pytest.mark.slow
def test_a_failed_rank_ends_the_other_with_its_message():
    found, codes = _messages("raised")
    assert found[1] == "ValueError: no more"
    assert found[0].startswith("RankFailedError")
    assert "rank 1: ValueError: no more" in found[0]
    assert codes == [1, 1]
