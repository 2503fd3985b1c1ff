"""Time of `segkit --help`: median and range over whole processes.

python benchmarks/startup.py
"""

import shutil
import statistics
import subprocess
import time


def main() -> None:
    """Run the command eleven times and print one line."""
    command = shutil.which("segkit")
    if command is None:
        raise SystemExit("expected the command segkit on the PATH; activate its environment")
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    print(
        f"segkit --help: median {statistics.median(seconds):.3f} s, "
        f"{min(seconds):.3f} to {max(seconds):.3f} s in {len(seconds)} runs"
    )


if __name__ == "__main__":
    main()
