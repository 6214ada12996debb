"""Types and functions without models that every other package uses."""
