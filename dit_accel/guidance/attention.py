"""Perturbs chosen heads of self-attention behind the attention itself, whatever computes it.

A head whose map is mixed with another, ``(1 - u) A + u P``, gives ``(1 - u) A V + u P V``: what
attention gave and ``P V`` mixed. ``P V`` is a token's own value ("identity") or the mean value
("uniform"), and both follow from the value projections alone. For "query_mean" the runtime shows
queries and keys, and ``P V`` is one row for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.errors import ContextParallelError, OptionError
from dit_accel.guidance.base import Perturbation, Switch, check_layers
from dit_accel.parallel.split import Split
from dit_accel.pipelines.base import PipelineFamily
from dit_accel.session import Forward, Seam, is_compiled

Target = Literal["identity", "uniform", "query_mean"]
Scope = Literal["joint", "image"]

Reduce = Callable[[Tensor], Tensor]

HeadStrengths = Mapping[int, Mapping[int, float]]
"""Strength by layer and head."""


def attention_of(family: PipelineFamily, transformer: nn.Module) -> list[tuple[int, Any]]:
    """Return each block's self-attention and its number among the family's attention layers.

    Where a block has two (Stable Diffusion 3.5), the first, joint one.
    """
    layers = family.attention_layers(transformer)
    found = []
    for block in family.blocks(transformer):
        inside = {id(module) for module in block.modules()}
        found.append(next((i, layer) for i, layer in enumerate(layers) if id(layer) in inside))
    return found


def heads_per_layer(family: PipelineFamily, transformer: nn.Module) -> int:
    """Return how many heads a transformer's self-attention has."""
    return int(attention_of(family, transformer)[0][1].heads)


@dataclass
class _Rows:
    """How the tokens of the running forward are divided, or those of them that a rank holds.

    Attributes:
        text: text rows of the sequence that attention sees.
        text_first: whether they come first.
        valid_text: text rows per sample that are no padding; None if all are.
        valid_image: image rows that are no padding; None if all are.
    """

    text: int = 0
    text_first: bool = False
    valid_text: tuple[int, ...] | None = None
    valid_image: int | None = None

    def image(self, length: int) -> slice:
        """Return where the image tokens are in a sequence of this length."""
        return slice(self.text, length) if self.text_first else slice(0, length - self.text)

    def valid(self, like: Tensor, image: int, text_first: bool = False) -> Tensor:
        """Return bool ``[B, N]`` for a sequence ``[B, N, ...]`` of ``image`` and text tokens."""
        batch, text = len(like), like.shape[1] - image
        lengths = (text,) if self.valid_text is None else self.valid_text
        counts = [self.valid_image if self.valid_image is not None else image] * batch
        parts = [
            torch.arange(rows, device=like.device) < torch.tensor(ends, device=like.device)[:, None]
            for rows, ends in ((image, counts), (text, lengths * (batch // len(lengths))))
        ]
        return torch.cat(parts[::-1] if text_first else parts, 1)

    def held(self, split: Split | None, ranks: int) -> _Rows:
        """Return the rows of this that a rank holds; without ``split`` all hold as many."""
        if split is None:
            return replace(self, text=self.text // ranks)
        before = split.group.rank * split.text_rows
        lengths = self.valid_text or (split.text_length,)
        valid = tuple(min(max(n - before, 0), split.text_rows) for n in lengths)
        return _Rows(split.text_rows, self.text_first, valid, split.own_image_rows)


class HeadPerturbation(Perturbation):
    """Chosen heads of a transformer's blocks."""

    def __init__(
        self,
        heads: HeadStrengths,
        target: Target,
        scope: Scope,
        transformer: nn.Module,
        seam: Seam,
        switch: Switch,
    ) -> None:
        family = seam.family
        attention, blocks = attention_of(family, transformer), family.blocks(transformer)
        check_layers(list(heads), transformer, len(blocks))
        super().__init__(first=min(heads))
        self.target, self.scope, self.seam, self.switch = target, scope, seam, switch
        self.rows = _Rows()
        self.reduce: Reduce = lambda sums: sums
        self._blocks = [blocks[layer] for layer in heads]
        self._heads: dict[int, _Heads] = {}  # by attention layer
        self._taps: list[_Tap] = []
        for layer, strengths in heads.items():
            index, module = attention[layer]
            chosen = _Heads(layer, strengths, int(module.heads))
            self._heads[index] = chosen
            if target != "query_mean":
                self._taps.append(_Tap(self, module, chosen))

    def enter(self, forward: Forward) -> None:
        """See `Perturbation.enter`."""
        if not self.switch.is_on:
            return
        for tap in self._taps:
            tap.check()
        if self._taps and any(is_compiled(block) for block in self._blocks):
            raise OptionError(
                "this guidance perturbs attention inside blocks, which compiled blocks can't do: "
                "don't compile the perturbed ones, or choose slg, which skips whole blocks."
            )
        family, kwargs = self.seam.family, dict(forward.kwargs)
        joint = "text" in family.block_output
        parallel, split = compat.parallel_config(forward.transformer), self.seam.split
        text = kwargs["encoder_hidden_states"].shape[1] if joint else 0
        text = text if split is None else split.text_length  # padded, by now
        self.rows = _Rows(text, family.text_first)
        self.reduce = partial(compat.sum_over_sequence, parallel)
        if self.target == "query_mean" and split is not None and split.group.ring.size > 1:
            raise ContextParallelError(
                "perturbation='query_mean' needs all keys at once, which a ring passes by in "
                "parts: choose ulysses=... or perturbation='identity'."
            )
        if self.target != "identity":
            self._read_valid(forward, joint)
        if parallel is not None and self.target != "query_mean":
            self.rows = self.rows.held(split, compat.sequence_ranks(parallel))

    def _read_valid(self, forward: Forward, joint: bool) -> None:
        """Find out which text tokens count."""
        family = self.seam.family
        inputs = family.read_inputs(forward.transformer, dict(forward.kwargs))
        if not inputs.mask_explained:
            raise OptionError(
                f"perturbation={self.target!r} can't tell which text tokens count, because the "
                "text mask has holes: choose perturbation='identity'."
            )
        if joint and not family.text_first:
            lengths = (layout.text_length for layout in inputs.layouts)
            self.rows.valid_text = tuple(min(length, self.rows.text) for length in lengths)

    def leave(self) -> None:
        """See `Perturbation.leave`."""
        for tap in self._taps:
            tap.values.clear()

    def attended(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], scale: float | None, output: Tensor
    ) -> Tensor:
        """See `Perturbation.attended`: mix in what the mean query sees."""
        heads = self._heads.get(layer)
        if self.target != "query_mean" or heads is None:
            return output
        if self.seam.split is not None:
            heads = heads.of_share(self.seam.split.first_head(output), output.shape[2])
        index = heads.index(output)
        query, key, value = (tokens[:, :, index].to(_wide(tokens)) for tokens in qkv)
        image = query.shape[1] - self.rows.text
        valid = self.rows.valid(query, image, self.rows.text_first)
        perturbed = valid
        if self.scope == "image":
            perturbed = torch.zeros_like(valid)
            perturbed[:, self.rows.image(query.shape[1])] = True
        mean = _masked_mean(query, perturbed)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = torch.einsum("bhd,bkhd->bhk", mean, key) * factor
        weights = logits.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
        row = torch.einsum("bhk,bkhd->bhd", weights, value)
        mixed = heads.mix(output.flatten(2), row.unsqueeze(1), self.switch)
        return self.within(mixed, output.flatten(2)).view_as(output)

    def within(self, mixed: Tensor, tokens: Tensor) -> Tensor:
        """Return a whole sequence ``[B, N, C]`` perturbed where the scope says."""
        if self.scope == "joint" or not self.rows.text:
            return mixed
        out, image = tokens.clone(), self.rows.image(tokens.shape[1])
        out[:, image] = mixed[:, image]
        return out


class _Heads:
    """The chosen heads of one layer."""

    def __init__(self, layer: int, strengths: Mapping[int, float], total: int) -> None:
        for head in strengths:
            if head >= total:
                raise OptionError(
                    f"head {head} of layer {layer} is out of range: it has {total} heads, 0 to "
                    f"{total - 1}."
                )
        self.layer, self.total = layer, total
        self.heads, self.strengths = list(strengths), list(strengths.values())

    def of_share(self, first: int, count: int) -> _Heads:
        """Return what is chosen among ``count`` heads from ``first`` on."""
        chosen = zip(self.heads, self.strengths, strict=True)
        own = {head - first: strength for head, strength in chosen if 0 <= head - first < count}
        return _Heads(self.layer, own, count)

    def index(self, like: Tensor) -> Tensor:
        """Return the chosen heads as an index."""
        return torch.tensor(self.heads, device=like.device, dtype=torch.long)

    def mix(self, tokens: Tensor, target: Tensor, switch: Switch) -> Tensor:
        """Return ``tokens`` with the chosen heads moved toward ``target``.

        Args:
            tokens: ``[B, N, H * D]``.
            target: of the chosen heads alone, ``[B, N or 1, heads, D]``.
            switch: says of which samples.
        """
        samples = switch.samples(tokens)
        if samples is None:
            return tokens
        index, wide = self.index(tokens), _wide(tokens)
        share = torch.tensor(self.strengths, device=tokens.device, dtype=wide)[:, None]
        out = tokens.unflatten(-1, (self.total, -1)).clone()
        plain = out[samples][:, :, index].to(wide)
        out[samples, :, index] = ((1 - share) * plain + share * target[samples]).to(out.dtype)
        return out.flatten(2)


class _Tap:
    """Stands in front of the projections of one attention module: values in, outputs out."""

    def __init__(self, perturbation: HeadPerturbation, module: Any, heads: _Heads) -> None:
        self.perturbation, self.module, self.heads = perturbation, module, heads
        self.values: dict[str, Tensor] = {}
        self._parts = _parts(module)
        intercept = partial(perturbation.seam.intercept, innermost=True)
        intercept(self._parts["value"], partial(self._keep, "value"))
        if "added_value" in self._parts:
            intercept(self._parts["added_value"], partial(self._keep, "added_value"))
        if "out" not in self._parts:
            intercept(module, self._whole)
            return
        intercept(self._parts["out"], partial(self._project, "value"))
        if "added_out" in self._parts and perturbation.scope == "joint":
            intercept(self._parts["added_out"], partial(self._project, "added_value"))

    def check(self) -> None:
        """Raise `OptionError` if an adapter or a fusion has put other modules in their place."""
        if _parts(self.module) != self._parts:
            raise OptionError(
                "attention projections were replaced since accelerate_pipeline (an adapter was "
                "loaded, or projections were fused): call it again."
            )

    def _keep(self, name: str, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if self.perturbation.switch.is_on:
            fused = getattr(self.module, "fused_projections", False)
            self.values[name] = output.chunk(3, -1)[-1] if fused else output
        return output

    def _project(
        self, name: str, inner: Callable[..., Any], tokens: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run an output projection on one stream's tokens, perturbed."""
        switch = self.perturbation.switch
        if switch.samples(tokens) is not None:
            tokens = self.heads.mix(tokens, self._target(name), switch)
        return inner(tokens, *args, **kwargs)

    def _whole(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an attention module without output projections: perturb what it returns."""
        output = inner(*args, **kwargs)
        streams = output if isinstance(output, tuple) else (output,)
        tokens = torch.cat(streams, 1)
        if self.perturbation.switch.samples(tokens) is None:
            return output
        mixed = self.heads.mix(tokens, self._target("value"), self.perturbation.switch)
        mixed = self.perturbation.within(mixed, tokens)
        if not isinstance(output, tuple):
            return mixed
        return mixed.split([stream.shape[1] for stream in streams], 1)

    def _target(self, name: str) -> Tensor:
        """Return what the chosen heads of one stream move toward, ``[B, N or 1, heads, D]``."""
        index = self.heads.index(self.values[name])

        def chosen(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (self.heads.total, -1))[:, :, index].to(_wide(tokens))

        if self.perturbation.target == "identity":
            return chosen(self.values[name])
        image = self.values["value"].shape[1]
        whole = torch.cat(list(self.values.values()), 1)
        rows, together = self.perturbation.rows, len(self.values) == 1
        if together:
            image -= rows.text
        valid = rows.valid(whole, image, rows.text_first and together)
        return _masked_mean(chosen(whole), valid, self.perturbation.reduce).unsqueeze(1)


def _parts(module: Any) -> dict[str, nn.Module]:
    """Return the projections of an attention module, as far as it has them."""
    fused = getattr(module, "fused_projections", False)
    out = getattr(module, "to_out", None)
    parts = {
        "value": module.to_qkv if fused else module.to_v,
        "added_value": getattr(module, "to_added_qkv" if fused else "add_v_proj", None),
        "out": None if out is None else out[0],
        "added_out": getattr(module, "to_add_out", None),
    }
    return {name: part for name, part in parts.items() if part is not None}


def _masked_mean(tokens: Tensor, mask: Tensor, reduce: Reduce = lambda sums: sums) -> Tensor:
    """Return the mean over the rows of ``[B, N, H, D]`` where bool ``[B, N]`` is true.

    ``reduce`` adds up sums and counts over the ranks that hold the other rows.
    """
    weights = mask.to(tokens.dtype)
    total = torch.einsum("bn,bnhd->bhd", weights, tokens)
    return reduce(total) / reduce(weights.sum(1))[:, None, None]


def _wide(tokens: Tensor) -> torch.dtype:
    """Return the type to mix in: float32, or float64 for float64."""
    return torch.promote_types(tokens.dtype, torch.float32)


def all_heads(layers: Sequence[int], heads: int, strength: float) -> dict[int, dict[int, float]]:
    """Return every head of these layers with one strength."""
    return {layer: dict.fromkeys(range(heads), strength) for layer in layers}
