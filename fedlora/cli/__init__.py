"""The `fedlora` command: one file for each group of commands."""
