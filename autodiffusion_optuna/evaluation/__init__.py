"""From a candidate to its value: models, solvers, images, features, distances. Needs torch, never Optuna."""
