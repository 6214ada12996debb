"""Public name of `models/declared_types.py`: types of models that the user registers."""

from .models.declared_types import register_model_type

__all__ = ["register_model_type"]
