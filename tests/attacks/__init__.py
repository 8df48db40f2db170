"""Attacks on a checkout with hostile input, faults and wrong usage: what held, what broke."""
