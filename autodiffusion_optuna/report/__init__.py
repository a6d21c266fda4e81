"""What a study looks like: figures, page, dashboard."""
