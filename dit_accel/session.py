"""The seam between an acceleration and its cache, guidance or resolution method.

Who runs a block: the transformer calls its blocks as ever; an `Interception` stands in front of
those that a session names, and the session decides what runs. Nothing of the block changes: its
hooks, its offloading and its compiled graph lie behind the interception.

How state is keyed: by `Forward.key`, the transformer and the name of the guidance branch ("cond",
"uncond", "cond_uncond", "perturbed", ...), never by the parity of calls.

When state ends: `Session.begin` comes before the first forward of every generation, also after one
that broke off.
"""

from __future__ import annotations

import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import TokenOrder
from dit_accel.kinds import Method
from dit_accel.methods.base import AttentionMethod
from dit_accel.parallel.split import Split
from dit_accel.pipelines.base import PipelineFamily, Undo
from dit_accel.plan import AttentionPlan
from dit_accel.report import Recorder
from dit_accel.tracking import CallTracker, Moment

Call = Callable[..., Any]
Run = Callable[..., Any]
"""``run(inner, *args, **kwargs)``: what happens instead of ``inner(*args, **kwargs)``."""

# torch's Module.__call__ runs this attribute, if set, in place of the module with all its hooks;
# Module.compile sets it to the compiled module.
_SLOT = "_compiled_call_impl"


@dataclass(frozen=True)
class Forward:
    """One run of a transformer.

    Attributes:
        transformer: which.
        moment: step, branch and generation.
        kwargs: the transformer's arguments by name.
        regime: how its attention runs and in which order its tokens are; what was kept under
            another regime is of no use.
    """

    transformer: nn.Module
    moment: Moment
    kwargs: Mapping[str, Any]
    regime: Any = None

    @property
    def key(self) -> tuple[int, str]:
        """What state between steps is kept by."""
        return id(self.transformer), self.moment.branch


@dataclass(frozen=True)
class SessionMethod(Method):
    """A method that acts through a session: a cache, a guidance, a resolution method."""

    @abstractmethod
    def session(self, pipe: Any, seam: Seam) -> Session:
        """Return the working state for one acceleration of ``pipe``; nothing is attached yet.

        Raises:
            OptionError: if the method can do nothing on this pipeline.
        """

    def check_beside(self, others: Sequence[Method]) -> None:
        """Raise `OptionError` if the method can't run together with these."""
        return None


class Session(ABC):
    """The working state of one such method in one acceleration; it dies with that."""

    @abstractmethod
    def attach(self, transformer: nn.Module) -> None:
        """Intercept what has to be; called once per transformer of the pipeline."""

    @abstractmethod
    def begin(self) -> None:
        """Forget everything: a new generation is about to run."""

    @property
    def needs_attention_method(self) -> bool:
        """Whether it acts inside the attention calls of an attention method."""
        return False

    def enter(self, forward: Forward) -> None:
        """A transformer is about to run."""
        return None

    def leave(self, output: Any) -> None:
        """It has run; ``output`` is None after an exception."""
        return None


class AttentionSession(Session):
    """A session that also stands in front of the attention operators of a sparse method."""

    @property
    def needs_attention_method(self) -> bool:
        """See `Session.needs_attention_method`."""
        return True

    @abstractmethod
    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        call: AttentionCall,
        sample: int,
        plan: AttentionPlan,
        run: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        """Return the output of one sparse call, ``[B, N, H, D]``.

        Args:
            qkv: query, key and value ``[B, N, H, D]``, their video tokens in the plan's order.
            call: which call this is.
            sample: of the batch, where samples run one by one.
            plan: what the method decided.
            run: ``run(query, key, value, plan) -> (output, LSE [B, H, N])``.
        """


class OutputSession(Session):
    """A session that may change what attention gives, where an attention method runs."""

    @abstractmethod
    def attended(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], scale: float | None, output: Tensor
    ) -> Tensor:
        """Return the output of one call, ``[B, N, H, D]``, changed or as it is.

        Args:
            layer: attention layer from 0, as the family counts them.
            qkv: query, key and value ``[B, N, H, D]``, normed and rotated.
            scale: of the logits; None for ``D ** -0.5``.
            output: of the attention, sparse or dense.
        """


@dataclass(frozen=True)
class SelfAttention:
    """One self-attention call of a `ResolutionSession`'s own forward, of one layout.

    Attributes:
        qkv: query, key and value ``[B, N, H, D]``, normed and rotated.
        call: which call this is.
        sample: of the batch, where samples run one by one.
        scale: of the logits; None for ``D ** -0.5``.
        order: of the video tokens in ``qkv``.
        own: ``own(qkv, layout, scale, with_lse) -> (output, LSE [B, H, N] or None)``: attend by
            the session's method.
        usual: ``usual(qkv, call, scale) -> output``: attend as without the session.
    """

    qkv: tuple[Tensor, Tensor, Tensor]
    call: AttentionCall
    sample: int
    scale: float | None
    order: TokenOrder
    own: Callable[..., tuple[Tensor, Tensor | None]]
    usual: Callable[..., Tensor]


class ResolutionSession(Session):
    """A session that makes several generations of one, some with self-attention of its own."""

    @abstractmethod
    def generate(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the pipeline's ``call(*args, **kwargs)``."""

    @abstractmethod
    def method_at(self, layout: TokenLayout) -> AttentionMethod | None:
        """Return the method of the forward about to run; None for the acceleration's own."""

    @abstractmethod
    def attend(self, attention: SelfAttention) -> Tensor:
        """Return the output ``[B, N, H, D]`` of a call in such a forward."""


class Seam:
    """What an acceleration offers to its sessions."""

    def __init__(self, family: PipelineFamily, tracker: CallTracker, recorder: Recorder) -> None:
        self.family, self.tracker, self.recorder = family, tracker, recorder
        self.split: Split | None = None  # how the running forward's tokens are spread over ranks
        self._interceptions: dict[nn.Module, Interception] = {}

    def intercept(self, module: nn.Module, run: Run, *, innermost: bool = False) -> None:
        """Let ``run`` stand in front of a module's calls.

        Of several, the last is outermost, or with ``innermost`` next to the module.
        """
        if module not in self._interceptions:
            self._interceptions[module] = Interception(module)
        runs = self._interceptions[module].runs
        runs.insert(0 if innermost else len(runs), run)

    def interceptions(self, module: nn.Module) -> int:
        """Return how many stand in front of a module."""
        return len(self._interceptions[module].runs) if module in self._interceptions else 0

    def renew(self, transformer: nn.Module) -> None:
        """Stand in front again of what was compiled since.

        Raises:
            OptionError: if the transformer was compiled as a whole, which would run past us.
        """
        if not self._interceptions:
            return
        if is_compiled(transformer):
            raise OptionError(
                "the transformer is compiled as a whole, so its blocks can't be skipped: compile "
                "its blocks instead (compile_repeated_blocks, or block.compile() for each)."
            )
        for interception in self._interceptions.values():
            interception.renew()

    def restore(self) -> None:
        """Take all interceptions away."""
        for interception in self._interceptions.values():
            interception.remove()
        self._interceptions.clear()


class Interception:
    """Stands in front of one module's calls, whatever the module does inside."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.runs = module, list[Run]()
        self.inner: Call | None = None
        self.renew()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the module."""
        call: Call = self.module._call_impl if self.inner is None else self.inner
        for run in self.runs:
            call = partial(run, call)
        return call(*args, **kwargs)

    def renew(self) -> None:
        """Take the first place again if ``module.compile()`` took it."""
        current = self.module.__dict__.get(_SLOT)
        if self not in _standing(current):
            self.inner = current
            self.module.__dict__[_SLOT] = self

    def remove(self) -> None:
        """Leave the module as it would be without us."""
        if self.module.__dict__.get(_SLOT) is not self:
            return  # compiled since; that stays
        if self.inner is None:
            del self.module.__dict__[_SLOT]
        else:
            self.module.__dict__[_SLOT] = self.inner


def intercept_pipeline(pipe: Any, run: Run) -> Undo:
    """Let ``run(call, *args, **kwargs)`` stand in front of a pipeline's calls; return the undo.

    Python looks ``__call__`` up in the class, so the object gets a class of its own, with the same
    names, which are what ``save_pretrained`` writes.
    """
    cls = type(pipe)
    stock = cls.__call__

    @wraps(stock)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not pipe:  # a copy of it, which nobody accelerated
            return stock(self, *args, **kwargs)
        return run(partial(stock, self), *args, **kwargs)

    own_names = {
        "__call__": call,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    own = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(own_names))
    object.__setattr__(pipe, "__class__", own)

    def undo() -> None:
        if type(pipe) is own:
            object.__setattr__(pipe, "__class__", cls)

    return undo


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, interceptions aside."""
    slot = module.__dict__.get(_SLOT)
    standing = _standing(slot)
    return (standing[-1].inner if standing else slot) is not None


def _standing(slot: Any) -> list[Interception]:
    """Return the interceptions in front of a module, the outermost first."""
    found = []
    while isinstance(slot, Interception):
        found.append(slot)
        slot = slot.inner
    return found


def arguments_by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a call's arguments by name."""
    if not args:
        return dict(kwargs)
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
    named = dict(bound.arguments)
    named.pop("self", None)
    return named


def sample_of(output: Any) -> Tensor:
    """Return the prediction in a transformer's output, a tuple or an object."""
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found


def like_output(sample: Tensor, named: Mapping[str, Any]) -> Any:
    """Return a prediction in the form that a transformer called with ``named`` would give it."""
    if named.get("return_dict", True):
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)
    return (sample,)
