"""In-painting and variations: python edit_picture.py BUNDLE IN.png "a red sphere in the middle on sand" FOLDER.

The bundle needs an image encoder: fastvar-export scenes --with-encoder --target cpu --out out/scenes
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.pictures import fitted, read_picture


def main(bundle: str, source: str, prompt: str, folder: str) -> None:
    """Draw the right third anew, and two variations that keep what the picture is like as a whole."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with Pipeline.load(bundle) as pipe:
        variant = pipe.manifest.default
        picture = fitted(read_picture(Path(source)), variant.image_width, variant.image_height)
        mask = np.zeros(picture.shape[:2], dtype=bool)
        mask[:, 2 * variant.image_width // 3 :] = True
        edited = pipe.generate(prompts=[prompt], image=picture, mask=mask).images[0]
        kept = len(variant.schedule) // 2
        first, second = pipe.generate(prompts=[prompt] * 2, image=picture, keep_scales=kept).images
    for name, image in (("edited", edited), ("variation_1", first), ("variation_2", second)):
        Image.fromarray(image).save(out / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
