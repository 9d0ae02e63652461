"""The child program of `chains.symbolic`: reads `[wanted, given, limit]` as JSON lines, answers one word each.

It imports nothing of the library, so that it starts fast and holds little memory.
"""

import contextlib
import json
import os
import signal
import sys


def main() -> None:
    # Only the answers may go to the pipe, whatever a library prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # ends the process, even inside one long operation
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGPROF))
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))

    from math_verify import parse, verify

    for line in sys.stdin:
        wanted, given, limit = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.setitimer(signal.ITIMER_REAL, 10 * limit + 30)
        try:
            # Its own time limits need the main thread and cannot interrupt one long operation.
            gold, target = (parse(f"${text}$", parsing_timeout=None) for text in (wanted, given))
            if all(isinstance(part, str) for part in target):
                found = "parse-error"
            else:
                found = "right" if gold and verify(gold, target, timeout_seconds=None) else "wrong"
        except (Exception, MemoryError, RecursionError):
            found = "parse-error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
