"""The commands of ``adopt``, one module for each group; ``cli.py`` puts them together and catches errors."""
