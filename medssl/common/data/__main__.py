"""python -m medssl.common.data PATH: looks at a set of images; with --to it writes one."""

from .. import cli
from . import look

if __name__ == "__main__":
    cli.run(look.main)
