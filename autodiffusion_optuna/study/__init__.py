"""The composition root: the only folder that sees both the search and the evaluation."""
