"""What ``dit-accel bench`` measures: kernels, forwards, whole generations, and tile shapes.

Each bench is an object that measures one task at a time (`isolated.Bench`), and a function that
says which tasks there are; `runs.run_tasks` does the rest.
"""
