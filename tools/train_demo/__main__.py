"""`python -m fastvar_trt.tools.train_demo`."""

from fastvar_trt.tools.train_demo.cli import main

main()
