"""Muon with AdamW, an average of the weights, and training steps captured as CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices, for a batch [n, a, b]."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024, "Muon"
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


class MuonAdamW:
    """Muon on `matrices` (rank 2 or more, flattened to rows), AdamW on `rest`.

    Muon's update has the size that AdamW's would have. The learning rates are multiplied by a
    factor kept on the device, so that a captured step follows a schedule.
    """

    def __init__(
        self, matrices: list[nn.Parameter], rest: list[nn.Parameter], lr: float, lr_rest: float
    ):
        device = matrices[0].device
        self.lr, self.lr_rest, self.momentum = lr, lr_rest, 0.95
        self.parameters = [*matrices, *rest]
        self.factor = torch.zeros((), device=device)
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in matrices:
            groups.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self.groups = [(s, ps, torch.zeros(len(ps), *s, device=device)) for s, ps in groups.items()]
        on_gpu = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        self.adamw = torch.optim.AdamW(
            rest,
            lr=self.rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=on_gpu,
            capturable=on_gpu,
            foreach=False,
        )

    def set_factor(self, factor: float) -> None:
        """Multiply both learning rates by `factor` from the next step on."""
        self.factor.fill_(factor)
        self.rate.fill_(factor * self.lr_rest)

    def state_dict(self) -> dict:
        """What is needed to go on later, on the CPU."""
        velocities = [v.cpu() for _, _, v in self.groups]
        return {"velocities": velocities, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`; before any step is captured."""
        for (_, _, mine), stored in zip(self.groups, state["velocities"], strict=True):
            mine.copy_(stored)
        rate = self.rate
        self.adamw.load_state_dict(state["adamw"])
        for group in self.adamw.param_groups:
            group["lr"] = rate  # one tensor that `set_factor` changes, not a copy of it

    def backward_and_step(self, loss: Tensor) -> None:
        """One update from `loss`, with the gradient's norm clipped at 1."""
        for p in self.parameters:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        with torch.no_grad():
            for shape, params, velocity in self.groups:
                grad = torch.stack([p.grad.reshape(shape) for p in params]).float()
                velocity.lerp_(grad, 1 - self.momentum)
                size = 0.2 * max(shape) ** 0.5 * self.lr * self.factor
                update = orthogonalize(grad.lerp(velocity, self.momentum)) * -size
                for p, u in zip(params, update.unbind(0), strict=True):
                    p.add_(u.view(p.shape))
        self.adamw.step()


class WeightAverage:
    """Exponential moving average of parameters."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters = parameters
        self.average = [p.detach().clone() for p in parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters."""
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.decay)

    @torch.no_grad()
    def store(self) -> None:
        """Overwrite the parameters with their average."""
        for p, a in zip(self.parameters, self.average, strict=True):
            p.copy_(a)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Capture `step`, which works on tensors that stay in place, as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    return _Replay(graph, step)


class _Replay:
    """A captured step. Holds the step itself: the graph reads its tensors where they lie."""

    def __init__(self, graph: torch.cuda.CUDAGraph, step: Callable[[], None]):
        self.graph, self.step = graph, step

    def __call__(self) -> None:
        self.graph.replay()


def captured_if_possible(
    step: Callable[[], None], log: Callable[[str], None]
) -> Callable[[], None]:
    """`captured(step)`, or where capturing fails `step` itself, saying so: slower, but the same."""
    try:
        return captured(step)
    except RuntimeError as error:
        log(f"not captured as a CUDA graph, so slower: {str(error).splitlines()[0][:200]}")
        torch.cuda.synchronize()
        return step
