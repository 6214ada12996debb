"""Names of the files in a run folder."""

RECIPE = "recipe.yaml"  # the resolved recipe
RESULTS = "results.json"  # metrics, models and environment
PRUNING = "pruning.json"  # the units of the teacher that a pruned student consists of
METRICS = "metrics.jsonl"  # the values that were logged during training
NONFINITE_STEPS = "nonfinite_steps.json"  # the steps that were skipped or ended the run
INSPECTION = "inspection.json"
DIAGNOSIS = "diagnosis.json"
RETENTION = "retention.json"
TEMPERATURE_SEARCH = "temperature.json"
SHAPE_SEARCH = "shapes.json"  # of `hf-distill prune` with target_parameters
SAMPLES = "samples.json"
DRAFT = "draft.json"
CURVE = "curve.json"
REPORT = "report.html"
GENERATED_DATA = "generated_data.json"  # evaluation of the generated data sets that the run was trained on
GENERATED = "generated"  # folder: the data sets that the teacher has generated, by source
GENERATION = "generation.json"  # of a generated data set: what its completions were generated from
