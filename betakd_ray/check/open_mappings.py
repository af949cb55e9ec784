"""Check of the mappings of a spec that belong to other libraries, by these libraries and without weights."""

import os

from betakd_ray.engine.check import check_deepspeed
from betakd_ray.spec import ConfigInit, JobSpec


def check_open_mappings(spec: JobSpec) -> None:
    """Check `training.deepspeed`, `student.init.config`, and `teacher.options` if the teacher is on this machine.

    A library is imported only if the spec has its mapping. Raises SpecError or ModelError.
    """
    check_deepspeed(spec)
    if isinstance(spec.student.init, ConfigInit):
        from betakd_ray.models.student import student_config

        # Without the vision tower, whose folder this does not read.
        init = spec.student.init.model_copy(update={"vision_tower": None})
        student_config(spec.student.model_copy(update={"init": init}))
    if spec.teacher is not None and spec.teacher.options and os.path.isdir(spec.teacher.path):
        from betakd_ray.models.load import load_config
        from betakd_ray.models.options import check_options

        check_options(spec.teacher, load_config(spec.teacher))
