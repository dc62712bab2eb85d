"""Settings of Jupyter servers on a login node, with or without a JupyterHub: kernels run on nodes.

Copy this file to ``/etc/jupyter``, or to ``etc/jupyter`` in the servers' environment. Kernelspecs that name the
provisioner ``slurm-provisioner`` run on nodes; all others run on this machine as before.
"""

c = get_config()  # noqa: F821

# A start is answered at once. While a kernel's job waits, the kernel's model says why, and the user can cancel it.
c.ServerApp.kernel_manager_class = "gateway_slurm.SlurmMappingKernelManager"

# An unused kernel occupies nodes: end it after an hour, unless a frontend is connected to it.
c.MappingKernelManager.cull_idle_timeout = 3600
c.MappingKernelManager.cull_interval = 300
