"""Carry messages and bytes between the server and its launchers, authenticated and encrypted."""
