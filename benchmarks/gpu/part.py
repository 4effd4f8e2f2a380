"""The process of one part: `python -m benchmarks.gpu.part JSON`, started by parts.py."""

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.parts import Job


def main(text: str):
    """Run the part that the text tells of; exit status 1, and the error saved, if it raises."""
    told = json.loads(text)
    module, _, function = told.pop("function").partition(":")
    settings = told.pop("settings")
    job = Job(**told)
    job.folder = Path(job.folder)
    job.photographs = job.photographs and Path(job.photographs)

    try:
        getattr(importlib.import_module(module), function)(job, **settings)
    except Exception as error:  # whatever a part meets is its result
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        job.save(f"{type(error).__name__}: {first_line}")
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
