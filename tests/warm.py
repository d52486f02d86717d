"""One process that imports PyTorch once, and forks for each job that a test gives it.

A test starts `Warm('resume_worker')` and calls `run(...)`, which calls the worker's `main` in forks: one, or several
that find each other as torchrun's processes do.
"""
import importlib, json, os, signal, subprocess, sys, tempfile, traceback
from pathlib import Path


class Warm:
    def __init__(self, worker):
        env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[1])}  # this checkout's package, not an installed one
        self.process = subprocess.Popen([sys.executable, __file__, worker], env=env, text=True, encoding='utf-8', stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, *args, n=1, **env):
        "The exit status of each of n processes, and what they wrote"
        print(json.dumps([list(map(str, args)), n, env]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def forked(main, args, env, output):
    "Call a function in a process of its own"
    if pid := os.fork(): return pid
    status = 1
    try:
        signal.alarm(300)
        for number in (1, 2): os.dup2(output.fileno(), number)
        os.environ.update(env)
        main(*args)
        status = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def serve(main):
    "Do the jobs that come in, a line each"
    for line in sys.stdin:
        args, n, env = json.loads(line)
        with tempfile.TemporaryFile('w+', encoding='utf-8') as output:
            places = [{'RANK': str(k), 'LOCAL_RANK': str(k), 'WORLD_SIZE': str(n)} if n > 1 else {} for k in range(n)]
            processes = [forked(main, args, env | place, output) for place in places]
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]
            output.seek(0)
            print(json.dumps([statuses, output.read()]), flush=True)


if __name__ == '__main__': serve(importlib.import_module(sys.argv[1]).main)
