"""`python -m hf_distill` is the same program as `hf-distill`."""

from .cli import main

main()
