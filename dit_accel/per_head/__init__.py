"""A density for every layer and head instead of one for all.

`allocation` shares a budget out by error curves (read it first; it knows no model), `curves`
measures them on the user's pipeline, `method` runs any attention method so, and `sharing` is what
`accelerate_pipeline(..., per_head=...)` calls.
"""
