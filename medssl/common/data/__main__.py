"""python -m medssl.common.data PATH: looks at a set of images; with --to it prepares one."""

from .. import cli
from . import prepare

if __name__ == "__main__":
    cli.run(prepare.main)
