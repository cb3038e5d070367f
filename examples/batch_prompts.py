"""A file of prompts, one a line, to a folder of pictures: python batch_prompts.py BUNDLE PROMPTS.txt FOLDER."""

import sys
from pathlib import Path

from PIL import Image

from fastvar_trt.runtime import Pipeline, Request, RequestError


def main(bundle: str, prompts: str, folder: str) -> None:
    """Draw all prompts, batch by batch, each to a file named by its line; those that the bundle refuses are told."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    with Pipeline.load(bundle) as pipe:
        requests = {}
        for i, line in enumerate(lines, 1):
            if not line.strip():
                continue
            request = Request(prompt=line.strip(), seed=i)
            try:
                pipe.check([request])
            except RequestError as error:
                print(f"line {i} is left out: {error}")
                continue
            requests[i] = request
        size = max(pipe.manifest.batches)
        numbers = list(requests)
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            result = pipe.draw([requests[i] for i in batch])
            for i, image in zip(batch, result.images, strict=True):
                Image.fromarray(image).save(out / f"{i:04d}.png")
    print(f"{len(requests)} pictures in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
