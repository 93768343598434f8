"""Checkpoints of train_lm.py: config.json and model.safetensors, as transformers has them, and training.safetensors.

They are data, never code: JSON is read strictly, tensors have the names and shapes that a model of ours has, and no
memory is taken before that is known.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasp_coll.files import read_json, writing

BYTES = 256  # what a token is one of
MODEL, TRAINING = "model.safetensors", "training.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of every parameter
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_NOT_OF_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"}
_LARGEST = 1 << 40
_FLOATS = {"F64", "F32", "BF16", "F16"}
_STEP = re.compile(r"\d{1,18}")


class CheckpointError(Exception):
    """A directory that is no checkpoint of ours; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A model and what its optimizer remembers of each parameter, after so many steps."""

    model: Any
    moments: Mapping[str, Mapping[str, Any]]
    step: int

    def restore(self, optimizer: Any) -> None:
        """Give an optimizer of the model's parameters its memory back."""
        state = {index: dict(self.moments[name]) for index, (name, _) in enumerate(self.model.named_parameters())}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def new_model(sizes: Mapping[str, int], window: int | None, attention: str = "tasp") -> Any:
    """A Llama of random weights, or with a window a Mistral, which is a Llama that has one. sizes: of its config."""
    from transformers import LlamaForCausalLM, MistralForCausalLM

    kind = LlamaForCausalLM if window is None else MistralForCausalLM
    return kind._from_config(_config(sizes, window), attn_implementation=attention)


def save(directory: Path, model: Any, optimizer: Any, step: int) -> None:
    """Write the checkpoint beside its place, then move the files there, that which vouches for the others last."""
    from safetensors.torch import save_file

    names = [name for name, _ in model.named_parameters()]
    remembered = optimizer.state_dict()["state"]
    tensors = {f"{name}:{key}": remembered[i][key].contiguous() for i, name in enumerate(names) for key in MOMENTS}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory.absolute().parent) as partial:
        model.save_pretrained(partial, max_shard_size="1TB")
        about = {"step": str(step), "model": _digest(Path(partial, MODEL))}
        directory.mkdir(exist_ok=True)
        for file in Path(partial).iterdir():
            with writing(directory / file.name) as place:
                os.replace(file, place)
    with writing(directory / TRAINING) as place:
        save_file(tensors, place, metadata=about)


def load(directory: Path, attention: str = "tasp") -> Checkpoint:
    """Read what `save` wrote; CheckpointError for anything else."""
    from safetensors import SafetensorError

    try:
        return _load(directory, attention)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(str(error)) from error


def _load(directory: Path, attention: str) -> Checkpoint:
    import torch
    from safetensors.torch import load_file

    weights, _ = _header(directory / MODEL)
    sizes, window = _sizes(read_json(directory / "config.json"), len(weights))
    with torch.device("meta"):  # takes no memory
        empty = new_model(sizes, window, attention)
    _check_tensors(MODEL, weights, {name: list(value.shape) for name, value in empty.state_dict().items()})
    moments, about = _header(directory / TRAINING)
    shapes = {name: list(value.shape) for name, value in empty.named_parameters()}
    wanted = {f"{name}:{key}": [] if key == "step" else shape for name, shape in shapes.items() for key in MOMENTS}
    _check_tensors(TRAINING, moments, wanted)
    if not _STEP.fullmatch(about.get("step", "")):
        raise CheckpointError(f"{TRAINING} must tell its step, got {about.get('step')!r}")
    if about.get("model") != _digest(directory / MODEL):
        raise CheckpointError(f"{TRAINING} belongs to another {MODEL}: was it being saved when the run ended?")
    model = new_model(sizes, window, attention)
    model.load_state_dict(load_file(directory / MODEL))
    held = load_file(directory / TRAINING)
    memory = {name: {key: held[f"{name}:{key}"] for key in MOMENTS} for name in shapes}
    return Checkpoint(model, memory, int(about["step"]))


def _config(sizes: Mapping[str, int], window: int | None) -> Any:
    from transformers import LlamaConfig, MistralConfig

    shape = {**sizes, "vocab_size": BYTES, "bos_token_id": None, "eos_token_id": None}
    return LlamaConfig(**shape) if window is None else MistralConfig(**shape, sliding_window=window)


def _sizes(config: Any, tensors: int) -> tuple[dict[str, int], int | None]:
    """The sizes and the window of a config, which says nothing else than what `save` would write."""
    if not isinstance(config, dict):
        raise CheckpointError("config.json must be an object")
    kind = config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise CheckpointError(f"config.json: model_type must be 'llama' or 'mistral', got {kind!r}")
    names = _SIZES if kind == "llama" else (*_SIZES, "sliding_window")
    sizes: dict[str, Any] = {name: config.get(name) for name in names}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _LARGEST:
            raise CheckpointError(f"config.json: {name} must be an integer >= 1, got {value!r}")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads or width // heads % 2 or heads % sizes["num_key_value_heads"]:
        raise CheckpointError("config.json: hidden_size must be an even multiple of the heads, these of those of keys")
    if sizes["num_hidden_layers"] > tensors:
        raise CheckpointError(f"config.json: there are not so many layers in {MODEL}: {sizes['num_hidden_layers']}")
    window = sizes.pop("sliding_window", None)
    ours = _config(sizes, window).to_dict()
    for name in config.keys() - _NOT_OF_THE_MODEL:
        if name not in ours or config[name] != ours[name]:
            raise CheckpointError(f"config.json: {name} must be {ours.get(name)!r}, got {config[name]!r}")
    return sizes, window


def _header(path: Path) -> tuple[dict[str, tuple[list[int], str]], dict[str, str]]:
    """Shape and dtype of each tensor, and what the file says of itself."""
    from safetensors import safe_open

    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path.name}")
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        return {name: (each.get_shape(), each.get_dtype()) for name, each in slices.items()}, file.metadata() or {}


def _check_tensors(name: str, found: Mapping[str, tuple[list[int], str]], wanted: Mapping[str, list[int]]) -> None:
    for tensor in sorted(found.keys() ^ wanted.keys()):
        raise CheckpointError(f"{name} {'has no' if tensor in wanted else 'must have no'} tensor {tensor!r}")
    for tensor, (shape, dtype) in found.items():
        if shape != wanted[tensor] or dtype not in _FLOATS:
            raise CheckpointError(f"{name}: {tensor!r} must be floats of shape {wanted[tensor]}, got {dtype} {shape}")


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
