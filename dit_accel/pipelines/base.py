"""The contract of a model family: where attention is and what its tokens are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel.call import TokenLayout
from dit_accel.errors import UnknownPipelineError

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


@dataclass(frozen=True)
class Streams:
    """The token streams between two blocks, ``[B, N, C]``; ``text`` where blocks change it."""

    video: Tensor
    text: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *others: Streams) -> Streams:
        """Apply a function to the video streams, and to the text streams if all have one."""
        text = [streams.text for streams in (self, *others)]
        return Streams(
            function(self.video, *(other.video for other in others)),
            None if any(tokens is None for tokens in text) else function(*text),
        )


@dataclass
class TokenShuffle:
    """The order of the video tokens inside the running forward, read by a family's hooks.

    ``gather`` and ``scatter`` are int64 index tensors over the token axis, or None while tokens
    stay in raster order. ``gather`` is longer than ``scatter`` where tokens are padded, so that
    each of ``ranks`` can hold as many; this is rank ``rank`` of them.
    """

    gather: Tensor | None = None
    scatter: Tensor | None = None
    rank: int = 0
    ranks: int = 1

    def into(self, tokens: Tensor, dim: int) -> Tensor:
        """Put ``tokens`` (raster along ``dim``) into the forward's order."""
        return _select(tokens, dim, self.gather)

    def back(self, tokens: Tensor, dim: int) -> Tensor:
        """Undo `into`."""
        return _select(tokens, dim, self.scatter)

    def share(self, tokens: Tensor, dim: int) -> Tensor:
        """Return this rank's share of what `into` gives."""
        gather = self.gather
        if gather is not None and self.ranks > 1:
            gather = gather.chunk(self.ranks)[self.rank]
        return _select(tokens, dim, gather)


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
    block_output: ClassVar[tuple[str, ...]] = ("video", "text")
    """The streams that a block returns, in its order. All blocks take video first, then text."""
    text_first: ClassVar[bool] = False
    """Whether text comes first where both streams are one sequence."""
    text_pipelines: ClassVar[tuple[str, ...]] = ()
    """Class names of the pipelines that need nothing but text, for which `encode` is."""

    def variants(self, pipe: Any) -> tuple[str, ...]:
        """Return the names under which published settings are looked up, most specific first."""
        return (self.name,)

    @abstractmethod
    def attention_layers(self, transformer: Any) -> list[Any]:
        """Return the self-attention modules whose core may become sparse, in running order."""

    @abstractmethod
    def blocks(self, transformer: Any) -> list[nn.Module]:
        """Return the blocks of the residual stack, in running order."""

    def streams_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """Return what a block is called with: tokens ``[B, N, C]``."""
        video = args[0] if args else kwargs["hidden_states"]
        if "text" not in self.block_output:
            return Streams(video)
        return Streams(video, args[1] if len(args) > 1 else kwargs["encoder_hidden_states"])

    def streams_out(self, output: Any) -> Streams:
        """Return the streams in a block's output."""
        found = (output,) if len(self.block_output) == 1 else output
        return Streams(**dict(zip(self.block_output, found, strict=True)))

    def as_output(self, streams: Streams) -> Any:
        """Return streams in the form of a block's output."""
        found = tuple(getattr(streams, name) for name in self.block_output)
        return found[0] if len(found) == 1 else found

    def with_streams(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Streams
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a block is called with, ``streams`` in place of its own."""
        positional, named = list(args), dict(kwargs)
        both = (("hidden_states", streams.video), ("encoder_hidden_states", streams.text))
        for position, (name, tokens) in enumerate(both):
            if tokens is None:
                continue
            if position < len(positional):
                positional[position] = tokens
            else:
                named[name] = tokens
        return tuple(positional), named

    def encode(self, pipe: Any, frames: Tensor) -> Tensor:
        """Return frames as the latents that one of `text_pipelines` takes as its argument.

        Args:
            pipe: the pipeline.
            frames: ``[B, T, 3, H, W]`` in [0, 1], on the VAE's device and of its dtype; T = 1 for
                images.

        Returns:
            Latents in the pipeline's own shape, scaled as its transformer sees them, float32.
        """
        raise UnknownPipelineError(f"family {self.name!r} can't turn frames into latents.")

    @abstractmethod
    def modulated(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return a block's video tokens after its first norm and modulation, ``[B, N, C]``."""

    def time_embeddings(self, transformer: Any, timesteps: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what all that depends on the timestep alone is made of, ``[S, C]`` each.

        The time embedding, and its projection that modulates the blocks. None where these depend
        on the prompt too.
        """
        return None

    def volume(self, transformer: Any, kwargs: dict[str, Any]) -> Tensor:
        """Return the input latent by its axes, ``[B, T, H, W, C]``."""
        latent: Tensor = kwargs["hidden_states"]
        latent = latent.unsqueeze(2) if latent.ndim == 4 else latent
        return latent.movedim(1, -1)

    def cacheable_attention(self, transformer: Any) -> list[tuple[nn.Module, str]]:
        """Return all attention modules of the blocks, each with "self" or "cross"."""
        return [(layer, "self") for layer in self.attention_layers(transformer)]

    @abstractmethod
    def read_inputs(self, transformer: Any, kwargs: dict[str, Any]) -> ForwardInputs:
        """Describe one forward from its arguments by name."""

    def pad_text(self, kwargs: dict[str, Any], extra: int) -> dict[str, Any]:
        """Return the arguments with ``extra`` text tokens behind, which nobody will attend to."""
        return {
            **kwargs,
            "encoder_hidden_states": padded(kwargs["encoder_hidden_states"], 1, extra),
        }

    def split_plan(self) -> dict[str, Any] | None:
        """Return where tokens are split over ranks and gathered, as diffusers' ``cp_plan``.

        None where diffusers' models have a plan of their own.
        """
        return None

    @abstractmethod
    def install_shuffle(self, transformer: Any, shuffle: TokenShuffle) -> list[Undo]:
        """Make the forward reorder its tokens after embedding and restore them at its end."""

    def install_processors(self, transformer: Any) -> list[Undo]:
        """Swap processors whose attention core can't be reached otherwise; return the undo list."""
        return []


def padded(tokens: Tensor, dim: int, extra: int) -> Tensor:
    """Return ``tokens`` with ``extra`` zeros behind along ``dim``."""
    if extra == 0:
        return tokens
    shape = list(tokens.shape)
    shape[dim] = extra
    return torch.cat([tokens, tokens.new_zeros(shape)], dim)


def _select(tokens: Tensor, dim: int, index: Tensor | None) -> Tensor:
    # Offloading may run parts of a model on another device than its inputs came on.
    return tokens if index is None else tokens.index_select(dim, index.to(tokens.device))


def encoded_video(vae: Any, frames: Tensor) -> Tensor:
    """Return the latents ``[B, C, T, H, W]`` of frames ``[B, T, 3, H, W]`` in [0, 1], unscaled."""
    mode: Tensor = vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
    return mode.float()


def encoded_image(vae: Any, frames: Tensor) -> Tensor:
    """Return the scaled latents ``[B, C, H, W]`` of images ``[B, 1, 3, H, W]`` in [0, 1]."""
    mode: Tensor = vae.encode(frames.squeeze(1) * 2 - 1).latent_dist.mode()
    return (mode.float() - vae.config.shift_factor) * vae.config.scaling_factor


def hook_output(module: nn.Module, change: Callable[[Any], Any]) -> Undo:
    """Replace the output of ``module`` by ``change(output)``; return how to undo it."""
    return module.register_forward_hook(lambda _module, _args, output: change(output)).remove


def hook_tables(module: nn.Module, shuffle: TokenShuffle, dim: int) -> Undo:
    """Put the rotary tables that ``module`` makes for all tokens into the forward's order.

    Under context parallelism diffusers cuts them behind the module's own code, so an interception
    makes them, and cuts them where the shuffle says.
    """
    from dit_accel.session import Interception

    def run(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if shuffle.gather is None or shuffle.ranks == 1:
            tables = inner(*args, **kwargs)
        else:
            tables = type(module).forward(module, *args, **kwargs)
        return tuple(shuffle.share(table, dim) for table in tables)

    interception = Interception(module)
    interception.runs.append(run)
    return interception.remove


def block_plan(first_block: str, output: str = "proj_out") -> dict[str, Any]:
    """Return diffusers' plan to split both streams at a block and to gather the model's output."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    split = ContextParallelInput(split_dim=1, expected_dims=3)
    streams = {"hidden_states": split, "encoder_hidden_states": split}
    return {first_block: streams, output: ContextParallelOutput(gather_dim=1, expected_dims=3)}


def rotary_plan(dim: int) -> dict[str, Any]:
    """Return diffusers' plan to split the two rotary tables ``[N, D]`` of a model's ``rope``."""
    from diffusers.models._modeling_parallel import ContextParallelInput

    split = ContextParallelInput(split_dim=dim, expected_dims=2, split_output=True)
    return {"rope": {0: split, 1: split}}
