"""The files that a run writes to its folder, and how a run is shown."""
