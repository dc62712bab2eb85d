"""Which kernelspecs and projects a user has, and within which limits. Knows no running kernel."""
