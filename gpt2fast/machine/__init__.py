"""The device, the processes and the software versions of a run."""
