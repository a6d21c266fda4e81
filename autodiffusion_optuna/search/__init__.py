"""The search: which candidate to try next. Knows Optuna and numpy, never torch."""
