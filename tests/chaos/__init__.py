"""Kill tests of background jobs: real processes on tiny real bases, faults at random moments, invariants counted."""
