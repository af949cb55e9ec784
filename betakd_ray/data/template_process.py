"""A model's chat template, rendered in a process of its own with limited time and memory.

A template is a program, and a model's folder may be anyone's. The sandbox of jinja2 keeps it from files and from
Python's internals, but not from running for ever or from filling the memory: `{{ 'a' * 10**10 }}`, a loop in a loop,
`{{ 10**10**10 }}`. Python cannot interrupt one long operation of C code in its own process, and a signal reaches only
the main thread. The kernel can end another process, whatever that does. So each process that renders has one child for
it, which starts with the first chat template and ends with its parent.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import cache
from threading import Lock
from typing import Any

from betakd_ray.data import template_program
from betakd_ray.data.template_program import READY
from betakd_ray.errors import SECRET_VARIABLES

SECONDS = 2.0
"""Limit in seconds of CPU time for one conversation. A template of a published model takes a thousandth of it."""
ATTEMPTS = 2
"""Number of processes that may die of one conversation: the first may have been ended by the system for its memory."""


class TemplateFailed(Exception):
    """A template gave no text. The message says what it did instead: "raised ZeroDivisionError: division by zero"."""


class TemplateExceeded(TemplateFailed):
    """A template exceeded a limit of time, memory or length."""


def render_template(
    template: str, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any], date: date, *, generation: bool
) -> str:
    """Return the text of a conversation by a chat template, as transformers renders it on that date at midnight.

    The same arguments give the same text, at any time and in any process. Raises TemplateFailed; TemplateExceeded
    beyond the limits of `betakd_ray.data.template_program`.
    """
    request = {"template": template, "messages": messages, "variables": variables, "generation": generation}
    request["date"] = date.isoformat()
    return _process(os.getpid()).render(json.dumps(request, default=str))


@cache
def _process(_pid: int) -> "TemplateProcess":
    """Return this process's own child: a fork must not share the pipes of the process that it was forked from."""
    return TemplateProcess()


class TemplateProcess:
    """A child process that renders templates. It is started when needed, also after it died. Threads take turns."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: subprocess.Popen[str] | None = None
        atexit.register(self._end)

    def render(self, request: str) -> str:
        """Return the text of one request. Raises TemplateFailed or TemplateExceeded."""
        with self._lock:
            answer = self._answer(request)
        if "failed" in answer:
            raise TemplateFailed(answer["failed"])
        if "exceeded" in answer:
            raise TemplateExceeded(answer["exceeded"])
        return answer["text"]

    def _answer(self, request: str) -> dict[str, str]:
        status = 0
        for _ in range(ATTEMPTS):
            child = self._child or self._start()
            try:
                line = _exchanged(child, request)
            except BaseException:
                # Interrupted between question and answer: the next question would get this answer.
                self._end()
                raise
            if line.endswith("\n"):
                answer = json.loads(line)
                if "restart" in answer:
                    self._end()
                return answer
            status = child.wait()
            self._end()
            if status == -signal.SIGPROF:
                return {"exceeded": f"took more than {SECONDS:g} s of CPU time"}
        return {"exceeded": f"ended the process that renders it, {ATTEMPTS} times, with {_status(status)}"}

    def _start(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        # The paths of this process, which may have got some at run time. One thread for numpy, which maps memory for
        # each. Without the level, transformers reports that there is no torch.
        environment |= {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OPENBLAS_NUM_THREADS": "1",
            "TZ": "UTC",  # for strftime's %s, which would depend on the machine's zone
            "TRANSFORMERS_VERBOSITY": "critical",
        }
        command = [sys.executable, "-P", template_program.__file__, str(SECONDS)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent
        )
        self._child = child
        assert child.stdout is not None
        if child.stdout.readline().strip() != READY:
            self._end()
            raise RuntimeError(
                f"the process that renders chat templates did not start; its own error is in this process's log. "
                f"Its command is {' '.join(command)}"
            )
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        # Closing the pipes writes the rest of a request that the process did not read.
        with suppress(BrokenPipeError), child:
            pass


def _exchanged(child: subprocess.Popen[str], request: str) -> str:
    """Return the answer as a line; a text without a line end if the process died."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(request + "\n")
        child.stdin.flush()
        return child.stdout.readline()
    except BrokenPipeError:
        return ""


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
