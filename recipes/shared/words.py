"""Teach a text encoder which words of a caption belong together, before a model reads it.

Each word learns to name all attributes of the thing, or of the scene, that its phrase speaks of.
Without this, small models take a caption as a bag of words for tens of thousands of steps: "a red
circle and a blue square" may come as a red square and a blue circle.
"""

import random
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNASKED = -100
CAPTION_TOKENS = 48  # longer than any caption


def words_of(caption: str) -> list[str]:
    """The words of a caption, commas among them: one token each."""
    return caption.replace(",", " , ").split()


class Lessons:
    """Captions of a drawn world (`dit_accel.world.clips` or `pictures`) and what each word means.

    With `past_only`, for encoders that can't look ahead, only the last word of a phrase is asked.
    """

    def __init__(self, world: ModuleType, past_only: bool = False, seed: int = 3):
        self.world, self.past_only, self.rng = world, past_only, random.Random(seed)
        self.asked = {**world.THING_CLASSES, **world.SCENE_CLASSES}

    def draw(self, count: int) -> tuple[list[str], Tensor, Tensor]:
        """Captions, labels [attribute, caption, word] and scene labels [attribute, caption].

        A label is the index of the attribute's value, `UNASKED` where it does not apply.
        """
        scenes = [self.world.sample_scene(self.rng) for _ in range(count)]
        labels = torch.full((len(self.asked), count, CAPTION_TOKENS), UNASKED)
        whole = torch.full((len(self.asked), count), UNASKED)
        captions = []
        for b, scene in enumerate(scenes):
            at, parts = 0, []
            for phrase, owner in self.world.phrases(scene, self.rng):
                length = len(words_of(phrase))
                known = self.world.SCENE_CLASSES if owner is None else self.world.THING_CLASSES
                source = scene if owner is None else scene.things[owner]
                start = at + length - 1 if self.past_only and owner is not None else at
                for a, name in enumerate(self.asked):
                    if name in known and not (self.past_only and owner is None):
                        value = self.asked[name].index(getattr(source, name))
                        labels[a, b, start : at + length] = value
                at += length
                parts.append(phrase)
            for a, name in enumerate(self.asked):
                if name in self.world.SCENE_CLASSES:
                    whole[a, b] = self.asked[name].index(getattr(scene, name))
            captions.append(" ".join(parts))
        return captions, labels, whole

    @property
    def sizes(self) -> list[int]:
        """The number of values of each attribute."""
        return [len(values) for values in self.asked.values()]


def teach(
    encoder: nn.Module,
    read: Callable[[Tensor], Tensor],
    width: int,
    batches: Iterator[tuple[Tensor, Tensor]],
    sizes: list[int],
    seconds: float,
    log: Callable[[str], None],
    device: str,
) -> float:
    """Train `encoder` for `seconds`; returns the share of right answers in the last batches.

    Each batch is token ids, of which `read` makes features [..., width], and labels
    [attributes, ...].
    """
    head = nn.Linear(width, sum(sizes)).to(device)
    encoder.to(device).train()
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    start, done, right = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (done + 1) / 50) * min(1.0, 2 * (1 - share) + 0.01)
        ids, labels = (t.to(device) for t in next(batches))
        answers = head(read(ids)).split(sizes, -1)
        losses = [
            F.cross_entropy(answer.flatten(0, -2).float(), label.flatten(), ignore_index=UNASKED)
            for answer, label in zip(answers, labels, strict=True)
            if (label != UNASKED).any()
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done += 1
        if done % 20 == 0:
            guesses = torch.stack([answer.argmax(-1) for answer in answers])
            now = float((guesses == labels)[labels != UNASKED].float().mean())
            right = now if right == 0 else 0.7 * right + 0.3 * now
        if done % 200 == 0:
            log(f"text: step {done}, {100 * right:.1f} % right")
    encoder.eval()
    return right


@torch.no_grad()
def look_nearby(attention: nn.Module, reach: int = 128) -> None:
    """Start a head that looks back, one that looks ahead, one that looks both ways and a free one.

    `attention` is of T5 or UMT5, with four heads. From the stock random start, word order is not
    found in thousands of steps.
    """
    offsets = torch.arange(-reach, reach + 1)  # of the word looked at
    distance = offsets.abs().float()
    back = torch.where(offsets <= 0, -distance, torch.full_like(distance, -8.0))
    biases = torch.stack((back, back.flip(0), -0.4 * distance, torch.zeros_like(distance)), 1)
    buckets = attention._relative_position_bucket(offsets)
    farthest_first = distance.argsort(descending=True)  # the nearest offset of a bucket is kept
    for i in farthest_first.tolist():
        attention.relative_attention_bias.weight[buckets[i]] = biases[i]
