"""``method="auto"``: what pays on this machine, what a budget allows, and what is chosen.

`cost` predicts times from `times`, `budget` says what is asked for, `settings` what may be chosen,
`trials` measures it on the user's pipeline, `search` looks for the best, `choice` is what comes of
it and its file, and `automatic` is what `accelerate_pipeline` calls.
"""
