"""The device, the processes and the versions that a run computes on."""
