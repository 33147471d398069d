"""Everything that imports ray: the same engine on a cluster."""

import os
from pathlib import Path

# Ray reads this when it is imported, and an explicit address never turns token authentication on by itself; a token of
# this user says that it is wanted.
if (Path.home() / ".ray" / "auth_token").exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
