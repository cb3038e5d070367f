"""Pictures in the making: python stream_previews.py BUNDLE "two blue cubes on snow" FOLDER."""

import sys
from pathlib import Path

from PIL import Image

from fastvar_trt.runtime import Pipeline


def main(bundle: str, prompt: str, folder: str) -> None:
    """Save a preview after every second scale, and the picture."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with Pipeline.load(bundle) as pipe:
        scales = pipe.manifest.preview_scales[1::2]
        for preview in pipe.stream(prompts=[prompt], seeds=3, preview_scales=scales):
            name = "picture" if preview.result else f"scale_{preview.scale:02d}"
            Image.fromarray(preview.images[0]).save(out / f"{name}.png")
            print(out / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
