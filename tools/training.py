"""Training that resumes: a model, its optimizer and random numbers, kept in a file."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastvar_trt.export.folders import new_folder
from fastvar_trt.runtime.errors import BackendError, CheckpointError
from fastvar_trt.tools.files import replacing

_SAVE_EVERY_S = 60.0


def open_device(name: str) -> torch.device:
    """The device of that name, tried.

    Raises:
        BackendError: there is none such here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both
        raise BackendError(f"--device {name}: {error}; give cpu, cuda or cuda:N") from error
    return device


def new_checkpoint(out: Path) -> contextlib.AbstractContextManager[Path]:
    """`new_folder` for a checkpoint, which replaces none.

    Raises:
        CheckpointError: there is something already.
        ExportError: it cannot be written.
    """
    return new_folder(out.absolute(), "--out", lambda: check_absent(out))


def check_absent(out: Path) -> None:
    """That nothing is there.

    Raises:
        CheckpointError: something is.
    """
    if out.exists():
        raise CheckpointError(f"--out {out}: exists already; give another folder")


def make_work_dir(folder: Path) -> None:
    """Make the folder of a training's state.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--work-dir {folder}: cannot be made: {error.strerror}; give another folder") from error


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is shipped: in fp16 where it is floating-point, on the CPU."""
    return {
        key: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in state.items()
    }


def write_card(
    folder: Path, card: Mapping[str, Any], text: Callable[[Mapping[str, Any], Mapping[str, int]], str]
) -> None:
    """`card.json`, and `README.md` by `text`, which takes the card and the bytes of each file of weights.

    Files of weights become readable for all: safetensors makes them for their owner alone.
    """
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    weights = sorted(folder.rglob("*.safetensors"))
    for path in weights:
        path.chmod(0o644)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in weights}
    (folder / "README.md").write_text(text(card, sizes), encoding="utf-8")


Model = TypeVar("Model", bound=nn.Module)


class Stage(Generic[Model]):
    """A model in training: its state goes to a file every minute, and comes back from it."""

    def __init__(
        self, name: str, model: Model, lr: float, num_steps: int, config: Mapping[str, Any], folder: Path
    ) -> None:
        self.name, self.model, self.num_steps = name, model, num_steps
        self.path = folder / f"{name}.pt"
        self._config = json.dumps(config)
        self._lr = lr
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
        self.rng = np.random.default_rng([config["seed"], *name.encode()])
        self.losses: dict[str, list[float]] = {}
        self.extra: dict[str, Tensor] = {}  # what else the next steps depend on
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        try:
            state: Any = torch.load(self.path, map_location="cpu", weights_only=True)
            saved, own = json.loads(state["config"]), json.loads(self._config)
            if saved == own:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.rng.bit_generator.state = json.loads(state["rng"])
                torch.set_rng_state(state["torch_rng"])
                self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
                self.extra = state["extra"]
        except (
            OSError,
            RuntimeError,
            EOFError,
            LookupError,
            TypeError,
            ValueError,
            pickle.UnpicklingError,
        ) as error:
            raise CheckpointError(
                f"{self.path}: not a state of this training ({type(error).__name__}: {error}); remove it, or give "
                "another --work-dir"
            ) from error
        if saved != own:
            differing = [
                f"{key}: {saved.get(key)!r} there, {own.get(key)!r} here"
                for key in {**own, **saved}
                if saved.get(key) != own.get(key)
            ]
            raise CheckpointError(
                f"{self.path}: the state of another run ({'; '.join(differing)}); give the same options, or another "
                "--work-dir"
            )

    def save(self) -> None:
        """Write the state beside the old one, then replace it."""
        state = {
            "config": self._config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": json.dumps(self.rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "extra": self.extra,
        }
        with replacing(self.path) as partial:
            torch.save(state, partial)

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


def training_record(stages: Sequence[Stage[Any]], last: int) -> dict[str, Any]:
    """For a card: seconds of every stage, and its losses over so many steps at the end."""
    return {
        "training_s": {stage.name: round(stage.seconds) for stage in stages},
        "final_losses": {
            f"{stage.name}.{name}": round(float(np.mean(values[-last:])), 4)
            for stage in stages
            for name, values in stage.losses.items()
        },
    }


def _schedule(step: int, num_steps: int) -> float:
    """Linear warm-up over 3 %, then a cosine down to 2 %."""
    warm_up = max(1, round(0.03 * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device computes it; on other processors PyTorch's products take a hundred times as long."""
    # The function is younger than the oldest release that is allowed.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_fast = device.type != "cpu" or known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(is_fast))


def differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of neighbouring rows and columns of [..., H, W]."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]
