"""What every room may use: errors, events, files, processes, packaged assets. Imports nothing of the house."""
