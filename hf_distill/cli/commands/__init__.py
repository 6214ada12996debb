"""The commands of hf-distill, one file for each command or group of commands."""
