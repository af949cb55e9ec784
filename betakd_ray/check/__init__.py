"""Checks that a teacher's signal is right, and that a student is what it was loaded from, before the first step.

Each check is a pure function that returns findings. `teacher.check_teacher` runs all of them on one loaded model.
"""
