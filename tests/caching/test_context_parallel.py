"""Caches under diffusers' Ulysses context parallelism, over two CPU processes."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks

# Gates that compare shards, gates that don't, and other engines.
CACHES = (
    *("first_block_cache", "teacache", "easycache", "magcache", "seacache", "profiling_cache"),
    *("pab", "unconditional_cache"),
)


def _generate() -> dict[str, Any]:
    from cache_subjects import ACTIVE, Subject, marks
    from diffusers import ContextParallelConfig

    from dit_accel import accelerate_pipeline, acceleration_report

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
    return found


@pytest.mark.slow
def test_two_ranks_decide_alike_and_give_the_same_picture():
    found = run_ranks(_generate)
    assert not any(isinstance(result, str) for result in found), found
    for name, (expected, decided, error) in found[0].items():
        assert decided == expected == found[1][name][1], name
        assert "." in decided, name
        assert error < 1e-4, (name, error)
