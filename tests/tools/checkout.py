"""What the tests know of where they run. Imports nothing of weight: xdist's controller reads it too."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
THREADS = 1  # fixed, since sums over 1 and over 2 threads differ in their last bits; two test processes have two cores
