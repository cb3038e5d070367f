"""`python -m fastvar_trt.tools.gpu_check`."""

from fastvar_trt.tools.gpu_check.cli import main

if __name__ == "__main__":
    main()
