"""Secure sums: the server learns the sum of the clients' numbers, and of no client its own.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
https://doi.org/10.1145/3133956.3133982, with the sparse graph of Bell et al. 2020, "Secure Single-Server Aggregation
with (Poly)Logarithmic Overhead", https://eprint.iacr.org/2020/704. A round has four phases:

1. *keys*: each client draws secrets for this round, and sends two public keys and a fingerprint of its self-mask. Its
   node may sign them.
2. *shares*: each client splits its two secrets among its neighbours, encrypted for them; the server keeps the letters.
3. *train*: each client sends its numbers, modulo 2^64, plus its self-mask, plus or minus a mask for each neighbour
   that both of them can compute. In a sum over all clients, the masks between neighbours cancel.
4. *unmask*: neighbours open their shares: of the self-mask for a client whose numbers arrived, of the masking key for
   one whose numbers did not. They never open both. The server subtracts the masks that are left.

The files of this folder are pure functions on numbers and bytes: `numbers` (fixed point), `keys`, `sharing`, `masks`,
`neighbours`, `signatures`. They send and store nothing.
"""
