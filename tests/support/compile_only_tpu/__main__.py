"""Runs code, a module or a script on a compile-only TPU, as ``python`` itself would."""

import runpy
import sys

from tests.support.compile_only_tpu.running import open_tpu


def main() -> None:
    open_tpu()
    kind, *rest = sys.argv[1:]
    if kind == "-c":
        code, *sys.argv[1:] = rest
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
