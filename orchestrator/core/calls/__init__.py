"""What ``ctx`` can be asked for, by subject; ``Context`` puts them together."""
