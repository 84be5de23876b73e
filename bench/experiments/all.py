"""All experiments, one after another.

python bench/experiments/all.py [--seeds 3] [--steps N] [--scene both] [--output FOLDER]
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    for script in sorted(HERE.glob("[a-z]_*.py")):
        print(script.stem)
        ended = subprocess.run([sys.executable, script, *sys.argv[1:]])
        if ended.returncode != 0:
            return ended.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
