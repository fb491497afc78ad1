"""How a benchmark measures a row in a process of its own: the script starts itself with other arguments."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def json_of(script: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Any:
    """What the last line says, as JSON, that `script` prints in a process of its own.

    Args:
        script: its path.
        arguments: of its command line; what is no string becomes one.
        environment: variables that it has beside those of this process.

    Raises:
        RuntimeError: it failed; the message has its arguments and what it wrote to stderr.
    """
    command = [script, *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"`python {shlex.join(command)}` failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
