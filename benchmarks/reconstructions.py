"""What the scene model's autoencoder keeps of a picture: the bound of what any of its drawings can show.

Held-out scenes are rendered, encoded and decoded again, by all scales and without the last ones, and the checker of
`fastvar evaluate` reads them. Needs a bundle with an encoder:

    fastvar-export scenes --prune none --with-encoder --out out/scenes
    python benchmarks/reconstructions.py out/scenes --scenes 300

Prints a table of compliance with 95 % intervals and PSNR against the rendered pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch

from fastvar_trt.export.exporter import load_bundle_model
from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.tools.measure.evaluate import Share
from fastvar_trt.tools.measure.quality import image_metrics
from fastvar_trt.tools.scenes.cases import TAGS, cases, check, scene_of
from fastvar_trt.tools.scenes.renderer import render
from fastvar_trt.tools.tables import format_table


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--scenes", default=300, show_default=True)
@click.option("--skip", default="0,2,3", show_default=True, help="How many of the last scales are left out, each once.")
@torch.inference_mode()
def main(bundle: Path, scenes: int, skip: str) -> None:
    """Render, encode, decode, read."""
    model, _ = load_bundle_model(bundle)
    found = cases(scenes)
    skipped = [int(count) for count in skip.split(",")]
    plans = [model.resolve(PruningPlan(fractions=tuple((-1 - i, 1.0) for i in range(count)))) for count in skipped]
    names = ["as rendered", *(f"without the last {count} scales" if count else "reconstructed" for count in skipped)]
    held: list[list[bool]] = [[] for _ in names]
    psnr: list[list[float]] = [[] for _ in names]
    with click.progressbar(found, label="scenes", file=sys.stderr) as bar:
        for case in bar:
            picture = render(scene_of(case.expected), model.image_size())
            tokens, *_ = model.encode(torch.from_numpy(picture)[None], plans[0])
            pictures = [picture]
            for plan in plans:
                whole, left_out = model.accumulated(tokens, plan)
                pictures.append(model.decode(whole - left_out)[1][0].numpy())
            for i, shown in enumerate(pictures):
                held[i].append(all(check(shown, case.expected).values()))
                psnr[i].append(image_metrics(picture, shown, vif=False).psnr_db)
    rows = []
    for name, own, values in zip(names, held, psnr, strict=True):
        by_tag = [[h for h, case in zip(own, found, strict=True) if case.tag == tag] for tag in TAGS.values()]
        shares = [str(Share(sum(part), len(part))) for part in (*by_tag, own)]
        rows.append([name, *shares, f"{np.mean(values):.1f}"])
    click.echo(format_table(["pictures", *TAGS.values(), "all", "PSNR, dB"], rows))


if __name__ == "__main__":
    main()
