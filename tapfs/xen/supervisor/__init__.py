"""The supervisor (`tapfs blktapctrl`): claims devices and keeps one process running for each."""
