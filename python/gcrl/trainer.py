"""Training: one step after another to the configuration's last, perhaps from a checkpoint."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import gcrl
import gcrl_kernels
from gcrl import checkpoint
from gcrl.config import Config, ObjectiveConfig, OptimConfig, RuntimeConfig
from gcrl.data import Dataset
from gcrl.distributed import Team, average_gradients, join
from gcrl.interrupts import Interrupted, Interrupts
from gcrl.lock import hold
from gcrl.manifest import check, manifest, palette_digest
from gcrl.metrics import Recorder, Window
from gcrl.run import build_model
from gcrl.runfolder import check_folder, prepare, report
from gcrl.views import first_view, strong_view
from gcrl_kernels import quantize_colors
from gcrl_kernels.backends import choose

KERNELS = ("quantize_colors", "axial_attention", "linear_color_cross_entropy", "nt_xent")
NEVER = 2**62  # a step that no run reaches


class Diverged(RuntimeError):
    """The loss, its gradient or the weights are not finite; the message names the step."""

    exit_code = 1


def train(
    config: Config, folder: str | Path, *, resume: bool = False, progress: bool = True
) -> None:
    """Train into a run's folder and evaluate there; under torchrun, with all its processes.

    resume: go on from the folder's newest checkpoint, or from the start where it has none yet.
    progress: show what is going on.

    Raises:
        ConfigError, DataError: something in the configuration cannot be; the folder holds a run
            already, or, with resume, none, or one that trains differently.
        CheckpointError: the newest checkpoint is damaged.
        Diverged: the loss is not finite; checkpoints from before remain.
        Interrupted: by Ctrl-C or SIGTERM, after a checkpoint was saved.
        BackendUnavailableError: the kernels cannot run on the backend that is asked for.
    """
    folder = Path(folder)
    config.validate()
    with join(config, started_with(config, resume)) as team:
        check_backend(config, team)
        with hold(folder) if team.leads else nullcontext():
            check_folder(config, folder, team, resume=resume)
            dataset, palette = prepare(config, folder, team, progress=progress)
            trainer = Trainer(config, dataset, palette, team)
            saved = checkpoint.latest(folder)
            if saved is not None:
                trainer.restore(saved)
            team.check_same(trainer.state_digests())
            trainer.fit(folder, progress=progress)
            if team.leads and config.evaluation.evaluate:
                report(config, folder, dataset, progress=progress)


class Trainer:
    """The network, its optimiser and its images on one device, and the step they have come to."""

    def __init__(self, config: Config, dataset: Dataset, palette: Tensor, team: Team) -> None:
        self.config, self.team, self.step = config, team, 0
        self.images = torch.from_numpy(dataset.train.images).to(team.device)  # [N, H, W, 3]
        self.fingerprint = hashlib.sha256(dataset.train.images.tobytes()).hexdigest()
        self.palette = palette.to(team.device)  # [K, 3]
        self.order, self.order_epoch = torch.empty(0), -1

        self.model = build_model(config).to(team.device)
        self.network = compiled(self.model) if config.runtime.compile else self.model
        self.optimizer = make_optimizer(self.model, config.optim)
        self.averages: dict[str, Tensor] | None = None
        if config.optim.ema:
            parameters = self.model.named_parameters()
            self.averages = {name: p.detach().clone() for name, p in parameters}
        self.window = Window(4, team.device)  # generative, contrastive, loss, norm of the gradient
        self.first_bad = torch.full((), NEVER, device=team.device)

    def fit(self, folder: Path, *, progress: bool) -> None:
        """Train to the last step, with records and checkpoints on the way."""
        config, leads = self.config, self.team.leads
        last, runtime = config.optim.steps, config.runtime
        if self.step >= last:
            return
        recorder = Recorder(folder, self.step) if leads else None
        bar = tqdm(
            total=last, initial=self.step, desc="train", unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10, disable=not (progress and leads),
        )  # fmt: skip
        clock, clock_step = time.perf_counter(), self.step
        try:
            with Interrupts(insist=self.team.size == 1) as interrupts:
                while self.step < last:
                    self.advance()
                    bar.update()
                    ended = self.step == last
                    signal_number = self.team.largest(interrupts.received)
                    if self.step == 1 or self.step % runtime.log_every == 0 or ended:
                        self.check_finite(folder)
                        seconds = time.perf_counter() - clock
                        self.record(recorder, bar, (self.step - clock_step) / seconds)
                        clock, clock_step = time.perf_counter(), self.step
                    if self.step % runtime.checkpoint_every == 0 or ended or signal_number:
                        self.check_finite(folder)  # which waits for the steps themselves
                        begun = time.perf_counter()
                        self.save(folder, recorder)
                        clock += time.perf_counter() - begun  # the rates are those of the steps
                    if signal_number:
                        raise Interrupted(signal_number, self.step, folder)
        finally:
            bar.close()
            if recorder is not None:
                recorder.close()

    def advance(self) -> None:
        """One step of the optimiser, without waiting for the device."""
        config = self.config
        rate = learning_rate(config.optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = range(config.optim.accumulate)
        losses = torch.stack([self.backward(part) for part in parts]).mean(0)
        average_gradients(self.model, self.team)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip)
        self.optimizer.step()
        self.step += 1
        if self.averages is not None:
            update_averages(self.averages, self.model, config.optim.ema)
        values = torch.cat((losses, norm[None]))
        self.window.add(values)
        bad = torch.where(values.isfinite().all(), NEVER, self.step)
        self.first_bad = torch.minimum(self.first_bad, bad)

    def backward(self, part: int) -> Tensor:
        """Add the gradients of one batch; its losses, [generative, contrastive, weighted sum]."""
        weak, strong = self.tokens(part)
        return backward(
            self.network, weak, strong, self.config.objective, self.team.group,
            share=1 / self.config.optim.accumulate,
            autocast=autocast(self.team.device, self.config.runtime),
        )  # fmt: skip

    def tokens(self, part: int) -> tuple[Tensor, Tensor | None]:
        """The next batch's weak and strong views as palette tokens, [B, H, W] each."""
        config, team = self.config, self.team
        images = self.images[self.batch(part)]
        torch.manual_seed(derive_seed(config.runtime.seed, "views", self.step, part, team.rank))
        backend = config.runtime.backend
        weak = quantize_colors(first_view(images, config.views), self.palette, backend=backend)
        if config.objective.beta == 0:
            return weak, None
        strong = strong_view(images, config.views)
        return weak, quantize_colors(strong, self.palette, backend=backend)

    def batch(self, part: int) -> Tensor:
        """The images of this process's next batch, [B]: an epoch's order is the seed's alone."""
        size, team = self.config.optim.batch_size, self.team
        batches = len(self.images) // (size * team.size)  # of all processes, in an epoch
        number = self.step * self.config.optim.accumulate + part
        epoch, number = divmod(number, batches)
        if epoch != self.order_epoch:
            seed = derive_seed(self.config.runtime.seed, "order", epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.images), generator=generator)
            self.order, self.order_epoch = order.to(team.device), epoch
        return self.order[(number * team.size + team.rank) * size :][:size]

    def record(self, recorder: Recorder | None, bar: tqdm, steps_per_second: float) -> None:
        """Record the means since the last record and begin anew."""
        config = self.config
        means = self.team.mean(self.window.sums / self.window.count)
        self.window.reset()
        generative, contrastive, loss, norm = means.tolist()
        nats = generative if config.objective.alpha else None
        height, width = config.model.grid
        scored = height * width - (not config.objective.score_first_pixel)
        images = config.optim.batch_size * config.optim.accumulate * self.team.size  # a step
        record = {
            "step": self.step,
            "images": self.step * images,
            "nats_per_pixel": nats,
            "bits_per_pixel": None if nats is None else nats / math.log(2),
            "nats_per_image": None if nats is None else nats * scored,
            "contrastive": contrastive if config.objective.beta else None,
            "loss": loss,
            "learning_rate": learning_rate(config.optim, self.step - 1),
            "grad_norm": norm,
            "images_per_second": steps_per_second * images,
        }
        if recorder is not None:
            recorder.write(record)
        shown = {"nats/pixel": record["nats_per_pixel"], "NT-Xent": record["contrastive"]}
        texts = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
        bar.set_postfix({**texts, "images/s": f"{record['images_per_second']:.0f}"}, refresh=False)

    def check_finite(self, folder: Path) -> None:
        """Raises Diverged, on every process, if any step since the start was not finite."""
        step = -self.team.largest(-int(self.first_bad))
        if step == NEVER:
            return
        saved = checkpoint.latest(folder)
        raise Diverged(
            f"step {step}: the loss, its gradient or the weights are not finite, training stops; "
            + (
                f"the last good checkpoint is {saved}"
                if saved
                else "no checkpoint was saved before"
            )
        )

    def save(self, folder: Path, recorder: Recorder | None) -> None:
        """Write a checkpoint, unless the run has diverged."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self.first_bad.clamp_(max=self.step)
        self.check_finite(folder)
        sums = self.team.mean(self.window.sums).tolist()
        if recorder is not None:
            recorder.flush()
            checkpoint.save(
                folder, self.step, self.model, self.optimizer, ema=self.averages,
                state={
                    "seed": self.config.runtime.seed,
                    "processes": self.team.size,
                    "training_images": self.fingerprint,
                    "window": {"sums": sums, "count": self.window.count},
                    "torch": torch.__version__,
                    **manifest(self.config, self.palette),
                },
            )  # fmt: skip
        self.team.wait()

    def restore(self, saved: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it is damaged, or from other images, other settings (see
                gcrl.manifest), another palette or another number of processes.
        """
        state = checkpoint.load_state(saved)
        for change in check(saved, state, self.config, self.palette):
            if self.team.leads:
                print(f"gcrl: {change}; the learning rate goes by it from here", file=sys.stderr)
        here = {"processes": self.team.size, "training_images": self.fingerprint}
        for name, value in here.items():
            if state.get(name) != value:
                raise checkpoint.CheckpointError(
                    f"{saved}: cannot be continued: {name.replace('_', ' ')} were "
                    f"{state.get(name)}, now {value}"
                )
        checkpoint.load_weights(self.model, saved, ema=False)
        checkpoint.load_optimizer(self.model, self.optimizer, saved)
        if self.averages is not None:
            checkpoint.load_ema(saved, self.averages)
        self.step = state["step"]
        try:
            self.window.restore(**state["window"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.CheckpointError(
                f"{saved}: is damaged: expected a 'window' of sums and a count: {error!r}"
            ) from error

    def state_digests(self) -> dict[str, str]:
        """What must be the same on all processes before they train: names and hashes."""
        weights = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            weights.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return {
            "training images": self.fingerprint,
            "palette": palette_digest(self.palette),
            "weights": weights.hexdigest(),
            "step": str(self.step),
        }


def check_backend(config: Config, team: Team) -> None:
    """Raises BackendUnavailableError unless the backend serves every kernel on the device."""
    example = torch.empty(0, device=team.device)
    for operator in KERNELS:
        choose(operator, config.runtime.backend, example)


def started_with(config: Config, resume: bool) -> dict[str, Any]:
    """What all processes of a run must have in common: settings, versions and the code itself."""
    flat = config.flat()
    del flat["data"], flat["palette"]  # paths; what they hold is compared when it is read
    return {**flat, "resume": resume, "torch": torch.__version__, "code": code_digest()}


def code_digest() -> str:
    """A hash of this package's and the kernels' source."""
    digest = hashlib.sha256()
    for package in (gcrl, gcrl_kernels):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def compiled(model: nn.Module) -> nn.Module:
    network: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return network


def backward(
    network: nn.Module,
    weak: Tensor,
    strong: Tensor | None,
    objective: ObjectiveConfig,
    group: dist.ProcessGroup | None,
    *,
    share: float,
    autocast: AbstractContextManager[object] | None = None,
) -> Tensor:
    """Add a batch's gradients, times its share of the step; its losses, detached.

    weak, strong [B, H, W] tokens. Returns [generative, contrastive, weighted sum].
    """
    with autocast or nullcontext():
        losses = network(weak, strong, objective, group)
    loss = objective.alpha * losses.generative + objective.beta * losses.contrastive
    (loss * share).backward()
    return torch.stack((losses.generative, losses.contrastive, loss)).detach()


def autocast(device: torch.device, runtime: RuntimeConfig) -> AbstractContextManager[object]:
    """The precision of a training's forward."""
    if resolve_precision(device, runtime) == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def resolve_precision(device: torch.device, runtime: RuntimeConfig) -> str:
    """'bfloat16' or 'float32': what 'auto' means on the device."""
    if runtime.precision != "auto":
        return runtime.precision
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16, so that they are the faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with the betas of iGPT, decaying matrices alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate(optim: OptimConfig, step: int) -> float:
    """The rate of the step that follows `step` others: a linear warm-up, then a cosine to zero."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_averages(averages: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * parameter"""
    parameters = dict(model.named_parameters())
    targets = [parameters[name].detach() for name in averages]
    torch._foreach_lerp_(list(averages.values()), targets, 1 - decay)


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose, so that no random state has to be kept: a hash of the parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big")  # 32 bits are what the CPU's generator takes
