"""`python -m gcrl_kernels`: the versions, the libraries and the backends that exist here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from gcrl_kernels import backends, capability


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    names = []
    for device in backends.gpus():
        card = capability.as_text(torch.cuda.get_device_capability(device))
        names.append(f"{torch.cuda.get_device_name(device)} (compute capability {card})")
    return ", ".join(names) or "none"


def _state(backend: str) -> str:
    reason = backends.unavailable(backend)
    if reason is not None:
        return f"missing: {reason}"
    operators = [name for name, by in backends.IMPLEMENTED.items() if backend in by]
    return f"available, for {', '.join(operators) or 'no operator yet'}"


def _library(backend: str) -> str:
    path = backends.LIBRARIES[backend]
    if backends.is_loaded(backend):
        compiled = f", compiled for {backends.architectures(backend)}" if backend == "cuda" else ""
        return f"{path}, loaded{compiled}"
    return f"{path}, {'cannot be loaded' if path.exists() else 'does not exist'}"


def report() -> str:
    """What there is to say about this installation, a line a fact."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    facts = {
        "gcrl-kernels": _version("gcrl-kernels"),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "PyTorch": f"{torch.__version__}, {cuda}, {torch.get_num_threads()} CPU threads",
        "NumPy": _version("numpy"),
        "Triton": _version("triton"),
        "GPU": _gpus(),
        "instruction sets": ", ".join(backends.cpu_levels()) or "unknown: no compiled CPU kernels",
    }
    facts |= {f"library {name}": _library(name) for name in backends.LIBRARIES}
    facts |= {f"backend {name}": _state(name) for name in backends.BACKENDS}
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


if __name__ == "__main__":
    print(report())
