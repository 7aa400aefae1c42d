"""Print one of the README's commands: the line after ``<!-- command: NAME -->`` and its fence."""

from __future__ import annotations

import re
import sys
from pathlib import Path

name = sys.argv[1]
text = Path("README.md").read_text()
found = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```", text, re.DOTALL)
if found is None:
    sys.exit(f"README.md has no command called {name}")
print(found.group(1))
