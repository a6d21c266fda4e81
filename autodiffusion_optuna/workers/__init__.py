"""One worker of a study, and what starts many."""
