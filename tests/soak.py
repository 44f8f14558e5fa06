"""
Hundreds of kills at random moments, by hand:

    python tests/soak.py --kills 200 --two_ranks 0.25

A short run is struck by SIGKILL, SIGTERM or SIGINT at a random moment, resumed, struck again, until it completes; then
the next one begins. Of two ranks a random one or the launcher is struck. A loss is a damaged checkpoint, an epoch that
was announced and is not in the newest checkpoint, a run that fails without being struck, or a completed run whose LoRA,
optimizer, statistics or metrics differ in one bit from those of a run that nothing happened to.
"""

import argparse
import collections
import contextlib
import os
import random
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  # environment and path
from runs import Run, assert_same, make_files, newest, options, read_result, torchrun


SETTINGS = {"advantage": "tracker", "num_train_epochs": 12, "resume_from_checkpoint": "latest"}


def strike(run: Run, number: int, moment: float, pids: Path) -> bool:
    """Signals the script, a rank or the launcher at `moment` after the start; False if it was done before."""
    end = time.monotonic() + moment
    while time.monotonic() < end and run.poll() is None:
        time.sleep(0.01)
    if run.poll() is None:
        ranks = [int(path.read_text() or 0) for path in pids.parent.glob(f"{pids.name}*")]
        with contextlib.suppress(ProcessLookupError):  # a rank that has just left
            os.kill(random.choice([run.pid, *filter(None, ranks)]), number)
            run.wait()
            return True
    run.wait()
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--two_ranks", type=float, default=0.25, help="Share of the runs that have two processes.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments and signals.")
    args = parser.parse_args()
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="img2img-ddpo-soak-"))
    make_files(folder)
    expected, lengths, began = {}, {}, time.monotonic()
    for processes in (1, 2):
        start, whole = time.monotonic(), folder / f"whole-{processes}"
        launcher = torchrun(2) if processes == 2 else []
        Run(options(folder, whole, **SETTINGS), folder / "log", launcher=launcher).succeed()
        expected[processes], lengths[processes] = read_result(whole), time.monotonic() - start

    kills, losses, completed, output_dir, pids = collections.Counter(), [], 0, folder / "run", folder / "pid-"
    inject = f"if 'RANK' in os.environ:\n    Path('{pids}' + rank).write_text(str(os.getpid()))"
    while sum(kills.values()) < args.kills:
        processes, code = 2 if random.random() < args.two_ranks else 1, None
        shutil.rmtree(output_dir, ignore_errors=True)
        while code != 0:
            for path in folder.glob("pid-*"):
                path.unlink()
            launcher = torchrun(2) if processes == 2 else []
            run = Run(options(folder, output_dir, **SETTINGS), folder / "log", inject=inject, launcher=launcher)
            number = random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            struck = strike(run, number, random.uniform(0.4, 1.0) * lengths[processes], pids)
            if struck:
                kills[f"{number.name}, {processes} process(es)"] += 1
            time.sleep(0.5 * (processes - 1))  # a killed launcher's ranks leave on their own
            code, announced = run.poll(), [int(x) for x in re.findall(r"^epoch (\d+): ", run.output, re.M)]
            if "cannot be read" in run.output or max(announced, default=0) > newest(output_dir):
                losses.append(f"epochs {announced}, newest {newest(output_dir)}: {run.output}")
            if not struck and code != 0:
                losses.append(f"failed without being struck: {run.output}")
                break
        try:
            assert_same(read_result(output_dir), expected[processes])
        except (AssertionError, OSError) as e:
            losses.append(f"a completed run differs: {e}")
        completed += 1
        print(f"{sum(kills.values())} kills, {completed} runs completed, {len(losses)} losses", *losses, flush=True)
    print(dict(sorted(kills.items())), f"{(time.monotonic() - began) / 60:.1f} minutes")
    shutil.rmtree(folder)
    raise SystemExit(f"{len(losses)} losses" if losses else 0)


if __name__ == "__main__":
    main()
