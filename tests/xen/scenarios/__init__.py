"""Programs that run in dom0 of the laboratory: `python3 -m tests.xen.scenarios` there, started by dom0's init."""
