"""One file for each command of hf-distill."""
