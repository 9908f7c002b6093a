"""The engines, which run the clients of a simulation."""
