"""The launcher: the one program that runs inside an allocation.

The job script carries the source of these files, and of some ``link`` modules, to the node. So the node needs
Python >= 3.9 and pycryptodome >= 3.23, but no shared file system.
"""
