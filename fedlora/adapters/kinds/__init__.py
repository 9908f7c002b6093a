"""Kinds of adapters: what is trained beside a frozen linear layer. One file for each."""
