"""Compiles a call's Triton kernels for a GPU that need not be there, and reads what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gcrl_kernels.triton_common import Setting

# Of a program on any GPU that takes the settings, bytes.
MOST_SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.bool: "*i1", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


class Resources(NamedTuple):
    """Of a kernel: registers a thread, bytes of stack a thread (spills among them), warps and
    bytes of shared memory of a program."""

    kernel: str
    setting: Setting
    registers: int
    stack: int
    shared: int


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    setting: Setting


def launches(patch: Any, launchers: ModuleType, call: Callable[[], None]) -> list[Launch]:
    """What a call of a launcher, on tensors of the device "meta", would launch."""
    found: list[Launch] = []
    with patch.context() as patched:  # pytest's monkeypatch
        patched.setattr(launchers, "launch", lambda *launch: found.append(Launch(*launch)))
        call()
    return found


def compile_for(architecture: int, launch: Launch) -> Resources:
    """As Triton would for these arguments, all of them at multiples of 16 bytes."""
    kernel = launch.kernel
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(each, (*path, index)) for index, each in enumerate(value))
        if value is None or (len(path) > 1 and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor) or (len(path) > 1 and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        return "i32" if value < 2**31 else "i64"

    for index, (name, value) in enumerate(zip(kernel.arg_names, launch.arguments, strict=False)):
        signature[name] = kind(value, (index,))
    signature |= dict.fromkeys(launch.constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.setting.warps, "num_stages": launch.setting.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        words = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert used is not None, report
    registers, stack, local = map(int, used.groups())
    name = f"{kernel.__module__.rpartition('_')[2]} {kernel.__name__}"
    shared = compiled.metadata.shared
    return Resources(name, launch.setting, registers, max(stack, local), shared)
