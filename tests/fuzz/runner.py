"""Makes the calls and judges what comes of them: the right value, or an error of its argument.

python -m tests.fuzz --seconds 600 --seed 7
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from torch import Tensor

import gcrl_kernels
from gcrl_kernels import backends

from . import oracles
from .strategies import FUNCTIONS, Call, calls
from .wrong import wrong_calls

DIFFERENTIABLE = {
    "q", "k", "v", "qkv", "bias", "logits", "hidden", "weight", "z0", "z1", "a", "b", "z",
    "temperature", "logit_scale",
}  # fmt: skip
FIXED = {"pixels", "palette"}  # keep their dtype: tokens follow from them


class WrongError(AssertionError):
    """What a call came to is neither a right value nor a right error."""


def evaluate(
    function: Callable[..., Any], call: Call, dtype: torch.dtype | None = None, **more: Any
) -> dict[str, Tensor]:
    """The outputs and the gradients of a call, by names; all floats taken in `dtype`."""
    arguments = {name: copied(name, value, dtype) for name, value in call.arguments.items()}
    outputs = function(**arguments, **more)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    leaves = {
        name: value for name, value in arguments.items()
        if isinstance(value, Tensor) and value.requires_grad
    }  # fmt: skip
    if not leaves:
        return results
    output = outputs[0]
    upstream = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64).view(output.shape)
    gradients = torch.autograd.grad(
        output, list(leaves.values()), upstream.to(output.dtype), allow_unused=True
    )
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        results[f"gradient of {name}"] = gradient
    return results


def copied(name: str, value: Any, dtype: torch.dtype | None) -> Any:
    """In memory of its own, with the strides that it has."""
    if not isinstance(value, Tensor):
        return value
    value = copy.deepcopy(value)
    if dtype is not None and value.is_floating_point() and name not in FIXED:
        value = value.to(dtype)
    return value.requires_grad_(value.is_floating_point() and name in DIFFERENTIABLE)


def check_right(call: Call) -> None:
    ours, oracle = getattr(gcrl_kernels, call.function), getattr(oracles, call.function, None)
    if call.function == "fit_palette":
        return check_palette(call)
    if call.function == "quantize_colors":
        exact = {"output 0": quantized(call)}
        plain = exact
    else:
        exact = evaluate(oracle, call, torch.float64)
        wide = any(is_float64(call, name) for name in DIFFERENTIABLE - {"temperature", "bias"})
        plain = evaluate(oracle, call, torch.float64 if wide else torch.float32)
    for backend, level in ways(call.function):
        with backends.use_cpu_level(level) if level else torch.enable_grad():
            try:
                actual = evaluate(ours, call, backend=backend)
            except gcrl_kernels.BackendUnavailableError:
                continue  # it says so of float64, and so on
            except Exception as error:
                raise WrongError(f"{type(error).__name__}: {error}\n{backend} {level}") from error
        for name, value in actual.items():
            compare(f"{name}, {backend} {level or ''}", value, plain[name], exact[name], call)
    return None


def is_float64(call: Call, name: str) -> bool:
    value = call.arguments.get(name)
    return isinstance(value, Tensor) and value.dtype == torch.float64


def ways(function: str) -> list[tuple[str, str | None]]:
    """The backends that serve tensors of the CPU; the compiled one with each instruction set."""
    there = backends.IMPLEMENTED.get(function, ("reference",))
    levels = backends.cpu_levels() if "cpu" in there else ()
    return [("reference", None), *(("cpu", level) for level in levels)]


def quantized(call: Call) -> Tensor:
    return oracles.quantize_colors(**call.arguments)


def compare(name: str, value: Tensor, plain: Tensor, exact: Tensor, call: Call) -> None:
    def expect(holds: bool, words: str) -> None:
        if not holds:
            raise WrongError(f"{name}: {words}\nexpected {exact}\ngot      {value}\n{call}")

    expect(value.shape == exact.shape, f"shape {list(value.shape)}, not {list(exact.shape)}")
    if not value.is_floating_point():
        return expect(torch.equal(value, exact), "another value")
    if call.function == "dcl" and "gradient" in name and len(call.arguments["z0"]) < 2:
        return None  # of a loss that is minus infinity
    expect(torch.equal(value.isnan(), exact.isnan()), "NaN elsewhere")
    known = exact.isfinite()
    expect(torch.equal(value.double().where(~known, 0).nan_to_num(0),
                       exact.where(~known, 0).nan_to_num(0)), "infinite elsewhere")  # fmt: skip
    if not known.any():
        return None
    error, slack = (value.double() - exact).abs()[known], (plain.double() - exact).abs()[known]
    slack = slack[slack.isfinite()]
    largest = float(exact[known].abs().max())
    eps = torch.finfo(torch.float64 if plain.dtype == torch.float64 else torch.float32).eps
    if "lse" in name or value.dtype == torch.float32:
        eps = torch.finfo(torch.float32).eps
    size = max(largest, call.size if "gradient" in name else 1e-30)
    allowed = 8 * (float(slack.max()) if len(slack) else 0.0)
    allowed += 32 * eps * (size + call.amplified * (size if "gradient" in name else 1.0))
    if value.dtype in (torch.float16, torch.bfloat16):
        allowed += torch.finfo(value.dtype).eps * largest
        allowed += torch.finfo(value.dtype).smallest_normal
    expect(bool((error <= allowed).all()), f"off by {float(error.max()):.3g}, beyond {allowed:.3g}")
    return None


def check_palette(call: Call) -> None:
    pixels, colors = call.arguments["pixels"], int(call.arguments["colors"])
    palette = gcrl_kernels.fit_palette(**call.arguments)
    again = gcrl_kernels.fit_palette(**call.arguments, backend="reference")
    flat = pixels.double()
    center = flat.mean(0)

    def inertia(of: Tensor) -> float:
        return float((flat[:, None] - of.double()).square().sum(-1).amin(1).sum())

    spread = float((flat - center).abs().max()) + 1e-6 * float(flat.abs().max())
    faults = {
        "another shape": palette.shape != (colors, 3) or palette.dtype != torch.float32,
        "outside the pixels": bool(((palette - center).abs() > spread * (1 + 1e-5)).any()),
        "not by brightness": bool((palette.sum(1).diff() < 0).any()),
        "worse than one colour": inertia(palette) > inertia(center[None]) * (1 + 1e-5) + 1e-6
        and int(call.arguments["iterations"]) > 0,
        "pixels far from each": len(flat.unique(dim=0)) <= colors
        and inertia(palette) > 1e-6 * float(flat.square().sum()),
        "backends differ": abs(inertia(palette) - inertia(again)) > 1e-3 * inertia(again) + 1e-6,
    }
    wrong = [name for name, is_so in faults.items() if is_so]
    if wrong:
        raise WrongError(f"{wrong}: {palette}\n{call}")


def check_refused(call: Call, name: str) -> None:
    function = getattr(gcrl_kernels, call.function)
    try:
        got = function(**call.arguments)
    except (TypeError, ValueError, gcrl_kernels.BackendUnavailableError) as error:
        names = "|".join(call.arguments)
        text = str(error)
        if re.match(rf"({names})\b", text) and re.search(rf"\b{name}\b", text):
            return
        raise WrongError(f"{name}: {type(error).__name__} {text!r}\n{call}") from error
    except Exception as error:
        raise WrongError(f"{name}: {type(error).__name__} {error}\n{call}") from error
    raise WrongError(f"{name} was taken: {got!r:.300}\n{call}")


TARGETS = [(function, kind) for function in FUNCTIONS for kind in ("right", "wrong")]
Judge = Callable[[Call, str | None], None]  # the name of the argument that is wrong


def judge(call: Call, name: str | None) -> None:
    if name is not None:
        return check_refused(call, name)
    try:
        return check_right(call)
    except (WrongError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise WrongError(f"{type(error).__name__}: {error}\n{call}") from error


def run(
    function: str, kind: str, examples: int, number: int | None = None, judge: Judge = judge
) -> None:
    """Judges as many calls: those of a seed, or without one the same every time.

    Raises WrongError with the simplest that fails.
    """
    if kind == "right":
        test = given(calls(function))(lambda call: judge(call, None))
    else:
        test = given(wrong_calls(function))(lambda pair: judge(*pair))
    if number is not None:
        test = seed(number)(test)
    settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )(test)()


class Fuzzer:
    """Counts the calls, and keeps of each kind of failure the shortest."""

    def __init__(self, number: int, only: list[str], folder: Path) -> None:
        self.seed, self.targets = number, [target for target in TARGETS if target[0] in only]
        self.doing, self.state = folder / "doing", folder / "state"
        self.turn, self.calls, self.found = 0, 0, dict[tuple[str, str], str]()

    def judge(self, call: Call, name: str | None) -> None:
        self.calls += 1
        self.doing.write_text(f"{call!r}, wrong: {name}")
        try:
            judge(call, name)
        except WrongError as error:
            self.keep(call.function, str(error))

    def keep(self, function: str, text: str) -> None:
        kind = function, re.sub(r"[\d.]+(e[+-]\d+)?|'.*'", "#", text.split("\n")[0])[:80]
        if len(text) < len(self.found.get(kind, text + " ")):
            self.found[kind] = text

    def fuzz(self, end: float) -> None:
        """Each time the next target, until the time is over."""
        while time.monotonic() < end:
            self.turn += 1
            # First, so that after a crash the next target follows.
            self.state.write_bytes(pickle.dumps((self.turn, self.calls, self.found)))
            target = self.targets[self.turn % len(self.targets)]
            run(*target, 50, self.seed * 10**6 + self.turn, self.judge)
            print(f"\r{self.counts(end)}", end="", flush=True)
        self.state.write_bytes(pickle.dumps((self.turn, self.calls, self.found)))

    def counts(self, end: float) -> str:
        left = max(0, end - time.monotonic())
        return f"{left:.0f} s left, {self.calls} calls, {len(self.found)} kinds of failure"

    def fuzz_through_crashes(self, seconds: float) -> int:
        """In a process of its own, and in another one when that crashes; the exit status."""
        end, code = time.monotonic() + seconds, -1
        while code < 0:
            child = os.fork()
            if child == 0:
                with leave_at_end():
                    self.fuzz(end)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            self.turn, self.calls, self.found = pickle.loads(self.state.read_bytes())
            if code < 0:
                doing = self.doing.read_text()
                self.keep(doing.partition("(")[0], f"ended by signal {-code}\n{doing}")
        for (function, _), text in sorted(self.found.items()):
            print(f"\n{function}: {text}")
        print(f"\n{self.counts(end)}")
        return 1 if self.found else code


@contextmanager
def leave_at_end() -> Iterator[None]:
    """The end of a child, which must not go on as its parent."""
    code = 2
    try:
        yield
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(options.seed, options.only, Path(folder))
        sys.exit(fuzzer.fuzz_through_crashes(options.seconds))
