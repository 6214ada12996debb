"""What the classifiers of recipes have in common: the classes."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from datasets import Dataset
from torch import nn

from ...models.model_types import unwrap_model
from .columns import ColumnTask
from .labels import Labels, find_labels, labels_of_models, with_label_ids

LABEL = "label"  # column of the data


class Classification(ColumnTask):
    """A task whose rows have one class each."""

    labels: Labels | None = None

    def with_labels(self, sources: Mapping[str, Dataset]) -> dict[str, Dataset]:
        """Return the sources with a column `labels` of the ids of the classes, in place of `label`."""
        columns = {self.where(name): (rows, LABEL) for name, rows in sources.items()}
        labels = find_labels(columns, labels_of_models(self.recipe))
        self.labels = labels
        return {name: with_label_ids(rows, LABEL, labels, self.where(name)) for name, rows in sources.items()}

    def label_names(self) -> Sequence[str]:
        """Return the names of the classes."""
        return () if self.labels is None else self.labels.names

    def model_options(self) -> dict[str, Any]:
        """Return the classes as fields of the config."""
        return {} if self.labels is None else self.labels.model_options()

    def adapt_student(self, model: nn.Module) -> nn.Module:
        """Give a student that was cut from its teacher the names of the classes."""
        if self.recipe.student.from_teacher and self.labels is not None:
            config = cast(Any, unwrap_model(model).config)
            options = self.labels.model_options()
            config.id2label, config.label2id = options["id2label"], options["label2id"]
        return model
