"""`python -P -m sluice.workers -Q QUEUE`: what `celery -A sluice worker -Q QUEUE` starts, without the current folder's modules.

Celery's own command line puts the current folder first on the path while it imports: a user's `redis.py` there would shadow the
library.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

from celery.bin.celery import celery
from celery.utils import imports

from sluice.workers.app import app

imports.cwd_in_path = nullcontext  # Celery's later imports by name use the path as it is

celery.params[0].default = app  # instead of -A
sys.exit(celery(["worker", *sys.argv[1:]], prog_name="sluice", auto_envvar_prefix="CELERY"))
