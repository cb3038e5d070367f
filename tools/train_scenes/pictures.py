"""Scenes as pictures on disk: rendered once, by several processes, and kept in the working folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.tools.files import replacing
from fastvar_trt.tools.scenes.renderer import render, silhouette
from fastvar_trt.tools.scenes.world import Scene, random_scene


@dataclasses.dataclass(frozen=True)
class PicturePool:
    """Pictures of random scenes, none of which shows what is held out.

    Attributes:
        folder: where they are kept.
        seed: of the scenes.
        count: how many.
        side: pixels.
        samples: rays per pixel and axis.
    """

    folder: Path
    seed: int
    count: int
    side: int
    samples: int

    def scene(self, index: int) -> Scene:
        """What a picture shows."""
        return random_scene(np.random.default_rng([self.seed, index]))

    def render(self, progress: Callable[[float], None], processes: int) -> None:
        """Render those that are not there yet.

        Raises:
            CheckpointError: the folder has pictures of other scenes.
        """
        self._check_record()
        missing = [i for i in range(self.count) if not self._path(i).exists()]
        # Not forked: the threads of torch do not survive it.
        with ProcessPoolExecutor(processes, get_context("spawn")) as workers:
            try:
                for done, _ in enumerate(workers.map(self._render_one, missing)):
                    progress(1 - (len(missing) - done - 1) / self.count)
            except BaseException:
                workers.shutdown(cancel_futures=True)
                raise

    def _check_record(self) -> None:
        """That the pictures that are there are these: by what is in all scenes, and by what the first looks like."""
        scenes = [self.scene(index) for index in range(self.count)]
        learnt = repr(scenes).encode() + render(scenes[0], (32, 32), samples=1).tobytes()
        record = json.dumps({"seed": self.seed, "scenes_sha256": hashlib.sha256(learnt).hexdigest()})
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "pool.json"
        if not path.exists():
            path.write_text(record, encoding="utf-8")
        if path.read_text(encoding="utf-8") != record:
            raise CheckpointError(
                f"{self.folder}: has pictures of other scenes; remove it, and they are rendered again"
            )

    def _render_one(self, index: int) -> None:
        picture = render(self.scene(index), (self.side, self.side), samples=self.samples)
        with replacing(self._path(index)) as partial, partial.open("wb") as file:
            np.save(file, picture)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.npy"

    def load(self, index: int) -> NDArray[np.uint8]:
        """A picture: uint8 [side, side, 3].

        Raises:
            CheckpointError: its file is damaged.
        """
        try:
            picture: NDArray[Any] = np.load(self._path(index))
            if picture.shape != (self.side, self.side, 3) or picture.dtype != np.uint8:
                raise ValueError(f"{picture.dtype} {picture.shape}")
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{self._path(index)}: not a picture of this training ({error}); remove it, and it is rendered again"
            ) from error
        return picture

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Some pictures, mirrored or not, and where solids are.

        Returns:
            uint8 [B, side, side, 3], bool [B, side / 8, side / 8].
        """
        pictures, solids = [], []
        for index in map(int, rng.integers(self.count, size=batch)):
            flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
            pictures.append(self.load(index)[:, flip])
            solids.append(silhouette(self.scene(index), (self.side // 8, self.side // 8))[:, flip])
        return np.stack(pictures), np.stack(solids)


def to_tensor(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
