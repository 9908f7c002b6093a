"""Kinds of adapters. A kind says which tensors are trained beside a frozen linear layer; each has a file."""
