"""As many layers resident as the budget allows, the rest streamed from pinned host memory.

The plan's first `resident` layers stand on the device, the others in the host home. Every resident layer saves its whole
copy in every pass, so at decode, where copies are all that takes time, tokens/s grow as 1 / (bytes still streamed).
"""

from __future__ import annotations

MEMORY = "pinned_host"
FORM = "scan"
FORMS = ("scan", "ahead", "python")
REST = "host"
TIER = "host"
RESIDENT = 1
KEPT = None
