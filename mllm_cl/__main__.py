"""`python -m mllm_cl` is the same as `mllm-cl`."""

import sys

from mllm_cl.cli import main

sys.exit(main())
