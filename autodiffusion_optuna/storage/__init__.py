"""Where a study is kept: the only folder that touches Optuna's storages."""
