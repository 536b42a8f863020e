"""Saved pipelines that transformers 4 and 5 load alike."""

import copy
import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def save_half(part, folder: Path) -> None:
    """Save a copy of a part in fp16."""
    copy.deepcopy(part).cpu().half().save_pretrained(folder)


def make_portable(folder: Path) -> None:
    """Name the tokenizer class that every transformers has; drop where parts were loaded from."""
    for path in folder.rglob("*.json"):
        old = path.read_text()
        new = old.replace("TokenizersBackend", "PreTrainedTokenizerFast")
        if path.name in ("config.json", "model_index.json", "scheduler_config.json"):
            entries = json.loads(new)
            for key in ("_name_or_path", "_use_default_values"):
                entries.pop(key, None)
            # transformers 5 loads in the type written here, diffusers in fp32: they must agree.
            for key in {"dtype", "torch_dtype"} & entries.keys():
                entries[key] = "float32"
            new = json.dumps(entries, indent=2) + "\n"
        if new != old:
            path.write_text(new)
    for config in folder.glob("text_encoder*/config.json"):
        if json.loads(config.read_text())["architectures"] == ["CLIPTextModel"]:
            _prefix_names(config.with_name("model.safetensors"), "text_model.")


def _prefix_names(path: Path, prefix: str) -> None:
    """Name weights as transformers 4 does; 5 drops the prefix, and 4 would then start afresh."""
    weights = load_file(path)
    named = {n if n.startswith(prefix) else prefix + n: w for n, w in weights.items()}
    save_file(named, path, metadata={"format": "pt"})
