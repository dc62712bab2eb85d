"""The launcher: the one program that runs inside an allocation.

The job script carries these files and the package's ``link`` modules to the node as their own
source, so the node needs Python >= 3.9 and pycryptodome >= 3.23, and no shared file system.
"""
