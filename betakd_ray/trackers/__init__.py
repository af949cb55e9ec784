"""Trackers: where the numbers of a run go beside its own folder, for people to look at.

A tracker never ends, restarts or delays a job: each has a thread of its own (`thread`), which keeps what its server
does not take, and tries again. `check` finds what is wrong before a job asks for resources.
"""
