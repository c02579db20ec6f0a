"""RULER's 13 tasks (Hsieh et al., arXiv 2404.06654; wording and formulas of github.com/NVIDIA/RULER, Apache-2.0).

One file a family of tasks. Each renders text with pure functions of what was drawn (keys, values, words, places), so
that the rendering can be held against other implementations, and draws a `Question` for any amount of filler.
"""
