"""The commands' functions: `cli.py` is the table of them. Nothing heavy is imported before a command runs."""
