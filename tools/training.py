"""Training that resumes: a model, its optimizer and random numbers, kept in a file."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvar_trt.runtime.errors import CheckpointError

_SAVE_EVERY_S = 60.0


class Stage:
    """A model in training: its state goes to a file every minute, and comes back from it."""

    def __init__(
        self, name: str, model: nn.Module, lr: float, num_steps: int, config: Mapping[str, Any], folder: Path
    ) -> None:
        self.name, self.model, self.num_steps = name, model, num_steps
        self.path = folder / f"{name}.pt"
        self._config = json.dumps(config)
        self._lr = lr
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
        self.rng = np.random.default_rng([config["seed"], len(name)])
        self.losses: dict[str, list[float]] = {}
        self.extra: dict[str, Tensor] = {}  # what else the next steps depend on
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        try:
            state: Any = torch.load(self.path, map_location="cpu", weights_only=True)
            saved = state["config"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path}: not a state of this training ({type(error).__name__}: {error}); remove it, or give "
                "another --work-dir"
            ) from error
        if saved != self._config:
            differing = [
                f"{key}: {json.loads(saved).get(key)!r} there, {value!r} here"
                for key, value in json.loads(self._config).items()
                if json.loads(saved).get(key) != value
            ]
            raise CheckpointError(
                f"{self.path}: the state of another run ({'; '.join(differing)}); give the same options, or another "
                "--work-dir"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.extra = state.get("extra", {})

    def save(self) -> None:
        """Write the state beside the old one, then replace it."""
        partial = self.path.with_suffix(".partial")
        torch.save(
            {
                "config": self._config,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": json.dumps(self.rng.bit_generator.state),
                "torch_rng": torch.get_rng_state(),
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
                "extra": self.extra,
            },
            partial,
        )
        partial.replace(self.path)

    def steps(self, progress: Callable[[str, str, float], None]) -> Iterator[int]:
        """The steps that remain; the body computes the gradients, and this takes the step."""
        begin = saved = time.monotonic()
        while self.step < self.num_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr * _schedule(self.step, self.num_steps)
            self.optimizer.zero_grad(set_to_none=True)
            yield self.step
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            now = time.monotonic()
            self.seconds, begin = self.seconds + now - begin, now
            if now - saved > _SAVE_EVERY_S or self.step == self.num_steps:
                self.save()
                saved = now
            latest = ", ".join(f"{name} {np.mean(values[-20:]):.4f}" for name, values in self.losses.items())
            progress(self.name, latest, self.step / self.num_steps)
        progress(self.name, "done", 1.0)

    def record(self, **losses: Tensor) -> None:
        """Keep the losses of a step."""
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(float(value.detach()))


def _schedule(step: int, num_steps: int) -> float:
    """Linear warm-up over 3 %, then a cosine down to 2 %."""
    warm_up = max(1, round(0.03 * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device computes it; on other processors PyTorch's products take a hundred times as long."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # younger than the oldest release that is allowed
    is_fast = device.type != "cpu" or known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(is_fast))


def differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of neighbouring rows and columns of [..., H, W]."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]
