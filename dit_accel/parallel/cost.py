"""What a denoising step costs over many GPUs, on paper: pairs, bytes, imbalance and time.

One block of the model at a time. Ulysses exchanges are waited for. A ring passes keys and values on
while it attends, so a step of it takes the longer of the two; its last step passes nothing. What is
not attention works token by token, and is divided evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dit_accel.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs and what connects them.

    Attributes:
        node_ranks: GPUs of a node.
        inside_bytes_s: bytes a second that a GPU sends to others of its node.
        between_bytes_s: bytes a second that a GPU sends to another node.
        memory_bytes_s: bytes a second that a GPU reads or writes.
        latency_s: seconds that an exchange takes however small it is.
    """

    node_ranks: int = 8
    inside_bytes_s: float
    between_bytes_s: float
    memory_bytes_s: float
    latency_s: float = 30e-6


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One forward on one GPU.

    Attributes:
        tokens: of the sequence.
        heads: of a layer.
        head_size: channels of a head.
        blocks: of the model.
        density: share of the (query, key) pairs that are attended to.
        attention_s: seconds of attention in a block on one GPU.
        other_s: seconds of the rest of a block.
        beside_s: seconds of a forward beside its blocks, which all ranks spend.
        block_size: tokens that stay together on a ring.
        element_bytes: of a number.
    """

    tokens: int
    heads: int
    head_size: int
    blocks: int
    density: float
    attention_s: float
    other_s: float
    beside_s: float = 0.0
    block_size: int = 128
    element_bytes: int = 2

    @property
    def forward_s(self) -> float:
        """Seconds of the forward on one GPU."""
        return self.beside_s + self.blocks * (self.attention_s + self.other_s)

    @property
    def layer_bytes(self) -> float:
        """Bytes of all tokens' queries (or keys, values, outputs) in one layer."""
        return float(self.tokens * self.heads * self.head_size * self.element_bytes)


@dataclass(frozen=True)
class Cost:
    """One forward over several GPUs.

    Attributes:
        pairs: (query, key) pairs that the busiest rank attends to in a block, over its heads.
        ulysses_bytes: bytes that a rank sends in a block to exchange heads for tokens.
        ring_bytes: bytes that a rank sends in a block around the ring.
        imbalance: how much more than the mean the busiest rank attends to.
        exchange_s: seconds of a block in which a rank waits for others, or copies for them.
        merge_s: seconds of a block in which it merges what it attended to.
        forward_s: seconds of the forward.
        efficiency: share of the ideal speed-up.
    """

    pairs: float
    ulysses_bytes: float
    ring_bytes: float
    imbalance: float
    exchange_s: float
    merge_s: float
    forward_s: float
    efficiency: float


def cost_of(
    work: Workload, machine: Machine, *, ulysses: int = 1, ring: int = 1, imbalance: float = 0.0
) -> Cost:
    """Predict one forward.

    Args:
        work: what it costs on one GPU.
        machine: the GPUs.
        ulysses: ranks that share the heads; neighbours, so in one node if they fit into it.
        ring: parts of the sequence.
        imbalance: of the dealt-out plan, beside what blocks that don't divide evenly cause.

    Raises:
        OptionError: if the heads, or the blocks of tokens, can't be divided so.
    """
    if work.heads % ulysses:
        raise OptionError(f"{work.heads} heads can't be shared by {ulysses} ranks.")
    units = math.ceil(work.tokens / work.block_size)
    if units < ring:
        raise OptionError(f"{units} blocks of tokens are too few for {ring} ring parts.")
    ranks = ulysses * ring
    imbalance = (1 + imbalance) * math.ceil(units / ring) * ring / units - 1
    share_bytes = work.layer_bytes / ranks
    sent_heads = 4 * share_bytes * (ulysses - 1) / ulysses
    sent_ring = 2 * share_bytes * (ring - 1)
    attention_s = work.attention_s / ranks * (1 + imbalance)

    exchange_s = 0.0
    if ulysses > 1:
        speed = _speed(machine, ulysses <= machine.node_ranks)
        copies = 4 * 2 * share_bytes / machine.memory_bytes_s  # each is read and written once
        exchange_s += sent_heads / speed + copies + 4 * machine.latency_s
    merge_s = 0.0
    if ring > 1:
        speed = _speed(machine, ranks <= machine.node_ranks)
        passing_s = 2 * share_bytes / speed + machine.latency_s
        exchange_s += (ring - 1) * max(0.0, passing_s - attention_s / ring)
        # A sum in float32 is read and written, and what comes is read; the first and last are
        # shorter.
        exchange_s += 2 * 2 * share_bytes / machine.memory_bytes_s  # keys and values side by side
        merge_s = (ring - 1) * 2.5 * 2 * share_bytes / machine.memory_bytes_s
    block_s = attention_s + work.other_s / ranks + exchange_s + merge_s
    forward_s = work.beside_s + work.blocks * block_s
    pairs = work.density * work.tokens**2 * work.heads / ranks * (1 + imbalance)
    efficiency = work.forward_s / (ranks * forward_s)
    return Cost(pairs, sent_heads, sent_ring, imbalance, exchange_s, merge_s, forward_s, efficiency)


def splits(ranks: int, heads: int, node_ranks: int = 8) -> dict[str, tuple[int, int]]:
    """Return (ulysses, ring) of each way to spread a sequence over ``ranks``, by name.

    The hybrid has as many Ulysses ranks as heads and a node allow.
    """
    found = {"ring": (1, ranks)}
    if heads % ranks == 0:
        found["ulysses"] = (ranks, 1)
    inner = max(n for n in range(1, min(node_ranks, ranks) + 1) if ranks % n == heads % n == 0)
    if 1 < inner < ranks:
        found["hybrid"] = (inner, ranks // inner)
    elif inner == ranks and ranks >= 4:
        found["hybrid"] = (ranks // 2, 2)
    return found


def _speed(machine: Machine, inside: bool) -> float:
    return machine.inside_bytes_s if inside else machine.between_bytes_s
