"""The axial transformer: what each output may see, and that it is a normalised density."""

from __future__ import annotations

import itertools
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny_model import draw_tokens, make_model
from torch.profiler import ProfilerActivity, profile

from gcrl.config import ModelConfig, ObjectiveConfig
from gcrl.model import GCRL

GRIDS = [(2, 3), (3, 2), (1, 3), (3, 1), (4, 3)]
BOTH = ObjectiveConfig(alpha=1.0, beta=1.0, temperature=0.3)


def sensitivity(model, read, grid):
    """Largest |d read[j] / d embed[i]| for pixels j, i in raster order: [H * W, H * W]."""
    embedded: list[torch.Tensor] = []

    def make_leaf(module, arguments, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.embed.register_forward_hook(make_leaf)
    outputs = read(draw_tokens(1, grid)).flatten(0, -2)  # [H * W, features]
    handle.remove()
    rows = []
    for output in outputs:
        gradients = [
            torch.autograd.grad(value, embedded[0], retain_graph=True, allow_unused=True)[0]
            for value in output
        ]
        largest = torch.stack([g for g in gradients if g is not None]).abs().amax((0, -1))
        rows.append(largest.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("layers", [(2, 1), (4, 2)])
@pytest.mark.parametrize("grid", GRIDS)
def test_logits_see_every_earlier_pixel_and_no_other(grid, layers):
    model = make_model(grid, outer_layers=layers[0], inner_layers=layers[1])
    seen = sensitivity(model, model.logits, grid)
    pixels = torch.arange(seen.shape[0])
    earlier = pixels[None] < pixels[:, None]  # [j, i]: i comes before j
    assert torch.equal(seen != 0, earlier), seen
    assert seen[earlier].numel() == 0 or seen[earlier].min() > 1e-6


@pytest.mark.parametrize("grid", GRIDS)
def test_encoding_sees_its_row_and_all_rows_above(grid):
    model = make_model(grid)
    seen = sensitivity(model, model.encode, grid)
    row = torch.arange(seen.shape[0]) // grid[1]
    assert torch.equal(seen != 0, row[None] <= row[:, None]), seen


def test_projection_sees_every_pixel():
    model = make_model((3, 4))
    seen = sensitivity(model, lambda tokens: model.project(model.features(tokens)), (3, 4))
    assert seen.shape == (1, 12)
    assert seen.min() > 1e-6


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (4, 1)])
def test_probabilities_of_all_images_sum_to_one(grid):
    model = make_model(grid, colors=3)
    images = torch.tensor(list(itertools.product(range(3), repeat=4))).view(81, *grid)
    with torch.no_grad():
        log_prob = model.log_prob(images)
    assert log_prob.std() > 0.5  # far from uniform
    assert torch.logsumexp(log_prob, 0).item() == pytest.approx(0, abs=1e-12)


def test_log_prob_is_the_logits_log_softmax_at_the_tokens():
    model, tokens = make_model(), draw_tokens(4)
    picked = model.logits(tokens).log_softmax(-1).gather(-1, tokens[..., None])
    torch.testing.assert_close(model.log_prob(tokens), picked.sum((1, 2, 3)))


def nt_xent_written_out(z0, z1, temperature):
    z = torch.cat((z0, z1))
    z = z / z.norm(dim=1, keepdim=True)
    n = len(z)
    total = 0.0
    for i in range(n):
        similar = {k: math.exp(z[i].dot(z[k]).item() / temperature) for k in range(n) if k != i}
        total -= math.log(similar[(i + n // 2) % n] / sum(similar.values()))
    return total / n


def test_losses_are_the_formulas():
    model, weak, strong = make_model(), draw_tokens(4), draw_tokens(4, seed=2)
    losses = model(weak, strong, BOTH)
    nats = F.cross_entropy(model.logits(weak).flatten(0, 2), weak.flatten())
    torch.testing.assert_close(losses.generative, nats)
    torch.testing.assert_close(losses.generative, -model.log_prob(weak).mean() / 6)
    with torch.no_grad():
        z0, z1 = (model.project(model.features(tokens)) for tokens in (weak, strong))
    expected = nt_xent_written_out(z0, z1, temperature=0.3)
    assert losses.contrastive.item() == pytest.approx(expected, rel=1e-6)


def test_first_pixel_is_left_out_on_request():
    model, weak = make_model(), draw_tokens(4)
    objective = ObjectiveConfig(beta=0.0, score_first_pixel=False)
    logits, targets = model.logits(weak).flatten(1, 2)[:, 1:], weak.flatten(1)[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(weak, None, objective).generative, expected)


def test_a_part_of_weight_zero_is_not_computed():
    model, weak, strong = make_model(), draw_tokens(4), draw_tokens(4, seed=2)
    whole = model(weak, strong, BOTH)
    calls: list[tuple[str, int]] = []
    for name in ("outer", "inner"):
        block = getattr(model, name)[0]
        block.register_forward_pre_hook(lambda _, x, name=name: calls.append((name, len(x[0]))))
    model.projection.register_forward_pre_hook(lambda _, x: calls.append(("project", len(x[0]))))

    generative = model(weak, None, ObjectiveConfig(alpha=1.0, beta=0.0))
    assert calls == [("outer", 4), ("inner", 4)]
    torch.testing.assert_close(generative.generative, whole.generative)
    assert generative.contrastive.item() == 0

    calls.clear()
    contrastive = model(weak, strong, ObjectiveConfig(alpha=0.0, beta=1.0, temperature=0.3))
    assert calls == [("outer", 8), ("project", 8)]
    torch.testing.assert_close(contrastive.contrastive, whole.contrastive)
    assert contrastive.generative.item() == 0

    calls.clear()
    model(weak, strong, BOTH)
    assert calls == [("outer", 8), ("project", 8), ("inner", 4)]


def test_gradients_reach_every_parameter():
    model = make_model(outer_layers=4, inner_layers=2)
    losses = model(draw_tokens(4), draw_tokens(4, seed=2), BOTH)
    (losses.generative + losses.contrastive).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name == "embed.weight":
            assert (parameter.grad.abs().amax(1) > 0).all()
        assert parameter.grad.abs().max() > 1e-9, name


def test_contrastive_gradient_alone_reaches_no_decoder_and_generative_no_projection():
    for alpha, beta, silent in ((0.0, 1.0, ("inner", "head")), (1.0, 0.0, ("projection",))):
        model = make_model()
        losses = model(draw_tokens(4), draw_tokens(4, seed=2), ObjectiveConfig(alpha, beta))
        (alpha * losses.generative + beta * losses.contrastive).backward()
        without = {
            name.split(".")[0].split("_")[0]
            for name, parameter in model.named_parameters()
            if parameter.grad is None
        }
        assert without >= set(silent), without
        assert not without & {"embed", "row", "column"}, without


def test_initial_weights_follow_the_seed_and_the_depth():
    config = ModelConfig(grid=(4, 4), colors=64, width=64, heads=4, outer_layers=6, inner_layers=2)
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(GCRL(config))
    first, again, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    block = models[0].inner[1]
    assert block.qkv.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    for residual in (block.merge, block.mlp[-1]):  # 8 blocks write to the residual twice
        expected = residual.in_features**-0.5 / 4
        assert residual.weight.std().item() == pytest.approx(expected, rel=0.05)
    tokens = draw_tokens(8, (4, 4), 64)
    nats = models[0](tokens, None, ObjectiveConfig(beta=0.0)).generative
    assert nats.item() == pytest.approx(math.log(64), abs=0.1)


@pytest.mark.parametrize("width", [64, 63])
def test_initial_positions_tell_places_apart_and_distances_alike(width):
    torch.manual_seed(0)
    config = ModelConfig(grid=(6, 9), width=width, heads=1, outer_layers=2, inner_layers=1)
    position = GCRL(config).position().detach()  # [6, 9, C]
    flat = position.flatten(0, 1)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 0.1
    if width == 64:  # the product of two places is a function of how far they are apart
        products = torch.einsum("rci,rdi->rcd", position, position)
        for distance in range(9):
            diagonal = products.diagonal(distance, 1, 2)
            torch.testing.assert_close(diagonal, diagonal[:1, :1].expand_as(diagonal))


def test_dtypes_in_float32_and_under_autocast():
    model = make_model(dtype=torch.float32)
    weak, strong = draw_tokens(8), draw_tokens(8, seed=2)
    plain = model(weak, strong, BOTH)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(weak, strong, BOTH)
        assert model.log_prob(weak).dtype == torch.float32
    sum(narrow).backward()
    for exact, rounded in zip(plain, narrow, strict=True):
        assert exact.dtype == rounded.dtype == torch.float32
        assert exact.shape == rounded.shape == ()
        assert rounded.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert model.features(weak).shape == (8, 12)
    assert model.encode(weak).shape == (8, 2, 3, 12)


def losses_and_gradients(model, call, count, objective):
    model.zero_grad()
    losses = call(draw_tokens(count), draw_tokens(count, seed=2), objective)
    sum(losses).backward()
    return [*losses, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("score_first_pixel", [True, False])
def test_traced_losses_and_gradients_are_the_same(score_first_pixel):
    torch.compiler.reset()
    objective = ObjectiveConfig(temperature=0.3, score_first_pixel=score_first_pixel)
    model = make_model()
    traced = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 7):
        torch.testing.assert_close(
            losses_and_gradients(model, traced, count, objective),
            losses_and_gradients(model, model, count, objective),
        )


@pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
@torch.no_grad()
def test_compiled_losses_are_the_same():
    torch.compiler.reset()
    model, weak, strong = make_model(), draw_tokens(4), draw_tokens(4, seed=2)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(weak, strong, BOTH), model(weak, strong, BOTH))


@pytest.mark.parametrize("method", ["encode", "features", "logits", "log_prob"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(4, 3, 2, dtype=torch.int64), ValueError, r"\[B, 2, 3\], got \[4, 3, 2\]"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"\[B, 2, 3\], got \[2, 3\]"),
        (torch.zeros(4, 2, 3), TypeError, "expected int64 tokens, got torch.float32"),
        ([[0]], TypeError, "expected an int64 tensor, got list"),
    ],
)
def test_wrong_tokens_are_named(method, tokens, error, message):
    with pytest.raises(error, match=f"^tokens: .*{message}"):
        getattr(make_model(), method)(tokens)


def test_wrong_views_are_named():
    model, weak = make_model(), draw_tokens(4)
    with pytest.raises(ValueError, match=r"^weak: .*got \[4, 4, 3\]"):
        model(draw_tokens(4, (4, 3)), weak, BOTH)
    with pytest.raises(TypeError, match=r"^strong: expected an int64 tensor, got NoneType"):
        model(weak, None, BOTH)
    with pytest.raises(TypeError, match=r"^strong: expected int64 tokens, got torch.int32"):
        model(weak, weak.int(), BOTH)
    with pytest.raises(ValueError, match=r"^strong: expected as many images as weak, 4, got 3"):
        model(weak, weak[:3], BOTH)


def test_backward_concatenates_nothing():
    """q, k and v have one gradient: they come from one projection, and attention takes it whole."""
    model = make_model(dtype=torch.float32)
    tokens = draw_tokens(4)
    loss = model.logits(tokens).square().mean() + model.project(model.features(tokens)).sum()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss.backward()
    called = {event.key for event in profiler.key_averages()}
    assert any(name.endswith("axial_attention_packed_backward") for name in called), called
    assert not called & {"aten::cat", "aten::stack"}
