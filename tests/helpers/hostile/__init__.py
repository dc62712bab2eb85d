"""Hostile users against a gateway with real Unix users: the attacks, their programs, and what another user feels."""
