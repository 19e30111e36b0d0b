"""Python imports this at its start: a child process begun with SIMMPS_LIB has the pretend Apple GPU, and so has each of
its own children (a probe starts some). It must be there before anything asks torch for one, as the answer is kept."""

import os
import sys

if "SIMMPS_LIB" in os.environ:
    import torch

    torch.ops.load_library(os.environ["SIMMPS_LIB"])
    torch._C._has_mps = True
    # Only the macOS build has these two.
    torch._C._mps_get_name = lambda: os.environ.get("SIMMPS_CHIP", "Apple M4")
    torch._C._mps_get_core_count = lambda: 10

if "SIMMPS_FATES" in os.environ and "siliconlm.tuning.child" in sys.orig_argv:
    import fates

    fates.await_them()
