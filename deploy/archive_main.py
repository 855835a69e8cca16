"""The __main__.py of step3_infer.pyz. Python 2 can parse it, to say which Python is needed."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  an older Python would fail later, with a traceback
    sys.exit("error: Python 3.10 or newer is needed, this is Python " + sys.version.split()[0])

import runpy  # it costs nothing: Python has imported it to run the archive

runpy.run_module("step3_infer", run_name="__main__")
