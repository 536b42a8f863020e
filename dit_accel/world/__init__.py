"""The drawn worlds that the bundled models learn from, and the checkers that read them back.

`clips` and `pictures` draw training data and write its captions; `clip_checker` and
`picture_checker` read the attributes off generated clips and pictures.
"""
