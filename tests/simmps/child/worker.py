"""Several silicon commands in one process, so that torch is imported once.

Reads a JSON list of commands (lists of words) on stdin; writes a list of [exit code, stdout, stderr].
"""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

from siliconlm.cli.app import main


def run(words: list[str]) -> tuple[int | str | None, str, str]:
    sys.argv = ["silicon", *words]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as ended:
            return ended.code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(json.dumps([run(words) for words in json.load(sys.stdin)]))
