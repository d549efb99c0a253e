"Kills training processes at random moments, resumes them, and compares with one left alone; prints a JSON line"
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from pgolf.train.checkpoint import load_weights
from pgolf.train.run_log import read_log
from pgolf.train.train import train
from train_tools import QUICK, TINY, toy_dataset

root, kills = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dataset = toy_dataset(root / "data")
cfg = replace(QUICK, steps=80, averaging="swa_ema", swa_start=.9, warmdown_iters=70, checkpoint_seconds=.03)


def start(run):
    pid = os.fork()
    if pid: return pid
    try: train(TINY, cfg, dataset, run, progress=False)
    except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)
    os._exit(0)


def steps_of(run): return [(r["step"], r["loss"], r["lr"], r["momentum"], r["grad_norm"]) for r in read_log(run / "train.jsonl") if r["event"] == "step"]


def wait_for(run, step, seconds=60):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and len(steps_of(run)) < step: time.sleep(.001)


assert os.waitpid(start(root / "whole"), 0)[1] == 0
want, log, rng, told = load_weights(root / "whole" / "weights.pt").state_dict(), steps_of(root / "whole"), random.Random(0), []
for i in range(kills):
    run = root / f"run{i}"
    pid = start(run)
    wait_for(run, rng.randrange(cfg.steps - 10))
    time.sleep(rng.uniform(0, .03))
    os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    at = len(steps_of(run))
    ended = os.waitpid(start(run), 0)[1]
    resumed = [r["step"] for r in read_log(run / "train.jsonl") if r["event"] == "resume"]
    got = load_weights(run / "weights.pt").state_dict()
    told.append({"killed": killed, "after_step": at, "resumed_at": resumed, "status": ended, "log": steps_of(run) == log,
                 "weights": all(torch.equal(want[n], got[n]) for n in want)})
print(json.dumps(told))
