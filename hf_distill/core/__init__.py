"""Types and functions that all other packages use; none of them needs a model."""
