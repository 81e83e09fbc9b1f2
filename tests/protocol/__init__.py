"""Executable models of the protocol: explored state by state, with every rule and without each of them."""
