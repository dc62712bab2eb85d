"""``jupyter slurm doctor``: find what is wrong with a site or a kernelspec. It changes nothing without ``--fix``."""
