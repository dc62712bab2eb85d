"""``jupyter slurm doctor``: what is wrong with a site or a kernelspec, and how to mend it. Changes nothing unasked."""
