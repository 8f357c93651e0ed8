"""Checkpoints: what is read is what was written, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcrl import checkpoint
from gcrl.checkpoint import CheckpointError


def make(seed: int = 0, width: int = 4) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW(matrices, lr=0.1)
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer.add_param_group({"params": vectors, "weight_decay": 0.0})
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def averages(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() + 1 for name, p in model.named_parameters()}


def test_a_restored_optimizer_goes_on_bitwise(tmp_path: Path) -> None:
    model, optimizer = make()
    advance(model, optimizer, 3)
    saved = checkpoint.save(tmp_path, 3, model, optimizer, ema=averages(model), state={"seed": 7})
    other, other_optimizer = make(seed=1)
    checkpoint.load_weights(other, saved, ema=False)
    checkpoint.load_optimizer(other, other_optimizer, saved)
    for pair in ((model, optimizer), (other, other_optimizer)):
        advance(*pair, 4)
    assert equal(model.state_dict(), other.state_dict())
    assert checkpoint.load_state(saved)["seed"] == 7
    assert checkpoint.load_state(saved)["step"] == 3


def test_averages_are_a_second_set_of_weights(tmp_path: Path) -> None:
    model, optimizer = make()
    saved = checkpoint.save(tmp_path, 0, model, optimizer, ema=averages(model))
    other, _ = make(seed=1)
    checkpoint.load_weights(other, saved)
    assert equal(other.state_dict(), averages(model))
    read = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    checkpoint.load_ema(saved, read)
    assert equal(read, averages(model))
    bare = checkpoint.save(tmp_path, 1, model, optimizer)
    checkpoint.load_weights(other, bare)  # none kept: the weights themselves
    assert equal(other.state_dict(), model.state_dict())


def test_the_newest_two_are_kept_and_nothing_is_pickled(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    model, optimizer = make()
    for step in (5, 10, 100):
        advance(model, optimizer, 1)
        saved = checkpoint.save(tmp_path, step, model, optimizer, ema=averages(model))
        assert checkpoint.latest(tmp_path) == saved
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000100"]
    assert {path.name for path in saved.iterdir()} == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
    }  # fmt: skip


@pytest.mark.parametrize("fails_at", range(4))
def test_a_save_that_fails_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    model, optimizer = make()
    advance(model, optimizer, 1)
    first = checkpoint.save(tmp_path, 1, model, optimizer, ema=averages(model))
    written: list[Path] = []
    write = checkpoint.write_durably

    def fill_the_disk(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > fails_at:
            write(path, content[: len(content) // 2])
            raise OSError("no space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_durably", fill_the_disk)
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(tmp_path, 2, model, optimizer, ema=averages(model))
    assert checkpoint.latest(tmp_path) == first
    checkpoint.load_weights(make(seed=1)[0], first)
    checkpoint.save(tmp_path, 3, model, optimizer)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000003"]  # the leftover is gone


def test_saving_a_step_again_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = make()
    saved = checkpoint.save(tmp_path, 1, model, optimizer)
    before = (saved / "model.safetensors").read_bytes()
    advance(model, optimizer, 1)
    assert checkpoint.save(tmp_path, 1, model, optimizer) == saved
    assert (saved / "model.safetensors").read_bytes() == before


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        _flip,
        lambda p: p.write_bytes(p.read_bytes()[:40]),
        lambda p: p.write_bytes(b""),
    ],
    ids=["missing", "one bit", "cut short", "empty"],
)
def test_damage_names_the_file(tmp_path: Path, name: str, damage: Any) -> None:
    model, optimizer = make()
    advance(model, optimizer, 1)
    saved = checkpoint.save(tmp_path, 1, model, optimizer, ema=averages(model))
    damage(saved / f"{name}.safetensors")
    loads = {
        "model": lambda: checkpoint.load_weights(model, saved, ema=False),
        "ema": lambda: checkpoint.load_ema(saved, averages(model)),
        "optimizer": lambda: checkpoint.load_optimizer(model, optimizer, saved),
    }
    with pytest.raises(CheckpointError, match=f"{saved}/{name}.safetensors: "):
        loads[name]()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"step": "1"}', b'{"step": 1}'])
def test_a_damaged_state_names_the_file(tmp_path: Path, content: bytes) -> None:
    saved = checkpoint.save(tmp_path, 1, *make())
    (saved / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{saved}/state.json: "):
        checkpoint.load_weights(make()[0], saved)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = make()
    advance(model, optimizer, 1)
    saved = checkpoint.save(tmp_path, 1, model, optimizer)
    wider, wider_optimizer = make(width=5)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: '0.weight' has the shape \[4, 3\]"
    ):
        checkpoint.load_weights(wider, saved)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: '0.bias/exp_avg' has the"):
        checkpoint.load_optimizer(wider, wider_optimizer, saved)
    shorter = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(CheckpointError, match=r"has '2\.\w+', which the model does not"):
        checkpoint.load_weights(shorter, saved)
    longer = nn.Sequential(*model, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"has no '3\.\w+', which the model needs"):
        checkpoint.load_weights(longer, saved)


def test_state_is_plain_json(tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, 1, *make(), state={"seed": 3})
    assert json.loads((saved / "state.json").read_text())["seed"] == 3
