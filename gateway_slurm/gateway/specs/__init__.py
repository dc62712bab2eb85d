"""The kernelspecs and projects of each user, and the projects' limits. Knows no running kernel."""
