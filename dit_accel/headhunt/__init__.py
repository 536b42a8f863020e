"""HeadHunter (2506.10978): finds attention heads whose perturbation serves an objective.

`search` is the search itself, over anything that scores sets of heads; `evaluation` scores them by
generating; `objectives` says what is a good picture; `hunting` puts these together.
"""
