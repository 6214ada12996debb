"""`hf-distill serve`: a frozen teacher behind HTTP."""
