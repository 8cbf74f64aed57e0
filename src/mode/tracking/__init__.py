"""MLflow: one run per model, the same metric names for every role, the ensemble as a registered model.

The only package that knows MLflow, and it imports it late, for that takes seconds. Everything lies in one folder::

    mlruns/mlflow.db     SQLite database (MLflow's plain file store is no longer maintained)
    mlruns/artifacts/    figures, reports, registered models
    mlruns/pending/      metrics that are not in the database yet: one journal per run in progress

A training must never fail or stall because of its bookkeeping. So `Run.log` only appends a line to the run's journal,
and a thread carries the journal into the database in batches. If the database is locked, the training goes on; what
is still in the journal when the process ends, killed or not, is sent the next time anyone opens the tracker.
"""
