"""For Jupyter servers on a login node, by a JupyterHub or not: kernels on nodes, and room to wait for them.

Goes into ``/etc/jupyter``, or into ``etc/jupyter`` of the environment that the servers run in. Kernelspecs name
the provisioner, ``slurm-provisioner``; all others work as ever.
"""

c = get_config()  # noqa: F821

# Starts answer at once. While a kernel's job waits, its model says where and why, and it can be given up.
c.ServerApp.kernel_manager_class = "gateway_slurm.SlurmMappingKernelManager"

# A kernel that nobody uses costs nodes: end it after an hour, unless a frontend is open on it.
c.MappingKernelManager.cull_idle_timeout = 3600
c.MappingKernelManager.cull_interval = 300
