"""Checkpoints: RUN/checkpoints/step-00000200/{model,ema,optimizer}.safetensors and state.json.

A checkpoint is written under a temporary name, flushed to the disk and renamed, so that one under
its final name is whole. state.json holds a SHA-256 of every other file, and of itself without that
entry. Loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gcrl.config import parse_json

KEPT = 2  # the newest checkpoints of a run
STATE = "state.json"
OWN_DIGEST = "sha256 of this file"
_UNFINISHED = ".unfinished-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or does not fit; the message names the file."""


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    ema: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of a step into the run's folder and drop all but the newest two.

    ema: averages of the model's parameters by name, stored as a second set of weights.
    state: JSON values that state.json holds beside the step.
    An existing checkpoint of that step is left as it is.
    """
    final = Path(folder) / "checkpoints" / f"step-{step:08d}"
    final.parent.mkdir(parents=True, exist_ok=True)
    clean(folder)
    if final.exists():
        return final

    weights = model.state_dict()
    files = {"model.safetensors": weights, "optimizer.safetensors": _moments(model, optimizer)}
    if ema is not None:
        files["ema.safetensors"] = {**weights, **ema}
    unfinished = final.parent / f"{_UNFINISHED}{final.name}"
    unfinished.mkdir()
    digests = {name: _write_tensors(unfinished / name, files[name]) for name in sorted(files)}
    content = {"step": step, **(state or {}), "sha256": digests}
    content[OWN_DIGEST] = digest_of(content)
    write_durably(unfinished / STATE, (json.dumps(content, indent=2) + "\n").encode())
    _flush_folder(unfinished)
    unfinished.rename(final)
    _flush_folder(final.parent)

    clean(folder)
    return final


def clean(folder: str | Path) -> None:
    """Remove what an interruption may have left: unfinished files, and all but the newest two."""
    for file in Path(folder).glob(".*.tmp"):
        file.unlink()
    for old in _steps(folder)[:-KEPT]:  # renamed first, so that none is ever half a checkpoint
        old.rename(old.with_name(_UNFINISHED + old.name))
    for leftover in (Path(folder) / "checkpoints").glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run; None if it has none."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def load_weights(model: nn.Module, checkpoint: str | Path, ema: bool = True) -> None:
    """Load a checkpoint's weights into the model: their average, if wanted and kept.

    Raises:
        CheckpointError: a file is missing, damaged or of another model.
    """
    checkpoint = Path(checkpoint)
    average = ema and "ema.safetensors" in load_state(checkpoint)["sha256"]
    name = "ema.safetensors" if average else "model.safetensors"
    tensors = _read_tensors(checkpoint, name)
    _check_fit(checkpoint / name, tensors, model.state_dict())
    model.load_state_dict(tensors)


def load_ema(checkpoint: str | Path, ema: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's averages into tensors by parameter name; raises as load_weights."""
    tensors = _read_tensors(Path(checkpoint), "ema.safetensors")
    averages = {name: tensors[name] for name in ema if name in tensors}
    _check_fit(Path(checkpoint) / "ema.safetensors", averages, ema)
    for name, average in ema.items():
        average.copy_(averages[name])


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: str | Path
) -> None:
    """Load the optimiser's state, by the parameters' names; raises as load_weights."""
    path = Path(checkpoint) / "optimizer.safetensors"
    numbers = {name: i for i, name in enumerate(_names(model, optimizer))}
    parameters = dict(model.named_parameters())
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(path.parent, path.name).items():
        name, _, moment = key.rpartition("/")
        if name not in numbers:
            raise CheckpointError(f"{path}: has {key!r}, but the model has no such parameter")
        if tensor.ndim and tensor.shape != parameters[name].shape:
            raise CheckpointError(
                f"{path}: {key!r} has the shape {list(tensor.shape)}, "
                f"the parameter {list(parameters[name].shape)}"
            )
        moments.setdefault(numbers[name], {})[moment] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def load_state(checkpoint: str | Path) -> dict[str, Any]:
    """What state.json holds.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(checkpoint) / STATE
    try:
        state = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(state, dict) or state.pop(OWN_DIGEST, None) != digest_of(state):
        raise CheckpointError(f"{path}: is damaged: its SHA-256 is not the one in it")
    if not isinstance(state.get("step"), int) or not isinstance(state.get("sha256"), dict):
        raise CheckpointError(f"{path}: is damaged: expected an object with 'step' and 'sha256'")
    return state


def digest_of(state: Mapping[str, Any]) -> str:
    """SHA-256 of what state.json holds, however it is laid out."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and see it onto the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, either the old or the new one is there, and whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_durably(temporary, content)
    temporary.replace(path)
    _flush_folder(path.parent)


def _steps(folder: str | Path) -> list[Path]:
    return sorted((Path(folder) / "checkpoints").glob("step-*"))


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The model's names of the optimiser's parameters, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]  # by number
    names = _names(model, optimizer)
    return {
        f"{names[number]}/{moment}": tensor
        for number, moments in state.items()
        for moment, tensor in moments.items()
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the file."""
    content = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )
    write_durably(path, content)
    return hashlib.sha256(content).hexdigest()


def _read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    path = checkpoint / name
    expected = load_state(checkpoint)["sha256"].get(name)
    try:
        content = path.read_bytes()
        if expected != hashlib.sha256(content).hexdigest():
            raise CheckpointError(f"{path}: is damaged: its SHA-256 is not the one in {STATE}")
        tensors = safetensors.torch.load(content)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    # Cloned, so that they are aligned in memory as when they were computed.
    return {key: tensor.clone() for key, tensor in sorted(tensors.items())}


def _check_fit(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in [*expected, *tensors]:
        if name not in tensors:
            raise CheckpointError(f"{path}: has no {name!r}, which the model needs")
        if name not in expected:
            raise CheckpointError(f"{path}: has {name!r}, which the model does not")
        if tensors[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name!r} has the shape {list(tensors[name].shape)}, "
                f"the model's {list(expected[name].shape)}"
            )


def _flush_folder(folder: Path) -> None:
    """See a folder's entries onto the disk; where the system cannot (Windows), nothing is done."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
