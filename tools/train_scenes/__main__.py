"""`python -m fastvar_trt.tools.train_scenes`."""

from fastvar_trt.tools.train_scenes.cli import main

main()
