"""The program of the process that renders chat templates: one JSON request per line, one JSON answer per line.

It is run as a file, not imported, so that it loads neither this package nor torch: it starts in a second and takes
60 MB. `betakd_ray.data.template_process` starts it and says why there is such a process.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

READY = "ready"
MEMORY_BYTES = 512 << 20
"""Limit in bytes of memory that templates may take together."""
ADDED_CHARACTERS = 1 << 20
"""Limit of the characters that a template may write beyond those of the request."""
MESSAGE_CHARACTERS = 200
"""Limit of the characters of an error's message, which a template can choose."""

_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
"""Pattern of an address in memory, as Python prints it for objects without a text of their own."""


class Unrepeatable(Exception):
    """A template used what gives another text each time. The message says what."""


def main() -> None:
    """Answer requests until the input ends, which is when the parent process does."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # rendering needs no torch: transformers runs without it
    from jinja2.defaults import DEFAULT_NAMESPACE
    from jinja2.filters import FILTERS
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    # Before the first template is compiled, which copies these tables.
    FILTERS["random"] = _refusing("the filter `random`")
    DEFAULT_NAMESPACE["lipsum"] = _refusing("the function `lipsum`")

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # elsewhere the system knows no such limit, or does not keep it
        # Beyond what is mapped now: libraries map much that they never use.
        with open("/proc/self/statm", "rb") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, mapped + MEMORY_BYTES)
    print(READY, flush=True)
    seconds = float(sys.argv[1])
    for line in sys.stdin:
        # The kernel ends the process with SIGPROF, also within one long operation of C code. CPU time does not pass
        # while the process waits, for a request or for a busy machine.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        print(json.dumps(_answer(render_jinja_template, _compile_jinja_template, line)), flush=True)


def _limit(kind: int, value: int) -> None:
    """Set a soft limit, or keep the hard limit if that is lower."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _answer(render: Any, compiled: Any, line: str) -> dict[str, str]:
    """Return {"text": …}, or what the template did instead as {"failed": …}, or {"exceeded": …} for a limit."""
    try:
        request = json.loads(line)
        date = datetime.fromisoformat(request["date"])
        # transformers renders with this same object, which it keeps, and gives it a function of the time of the call.
        compiled(request["template"]).globals["strftime_now"] = lambda wanted: date.strftime(wanted)
        (text,), _ = render(
            [request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=request["generation"],
            **request["variables"],
        )
        text.encode()
        if printed := next((each for each in _ADDRESS.findall(text) if each not in line), None):
            raise Unrepeatable(f"an object of Python, printed as `{printed}`,")
    except MemoryError:
        return {"exceeded": f"needs more than {MEMORY_BYTES >> 20} MB of memory", "restart": "returns the memory"}
    except UnicodeEncodeError as error:
        return {"failed": f"wrote half of a surrogate pair at character {error.start}"}
    except Unrepeatable as error:
        return {"failed": f"uses {error} which gives another text each time; a sample must always give the same text"}
    except Exception as error:  # the template's code may raise anything
        # jinja2's errors of other kinds are subclasses. This class itself is what a template's raise_exception raises.
        refused = type(error).__name__ == "TemplateError"
        return {"failed": f"refuses the conversation: {_of(error)}" if refused else f"raised {_named(error)}"}
    limit = len(line) + ADDED_CHARACTERS
    return {"text": text} if len(text) <= limit else {"exceeded": f"wrote more than {limit:,} characters"}


def _refusing(name: str) -> Callable[..., NoReturn]:
    """Return a function for a template to call in place of one whose result is random."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise Unrepeatable(f"{name},")

    return refuse


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {_of(error)}"


def _of(error: Exception) -> str:
    """Return an error's message, short and without control characters, which would reach a terminal."""
    text = str(error)[:MESSAGE_CHARACTERS]
    return "".join(letter if letter.isprintable() else " " for letter in text)


if __name__ == "__main__":
    main()
