"""Errors, events, files, processes and packaged assets, for every other package; this one imports none of them."""
