"""The public functions under what PyTorch puts around them: checkpointing, torch.func, tracing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from public_functions import CASES, CHOSEN, Case, gradients
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_function = pytest.mark.parametrize("case", CHOSEN.values(), ids=CHOSEN)


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def only_ours(ctx: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Keeps what the operators of this package return."""
    ours = operator.namespace == "gcrl_kernels"
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "without reentrance": lambda f: partial(checkpoint, f, use_reentrant=False),
    "reentrant": lambda f: partial(checkpoint, f, use_reentrant=True),
    "selective": lambda f: partial(
        checkpoint,
        f,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, only_ours),
    ),
    "wrapped module": lambda f: checkpoint_wrapper(Call(f)),
}


@every_case
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_activation_checkpointing(case: Case, kind: str) -> None:
    inputs = case.inputs()
    expected = gradients(case, inputs, case.call(*inputs))
    output = CHECKPOINTS[kind](case.call)(*inputs)
    if kind == "reentrant":  # which knows backward() alone
        weights = torch.linspace(0.5, 1.5, output.numel()).view(output.shape)
        (output * weights).sum().backward()
        actual = [tensor.grad for tensor in inputs]
    else:
        actual = gradients(case, inputs, output)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_case
@pytest.mark.parametrize(
    "hooks",
    [save_on_cpu, partial(saved_tensors_hooks, lambda t: t.numpy(force=True), torch.from_numpy)],
    ids=["save_on_cpu", "numpy"],
)
def test_saved_tensor_hooks(case: Case, hooks: Callable[[], AbstractContextManager[Any]]) -> None:
    inputs = case.inputs()
    expected = gradients(case, inputs, case.call(*inputs))
    with hooks():
        output = case.call(*inputs)
    assert all(map(torch.equal, gradients(case, inputs, output), expected))


def test_checkpointed_blocks_of_the_model() -> None:
    from gcrl.config import ModelConfig
    from gcrl.model import GCRL

    config = ModelConfig(grid=(4, 4), width=16, heads=2, outer_layers=2, inner_layers=1)
    model = GCRL(config)
    tokens = torch.randint(0, config.colors, (2, 4, 4))

    def run() -> list[Tensor]:
        model.logits(tokens).square().sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    expected = run()
    model.outer = nn.ModuleList(checkpoint_wrapper(block) for block in model.outer)
    model.inner = nn.ModuleList(checkpoint_wrapper(block) for block in model.inner)
    assert len(expected) > 20
    assert all(map(torch.equal, run(), expected))


@every_case
def test_torch_func_grad_is_the_gradient(case: Case) -> None:
    inputs = case.inputs()
    expected = torch.autograd.grad(case.call(*inputs).sum(), inputs)
    argnums = tuple(range(len(inputs)))
    plain = [tensor.detach() for tensor in inputs]
    actual = torch.func.grad(lambda *t: case.call(*t).sum(), argnums)(*plain)
    assert all(map(torch.equal, actual, expected))
    _, pull = torch.func.vjp(lambda *t: case.call(*t).sum(), *plain)
    assert all(map(torch.equal, pull(torch.ones(())), expected))


@every_case
def test_vmap_and_gradients_of_each_sample(case: Case) -> None:
    samples = [[t.detach() * factor for t in case.inputs()] for factor in (0.5, 1.0, 1.5)]
    together = [torch.stack(tensors) for tensors in zip(*samples, strict=True)]
    expected = torch.stack([case.call(*inputs) for inputs in samples])
    torch.testing.assert_close(torch.vmap(case.call)(*together), expected)
    differentiated = torch.func.grad(
        lambda *t: case.call(*t).sum(), argnums=tuple(range(len(together)))
    )
    each = [differentiated(*inputs) for inputs in samples]
    for actual, parts in zip(
        torch.vmap(differentiated)(*together), zip(*each, strict=True), strict=True
    ):
        torch.testing.assert_close(actual, torch.stack(parts))
    whole = torch.func.grad(lambda *t: torch.vmap(case.call)(*t).sum())(*together)
    torch.testing.assert_close(whole, torch.stack([parts[0] for parts in each]))


@every_case
def test_a_forward_mode_derivative_is_an_error(case: Case) -> None:
    inputs = tuple(tensor.detach() for tensor in case.inputs())
    ones = tuple(map(torch.ones_like, inputs))
    for attempt in (
        lambda: torch.func.jvp(case.call, inputs, ones),
        lambda: torch.func.jacfwd(case.call)(*inputs),
        lambda: torch.func.jvp(
            partial(torch.vmap(case.call)), *[_stacked(t) for t in (inputs, ones)]
        ),
    ):
        losses = ("nt_xent", "dcl", "supcon", "info_nce")
        name = "a contrastive loss" if case.name in losses else case.name
        with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
            attempt()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, one) for t, one in zip(inputs, ones, strict=True)]
        with pytest.raises(NotImplementedError, match=f"{case.name} has no forward-mode deriv"):
            case.call(*duals)
        assert torch.equal(case.call(*inputs), case.call(*inputs))  # without a tangent


def _stacked(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([tensor, tensor]) for tensor in tensors)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_have_the_shapes(case: Case, dtype: torch.dtype) -> None:
    here, there = case.inputs(dtype=dtype), case.inputs(dtype=dtype, device="meta")
    output, shape = case.call(*here), case.call(*there)
    assert shape.is_meta
    assert (shape.shape, shape.dtype) == (output.shape, output.dtype)
    for actual, expected in zip(
        gradients(case, there, shape), gradients(case, here, output), strict=True
    ):
        assert actual.is_meta
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)


@every_function
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is:DeprecationWarning")
def test_a_trace_computes_the_same(case: Case) -> None:
    inputs = [tensor.detach() for tensor in case.inputs()]
    traced = torch.jit.trace(case.call, tuple(inputs), check_trace=False)
    others = [tensor * 1.25 for tensor in inputs]
    assert torch.equal(traced(*others), case.call(*others))


@every_function
def test_freed_memory_is_an_error(case: Case) -> None:
    if case.call.__name__ == "colors_in_place":
        pytest.skip("its own multiplication reads the memory first")
    for place in range(len(case.shapes)):
        inputs = case.inputs()
        inputs[place].untyped_storage().resize_(0)
        with pytest.raises(TypeError, match=r"^\w+: expected a tensor that has its memory"):
            case.call(*inputs)
    inputs = [tensor.detach().requires_grad_() for tensor in case.inputs()]
    output = case.call(*inputs)
    for tensor in inputs:
        tensor.untyped_storage().resize_(0)
    if case.call.__name__ == "linear":  # which keeps its gradients alone
        gradients(case, inputs, output)
    else:
        with pytest.raises(RuntimeError, match="the storage of a tensor that was saved"):
            gradients(case, inputs, output)


@every_function
@pytest.mark.parametrize("kind", ["sparse", "csr", "mkldnn", "nested", "jagged"])
def test_tensors_that_are_not_dense_are_named(case: Case, kind: str) -> None:
    convert: dict[str, Callable[[Tensor], Tensor]] = {
        "sparse": lambda t: t.to_sparse(),
        "csr": lambda t: t.flatten(1).to_sparse_csr(),
        "mkldnn": lambda t: t.to_mkldnn(),
        "nested": lambda t: torch.nested.nested_tensor([t, t]),
        "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    }
    for place, shape in enumerate(case.shapes):
        if len(shape) < 2 or (kind == "mkldnn" and len(shape) > 5):
            continue
        inputs = [tensor.detach() for tensor in case.inputs()]
        inputs[place] = convert[kind](inputs[place])
        with pytest.raises(TypeError, match=r"^\w+: expected a dense tensor, got a .* one"):
            case.call(*inputs)


@every_function
def test_quantized_tensors_are_named(case: Case) -> None:
    if case.call.__name__ == "colors_in_place":
        pytest.skip("its own multiplication refuses them first")
    inputs = [tensor.detach() for tensor in case.inputs()]
    inputs[0] = torch.quantize_per_tensor(inputs[0], 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"^\w+: expected a dense tensor, got a quantized one"):
        case.call(*inputs)
