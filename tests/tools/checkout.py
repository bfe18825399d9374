"""The checkout's path, and the number of threads. Imports no large package, since xdist's controller imports it too."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
THREADS = 1  # fixed, since sums over 1 and over 2 threads differ in their last bits; two test processes use two cores
