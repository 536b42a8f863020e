"""The contract of a model family: where attention is and what its tokens are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_accel.call import TokenLayout

Undo = Callable[[], None]


@dataclass(frozen=True)
class ForwardInputs:
    """What a family reads off one call of the transformer, before it runs.

    Attributes:
        layouts: one token layout for the whole batch, or one per sample where they differ.
        kwargs: the inputs to run with: the caller's, less what attention need not see (padding).
        keep_order: why the video tokens can't be reordered for the whole forward; None if they
            can.
        mask_explained: whether the attention mask that the model makes says nothing more than
            ``layouts`` do, so that attention need not read it.
        tail_first: extra image tokens that the family wants in front of the video tokens, counted
            from the end of the sequence (they are part of ``layouts``' text).
    """

    layouts: tuple[TokenLayout, ...]
    kwargs: dict[str, Any]
    keep_order: str | None = None
    mask_explained: bool = True
    tail_first: int = 0


@dataclass
class TokenShuffle:
    """The order of the video tokens inside the running forward, read by a family's hooks.

    ``gather`` and ``scatter`` are int64 index tensors over the token axis, or None while tokens
    stay in raster order.
    """

    gather: Tensor | None = None
    scatter: Tensor | None = None

    def into(self, tokens: Tensor, dim: int) -> Tensor:
        """Put ``tokens`` (raster along ``dim``) into the forward's order."""
        return _select(tokens, dim, self.gather)

    def back(self, tokens: Tensor, dim: int) -> Tensor:
        """Undo `into`."""
        return _select(tokens, dim, self.scatter)


@dataclass(frozen=True)
class PipelineFamily(ABC):
    """A family of diffusers pipelines that share a transformer class.

    A family never names a method. What it learns from a pipeline's inputs it keeps in its own
    fields, so one instance serves one pipeline.
    """

    name: ClassVar[str]
    transformer_classes: ClassVar[tuple[str, ...]]
    """Class names of the transformers, so that nothing has to be imported to recognise one."""
    pipelines: ClassVar[str]
    """The diffusers pipelines, for the documentation."""
    components: ClassVar[tuple[str, ...]] = ("transformer",)
    repeated_blocks: ClassVar[tuple[str, ...]] = ()
    """Class names of the repeated blocks, where diffusers itself names none to compile."""

    def variants(self, pipe: Any) -> tuple[str, ...]:
        """Return the names under which published settings are looked up, most specific first."""
        return (self.name,)

    @abstractmethod
    def attention_layers(self, transformer: Any) -> list[Any]:
        """Return the self-attention modules whose core may become sparse, in running order."""

    @abstractmethod
    def read_inputs(self, transformer: Any, kwargs: dict[str, Any]) -> ForwardInputs:
        """Describe one forward from its arguments by name."""

    @abstractmethod
    def install_shuffle(self, transformer: Any, shuffle: TokenShuffle) -> list[Undo]:
        """Make the forward reorder its tokens after embedding and restore them at its end."""

    def install_processors(self, transformer: Any) -> list[Undo]:
        """Swap processors whose attention core can't be reached otherwise; return the undo list."""
        return []


def _select(tokens: Tensor, dim: int, index: Tensor | None) -> Tensor:
    # Offloading may run parts of a model on another device than its inputs came on.
    return tokens if index is None else tokens.index_select(dim, index.to(tokens.device))


def hook_output(module: nn.Module, change: Callable[[Any], Any]) -> Undo:
    """Replace the output of ``module`` by ``change(output)``; return how to undo it."""
    return module.register_forward_hook(lambda _module, _args, output: change(output)).remove
