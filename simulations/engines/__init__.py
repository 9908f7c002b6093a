"""Where the clients of a simulation run."""
