"""The quality guard: measures sparse attention against dense while it runs, and repairs it."""
