"""From a recipe to a run's folder: models, data, trainers, evidence."""
