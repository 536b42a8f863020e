"""Guidances by perturbation, one file each: what is perturbed in a pass to be guided away from."""
