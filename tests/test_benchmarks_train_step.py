"""The benchmark of a training step: equal models, errors found, a step that is the trainer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bench_train_step, contest, results
from benchmarks.bench_train_step import TrainStep
from benchmarks.breakdown import (
    OPTIMIZER,
    OUR_OPERATIONS,
    REST,
    backward_too,
    kernel_times,
    shares,
    times,
)
from benchmarks.contest import PLAIN, Contender
from benchmarks.peers import train_step as peers
from gcrl.config import Config
from gcrl.run import build_model
from gcrl.trainer import learning_rate, make_optimizer
from gcrl_kernels import axial_attention_packed, linear_color_cross_entropy

EAGER = [contender for contender in peers.CONTENDERS if "compile" not in contender.name]


@dataclass(frozen=True)
class Tiny(TrainStep):
    """A step of a model of a few thousand weights, on images that are not square."""

    preset: str = "tiny"
    batch: int = 5
    dtype: torch.dtype = torch.float32

    @cached_property
    def config(self) -> Config:
        config = Config()
        model = replace(config.model, grid=(4, 6), colors=16, width=12, heads=3, projection_dim=7)
        return replace(config, model=model)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contest of few rounds."""
    rounds = {"cpu": 2, "cuda": 2}
    monkeypatch.setattr("benchmarks.measure.ROUNDS", rounds)
    monkeypatch.setattr("benchmarks.measure.LEAST_ROUNDS", 1)


def test_the_exact_values_are_those_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Tiny()
    monkeypatch.setattr(bench_train_step, "BLOCK", 2 * 4 * 6)  # images 2, 2 and 1
    generative, contrastive, *gradients = case.exact("step")
    model = build_model(case.config).double().to(case.device)
    losses = model(*case.tokens(), case.config.objective)
    (losses.generative + losses.contrastive).backward()
    torch.testing.assert_close(generative, losses.generative.detach())
    torch.testing.assert_close(contrastive, losses.contrastive.detach())
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("contender", EAGER, ids=lambda contender: contender.name)
def test_a_contender_is_right_in_every_loss_and_gradient(
    contender: Contender, dtype: torch.dtype
) -> None:
    case = Tiny(dtype=dtype)
    try:
        step = contender.build(case)
    except contest.Unavailable as reason:
        pytest.skip(str(reason))
    errors = contest.relative_errors(step.check(), case.exact("step"))
    assert len(errors) == 2 + len(list(step.model.parameters()))
    assert contest.what_is_wrong(errors, None, case) is None
    assert max(errors) > 0
    if dtype == torch.bfloat16:  # it is in use
        assert max(errors) > 1e-4


def _wrong_attention(qkv: Tensor, axis: int, *, causal: bool, backend: None = None) -> Tensor:
    return peers.attention(qkv, axis, causal=False)


def _wrong_contrast(z0: Tensor, z1: Tensor, *, temperature: float, **_: object) -> Tensor:
    return peers.nt_xent_by_hand(1.001 * temperature)(z0, z1)


def _wrong_colors(hidden: Tensor, weight: Tensor, tokens: Tensor, **options: Tensor) -> Tensor:
    loss = peers.cross_entropy(hidden, weight, tokens, **options)
    return loss + 1e-3 * (hidden - hidden.detach()).mean()  # the gradient alone


@pytest.mark.parametrize(
    ("operation", "wrong", "message"),
    [
        ("axial_attention_packed", _wrong_attention, "the generative loss is"),
        ("nt_xent", _wrong_contrast, "the contrastive loss is"),
        ("linear_color_cross_entropy", _wrong_colors, "the gradient of"),
    ],
)
def test_a_planted_error_gets_no_time(
    operation: str, wrong: Callable[..., Tensor], message: str, quick: None
) -> None:
    def build(case: Tiny) -> peers.Step:
        return peers.Step(case, {**peers.pytorch(case), operation: wrong})

    plain = next(contender for contender in EAGER if contender.name == PLAIN)
    outcomes = contest.hold(Tiny(), "step", [Contender("wrong", build), plain])
    assert outcomes["wrong"].status == "wrong"
    assert outcomes["wrong"].reason.startswith(message)
    assert not outcomes["wrong"].seconds
    assert outcomes[PLAIN].status == "ok"


def test_a_contest_tells_images_a_second_memory_and_where_the_time_goes(quick: None) -> None:
    case, contenders = Tiny(), EAGER[:2]
    outcomes = contest.hold(case, "step", contenders)
    weights = sum(parameter.numel() for parameter in build_model(case.config).parameters())
    for contender in contenders:
        outcome = outcomes[contender.name]
        assert outcome.status == "ok", outcome.reason
        entry = results._entry(outcome, 1e-6)
        assert entry["images_per_second"] == pytest.approx(case.batch / entry["median"])
        assert entry["held_bytes"] >= 3 * 4 * weights
        where = entry["where"]
        assert list(where) == [*OUR_OPERATIONS.values(), OPTIMIZER, REST]
        assert sum(where.values()) == pytest.approx(1)
        assert min(where.values()) > 0
    assert case.work("step").flops > 0


def test_the_peers_attention_copies_nothing_and_is_ours() -> None:
    qkv = torch.randn(2, 4, 6, 3, 3, 5)  # [B, H, W, heads, 3, D]
    for axis in (0, 1):
        for tensor in qkv.unbind(-2):
            rows = peers._rows(tensor, axis)
            assert rows.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        for causal in (False, True):
            torch.testing.assert_close(
                peers.attention(qkv, axis, causal=causal),
                axial_attention_packed(qkv.transpose(-2, -3), axis, causal=causal),
            )


@pytest.mark.parametrize("masked", [False, True])
def test_the_peers_cross_entropy_is_ours_with_any_torch(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias = torch.randn(2, 3, 4, 8), torch.randn(5, 8), torch.randn(5)
    tokens = torch.randint(5, (2, 3, 4))
    mask = torch.rand(2, 3, 4) > 0.5 if masked else None
    expected = linear_color_cross_entropy(hidden, weight, tokens, bias=bias, mask=mask)
    actual = peers.cross_entropy(hidden, weight, tokens, bias=bias, mask=mask)
    torch.testing.assert_close(actual, expected)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    actual = peers.cross_entropy(hidden, weight, tokens, bias=bias, mask=mask)
    torch.testing.assert_close(actual, expected)


def test_a_step_is_clipped_and_decayed_as_in_training() -> None:
    case = Tiny()
    optim = case.config.optim
    step = peers.Step(case, {})
    _, _, *gradients = step.check()
    assert all(parameter.grad is None for parameter in step.model.parameters())
    expected = build_model(case.config).to(case.device)
    for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), optim.clip)
    optimizer = make_optimizer(expected, optim)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(optim, 0)
    optimizer.step()
    step()
    before = build_model(case.config).to(case.device)
    for name, parameter in step.model.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name))
        assert not torch.equal(parameter, before.get_parameter(name))
        assert parameter.grad is None


def test_copies_of_the_model_do_not_share_their_operations() -> None:
    def contrast(value: float) -> Callable[..., Tensor]:
        return lambda z0, z1, **_: (z0 * 0).sum() + value

    case = Tiny()
    steps = [
        peers.Step(case, {**peers.pytorch(case), "nt_xent": contrast(value)})
        for value in (1.0, 2.0)
    ]
    for step in steps:
        step.network = torch.compile(step.model, backend="eager")
    losses = [step.check()[1].item() for step in [*steps, *steps]]
    assert losses == [1.0, 2.0, 1.0, 2.0]


def test_ranges_cover_the_backward_and_change_nothing() -> None:
    def function(x: Tensor, *, scale: Tensor) -> Tensor:
        return (x @ x.mT * scale).exp().mean()

    x, scale = torch.randn(64, 64, requires_grad=True), torch.tensor(0.01, requires_grad=True)
    ranged = backward_too("attention", function)
    expected = torch.autograd.grad(function(x, scale=scale), (x, scale))
    torch.testing.assert_close(torch.autograd.grad(ranged(x, scale=scale), (x, scale)), expected)

    large = torch.randn(1024, 1024, requires_grad=True)
    found = shares(lambda: ranged(large, scale=scale).backward())
    assert list(found) == ["attention", REST]
    assert found["attention"] > 0.7  # the products, one forward and two backward
    only_forward = backward_too("attention", lambda x: (x * 1).sum())
    found = shares(lambda: (only_forward(large @ large)).backward())
    assert found["attention"] < 0.7  # the products are outside


def _event(name: str, parent: object = None, *kernels: float, time: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, cpu_parent=parent, cpu_time_total=time,
        kernels=[SimpleNamespace(duration=duration) for duration in kernels],
        is_user_annotation=name in ("step", "attention"),
    )  # fmt: skip


def test_each_kernel_and_each_moment_counts_once() -> None:
    step = _event("step", None, 100.0, time=50.0)
    attention = _event("attention", step, 40.0, time=20.0)
    operator = _event("gcrl_kernels::axial_attention_packed", attention, 1.0, time=15.0)
    inside = _event("aten::bmm", operator, 2.0, 3.0, time=9.0)
    outside = _event("aten::mm", step, 7.0, time=8.0)
    loss = _event("gcrl_kernels::contrast", step, 0.5, time=1.0)
    events = [step, attention, operator, inside, outside, loss]
    assert kernel_times(events) == {"step": 13.5, "attention": 6.0, REST: 7.0, "NT-Xent": 0.5}
    assert times(events) == {"step": 50.0, "attention": 20.0, "NT-Xent": 1.0}
