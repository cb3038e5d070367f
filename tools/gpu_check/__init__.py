"""Everything that needs a GPU, in one command: `python -m fastvar_trt.tools.gpu_check`."""
