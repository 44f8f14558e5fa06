# Copyright 2026 The img2img-ddpo authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Hundreds of kills and signals at random moments, by hand:

    OMP_NUM_THREADS=1 python tests/soak.py --faults 200

A short run is struck by SIGKILL, SIGTERM or SIGINT at a random moment, resumed, struck again, until it completes; then
the next run begins. Of two ranks a random one is struck, and the other one is ended as a launcher would. What counts as
a loss: a resumed run that does not start or finds a damaged checkpoint, epochs that were completed and saved and are
done again, a wrong exit code, or a completed run whose LoRA, optimizer, statistics or metrics differ in one bit from
those of a run that nothing happened to. Exits later than 10 seconds after a signal are counted beside the losses: they
also depend on what else the machine does.
"""

import argparse
import collections
import json
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  # environment and path
from runs import Warm, assert_same, make_files, options, read_result


SETTINGS = {"advantage": "tracker", "ema_decay": 0.5, "num_train_epochs": 6, "validation_epochs": 3}


def newest(output_dir: Path) -> int:
    return max((int(p.name.rpartition("-")[2]) for p in output_dir.glob("checkpoint-*")), default=-1)


def strike(runs: list, number: int, moment: float) -> float | None:
    """Signals one of the runs at `moment` after the start; the seconds until all had left, or None if they were done."""
    end = time.monotonic() + moment
    while time.monotonic() < end:
        if all(run.poll() is not None for run in runs):
            return None
        time.sleep(0.005)
    victim = random.choice(runs)
    if victim.poll() is not None:  # done: the other one may still be on its way out
        for run in runs:
            run.wait(60)
        return None
    struck = time.monotonic()
    victim.kill(number)
    victim.wait(30)
    for run in runs:  # as torchrun does when one of its processes has failed
        if run.poll() is None:
            run.kill(signal.SIGTERM)
    for run in runs:
        run.wait(60)
    return time.monotonic() - struck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--faults", type=int, default=200, help="Kills and signals to inject.")
    parser.add_argument("--minutes", type=float, default=60, help="Stop after this time in any case.")
    parser.add_argument("--two_ranks", type=float, default=0.25, help="Share of the runs that have two processes.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments and signals.")
    args = parser.parse_args()
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="img2img-ddpo-soak-"))
    make_files(folder)
    warm = Warm()
    expected, lengths = {}, {}
    for processes in (1, 2):
        start = time.monotonic()
        arguments = options(folder, folder / f"whole-{processes}", **SETTINGS)
        log = folder / "whole.log"
        runs = [warm.start(arguments, log)] if processes == 1 else warm.start_ranks(arguments, log)
        assert [run.wait(120) for run in runs] == [0] * processes, runs[0].output
        expected[processes] = read_result(folder / f"whole-{processes}")
        lengths[processes] = time.monotonic() - start

    faults, losses, where, slowest = collections.Counter(), [], collections.Counter(), 0.0
    completed, starts, late, began = 0, 0, 0, time.monotonic()
    while sum(faults.values()) < args.faults and time.monotonic() - began < 60 * args.minutes:
        processes = 2 if random.random() < args.two_ranks else 1
        output_dir = folder / "run"
        shutil.rmtree(output_dir, ignore_errors=True)
        for _ in range(1000):
            before, starts = newest(output_dir), starts + 1
            arguments = options(folder, output_dir, **SETTINGS, resume_from_checkpoint="latest")
            log = folder / f"run-{starts}.log"
            runs = [warm.start(arguments, log)] if processes == 1 else warm.start_ranks(arguments, log)
            number = random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            took = strike(runs, number, random.uniform(0, 0.6 * lengths[processes]))
            codes = [run.returncode for run in runs]
            told = runs[0].output
            problem = None
            if "cannot be read" in told or newest(output_dir) < before:
                problem = "a checkpoint was lost"
            elif before > 0 and "epoch" in told and f"{before} epochs are completed" not in told and "trust" in told:
                problem = "completed epochs were done again"
            elif took is None and codes != [0] * processes:
                problem = "a run that was not struck failed"
            elif took is not None and number != signal.SIGKILL:
                slowest = max(slowest, took)
                allowed = {0, 128 + number, 128 + signal.SIGTERM, -number, -signal.SIGTERM}
                if processes == 1 and codes[0] not in {0, 128 + number, -number}:
                    problem = f"exit code {codes[0]}"
                elif processes == 2 and not any(code in allowed for code in codes):
                    problem = f"exit codes {codes}"
                late += took > 10
            if took is not None:
                faults[f"{signal.Signals(number).name} on {processes} process(es)"] += 1
                stage = "training" if "trust" in told else "starting"
                where[f"{stage}, {max(newest(output_dir), 0)} epochs saved"] += 1
            if problem:
                losses.append(f"{problem}: {log}")
                print("LOSS", losses[-1], flush=True)
            done = codes == [0] * processes
            if not problem:
                for path in folder.glob(f"run-{starts}.*"):
                    path.unlink()
            if done:
                break
        try:
            assert_same(read_result(output_dir), expected[processes])
        except AssertionError as e:
            losses.append(f"a completed run differs: {e}")
            print("LOSS", losses[-1], flush=True)
        completed += 1
        print(f"{sum(faults.values())} faults, {completed} runs completed, {len(losses)} losses", flush=True)
    warm.close()
    minutes = (time.monotonic() - began) / 60
    summary = {
        "faults": sum(faults.values()), "by kind": dict(sorted(faults.items())), "by moment": dict(sorted(where.items())),
        "starts": starts, "runs completed and bit-equal": completed - sum("differs" in loss for loss in losses),
        "slowest exit after SIGTERM or SIGINT, seconds": round(slowest, 2), "exits after more than 10 s": late, "minutes": round(minutes, 1),
        "losses": losses,
    }  # fmt: skip
    print(json.dumps(summary, indent=2))
    if losses:
        raise SystemExit(f"{len(losses)} losses; logs in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
